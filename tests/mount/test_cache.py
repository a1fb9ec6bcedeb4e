"""The block cache under a mount: what is read twice does not come twice, and is never wrong."""

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from efcfs.control import cache_dir
from tests.bed import Ganesha, Mount, Proxy
from tests.place import wait_until

MIB = 1024 * 1024

libc = ctypes.CDLL(None, use_errno=True)


class Watched:
    """A mount behind a proxy that counts what the server sends."""

    def __init__(self, server: Ganesha, path: Path, options: str) -> None:
        self._stack = contextlib.ExitStack()
        self._server, self._path, self._options = server, path, options

    def __enter__(self) -> "Watched":
        self.proxy = self._stack.enter_context(Proxy(self._server.port))
        self.mount = self._stack.enter_context(
            Mount(self._server, self._path, f"identity=watched,nconnect=4,{self._options}", port=self.proxy.port)
        )
        # The tier is shared with the tests before: a smaller quota than theirs takes effect first.
        wait_until(lambda: int(str(self.tier("mem")["used_bytes"])) < int(str(self.tier("mem")["capacity_bytes"])))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.__exit__(*exc)  # type: ignore[arg-type]

    def fetched(self) -> int:
        """How many bytes the server has sent so far, in all."""
        return self.proxy.bytes_to_client

    def tier(self, name: str) -> dict[str, object]:
        tiers = self.mount.status()["tiers"]
        assert isinstance(tiers, list)
        return next(t for t in tiers if t["name"] == name)


def read(path: Path) -> bytes:
    """The file's bytes, past the kernel's page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def cached_pages(mapped: mmap.mmap) -> int:
    """How many pages of a mapped file the kernel has."""
    there = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), there) == 0
    return sum(page & 1 for page in there)


def read_until_on_disk(watched: Watched, path: Path, data: bytes, wanted_bytes: int) -> None:
    """Read until the disk tier has so much: a disk that is slower than the reader gets only a part each time."""

    def enough() -> bool:
        assert read(path) == data
        return int(str(watched.tier("ssd0")["used_bytes"])) >= wanted_bytes

    wait_until(enough, timeout_s=30)


@pytest.fixture
def small_memory(server: Ganesha, export: Path, tmp_path: Path) -> Iterator[tuple[Watched, Path]]:
    """A mount whose memory tier is so small that eviction runs all the time, above a disk tier."""
    (tmp_path / "ssd").mkdir()
    with Watched(server, tmp_path / "mnt", f"mem=16m,ssd={tmp_path}/ssd:1g") as watched:
        yield watched, watched.mount.path / export.name


def test_a_second_read_does_not_touch_the_network(server: Ganesha, export: Path, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(20 * MIB + 5)
    (export / "data").write_bytes(data)
    with Watched(server, tmp_path / "mnt", "mem=2g") as watched:
        path = watched.mount.path / export.name / "data"
        assert read(path) == data
        before = watched.fetched()
        assert before >= len(data)
        assert read(path) == data
        assert watched.fetched() - before < 5000  # an ACCESS for each open, no READ


def test_a_file_in_the_page_cache_is_read_without_asking_the_daemon(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    data = random.Random(20).randbytes(3 * MIB)
    (export / "data").write_bytes(data)
    with Watched(server, tmp_path / "mnt", "mem=2g") as watched:
        path = watched.mount.path / export.name / "data"

        def asked() -> int:
            tier = watched.tier("mem")
            return int(str(tier["hits"])) + int(str(tier["misses"]))

        assert path.read_bytes() == data
        assert asked() > 0
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            for _ in range(5):  # the machine may take pages back at any time
                assert path.read_bytes() == data
                if cached_pages(mapped) == len(data) // mmap.PAGESIZE:
                    break
            before = asked()
            assert path.read_bytes() == data
            assert (asked(), cached_pages(mapped)) == (before, len(data) // mmap.PAGESIZE)
        (export / "data").write_bytes(data[::-1])
        assert path.read_bytes() == data[::-1]
        assert asked() > before


def test_a_strided_reader_is_read_ahead(server: Ganesha, export: Path, tmp_path: Path) -> None:
    data = random.Random(21).randbytes(64 * MIB)
    (export / "data").write_bytes(data)
    stride, piece = 2 * MIB, 64 * 1024
    with Watched(server, tmp_path / "mnt", "mem=2g") as watched:
        fd = os.open(watched.mount.path / export.name / "data", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            for i in range(8):
                assert os.pread(fd, piece, i * stride) == data[i * stride :][:piece]
            # Those after the eighth come by themselves, and nothing of what lies between.
            wait_until(lambda: watched.fetched() > 15 * piece)
            before = watched.fetched()
            for i in range(8, 12):
                assert os.pread(fd, piece, i * stride) == data[i * stride :][:piece]
            assert before < 20 * piece
            wait_until(lambda: watched.fetched() > 19 * piece)
            assert watched.fetched() < 24 * piece
        finally:
            os.close(fd)


def test_several_disks_share_the_files(server: Ganesha, export: Path, tmp_path: Path) -> None:
    files = {f"file-{i}": random.Random(i).randbytes(4 * MIB) for i in range(16)}
    for name, data in files.items():
        (export / name).write_bytes(data)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with Watched(server, tmp_path / "mnt", f"mem=16m,ssd={tmp_path}/one:1g,ssd={tmp_path}/two:1g") as watched:
        here = watched.mount.path / export.name

        def used() -> list[int]:
            assert all(read(here / name) == data for name, data in files.items())
            return [int(str(watched.tier(f"ssd{i}")["used_bytes"])) for i in (0, 1)]

        wait_until(lambda: sum(used()) >= 48 * MIB, timeout_s=60)
        assert min(used()) > 0
        before = watched.fetched()
        assert all(read(here / name) == data for name, data in files.items())
        assert watched.fetched() - before < 40 * MIB  # of 64


def test_a_new_mount_finds_the_cache_warm(server: Ganesha, export: Path, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(5 * MIB)
    (export / "data").write_bytes(data)
    for first in (True, False):
        with Watched(server, tmp_path / "mnt", "mem=2g") as watched:
            assert read(watched.mount.path / export.name / "data") == data
            assert (watched.fetched() > len(data)) == first


def test_two_mounts_share_the_cache(server: Ganesha, export: Path, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(5 * MIB)
    (export / "data").write_bytes(data)
    with (
        Watched(server, tmp_path / "one", "mem=2g") as one,
        Watched(server, tmp_path / "two", "mem=2g") as two,
    ):
        assert read(one.mount.path / export.name / "data") == data
        assert read(two.mount.path / export.name / "data") == data
        assert two.fetched() < 100_000


def test_a_random_read_fetches_a_chunk_and_not_a_megabyte(server: Ganesha, export: Path, tmp_path: Path) -> None:
    data = random.Random(4).randbytes(64 * MIB)
    (export / "data").write_bytes(data)
    rng = random.Random(5)
    with Watched(server, tmp_path / "mnt", "mem=2g") as watched:
        fd = os.open(watched.mount.path / export.name / "data", os.O_RDONLY)
        try:
            before = watched.fetched()
            for _ in range(100):
                offset = rng.randrange(0, len(data) - 4096)
                assert os.pread(fd, 4096, offset) == data[offset : offset + 4096]
            assert watched.fetched() - before <= 20 * 100 * 4096
        finally:
            os.close(fd)


def test_concurrent_readers_of_a_missing_block_cause_one_fetch(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    data = random.Random(6).randbytes(MIB)
    (export / "data").write_bytes(data)
    right: list[bool] = []
    with Watched(server, tmp_path / "mnt", "mem=2g") as watched:
        watched.proxy.delay_s = 0.05
        path = watched.mount.path / export.name / "data"
        # Direct reads: each of them is a request to the daemon, whatever the page cache has.
        fds = [os.open(path, os.O_RDONLY | os.O_DIRECT) for _ in range(8)]

        def one(fd: int) -> None:
            with open(fd, "rb", buffering=0) as file:
                right.append(file.read(MIB) == data)

        before = watched.fetched()
        threads = [threading.Thread(target=one, args=(fd,)) for fd in fds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert right == [True] * 8
        assert watched.fetched() - before < 1.2 * MIB


def test_random_reads_and_writes_over_a_tiny_cache_are_right(small_memory: tuple[Watched, Path]) -> None:
    watched, here = small_memory
    rng = random.Random(7)
    model = [bytearray(rng.randbytes(12 * MIB)) for _ in range(4)]
    for i, data in enumerate(model):
        (here / f"{i}").write_bytes(data)
    fds = [os.open(here / f"{i}", os.O_RDWR) for i in range(4)]
    try:
        for step in range(1500):
            i = rng.randrange(4)
            length = rng.choice((1, 4096, 70_000, MIB))
            offset = rng.randrange(len(model[i]) - length)
            if rng.random() < 0.03:
                piece = rng.randbytes(length)
                os.pwrite(fds[i], piece, offset)
                model[i][offset : offset + length] = piece
                os.fsync(fds[i])
            if rng.random() < 0.2:
                os.posix_fadvise(fds[i], 0, 0, os.POSIX_FADV_DONTNEED)
            got = os.pread(fds[i], length, offset)
            assert got == model[i][offset : offset + length], (step, i, offset, length)
    finally:
        for fd in fds:
            os.close(fd)
    assert int(str(watched.tier("mem")["evictions"])) > 20


def test_what_memory_evicts_comes_back_from_the_disk(small_memory: tuple[Watched, Path], export: Path) -> None:
    watched, here = small_memory
    data = random.Random(8).randbytes(64 * MIB)
    (export / "data").write_bytes(data)
    read_until_on_disk(watched, here / "data", data, 40 * MIB)
    before = watched.fetched()
    assert read(here / "data") == data
    # A request of which the disk has only a part is fetched whole.
    assert watched.fetched() - before < len(data) - 20 * MIB
    assert int(str(watched.tier("ssd0")["hits"])) > 10


def test_flipped_bits_on_the_disk_are_a_miss_and_are_counted(
    small_memory: tuple[Watched, Path], export: Path, tmp_path: Path
) -> None:
    watched, here = small_memory
    data = random.Random(9).randbytes(64 * MIB)
    (export / "data").write_bytes(data)
    read_until_on_disk(watched, here / "data", data, 40 * MIB)
    for path in (tmp_path / "ssd").glob("data-*/*/*"):
        with open(path, "r+b") as file:
            for offset in range(0, path.stat().st_size - 77, 64 * 1024):
                byte = os.pread(file.fileno(), 1, offset + 77)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 0x10]), offset + 77)
    assert read(here / "data") == data
    assert int(str(watched.tier("ssd0")["bad_checksums"])) > 10


def test_flipped_bits_in_memory_are_found_with_verify_all(server: Ganesha, export: Path, tmp_path: Path) -> None:
    data = random.Random(10).randbytes(3 * MIB)
    (export / "data").write_bytes(data)
    with Watched(server, tmp_path / "mnt", "mem=2g,verify=all") as watched:
        path = watched.mount.path / export.name / "data"
        assert read(path) == data
        for cached in cache_dir(0).glob("data-*/*/*"):
            if cached.stat().st_size == len(data):
                with open(cached, "r+b") as file:
                    byte = os.pread(file.fileno(), 1, MIB)
                    os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), MIB)
        assert read(path) == data
        assert watched.tier("mem")["bad_checksums"] == 1


def test_a_file_that_changed_on_the_server_between_epochs_is_read_anew(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    old, new = (random.Random(seed).randbytes(3 * MIB) for seed in (11, 12))
    (export / "data").write_bytes(old)
    with Watched(server, tmp_path / "mnt", "mem=2g") as watched:
        path = watched.mount.path / export.name / "data"
        assert path.read_bytes() == old
        (export / "data").write_bytes(new)  # same size, same name, same inode
        assert path.read_bytes() == new


def test_an_index_deleted_while_running_costs_nothing_but_the_cache(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    data = random.Random(13).randbytes(10 * MIB)
    (export / "data").write_bytes(data)
    with Watched(server, tmp_path / "mnt", "mem=2g") as watched:
        path = watched.mount.path / export.name / "data"
        assert path.read_bytes() == data
        shutil.rmtree(cache_dir(0))
        assert read(path) == data
        (export / "other").write_bytes(data)
        assert (path.parent / "other").read_bytes() == data
    with Watched(server, tmp_path / "mnt", "mem=2g") as watched:
        assert read(watched.mount.path / export.name / "data") == data


def test_an_index_deleted_under_a_mount_does_no_harm_to_the_next(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    data = random.Random(22).randbytes(40 * MIB)
    (export / "data").write_bytes(data)
    with Watched(server, tmp_path / "one", "mem=2g") as one:
        assert read(one.mount.path / export.name / "data") == data
        shutil.rmtree(cache_dir(0) / "index.lmdb")
        with Watched(server, tmp_path / "two", "mem=2g") as two:
            assert read(two.mount.path / export.name / "data") == data
            # Each has an index of its own now, until the one notices that its own is not the present one.
            assert read(one.mount.path / export.name / "data") == data
            there = two.tier("mem")["items"]
            wait_until(lambda: one.tier("mem")["state"] == "up" and one.tier("mem")["items"] == there, 30)
            before = one.fetched()
            assert read(one.mount.path / export.name / "data") == data
            assert one.fetched() - before < MIB
            assert int(str(two.tier("mem")["used_bytes"])) >= len(data)


def test_files_of_which_no_index_tells_are_removed(server: Ganesha, export: Path, tmp_path: Path) -> None:
    data = random.Random(23).randbytes(40 * MIB)
    (export / "data").write_bytes(data)
    ssd = tmp_path / "ssd"
    (ssd / "data").mkdir(parents=True)  # of the user, who put it there before
    for _ in range(2):
        with Watched(server, tmp_path / "mnt", f"mem=16m,ssd={ssd}:1g") as watched:
            read_until_on_disk(watched, watched.mount.path / export.name / "data", data, 20 * MIB)
            wait_until(lambda: len(list(ssd.glob("data*"))) == 2, 20)
        shutil.rmtree(ssd / "index.lmdb")
        assert all(path.stat().st_mode & 0o077 == 0 for path in ssd.glob("data-*"))
    assert (ssd / "data").is_dir()


def test_files_removed_from_a_disk_come_back_to_it(
    small_memory: tuple[Watched, Path], export: Path, tmp_path: Path
) -> None:
    watched, here = small_memory
    data = random.Random(24).randbytes(64 * MIB)
    (export / "data").write_bytes(data)
    read_until_on_disk(watched, here / "data", data, 40 * MIB)
    for directory in (tmp_path / "ssd").glob("data-*"):
        shutil.rmtree(directory)

    def from_the_disk() -> bool:
        before = watched.fetched()
        assert read(here / "data") == data
        return watched.fetched() - before < len(data) - 20 * MIB

    assert not from_the_disk()
    wait_until(from_the_disk, timeout_s=30)


def test_a_full_dev_shm_costs_nothing_but_the_cache(server: Ganesha, export: Path, tmp_path: Path) -> None:
    data = random.Random(14).randbytes(48 * MIB)
    (export / "data").write_bytes(data)
    (tmp_path / "mnt").mkdir()
    options = f"port={server.port},mountport={server.mount_port}"
    efcfs = f"{sys.executable} -m efcfs.cli.main"
    # In a mount namespace of its own: nobody else's /dev/shm gets full.
    script = f"""
        set -e
        mount -t tmpfs -o size=24m small /dev/shm
        {efcfs} mount -o {options} 127.0.0.1:{server.export} {tmp_path}/mnt
        daemon() {{ {efcfs} status --json {tmp_path}/mnt | grep daemon_pid; }}
        before=$(daemon)
        cmp {tmp_path}/mnt/{export.name}/data {export}/data
        dd if=/dev/zero of=/dev/shm/rest bs=64k 2>/dev/null || true
        echo 3 > /proc/sys/vm/drop_caches
        cmp {tmp_path}/mnt/{export.name}/data {export}/data
        ls {tmp_path}/mnt/{export.name}
        test "$before" = "$(daemon)"
        {efcfs} umount {tmp_path}/mnt
    """
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.split() == ["data"]


@pytest.mark.parametrize("when", ["between two mounts", "while mounted"])
def test_a_damaged_index_in_memory_costs_nothing_but_the_cache(
    server: Ganesha, export: Path, tmp_path: Path, when: str
) -> None:
    for name in ("one", "two"):
        (export / name).write_bytes(random.Random(name).randbytes(48 * MIB))
    (tmp_path / "mnt").mkdir()
    efcfs = f"{sys.executable} -m efcfs.cli.main"
    ports = f"port={server.port},mountport={server.mount_port}"
    mount = f"{efcfs} mount -o {ports} 127.0.0.1:{server.export} {tmp_path}/mnt"
    (tmp_path / "damage.py").write_text(
        f"with open({str(cache_dir(0) / 'index.lmdb' / 'data.mdb')!r}, 'r+b', buffering=0) as file:\n"
        "    size_bytes = file.seek(0, 2)\n"
        "    file.seek(8192)  # all but what tells where the index begins\n"
        "    file.write(bytes(size_bytes - 8192))\n"
    )
    anew = f"{efcfs} umount {tmp_path}/mnt; {mount}" if when == "between two mounts" else ""
    # In a mount namespace of its own: nobody else's cache is damaged.
    script = f"""
        set -e
        mount -t tmpfs small /dev/shm
        {mount}
        cmp {tmp_path}/mnt/{export.name}/one {export}/one
        {anew.partition("; ")[0]}
        python3 {tmp_path}/damage.py
        {anew.partition("; ")[2]}
        for round in 1 2 3; do
            echo 3 > /proc/sys/vm/drop_caches
            cmp {tmp_path}/mnt/{export.name}/one {export}/one
            cmp {tmp_path}/mnt/{export.name}/two {export}/two
        done
        until {efcfs} cache info {tmp_path}/mnt | grep ' up '; do sleep 0.2; done
        cmp {tmp_path}/mnt/{export.name}/one {export}/one
        {efcfs} umount {tmp_path}/mnt
    """
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, ""), done


def test_a_disk_that_fills_up_or_turns_read_only_costs_nothing_but_the_cache(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    data = random.Random(15).randbytes(64 * MIB)
    (export / "data").write_bytes(data)
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with open(image, "wb") as file:
        file.truncate(40 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m0", image], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, disk], check=True)
    try:
        with Watched(server, tmp_path / "mnt", f"mem=16m,ssd={disk}:30m") as watched:
            here = watched.mount.path / export.name
            for _ in range(2):
                assert read(here / "data") == data
            subprocess.run(["dd", "if=/dev/zero", f"of={disk}/other", "bs=64k"], check=False, capture_output=True)
            for _ in range(2):
                assert read(here / "data") == data
            (disk / "other").unlink()
            subprocess.run(["mount", "--bind", disk, disk], check=True)
            # Busy as long as the daemon writes there.
            read_only = ["mount", "-o", "remount,bind,ro", str(disk)]
            wait_until(lambda: subprocess.run(read_only, check=False, capture_output=True).returncode == 0)
            try:
                for _ in range(3):
                    assert read(here / "data") == data
                wait_until(lambda: watched.tier("ssd0")["state"] == "failed")
            finally:
                subprocess.run(["umount", disk], check=True)
            wait_until(lambda: watched.tier("ssd0")["state"] == "up", timeout_s=30)
            assert read(here / "data") == data
            loop = subprocess.check_output(["findmnt", "-no", "SOURCE", disk], text=True).strip().rpartition("/")[2]
            Path(f"/sys/fs/ext4/{loop}/trigger_fs_error").write_text("1")  # errors=remount-ro, index and all
            assert read(here / "data") == data
    finally:
        subprocess.run(["umount", disk], check=True)


def holds_blocks(watched: Watched, path: Path, data: bytes) -> bool:
    """Whether the disk is in use, and has some of what is read now."""
    assert read(path) == data
    disk = watched.tier("ssd0")
    return disk["state"] == "up" and int(str(disk["items"])) > 0


def test_a_truncated_or_foreign_index_is_put_aside(server: Ganesha, export: Path, tmp_path: Path) -> None:
    data = random.Random(16).randbytes(40 * MIB)
    (export / "data").write_bytes(data)
    ssd = tmp_path / "ssd"
    ssd.mkdir()
    index = ssd / "index.lmdb" / "data.mdb"

    def cut() -> None:
        os.truncate(index, index.stat().st_size // 2)

    def scribble() -> None:
        index.write_bytes(random.Random(17).randbytes(index.stat().st_size))

    def flip() -> None:
        rng, raw = random.Random(18), bytearray(index.read_bytes())
        for _ in range(len(raw) // 100):
            raw[rng.randrange(8192, len(raw))] ^= 1 << rng.randrange(8)
        index.write_bytes(raw)

    for damage in (cut, scribble, flip, lambda: None):
        with Watched(server, tmp_path / "mnt", f"mem=16m,ssd={ssd}:1g") as watched:
            path = watched.mount.path / export.name / "data"
            assert read(path) == data
            # Damage that is found while it is read takes the disk out, for ten seconds.
            wait_until(partial(holds_blocks, watched, path, data), 30)
        damage()
    assert len(list(ssd.glob("index.bad-*"))) >= 2


@pytest.mark.parametrize("options", ["", "nocto,actimeo=600", "actimeo=0"])
def test_what_is_cached_is_served_while_the_server_is_away(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, options: str
) -> None:
    data = random.Random(19).randbytes(5 * MIB)
    with Ganesha(tmp_path_factory.mktemp("own")) as server:
        (server.directory / "data").write_bytes(data)
        (server.directory / "unread").write_bytes(data)
        with Mount(server, tmp_path / "mnt", f"mem=2g,{options}".rstrip(",")) as mount:
            path = mount.path / "data"
            names = {"data", "unread"}
            assert set(os.listdir(mount.path)) == names
            assert path.read_bytes() == data
            os.statvfs(mount.path)
            server.pause()
            try:
                for _ in range(3):
                    assert read(path) == data
                    assert path.stat().st_size == len(data)
                    assert set(os.listdir(mount.path)) == names
                    found = subprocess.run(["find", mount.path], check=True, capture_output=True, timeout=20, text=True)
                    assert {line.rpartition("/")[2] for line in found.stdout.splitlines()} == {"mnt", *names}
                waiting = multiprocessing.get_context("fork").Process(target=(mount.path / "unread").read_bytes)
                waiting.start()
                waiting.join(1)
                assert waiting.is_alive()
            finally:
                server.resume()
            waiting.join(20)
            assert waiting.exitcode == 0
            (server.directory / "data").write_bytes(data[::-1])
            wait_until(lambda: path.read_bytes() == data[::-1] or options.startswith("nocto"))


def test_a_soft_mount_serves_what_is_cached_and_fails_the_rest(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = random.Random(26).randbytes(5 * MIB)
    with Ganesha(tmp_path_factory.mktemp("own")) as server:
        for name in ("data", "unread"):
            (server.directory / name).write_bytes(data)
        # It gives a call up before the server counts as away.
        with Mount(server, tmp_path / "mnt", "mem=2g,soft,timeo=10,retrans=1,noac") as mount:
            assert set(os.listdir(mount.path)) == {"data", "unread"}
            assert (mount.path / "data").read_bytes() == data
            server.pause()
            try:
                assert read(mount.path / "data") == data
                assert set(os.listdir(mount.path)) == {"data", "unread"}
                with pytest.raises(TimeoutError):
                    (mount.path / "unread").read_bytes()
            finally:
                server.resume()
            wait_until(lambda: mount.status()["server"] == {"state": "up"})
            assert (mount.path / "unread").read_bytes() == data


def test_a_listing_seen_before_is_not_read_again(server: Ganesha, export: Path, tmp_path: Path) -> None:
    names = {f"file-{i:04}" for i in range(3000)}
    for name in names:
        (export / name).touch()
    with Watched(server, tmp_path / "mnt", "") as watched:
        here = watched.mount.path / export.name
        assert set(os.listdir(here)) == names
        pid = watched.mount.status()["daemon_pid"]
        watched.mount.daemon_may_die = True
        os.kill(int(str(pid)), 9)
        wait_until(lambda: watched.mount.status().get("daemon_pid") not in (pid, None))
        before = watched.fetched()
        Path("/proc/sys/vm/drop_caches").write_text("2")
        assert set(os.listdir(here)) == names
        assert watched.fetched() - before < 20_000
        (export / "one more").touch()
        wait_until(lambda: set(os.listdir(here)) == names | {"one more"})


@pytest.mark.parametrize("step", [1, -1])
def test_reading_small_files_in_order_fetches_those_that_follow(
    server: Ganesha, export: Path, tmp_path: Path, step: int
) -> None:
    data = {f"{i:03}": random.Random(i).randbytes(50_000) for i in range(100)}
    for name, contents in data.items():
        (export / name).write_bytes(contents)
    with Watched(server, tmp_path / "mnt", "mem=2g,nocto,actimeo=600") as watched:
        here = watched.mount.path / export.name
        names = os.listdir(here)[::step]
        for name in names[:6]:
            assert (here / name).read_bytes() == data[name]
        wait_until(lambda: watched.fetched() > 100 * 50_000)
        before = watched.fetched()
        for name in names:
            assert (here / name).read_bytes() == data[name]
        assert watched.fetched() - before < 50_000
