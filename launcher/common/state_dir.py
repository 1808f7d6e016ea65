"""The folder in which mixlaunch keeps files between commands on this machine, by the XDG rules.

Copies of runs, the sandbox, lines typed in `chat` and the runs of `local` lie below it.
"""

import os
from pathlib import Path

from launcher.errors import UsageError


def state() -> Path:
    """`mixlaunch` in the user's state folder; `UsageError` if there is no absolute path for it."""
    folder = Path(os.path.expanduser(os.environ.get("XDG_STATE_HOME") or "~/.local/state"), "mixlaunch")
    if not folder.is_absolute():
        raise UsageError(f"{folder} isn't absolute; set HOME or XDG_STATE_HOME")
    return folder
