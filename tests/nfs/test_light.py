"""Coroutines without a task: what they compute is what a task would, wherever they wait."""

import functools
import struct
from collections.abc import Callable

import trio
from hypothesis import given
from hypothesis import strategies as st

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, NfsError, own_credential
from efcfs.nfs.light import Light, in_task, is_light, wait_for
from tests.nfs.test_rubbish import ATTR, FH, client_of, rubbish_server


def no_spoil(record: bytes, number: int) -> bytes:
    return record


def jukebox(record: bytes, number: int, *, times: int) -> bytes:
    """NFS3ERR_JUKEBOX for the first calls."""
    if number >= times:
        return record
    return struct.pack(">I", 0x80000000 | 28) + record[4:28] + struct.pack(">I", nfs3.NFS3ERR_JUKEBOX)


def refusing(record: bytes, number: int) -> bytes:
    return struct.pack(">I", 0x80000000 | 28) + record[4:28] + struct.pack(">I", nfs3.NFS3ERR_STALE)


async def ask(client: Client, done: trio.Event, told: list[object]) -> None:
    told.append(is_light())
    try:
        told.append(await client.getattr(own_credential(), FH))
    except NfsError as error:
        told.append(error.status)
    finally:
        told.append(is_light())
        done.set()


def asked(spoil: Callable[[bytes, int], bytes]) -> list[object]:
    """What a light coroutine was told by a server like this."""
    told: list[object] = []

    async def main() -> None:
        async with rubbish_server(spoil) as port, client_of(port) as client, trio.open_nursery() as nursery:
            done = trio.Event()
            tasks = len(nursery.child_tasks)
            Light(nursery).run(ask(client, done, told))
            assert len(nursery.child_tasks) == tasks
            await done.wait()

    trio.run(main)
    return told


def test_a_call_in_a_light_coroutine_needs_no_task() -> None:
    assert asked(no_spoil) == [True, ATTR, True]


def test_an_error_of_the_server_is_raised_in_a_light_coroutine() -> None:
    assert asked(refusing) == [True, nfs3.NFS3ERR_STALE, True]


def test_a_server_that_wants_to_be_asked_later_makes_a_task_of_a_light_coroutine() -> None:
    assert asked(functools.partial(jukebox, times=2)) == [True, ATTR, False]


def test_a_light_coroutine_that_became_a_task_is_cancelled_like_one() -> None:
    told: list[object] = []

    async def main() -> None:
        async with rubbish_server(functools.partial(jukebox, times=10**6)) as port, client_of(port) as client:
            async with trio.open_nursery() as nursery:
                light = Light(nursery)
                light.run(ask(client, trio.Event(), told))
                light.become_task()
                nursery.cancel_scope.cancel()

    trio.run(main)
    assert told == [True, False]


class Promise:
    """Something to wait for, that the test fulfils."""

    def __init__(self) -> None:
        self.waiter: Light | None = None
        self._done = trio.Event()
        self._result: object = None

    async def in_task(self) -> object:
        await self._done.wait()
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def fulfil(self, result: object) -> None:
        self._result = result
        self._done.set()
        if self.waiter is not None:
            waiter, self.waiter = self.waiter, None
            if isinstance(result, Exception):
                waiter.fail(result)
            else:
                waiter.finish(result)


STEP = st.sampled_from(["call", "failing call", "task", "checkpoint", "become"])


@given(st.lists(STEP, max_size=8))
def test_a_light_coroutine_computes_what_a_task_would(steps: list[str]) -> None:
    async def routine(promises: list[Promise], trace: list[object]) -> None:
        for number, step in enumerate(steps):
            if step in ("call", "failing call", "become"):
                promises.append(promise := Promise())
                try:
                    trace.append(await (wait_for(promise) if is_light() else promise.in_task()))
                except ValueError as error:
                    trace.append(str(error))
            else:
                await in_task()
                if step == "checkpoint":
                    await trio.lowlevel.checkpoint()
                trace.append((number, step))

    async def main() -> None:
        promises: list[Promise] = []
        trace: list[object] = []
        async with trio.open_nursery() as nursery:
            light = Light(nursery)
            light.run(routine(promises, trace))
            waited_for = 0
            for number, step in enumerate(steps):
                if step not in ("call", "failing call", "become"):
                    continue
                while len(promises) <= waited_for:
                    await trio.lowlevel.checkpoint()
                if step == "become":
                    light.become_task()
                promises[waited_for].fulfil(ValueError(str(number)) if step == "failing call" else number)
                waited_for += 1
        wanted = [
            str(n) if step == "failing call" else n if step in ("call", "become") else (n, step)
            for n, step in enumerate(steps)
        ]
        assert trace == wanted

    trio.run(main)
