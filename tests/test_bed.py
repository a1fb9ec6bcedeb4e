"""The bed does what it says: a server to libnfs' own tools, the proxy to bare sockets."""

import contextlib
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed import NFS, Ganesha, Proxy, answers_null
from tests.place import wait_until

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ganesha]:
    """A server that may be stopped and killed: no mount of another test depends on it."""
    with Ganesha(tmp_path_factory.mktemp("own")) as server:
        yield server


class Echo(socketserver.BaseRequestHandler):
    """Sends back what comes."""

    def handle(self) -> None:
        try:
            while data := self.request.recv(MEGABYTE):
                self.request.sendall(data)
        except OSError:  # the proxy was cut
            return


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy to a server that echoes."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as echo:
        echo.daemon_threads, echo.block_on_close = True, False
        threading.Thread(target=echo.serve_forever, args=(0.01,), daemon=True).start()
        with Proxy(echo.server_address[1]) as running:
            yield running
        echo.shutdown()


def connect(proxy: Proxy, timeout_s: float = 10) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", proxy.port), timeout=timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def round_trip_s(sock: socket.socket, data: bytes = b"x") -> float:
    """Seconds until all of `data` has come back."""
    started = time.monotonic()

    def send() -> None:
        with contextlib.suppress(OSError):  # cut: who receives notices
            sock.sendall(data)

    sender = threading.Thread(target=send)
    sender.start()
    missing = len(data)
    while missing:
        got = len(sock.recv(min(missing, MEGABYTE)))
        assert got, "the connection ended"
        missing -= got
    sender.join()
    return time.monotonic() - started


def libnfs(server: Ganesha, *command: str) -> bytes:
    """Run a tool of libnfs; a name that starts with @ is a path in the export."""
    url = f"nfs://127.0.0.1{server.export}/%s?nfsport={server.port}&mountport={server.mount_port}&version=3"
    arguments = [url % word[1:] if word.startswith("@") else word for word in command]
    return subprocess.run(arguments, capture_output=True, check=True, timeout=20).stdout


def test_libnfs_sees_what_lies_in_the_exported_directory(own: Ganesha) -> None:
    (own.directory / "hello").write_bytes(b"from the disk")
    assert libnfs(own, "nfs-cat", "@hello") == b"from the disk"
    assert b"hello" in libnfs(own, "nfs-ls", "@")


def test_a_restarted_server_reads_and_writes_at_once(own: Ganesha, tmp_path: Path) -> None:
    (own.directory / "before").write_bytes(b"kept")
    (tmp_path / "local").write_bytes(b"written after")
    ports = own.port, own.mount_port
    started = time.monotonic()
    own.restart()
    assert libnfs(own, "nfs-cat", "@before") == b"kept"
    libnfs(own, "nfs-cp", str(tmp_path / "local"), "@after")
    assert time.monotonic() - started < 10  # no grace period, which would be 90 s
    assert (own.directory / "after").read_bytes() == b"written after"
    assert (own.port, own.mount_port) == ports


def test_a_paused_server_takes_connections_and_answers_when_resumed(own: Ganesha) -> None:
    own.pause()
    try:
        socket.create_connection(("127.0.0.1", own.port), timeout=1).close()
        assert not answers_null(own.port, NFS, timeout_s=0.3)
    finally:
        own.resume()
    wait_until(lambda: answers_null(own.port, NFS))


def test_a_stopped_server_is_gone_and_can_be_started_again(own: Ganesha) -> None:
    own.stop()
    try:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", own.port), timeout=1)
    finally:
        own.start()
    assert answers_null(own.port, NFS)


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bed", "serve", str(tmp_path)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as serving:
        assert serving.stdout is not None
        ports = json.loads(serving.stdout.readline())
        assert answers_null(ports["port"], NFS)
        os.kill(serving.pid, signal.SIGKILL)
    wait_until(lambda: not answers_null(ports["port"], NFS))


def test_the_proxy_adds_its_delay_to_each_round_trip(proxy: Proxy) -> None:
    with connect(proxy) as sock:
        proxy.delay_s = 0.05
        shortest_s = min(round_trip_s(sock) for _ in range(5))
    assert 0.05 <= shortest_s < 0.065


def test_a_delay_does_not_limit_what_is_under_way(proxy: Proxy) -> None:
    with connect(proxy) as sock:
        proxy.delay_s = 0.2
        # One piece at a time (at most 256 KiB each 0.1 s) would take 12 s.
        assert round_trip_s(sock, bytes(32 * MEGABYTE)) < 3


def test_the_proxy_carries_200_megabytes_a_second(proxy: Proxy) -> None:
    with connect(proxy) as sock:
        assert 128e6 / round_trip_s(sock, bytes(128_000_000)) > 200e6


def test_a_cap_holds_for_each_connection_by_itself(proxy: Proxy) -> None:
    proxy.cap_bytes_per_s = 4 * MEGABYTE
    elapsed_s: list[float] = []

    def fetch() -> None:
        with connect(proxy) as sock:
            elapsed_s.append(round_trip_s(sock, bytes(4 * MEGABYTE)))

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The first piece (256 KiB) is free; three that share one cap would take 3 s.
    assert len(elapsed_s) == 3 and all(0.9 < each_s < 2 for each_s in elapsed_s)


def test_a_cut_ends_every_connection_and_new_ones_pass(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        round_trip_s(one)
        round_trip_s(other)
        proxy.cut()
        for sock in (one, other):
            with pytest.raises((AssertionError, ConnectionError)):
                round_trip_s(sock)
    with connect(proxy) as later:
        round_trip_s(later)


def test_frozen_connections_stay_open_and_deliver_when_thawed(proxy: Proxy) -> None:
    with connect(proxy, timeout_s=0.3) as old:
        round_trip_s(old)
        proxy.freeze()
        with connect(proxy, timeout_s=0.3) as new:
            for sock in (old, new):
                sock.sendall(b"held")
                with pytest.raises(TimeoutError):
                    sock.recv(4)
            proxy.thaw()
            for sock in (old, new):
                sock.settimeout(10)
                assert sock.recv(4, socket.MSG_WAITALL) == b"held"
                round_trip_s(sock)


def test_freezing_the_first_connections_spares_the_others(proxy: Proxy) -> None:
    with connect(proxy, timeout_s=0.3) as first, connect(proxy) as second:
        round_trip_s(first)
        round_trip_s(second)
        proxy.freeze(first=1)
        round_trip_s(second)
        with connect(proxy) as third:
            round_trip_s(third)
        first.sendall(b"x")
        with pytest.raises(TimeoutError):
            first.recv(1)


def test_a_refusing_proxy_takes_no_new_connection_and_keeps_the_old(proxy: Proxy) -> None:
    with connect(proxy) as sock:
        round_trip_s(sock)
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        round_trip_s(sock)


def test_the_proxy_counts_connections_and_bytes_to_the_client(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        round_trip_s(one, bytes(1000))
        round_trip_s(other, bytes(2000))
        assert (proxy.connections, proxy.bytes_to_client) == (2, 3000)
