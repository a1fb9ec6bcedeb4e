"""Notifications of the kernel wait in threads of their own."""

import os
from collections.abc import Callable

import trio
import trio.testing

from efcfs.fuse.notify import KernelCaches


async def test_notifications_that_wait_leave_threads_to_those_whom_they_wait_for() -> None:
    out, into = os.pipe()  # full: who writes into it waits, as for a page that is being read
    os.set_blocking(into, False)
    while fill(lambda: os.write(into, bytes(4096))):
        pass
    os.set_blocking(into, True)
    async with trio.open_nursery() as nursery:
        caches = KernelCaches(into, nursery)
        for ino in range(2, 102):
            caches.drop_pages(ino)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(30) as scope:
            assert await trio.to_thread.run_sync(os.getpid) == os.getpid()
        nursery.cancel_scope.cancel()
    os.close(out)  # lets the threads go
    os.close(into)
    assert not scope.cancelled_caught


def fill(write: Callable[[], int]) -> bool:
    try:
        return write() > 0
    except BlockingIOError:
        return False
