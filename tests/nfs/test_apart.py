"""RENAMEs between directories and calls into them: who waits for whom."""

import trio
import trio.testing

from efcfs.nfs.apart import Apart
from efcfs.nfs.light import Light


async def test_a_rename_waits_for_calls_into_its_directories_and_later_ones_wait_for_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    apart, done = Apart(), list[str]()

    async def call(fh: bytes, name: str, length_s: float) -> None:
        await apart.enter(fh)
        await trio.sleep(length_s)
        apart.leave(fh)
        done.append(name)

    async def rename(*fhs: bytes) -> None:
        async with apart.between(*fhs):
            await trio.sleep(0.5)
            done.append(f"rename {b' '.join(fhs).decode()}")

    async with trio.open_nursery() as nursery:
        for number in range(2):
            nursery.start_soon(call, b"a", f"early {number}", 0.4 + number / 10)
        await trio.sleep(0.2)
        nursery.start_soon(rename, b"a", b"b")
        await trio.sleep(0.05)
        nursery.start_soon(rename, b"b", b"c")
        for fh in (b"a", b"b", b"z"):
            nursery.start_soon(call, fh, f"late {fh.decode()}", 0.1)
    assert done[:4] == ["late z", "early 0", "early 1", "rename a b"]
    assert set(done[4:]) == {"late a", "late b", "rename b c"}
    assert not apart.moving


async def test_nobody_waits_for_a_server_that_is_away(autojump_clock: trio.testing.MockClock) -> None:
    apart = Apart()
    with trio.fail_after(2.5):
        await apart.enter(b"a")  # a call that gets no answer
        async with apart.between(b"a", b"b"):  # nor does this RENAME
            await apart.enter(b"b")
            apart.leave(b"b")
    apart.leave(b"a")


async def test_a_light_call_goes_on_when_the_rename_ends_while_it_becomes_a_task() -> None:
    apart, done = Apart(), list[bytes]()

    async def call(fh: bytes) -> None:
        await apart.enter(fh)
        done.append(fh)
        apart.leave(fh)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            async with apart.between(b"a", b"b"):
                Light(nursery).run(call(b"a"))
    assert done == [b"a"]
