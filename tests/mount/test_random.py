"""Random operations on the mount and on a local directory, compared after each step.

`--fsx-operations=N` is not an option here on purpose: 10,000 operations is what this test proves.
"""

import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.place import Place

OPERATIONS = 10_000  # all seeds together do four times half of it
MAX_FILE_BYTES = 300_000
NAMES = [f"n{i}" for i in range(8)]


def outcome(operation: Callable[[], object]) -> object:
    """What an operation returned, or its errno."""
    try:
        return operation()
    except OSError as error:
        return ("errno", error.errno)


class Side:
    """One of the two directories with the files open in it. The same calls are made on both."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open: dict[int, int] = {}

    def path(self, *names: str) -> str:
        return str(self.root.joinpath(*names))

    def do(self, name: str, *args: object) -> object:
        return outcome(lambda: getattr(self, name)(*args))

    def create(self, slot: int, name: str, flags: int, mode: int) -> None:
        self.close(slot)
        self.open[slot] = os.open(self.path(name), os.O_CREAT | flags, mode)

    def close(self, slot: int) -> None:
        if slot in self.open:
            os.close(self.open.pop(slot))

    def write(self, slot: int, offset: int, data: bytes) -> int:
        return os.pwrite(self.open[slot], data, offset) if slot in self.open else -1

    def read(self, slot: int, offset: int, length: int) -> bytes:
        return os.pread(self.open[slot], length, offset) if slot in self.open else b""

    def size(self, slot: int) -> int:
        return os.fstat(self.open[slot]).st_size if slot in self.open else -1

    def ftruncate(self, slot: int, length: int) -> None:
        if slot in self.open:
            os.ftruncate(self.open[slot], length)

    def fsync(self, slot: int) -> None:
        if slot in self.open:
            os.fsync(self.open[slot])

    def truncate(self, name: str, length: int) -> None:
        os.truncate(self.path(name), length)

    def unlink(self, name: str) -> None:
        os.unlink(self.path(name))

    def mkdir(self, name: str) -> None:
        os.mkdir(self.path(name))

    def rmdir(self, name: str) -> None:
        os.rmdir(self.path(name))

    def rename(self, old: str, new: str) -> None:
        os.rename(self.path(old), self.path(new))

    def link(self, old: str, new: str) -> None:
        os.link(self.path(old), self.path(new))

    def symlink(self, target: str, new: str) -> None:
        os.symlink(target, self.path(new))

    def chmod(self, name: str, mode: int) -> None:
        os.chmod(self.path(name), mode)

    def look(self, name: str) -> object:
        st = os.lstat(self.path(name))
        size = st.st_size if stat.S_ISREG(st.st_mode) else 0
        return (st.st_mode, size, st.st_nlink if stat.S_ISREG(st.st_mode) else 0)

    def contents(self, name: str) -> bytes:
        with open(self.path(name), "rb") as file:
            return file.read()

    def names(self) -> list[str]:
        return sorted(n for n in os.listdir(self.root) if not n.startswith(".nfs"))


def choose(rng: random.Random) -> tuple[object, ...]:
    name, other, slot = rng.choice(NAMES), rng.choice(NAMES), rng.randrange(4)
    offset, length = rng.randrange(MAX_FILE_BYTES), rng.choice((1, 100, 4096, 70_000))
    operations: list[tuple[int, tuple[object, ...]]] = [
        (12, ("create", slot, name, os.O_RDWR | rng.choice((0, 0, os.O_TRUNC, os.O_EXCL)), 0o644)),
        (5, ("close", slot)),
        (25, ("write", slot, offset, rng.randbytes(length))),
        (15, ("read", slot, offset, length)),
        (6, ("size", slot)),
        (5, ("ftruncate", slot, offset)),
        (3, ("fsync", slot)),
        (3, ("truncate", name, offset)),
        (6, ("unlink", name)),
        (3, ("mkdir", name)),
        (3, ("rmdir", name)),
        (7, ("rename", name, other)),
        (4, ("link", name, other)),
        (2, ("symlink", name, other)),
        (3, ("chmod", name, rng.choice((0o600, 0o644, 0o755)))),
        (8, ("look", name)),
        (6, ("contents", name)),
        (3, ("names",)),
    ]
    return rng.choices([o for _, o in operations], [w for w, _ in operations])[0]


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_ten_thousand_random_operations_do_the_same_as_on_a_local_directory(
    seed: int, place: Place, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    mounted, local = Side(place.here), Side(tmp_path)
    done: list[tuple[object, ...]] = []
    try:
        for step in range(OPERATIONS // 2):
            operation = choose(rng)
            done.append(operation)
            got, expected = mounted.do(*operation), local.do(*operation)  # type: ignore[arg-type]
            assert got == expected, f"step {step}: {_shown(operation)}, after {[_shown(o) for o in done[-12:-1]]}"
        for slot in range(4):
            assert mounted.do("close", slot) == local.do("close", slot)
        assert mounted.names() == local.names()
        for name in local.names():
            assert mounted.do("look", name) == local.do("look", name)
            assert mounted.do("contents", name) == local.do("contents", name)
            assert Side(place.there).do("contents", name) == local.do("contents", name)
    finally:
        for side in (mounted, local):
            for slot in range(4):
                side.close(slot)
        shutil.rmtree(place.there, ignore_errors=True)


def _shown(operation: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(f"{len(a)} bytes" if isinstance(a, bytes) else a for a in operation)
