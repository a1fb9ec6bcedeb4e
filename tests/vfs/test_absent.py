"""Names that are not there, against a server that does calls late, out of order, or not at all."""

from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from efcfs.nfs.link import TimedOut
from efcfs.vfs.absent import MISSES, MOST_NAMES, Absent, Version

FH = b"directory"
BELIEVE_S = 30.0
NAMES = st.sampled_from([b"a", b"z"])


@dataclass(eq=False)
class Call:
    """One of ours, making (or removing) a name."""

    name: bytes
    makes: bool
    asked_at: float
    changing: AbstractContextManager[None]
    given_up: bool = False
    before: Version | None = None
    after: Version | None = None


@dataclass(eq=False)
class Reading:
    """A listing under way: `b"a"` comes with its first page, `b"z"` with the second."""

    listing: set[bytes]
    began_at: float
    names: list[bytes] = field(default_factory=list)
    pages: int = 0


class Directory(RuleBasedStateMachine):
    """A directory on a server: what we make in it, what another client makes, and what we may believe of it."""

    calls = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.absent = Absent(lambda: self.now)
        self.there: set[bytes] = set()
        self.made_by_other: dict[bytes, float] = {}
        self.changes = 0
        self.reading: Reading | None = None

    @initialize(ours=st.booleans(), there=st.sets(NAMES))
    def begins(self, ours: bool, there: set[bytes]) -> None:
        if ours:
            self.absent.made(FH, self.version, self.now)
        else:
            self.there = there

    @property
    def version(self) -> Version:
        return (0, self.changes, self.changes)

    def change(self, name: bytes, makes: bool, *, same_tick: bool) -> None:
        (self.there.add if makes else self.there.discard)(name)
        self.changes += not same_tick

    @rule(seconds=st.sampled_from([0.001, 1.0, 29.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=calls, name=NAMES, makes=st.booleans())
    def we_ask(self, name: bytes, makes: bool) -> Call:
        changing = self.absent.changing({FH: [name]})
        call = Call(name, makes, self.now, changing)
        self.now += 0.001
        changing.__enter__()
        return call

    @rule(call=calls, same_tick=st.booleans())
    def the_server_does_it(self, call: Call, same_tick: bool) -> None:
        if call.after is None:
            call.before = self.version
            self.change(call.name, call.makes, same_tick=same_tick)
            self.made_by_other.pop(call.name, None)
            call.after = self.version

    @rule(call=consumes(calls), told=st.booleans())
    def the_answer_comes(self, call: Call, told: bool) -> None:
        if call.given_up:
            return
        self.the_server_does_it(call, False)
        self.now += 0.001
        before, after = (call.before, call.after) if told else (None, None)
        self.absent.seen(FH, after, call.asked_at, ours=True, before=before)
        call.changing.__exit__(None, None, None)

    @rule(call=calls)
    def we_give_it_up(self, call: Call) -> None:
        """It stays a call, which the server may do later."""
        if not call.given_up:
            call.given_up = True
            with suppress(TimedOut):
                call.changing.__exit__(TimedOut, TimedOut(), None)

    @rule(name=NAMES, makes=st.booleans(), same_tick=st.booleans())
    def another_client_changes(self, name: bytes, makes: bool, same_tick: bool) -> None:
        was_there = name in self.there
        self.change(name, makes, same_tick=same_tick)
        if makes and not was_there:
            self.made_by_other[name] = self.now

    @invariant()
    def what_is_there_is_hidden_only_when_another_made_it_lately(self) -> None:
        for name in self.there:
            left_s, made_at = self.absent.left_s(FH, name, BELIEVE_S), self.made_by_other.get(name)
            assert not left_s or (made_at is not None and self.now + left_s <= made_at + BELIEVE_S)

    @rule(name=NAMES)
    def we_find(self, name: bytes) -> None:
        if name in self.there and not self.absent.left_s(FH, name, BELIEVE_S):
            self.absent.may_be(FH, [name])
            self.made_by_other.pop(name, None)  # from now on we know of it

    @rule()
    def we_ask_for_attributes(self) -> None:
        self.now += 0.001
        self.absent.seen(FH, self.version, self.now)

    @rule()
    def a_page_is_listed(self) -> None:
        reading = self.reading
        if reading is None:
            return
        reading.names += [name for name in sorted(self.there) if (name == b"a") == (reading.pages == 0)]
        reading.pages += 1
        self.absent.seen(FH, self.version, self.now)
        self.now += 0.001
        if reading.pages == 2:
            self.absent.listed(FH, reading.listing, reading.names, reading.began_at)
            self.reading = None

    @rule()
    def we_miss_many(self) -> None:
        for _ in range(MISSES):
            listing = self.absent.missed(FH, b"other", BELIEVE_S)
            if listing is not None:
                assert self.reading is None
                self.reading = Reading(listing, self.now)


Directory.TestCase.settings = settings(max_examples=300)
TestDirectory = Directory.TestCase


def test_another_clients_change_is_seen_in_the_next_call_that_is_alone() -> None:
    absent = Absent()
    absent.made(FH, (0, 1, 1), 0.0)
    with absent.changing({FH: [b"a"]}), absent.changing({FH: [b"b"]}):
        # What was before the one is of before or after the other, and tells nothing.
        absent.seen(FH, (0, 2, 2), 1.0, ours=True, before=(0, 9, 9))
    assert absent.left_s(FH, b"c", 1e9)
    for version, before in (((0, 3, 3), (0, 2, 2)), ((0, 4, 4), (0, 3, 3))):
        with absent.changing({FH: [b"d"]}):
            absent.seen(FH, version, 1e9, ours=True, before=before)
        absent.seen(FH, (0, 1, 1), 0.0)  # of before it: asked then, and answered late
        assert absent.left_s(FH, b"c", 1e9)
    with absent.changing({FH: [b"d"]}):
        absent.seen(FH, (0, 6, 6), 1e9, ours=True, before=(0, 5, 5))
    assert not absent.left_s(FH, b"c", 1e9)


def begun(absent: Absent) -> set[bytes]:
    """A listing that so many misses bring."""
    begun = [absent.missed(FH, b"other", BELIEVE_S) for _ in range(MISSES)]
    assert begun[:-1] == [None] * (MISSES - 1) and begun[-1] is not None
    return begun[-1]


def test_what_is_made_while_a_directory_is_listed_is_not_absent_after() -> None:
    absent = Absent(lambda: 1.0)
    with suppress(TimedOut), absent.changing({FH: [b"given up"]}):
        raise TimedOut
    with absent.changing({FH: [b"under way"]}):
        listing = begun(absent)
    with absent.changing({FH: [b"begun later"]}):
        pass
    absent.may_be(FH, [b"seen"])
    absent.listed(FH, listing, [b"listed"], 1.0)
    for name in (b"given up", b"under way", b"begun later", b"seen", b"listed"):
        assert not absent.left_s(FH, name, BELIEVE_S), name
    assert absent.left_s(FH, b"other", BELIEVE_S)


def test_a_listing_does_not_count_when_another_client_was_seen_to_change_the_directory() -> None:
    now = 1.0
    absent = Absent(lambda: now)
    listing = begun(absent)
    absent.seen(FH, (0, 1, 1), now)
    absent.seen(FH, (0, 2, 2), now)
    assert absent.missed(FH, b"other", BELIEVE_S) is None  # one at a time
    absent.listed(FH, listing, [], now)
    assert not absent.left_s(FH, b"other", BELIEVE_S)
    now = 2.0
    again = absent.missed(FH, b"other", BELIEVE_S)
    assert again is not None and again is not listing
    absent.listed(FH, listing, [], now)  # of the first, come late
    assert not absent.left_s(FH, b"other", BELIEVE_S)


def test_names_that_begin_with_a_dot_or_differ_in_case_are_asked_for() -> None:
    absent = Absent(lambda: 1.0)
    absent.made(FH, None, 1.0)
    with absent.changing({FH: [b"README"]}):
        pass
    assert not absent.left_s(FH, b".snapshot", BELIEVE_S)
    assert not absent.left_s(FH, b"readme", BELIEVE_S)
    assert absent.left_s(FH, b"other", BELIEVE_S) == BELIEVE_S
    assert all(absent.missed(FH, b".snapshot", BELIEVE_S) is None for _ in range(2 * MISSES))


def test_the_directories_used_least_recently_are_given_up_for_others() -> None:
    absent = Absent(lambda: 1.0)
    for number in range(4):
        fh = b"%d" % number
        absent.made(fh, None, 1.0)
        absent.may_be(fh, [b"%d" % i for i in range(MOST_NAMES // 4)])
        assert absent.left_s(b"0", b"x", BELIEVE_S)
    assert [bool(absent.left_s(b"%d" % number, b"x", BELIEVE_S)) for number in range(4)] == [True, False, True, True]
    absent.may_be(b"3", [b"more %d" % i for i in range(MOST_NAMES)])
    assert not any(absent.left_s(b"%d" % number, b"x", BELIEVE_S) for number in range(4))
    for number in range(MOST_NAMES):
        absent.made(b"%d" % number, None, 1.0)
    assert absent.left_s(b"%d" % (MOST_NAMES - 1), b"x", BELIEVE_S)
    assert not absent.left_s(b"3", b"x", BELIEVE_S)
