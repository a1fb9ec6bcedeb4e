"""What a daemon says as it ends."""

import pytest
import trio

from efcfs.daemon import beginning


def test_a_want_of_memory_that_trio_met_is_told_as_that() -> None:
    with pytest.raises(trio.TrioInternalError) as told:
        raise trio.TrioInternalError("please file a bug") from ExceptionGroup("two", [MemoryError(), AssertionError()])
    assert beginning(told.value) == "MemoryError"


def test_an_error_of_our_own_is_told_in_its_words() -> None:
    assert beginning(ExceptionGroup("two", [ValueError("it is Tuesday"), KeyError("second")])) == "it is Tuesday"
