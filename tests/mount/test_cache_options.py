"""Bad cache options get one clear line, before anything starts."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.bed import Ganesha, efcfs, is_mounted
from tests.conftest import MountFactory


def refused(server: Ganesha, tmp_path: Path, options: str) -> str:
    """The one line of a mount that fails and leaves nothing."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir(exist_ok=True)
    ports = f"port={server.port},mountport={server.mount_port}"
    done = efcfs("mount", "-o", f"{ports},{options}", f"127.0.0.1:{server.export}", str(mountpoint))
    assert done.returncode == 1, done
    assert not is_mounted(mountpoint)
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("mem=lots", "'lots' is not a size"),
        ("mem=101%", "'101%' is not a size"),
        ("mem=900t", "the machine has"),
        ("mem=8m", "at least 16m, or 0 for no cache"),
        ("ssd=/var/tmp:0", "nothing fits into 0 bytes"),
        ("ssd=relative:1g", "expected a directory and a size"),
        ("ssd=/no/such/place:1g", "/no/such/place is missing: `mkdir -p"),
        ("ssd=/etc/passwd:1g", "is not a directory"),
        ("ssd=/var/tmp:900t", "the disk has only"),
        ("ssd=/var/lib:1m,ssd=/var/lib/:2m", "given twice"),
        ("ssd=/var/tmp:1m", "others can write to /var/tmp (mode 1777): name a directory that only you can write to"),
        ("ssd=/proc:1m", "/proc is not writable"),
        ("verify=some", "expected ssd or all"),
        ("consistency=sloppy", "expected close-to-open, strict or immutable"),
        ("rules=/no/such/rules", "/no/such/rules"),
        ("consistancy=strict", "did you mean consistency?"),
    ],
)
def test_a_bad_cache_option_is_named_with_its_remedy(
    server: Ganesha, tmp_path: Path, options: str, said: str
) -> None:
    assert said in refused(server, tmp_path, options)


def test_a_bad_line_of_a_rules_file_is_named(server: Ganesha, tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("/a strict\n\n/b eventually\n")
    assert "line 3: '/b eventually'" in refused(server, tmp_path, f"rules={tmp_path}/rules")


def test_rules_that_are_too_many_are_refused(server: Ganesha, tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("".join(f"/a/directory/with/a/long/name/{i} strict\n" for i in range(1000)))
    assert "more than 32 KiB" in refused(server, tmp_path, f"rules={tmp_path}/rules")


def test_an_upgrade_to_a_cache_that_cannot_be_is_refused(tmp_path: Path, mount_factory: MountFactory) -> None:
    mounted = mount_factory()
    done = efcfs("upgrade", "-o", f"ssd={tmp_path}/missing:1g", str(mounted.path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "/missing is missing: `mkdir -p" in line


def test_a_cache_on_a_network_file_system_is_refused(
    server: Ganesha, tmp_path: Path, mount_factory: MountFactory, export: Path
) -> None:
    remote = mount_factory("").path / export.name
    assert "network file system" in refused(server, tmp_path, f"ssd={remote}:1m")


def test_a_read_only_disk_is_refused(server: Ganesha, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", disk], check=True)
    try:
        assert "not writable" in refused(server, tmp_path, f"ssd={disk}:1m")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_index_of_another_kind_is_put_aside_and_the_mount_works(
    server: Ganesha, tmp_path: Path, mount_factory: MountFactory
) -> None:
    from efcfs.cache import index as module  # noqa: PLC0415

    disk = tmp_path / "disk"
    disk.mkdir()
    ours = module.Index(disk, durable=True)
    with ours.env.begin(write=True, db=ours.meta) as txn:
        txn.put(b"format", b"efcfs cache 1, chunks of 4096, extents of 4096")
    ours.close()
    mounted = mount_factory(f"ssd={disk}:1m")
    tiers = mounted.status()["tiers"]
    assert isinstance(tiers, list) and [t["state"] for t in tiers] == ["up", "up"]
    assert len(list(disk.glob("index.bad-*"))) == 1
    assert os.path.ismount(mounted.path)
