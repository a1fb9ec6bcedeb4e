"""A trio nursery whose one failing task fails it with that task's exception, not with a group of one.

Callers here handle OSError, NfsError and the like by `except`; a group would have to be taken apart at
each of those places.
"""

import contextlib
from collections.abc import AsyncIterator

import trio


@contextlib.asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """As trio.open_nursery; a group of exceptions becomes its first one that is not a cancellation."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        error = _first(group)
        if error is None:
            raise
        raise error from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    for error in group.exceptions:
        found = _first(error) if isinstance(error, BaseExceptionGroup) else error
        if found is not None and not isinstance(found, trio.Cancelled):
            return found
    return None
