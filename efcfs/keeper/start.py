"""The keeper's beginning: its request, the mount's directories, or a mount that another keeper has left."""

import contextlib
import json
import logging
import os
import signal
import socket
import stat
import sys
import time

from efcfs.keeper import MESSAGE_BYTES, directories, kernel, log_to, service
from efcfs.keeper.child import Message, born
from efcfs.keeper.keep import KILL_S, Adopted, Keeper
from efcfs.keeper.kernel import MountFailed

log = logging.getLogger(__name__)


def watch_signals() -> socket.socket:
    """A socket that gets the number of each signal that concerns us."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return ours


def main() -> int:
    number = int(sys.argv[1])
    command = None
    if stat.S_ISSOCK(os.fstat(number).st_mode):
        command = socket.socket(fileno=number)
        command.set_inheritable(False)
        data = command.recv(MESSAGE_BYTES)
    else:  # in the foreground nobody waits for an answer, and the service manager's pid is ours
        with open(number, "rb") as file:
            data = file.read()
    request = json.loads(data)
    log_to(request["log"], bool(request["verbose"]))
    logging.raiseExceptions = False  # a log that cannot be written is no reason to end
    try:
        return start(request, command)
    except (MountFailed, OSError) as caught:
        if isinstance(caught, OSError):
            log.critical("the keeper of %s ends", request["mountpoint"], exc_info=True)
        error = caught if isinstance(caught, MountFailed) else MountFailed(f"cannot mount: {caught}", kernel.EX_SYSTEM)
        if command is None:
            print(f"efcfs: {error}", file=sys.stderr)
        else:
            with contextlib.suppress(OSError):  # it may have been interrupted
                command.send(json.dumps({"error": str(error), "code": error.code}).encode())
        return error.code


def start(request: Message, command: socket.socket | None) -> int:
    """Mount, or take over what an earlier keeper has left with the service manager. Raises MountFailed."""
    adopted = left_for_us(str(request["mountpoint"]))
    runtime = str(request["runtime_dir"])
    if adopted is None:
        request = {**request, "state_dir": directories.make(str(request["state_dir"]))}
    else:
        stored = adopted.state["request"]
        assert isinstance(stored, dict)
        request = {**stored, "log": request["log"], "verbose": request["verbose"]}
        end_daemons(adopted)
        directories.hold(str(request["state_dir"]))
    request["runtime_dir"] = directories.make(runtime)
    publish(runtime, str(request["runtime_dir"]))
    try:
        return Keeper(request, command, watch_signals()).run(adopted)
    finally:
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(runtime) == os.path.basename(str(request["runtime_dir"])):
                os.unlink(runtime)
        directories.remove(str(request["runtime_dir"]))
        directories.remove(str(request["state_dir"]))


def left_for_us(mountpoint: str) -> Adopted | None:
    """The mount that the service manager has kept, if it can be served on."""
    kept = service.inherited()
    for number in kept.values():
        os.set_inheritable(number, False)
    if service.FUSE not in kept or service.STATE not in kept:
        return None
    fd, memory = kept[service.FUSE], kept[service.STATE]
    state = json.loads(os.pread(memory, os.fstat(memory).st_size, 0).partition(b"\n")[0])
    in_place = kernel.device_at(mountpoint) == state["device"]
    if in_place and not kernel.connection_ended(fd) and os.path.isdir(state["request"]["state_dir"]):
        return Adopted(fd, memory, state)
    log.warning("what an earlier keeper of %s has left is of no use: mounting anew", mountpoint)
    if in_place:
        kernel.unmount(mountpoint, state["device"])
    for name in (service.FUSE, service.STATE):
        os.close(kept[name])
        service.forget(name)
    return None


def end_daemons(adopted: Adopted) -> None:
    """One that lives on without its keeper must not serve beside ours, nor hold its directories."""
    daemons = adopted.state["daemons"]
    assert isinstance(daemons, list)
    ends = time.monotonic() + KILL_S
    while living := [pid for pid, when in daemons if when and born(pid) == when]:
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        if time.monotonic() > ends:
            return  # it sleeps in the kernel until ours answers
        time.sleep(0.01)


def publish(link: str, directory: str) -> None:
    """Let commands find the mount."""
    with open(os.path.join(directory, "keeper.pid"), "w") as file:
        file.write(str(os.getpid()))
    new = f"{link}.{os.getpid()}.link"
    os.symlink(os.path.basename(directory), new)
    os.rename(new, link)
