"""Sequential read: through the mount, with the client library alone, and with libnfs.

    .venv/bin/python -m bench.sequential [--mib 1024] [--rounds 3]
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio

from bench.parts import IN_FLIGHT, MIB, drop_page_cache, libnfs, median, report, with_client
from efcfs.nfs.client import Client, own_credential
from tests.bed import Ganesha, Mount


def bare_read(server: Ganesha, name: str, mib: int) -> None:
    """Pipelined READs over 4 links into buffers that are used again."""

    async def work(client: Client) -> None:
        cred = own_credential()
        fh = (await client.lookup(cred, client.root_fh, name.encode())).fh
        assert fh is not None
        numbers = iter(range(mib))

        async def reader() -> None:
            buffer = memoryview(bytearray(MIB))
            for number in numbers:
                done = 0
                while done < MIB:
                    result = await client.read(cred, fh, number * MIB + done, buffer[done : done + client.rsize])
                    assert result.count, "the file is shorter than it should be"
                    done += result.count

        async with trio.open_nursery() as nursery:
            for _ in range(IN_FLIGHT):
                nursery.start_soon(reader)

    with_client(server, work)


def mount_read(path: Path) -> None:
    buffer = bytearray(MIB)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="efcfs-bench-", dir="/dev/shm"))
    speeds: dict[str, list[float]] = {}
    with Ganesha(root) as server, Mount(server, root / "mnt", "mem=0") as mount:
        (server.directory / "data").write_bytes(os.urandom(MIB) * asked.mib)
        jobs: dict[str, Callable[[], None]] = {
            "read, mount": lambda: mount_read(mount.path / "data"),
            "read, client library": lambda: bare_read(server, "data", asked.mib),
            "read, nfs-cat": lambda: libnfs(server, "nfs-cat", "data"),
        }
        for _ in range(asked.rounds):
            for name, job in jobs.items():
                drop_page_cache(then_touch_bytes=2 * asked.mib * MIB)
                started = time.perf_counter()
                job()
                speeds.setdefault(name, []).append(asked.mib * MIB / 1e6 / (time.perf_counter() - started))
    subprocess.run(["rm", "-rf", root], check=True)
    middle = {name: median(values) for name, values in speeds.items()}
    report(
        "sequential", ("what", "MB/s", "lowest", "highest"),
        [(name, middle[name], min(values), max(values)) for name, values in speeds.items()],
        {"read, mount / client library": (middle["read, mount"] / middle["read, client library"], "≥", 0.5)},
    )  # fmt: skip


if __name__ == "__main__":
    main()
