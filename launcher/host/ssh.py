"""A login node over OpenSSH: scripts run by its /bin/sh, files copied by rsync, all through one shared connection.

Each command travels as a script on the remote shell's stdin. So no value is in an argument list at either end, the
user's login shell reads none, and the output of start-up files is told apart from the script's.
"""

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import Fault
from launcher.host.base import Done, LostError, MissingError

CONNECT_TIMEOUT = 15  # seconds, unless the user's own configuration says another
OPEN_TIMEOUT = 60  # of a connection without a terminal: jump hosts and all
PERSIST = 600  # seconds that the shared connection stays open when nobody uses it
RETRY = 10  # before a host that didn't answer is tried again
ALIVE = 15  # seconds between signs of life; three missing ones end a dead connection
TIMEOUT = 60
NOT_FOUND = 127
VANISHED = 24  # rsync's exit code for files that vanished before it copied them
SHELL = "exec /bin/sh"
UNCLEAN = "is your shell clean"  # rsync's word where start-up files print something
# Session settings of a user's own configuration that none of our commands can work with.
NEUTRAL = {"RequestTTY": "no", "RemoteCommand": "none", "ClearAllForwardings": "yes"}
# A non-interactive shell often has no Slurm on its PATH; the login shell's PATH is asked for then.
FIND = (
    "command -v {program} >/dev/null 2>&1 || "
    'PATH=$PATH:$("${{SHELL:-/bin/sh}}" -lc \'echo "$PATH"\' </dev/null 2>/dev/null | tail -n 1)'
)
HINTS = (  # ssh's messages, and what they mean for somebody who can't see its settings
    (
        r"IDENTIFICATION HAS CHANGED",
        "its host key differs from the one in known_hosts: ask the administrators before you trust it",
    ),
    (
        r"Host key verification failed|host key is known",
        "its host key isn't known here: connect once with `ssh {host}`",
    ),
    (r"Permission denied", "`ssh {host}` must work without a question, or mixlaunch must run on a terminal"),
    (r"Could not resolve", "login.host of the profile is what `ssh` takes: a name, user@name, or an alias"),
    (r"timed out|refused|unreachable|No route", "is it up, and does this machine's network reach it?"),
)


@dataclass(frozen=True)
class Login:
    """A login node in ssh's terms: host or alias, and options as NAME=VALUE."""

    host: str
    options: tuple[str, ...] = ()

    def encoded(self) -> str:
        """One line of text that `decoded` reads."""
        return shlex.join([*self.options, self.host])

    @staticmethod
    def decoded(text: str) -> "Login":
        *options, host = shlex.split(text)
        return Login(host, tuple(options))


def command(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """The script that runs `argv`; each word arrives unchanged."""
    return "\n".join([exports(environment), FIND.format(program=argv[0]), f"exec {shlex.join(argv)}"])


def exports(variables: Mapping[str, str]) -> str:
    """The lines of a script that set `variables`."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())


def run(login: Login, body: str, *, timeout: float = TIMEOUT) -> Done:
    """Run `body` on the login node to its end; `LostError` if its end isn't known."""
    connect(login)
    mark = secrets.token_hex(8)
    script = f"echo {mark}; echo {mark} >&2\n(\n{body}\n) </dev/null\necho {mark} $?\n"
    process = _start(login, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(script.encode(), timeout=timeout)
    except subprocess.TimeoutExpired:
        raise LostError(f"login node {login.host}: no answer within {timeout:g} s") from None
    finally:
        end(process)
    answer = re.search(rb"(?s)%b\n(.*)%b (\d+)\n\Z" % (mark.encode(), mark.encode()), out)
    said = err.decode(errors="replace").rpartition(f"{mark}\n")[2]
    if not answer:
        forget(login)
        raise LostError(f"login node {login.host}: the connection was lost: {_last_line(said)}")
    return Done(code=int(answer[2]), out=answer[1].decode(errors="replace"), err=said)


def stream(login: Login, body: str) -> "subprocess.Popen[bytes]":
    """Start `body` and return the process whose stdout is its output; `end` ends it here, and soon on the login
    node.
    """
    connect(login)
    mark = secrets.token_hex(8)
    process = _start(login, stderr=subprocess.DEVNULL)
    assert process.stdin
    assert process.stdout
    with contextlib.suppress(BrokenPipeError):  # reading then shows that nobody is there
        process.stdin.write(f"echo {mark}\n(\n{body}\n) </dev/null\n".encode())
        process.stdin.close()
    while (line := process.stdout.readline()) and line != f"{mark}\n".encode():
        pass
    return process


def rsync(login: Login, *arguments: str) -> None:
    """One rsync; `far` makes the paths on the login node. `Fault` has rsync's message."""
    connect(login)
    program = _program("rsync")
    # -s: paths go through rsync's own protocol, not through the far shell.
    argv = [program, "--protect-args", "--timeout=60", "--compress", *arguments]
    shell = " ".join(map(_rsync_word, words(login)))
    environment = {**os.environ, "RSYNC_RSH": shell, "LC_ALL": "C.UTF-8"}  # its complaints are read below
    done = subprocess.run(
        argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode in (0, VANISHED):
        return
    unclean = UNCLEAN in done.stderr
    said = _last_line(done.stderr, UNCLEAN if unclean else r"^rsync: ")
    if re.search(r"(change_dir|link_stat) .* No such file", done.stderr):
        raise MissingError(f"login node {login.host}: rsync: {said}")
    if done.returncode == NOT_FOUND or re.search(r"rsync: (command )?not found", done.stderr):
        raise Fault(f"login node {login.host}: it has no rsync on its PATH; mixlaunch needs it to copy files")
    if unclean:
        said += f"; what does `ssh {login.host} true` print? It must print nothing"
    if done.returncode == 255 or "connection unexpectedly closed" in done.stderr:
        forget(login)
        raise LostError(f"login node {login.host}: rsync: {said}")
    raise Fault(f"login node {login.host}: rsync: {said}")


def _rsync_word(word: str) -> str:
    """Quoted for rsync, not for a shell: a quote inside is doubled."""
    return "'" + word.replace("'", "''") + "'"


def far(login: Login, path: Path | str) -> str:
    """A path there, for `rsync`."""
    return f"{login.host}:{path}"


def forward(login: Login, port: int, host: str, far_port: int) -> None:
    """Let `port` of this machine's loopback lead to `host:far_port` as the login node sees it."""
    connect(login)
    done = _control(login, "forward", _route(port, host, far_port))
    if done.returncode:
        raise Fault(f"login node {login.host}: no tunnel to {host}:{far_port}: {_last_line(done.stderr)}")


def unforward(login: Login, port: int, host: str, far_port: int) -> None:
    """Undo `forward`."""
    _control(login, "cancel", _route(port, host, far_port))


def behind(login: Login, node: str) -> Login:
    """A node that only the login node sees: ssh to it goes through the open connection."""
    user, at, _ = login.host.rpartition("@")
    through = [word.replace("%", "%%") for word in words(login)]
    return Login(f"{user}{at}{node}", (f"ProxyCommand={shlex.join(through)} -W %h:%p {login.host}",))


@contextlib.contextmanager
def tunnel(login: Login, host: str, far_port: int) -> Iterator[int]:
    """A port of this machine's loopback that leads to `host:far_port` for as long as the block lasts."""
    port = _free_port(far_port)
    forward(login, port, host, far_port)
    try:
        yield port
    finally:
        unforward(login, port, host, far_port)


def _free_port(preferred: int) -> int:
    """The server's own port number if it is free here, else another free one."""
    for port in (preferred, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise Fault("no free port on this machine")


def _route(port: int, host: str, far_port: int) -> str:
    return f"127.0.0.1:{port}:{f'[{host}]' if ':' in host else host}:{far_port}"


def _control(login: Login, how: str, route: str) -> "subprocess.CompletedProcess[str]":
    program, *rest = words(login)
    argv = [program, "-o", "ClearAllForwardings=no", *rest, "-O", how, "-L", route, login.host]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")


# --- the shared connection ---------------------------------------------------------------------------------------


_open: set[Login] = set()
_silent: dict[
    Login, tuple[float, Fault]
] = {}  # when and why it failed, so nobody waits twice for the same dead host


def connect(login: Login) -> None:
    """Make the shared connection unless there is one: the only place where a password or code may be asked for."""
    if login in _open:
        return
    since, why = _silent.get(login, (-RETRY, None))
    if why and time.monotonic() - since < RETRY:
        raise why
    try:
        if subprocess.run([*words(login), "-O", "check", login.host], capture_output=True).returncode:
            _log_in(login)
    except Fault as fault:
        _silent[login] = time.monotonic(), fault
        raise
    _open.add(login)


def forget(login: Login) -> None:
    """Ask again before the next use."""
    _open.discard(login)


def close(login: Login) -> None:
    """End the shared connection, if there is one."""
    forget(login)
    subprocess.run([*words(login), "-O", "exit", login.host], capture_output=True)


def _log_in(login: Login) -> None:
    """Log in and out again; the connection stays. Its stderr is a file, because a connection may keep it open."""
    with tempfile.TemporaryFile() as said:
        try:
            code = subprocess.run(
                [*words(login), login.host, SHELL],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                timeout=None if _on_terminal() else OPEN_TIMEOUT,
            ).returncode
        except subprocess.TimeoutExpired:
            raise Fault(f"login node {login.host}: no connection within {OPEN_TIMEOUT} s") from None
        said.seek(0)
        complaint = said.read().decode(errors="replace")
    if code == 255:
        raise Fault(_refusal(login, complaint))
    if code:
        raise Fault(f"login node {login.host}: its shell ended with {code}: {_last_line(complaint)}")


def _refusal(login: Login, complaint: str) -> str:
    hint = next((text for pattern, text in HINTS if re.search(pattern, complaint)), "")
    said = _last_line(complaint, r"^ssh:|denied|failed|known")
    return f"login node {login.host}: {said}" + (f"\n  {hint.format(host=login.host)}" if hint else "")


def _last_line(text: str, preferred: str = "") -> str:
    """The last line of an error message, which may come after a banner."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if re.search(preferred, line)), lines[-1] if lines else "no reason"
    )


def _start(login: Login, *, stderr: int) -> "subprocess.Popen[bytes]":
    # It gets a session of its own, so Ctrl-C reaches only us and we decide what happens on the login node. It can't
    # ask for a password then; `connect` has done that.
    argv, pipe = [*words(login), "-o", "BatchMode=yes", login.host, SHELL], subprocess.PIPE
    return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=stderr, start_new_session=True)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a command that may still be running."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            with contextlib.suppress(OSError):
                stream.close()


@functools.cache
def words(login: Login) -> tuple[str, ...]:
    """ssh with what every call shares. The profile's options come first; the user's own stay in force."""
    given = [word for option in login.options for word in ("-o", option)]
    settings = _settings([_program("ssh"), *given, "-G", login.host])
    ours = {} if _shares_already(login, given, settings) else {
        "ControlMaster": "auto",
        "ControlPath": str(_sockets() / hashlib.sha256(login.encoded().encode()).hexdigest()[:16]),
        "ControlPersist": str(PERSIST),
    }  # fmt: skip
    ours |= NEUTRAL
    if settings.get("connecttimeout", "none") in ("none", "0"):
        ours["ConnectTimeout"] = str(CONNECT_TIMEOUT)
    if settings.get("serveraliveinterval", "0") == "0":
        ours["ServerAliveInterval"] = str(ALIVE)
    if not _on_terminal():
        ours["BatchMode"] = "yes"
    return (_program("ssh"), *given, *_options(ours.items()))


def _options(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [word for name, value in pairs for word in ("-o", f"{name}={value}")]


def _settings(argv: Sequence[str]) -> dict[str, str]:
    """ssh's configuration for a host, as it would use it."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise Fault(f"ssh: {_last_line(done.stderr)}")
    pairs = (line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    return {name: value for name, value in pairs}


def _shares_already(login: Login, given: Sequence[str], settings: Mapping[str, str]) -> bool:
    """Whether the user's own configuration shares connections to this host, maybe one that is open now."""
    if settings.get("controlpath", "none") == "none":
        return False
    if settings.get("controlmaster", "false") not in ("false", "no"):
        return True
    check = [_program("ssh"), *given, "-O", "check", login.host]
    return subprocess.run(check, capture_output=True).returncode == 0


def _sockets() -> Path:
    """A private folder with a short path: a socket's may be 100 characters long, and ssh adds some for a while."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = 0 < len(runtime) < 40 and os.access(runtime, os.W_OK)
    folder = Path(runtime, "mixlaunch") if usable else Path(f"/tmp/mixlaunch-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise Fault(f"{folder}: {error.strerror}; sockets of connections lie there") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Fault(f"{folder}: not a private folder of yours; sockets of connections lie there")
    return folder


def _program(name: str) -> str:
    if path := shutil.which(name):
        return path
    package = {"ssh": "openssh-client"}.get(name, name)
    raise Fault(
        f"{name}: not found on this machine's PATH; mixlaunch needs it to reach the login node (Debian: {package})"
    )


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
