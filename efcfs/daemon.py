"""The composition root: builds the parts of one mount and runs them.

Started by the keeper (`python -m efcfs.daemon FD`), to which it says, in this order: connected, ready,
unmounted; or error. It may be killed and started again at any time.
"""

import base64
import contextlib
import json
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import trio

from efcfs import control
from efcfs.cache.index import Unusable
from efcfs.cache.store import Store
from efcfs.cache.tier import Tier
from efcfs.config import MountConfig, memory_bytes
from efcfs.fuse.notify import KernelCaches
from efcfs.fuse.operations import Operations
from efcfs.fuse.session import serve
from efcfs.keeper import MESSAGE_BYTES, log_to
from efcfs.nfs.client import Client, ConnectError, connect
from efcfs.vfs.attributes import Timeouts
from efcfs.vfs.consistency import Consistency
from efcfs.vfs.errors import SERVER_ERRORS
from efcfs.vfs.filesystem import FileSystem, FilesystemOptions, open_filesystem
from efcfs.vfs.warmup import NoJob, Warmup

log = logging.getLogger(__name__)

RECONNECT_S = 1.0
DEFAULT_MEM_BYTES = 1024**3
MIN_MEM_BYTES = 16 * 1024**2


async def run(keeper: socket.socket, request: dict[str, object]) -> None:
    """Connect, take over /dev/fuse, serve until unmounted."""
    values = request["config"]
    assert isinstance(values, dict)
    config = MountConfig.from_json(values)
    options = FilesystemOptions(
        timeouts=Timeouts(config.acregmin_s, config.acregmax_s, config.acdirmin_s, config.acdirmax_s),
        lookupcache=config.lookupcache,
        cto=config.cto,
        consistency=Consistency(config.consistency, config.rules),
        read_only=config.read_only,
        server_identity=config.host.encode() + b"\0",
    )
    store = open_store(config)
    async with (
        connected(config, patient=bool(request["patient"])) as client,
        open_filesystem(client, options, Path(str(request["state_dir"])), store) as fs,
        trio.open_nursery() as nursery,
    ):
        say(keeper, connected=True)
        await trio.lowlevel.wait_readable(keeper)
        data, fds, _, _ = socket.recv_fds(keeper, MESSAGE_BYTES, 1)
        if not fds:
            return  # the keeper changed its mind
        hand_over = json.loads(data)

        async def status(_: control.Answer) -> control.Answer:
            return describe(client, config, request, store)

        commands = {"status": status, **cache_commands(fs.warmup, store)}
        nursery.start_soon(control.serve, Path(str(request["runtime_dir"])) / "control", commands)
        fs.attach(KernelCaches(fds[0], nursery))
        await serve(
            Operations(fs), fds[0], base64.b64decode(hand_over["init"]), first=bool(hand_over["first"]),
            on_ready=lambda: say(keeper, ready=True),
        )  # fmt: skip
        await finish(fs, config)
        nursery.cancel_scope.cancel()
    say(keeper, unmounted=True)


@contextlib.asynccontextmanager
async def connected(config: MountConfig, *, patient: bool) -> AsyncIterator[Client]:
    """The client. patient: the mount exists and its users wait, so a server that is away is waited for."""
    async with contextlib.AsyncExitStack() as stack:
        while True:
            try:
                client = await stack.enter_async_context(connect(config.server, config.export))
                break
            except ConnectError as error:
                if not patient:
                    raise
                log.warning("%s; trying again", error)
            await trio.sleep(RECONNECT_S)
        yield client


async def finish(fs: FileSystem, config: MountConfig) -> None:
    """The mount is gone. Nothing should be dirty now; what is gets a last chance."""
    with trio.move_on_after(config.timeo_s) as scope:
        await fs.sync_all()
    if scope.cancelled_caught:
        log.error("%s: %d bytes could not be written", config.mountpoint, fs.writer.dirty_bytes)


def open_store(config: MountConfig) -> Store | None:
    """The cache. What cannot be used is left out: a mount does not fail because of its cache."""
    mem_bytes = config.mem_bytes if config.mem_bytes is not None else min(DEFAULT_MEM_BYTES, memory_bytes() // 20)
    if config.ssd:
        mem_bytes = max(mem_bytes, MIN_MEM_BYTES)  # what comes from a disk passes through memory
    if mem_bytes < MIN_MEM_BYTES:
        return None
    disks: list[Tier] = []
    try:
        memory = Tier("mem", control.cache_dir(os.geteuid()), mem_bytes, in_memory=True)
    except (OSError, Unusable) as error:
        log.error("no cache: %s", error)
        return None
    for number, (path, capacity_bytes) in enumerate(config.ssd):
        try:
            disks.append(Tier(f"ssd{number}", Path(path), capacity_bytes, in_memory=False))
        except (OSError, Unusable) as error:
            log.error("no cache in %s: %s", path, error)
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
                rate_bytes_per_s=int(str(rate)) if rate is not None else None,
            ).told()  # fmt: skip
        except NoJob as error:
            return {"error": str(error)}

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

    return {"job": job, "job_status": job_status, "cancel": cancel, "resize": resize, "clear": clear}


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
    client: Client, config: MountConfig, request: dict[str, object], store: Store | None
) -> control.Answer:
    """One mount's object of `efcfs status --json`."""
    return {
        "mountpoint": config.mountpoint,
        "source": config.source,
        "keeper_pid": request["keeper_pid"],
        "daemon_pid": os.getpid(),
        "uptime_s": round(time.time() - float(str(request["started_at"])), 1),
        "server": {"state": client.server_state()},
        "links": client.links(),
        "tiers": tiers(store),
    }


def say(keeper: socket.socket, **message: object) -> None:
    keeper.send(json.dumps(message).encode())


def main() -> None:
    keeper = socket.socket(fileno=int(sys.argv[1]))
    request = json.loads(keeper.recv(MESSAGE_BYTES))
    log_to(request["log"], bool(request["verbose"]))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the cache keeps its files open
    try:
        trio.run(run, keeper, request)
    except ConnectError as error:
        say(keeper, error=str(error), code=32)
    except SERVER_ERRORS as error:
        say(keeper, error=f"the server does not let the export's root be read: {error}", code=32)
    except Exception as error:
        log.exception("the daemon ends")
        say(keeper, error=f"internal error ({error}): see the log", code=2)
        sys.exit(1)


if __name__ == "__main__":
    main()
