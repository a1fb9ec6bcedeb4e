"""A directory as a mount shows it and as it lies on the server."""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bed import Mount


@dataclass(frozen=True, slots=True)
class Place:
    """`here`: through the mount. `there`: the same directory on the server's disk."""

    mount: Mount
    here: Path
    there: Path

    @classmethod
    def of(cls, mount: Mount, there: Path) -> "Place":
        """The exported directory `there` through `mount`."""
        return cls(mount, mount.path / there.name, there)

    def through(self, mount: Mount) -> Path:
        """The same directory through another mount."""
        return mount.path / self.there.name


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Poll; fails the test when the condition does not come true in time."""
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends, "the condition did not come true"
        time.sleep(0.02)


def nice_values(pid: int) -> set[int]:
    """Of its threads."""
    return {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}


def links(mount: Mount) -> list[dict[str, str | int]]:
    """The links of a mount, as `efcfs status --json` tells them."""
    told = mount.status()["links"]
    assert isinstance(told, list)
    return told


def daemon_rss_bytes(mount: Mount) -> int:
    """Resident memory of the mount's daemon, without the cache's files that it has mapped."""
    pid = mount.status()["daemon_pid"]
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssFile:")))


def small_tmpfs(directory: Path, size_bytes: int) -> None:
    """Put a small file system at `directory`, to be filled up; the caller unmounts it."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "small", directory], check=True)


def mapped_kib(path: str | Path) -> int:
    """How much is mapped of the files below a path, page by page, in this process; of no path more than one mapping."""
    _, _, smaps = Path("/proc/self/smaps").read_text().partition(f"{path}")
    return next(int(line.split()[1]) for line in smaps.splitlines() if line.startswith("Rss:"))
