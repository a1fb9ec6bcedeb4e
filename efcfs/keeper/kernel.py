"""The kernel's side of a mount: opening /dev/fuse, mounting, unmounting, aborting; by fusermount3 without root.

Nothing here may touch the mount itself: that would wait for the daemon, which waits for the keeper.
"""

import contextlib
import ctypes
import logging
import os
import select
import shutil
import socket
import struct
import subprocess

log = logging.getLogger(__name__)

# Larger than any FUSE request: the kernel refuses to write one into less.
FUSE_BUFFER_BYTES = 1024 * 1024 + 4096
EX_SYSTEM, EX_MOUNT = 2, 32
MNT_FORCE, MNT_DETACH = 1, 2
# Mount flags that fusermount3 takes besides nosuid and nodev, which it always sets.
USER_FLAGS = {1: "ro", 8: "noexec", 16: "sync", 128: "dirsync", 1024: "noatime"}
# FUSE_NOTIFY_RESEND came with protocol 7.40 (Linux 6.9).
RESEND_VERSION = (7, 40)
_VERSION = struct.Struct("=II")
_VERSION_AT = 40
HELPER_S = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


class MountFailed(Exception):
    """str() is the line for the user; `code` the command's exit code, as in mount(8)."""

    def __init__(self, message: str, code: int = EX_MOUNT) -> None:
        super().__init__(message)
        self.code = code


def can_resend(init_request: bytes) -> bool:
    """Whether this kernel can be asked again for requests that a dead daemon had taken."""
    return _VERSION.unpack_from(init_request, _VERSION_AT) >= RESEND_VERSION


def mount(source: str, mountpoint: str, flags: int, allow_other: bool) -> tuple[int, bytes]:
    """Mount; returns the fd of /dev/fuse and the kernel's INIT request. Raises MountFailed."""
    options = "default_permissions,max_read=1048576" + (",allow_other" if allow_other else "")
    if os.geteuid() != 0:
        fd = _mount_without_root(source, mountpoint, flags, options)
    else:
        fd = _open_fuse()
        data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,{options}"
        name, where = os.fsencode(source), os.fsencode(mountpoint)
        if _libc.mount(name, where, b"fuse.efcfs", ctypes.c_ulong(flags), data.encode()) != 0:
            error = ctypes.get_errno()
            os.close(fd)
            hint = ": mounting needs CAP_SYS_ADMIN" if error in (1, 13) else ""
            raise MountFailed(f"cannot mount at {mountpoint}: {os.strerror(error)}{hint}", EX_SYSTEM)
    return fd, os.read(fd, FUSE_BUFFER_BYTES)


def _open_fuse() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MountFailed("/dev/fuse does not exist: load the module with `modprobe fuse`", EX_SYSTEM) from None
    except PermissionError:
        raise MountFailed("no permission to open /dev/fuse: check its mode, or give the container the device",
                          EX_SYSTEM) from None  # fmt: skip


def _mount_without_root(source: str, mountpoint: str, flags: int, options: str) -> int:
    """fusermount3 opens and mounts, and hands the fd over a socket."""
    helper = shutil.which("fusermount3")
    if helper is None:
        raise MountFailed("fusermount3 is missing: install the package fuse3, or mount as root", EX_SYSTEM)
    ours, theirs = socket.socketpair()
    # A comma ends an option of fusermount3, unless a backslash is before it.
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    options = ",".join([options, f"fsname={name}", "subtype=efcfs", *(w for f, w in USER_FLAGS.items() if flags & f)])
    done = subprocess.run(
        [helper, "-o", options, "--", mountpoint], pass_fds=[theirs.fileno()],
        env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    theirs.close()
    if done.returncode != 0:
        raise MountFailed(f"cannot mount at {mountpoint}: {done.stderr.strip() or 'fusermount3 failed'}", EX_SYSTEM)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    os.set_inheritable(fds[0], False)
    return fds[0]


def device_at(mountpoint: str) -> str:
    """The device number ("0:52") of what is mounted there, "" for nothing."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        devices = [line.split()[2] for line in mounts if line.split()[4] == _escaped(mountpoint)]
    return devices[-1] if devices else ""


def unmount(mountpoint: str, device: str) -> None:
    """Take the mount out of sight; it ends when nobody uses it any more. Another one in its place stays."""
    if device_at(mountpoint) != device:
        return
    if os.geteuid() == 0:
        _libc.umount2(os.fsencode(mountpoint), MNT_DETACH)
        return
    command = ["fusermount3", "-u", "-z", "--", mountpoint]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL, timeout=HELPER_S)


def abort(mountpoint: str, device: str) -> None:
    """Let everything that programs wait for fail at once; then unmount.

    Without root and /sys/fs/fuse/connections it takes effect when the last holder of the fd is gone.
    """
    try:
        with open(f"/sys/fs/fuse/connections/{device.partition(':')[2]}/abort", "w") as file:
            file.write("1")
    except OSError:
        if os.geteuid() == 0 and device_at(mountpoint) == device:
            _libc.umount2(os.fsencode(mountpoint), MNT_FORCE | MNT_DETACH)
    unmount(mountpoint, device)


def connection_ended(fd: int) -> bool:
    """Whether the kernel has ended the connection. Only while no daemon serves: a poll costs it a wake-up a request."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def set_read_ahead(mountpoint: str) -> None:
    """Let the kernel read ahead more than 128 KiB, whatever INIT says; only root can."""
    try:
        with open(f"/sys/class/bdi/{device_at(mountpoint)}/read_ahead_kb", "w") as file:
            file.write("4096")
    except OSError as error:
        log.debug("read-ahead stays as it is: %s", error)


def _escaped(path: str) -> str:
    """As /proc/self/mountinfo writes it."""
    for character in "\\ \t\n":
        path = path.replace(character, f"\\{ord(character):03o}")
    return path
