"""Whether a directory of the cache is ours alone: who can write in it says what others read.

LMDB trusts its file, and a sum proves only that its bytes are the ones that were cached.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path


def distrust(directory: Path) -> str | None:
    """Why what lies there is not to be believed; None when only we or root can have made it. Raises OSError."""
    for path in (Path(os.path.realpath(directory)), *_inside(directory)):
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            return f"{path} is a symbolic link"
        if status.st_uid not in (0, os.geteuid()):
            return f"{path} belongs to uid {status.st_uid}"
        if status.st_mode & 0o022:
            return f"others can write to {path} (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _inside(directory: Path) -> Iterator[Path]:
    index = directory / "index.lmdb"
    yield from (path for path in (index, index / "data.mdb", index / "lock.mdb") if os.path.lexists(path))
    yield from directory.glob("data-" + "[0-9a-f]" * 8)
