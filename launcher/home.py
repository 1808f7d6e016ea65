"""What mixlaunch keeps for its user on this machine between commands: the folder, as XDG has it, and nothing else.

Copies of runs, the sandbox, lines typed in `chat` and the runs of `local` lie below it.
"""

import os
from pathlib import Path


def state() -> Path:
    """`mixlaunch` in the user's state folder."""
    return Path(os.path.expanduser(os.environ.get("XDG_STATE_HOME") or "~/.local/state"), "mixlaunch")
