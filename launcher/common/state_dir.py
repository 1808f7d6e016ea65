"""What mixlaunch keeps for its user on this machine between commands: the folder, as XDG has it, and nothing else.

Copies of runs, the sandbox, lines typed in `chat` and the runs of `local` lie below it.
"""

import os
from pathlib import Path

from launcher.errors import UsageError


def state() -> Path:
    """`mixlaunch` in the user's state folder; `UsageError` where it is nobody's."""
    folder = Path(os.path.expanduser(os.environ.get("XDG_STATE_HOME") or "~/.local/state"), "mixlaunch")
    if not folder.is_absolute():
        raise UsageError(f"{folder} isn't absolute; set HOME or XDG_STATE_HOME")
    return folder
