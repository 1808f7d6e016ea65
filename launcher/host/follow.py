"""Follows logs and events of a run behind a login node: one stream keeps the copy up to date.

Readers use the copy like the run itself, and the stream appends new data to it.
"""

import atexit
import re
import shlex
import subprocess
import threading
import time
from pathlib import Path
from typing import IO

from launcher.host import copies, ssh
from launcher.host.base import LostError
from launcher.host.ssh import Login
from megatron_mixtral.spec import rundir

POLL = 1  # seconds between two looks over there
TRIES = 3  # of a stream that ends before it says anything
PATIENCE = 15  # seconds that the last words of an ended job may take
NAME = re.compile(r"events\.jsonl|logs/attempt_\d+/\w+\.log")
# Frames: "PATH FROM BYTES" and so many bytes of that file; "- 0 0" after a look that found nothing more.
SCRIPT = """
cd {run} || exit
old={known}
while :; do
  new=$(wc -c logs/attempt_*/*.log events.jsonl 2>/dev/null | sed 's/^ *//; / total$/d')
  printf '%s\\n' "$new" | grep -vxF "$old" | while read -r size path; do
    from=$(printf '%s\\n' "$old" | sed -n "s|^\\([0-9]*\\) $path\\$|\\1|p")
    from=${{from:-0}}
    [ "$size" -gt "$from" ] || continue
    echo "$path $from $((size - from))" || exit
    tail -c +$((from + 1)) "$path" | head -c $((size - from)) || exit
  done
  old=$new
  echo "- 0 0" || exit
  sleep {poll}
done
"""


class Stream:
    """Runs until `settle` or the end of this process; a broken stream is opened again."""

    def __init__(self, login: Login, run: Path) -> None:
        self._login, self._run = login, run
        self._looks = self._failures = 0
        self._broken = self._stopped = False
        self._begin()
        atexit.register(self._stop)

    def check(self) -> None:
        """Open a broken stream again, from what the copy holds by now; `Fault` without a connection."""
        if not self._broken:
            return
        ssh.end(self._process)
        ssh.forget(self._login)
        self._failures += 1
        if self._failures == TRIES:
            raise LostError(
                f"login node {self._login.host}: no connection lasts, or {self._run.name} was removed there"
            )
        self._begin()

    def settle(self) -> None:
        """Wait until everything that is there by now is in the copy, and end."""
        wanted, deadline = self._looks + 2, time.monotonic() + PATIENCE  # the look under way may have begun before
        while self._looks < wanted and time.monotonic() < deadline:
            self.check()
            time.sleep(0.05)
        self._stop()

    def _begin(self) -> None:
        self._broken = False
        self._process = ssh.stream(self._login, _script(self._run))
        threading.Thread(target=self._read, args=[self._process], daemon=True).start()

    def _stop(self) -> None:
        self._stopped = True
        atexit.unregister(self._stop)
        ssh.end(self._process)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        try:
            while True:
                self._frame(process.stdout)
        except (OSError, ValueError):
            self._broken = not self._stopped

    def _frame(self, stream: IO[bytes]) -> None:
        name, start, size = stream.readline().decode().split()
        self._failures = 0
        if name == "-":
            self._looks += 1
            return
        if not NAME.fullmatch(name):
            raise ValueError(name)
        chunk = stream.read(int(size))  # a broken stream's last piece is short, and as good as the rest
        path = self._run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with path.open("r+b") as file:
            file.seek(int(start))
            file.write(chunk)


def _script(run: Path) -> str:
    """Starts from what the copy holds."""
    logs = [*run.glob("logs/attempt_*/*.log"), *run.glob(rundir.EVENTS)]
    known = "\n".join(f"{path.stat().st_size} {path.relative_to(run)}" for path in logs)
    return SCRIPT.format(run=shlex.quote(str(copies.original(run))), known=shlex.quote(known), poll=POLL)
