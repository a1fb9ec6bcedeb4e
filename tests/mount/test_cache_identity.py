"""Who shares what is cached: mounts of one export, and nobody else."""

import contextlib
import json
import os
import random
from pathlib import Path

import pytest

from efcfs.cache.file import file_key
from efcfs.config import parse
from efcfs.daemon import server_identity
from efcfs.nfs.client import Known
from tests.bed import Ganesha, Mount, Proxy

MIB = 1024 * 1024


@pytest.mark.parametrize(("options", "shared"), [("", False), ("identity=on-purpose", True)])
def test_two_servers_of_one_name_share_what_is_cached_only_on_purpose(
    server: Ganesha, export: Path, tmp_path: Path, options: str, shared: bool
) -> None:
    """As by two tunnels on one host: handles, sizes and times are the same, the ports are not."""
    (export / "data").write_bytes(random.Random(1).randbytes(MIB))
    fetched = []
    with contextlib.ExitStack() as stack:
        for number in range(2):
            proxy = stack.enter_context(Proxy(server.port))
            mount = stack.enter_context(Mount(server, tmp_path / f"mnt{number}", options, port=proxy.port))
            fd = os.open(mount.path / export.name / "data", os.O_RDONLY)
            assert len(os.pread(fd, MIB, 0)) == MIB
            os.close(fd)
            fetched.append(proxy.bytes_to_client)
    assert fetched[0] > MIB
    assert (fetched[1] < MIB) == shared, json.dumps(fetched)


def identity(source: str, options: str, port: int = 2049, root_fh: bytes = b"root") -> bytes:
    return server_identity(parse(source, "/mnt", [options]), Known(("10.0.0.1",), port, root_fh, 1, 1, 1))


def test_what_identifies_an_export_is_its_name_or_host_and_port_and_its_root() -> None:
    one = identity("nas:/data", "")
    assert one == identity("nas:/other/name", "ro")
    others = [
        identity("nas2:/data", ""),
        identity("nas:/data", "", port=2050),
        identity("nas:/data", "", root_fh=b"other"),
        identity("nas:/data", "identity=nas"),
        identity("nas:/data", "identity=nas", root_fh=b"2049root"),
    ]
    assert len({one, *others}) == 6
    assert identity("nas:/data", "identity=x") == identity("10.0.0.1:/y", "identity=x", port=1)


def test_no_two_versions_have_one_key() -> None:
    versions = [(fh, *v) for fh in (b"", b"a", b"a" + bytes(8), b"b") for v in ((1, 1, 1), (1, 1, 2), (2, 1, 1))]
    assert len({file_key(b"server" + fh, size, mtime, ctime) for fh, size, mtime, ctime in versions}) == len(versions)
