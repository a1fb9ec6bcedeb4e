"""close-to-open, strict and immutable, each with two mounts and with a change made on the server."""

import errno
import mmap
import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.place import Place


def test_strict_shows_another_clients_write_at_once(mount_factory: MountFactory, place: Place) -> None:
    a, b = (place.through(mount_factory("consistency=strict")) for _ in range(2))
    (a / "file").write_bytes(b"first")
    reader = os.open(b / "file", os.O_RDONLY)
    writer = os.open(a / "file", os.O_WRONLY)
    try:
        assert os.pread(reader, 100, 0) == b"first"
        for contents in (b"other", b"again"):
            os.pwrite(writer, contents, 0)
            os.fsync(writer)
            assert os.pread(reader, 100, 0) == contents  # no open in between
        (place.there / "file").write_bytes(b"by the server")
        assert os.pread(reader, 100, 0) == b"by the server"
        assert os.fstat(reader).st_size == 13
        (place.there / "new").touch()
        assert (b / "new").exists()
        (place.there / "new").unlink()
        assert not (b / "new").exists()
    finally:
        os.close(reader)
        os.close(writer)


def test_strict_maps_files_shared(mount_factory: MountFactory, place: Place) -> None:
    """As SQLite's WAL, LMDB and np.load(mmap_mode="r") do."""
    (place.there / "file").write_bytes(b"contents".ljust(8192))
    here = place.through(mount_factory("consistency=strict"))
    with open(here / "file", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:8] == b"contents"
    with open(here / "file", "r+b") as both, mmap.mmap(both.fileno(), 0) as mapped:
        mapped[:8] = b"replaced"
        mapped.flush()
        assert os.pread(both.fileno(), 8, 0) == b"replaced"
        os.pwrite(both.fileno(), b"written ", 4096)
        assert mapped[4096:4104] == b"written "
    assert (place.there / "file").read_bytes() == b"replaced".ljust(4096) + b"written ".ljust(4096)


def test_immutable_asks_nothing_twice_and_changes_nothing(mount_factory: MountFactory, place: Place) -> None:
    (place.there / "file").write_bytes(b"as it was")
    here = place.through(mount_factory("consistency=immutable"))
    assert (here / "file").read_bytes() == b"as it was"
    (place.there / "file").write_bytes(b"something else")
    time.sleep(3.5)  # longer than acregmin, which would show it to a close-to-open mount
    assert (here / "file").read_bytes() == b"as it was"
    assert (here / "file").stat().st_size == 9
    for change in (lambda: (here / "file").write_bytes(b""), (here / "new").touch):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS


def test_immutable_serves_files_that_the_kernel_opens_by_itself(mount_factory: MountFactory, place: Place) -> None:
    contents = {f"file-{i:04}": random.Random(i).randbytes(random.Random(i).randrange(0, 300_000)) for i in range(1200)}
    contents["large"] = random.Random(-1).randbytes(40 * 1024 * 1024)
    for name, data in contents.items():
        (place.there / name).write_bytes(data)
    mount = mount_factory("consistency=immutable")
    here = place.through(mount)
    assert set(os.listdir(here)) == set(contents)

    def read_all(seed: int) -> None:
        for name in random.Random(seed).sample(sorted(contents), len(contents)):
            assert (here / name).read_bytes() == contents[name], name

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(read_all, seed) for seed in range(4)]:
            done.result()
    with open(here / "large", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        mount.daemon_may_die = True
        os.kill(int(str(mount.status()["daemon_pid"])), signal.SIGKILL)
        Path("/proc/sys/vm/drop_caches").write_text("1")
        assert mapped[:] == contents["large"]  # read by another daemon, which never saw an OPEN
    reader = subprocess.Popen(["cat", here / "missing", here / "large"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reader.kill()
    reader.communicate()
    read_all(5)


def test_rules_set_the_consistency_by_path(mount_factory: MountFactory, place: Place, tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text("# data sets never change\n*.frozen immutable\n/**/live strict\n")
    for name in ("set.frozen", "live", "other"):
        (place.there / name).mkdir()
        (place.there / name / "file").write_bytes(b"first")
    here = place.through(mount_factory(f"rules={rules}"))
    fds = {name: os.open(here / name / "file", os.O_RDONLY) for name in ("set.frozen", "live", "other")}
    try:
        assert all(os.pread(fd, 10, 0) == b"first" for fd in fds.values())
        for name in fds:
            (place.there / name / "file").write_bytes(b"after")
        assert os.pread(fds["live"], 10, 0) == b"after"
        assert (here / "other" / "file").read_bytes() == b"after"
        assert (here / "set.frozen" / "file").read_bytes() == b"first"
        with pytest.raises(OSError) as caught:
            (here / "set.frozen" / "file").unlink()
        assert caught.value.errno == errno.EROFS
        (here / "live" / "new").touch()
    finally:
        for fd in fds.values():
            os.close(fd)
