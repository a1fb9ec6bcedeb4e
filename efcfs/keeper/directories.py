"""The mount's directories, and what becomes of data that could not be written.

A keeper makes `NAME.PID` for its state and its control socket: a mount that was lazily unmounted may still live under
the same NAME. Keeper and daemon hold a shared lock on each as long as they live, so what nobody
holds was left by the dead, and is cleared away. But data that no server has yet is never thrown away: what lies in the
log of the state's `dirty/` at the end is kept, with all that belongs to it, in a place that survives a reboot.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator

from efcfs.keeper.kernel import EX_SYSTEM, MountFailed

log = logging.getLogger(__name__)

MOUNT = "mount.json"
COPY_BYTES = 1 << 20
PID_MAX = 1 << 22


def make(name: str) -> str:
    """Make `NAME.PID`, held by this process and its children. Clears what dead keepers left. Raises MountFailed."""
    base = os.path.dirname(name)
    os.makedirs(base, mode=0o700, exist_ok=True)
    status = os.lstat(base)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise MountFailed(f"{base} must be a directory of uid {os.geteuid()} that nobody else can write: remove it",
                          EX_SYSTEM)  # fmt: skip
    with _alone_in(base):
        clear(name)
        number = os.getpid()
        while os.path.exists(f"{name}.{number}"):  # of a container with pids of its own
            number += PID_MAX
        os.mkdir(directory := f"{name}.{number}", 0o700)
        hold(directory)
    return directory


@contextlib.contextmanager
def _alone_in(base: str) -> Iterator[None]:
    """Or a directory that another keeper has made and does not hold yet looks like one of the dead."""
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def hold(directory: str) -> None:
    """Until this process and the daemons that it starts have ended."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    os.set_inheritable(fd, True)


def held(directory: str) -> bool:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def clear(name: str) -> list[str]:
    """Remove the directories `NAME.PID` that nobody holds. Returns where their unwritten data went."""
    kept = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir(os.path.dirname(name)):
            left, _, number = entry.rpartition(".")
            path = os.path.join(os.path.dirname(name), entry)
            if left == os.path.basename(name) and number.isdecimal() and not held(path):
                place = remove(path)
                kept += [place] if place is not None else []
        if not os.path.exists(name):
            os.unlink(name)  # the link to one of them
    return kept


def describe_mount(state_dir: str, request: dict[str, object]) -> None:
    """Write beside the state what must be known to write its data later."""
    path = os.path.join(state_dir, MOUNT)
    with open(f"{path}.new", "w") as file:
        json.dump(request, file)
    os.rename(f"{path}.new", path)


def remove(state_dir: str) -> str | None:
    """Remove a directory. Unwritten data in it is kept elsewhere first: returns where, and None when there is none."""
    place = None
    if _undone(state_dir):
        place = _keep(state_dir)
        log.error("data that could not be written is kept in %s: write it with `efcfs recover %s` when the server is"
                  " back", place, os.path.basename(place))  # fmt: skip
    shutil.rmtree(state_dir, ignore_errors=True)
    return place


def _undone(state_dir: str) -> int:
    """How many records of the dirty log no server has: each of its files tells in bytes 8 to 12."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(os.path.join(state_dir, "dirty")):
            with open(entry.path, "rb") as segment:
                total += int.from_bytes(segment.read(12)[8:], "little")
    return total


def unwritten_dir() -> str:
    """Where unwritten data survives a reboot."""
    if os.geteuid() == 0:
        return "/var/lib/efcfs/unwritten"
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "efcfs/unwritten")


def unwritten_in_memory(base: str) -> str:
    """Where it stays when that cannot be written; `base` is the directory of the user's states."""
    return os.path.join(base, "unwritten")


def _keep(state_dir: str) -> str:
    """Copy the state to a named place; where that fails it stays in memory, under a name of its own."""
    name = _name(state_dir)
    for number in range(1, 1000):
        place = os.path.join(unwritten_dir(), name if number == 1 else f"{name}-{number}")
        if not os.path.exists(place):
            break
    partial = os.path.join(unwritten_dir(), f".{os.path.basename(place)}.partial")
    try:
        os.makedirs(unwritten_dir(), mode=0o700, exist_ok=True)
        _copy_tree(state_dir, partial)
        os.rename(partial, place)
        _sync(unwritten_dir())
    except OSError as error:
        log.error("unwritten data cannot be copied to %s (%s): it stays in memory, until a reboot", place, error)
        shutil.rmtree(partial, ignore_errors=True)
        place = os.path.join(unwritten_in_memory(os.path.dirname(state_dir)), os.path.basename(place))
        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        os.rename(state_dir, place)
    return place


def _name(state_dir: str) -> str:
    """Source, mount point and time, readable and without a slash."""
    try:
        with open(os.path.join(state_dir, MOUNT)) as file:
            mount = json.load(file)
        what = f"{mount['source']} {mount['mountpoint']}"
    except (OSError, ValueError, KeyError):
        what = os.path.basename(state_dir)
    return re.sub(r"[^A-Za-z0-9.]+", "-", what).strip("-.")[:120] + time.strftime("-%Y%m%d-%H%M%S")


def _copy_tree(source: str, target: str) -> None:
    """Copy files and directories to the disk, holes as holes."""
    os.mkdir(target, 0o700)
    for entry in os.scandir(source):
        to = os.path.join(target, entry.name)
        if entry.is_dir(follow_symlinks=False):
            _copy_tree(entry.path, to)
        elif entry.is_file(follow_symlinks=False):
            _copy_file(entry.path, to)
    _sync(target)


def _copy_file(source: str, target: str) -> None:
    with open(source, "rb", buffering=0) as src, open(target, "xb", buffering=0) as dst:
        os.fchmod(dst.fileno(), 0o600)
        size_bytes = os.fstat(src.fileno()).st_size
        os.ftruncate(dst.fileno(), size_bytes)
        end = 0
        while (start := _seek(src.fileno(), end, os.SEEK_DATA)) < size_bytes:
            end = _seek(src.fileno(), start, os.SEEK_HOLE)
            os.lseek(dst.fileno(), start, os.SEEK_SET)
            while start < end:
                start += os.sendfile(dst.fileno(), src.fileno(), start, min(end - start, COPY_BYTES))
        os.fsync(dst.fileno())


def _seek(fd: int, offset: int, what: int) -> int:
    """The next data or hole; the end of the file when there is none."""
    try:
        return os.lseek(fd, offset, what)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return os.fstat(fd).st_size


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
