"""Coroutines that run without a task for as long as they wait for nothing but calls to the server.

Most of the kernel's requests take one call, and a task for each of them is two turns of trio's loop. A `Light` runs
its coroutine within whoever starts it, up to its first wait: for a `link.Call`; and whoever finishes the call runs the
rest. What is going to wait for anything else says `await in_task()` before; from there on a task runs it. Until then
trio knows no current task, so nothing else of trio may be awaited.
"""

import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, ClassVar, Protocol

import trio

Routine = Coroutine[Any, Any, None]


class Awaited(Protocol):
    """What a light coroutine can wait for: it tells its waiter, once."""

    waiter: "Light | None"

    async def in_task(self) -> object:
        """Wait for it as a task does."""


def is_light() -> bool:
    """Whether the code that asks runs in a light coroutine."""
    return Light.running


@types.coroutine
def wait_for(what: Awaited | None) -> Generator[Awaited | None, Any, Any]:
    """Only where `is_light`. Its result, or what it raises."""
    return (yield what)


async def in_task() -> None:
    """From here on a task runs this."""
    if Light.running:
        await wait_for(None)


class Light:
    """One such coroutine. It continues as a task of `nursery` when it has to."""

    __slots__ = ("_awaited", "_nursery", "_routine")

    running: ClassVar[bool] = False
    """Whether one of them runs just now."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._routine: Routine | None = None
        self._awaited: Awaited | None = None

    def run(self, routine: Routine) -> None:
        """Raises what the coroutine raises, as `finish` and `fail` do."""
        self._routine = routine
        self._step(routine.send, None)

    def finish(self, result: object) -> None:
        """What it waits for has this result."""
        assert self._routine is not None
        self._step(self._routine.send, result)

    def fail(self, error: Exception) -> None:
        assert self._routine is not None
        self._step(self._routine.throw, error)

    def become_task(self) -> None:
        """Wherever it is; so that it can be cancelled, for one thing."""
        if self._awaited is not None:
            self._awaited.waiter = None
            self._nursery.start_soon(self._go_on, self._awaited)
            self._awaited = None

    def _step(self, step: Callable[[Any], Any], value: object) -> None:
        outer, Light.running = Light.running, True
        self._awaited = None
        try:
            awaited = step(value)
        except StopIteration:
            return
        finally:
            Light.running = outer
        if awaited is None:
            self._nursery.start_soon(self._go_on, None)
        else:
            awaited.waiter = self
            self._awaited = awaited

    async def _go_on(self, awaited: Awaited | None) -> None:
        assert self._routine is not None
        step: Callable[[Any], Any] = self._routine.send
        value: object = None
        if awaited is not None:
            try:
                value = await awaited.in_task()
            except BaseException as error:
                step, value = self._routine.throw, error
        await _delegated(self._routine, step, value)


@types.coroutine
def _delegated(routine: Routine, step: Callable[[Any], Any], value: object) -> Generator[Any, Any, None]:
    """Run a coroutine that has begun elsewhere, as `await` would one that has not."""
    while True:
        try:
            trap = step(value)
        except StopIteration:
            return
        try:
            step, value = routine.send, (yield trap)
        except BaseException as error:
            step, value = routine.throw, error
