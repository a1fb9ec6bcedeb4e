"""The composition root: builds the parts of one mount and runs them.

Started by the keeper (`python -m efcfs.daemon FD`), to which it says, in this order: loaded, connected, ready,
unmounted; or error. It may be killed and started again at any time.
"""

import base64
import contextlib
import fcntl
import gc
import json
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

import lmdb
import trio

from efcfs import __version__, control
from efcfs.cache.damage import TRY_ALL_S, TRY_S
from efcfs.cache.index import Unusable
from efcfs.cache.store import Store
from efcfs.cache.tier import Tier
from efcfs.config import MIN_MEM_BYTES, MountConfig, memory_bytes
from efcfs.fuse.notify import KernelCaches, resend
from efcfs.fuse.session import Session
from efcfs.fuse.wire import Wire
from efcfs.keeper import MESSAGE_BYTES, log_to
from efcfs.nfs.client import Client, Known, own_credential
from efcfs.nfs.connect import ConnectError, connect
from efcfs.nfs.nursery import open_nursery
from efcfs.vfs.attributes import Timeouts
from efcfs.vfs.consistency import Consistency
from efcfs.vfs.errors import SERVER_ERRORS
from efcfs.vfs.filesystem import FileSystem, FilesystemOptions, open_filesystem
from efcfs.vfs.handles import OtherVersion, check_version
from efcfs.vfs.warmup import NoJob, Warmup

log = logging.getLogger(__name__)

Asked = dict[str, object]

RECONNECT_S = 1.0
# How long an upgrade waits for its links, and for requests and WRITEs that are under way.
LINKS_UP_S = 1.0
DRAIN_S = 2.0
DEFAULT_MEM_BYTES = 1024**3
# Two for each file that the cache keeps open, and as many for all else.
DESCRIPTORS = 4096


async def run(keeper: socket.socket, request: Asked) -> None:
    """Connect, take over /dev/fuse, serve until unmounted or replaced."""
    async with open_nursery() as nursery:
        nursery.start_soon(beat, keeper)
        values, state_dir = request["config"], Path(str(request["state_dir"]))
        assert isinstance(values, dict)
        config = MountConfig.from_json(values)
        check_version(state_dir)
        store = open_store(config, request)
        with contextlib.closing(Session()) as session:
            if request["init"] is not None:
                await session.greet(base64.b64decode(str(request["init"])))
            async with connected(config, state_dir, request) as client:
                # The first notification of the kernel needs a thread, whose start stops us for 3 ms: not then.
                await trio.to_thread.run_sync(time.monotonic)
                say(keeper, connected=True)
                given = await handed_over(keeper)
                if given is not None:
                    async with open_filesystem(client, filesystem_options(config, client.known), state_dir, store) as fs:
                        mount = Mount(keeper, request, config, client, fs, store)
                        await mount.serve(session, *given)
        nursery.cancel_scope.cancel()


async def handed_over(keeper: socket.socket) -> tuple[int, Asked] | None:
    """The mount's fd, and what the keeper says with it; None: it has changed its mind."""
    while True:
        await trio.lowlevel.wait_readable(keeper)
        data, fds, _, _ = socket.recv_fds(keeper, MESSAGE_BYTES, 1)
        if not data:
            return None
        if fds:
            return fds[0], json.loads(data)


class Mount:
    """A mount that this daemon serves, and what its commands and its keeper ask of it."""

    def __init__(
        self, keeper: socket.socket, request: Asked, config: MountConfig, client: Client, fs: FileSystem,
        store: Store | None,
    ) -> None:  # fmt: skip
        self._keeper = keeper
        self._request = request
        self._config = config
        self._client = client
        self._fs = fs
        self._store = store
        # Has the answer to `efcfs upgrade` while a new daemon is on its way.
        self._upgrade: trio.MemorySendChannel[str] | None = None
        self._replaced = False

    async def serve(self, session: Session, fuse_fd: int, hand_over: Asked) -> None:
        init, first = base64.b64decode(str(hand_over["init"])), bool(hand_over["first"])
        async with trio.open_nursery() as answering, trio.open_nursery() as nursery:
            self._answering, self._nursery = answering, nursery
            self._listen()
            self._fs.attach(KernelCaches(fuse_fd, nursery))
            ready = partial(self._ready, fuse_fd)
            await session.serve(self._fs, fuse_fd, init, first=first, on_ready=ready)
            if not self._replaced:
                await finish(self._fs, self._config)
                self._fs.dirty.remove()
                say(self._keeper, unmounted=True, dirty_bytes=self._fs.writer.dirty_bytes)
            nursery.cancel_scope.cancel()
            answering.cancel_scope.deadline = trio.current_time() + control.TIMEOUT_S

    def _ready(self, fuse_fd: int, wire: Wire) -> None:
        # What there is now stays: looking for garbage in it held requests up for 20 to 50 ms.
        gc.freeze()
        self._nursery.start_soon(self._obey, fuse_fd, wire)
        say(self._keeper, ready=True)

    def _listen(self) -> None:
        """Answer commands; a daemon that was to replace us may have taken the socket's name."""
        path = Path(str(self._request["runtime_dir"])) / "control"
        commands: dict[str, control.Command] = {
            "status": self._status, "config": self._tell_config, "upgrade": self._ask_for_upgrade,
            **cache_commands(self._fs.warmup, self._store),
        }  # fmt: skip
        self._nursery.start_soon(control.serve, path, commands, self._answering)

    async def _status(self, _: control.Answer) -> control.Answer:
        return describe(self._client, self._config, self._request, self._store, self._fs)

    async def _tell_config(self, _: control.Answer) -> control.Answer:
        """With the sizes that `efcfs cache resize` has set: an upgrade starts from what is told here."""
        config, store = self._config, self._store
        if store is not None:
            sizes = {str(disk.directory): disk.capacity_bytes for disk in store.disks}
            config = replace(config, ssd=tuple((path, sizes.get(str(Path(path)), size)) for path, size in config.ssd))
            if config.mem_bytes is not None:
                config = replace(config, mem_bytes=store.memory.capacity_bytes)
        return config.to_json()

    async def _ask_for_upgrade(self, asked: control.Answer) -> control.Answer:
        if self._upgrade is not None:
            return {"error": "another upgrade is under way"}
        self._upgrade, told = trio.open_memory_channel[str](1)
        try:
            say(self._keeper, upgrade={"daemon": asked["daemon"], "config": asked["config"]})
            why = await told.receive()
        finally:
            self._upgrade = None
        return {"error": why} if why else {}

    async def _obey(self, fuse_fd: int, wire: Wire) -> None:
        """Do what the keeper says, as long as it is there."""
        drained = False
        while True:
            # Drained, the whole loop stands still: what ends meanwhile would change the files that we share with the
            # daemon that goes on.
            if not drained:
                await trio.lowlevel.wait_readable(self._keeper)
            message = json.loads(self._keeper.recv(MESSAGE_BYTES) or b"{}")
            if "upgraded" in message or (drained and not message):
                os.nice(19)  # to close all this takes 60 ms, which the new one can use
                self._replaced = True
                self._tell_upgrade("")
                self._fs.leave()
                wire.end()
                return
            if not message:
                log.error("the keeper of %s is gone: nobody replaces this daemon now", self._config.mountpoint)
                return
            if "drain" in message:
                if not await wire.drain(DRAIN_S):
                    log.info("requests are still under way: another daemon gets them again")
                with trio.move_on_after(DRAIN_S):
                    await self._fs.writer.pause()
                say(self._keeper, drained=True)
                drained = True
            elif "upgrade_failed" in message:
                drained = False
                self._fs.rejoin()
                if message.get("served"):
                    resend(fuse_fd)
                wire.resume()
                self._fs.writer.resume()
                self._listen()
                self._tell_upgrade(str(message["upgrade_failed"]))

    def _tell_upgrade(self, why_not: str) -> None:
        if self._upgrade is not None:
            self._upgrade.send_nowait(why_not)


def filesystem_options(config: MountConfig, known: Known) -> FilesystemOptions:
    return FilesystemOptions(
        timeouts=Timeouts(config.acregmin_s, config.acregmax_s, config.acdirmin_s, config.acdirmax_s),
        lookupcache=config.lookupcache,
        cto=config.cto,
        consistency=Consistency(config.consistency, config.rules),
        read_only=config.read_only,
        server_identity=server_identity(config, known),
        most_dirty_bytes=config.dirty_bytes,
    )


def server_identity(config: MountConfig, known: Known) -> bytes:
    """What tells this export from all others in a shared cache: one name may lead to several servers, by tunnels."""
    named = [config.identity.encode()] if config.identity else [config.host.encode(), b"%d" % known.port]
    digest = blake2b(digest_size=16)
    for part in (*named, known.root_fh):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


async def beat(keeper: socket.socket) -> None:
    """Show the keeper that the loop turns. It may be gone, or be stopped: that must not stop us."""
    while True:
        with contextlib.suppress(OSError):
            keeper.send(b'{"beat": true}', socket.MSG_DONTWAIT)
        await trio.sleep(1.0)


@contextlib.asynccontextmanager
async def connected(config: MountConfig, state_dir: Path, request: Asked) -> AsyncIterator[Client]:
    """The client. What the first daemon found out about the export serves the later ones: no question, no waiting."""
    path = state_dir / "server.json"
    key = [config.host, config.addresses, config.port, config.mountport, config.export]
    known: Known | None = None
    with contextlib.suppress(FileNotFoundError, ValueError):
        told_key, told = json.loads(path.read_text())
        if told_key == json.loads(json.dumps(key)):
            known = Known(tuple(told[0]), told[1], bytes.fromhex(told[2]), *told[3:])
    async with contextlib.AsyncExitStack() as stack:
        while True:
            try:
                client = await stack.enter_async_context(connect(config.server, config.export, known))
                break
            except ConnectError as error:
                if not request["patient"]:
                    raise
                log.warning("%s; trying again", error)
            await trio.sleep(RECONNECT_S)
        if not request["patient"]:
            # A first mount says that it may not read the export; an upgrade has its links up before it takes over.
            with trio.move_on_after(LINKS_UP_S if known is not None else config.timeo_s):
                await client.getattr(own_credential(), client.root_fh)
        if known is None:
            fresh = path.with_suffix(".new")
            addresses, port, root_fh, *rest = client.known
            fresh.write_text(json.dumps([key, [addresses, port, root_fh.hex(), *rest]]))
            fresh.rename(path)
        yield client


async def finish(fs: FileSystem, config: MountConfig) -> None:
    """The mount is gone. Nothing should be dirty now; what is gets a last chance."""
    with trio.move_on_after(config.timeo_s) as scope:
        await fs.sync_all()
        await fs.remove_hidden()
    if scope.cancelled_caught:
        log.error("%s: %d bytes could not be written", config.mountpoint, fs.writer.dirty_bytes)


def open_store(config: MountConfig, request: Asked) -> Store | None:
    """The cache. What cannot be used is left out: a mount does not fail because of its cache."""
    # A daemon that replaces a dead one keeps the sizes that `efcfs cache resize` has set, and a mount that asks for
    # none that of the others.
    replaces_dead = bool(request["patient"])
    shared = any(m.uid == os.geteuid() for m in control.mounts())
    first, last_exit = request["init"] is None, str(request["last_exit"])
    # A damaged index takes its reader down, who then must not come back to it.
    crashes = ("exit code", "internal error", "signal SIGSEGV", "signal SIGBUS", "signal SIGABRT")
    crashed = replaces_dead and last_exit.startswith(crashes)
    try_s = TRY_ALL_S if crashed else TRY_S
    mem_bytes = config.mem_bytes if config.mem_bytes is not None else min(DEFAULT_MEM_BYTES, memory_bytes() // 20)
    if config.ssd:
        mem_bytes = max(mem_bytes, MIN_MEM_BYTES)  # what comes from a disk passes through memory
    if not mem_bytes:
        return None
    try:
        memory = Tier(
            "mem", control.cache_dir(os.geteuid()), mem_bytes, in_memory=True,
            keep_capacity=replaces_dead or (config.mem_bytes is None and shared),
            try_s=try_s if first or crashed else 0.0,  # one that was fine a moment ago is not tried out
        )  # fmt: skip
    except (OSError, Unusable, lmdb.Error) as error:
        log.error("no cache: %s", error)
        return None
    disks = [
        Tier(f"ssd{number}", Path(path), capacity_bytes, in_memory=False, keep_capacity=replaces_dead, try_s=try_s)
        for number, (path, capacity_bytes) in enumerate(config.ssd)
    ]
    return Store(memory, disks, verify_memory=config.verify_memory)


def cache_commands(warmup: Warmup, store: Store | None) -> dict[str, control.Command]:
    """What `efcfs warmup` and `efcfs cache` ask for."""

    async def job(asked: control.Answer) -> control.Answer:
        paths, rate = asked["paths"], asked.get("rate_bytes_per_s")
        assert isinstance(paths, list)
        match = asked.get("match")
        try:
            return warmup.start(
                str(asked["kind"]), [os.fsencode(path) for path in paths], workers=int(str(asked.get("jobs") or 8)),
                match=str(match) if match is not None else None, metadata_only=bool(asked.get("metadata_only")),
                rate_bytes_per_s=int(str(rate)) if rate is not None else None, more=bool(asked.get("more")),
            ).told()  # fmt: skip
        except NoJob as error:
            return {"error": str(error)}

    async def job_paths(asked: control.Answer) -> control.Answer:
        paths = asked["paths"]
        assert isinstance(paths, list)
        try:
            warmup.add(int(str(asked["number"])), [os.fsencode(path) for path in paths], more=bool(asked["more"]))
        except NoJob as error:
            return {"error": str(error)}
        return {}

    async def job_status(asked: control.Answer) -> control.Answer:
        try:
            return warmup.job(int(str(asked["number"]))).told()
        except NoJob as error:
            return {"error": str(error)}

    async def cancel(_: control.Answer) -> control.Answer:
        return {"cancelled": warmup.cancel()}

    async def resize(asked: control.Answer) -> control.Answer:
        tier, capacity_bytes = str(asked["tier"]), int(str(asked["capacity_bytes"]))
        if store is None or not await trio.to_thread.run_sync(store.resize, tier, capacity_bytes):
            names = ", ".join(t.name for t in store.tiers) if store is not None else "none"
            return {"error": f"there is no tier {tier} in use; there is {names}"}
        return {}

    async def clear(_: control.Answer) -> control.Answer:
        if store is not None:
            await trio.to_thread.run_sync(store.clear)
        return {}

    return {
        "job": job, "job_paths": job_paths, "job_status": job_status, "cancel": cancel, "resize": resize,
        "clear": clear,
    }  # fmt: skip


def tiers(store: Store | None) -> list[control.Answer]:
    """The tiers' objects of `efcfs status --json`; the counts are of this daemon."""
    told: list[control.Answer] = []
    for tier in store.tiers if store is not None else ():
        used_bytes, items, capacity_bytes = tier.totals()
        told.append({
            "name": tier.name, "path": str(tier.directory), "state": "up" if tier.usable() else "failed",
            "capacity_bytes": capacity_bytes, "used_bytes": used_bytes, "items": items, **asdict(tier.counters),
        })  # fmt: skip
    return told


def describe(
    client: Client, config: MountConfig, request: Asked, store: Store | None, fs: FileSystem
) -> control.Answer:
    """One mount's object of `efcfs status --json`."""
    return {
        "mountpoint": config.mountpoint,
        "source": config.source,
        "keeper_pid": request["keeper_pid"],
        "daemon_pid": os.getpid(),
        "failovers": request["failovers"],
        "upgrades": request["upgrades"],
        "last_exit": request["last_exit"],
        "uptime_s": round(time.time() - float(str(request["started_at"])), 1),
        "version": __version__,
        "open_handles": fs.open_handles,
        "dirty_bytes": fs.writer.dirty_bytes,
        "server": {"state": client.server_state()},
        "links": client.links(),
        "tiers": tiers(store),
    }


def beginning(error: BaseException) -> str:
    """The error that others came from: a want of memory may be met by trio itself."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif isinstance(error, trio.TrioInternalError) and error.__cause__ is not None:
            error = error.__cause__
        else:
            return str(error) or type(error).__name__


def say(keeper: socket.socket, **message: object) -> None:
    keeper.send(json.dumps(message).encode())


def be_called(name: str) -> None:
    """In ps(1)."""
    with contextlib.suppress(OSError):  # a container may have no /proc that it can write to
        Path("/proc/self/comm").write_text(name)


def main() -> None:
    keeper = socket.socket(fileno=int(sys.argv[1]))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the cache keeps its files open
    # Their table grows now. With several threads each growth stops the one that opens, which is the event loop, for an
    # RCU grace period: 7 to 15 ms on a quiet machine, over 60 ms after a kill.
    os.close(fcntl.fcntl(keeper, fcntl.F_DUPFD_CLOEXEC, min(most, DESCRIPTORS) - 1))
    # A spare daemon waits here, until another dies or the keeper has no use for it.
    with contextlib.suppress(OSError):  # the keeper is gone, as recv tells, too
        say(keeper, loaded=True)
    be_called("efcfs-spare")
    message = keeper.recv(MESSAGE_BYTES)
    if not message:
        return
    be_called("efcfs")
    request = json.loads(message)
    log_to(request["log"], bool(request["verbose"]))
    try:
        trio.run(run, keeper, request)
    except ConnectError as error:
        say(keeper, error=str(error), code=32)
    except OtherVersion as error:
        say(keeper, error=str(error), code=2)
    except SERVER_ERRORS as error:
        say(keeper, error=f"the server does not let the export's root be read: {error}", code=32)
    except Exception as error:
        log.exception("the daemon ends")
        say(keeper, error=f"internal error ({beginning(error)}): see the log", code=2)
        sys.exit(1)


if __name__ == "__main__":
    main()
