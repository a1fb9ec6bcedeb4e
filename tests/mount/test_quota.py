"""A server whose disk has a real quota: btrfs in a file, with a limit on its top subvolume."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount

QUOTA_BYTES = 8 * 1024**2


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount of an export that may hold QUOTA_BYTES."""
    root = tmp_path_factory.mktemp("quota")
    disk, image = root / "disk", root / "image"
    with open(image, "wb") as file:
        file.truncate(256 * 1024**2)
    disk.mkdir()
    run("mkfs.btrfs", "-q", image)
    run("mount", "-o", "loop", image, disk)
    try:
        run("btrfs", "quota", "enable", disk)
        with Ganesha(disk / "server") as server:
            run("btrfs", "qgroup", "limit", str(QUOTA_BYTES), disk)
            with Mount(server, root / "mnt") as mounted:
                yield mounted
    finally:
        run("umount", "-l", disk)


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("tell", [os.fsync, os.close])
def test_a_write_beyond_the_quota_is_told_by_the_next_fsync_or_close(mount: Mount, tell: object) -> None:
    file = os.open(mount.path / "big", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    with pytest.raises(OSError) as failure:
        for _ in range(2 * QUOTA_BYTES // 2**20):
            assert os.write(file, os.urandom(2**20)) == 2**20
        assert callable(tell)
        tell(file)
    assert failure.value.errno == errno.EDQUOT
    if tell is os.fsync:
        os.close(file)
    os.unlink(mount.path / "big")


def test_after_room_was_made_below_the_quota_writes_succeed_again(mount: Mount) -> None:
    run("btrfs", "filesystem", "sync", mount.path.parent / "disk")  # only then is the removed file off the quota
    (mount.path / "small").write_bytes(b"fits")
    assert (mount.path / "small").read_bytes() == b"fits"
