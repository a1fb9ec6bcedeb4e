"""FUSE_INIT: what is added to libfuse's answer (struct fuse_init_out of <linux/fuse.h>)."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from efcfs.fuse.session import (
    CONGESTION_THRESHOLD,
    FUSE_AUTO_INVAL_DATA,
    FUSE_CACHE_SYMLINKS,
    FUSE_DIRECT_IO_ALLOW_MMAP,
    FUSE_EXPLICIT_INVAL_DATA,
    FUSE_HANDLE_KILLPRIV_V2,
    FUSE_INIT_EXT,
    FUSE_PARALLEL_DIROPS,
    MAX_BACKGROUND,
    amend_init_reply,
)

ADDED = (
    FUSE_PARALLEL_DIROPS | FUSE_CACHE_SYMLINKS | FUSE_EXPLICIT_INVAL_DATA | FUSE_HANDLE_KILLPRIV_V2 | FUSE_INIT_EXT
)
MEGABYTE = 1 << 20
FLAGS = st.integers(0, 2**32 - 1)


def init_request(offered: int, offered2: int = 0) -> bytes:
    header = struct.pack("<IIQQIIIHH", 104, 26, 2, 0, 0, 0, 0, 0, 0)
    return header + struct.pack("<IIIII", 7, 45, MEGABYTE, offered, offered2) + bytes(44)


def init_reply(flags: int) -> bytes:
    out = struct.pack("<IIIIHHIIHHI", 7, 36, MEGABYTE, flags, 0, 0, MEGABYTE, 1, 256, 0, 0) + bytes(28)
    return struct.pack("<IiQ", 16 + len(out), 0, 2) + out


@given(FLAGS, FLAGS)
def test_flags_are_added_only_when_the_kernel_offers_them(offered: int, answered: int) -> None:
    amended = amend_init_reply(init_request(offered), init_reply(answered))
    (flags,) = struct.unpack_from("<I", amended, 16 + 12)
    assert flags & ADDED == (offered | answered) & ADDED
    assert not flags & FUSE_AUTO_INVAL_DATA
    assert flags & ~ADDED & ~FUSE_AUTO_INVAL_DATA == answered & ~ADDED & ~FUSE_AUTO_INVAL_DATA


@given(FLAGS, FLAGS, FLAGS)
def test_flags_of_the_second_word_count_only_with_the_bit_that_says_so(
    offered: int, answered: int, offered2: int
) -> None:
    amended = amend_init_reply(init_request(offered, offered2), init_reply(answered))
    (flags2,) = struct.unpack_from("<I", amended, 16 + 32)
    extended = (offered | answered) & FUSE_INIT_EXT
    assert flags2 == (offered2 & FUSE_DIRECT_IO_ALLOW_MMAP if extended else 0)


def test_many_requests_may_wait_and_everything_else_stays_as_libfuse_said() -> None:
    reply = init_reply(0)
    amended = amend_init_reply(init_request(0), reply)
    assert struct.unpack_from("<HH", amended, 16 + 16) == (MAX_BACKGROUND, CONGESTION_THRESHOLD)
    assert amended[:32] + bytes(4) + amended[36:] == reply
