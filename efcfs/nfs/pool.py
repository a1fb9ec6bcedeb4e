"""Many links to one server, used as one.

READ and WRITE go to the data link with the fewest bytes in flight; metadata calls have a link of their own
per address, so that they never queue behind a megabyte. A link that breaks or stalls loses its calls to
the others and is connected again with back-off. They keep their xid, but nothing relies on the server's reply cache:
that may know a call by the port it came from, too. `client.py` judges a call that was sent again by its effect.
With no link up, calls wait: for ever (hard) or until timeo x retrans (soft).

The pool moves calls; it does not know what is in them.
"""

import contextlib
import itertools
import logging
import random
import select
from collections.abc import Awaitable, Callable, Sequence

import trio

from efcfs.nfs.link import Buffer, Call, Decoder, Link, LinkClosed, ServerAway, TimedOut, open_link
from efcfs.nfs.xdr import ProtocolError

log = logging.getLogger(__name__)

# A link with calls unanswered for this long is suspected; doubles each time the suspicion was wrong.
PATIENCE_S = 3.0
MAX_PATIENCE_S = 60.0
TICK_S = 0.25
MIN_BACKOFF_S = 0.05
# A restarted server must be found again within a second.
MAX_BACKOFF_S = 1.0

Resolve = Callable[[], Awaitable[Sequence[str]]]
Probe = Callable[[Link], Awaitable[None]]


class Place:
    """A place for a link in the pool; links come and go in it."""

    __slots__ = (
        "address",
        "bulk",
        "index",
        "link",
        "patience_s",
        "probing",
        "reconnects",
        "replaced_at",
        "scope",
    )  # fmt: skip

    def __init__(self, index: int, bulk: bool, address: str) -> None:
        self.index = index
        self.bulk = bulk
        self.address = address
        self.link: Link | None = None
        self.reconnects = 0
        self.patience_s = PATIENCE_S
        self.replaced_at = float("-inf")
        self.probing = False
        self.scope: trio.CancelScope | None = None


class Pool:
    """`nconnect` data links and one metadata link per address.

    resolve: gives the server's numeric addresses, asked again before each reconnect.
    probe: makes one NULL call on a fresh link and raises if the server is not there.
    soft_s: how long a call may take before it fails with TimedOut; None waits for ever.
    """

    def __init__(
        self, host: str, addresses: Sequence[str], port: int, nconnect: int, resolve: Resolve, probe: Probe,
        *, reserved_port: bool, timeo_s: float, soft_s: float | None,
    ) -> None:  # fmt: skip
        self.host = host
        self.port = port
        self.places = [Place(i, True, addresses[i % len(addresses)]) for i in range(nconnect)]
        self.places += [Place(i, False, address) for i, address in enumerate(addresses[:nconnect])]
        self.retransmissions = 0
        self._resolve = resolve
        self._probe = probe
        self._reserved_port = reserved_port
        self._timeo_s = timeo_s
        self._soft_s = soft_s
        self._xids = itertools.count(random.getrandbits(32))
        self._parked: dict[int, Call] = {}
        self._away = False
        # When it was noticed, and when a ping was answered last.
        self._away_at = self._pinged_at = float("-inf")
        self._pinging = False
        # The links' sockets, and who receives from them: `run`, or somebody who waits for more than that (`attend`).
        self._arrivals = select.epoll()
        self._links: dict[int, Link] = {}
        self._unattended = trio.Event()
        self._unattended.set()
        self._listening = trio.CancelScope()

    @property
    def away(self) -> bool:
        """True while calls wait and no link brings an answer."""
        return self._away

    def call(
        self, head: bytes, decode: Decoder, description: str, *, bulk: bool = False,
        payload: Sequence[Buffer] = (), payload_bytes: int = 0, sink: memoryview | None = None,
        impatient: bool = False,
    ) -> Call:  # fmt: skip
        """Send a call; await its result with `wait`. impatient: it fails with ServerAway once the server is away."""
        xid = next(self._xids) & 0xFFFFFFFF
        call = Call(xid, head, payload, payload_bytes, decode, sink, description)
        call.impatient = impatient
        self._dispatch(call, bulk)
        return call

    async def wait(self, call: Call) -> object:
        """The call's result. Raises TimedOut (soft mounts), ServerAway (impatient calls), CallFailed, RpcRefused."""
        return await call.result(self._forget)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the links up until cancelled."""
        with contextlib.closing(self._arrivals):
            async with trio.open_nursery() as nursery:
                for place in self.places:
                    nursery.start_soon(self._keep, place)
                nursery.start_soon(self._watch, nursery)
                nursery.start_soon(self._listen)
                task_status.started()

    # -- receiving -----------------------------------------------------------------------------------

    def attend(self) -> int:
        """From now on the caller calls `receive` whenever this file is readable: without a turn of trio's loop."""
        self._unattended = trio.Event()
        self._listening.cancel()
        return self._arrivals.fileno()

    def leave(self) -> None:
        """The caller of `attend` does so no more."""
        self._unattended.set()

    def receive(self) -> None:
        """Take what has come on all links, metadata first: others wait for it. Never blocks."""
        ready = [self._links[number] for number, _ in self._arrivals.poll(0)]
        for link in sorted(ready, key=lambda link: link.in_flight_bytes):
            link.receive()
            if link.error is not None:
                self._ignore(link)

    async def _listen(self) -> None:
        while True:
            await self._unattended.wait()
            with trio.CancelScope() as self._listening:
                while True:
                    await trio.lowlevel.wait_readable(self._arrivals)
                    self.receive()

    def _ignore(self, link: Link) -> None:
        if self._links.pop(link.sock.fileno(), None) is not None:
            self._arrivals.unregister(link.sock)

    # -- choosing a link ---------------------------------------------------------------------------

    def _dispatch(self, call: Call, bulk: bool) -> None:
        best: Link | None = None
        best_key = (False, 0, 0)
        for place in self.places:
            link = place.link
            if link is None:
                continue
            # A link of the other kind is better than none.
            key = (place.bulk != bulk, link.in_flight_bytes, len(link.calls))
            if best is None or key < best_key:
                best, best_key = link, key
        if best is None:
            self._parked[call.xid] = call
        else:
            best.send(call)

    def _forget(self, call: Call) -> None:
        self._parked.pop(call.xid, None)
        for place in self.places:
            if place.link is not None:
                place.link.abandon(call)

    def _resend(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if call.transmissions:
                self.retransmissions += 1
            self._dispatch(call, call.size_bytes > 0)

    # -- one place's life --------------------------------------------------------------------------

    async def _keep(self, place: Place) -> None:
        backoff_s = MIN_BACKOFF_S
        first = True
        while True:
            try:
                if not first:
                    await self._resolve_again(place)
                link = await open_link(
                    place.address, self.port, reserved_port=self._reserved_port,
                    timeout_s=min(self._timeo_s, 10.0),
                )  # fmt: skip
                if not first:
                    # A listening socket proves little: a stopped server's kernel accepts for it.
                    await self._null(link)
            except (OSError, LinkClosed, ProtocolError) as error:
                log.debug("link to %s: %s", place.address, error)
                await trio.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
                first = False
                continue
            if not first:
                place.reconnects += 1
            first = False
            started = trio.current_time()
            await self._use(place, link)
            # A link that dies young (a proxy without a server behind it) must not spin.
            if trio.current_time() - started > 1:
                backoff_s = MIN_BACKOFF_S
            else:
                await trio.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    async def _use(self, place: Place, link: Link) -> None:
        """Serve calls on `link` until it breaks or is replaced; then hand its calls to the others."""
        try:
            with trio.CancelScope() as place.scope:
                place.link = link
                parked, self._parked = self._parked, {}
                self._resend(list(parked.values()))
                self._links[link.sock.fileno()] = link
                self._arrivals.register(link.sock, select.EPOLLIN)
                await link.run()
        except (OSError, LinkClosed) as error:
            log.info("link to %s lost (%s), connecting again", place.address, error)
        except ProtocolError as error:
            log.error("link to %s dropped: malformed reply: %s", place.address, error)
        finally:
            place.link = None
            orphans = list(link.calls.values())
            link.calls.clear()
            self._ignore(link)
            link.close()
        self._resend(orphans)

    async def _resolve_again(self, place: Place) -> None:
        addresses = await self._resolve()
        if addresses and place.address not in addresses:
            place.address = addresses[place.index % len(addresses)]

    async def _null(self, link: Link) -> None:
        """Raise unless the server answers on `link`, which is closed then."""
        try:
            with trio.fail_after(min(self._timeo_s, 10.0)):
                await self._probe(link)
        except trio.TooSlowError:
            link.close()
            raise TimeoutError("no answer to a NULL call") from None
        except BaseException:
            link.close()
            raise

    # -- watching ----------------------------------------------------------------------------------

    async def _watch(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.sleep(TICK_S)
            now = trio.current_time()
            waiting_since = now
            for call in self._parked.values():
                waiting_since = min(waiting_since, call.started_at)
                break
            for place in self.places:
                link = place.link
                if link is None or not link.calls:
                    continue
                oldest = next(iter(link.calls.values()))
                quiet_since = max(link.received_at, oldest.sent_at)
                waiting_since = min(waiting_since, quiet_since)
                if now - quiet_since > place.patience_s and not place.probing:
                    place.probing = True
                    nursery.start_soon(self._replace, place, link)
            self._note_state(now, waiting_since)
            if self._away:
                self._fail(ServerAway, lambda call: call.impatient)
                if not self._pinging:
                    self._pinging = True
                    nursery.start_soon(self._ping)
            if self._soft_s is not None:
                self._give_up(now - self._soft_s)

    def _note_state(self, now: float, waiting_since: float) -> None:
        heard_at = max((p.link.received_at for p in self.places if p.link is not None), default=0.0)
        if not self._away and now - waiting_since > PATIENCE_S and now - heard_at > PATIENCE_S:
            self._away, self._away_at = True, now
            log.warning("server %s not responding, still trying", self.host)
        elif self._away and max(heard_at, self._pinged_at) > self._away_at:
            self._away = False
            log.warning("server %s answers again", self.host)

    async def _ping(self) -> None:
        """Ask an away server by itself: perhaps nobody else does, because the cache serves them."""
        try:
            fresh = await open_link(
                self.places[0].address, self.port, reserved_port=self._reserved_port, timeout_s=PATIENCE_S
            )
            await self._null(fresh)
            fresh.close()
            self._pinged_at = trio.current_time()
        except (OSError, LinkClosed, ProtocolError) as error:
            log.debug("server is still away: %s", error)
            await trio.sleep(MAX_BACKOFF_S)
        finally:
            self._pinging = False

    def _give_up(self, started_before: float) -> None:
        self._fail(ServerAway, lambda call: call.impatient and call.started_at < started_before)
        self._fail(TimedOut, lambda call: call.started_at < started_before)

    def _fail(self, why: type[Exception], which: Callable[[Call], bool]) -> None:
        links = [place.link.calls for place in self.places if place.link is not None]
        for calls in (self._parked, *links):
            for call in [c for c in calls.values() if which(c)]:
                self._forget(call)
                call.fail(why(call.description))

    async def _replace(self, place: Place, link: Link) -> None:
        """A quiet link is either dead or its server is. A fresh link that answers tells which.

        If the server is away, the old link stays: its replies come when the server comes back, and
        nothing is executed twice.
        """
        try:
            fresh = await open_link(
                place.address, self.port, reserved_port=self._reserved_port, timeout_s=place.patience_s
            )
            await self._null(fresh)
        except (OSError, LinkClosed, ProtocolError) as error:
            log.debug("server %s does not answer a probe: %s", place.address, error)
            return
        finally:
            place.probing = False
        fresh.close()
        now = trio.current_time()
        if place.link is link and place.scope is not None:
            log.warning("link to %s stalled for %.0f s, replaced", place.address, place.patience_s)
            # Often on the same place: then it is the server that is slow, and patience is what it needs.
            recent = now - place.replaced_at < 10 * place.patience_s
            place.patience_s = min(place.patience_s * 2, MAX_PATIENCE_S) if recent else PATIENCE_S
            place.replaced_at = now
            place.scope.cancel()
