"""Tiers stacked: what is answered out of memory."""

import tempfile
from pathlib import Path

from efcfs.cache.store import Store
from efcfs.cache.tier import Tier
from tests.place import mapped_kib

MIB = 1024 * 1024


async def test_the_kernel_finds_every_page_of_an_answer_mapped() -> None:
    """Or a daemon that is killed while the kernel copies the answer costs the program its read (EIO)."""

    async def fetch(offset: int, target: memoryview) -> bool:
        target[:] = b"\1" * len(target)
        return True

    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        store = Store(Tier("mem", Path(directory), 64 * MIB, in_memory=True))
        file = store.file(b"identity", 3 * MIB, 1, 1)
        assert file is not None
        for number in range(3):
            assert await store.fill(file, number, range(16), fetch)
        answer = store.get(file, MIB // 2, MIB)
        assert answer is not None
        assert mapped_kib(f"{directory}/data") >= 1024
        assert answer == b"\1" * MIB
        store.close()
