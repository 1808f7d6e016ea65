"""What the contract refuses, told as the command line says it: each field by its option."""

from collections.abc import Iterator
from contextlib import contextmanager

from launcher.errors import LayoutError, UsageError
from megatron_mixtral.spec.jobs import flag_of
from megatron_mixtral.spec.options import LayoutSpecError, SpecError


@contextmanager
def as_typed(job: type | None = None) -> Iterator[None]:
    """`UsageError`, or `LayoutError` where a layout is at fault, in place of the contract's own.

    `job` is the configuration whose options are meant, where two jobs have fields of one name.
    """
    try:
        yield
    except LayoutSpecError as error:
        raise LayoutError(error.said(lambda field: flag_of(field, job))) from None
    except SpecError as error:
        raise UsageError(error.said(lambda field: flag_of(field, job))) from None
