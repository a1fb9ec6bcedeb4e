"""Whether the cache that a mount asks for can be had on this machine: said at mount, before anything starts.

Later, in the daemon, a cache that cannot be used is only left out.
"""

import os
import re
import tempfile
from pathlib import Path

from efcfs.cache.trust import distrust
from efcfs.cli.main import EX_USAGE, Failure
from efcfs.config import MountConfig

# A cache over the network would be as far away as the server.
_NETWORK = frozenset(["nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "afs", "lustre", "glusterfs", "gfs2", "ocfs2"])
SHM = "/dev/shm"


def check_cache(config: MountConfig) -> None:
    """Raises Failure, with the remedy, for a tier that cannot work as asked."""
    if config.mem_bytes is not None and config.mem_bytes > disk_bytes(SHM):
        raise Failure(
            f"option mem={_size(config.mem_bytes)}: {SHM} has only {_size(disk_bytes(SHM))}:"
            f" ask for less, or `mount -o remount,size=… {SHM}`",
            EX_USAGE,
        )
    seen: set[str] = set()
    for path, capacity_bytes in config.ssd:
        option = f"option ssd={path}"
        if not os.path.isdir(path):
            what = "is not a directory: name one" if os.path.exists(path) else f"is missing: `mkdir -p {path}`"
            raise Failure(f"{option}: {path} {what}", EX_USAGE)
        if os.path.realpath(path) in seen:
            raise Failure(f"{option}: given twice: name each directory once", EX_USAGE)
        seen.add(os.path.realpath(path))
        fstype = _fstype(path)
        if fstype in _NETWORK or fstype.startswith("fuse."):
            raise Failure(f"{option}: {path} is on a network file system ({fstype}): name a local disk", EX_USAGE)
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise Failure(f"{option}: {path} is not writable ({error.strerror}): choose another", EX_USAGE) from None
        if capacity_bytes > disk_bytes(path):
            raise Failure(
                f"{option}:{_size(capacity_bytes)}: the disk has only {_size(disk_bytes(path))}: ask for less", EX_USAGE
            )
        why = distrust(Path(path))
        if why is not None:
            raise Failure(f"{option}: {why}: name a directory that only you can write to", EX_USAGE)


def check_size(path: str, wanted_bytes: int) -> None:
    """Raises Failure when the tier at `path` cannot be given this size."""
    if not wanted_bytes:
        raise Failure("size 0: nothing would fit: `efcfs cache clear` empties the cache", EX_USAGE)
    if wanted_bytes > disk_bytes(path):
        raise Failure(
            f"size {_size(wanted_bytes)}: {path} is on a disk of {_size(disk_bytes(path))}: ask for less", EX_USAGE
        )


def disk_bytes(path: str) -> int:
    """The size of the file system that holds `path`."""
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


def _fstype(path: str) -> str:
    """The type of the file system that holds `path`."""
    full, best, found = os.path.realpath(path), "", ""
    for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines():
        _, at, fstype = line.split()[:3]
        at = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), at)
        if f"{full}/".startswith(f"{at.rstrip('/')}/") and len(at) >= len(best):
            best, found = at, fstype
    return found


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1024**3:.1f}g" if size_bytes >= 1024**3 else f"{size_bytes / 1024**2:.1f}m"
