"""The life of one mount: brought up, kept served by one daemon or the next, ended.

One loop turns once a second or when something happens (`Keeper.turn`); all else waits for a condition with it. Nothing
here may block: not on a daemon, not on the mount.
"""

import base64
import contextlib
import json
import logging
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from efcfs.keeper import directories, kernel, service
from efcfs.keeper.child import Daemon, Message, dying, reap
from efcfs.keeper.kernel import EX_SYSTEM, MountFailed

log = logging.getLogger("efcfs.keeper")

TICK_S = 1.0
# How often a daemon is looked at that says nothing.
LOOK_S = 0.25
# Deaths in a row of daemons that hardly served.
MAX_YOUNG_DEATHS = 6
FIRST_BACK_OFF_S = 0.1
# One that closed its socket may still be about to exit by itself. A killed one that takes longer sleeps in the kernel
# (18 of 1,000: dropping pages that a request has locked), and is reaped when its successor has answered what it sleeps
# for: programs wait for as long as we do.
LAST_WORDS_S, KILL_S = 0.2, 0.1
# A daemon that has said its last word.
EXIT_S = 5.0
# The mount has ended, or is to, while no daemon serves: so long one may try to come up.
LAST_TRY_S = 10.0
# When a daemon has served for so long, and those are served who waited for it, the next one loads its modules.
SPARE_AFTER_S = 0.5
# The steps of an upgrade.
CONNECT_S, DRAIN_S, READY_S = 30.0, 5.0, 5.0

BEFORE_6_9 = (
    "this kernel is older than 6.9: when the daemon dies, {} is mounted anew; requests in flight fail then, and open"
    " files must be opened again; on 6.9 or later nothing is lost"
)


class Forced(Exception):
    """`efcfs umount -f`: end now, whatever is in flight."""


class Adopted(NamedTuple):
    """A mount that another keeper has left: its fd, and what that one wrote down (`Keeper.save`)."""

    fd: int
    memory: int
    state: Message


class Keeper:
    def __init__(self, request: Message, command: socket.socket | None, signals: socket.socket) -> None:
        """command: the socket to the command that waits for the mount, if one does. signals: tells their numbers."""
        self.request = request
        self.command = command
        self.mountpoint, self.source = str(request["mountpoint"]), str(request["source"])
        self.started_at = time.time()
        self.fd = -1
        self.device = ""  # of the mount, as in /proc/self/mountinfo
        self.init = b""
        self.first = True  # nobody has answered INIT yet
        self.failovers = self.upgrades = self.young_deaths = 0
        self.last_exit = ""
        self.stopping = self.interrupted = self.forced = False
        self.late = False  # the mount was to end, and no daemon came up in time
        self.daemon: Daemon | None = None
        self.daemons: list[Daemon] = []  # those listened to: one, during an upgrade two, and the spare one
        # A daemon that has loaded its modules: a failover holds programs up for 60 ms instead of 300. None also when
        # there could be none.
        self.spare: Daemon | None = None
        self.spare_due = math.inf
        self.next_tick = time.monotonic() + TICK_S
        self.signals = signals
        self.memory = os.memfd_create(service.STATE)

    # -- waiting -------------------------------------------------------------------------------------

    def turn(self, limit_s: float = LOOK_S) -> None:
        """Wait a moment or until something happens, and take note of it. Raises Forced."""
        alive = [daemon for daemon in self.daemons if not daemon.gone]
        waited_for: list[socket.socket | int] = [self.signals]
        for daemon in alive:
            waited_for += (daemon.socket, daemon.end)
        if self.command is not None:
            waited_for.append(self.command)
        ready, _, _ = select.select(waited_for, [], [], min(limit_s, LOOK_S))
        for daemon in alive:
            if daemon.socket in ready:
                daemon.hear()
            if daemon.end in ready:
                daemon.look()
        if self.signals in ready:
            self.take(self.signals.recv(64))
        if self.command in ready:  # it was interrupted
            self.interrupted = True
            self.command = None
        for pid, status in reap().items():
            for daemon in self.daemons:
                if daemon.pid == pid:
                    daemon.ended(status)
        if not ready:
            for daemon in self.daemons:
                daemon.look()
        if time.monotonic() >= self.next_tick:
            self.next_tick = time.monotonic() + TICK_S
            for daemon in self.daemons:
                daemon.silent_ticks += 1

    def take(self, numbers: bytes) -> None:
        if signal.SIGUSR1 in numbers and not self.forced:
            self.forced = True
            raise Forced
        if {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} & set(numbers) and not self.stopping:
            self.stopping = True
            service.notify("STOPPING=1")
            if self.fd >= 0:
                log.info("told to stop, unmounting %s", self.mountpoint)
                kernel.unmount(self.mountpoint, self.device)

    def wait_until(self, condition: Callable[[], object], limit_s: float) -> bool:
        ends = time.monotonic() + limit_s
        while not condition():
            if (left_s := ends - time.monotonic()) <= 0:
                return False
            self.turn(left_s)
        return True

    # -- daemons -------------------------------------------------------------------------------------

    def spawn(self, request: Message, *, patient: bool) -> Daemon:
        """Set a daemon to work, the spare one if there is one. Raises OSError."""
        if self.spare is not None and self.spare.gone:
            self.drop_spare()
        daemon = self.spare or self.start(request["daemon"])
        self.spare, self.spare_due = None, math.inf
        daemon.silent_ticks = 0
        daemon.come_forward()
        daemon.say({
            **request, "keeper_pid": os.getpid(), "started_at": self.started_at, "patient": patient,
            "init": base64.b64encode(self.init).decode() or None, "failovers": self.failovers,
            "upgrades": self.upgrades, "last_exit": self.last_exit,
        })  # fmt: skip
        self.save()
        return daemon

    def start(self, argv: object) -> Daemon:
        """Raises OSError."""
        daemon = Daemon(argv)
        self.daemons.append(daemon)
        return daemon

    def have_spare(self) -> None:
        """Start it, once for each daemon that serves: what ends by itself is not started again and again."""
        self.spare_due = math.inf
        try:
            self.spare = self.start(self.request["daemon"])
            self.spare.stay_beside()
            self.save()
        except OSError as error:
            log.warning("%s: no daemon is kept ready: %s", self.mountpoint, error)

    def drop_spare(self) -> None:
        spare, self.spare, self.spare_due = self.spare, None, math.inf
        if spare is not None:
            self.bury(spare)

    def hand_over(self, daemon: Daemon) -> None:
        init = base64.b64encode(self.init).decode()
        daemon.come_forward()
        daemon.say({"serve": True, "init": init, "first": self.first}, self.fd)

    def bury(self, daemon: Daemon) -> str:
        """Have it gone. Returns why it went."""
        hung = f"hung for {daemon.silent_ticks * TICK_S:.0f} s" if daemon.hung else ""
        if "unmounted" in daemon.said and not self.forced:
            self.wait_until(lambda: daemon.status is not None, EXIT_S)
        elif (daemon.gone or "error" in daemon.said) and not dying(daemon.pid):
            self.wait_until(lambda: daemon.status is not None, LAST_WORDS_S)
        daemon.kill()
        self.wait_until(lambda: daemon.status is not None, KILL_S)
        self.daemons.remove(daemon)
        daemon.close()
        return hung or daemon.how_it_ended()

    def save(self) -> None:
        """Write down what another keeper needs that finds the mount in the service manager's store."""
        state = {
            "request": self.request, "init": base64.b64encode(self.init).decode(), "device": self.device,
            "started_at": self.started_at, "failovers": self.failovers, "upgrades": self.upgrades,
            "last_exit": self.last_exit, "daemons": [(daemon.pid, daemon.born) for daemon in self.daemons],
        }  # fmt: skip
        os.pwrite(self.memory, json.dumps(state).encode() + b"\n", 0)
        if self.fd >= 0 and self.daemon is not None:
            service.notify(f"STATUS={self.source} at {self.mountpoint}, daemon {self.daemon.pid},"
                           f" failovers: {self.failovers}, upgrades: {self.upgrades}")  # fmt: skip

    def describe(self) -> None:
        try:
            directories.describe_mount(str(self.request["state_dir"]), self.request)
        except OSError as error:  # a full memory is no reason to end
            log.error("%s: %s", self.mountpoint, error)

    # -- the beginning -------------------------------------------------------------------------------

    def bring_up(self) -> None:
        """Mount, once the daemon has reached the server. Raises MountFailed."""
        try:
            daemon = self.daemon = self.spawn(self.request, patient=False)
        except OSError as error:
            raise MountFailed(f"the daemon cannot be started: {error}", EX_SYSTEM) from None
        self.expect(daemon, "connected")
        self.mount()
        self.hand_over(daemon)
        self.expect(daemon, "ready")
        self.serving(daemon)
        service.store(service.FUSE, self.fd)
        service.store(service.STATE, self.memory)

    def expect(self, daemon: Daemon, word: str) -> None:
        while word not in daemon.said:
            if self.interrupted or self.stopping:
                raise MountFailed("interrupted", EX_SYSTEM)
            if "error" in daemon.said:
                raise MountFailed(str(daemon.said["error"]), int(str(daemon.said.get("code", kernel.EX_MOUNT))))
            if daemon.lost:
                raise MountFailed(f"the daemon ended too early ({self.bury(daemon)}): see the log", EX_SYSTEM)
            self.turn()

    def mount(self) -> None:
        flags, allow_other = int(str(self.request["mount_flags"])), bool(self.request["allow_other"])
        self.fd, self.init = kernel.mount(self.source, self.mountpoint, flags, allow_other)
        self.device = kernel.device_at(self.mountpoint)
        self.first = True

    def serving(self, daemon: Daemon) -> None:
        """The daemon has said ready."""
        self.daemon = daemon
        if self.first:
            kernel.set_read_ahead(self.mountpoint)
            self.first = False
        self.spare_due = time.monotonic() + SPARE_AFTER_S
        self.save()

    def adopt(self, adopted: Adopted) -> None:
        """Take over the mount of a keeper that was killed, and whose daemons are gone."""
        self.fd, self.memory, state = adopted
        self.device = str(state["device"])
        self.init, self.first = base64.b64decode(str(state["init"])), False
        self.started_at = float(str(state["started_at"]))
        self.failovers, self.upgrades = int(str(state["failovers"])), int(str(state["upgrades"]))

    # -- serving -------------------------------------------------------------------------------------

    def keep(self) -> int:
        """Have the mount served until it ends. Returns the exit code."""
        while True:
            daemon = self.daemon
            if daemon is None or ("unmounted" not in daemon.said and daemon.lost):
                if not self.replace(daemon):
                    return EX_SYSTEM if self.young_deaths > MAX_YOUNG_DEATHS else 0
            elif "unmounted" in daemon.said:
                log.info("%s unmounted", self.mountpoint)
                return 0
            elif isinstance(asked := daemon.said.pop("upgrade", None), dict):
                self.upgrade(daemon, asked)
            elif time.monotonic() >= self.spare_due:
                self.have_spare()
            else:
                self.turn()

    def replace(self, dead: Daemon | None) -> bool:
        """Another daemon for one that is gone, or went with its keeper. False: the mount has ended or is given up."""
        young = dead is not None and dead.young
        why = "its keeper was killed" if dead is None else self.bury(dead)
        while True:
            if self.fd >= 0 and kernel.connection_ended(self.fd):
                log.info("%s unmounted, its daemon ended (%s)", self.mountpoint, why)
                return False
            log.error("the daemon of %s died (%s)", self.mountpoint, why)
            self.failovers += 1
            self.last_exit = why
            self.young_deaths = self.young_deaths + 1 if young else 0
            if self.young_deaths > MAX_YOUNG_DEATHS:
                log.critical("%d daemons in a row died at once (%s): %s is given up and unmounted; why they died is in"
                             " the log (%s)", self.young_deaths, why, self.mountpoint, self.request["log"])  # fmt: skip
                self.end_connection()
                return False
            if self.young_deaths > 1:
                self.wait_until(lambda: self.stopping, FIRST_BACK_OFF_S * 2 ** (self.young_deaths - 2))
            try:
                if self.fd < 0 or not (self.first or kernel.can_resend(self.init)):
                    self.mount_anew()
                daemon = self.spawn(self.request, patient=True)
            except (OSError, MountFailed) as error:
                why, young = f"no daemon can be started: {error}", True
                continue
            self.daemon = daemon
            if self.wait_for(daemon, "connected"):
                self.hand_over(daemon)
                if self.wait_for(daemon, "ready"):
                    self.serving(daemon)
                    return True
            why, young = self.bury(daemon), True
            if self.late:
                log.info("%s ends while no daemon serves it", self.mountpoint)
                return False

    def wait_for(self, daemon: Daemon, word: str) -> bool:
        """Until the daemon says it or is lost: it may wait for a server that is away for long, and beats meanwhile.

        When the mount has ended, or is to end, that is not waited for, but for a daemon that writes what is unwritten.
        """
        ending_since = None
        while word not in daemon.said and not daemon.lost:
            now = time.monotonic()
            if ending_since is None and (self.stopping or kernel.connection_ended(self.fd)):
                ending_since = now
            if ending_since is not None and now > ending_since + LAST_TRY_S:
                self.late = True
                return False
            self.turn()
        return word in daemon.said and not daemon.lost

    def mount_anew(self) -> None:
        """What the dead daemon had taken is lost on this kernel, and would be waited for for ever."""
        log.warning("%s is mounted anew", self.mountpoint)
        service.forget(service.FUSE)
        self.end_connection()
        self.mount()
        service.store(service.FUSE, self.fd)

    def end_connection(self) -> None:
        """All that programs wait for fails; the mount goes."""
        kernel.abort(self.mountpoint, self.device)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # -- upgrading -----------------------------------------------------------------------------------

    def upgrade(self, old: Daemon, asked: Message) -> None:
        """Replace the daemon by the one it asks for. What goes wrong is told to the old one, which serves on."""
        self.drop_spare()  # its modules are those of before
        request, served = {**self.request, **{key: asked[key] for key in ("daemon", "config") if asked.get(key)}}, False
        self.upgrades += 1  # as the new one is to tell it
        try:
            new = self.spawn(request, patient=False)
        except OSError as error:
            self.upgrade_failed(old, f"the new daemon cannot be started: {error}", served=False)
            return
        new.stay_beside()
        self.wait_until(lambda: "connected" in new.said or new.lost or leaving(old), CONNECT_S)
        if "connected" in new.said and not new.lost and not leaving(old):
            old.say({"drain": True})
            if not self.wait_until(lambda: "drained" in old.said or leaving(old), DRAIN_S):
                log.warning("the daemon of %s does not come to an end: it is killed, the new one asks again for what it"
                            " had taken", self.mountpoint)  # fmt: skip
                old.kill()
            if served := "unmounted" not in old.said:
                self.hand_over(new)
                self.wait_until(lambda: "ready" in new.said or new.lost, READY_S)
        if "ready" not in new.said:
            why = "the old one ended meanwhile" if leaving(old) else "" if new.lost else "it takes too long"
            how = self.bury(new)
            if "ready" in new.said:
                old.kill()  # it served for a moment after all: what the old one remembers is no longer so
            self.upgrade_failed(old, f"the new daemon does not serve: {why or how}", served=served)
            return
        self.request = request
        self.describe()
        new.ready_at = old.ready_at  # an upgrade a second makes no daemon young
        self.serving(new)
        log.info("the daemon of %s is upgraded: %d serves, %d ends", self.mountpoint, new.pid, old.pid)
        old.say({"upgraded": True})
        self.wait_until(lambda: old.status is not None, EXIT_S)
        self.bury(old)
        self.save()

    def upgrade_failed(self, old: Daemon, why: str, *, served: bool) -> None:
        log.error("%s is not upgraded: %s", self.mountpoint, why)
        self.upgrades -= 1
        old.said.pop("drained", None)
        old.say({"upgrade_failed": why, "served": served})
        self.spare_due = time.monotonic() + SPARE_AFTER_S
        self.save()

    # -- the end -------------------------------------------------------------------------------------

    def end(self) -> None:
        """Nothing of the mount is left but data that could not be written."""
        service.notify("STOPPING=1")
        for daemon in list(self.daemons):
            self.bury(daemon)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        service.forget(service.FUSE)
        service.forget(service.STATE)

    def run(self, adopted: Adopted | None) -> int:
        """Until the mount has ended; `adopted` is there already. Raises MountFailed."""
        try:
            self.describe()
            if adopted is None:
                self.bring_up()
            else:
                self.adopt(adopted)
            how = "mounted at" if adopted is None else "goes on with a new keeper at"
            self.tell(f"{self.source} {how} {self.mountpoint}")
            return self.keep()
        except Forced:
            log.warning("%s is ended by force", self.mountpoint)
            for daemon in self.daemons:
                daemon.kill()
            self.end_connection()
            return 0
        except MountFailed:
            if self.fd >= 0:
                self.end_connection()
            raise
        finally:
            self.end()

    def tell(self, line: str) -> None:
        """Whoever started us may go on."""
        log.info(line)
        answer: Message = {"ready": True, "keeper_pid": os.getpid()}
        if not kernel.can_resend(self.init):
            answer["warning"] = BEFORE_6_9.format(self.mountpoint)
            log.warning(answer["warning"])
        if self.command is not None:
            with contextlib.suppress(OSError):
                self.command.send(json.dumps(answer).encode())
            self.command.close()
            self.command = None
        service.notify("READY=1", f"STATUS={line}")


def leaving(daemon: Daemon) -> bool:
    """There is nothing to be replaced: it is dead, or its mount has ended."""
    return daemon.lost or "unmounted" in daemon.said
