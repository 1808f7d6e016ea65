"""Every error that a user can meet, in one tree, each with the exit code it ends the command with.

Raise `UsageError` for what the user can mend (exit 2), `Fault` for what went wrong around them (exit 1).
"""

import errno
import os

OF_A_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


class MixlaunchError(Exception):
    """Base of all; `exit_code` is what the shell sees."""

    exit_code = 1


class UsageError(MixlaunchError):
    """Bad input: the message names the thing and the valid values, or the equation with its numbers."""

    exit_code = 2


class ProfileError(UsageError):
    """A cluster profile that can't be read or doesn't validate."""


class LayoutError(UsageError):
    """A parallel layout that can't exist on these ranks with this model."""


class Fault(MixlaunchError):
    """Something outside the user's words failed: Slurm, the network, the file system."""


class SubmitError(Fault):
    """The scheduler refused a job or didn't answer."""


class UncertainError(SubmitError):
    """Nobody can say now whether there is a job. The run directory stays, for its job to be found later."""


class Interrupted(SubmitError):
    """Ctrl-C came while the scheduler already had the job, whose id is kept."""

    exit_code = 130

    def __init__(self, message: str, job_id: str) -> None:
        super().__init__(message)
        self.job_id = job_id


def of_system(error: OSError | UnicodeEncodeError) -> MixlaunchError:
    """What the operating system or the terminal refused, where nobody nearer to it had better words."""
    if isinstance(error, UnicodeEncodeError):
        hint = "" if error.encoding.startswith("utf") else "; set PYTHONIOENCODING=utf-8"
        return UsageError(f"{error.object[error.start : error.end]!a} can't be written in {error.encoding}{hint}")
    try:
        os.getcwd()
    except OSError:
        return UsageError("the working directory is gone; change to another")
    if error.filename is not None and error.errno in OF_A_PATH:
        return UsageError(f"{error.filename}: {error.strerror}")
    return Fault(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
