"""The early warning: SIGUSR2 or SIGTERM asks a job to save and leave after the step, or file, that it is at.

Slurm's preemption sends SIGTERM, the batch script USR2. Import this first: until the handler stands, either kills.
"""

import os
import signal

_requested = False


def _request(*_: object) -> None:
    global _requested
    _requested = True


def listen() -> None:
    """From now on both signals only leave a note."""
    signal.signal(signal.SIGUSR2, _request)
    signal.signal(signal.SIGTERM, _request)


def listen_in_a_job() -> None:
    """`listen` where a batch script warns of the end; elsewhere a signal ends the process, as it ends any."""
    if "MIXLAUNCH_ATTEMPT" in os.environ:
        listen()


def requested() -> bool:
    """Whether this rank got one; ranks must agree before they act on it."""
    return _requested
