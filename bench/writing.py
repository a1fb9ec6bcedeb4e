"""Writing: through the mount, with the client library alone, with libnfs, and against the floor of FUSE.

    .venv/bin/python -m bench.writing [--mib 1024] [--files 2000] [--rounds 3]

A large file in 1 MiB writes and fsync; 4 KiB appends; small files created, written and closed by 8 clients, in one
directory and in one each. What is closed or synced is committed on the server, also by the bare client.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio

from bench.parts import IN_FLIGHT, MIB, Load, drop_page_cache, floor, libnfs, median, report, with_client
from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, own_credential
from tests.bed import Ganesha, Mount

CLIENTS = 8
SMALL_FILE_BYTES = 32 * 1024
APPEND_BYTES, APPENDS = 4096, 64 * MIB // 4096
# Names and attributes of the floor program are kept as long as a fresh file's are by default.
FLOOR_TIMEOUT_S = 3
MOST_S = 300

Speeds = dict[str, list[float]]


def bare_write(server: Ganesha, name: str, mib: int) -> None:
    """Pipelined UNSTABLE WRITEs over 4 links and one COMMIT."""
    data = os.urandom(MIB)

    async def work(client: Client) -> None:
        cred = own_credential()
        made = await client.create(cred, client.root_fh, name.encode(), nfs3.Sattr(mode=0o644, size=0))
        assert made.fh is not None
        fh, numbers = made.fh, iter(range(mib))

        async def writer() -> None:
            for number in numbers:
                view, done = memoryview(data), 0
                while done < MIB:
                    piece = view[done : done + client.wsize]
                    done += (await client.write(cred, fh, number * MIB + done, [piece], len(piece))).count

        async with trio.open_nursery() as nursery:
            for _ in range(IN_FLIGHT):
                nursery.start_soon(writer)
        await client.commit(cred, fh)

    with_client(server, work)


def mount_write(path: Path, mib: int) -> None:
    data = os.urandom(MIB)
    with open(path, "wb", buffering=0) as file:
        for _ in range(mib):
            file.write(data)
        os.fsync(file.fileno())


def bare_small_files(server: Ganesha, directory: str, files: int, *, apart: bool) -> float:
    """CREATE, UNSTABLE WRITE and COMMIT by 8 workers. Returns files a second."""
    data = memoryview(os.urandom(SMALL_FILE_BYTES))
    elapsed_s = 0.0

    async def work(client: Client) -> None:
        nonlocal elapsed_s
        cred = own_credential()
        top = (await client.lookup(cred, client.root_fh, directory.encode())).fh
        assert top is not None
        numbers = iter(range(files))

        async def worker(parent: bytes) -> None:
            for number in numbers:
                fh = (await client.create(cred, parent, b"f%d" % number, nfs3.Sattr(mode=0o644, size=0))).fh
                assert fh is not None
                written = await client.write(cred, fh, 0, [data], len(data))
                assert written.count == len(data)
                await client.commit(cred, fh)

        parents = [(await client.lookup(cred, top, b"%d" % i)).fh if apart else top for i in range(CLIENTS)]
        started = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for parent in parents:
                assert parent is not None
                nursery.start_soon(worker, parent)
        elapsed_s = time.perf_counter() - started

    with_client(server, work)
    return files / elapsed_s


def append(path: Path) -> tuple[float, float]:
    """Appends a second: of write(2) alone, and with close(2), which commits."""
    block = os.urandom(APPEND_BYTES)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    started = time.perf_counter()
    for _ in range(APPENDS):
        os.write(fd, block)
    written = time.perf_counter()
    os.close(fd)
    return APPENDS / (written - started), APPENDS / (time.perf_counter() - started)


def cpu_s(pid: int) -> float:
    """What a process has taken of the processors (proc(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def large_files(server: Ganesha, mount: Mount, source: Path, mib: int, speeds: Speeds) -> None:
    """And who needs how much of the processors: when all are on one machine, their sum decides."""
    mount_job, client_job = "large file, mount", "large file, client library"
    both = {"program": os.getpid(), "server": int((server.root / "pid").read_text())}
    taking = {mount_job: {**both, "daemon": int(str(mount.status()["daemon_pid"]))}, client_job: both}
    jobs: dict[str, Callable[[], None]] = {
        mount_job: lambda: mount_write(mount.path / "w1", mib),
        client_job: lambda: bare_write(server, "w2", mib),
        "large file, nfs-cp": lambda: libnfs(server, "nfs-cp", str(source), "w3"),
    }
    for what, job in jobs.items():
        # A write needs new pages twice: in the client's page cache and in the server's file.
        drop_page_cache(then_touch_bytes=3 * mib * MIB)
        before_s = {who: cpu_s(pid) for who, pid in taking.get(what, {}).items()}
        started = time.perf_counter()
        job()
        speeds.setdefault(f"{what}, MB/s", []).append(mib * MIB / 1e6 / (time.perf_counter() - started))
        for who, so_far_s in before_s.items():
            taken_us = (cpu_s(taking[what][who]) - so_far_s) * 1e6
            speeds.setdefault(f"{what}, CPU of the {who}, us/MiB", []).append(taken_us / mib)
    for made in ("w1", "w2", "w3"):
        (server.directory / made).unlink()


def appends(low: Path, mount: Mount, number: int, speeds: Speeds) -> None:
    for whose, directory in (("mount", mount.path), ("floor", low)):
        drop_page_cache(then_touch_bytes=3 * APPENDS * APPEND_BYTES)
        path = directory / f"appended{number}"
        alone, with_close = append(path)
        path.unlink()
        speeds.setdefault(f"4 KiB appends, {whose}, 1/s", []).append(alone)
        speeds.setdefault(f"4 KiB appends and close, {whose}, 1/s", []).append(with_close)


def small_files(server: Ganesha, mount: Mount, number: int, files: int, speeds: Speeds, *, apart: bool) -> None:
    """In one directory, where the kernel lets one client after the other make a name; or in one for each client."""
    what = "small files apart" if apart else "small files"
    for whose in ("mount", "client library"):
        directory = server.directory / f"{what} {whose} {number}"
        directory.mkdir()
        if apart:
            for i in range(CLIENTS):
                (directory / str(i)).mkdir()
        drop_page_cache(then_touch_bytes=3 * files * SMALL_FILE_BYTES)
        if whose == "mount":
            operation = "make-apart" if apart else "make"
            rate = Load(operation, mount.path / directory.name, files, CLIENTS, MOST_S).per_second
        else:
            rate = bare_small_files(server, directory.name, files, apart=apart)
        sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
        assert sizes == [SMALL_FILE_BYTES] * files, "not all files are on the server"
        speeds.setdefault(f"{what}, {whose}, 1/s", []).append(rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="efcfs-bench-", dir="/dev/shm"))
    source = root / "source"
    source.write_bytes(os.urandom(MIB) * asked.mib)
    speeds: Speeds = {}
    with (
        Ganesha(root) as server,
        Mount(server, root / "mnt") as mount,
        floor(root / "floor", 0, FLOOR_TIMEOUT_S) as low,
    ):
        for number in range(asked.rounds):
            large_files(server, mount, source, asked.mib, speeds)
            appends(low, mount, number, speeds)
            small_files(server, mount, number, asked.files, speeds, apart=False)
            small_files(server, mount, number, asked.files, speeds, apart=True)
    subprocess.run(["rm", "-rf", root], check=True)
    middle = {what: median(values) for what, values in speeds.items()}

    def ratio(what: str, other: str, unit: str) -> float:
        return middle[f"{what}, mount, {unit}"] / middle[f"{what}, {other}, {unit}"]

    report(
        "writing", ("what", "median", "lowest", "highest"),
        [(what, middle[what], min(values), max(values)) for what, values in speeds.items()],
        {
            "large file, mount / client library": (ratio("large file", "client library", "MB/s"), "≥", 0.9),
            "4 KiB appends, mount / floor": (ratio("4 KiB appends", "floor", "1/s"), "≥", 0.7),
            "small files, mount / client library": (ratio("small files", "client library", "1/s"), "≥", 0.5),
            "small files apart, mount / client library": (
                ratio("small files apart", "client library", "1/s"), "≥", 0.5,
            ),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
