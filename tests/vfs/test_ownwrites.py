"""Own writes told from others' by wcc_data, whatever the order of the replies."""

from hypothesis import given, settings
from hypothesis import strategies as st

from efcfs.vfs.ownwrites import OwnWrites, Version

START: Version = (10, 1, 1)


def _after(number: int) -> Version:
    return (10 + number, number + 1, number + 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8).flatmap(lambda k: st.tuples(st.permutations(range(k)), st.none() | st.integers(0, k))))
def test_writes_in_any_order_are_ours_unless_somebody_wrote_between(drawn: tuple[list[int], int | None]) -> None:
    """`foreign`: before which of our writes another client writes; after the last it leaves no trace in the replies."""
    order, foreign = drawn
    replies = []
    version, clock = START, 0
    for number in range(len(order)):
        if number == foreign:
            clock += 1
            version = _after(clock)
        clock += 1
        replies.append((version, _after(clock)))
        version = _after(clock)
    own = OwnWrites(START)
    for number in order:
        own.replied(*replies[number])
    seen = foreign is not None and foreign < len(order)
    assert own.final() == (None if seen else version)


def test_a_commit_that_finds_another_version_shows_a_foreign_write() -> None:
    own = OwnWrites(START)
    own.replied(START, _after(1))
    own.replied(_after(1), _after(1))
    assert own.final() == _after(1)
    own.replied(_after(2), _after(2))
    assert own.final() is None


def test_nothing_is_proved_without_what_was_before() -> None:
    own = OwnWrites(START)
    own.replied(None, _after(1))
    assert own.final() is None
    unknown = OwnWrites(None)
    unknown.replied(START, _after(1))
    assert unknown.final() is None


def test_two_writes_that_say_they_followed_the_same_version_prove_nothing() -> None:
    own = OwnWrites(START)
    own.replied(START, _after(1))
    own.replied(START, _after(2))
    assert own.final() is None
