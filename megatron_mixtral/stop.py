"""The early warning: SIGUSR2 asks a training job to save and leave after the step it is in.

Import this first: until the handler stands, the signal kills the process.
"""

import signal

_requested = False


def _request(*_: object) -> None:
    global _requested
    _requested = True


def listen() -> None:
    """From now on SIGUSR2 only leaves a note."""
    signal.signal(signal.SIGUSR2, _request)


def requested() -> bool:
    """Whether this rank got the signal; ranks must agree before they act on it."""
    return _requested
