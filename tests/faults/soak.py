"""The soak: programs work in a mount while its daemon is killed and upgraded and its server restarted.

The programs are processes of their own (program.py). This one never touches the mount, which may hang: it disturbs,
and tells how long each disturbance held a program up. The short tests and bench/soak.py run the same.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event as EventType
from pathlib import Path
from typing import NamedTuple

from tests.bed import PR_SET_PDEATHSIG, Ganesha, Mount, _libc, efcfs
from tests.faults.model import Board, Call, Findings
from tests.faults.program import SHARED, Program

# A keeper gives up when daemons die young several times in a row, as it should: the soak stays below that.
YOUNG_S, MOST_YOUNG = 1.4, 4
UPGRADE_EVERY_S = 1.0
# A failover begins with the death; whoever asks while the next daemon starts waits for the rest of it.
BEGINNING_S = 0.1
NO_DAEMON_S = 30.0
SERVER_AWAY_S, SERVER_UP_S = (0.0, 2.0), (3.0, 8.0)
# After the server is back a link may still wait for its next try.
SERVER_BACK_S = 2.0
RELEASE_S = 10.0
PROGRAM_S = 120.0
TELL_S = 10.0


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Plan:
    """`death`: what a daemon dies of; returns when it does."""

    kills: int = 0
    death: Callable[[int], None] = killed
    upgrades: int = 0
    restart_server: bool = False
    programs: int = 8
    seed: int = 1
    between_kills_s: tuple[float, float] = (1.1, 3.0)
    quiet_s: float = 0.0  # at first nothing is disturbed, to compare with


class Span(NamedTuple):
    begun_s: float
    ended_s: float


class Pause(NamedTuple):
    """The longest call that a disturbance held up; begun at a moment of the monotonic clock."""

    length_s: float
    what: str
    begun_s: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What the soak found. Pauses with the server away are told apart: they last as long as it is."""

    kills: list[Span] = field(default_factory=list)
    upgrades: list[Span] = field(default_factory=list)
    server_away: list[Span] = field(default_factory=list)
    quiet: list[Span] = field(default_factory=list)
    daemon_pids: list[int] = field(default_factory=list)
    calls: int = 0
    actions: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    leaked_handles: str = "not asked"
    slow: list[Call] = field(default_factory=list)

    def pauses(self, disturbances: list[Span]) -> tuple[list[Pause], list[Pause]]:
        """The pause of each disturbance, shortest first: those with the server up, and those with it away."""
        longest = [Call("nothing that took long", *disturbance) for disturbance in disturbances]
        lengths_s = [0.0] * len(disturbances)
        for call in self.slow:
            first = bisect_right(disturbances, call.begun_s, key=lambda span: span.ended_s)
            for i in range(first, bisect_left(disturbances, call.ended_s, key=lambda span: span.begun_s)):
                if call.ended_s - call.begun_s > lengths_s[i]:
                    longest[i], lengths_s[i] = call, call.ended_s - call.begun_s
        up: list[Pause] = []
        away: list[Pause] = []
        for call, length_s in zip(longest, lengths_s, strict=True):
            met = any(span.begun_s < call.ended_s and span.ended_s > call.begun_s for span in self.server_away)
            (away if met else up).append(Pause(length_s, call.what, call.begun_s))
        return sorted(up), sorted(away)


def soak(server: Ganesha, mount: Mount, plan: Plan, tell: Callable[[str], None] = print) -> Outcome:
    """Run it all and unmount."""
    mount.daemon_may_die = True
    outcome, board = Outcome(), Board(plan.programs)
    (server.directory / SHARED).mkdir()
    (server.directory / SHARED).chmod(0o777)
    fork = multiprocessing.get_context("fork")
    until, running = fork.Event(), []
    for number in range(plan.programs):
        ours, theirs = fork.Pipe()
        program = Program(number, mount.path, plan.seed, board)
        process = fork.Process(target=live, args=(program, until, theirs, server.directory), daemon=True)
        process.start()
        theirs.close()
        running.append((process, ours))
    pipes = [pipe for _, pipe in running]
    try:
        Disturbance(server, mount, plan, outcome, board, tell).run()
    finally:
        until.set()
        ends = time.monotonic() + PROGRAM_S
        hanging = [number for number, pipe in enumerate(pipes) if not pipe.poll(max(0.0, ends - time.monotonic()))]
        outcome.errors += [f"program {number} hangs" for number in hanging]
        end(mount, outcome, force=bool(hanging))
        for pipe in pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send("unmounted")
        for number, (process, pipe) in enumerate(running):
            collect(number, pipe, outcome)
            process.join(5)
            process.kill()
    outcome.errors += [f"left on the server: {path}" for path in server.directory.rglob(".nfs*")]
    return outcome


def live(program: Program, until: EventType, soak_pipe: Connection, there: Path) -> None:
    """A program's process."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    program.work(until.is_set)
    soak_pipe.send("closed")
    soak_pipe.recv()
    program.compare(there)
    soak_pipe.send(program.found)


def collect(number: int, pipe: Connection, outcome: Outcome) -> None:
    found = None
    with contextlib.suppress(EOFError):
        while not isinstance(found, Findings) and pipe.poll(PROGRAM_S):
            found = pipe.recv()  # "closed" comes before
    if not isinstance(found, Findings):
        outcome.errors.append(f"program {number} told nothing: it hangs or has died")
        return
    outcome.calls += found.calls
    outcome.actions += found.actions
    outcome.errors += found.errors
    outcome.wrong += found.wrong
    outcome.slow += found.slow


def end(mount: Mount, outcome: Outcome, *, force: bool) -> None:
    """Everything is closed: no handle may be left, and the mount ends."""
    try:
        ends = time.monotonic() + RELEASE_S
        # The kernel sends RELEASE after close(2) has returned.
        while (handles := mount.status().get("open_handles", "no open_handles in status")) != 0:
            if time.monotonic() > ends or not isinstance(handles, int):
                break
            time.sleep(0.1)
        outcome.leaked_handles = str(handles)
        mount.umount(*["-f"] * force)
    except AssertionError as error:
        outcome.errors.append(f"at the end of the mount: {error}")


class Disturbance:
    """Kills, upgrades and server restarts, each at its own moments."""

    def __init__(
        self, server: Ganesha, mount: Mount, plan: Plan, outcome: Outcome, board: Board, tell: Callable[[str], None]
    ) -> None:
        self.server, self.mount, self.plan, self.outcome, self.board = server, mount, plan, outcome, board
        self.tell = tell
        self.keeper_pid = int(str(mount.status()["keeper_pid"]))
        self.over = False

    def run(self) -> None:
        self.quiet()
        with ThreadPoolExecutor(3) as threads:
            jobs = [threads.submit(self.kill), threads.submit(self.upgrade)]
            others = [threads.submit(self.restart_server)] if self.plan.restart_server else []
            self.watch(jobs, others)
        for job in [*jobs, *others]:
            job.result()
        time.sleep(BEGINNING_S)
        self.outcome.daemon_pids += [pid for pid in self.daemons() if pid not in self.outcome.daemon_pids]

    def watch(self, jobs: list[Future[None]], others: list[Future[None]]) -> None:
        """Tell how it goes until the planned number is done, or one of them fails."""
        try:
            next_s = time.monotonic() + TELL_S
            while not all(job.done() for job in jobs):
                if any(job.done() and job.exception() for job in [*jobs, *others]):
                    return
                time.sleep(0.1)
                if time.monotonic() > next_s:
                    next_s += TELL_S
                    self.tell(self.so_far())
        finally:
            self.over = True

    def so_far(self) -> str:
        done = self.outcome
        return (
            f"{len(done.kills)} of {self.plan.kills} kills, {len(done.upgrades)} of {self.plan.upgrades} upgrades, "
            f"{len(done.server_away)} server restarts, {sum(self.board.calls):,} calls, "
            f"{sum(self.board.failures) + len(done.errors)} errors"
        )

    def quiet(self) -> None:
        ends = time.monotonic() + self.plan.quiet_s
        while (now := time.monotonic()) < ends:
            time.sleep(1)
            self.outcome.quiet.append(Span(now, now + BEGINNING_S))

    def daemons(self) -> list[int]:
        """The keeper's children that are at work, during an upgrade two; or the one that is to be."""
        found, at_work = [], []
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{self.keeper_pid}/task/{self.keeper_pid}/children").read_text()
            for child in children.split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if b"efcfs.daemon" in Path(f"/proc/{child}/cmdline").read_bytes():
                        found.append(int(child))
                        if Path(f"/proc/{child}/comm").read_text() == "efcfs\n":
                            at_work.append(int(child))
        return at_work or found

    def kill(self) -> None:
        """The death of a daemon at random moments."""
        rng = random.Random(self.plan.seed)
        young = 0
        while len(self.outcome.kills) < self.plan.kills and not self.over:
            wait_s = rng.uniform(*self.plan.between_kills_s)
            young = young + 1 if wait_s < YOUNG_S else 0
            if young > MOST_YOUNG:
                wait_s, young = YOUNG_S + wait_s / 2, 0
            time.sleep(wait_s)
            ends = time.monotonic() + NO_DAEMON_S
            while not (alive := self.daemons()):
                if time.monotonic() > ends or not Path(f"/proc/{self.keeper_pid}").exists():
                    self.outcome.errors.append(f"no daemon any more after {len(self.outcome.kills)} kills")
                    return
                time.sleep(0.01)
            pid = rng.choice(alive)
            with contextlib.suppress(ProcessLookupError):
                self.plan.death(pid)
                now = time.monotonic()
                self.outcome.kills.append(Span(now, now + BEGINNING_S))
                self.outcome.daemon_pids.append(pid)
        if self.plan.kills:
            time.sleep(YOUNG_S)  # the last failover is one of them

    def upgrade(self) -> None:
        """`efcfs upgrade` every second. One that meets a kill may fail, and says so."""
        while len(self.outcome.upgrades) < self.plan.upgrades and not self.over:
            self.outcome.daemon_pids += [pid for pid in self.daemons() if pid not in self.outcome.daemon_pids]
            begun_s = time.monotonic()
            try:
                done = efcfs("upgrade", str(self.mount.path))
                why = (done.stderr or done.stdout).strip() if done.returncode else ""
            except subprocess.TimeoutExpired:
                why = "does not end"
            self.outcome.upgrades.append(Span(begun_s, time.monotonic()))
            if why and not self.plan.kills:
                self.outcome.errors.append(f"efcfs upgrade: {why}")
            time.sleep(max(0.0, begun_s + UPGRADE_EVERY_S - time.monotonic()))

    def restart_server(self) -> None:
        """SIGKILL the server and start it again, at random moments."""
        rng = random.Random(-self.plan.seed)
        while not self.over:
            time.sleep(rng.uniform(*SERVER_UP_S))
            begun_s = time.monotonic()
            self.server.kill()
            time.sleep(rng.uniform(*SERVER_AWAY_S))
            self.server.start()
            self.outcome.server_away.append(Span(begun_s, time.monotonic() + SERVER_BACK_S))
