"""Metadata and small files: efcfs against the floor of FUSE, with 1 and 8 clients.

    .venv/bin/python -m bench.metadata [--seconds 3] [--files 100000]
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

from bench.parts import Load, drop_page_cache, floor, median, report, with_client
from efcfs.nfs.client import Client, own_credential
from tests.bed import Ganesha, Mount, Proxy
from tests.place import daemon_rss_bytes

FILES = 10_000
ROUNDS = 3
UNCACHED = "actimeo=0,lookupcache=none"


def bare_getattr_us(server: Ganesha) -> float:
    """The latency of one NFS call, without FUSE."""

    times = []

    async def work(client: Client) -> None:
        cred = own_credential()
        for _ in range(3000):
            started = time.perf_counter()
            await client.getattr(cred, client.root_fh)
            times.append(time.perf_counter() - started)

    with_client(server, work)
    return median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--files", type=int, default=100_000, help="how many to touch for the memory figure")
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="efcfs-bench-", dir="/dev/shm"))
    rows: list[tuple[object, ...]] = []
    with Ganesha(root) as server, Proxy(server.port, delay_s=0.001) as slow:
        made = server.directory / "many"
        made.mkdir()
        for i in range(FILES):
            (made / f"f{i}").write_bytes(b"x" * 4096)
        with floor(root / "floor", FILES, 0) as low, Mount(server, root / "mnt", UNCACHED) as mount:
            for operation in ("getattr", "lookup", "read", "create", "readdir"):
                for clients in (1, 8):
                    theirs = Load(operation, low, FILES, clients, asked.seconds)
                    ours = Load(operation, mount.path / "many", FILES, clients, asked.seconds)
                    rows.append((operation, clients, ours.per_second, ours.p50_us, ours.p99_us,
                                 theirs.per_second, theirs.p50_us, ours.p50_us / theirs.p50_us))  # fmt: skip
            latency = [
                (Load("getattr", mount.path / "many", FILES, 1, 1).p50_us, Load("getattr", low, FILES, 1, 1).p50_us,
                 bare_getattr_us(server))
                for _ in range(ROUNDS)
            ]  # fmt: skip
        subprocess.run(["find", made, "-name", "new-*", "-delete"], check=True)
        # Names are asked for each time; attributes of the directory are not, or each lookup is several round trips.
        with Mount(server, root / "far", "lookupcache=none", port=slow.port) as mount:
            drop_page_cache()
            one, eight = (Load("lookup", mount.path / "many", FILES, n, asked.seconds).per_second for n in (1, 8))
        rows.append(("lookup, 1 ms away", 1, one, "", "", "", "", ""))
        rows.append(("lookup, 1 ms away", 8, eight, "", "", "", "", ""))
        touched = server.directory / "touched"
        for d in range(asked.files // 1000):
            (touched / str(d)).mkdir(parents=True)
            for i in range(1000):
                (touched / str(d) / str(i)).touch()
        with Mount(server, root / "memory") as mount:
            subprocess.run(["find", mount.path / "touched", "-size", "+1"], check=True, stdout=subprocess.DEVNULL)
            rss_mb = daemon_rss_bytes(mount) / 1e6
    subprocess.run(["rm", "-rf", root], check=True)
    ratios = [ours / (low_us + bare) for ours, low_us, bare in latency]
    report(
        "metadata",
        ("operation", "clients", "efcfs/s", "p50 µs", "p99 µs", "floor/s", "floor p50 µs", "p50 ratio"), rows,
        {
            "uncached getattr latency / (floor + one bare NFS call)": (median(ratios), "≤", 1.8),
            "lookups 1 ms away, 8 clients / 1 client": (eight / one, "≥", 6),
            f"daemon memory after {asked.files} files, MB": (rss_mb, "≤", 150),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
