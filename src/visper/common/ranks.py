"""What the first process of a run decides for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from visper.common.errors import VisperError

Result = TypeVar("Result")


def first_decides(work: Callable[[], Result]) -> Result:
    """Runs ``work`` on the first process; every process returns its result, or raises its error.

    Every process must call. Without this, the others would wait for the first until their timeout.

    Args:
        work: its result and its errors can be pickled.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    result, error = None, None
    if PartialState().is_main_process:
        try:
            result = work()
        except (VisperError, OSError) as found:
            error = found
    result, error = broadcast_object_list([result, error])
    if error is not None:
        if isinstance(error, VisperError):
            error.shared = True
        raise error
    return result
