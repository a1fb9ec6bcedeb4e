"""What the benchmarks share: the C programs, the bare client, dropping the page cache, and telling the results."""

import contextlib
import json
import mmap
import os
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import trio
from rich.console import Console
from rich.table import Table

from efcfs.keeper.kernel import set_read_ahead
from efcfs.nfs.client import Client
from efcfs.nfs.connect import ServerOptions, connect
from tests.bed import Ganesha

MIB = 1024 * 1024
# Calls that a bare client keeps under way when it reads or writes a large file.
IN_FLIGHT = 16
HERE = Path(__file__).parent
BUILD = HERE.parent / "build"

# what → (measured, "≥" or "≤", to reach)
Targets = dict[str, tuple[float, str, float]]


def built(name: str) -> Path:
    """The C program bench/NAME.c, compiled when it is newer than its binary."""
    source, binary = HERE / f"{name}.c", BUILD / name
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(exist_ok=True)
        flags = subprocess.check_output(["pkg-config", "--cflags", "--libs", "fuse3"], text=True).split()
        subprocess.run(["gcc", "-O2", "-o", binary, source, *flags], check=True)
    return binary


@contextlib.contextmanager
def floor(
    mountpoint: Path, files: int, timeout_s: float, *, file_bytes: int = 4096, big: Path = Path("/dev/null")
) -> Iterator[Path]:
    """The floor program mounted at `mountpoint`, with the kernel's readahead as efcfs sets it."""
    mountpoint.mkdir(exist_ok=True)
    words = (str(files), str(file_bytes), str(big), str(timeout_s))
    process = subprocess.Popen([built("floor"), mountpoint, *words])
    try:
        ends = time.monotonic() + 60
        while not os.path.ismount(mountpoint):
            assert process.poll() is None and time.monotonic() < ends, "the floor program did not mount"
            time.sleep(0.02)
        set_read_ahead(str(mountpoint))
        yield mountpoint
    finally:
        subprocess.run(["umount", mountpoint], check=False)
        process.wait(10)


class Far:
    """A server's port, so much further away: `delay_s` in each direction (bench/far.c)."""

    def __init__(self, port: int, delay_s: float) -> None:
        words = [str(built("far")), str(port), str(round(delay_s * 1e6))]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Far":
        self.port = self._line()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    @property
    def bytes_to_client(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


class Load:
    """One run of the load generator."""

    def __init__(self, operation: str, directory: Path, files: int, clients: int, seconds: float) -> None:
        done = subprocess.run(
            [built("load"), operation, directory, str(files), str(clients), str(seconds)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        count, elapsed_s, p50, p99 = map(float, done.stdout.split())
        self.per_second = count / elapsed_s
        self.p50_us, self.p99_us = p50, p99


def with_client(server: Ganesha, work: Callable[[Client], Awaitable[None]]) -> None:
    """Run `work` with a bare client: efcfs without FUSE, caches and write-behind."""

    async def connected() -> None:
        options = ServerOptions("127.0.0.1", port=server.port, mountport=server.mount_port)
        async with connect(options, server.export) as client:
            await work(client)

    trio.run(connected)


def libnfs(server: Ganesha, program: str, *words: str) -> None:
    """One of libnfs' programs; the last word is a file of the export."""
    ports = f"nfsport={server.port}&mountport={server.mount_port}&version=3"
    command = [program, *words[:-1], f"nfs://127.0.0.1{server.export}/{words[-1]}?{ports}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def drop_page_cache(then_touch_bytes: int = 0) -> None:
    """Drop clean pages; then make sure that so much free memory is really there.

    A virtual machine may give free memory back to its host (page reporting, balloons), and who touches it next
    pays: 250 MB/s were seen instead of 2 GB/s for new pages. That would measure the host, and only in
    those jobs that need new pages.
    """
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    if then_touch_bytes:
        with mmap.mmap(-1, then_touch_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
            pass


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def report(
    name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], targets: Targets
) -> None:
    """Print the table and what was reached; write both to bench/results/NAME.json."""
    console = Console()
    table = Table(*columns, title=name)
    for row in rows:
        table.add_row(*(f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)
    told = {}
    for what, (measured, relation, goal) in targets.items():
        reached = measured >= goal if relation == "≥" else measured <= goal
        console.print(f"{'reached' if reached else 'MISSED '}  {what}: {measured:.2f} ({relation} {goal:g})")
        told[what] = {"measured": measured, "goal": f"{relation} {goal:g}", "reached": reached}
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(
        json.dumps({"columns": list(columns), "rows": [list(row) for row in rows], "targets": told}, indent=2)
    )
