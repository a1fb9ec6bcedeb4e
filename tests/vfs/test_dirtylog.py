"""The dirty log by itself: what was kept and is not done is there for the next daemon, whenever the last one died."""

import subprocess
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import given, settings

from efcfs.vfs.dirtylog import REQUEST_HEAD_BYTES, SEGMENT_BYTES, DirtyLog, Record
from tests.place import mapped_kib, small_tmpfs

MIB = 1024 * 1024

lengths = st.one_of(st.integers(1, 300), st.sampled_from([4096, 65536, 65537, MIB]))
# A write of so many bytes, continuing the last one of its handle or not; or an index of a record that is done.
steps = st.lists(
    st.one_of(st.tuples(st.just("keep"), st.integers(1, 3), lengths, st.booleans(), st.booleans()),
              st.tuples(st.just("done"), st.integers(0, 50)),
              st.tuples(st.just("die"))),
    max_size=60,
)  # fmt: skip


def pattern(number: int, length: int) -> bytes:
    return (number.to_bytes(4, "big") * (length // 4 + 1))[:length]


class Model:
    """What is kept and not done: for each record its handle, offset and bytes, in the order of writing."""

    def __init__(self) -> None:
        self.kept: list[tuple[Record, int, int, bytearray]] = []

    def told(self) -> list[tuple[int, int, bytes]]:
        return [(handle, offset, bytes(data)) for _, handle, offset, data in self.kept]


def through_the_buffer(log: DirtyLog, data: bytes) -> memoryview:
    """As the wire does: the kernel's request with the bytes after its head."""
    request = log.buffer()[: REQUEST_HEAD_BYTES + len(data)]
    request[REQUEST_HEAD_BYTES:] = data
    return request[REQUEST_HEAD_BYTES:]


@given(steps)
@settings(deadline=None, max_examples=60)
def test_the_next_daemon_finds_all_that_is_not_done_in_the_order_of_writing(steps: list[tuple[object, ...]]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        log, model, number = DirtyLog(Path(directory), 4 * SEGMENT_BYTES), Model(), 0
        for step in steps:
            if step[0] == "keep":
                _, handle, length, continues, copied = step
                assert isinstance(handle, int) and isinstance(length, int)
                number += 1
                data = pattern(number, length)
                last = next((r for r, h, _, _ in reversed(model.kept) if h == handle), None) if continues else None
                offset = number * 2 * MIB
                there = memoryview(data) if copied else through_the_buffer(log, data)
                record = log.keep(handle, offset, there, last)
                if record is None:
                    assert sum(len(kept[3]) for kept in model.kept) > SEGMENT_BYTES  # it is full
                elif record is last:
                    next(kept for kept in model.kept if kept[0] is last)[3].extend(data)
                else:
                    model.kept.append((record, handle, offset, bytearray(data)))
            elif step[0] == "done" and model.kept:
                index = step[1]
                assert isinstance(index, int)
                record, _, _, kept_data = model.kept.pop(index % len(model.kept))
                assert bytes(record.bytes(0, len(kept_data))) == kept_data
                log.done(record, len(kept_data))
            elif step[0] == "die":
                log = DirtyLog(Path(directory), 4 * SEGMENT_BYTES)
                found = log.left()
                assert [(f.handle, f.offset, bytes(f.record.bytes(0, f.record.length_bytes))) for f in found] \
                    == model.told()  # fmt: skip
                model.kept = [(f.record, *kept[1:]) for f, kept in zip(found, model.kept, strict=True)]


def test_a_segment_is_used_again_when_all_of_it_is_done() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        log = DirtyLog(Path(directory), SEGMENT_BYTES)
        data = bytes(MIB)
        for _ in range(100):
            record = log.keep(1, 0, memoryview(data), None)
            assert record is not None
            log.done(record, MIB)
        assert len(list(Path(directory).iterdir())) == 1
        log.shrink()
        log.remove()
        assert list(Path(directory).iterdir()) == []


def test_bytes_that_are_held_stay_though_they_are_done() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        log = DirtyLog(Path(directory), SEGMENT_BYTES)
        record = log.keep(1, 0, memoryview(b"a" * MIB), None)
        assert record is not None
        log.hold(record)
        log.done(record, MIB)
        for _ in range(100):
            other = log.keep(1, 0, memoryview(b"b" * MIB), None)
            assert other is not None
            log.done(other, MIB)
        assert bytes(record.bytes(0, MIB)) == b"a" * MIB
        log.release(record)


def test_a_segment_whose_making_was_interrupted_has_nothing_and_holds_nobody_up() -> None:
    with tempfile.TemporaryDirectory() as directory:
        small_tmpfs(Path(directory), 64 * 1024)
        try:
            (Path(directory) / "dirty").mkdir()
            (Path(directory) / "dirty/segment-7").touch()
            log = DirtyLog(Path(directory) / "dirty", SEGMENT_BYTES)
            assert log.left() == [] and log.keep(1, 0, memoryview(b"x"), None) is None
        finally:
            subprocess.run(["umount", directory], check=True)


def test_without_room_nothing_is_kept_until_something_is_done() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        log = DirtyLog(Path(directory), SEGMENT_BYTES)
        records: list[Record] = []
        while (record := log.keep(1, 0, memoryview(bytes(MIB)), None)) is not None:
            records.append(record)
        assert len(records) > SEGMENT_BYTES // MIB
        for record in records:
            log.done(record, MIB)
        assert log.keep(1, 0, memoryview(bytes(MIB)), None) is not None


def test_the_kernel_finds_every_page_of_the_buffer_mapped() -> None:
    """Or a daemon that is killed while the kernel copies a request costs the program that request (EIO)."""

    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        log = DirtyLog(Path(directory), SEGMENT_BYTES)
        log.buffer()
        segment = Path(directory) / "segment-1"
        assert mapped_kib(segment) == SEGMENT_BYTES // 1024
        del log
        after = DirtyLog(Path(directory), SEGMENT_BYTES)
        assert after.left() == []
        assert mapped_kib(segment) < SEGMENT_BYTES // 1024
        after.buffer()
        assert mapped_kib(segment) == SEGMENT_BYTES // 1024
