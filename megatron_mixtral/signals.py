"""The early warning: SIGUSR2 or SIGTERM asks a job to save and exit after its present step or file.

Slurm's preemption sends SIGTERM, and the batch script USR2. Import this first: before the handler is set, either
signal kills.
"""

import os
import signal

_requested = False


def _request(*_: object) -> None:
    global _requested
    _requested = True


def listen() -> None:
    """From now on both signals only set a flag."""
    signal.signal(signal.SIGUSR2, _request)
    signal.signal(signal.SIGTERM, _request)


def listen_in_a_job() -> None:
    """`listen` in a job, where a batch script sends the warning; elsewhere a signal ends the process as usual."""
    if "MIXLAUNCH_ATTEMPT" in os.environ:
        listen()


def requested() -> bool:
    """Whether this rank got one; ranks must agree before they act on it."""
    return _requested
