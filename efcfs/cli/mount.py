"""`efcfs mount`: check what can be checked here, start the keeper, wait until the mount answers."""

import importlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from typing import NoReturn

import click

from efcfs import config, control, keeper
from efcfs.cli.cache_check import check_cache
from efcfs.cli.main import EX_MOUNT, EX_SYSTEM, EX_USAGE, Failure
from efcfs.keeper import MESSAGE_BYTES, service

KEEPER = [sys.executable, "-S", "-E", os.path.dirname(keeper.__file__)]

_EPILOG = "\b\nOptions for -o, comma-separated:\n" + config.options_help() + (
    "\n\nAccepted and without effect, as mount.nfs does: _netdev nofail auto noauto user users owner group"
    "\ndefaults bg fg intr nointr lock nolock acl noacl async x-* and more."
)  # fmt: skip


@click.command(epilog=_EPILOG)
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="mount options, comma-separated")
@click.option("-f", "--foreground", is_flag=True, help="stay in the foreground and log to stderr")
@click.option("-v", "--verbose", is_flag=True, help="log more")
@click.argument("source", metavar="SERVER:/EXPORT")
@click.argument("mountpoint")
def mount(source: str, mountpoint: str, options: tuple[str, ...], foreground: bool, verbose: bool) -> int:
    """Mount an NFSv3 export. Returns when the mount answers."""
    return start(source, mountpoint, options, foreground=foreground, verbose=verbose)


def start(
    source: str, mountpoint: str, options: tuple[str, ...], *, foreground: bool = False, verbose: bool = False,
    sloppy: bool = False,
) -> int:  # fmt: skip
    """Mount; with foreground, stay until it is unmounted. Raises Failure."""
    # Programs wait for a mount that an earlier keeper has left; all was checked when it was made.
    adopting = foreground and service.FUSE in service.inherited()
    if not adopting:
        check_not_mounted(mountpoint)  # before its path is resolved, which asks a mount that may hang
    try:
        asked = config.parse(source, real_path(mountpoint), options, sloppy=sloppy)
    except config.UsageError as error:
        raise Failure(str(error), EX_USAGE) from None
    if not adopting:
        check_not_mounted(asked.mountpoint)
        check_mountpoint(mountpoint)
        check_cache(asked)
        check_machine()
    uid = os.geteuid()
    request = {
        "daemon": [sys.executable, "-m", "efcfs.daemon"],
        "config": asked.to_json(),
        "source": asked.source,
        "mountpoint": asked.mountpoint,
        "mount_flags": asked.mount_flags,
        "allow_other": asked.allow_other,
        "runtime_dir": str(control.runtime_dir(asked.mountpoint, uid)),
        "state_dir": str(control.state_dir(asked.mountpoint, uid)),
        "log": log_target(asked.mountpoint, uid, foreground),
        "verbose": verbose,
    }
    if foreground:
        become_keeper(request)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [*KEEPER, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True, cwd="/",
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    ours.send(json.dumps(request).encode())
    try:
        answer = json.loads(ours.recv(MESSAGE_BYTES) or b"{}")
    except ConnectionResetError:
        answer = {}
    if "error" in answer:
        process.wait()
        raise Failure(str(answer["error"]), int(answer["code"]))
    if "ready" not in answer:
        raise Failure(f"the keeper ended too early (exit code {process.wait()}): see the log", EX_SYSTEM)
    if "warning" in answer:
        click.echo(f"efcfs: warning: {answer['warning']}", err=True)
    return 0


def become_keeper(request: dict[str, object]) -> NoReturn:
    """In place: the process that a service manager or a container has started is the keeper then."""
    memory = os.memfd_create("efcfs-request", 0)
    os.write(memory, json.dumps(request).encode())
    os.lseek(memory, 0, os.SEEK_SET)
    os.chdir("/")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execv(KEEPER[0], [*KEEPER, str(memory)])


def real_path(mountpoint: str) -> str:
    """Without asking what is mounted there, which may hang."""
    parent, name = os.path.split(os.path.abspath(mountpoint))
    path = os.path.join(os.path.realpath(parent), name)
    return path if control.find(path) is not None else os.path.realpath(path)


def check_not_mounted(mountpoint: str) -> None:
    mounted = control.find(mountpoint)
    if mounted is not None:
        raise Failure(
            f"{mountpoint} is an efcfs mount already (of {mounted.source}): `efcfs umount {mountpoint}` first",
            EX_MOUNT,
        )


def check_mountpoint(mountpoint: str) -> None:
    try:
        mode = os.stat(mountpoint).st_mode
    except FileNotFoundError:
        hint = f"make it with `mkdir -p {mountpoint}`"
        raise Failure(f"mount point {mountpoint} does not exist: {hint}", EX_MOUNT) from None
    except OSError as error:
        raise Failure(
            f"mount point {mountpoint} cannot be used ({error.strerror}):"
            f" `umount -l {mountpoint}` removes a dead mount",
            EX_MOUNT,
        ) from None
    if not stat.S_ISDIR(mode):
        raise Failure(f"mount point {mountpoint} is not a directory: name a directory", EX_MOUNT)


def check_machine() -> None:
    """What a mount needs of this machine: /dev/fuse and the libraries."""
    if not os.path.exists("/dev/fuse"):
        raise Failure("/dev/fuse does not exist: load the module with `modprobe fuse`", EX_SYSTEM)
    if os.geteuid() == 0:
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            raise Failure("no permission to open /dev/fuse: give the container the device", EX_SYSTEM)
    elif shutil.which("fusermount3") is None:
        raise Failure("fusermount3 is missing: install the package fuse3, or mount as root", EX_SYSTEM)
    for name in ("trio", "lmdb", "pyfuse3"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise Failure(
                f"the library {name} does not load ({error}): install efcfs again and the package libfuse3-3", EX_SYSTEM
            ) from None


def log_target(mountpoint: str, uid: int, foreground: bool) -> str:
    """stderr, syslog, or where there is neither the name of a file."""
    if foreground:
        return "stderr"
    if os.path.exists("/dev/log"):
        return "syslog"
    path = control.runtime_dir(mountpoint, uid).with_suffix(".log")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(path)
