"""What the block cache gives: warm and cold reads, compared in one run with the floor of FUSE and local files.

    .venv/bin/python -m bench.cache [--gib 4] [--files 10000] [--rounds 3] [--only NAME …]
"""

import argparse
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.parts import Far, Targets, drop_page_cache, floor, median, report
from efcfs.control import cache_dir
from tests.bed import Ganesha, Mount, Proxy
from tests.place import wait_until

MIB = 1024 * 1024
FILE_BYTES = 100_000
RANDOM_READS = 2000

Rows = list[tuple[object, ...]]


def sequential_s(path: Path, piece_bytes: int = MIB) -> float:
    """Seconds for reading the file from begin to end."""
    buffer = bytearray(piece_bytes)
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def random_us(path: Path, size_bytes: int, seed: int) -> float:
    """Median microseconds of one read of `size_bytes` at a random place."""
    rng, length = random.Random(seed), path.stat().st_size
    buffer, taken = bytearray(size_bytes), []
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for _ in range(RANDOM_READS):
        offset = rng.randrange(0, length - size_bytes) & -size_bytes
        started = time.perf_counter()
        os.preadv(fd, [buffer], offset)
        taken.append(time.perf_counter() - started)
    os.close(fd)
    return median(taken) * 1e6


def files_us(directory: Path, names: list[str]) -> float:
    """Mean microseconds of open, read all, close."""
    buffer = bytearray(FILE_BYTES + 1)
    started = time.perf_counter()
    for name in names:
        fd = os.open(directory / name, os.O_RDONLY)
        assert os.readv(fd, [buffer]) == FILE_BYTES
        os.close(fd)
    return (time.perf_counter() - started) / len(names) * 1e6


def in_turns(rounds: int, jobs: dict[str, Callable[[], float]], before: Callable[[], None]) -> dict[str, float]:
    """The median of each job; the jobs take turns, so what else the machine does hits all of them."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            before()
            taken[name].append(job())
    return {name: median(values) for name, values in taken.items()}


def big_file(root: Path, gib: float, rounds: int, rows: Rows, targets: Targets) -> None:
    """One large file, in memory and in the kernel's page cache."""
    size_bytes = int(gib * 1024) * MIB
    with Ganesha(root) as server:
        data = server.directory / "data"
        write_random(data, size_bytes)
        with Mount(server, root / "mnt", f"mem={size_bytes * 5 // 4}") as mount, floor(
            root / "floor", 0, 60, big=data
        ) as low:
            ours = mount.path / "data"
            sequential_s(ours)
            wait_until(lambda: used_bytes(mount, "mem") >= size_bytes, 60)
            # A second each, and as much as a half faster or slower from one to the next.
            cold = in_turns(
                3 * rounds, {"efcfs": lambda: sequential_s(ours), "floor": lambda: sequential_s(low / "big")},
                lambda: drop_page_cache(then_touch_bytes=2 * size_bytes),
            )  # fmt: skip
            for path in (ours, low / "big", data):
                sequential_s(path)
            warm = in_turns(
                rounds, {"efcfs": lambda: sequential_s(ours), "tmpfs": lambda: sequential_s(data)}, lambda: None
            )
            # A quarter of a second each, and in one of two speeds, as the scheduler has both sides on one CPU or two.
            at_random = in_turns(
                5 * rounds,
                {"efcfs": lambda: random_us(ours, 65536, 1), "floor": lambda: random_us(low / "big", 65536, 1)},
                lambda: drop_page_cache(then_touch_bytes=RANDOM_READS * 65536 * 2),
            )  # fmt: skip
    speed = size_bytes / 1e6
    rows.append(("MEM warm, page cache dropped, MB/s", speed / cold["efcfs"], "floor", speed / cold["floor"]))
    rows.append(("page cache warm, MB/s", speed / warm["efcfs"], "tmpfs", speed / warm["tmpfs"]))
    rows.append(("64 KiB at random, MEM warm, µs", at_random["efcfs"], "floor", at_random["floor"]))
    targets["MEM warm, 1 MiB reads / floor"] = (cold["floor"] / cold["efcfs"], "≥", 0.9)
    targets["page cache warm / tmpfs"] = (warm["tmpfs"] / warm["efcfs"], "≥", 0.95)
    targets["64 KiB random, MEM warm: latency / floor"] = (at_random["efcfs"] / at_random["floor"], "≤", 1.3)


def on_disk(root: Path, disk: Path, rounds: int, rows: Rows, targets: Targets) -> None:
    """One file in the disk tier, memory too small for it."""
    size_bytes = 1024 * MIB
    with Ganesha(root) as server:
        data, local = server.directory / "data", disk / "local"
        write_random(data, size_bytes)
        subprocess.run(["cp", data, local], check=True)
        with Mount(server, root / "mnt", f"mem=128m,ssd={disk}/ssd:4g") as mount:
            ours = mount.path / "data"

            def all_there() -> bool:
                sequential_s(ours)
                drop_page_cache()
                return used_bytes(mount, "ssd0") >= size_bytes

            wait_until(all_there, 120)
            taken = in_turns(
                rounds, {"efcfs": lambda: sequential_s(ours), "local": lambda: sequential_s(local)},
                lambda: drop_page_cache(then_touch_bytes=2 * size_bytes),
            )  # fmt: skip
    speed = size_bytes / 1e6
    rows.append(("SSD warm, page cache dropped, MB/s", speed / taken["efcfs"], "local", speed / taken["local"]))
    targets["SSD warm, sequential / local file"] = (taken["local"] / taken["efcfs"], "≥", 0.9)


def random_cold(root: Path, rows: Rows, targets: Targets) -> None:
    """How much of the server's bytes a random reader causes."""
    with Ganesha(root) as server:
        write_random(server.directory / "data", 1024 * MIB)
        with Proxy(server.port) as proxy, Mount(server, root / "mnt", "mem=1g", port=proxy.port) as mount:
            before = proxy.bytes_to_client
            rng, asked_bytes = random.Random(2), 0
            fd = os.open(mount.path / "data", os.O_RDONLY)
            for _ in range(500):
                asked_bytes += len(os.pread(fd, 4096, rng.randrange(0, 1024 * MIB - 4096) & -4096))
            os.close(fd)
            fetched_bytes = proxy.bytes_to_client - before
    rows.append(("4 KiB at random, cold: bytes fetched", float(fetched_bytes), "asked", float(asked_bytes)))
    targets["4 KiB random, cold: fetched / asked"] = (fetched_bytes / asked_bytes, "≤", 20)


def small_files(root: Path, count: int, rounds: int, rows: Rows, targets: Targets) -> None:
    """Epochs over many small files, 1 ms away."""
    names = [f"f{i}" for i in range(count)]
    shuffled = random.Random(3).sample(names, count)
    first: dict[str, list[float]] = {
        f"{mode},mem={mem}": [] for mode in ("nocto,actimeo=3600", "consistency=immutable") for mem in ("0", "4g")
    }
    with Ganesha(root) as server:
        block = os.urandom(FILE_BYTES)
        for name in names:
            (server.directory / name).write_bytes(block)
        local = server.directory
        with Far(server.port, 0.0005) as proxy, floor(root / "floor", count, 0, file_bytes=FILE_BYTES) as low:
            for _ in range(rounds):
                for options, taken in first.items():
                    clear_memory_tier()
                    drop_page_cache(then_touch_bytes=3 * count * FILE_BYTES)
                    with Mount(server, root / "mnt", options, port=proxy.port) as mount:
                        os.listdir(mount.path)
                        taken.append(files_us(mount.path, names))
            with Mount(server, root / "mnt", "nocto,actimeo=3600,mem=4g", port=proxy.port) as mount:
                os.listdir(mount.path)
                files_us(mount.path, names)
                before = proxy.bytes_to_client
                second = in_turns(
                    rounds,
                    {"efcfs": lambda: files_us(mount.path, shuffled), "floor": lambda: files_us(low, shuffled)},
                    lambda: drop_page_cache(then_touch_bytes=2 * count * FILE_BYTES),
                )
                fetched_bytes = proxy.bytes_to_client - before
            with Mount(server, root / "mnt", "consistency=immutable,mem=4g", port=proxy.port) as mount:
                files_us(mount.path, names)
                warm = in_turns(
                    rounds,
                    {"efcfs": lambda: files_us(mount.path, shuffled), "tmpfs": lambda: files_us(local, shuffled)},
                    lambda: None,
                )
    rows.append(("small files, second epoch, page cache dropped, µs", second["efcfs"], "floor", second["floor"]))
    rows.append(("small files, second epochs: bytes from the server", float(fetched_bytes), "", 0.0))
    rows.append(("small files, immutable, page cache warm, µs", warm["efcfs"], "tmpfs", warm["tmpfs"]))
    epoch_us = {options: median(taken) for options, taken in first.items()}
    nocto, nocto_0, immutable, immutable_0 = (
        epoch_us[f"{mode},mem={mem}"] for mode in ("nocto,actimeo=3600", "consistency=immutable") for mem in ("4g", "0")
    )
    rows.append(("small files, first epoch in order, immutable, µs", immutable, "no prefetch", immutable_0))
    rows.append(("small files, first epoch in order, nocto, µs", nocto, "no prefetch", nocto_0))
    targets["small files, second epoch: time / floor"] = (second["efcfs"] / second["floor"], "≤", 2)
    targets["small files, second epoch: bytes from the server a file"] = (fetched_bytes / rounds / count, "≤", 0)
    targets["small files, immutable, page cache warm: time / tmpfs"] = (warm["efcfs"] / warm["tmpfs"], "≤", 1.3)
    targets["small files, first epoch in order, immutable: without / with prefetch"] = (
        immutable_0 / immutable, "≥", 3,
    )  # fmt: skip


def far_away(root: Path, rows: Rows, targets: Targets) -> None:
    """One reader, a link with 5 ms delay and 25 MB/s a connection, 8 links."""
    cap, size_bytes = 25_000_000, 512 * MIB
    with Ganesha(root) as server:
        write_random(server.directory / "data", size_bytes)
        with Proxy(server.port) as proxy, Mount(server, root / "mnt", "nconnect=8,mem=2g", port=proxy.port) as mount:
            proxy.delay_s, proxy.cap_bytes_per_s = 0.0025, cap
            speed = size_bytes / sequential_s(mount.path / "data")
    rows.append(("cold, 5 ms away, 8 links, MB/s", speed / 1e6, "8 × the cap", 8 * cap / 1e6))
    targets["cold, 5 ms away / 8 × the cap"] = (speed / 8 / cap, "≥", 0.85)


def million_blocks(root: Path, rows: Rows, targets: Targets) -> None:
    """A mount over an index of a million blocks."""
    from efcfs.cache.tier import Tier  # noqa: PLC0415  # the other benchmarks need only the command

    tier = Tier("mem", cache_dir(0), 64 * 1024 * MIB, in_memory=True)
    for start in range(0, 1_000_000, 10_000):
        with tier.index.change() as txn:
            for i in range(start, start + 10_000):
                key = i.to_bytes(4, "big") * 4
                txn.reserve(key, 0)
                txn.add(key, 0, [(0, bytes(8))])
    tier.close()
    with Ganesha(root) as server:
        (server.directory / "file").write_bytes(b"x")
        started = time.perf_counter()
        with Mount(server, root / "mnt", "mem=20g") as mount:
            assert (mount.path / "file").read_bytes() == b"x"
            taken_s = time.perf_counter() - started
            pid = mount.status()["daemon_pid"]
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            own_mb = sum(int(li.split()[1]) for li in lines if li.startswith(("RssAnon:", "RssFile:"))) / 1024
    rows.append(("mount to first answer, 1,000,000 blocks, s", taken_s, "daemon, MiB", own_mb))
    targets["mount with 1,000,000 blocks, s"] = (taken_s, "≤", 1)
    targets["daemon memory with 1,000,000 blocks, MiB"] = (own_mb, "≤", 200)


def write_random(path: Path, size_bytes: int) -> None:
    """Bytes that differ from MiB to MiB, quickly made."""
    block = bytearray(os.urandom(MIB))
    with open(path, "wb", buffering=0) as file:
        for number in range(size_bytes // MIB):
            block[:8] = number.to_bytes(8, "big")
            file.write(block)


def used_bytes(mount: Mount, name: str) -> int:
    tiers = mount.status()["tiers"]
    assert isinstance(tiers, list)
    return int(next(t["used_bytes"] for t in tiers if t["name"] == name))


def clear_memory_tier() -> None:
    """An empty memory tier: only while nothing is mounted."""
    subprocess.run(["rm", "-rf", cache_dir(os.geteuid())], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    rows: Rows = []
    targets: Targets = {}
    disk = Path(tempfile.mkdtemp(prefix="efcfs-bench-", dir="/var/tmp"))
    jobs: dict[str, Callable[[Path], None]] = {
        "big": lambda root: big_file(root, asked.gib, asked.rounds, rows, targets),
        "disk": lambda root: on_disk(root, disk, asked.rounds, rows, targets),
        "random": lambda root: random_cold(root, rows, targets),
        "small": lambda root: small_files(root, asked.files, asked.rounds, rows, targets),
        "far": lambda root: far_away(root, rows, targets),
        "million": lambda root: million_blocks(root, rows, targets),
    }
    (disk / "ssd").mkdir()
    try:
        for name, job in jobs.items():
            if asked.only and name not in asked.only:
                continue
            root = Path(tempfile.mkdtemp(prefix="efcfs-bench-", dir="/dev/shm"))
            try:
                clear_memory_tier()
                job(root)
            finally:
                subprocess.run(["rm", "-rf", root], check=True)
    finally:
        clear_memory_tier()
        subprocess.run(["rm", "-rf", disk], check=True)
    report("cache", ("what", "efcfs", "against", "it"), rows, targets)


if __name__ == "__main__":
    main()
