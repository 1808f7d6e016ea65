"""Every error that a job raises on purpose, in one tree, each with the exit code the batch script reads.

0 is done, 2 the user's mistake (never retried), 85 saved and asks to be requeued, anything else a fault.
"""


class JobError(Exception):
    """Base of all: a fault. The batch script retries it if the job can resume."""

    exit_code = 1


class InputError(JobError):
    """The user's mistake: names the file, tensor or option, and the valid values."""

    exit_code = 2


class LayoutError(InputError):
    """A parallel layout that can't exist with this model on these ranks: carries the equation."""


class CheckpointError(InputError):
    """A checkpoint or weights folder that is incomplete, damaged or foreign: names the file and tensor."""


class SaveError(JobError):
    """A checkpoint that couldn't be written on some rank; the last complete one stays."""


class Requeue(JobError):
    """Everything is saved, and the job asks to be requeued."""

    exit_code = 85
