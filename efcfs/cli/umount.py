"""`efcfs umount`: end a mount, wait until its processes are gone; by force when the server is away."""

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import subprocess
import time

import click

from efcfs import control
from efcfs.cli.main import EX_MOUNT, EX_USAGE, Failure

MNT_FORCE, MNT_DETACH = 1, 2
# How long the daemon may take for its last writes before we stop waiting for it.
WAIT_S = 60.0
# `umount -f` must be back in five seconds.
FORCED_WAIT_S = 2.0

_libc = ctypes.CDLL(None, use_errno=True)


@click.command()
@click.option("-f", "--force", is_flag=True, help="even when the server is away: calls in flight fail")
@click.option("-l", "--lazy", is_flag=True, help="out of sight now; ends when nobody uses it any more")
@click.argument("mountpoint")
def umount(mountpoint: str, force: bool, lazy: bool) -> int:
    """Unmount an efcfs mount."""
    mounted = control.find(mountpoint)
    if mounted is None:
        raise Failure(f"{mountpoint} is not an efcfs mount: `efcfs status` lists them", EX_USAGE)
    pid = mounted.keeper_pid
    try:
        detach(mounted, MNT_FORCE | MNT_DETACH if force else MNT_DETACH if lazy else 0)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Failure(
                f"{mountpoint} is busy: end the programs that use it (`fuser -vm {mountpoint}`), or use -l", EX_MOUNT
            ) from None
        raise Failure(f"cannot unmount {mountpoint}: {error.strerror}", EX_MOUNT) from None
    if pid is None or lazy:
        return 0
    gone = ended(pid, FORCED_WAIT_S if force else WAIT_S)
    if not force:
        if not gone:
            still = f"{mountpoint} is unmounted, its daemon still writes: see `efcfs status` and the log"
            raise Failure(still, EX_MOUNT)
        return 0
    # The keeper first, or it starts another daemon.
    for victim in () if gone else (pid, *children(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    clear(mounted, pid)
    return 0


def clear(mounted: control.Mounted, keeper_pid: int) -> None:
    """Remove what a killed keeper leaves."""
    link = mounted.runtime_dir
    if link.is_symlink() and os.readlink(link) == f"{link.name}.{keeper_pid}":
        link.unlink()
    for directory in (link, control.state_dir(mounted.mountpoint, mounted.uid)):
        shutil.rmtree(f"{directory}.{keeper_pid}", ignore_errors=True)


def detach(mounted: control.Mounted, flags: int) -> None:
    """umount2(2), or fusermount3 without root. Raises OSError."""
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mounted.mountpoint), flags) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return
    if flags & MNT_FORCE and (pid := mounted.keeper_pid) is not None:
        # Without root a connection is aborted by ending those who hold it.
        for victim in (pid, *children(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
    command = ["fusermount3", "-u", *(["-z"] if flags else []), mounted.mountpoint]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        busy = "busy" in done.stderr
        raise OSError(errno.EBUSY if busy else errno.EPERM, done.stderr.strip())


def ended(pid: int, timeout_s: float) -> bool:
    """Wait for a process that is not our child."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        time.sleep(0.01)
    return False


def children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []
