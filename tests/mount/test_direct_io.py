"""O_DIRECT beside readers through the kernel's pages.

The kernel drops pages before an asynchronous direct write and not after it. userfaultfd(2) holds such a write in
between: the page that it writes from is not there yet.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Iterator

from tests.place import Place

_libc = ctypes.CDLL(None, use_errno=True)
_IO_SETUP, _IO_DESTROY, _IO_GETEVENTS, _IO_SUBMIT, _USERFAULTFD = 206, 207, 208, 209, 323  # x86_64
_IOCB_CMD_PWRITE = 1
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
_MODE_MISSING = 1
PAGE = mmap.PAGESIZE


def _called(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class LatePage:
    """A page of memory that is not there: who touches it waits until `come`."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._fd = _called(_USERFAULTFD, ctypes.c_int(os.O_CLOEXEC))
        fcntl.ioctl(self._fd, _UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
        fcntl.ioctl(self._fd, _UFFDIO_REGISTER, bytearray(struct.pack("QQQQ", self.address, PAGE, _MODE_MISSING, 0)))

    def touched(self) -> None:
        """Wait until somebody waits for it."""
        os.read(self._fd, 32)

    def come(self, contents: bytes) -> None:
        source = ctypes.create_string_buffer(contents, PAGE)
        copy = struct.pack("QQQQq", self.address, ctypes.addressof(source), PAGE, 0, 0)
        fcntl.ioctl(self._fd, _UFFDIO_COPY, bytearray(copy))

    def close(self) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def aio_write(fd: int, page: LatePage) -> Iterator[None]:
    """A page written to the start of the file by io_submit(2); done at the end."""
    context = ctypes.c_ulong()
    _called(_IO_SETUP, ctypes.c_long(1), ctypes.byref(context))
    control = ctypes.create_string_buffer(
        struct.pack("QIIHHIQQqQII", 0, 0, 0, _IOCB_CMD_PWRITE, 0, fd, page.address, PAGE, 0, 0, 0, 0)
    )
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(control))
    errors: list[OSError] = []

    def submit() -> None:
        try:
            _called(_IO_SUBMIT, context, ctypes.c_long(1), pointers)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        yield
        thread.join(60)
        assert not thread.is_alive() and not errors
        event = ctypes.create_string_buffer(32)
        _called(_IO_GETEVENTS, context, ctypes.c_long(1), ctypes.c_long(1), event, None)
        assert struct.unpack_from("q", event, 16)[0] == PAGE
    finally:
        _called(_IO_DESTROY, context)


@contextlib.contextmanager
def opened(path: object, flags: int) -> Iterator[int]:
    fd = os.open(str(path), flags)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_reader_beside_an_asynchronous_direct_write_sees_the_new_bytes_when_it_is_done(place: Place) -> None:
    (place.there / "file").write_bytes(b"o" * PAGE)
    page = LatePage()
    with contextlib.closing(page), opened(place.here / "file", os.O_RDWR | os.O_DIRECT) as fd:
        with opened(place.here / "file", os.O_RDONLY) as reader:
            with aio_write(fd, page):
                page.touched()  # the kernel has dropped the pages
                assert os.pread(reader, PAGE, 0) == b"o" * PAGE
                page.come(b"n" * PAGE)
            assert os.pread(reader, PAGE, 0) == b"n" * PAGE


def test_a_reader_that_closed_during_a_direct_write_opens_the_new_bytes(place: Place) -> None:
    (place.there / "file").write_bytes(b"o" * PAGE)
    page = LatePage()
    with contextlib.closing(page), opened(place.here / "file", os.O_RDWR | os.O_DIRECT) as fd:
        with aio_write(fd, page):
            page.touched()
            with opened(place.here / "file", os.O_RDONLY) as reader:
                assert os.pread(reader, PAGE, 0) == b"o" * PAGE
            page.come(b"n" * PAGE)
        os.fsync(fd)
    with opened(place.here / "file", os.O_RDONLY) as reader:
        assert os.pread(reader, PAGE, 0) == b"n" * PAGE
