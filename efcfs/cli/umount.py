"""`efcfs umount`: end a mount, wait until its processes are gone; by force when the server is away.

What could not be written is kept by the keeper, which ends the mount; here it is only said where. Only where the keeper
itself hangs or was killed it is done from here.
"""

import contextlib
import ctypes
import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import click

from efcfs import control
from efcfs.cli.main import EX_MOUNT, EX_USAGE, Failure
from efcfs.keeper import directories

MNT_FORCE, MNT_DETACH = 1, 2
# How long the daemon may take for its last writes before we stop waiting for it.
WAIT_S = 90.0
# `umount -f` must be back in five seconds.
FORCED_WAIT_S = 3.5

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
    kept_before = kept(mounted)
    try:
        if force and pid is not None and alive(pid):
            end_by_force(mounted, pid)
        else:
            detach(mounted, MNT_FORCE | MNT_DETACH if force else MNT_DETACH if lazy else 0)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Failure(
                f"{mountpoint} is busy: end the programs that use it (`fuser -vm {mountpoint}`), or use -l", EX_MOUNT
            ) from None
        raise Failure(f"cannot unmount {mountpoint}: {error.strerror}", EX_MOUNT) from None
    if pid is not None and not lazy and not force and not ended(pid, WAIT_S):
        raise Failure(f"{mountpoint} is unmounted, its daemon still writes: see the log", EX_MOUNT)
    if pid is None or not alive(pid):  # it may have been killed
        directories.clear(str(mounted.runtime_dir))
        directories.clear(str(control.state_dir(mounted.mountpoint, mounted.uid)))
    for place in kept(mounted) - kept_before:
        line = f"data that could not be written is kept in {place}: `efcfs recover {os.path.basename(place)}` writes it"
        if not force:
            raise Failure(f"{mountpoint} is unmounted, {line}", EX_MOUNT)
        click.echo(f"efcfs: {line}", err=True)
    return 0


def end_by_force(mounted: control.Mounted, keeper_pid: int) -> None:
    """Abort the connection; the keeper ends the daemon and keeps what is unwritten. Raises OSError."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(keeper_pid, signal.SIGUSR1)
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # the keeper was faster
            detach(mounted, MNT_FORCE | MNT_DETACH)
    if ended(keeper_pid, FORCED_WAIT_S):
        return
    daemons = children(keeper_pid)
    if not daemons:  # it still copies what is unwritten
        click.echo(f"efcfs: data that could not be written is still being copied to {directories.unwritten_dir()}:"
                   " the log will say more", err=True)  # fmt: skip
        return
    # The keeper first, or it starts another daemon.
    for victim in (keeper_pid, *daemons):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    ended(keeper_pid, 0.5)
    if control.find(mounted.mountpoint) is not None:
        detach(mounted, MNT_FORCE | MNT_DETACH)


def kept(mounted: control.Mounted) -> set[str]:
    """Where what the mount could not write was put."""
    found = set()
    base = control.state_dir(mounted.mountpoint, mounted.uid).parent
    for place in directories.unwritten_dir(), directories.unwritten_in_memory(str(base)):
        for described in Path(place).glob(f"[!.]*/{directories.MOUNT}"):
            with contextlib.suppress(OSError):
                if json.loads(described.read_text())["mountpoint"] == mounted.mountpoint:
                    found.add(str(described.parent))
    return found


def detach(mounted: control.Mounted, flags: int) -> None:
    """umount2(2), or fusermount3 without root. Raises OSError."""
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mounted.mountpoint), flags) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return
    command = ["fusermount3", "-u", *(["-z"] if flags else []), mounted.mountpoint]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        busy = "busy" in done.stderr
        raise OSError(errno.EBUSY if busy else errno.EPERM, done.stderr.strip())


def alive(pid: int) -> bool:
    """Neither gone nor a zombie, whose parent has not looked yet."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def ended(pid: int, timeout_s: float) -> bool:
    """Wait for a process that is not our child."""
    ends = time.monotonic() + timeout_s
    while alive(pid):
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


def children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []
