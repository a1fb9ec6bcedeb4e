"""Sequential read and write: through the mount, with the client library alone, and with libnfs.

    .venv/bin/python -m bench.sequential [--mib 1024] [--rounds 3]
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from bench.parts import drop_page_cache, median, report
from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, ServerOptions, connect, own_credential
from tests.bed import Ganesha, Mount

MIB = 1024 * 1024
IN_FLIGHT = 16


async def with_client(server: Ganesha, work: Callable[[Client], Awaitable[None]]) -> None:
    options = ServerOptions("127.0.0.1", port=server.port, mountport=server.mount_port)
    async with connect(options, server.export) as client:
        await work(client)


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

    trio.run(with_client, server, work)


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

    trio.run(with_client, server, work)


def mount_read(path: Path) -> None:
    buffer = bytearray(MIB)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def mount_write(path: Path, mib: int) -> None:
    data = os.urandom(MIB)
    with open(path, "wb", buffering=0) as file:
        for _ in range(mib):
            file.write(data)
        os.fsync(file.fileno())


def libnfs(*arguments: str) -> None:
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="efcfs-bench-", dir="/dev/shm"))
    speeds: dict[str, list[float]] = {}
    with Ganesha(root) as server, Mount(server, root / "mnt", "mem=0") as mount:
        url = f"nfs://127.0.0.1{server.export}/%s?nfsport={server.port}&mountport={server.mount_port}&version=3"
        source = root / "source"
        source.write_bytes(os.urandom(MIB) * asked.mib)
        (server.directory / "data").write_bytes(source.read_bytes())
        jobs: dict[str, Callable[[], None]] = {
            "read, mount": lambda: mount_read(mount.path / "data"),
            "read, client library": lambda: bare_read(server, "data", asked.mib),
            "read, nfs-cat": lambda: libnfs("nfs-cat", url % "data"),
            "write, mount": lambda: mount_write(mount.path / "w1", asked.mib),
            "write, client library": lambda: bare_write(server, "w2", asked.mib),
            "write, nfs-cp": lambda: libnfs("nfs-cp", str(source), url % "w3"),
        }
        for _ in range(asked.rounds):
            for name, job in jobs.items():
                # A write needs new pages twice: in the client's page cache and in the server's file.
                drop_page_cache(then_touch_bytes=3 * asked.mib * MIB)
                started = time.perf_counter()
                job()
                speeds.setdefault(name, []).append(asked.mib * MIB / 1e6 / (time.perf_counter() - started))
                for made in ("w1", "w2", "w3"):
                    (server.directory / made).unlink(missing_ok=True)
    subprocess.run(["rm", "-rf", root], check=True)
    middle = {name: median(values) for name, values in speeds.items()}
    report(
        "sequential", ("what", "MB/s", "lowest", "highest"),
        [(name, middle[name], min(values), max(values)) for name, values in speeds.items()],
        {
            "read, mount / client library": (middle["read, mount"] / middle["read, client library"], "≥", 0.5),
            "write, mount / client library": (middle["write, mount"] / middle["write, client library"], "≥", 0.5),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
