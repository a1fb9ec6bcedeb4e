"""`efcfs warmup` and `efcfs cache`, as a user calls them."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount, efcfs
from tests.mount.test_cache import MIB, Watched, read
from tests.place import wait_until


@pytest.fixture
def tree(server: Ganesha, export: Path, tmp_path: Path) -> Iterator[tuple[Watched, Path, dict[str, bytes]]]:
    """A mount of a tree of 21 files, none of it read yet."""
    files = {f"d{i % 3}/{i}.bin": random.Random(i).randbytes(100_000 * i) for i in range(20)}
    files["d0/readme.txt"] = b"not a .bin"
    for name, contents in files.items():
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_bytes(contents)
    with Watched(server, tmp_path / "mnt", "mem=256m,nocto,actimeo=600") as watched:
        yield watched, watched.mount.path / export.name, files


def test_a_warmed_tree_is_read_without_the_network(tree: tuple[Watched, Path, dict[str, bytes]]) -> None:
    watched, here, files = tree
    done = efcfs("warmup", str(here))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"done: 21 files, {sum(map(len, files.values())) / 1e6:,.1f} MB")
    assert done.stderr == ""  # a progress bar is for terminals
    before = watched.fetched()
    for name, contents in files.items():
        assert (here / name).read_bytes() == contents
    assert watched.fetched() - before < 20_000


def test_check_tells_how_much_is_cached_and_evict_takes_it_out(
    tree: tuple[Watched, Path, dict[str, bytes]]
) -> None:
    _, here, files = tree
    assert efcfs("warmup", str(here / "d1")).returncode == 0
    in_d1 = sum(len(c) for n, c in files.items() if n.startswith("d1/"))
    total = sum(map(len, files.values()))
    told = efcfs("warmup", "--check", str(here)).stdout
    assert told.startswith(f"21 files, {total / 1e6:,.1f} MB; cached and verified: mem {in_d1 / 1e6:,.1f} MB")
    assert told.endswith(f"({100 * in_d1 // total} %)\n")
    assert efcfs("cache", "evict", str(here / "d1")).returncode == 0
    assert "mem 0.0 MB" in efcfs("warmup", "--check", str(here)).stdout


def test_match_and_list_choose_the_files(tree: tuple[Watched, Path, dict[str, bytes]], tmp_path: Path) -> None:
    _, here, _ = tree
    assert efcfs("warmup", "--match", "*.txt", str(here)).stdout.startswith("done: 1 files")
    (tmp_path / "list").write_text(f"{here}/d0/3.bin\n{here}/d1/1.bin\n")
    assert efcfs("warmup", "--list", str(tmp_path / "list")).stdout.startswith("done: 2 files, 0.4 MB")
    assert efcfs("warmup", "--metadata-only", str(here)).stdout.startswith("done: 21 files, 0.0 MB")


def test_a_job_in_the_background_keeps_its_rate_and_can_be_cancelled(
    tree: tuple[Watched, Path, dict[str, bytes]]
) -> None:
    watched, here, _ = tree
    before = watched.fetched()
    done = efcfs("warmup", "--background", "--rate", "2m", str(here))
    assert done.returncode == 0 and "job 1 runs" in done.stdout
    wait_until(lambda: watched.fetched() - before > 2 * MIB)
    assert efcfs("warmup", "--cancel", str(here)).stdout.strip().endswith(": 1 cancelled")
    fetched = watched.fetched()
    assert fetched - before < 10 * MIB  # all would be 19 MB
    assert read(here / "d0/readme.txt") == b"not a .bin"


def test_what_fails_is_named(tree: tuple[Watched, Path, dict[str, bytes]]) -> None:
    _, here, _ = tree
    done = efcfs("warmup", str(here / "d0"), str(here / "missing"))
    assert done.returncode == 2
    assert f"failed: /{here.name}/missing: No such file or directory" in done.stdout


def test_resize_takes_effect_while_mounted(tree: tuple[Watched, Path, dict[str, bytes]]) -> None:
    watched, here, files = tree
    mountpoint = str(watched.mount.path)
    assert efcfs("warmup", str(here)).returncode == 0
    assert efcfs("cache", "resize", mountpoint, "mem", "8m").returncode == 0
    wait_until(lambda: int(str(watched.tier("mem")["used_bytes"])) <= 8 * MIB)
    assert watched.tier("mem")["capacity_bytes"] == 8 * MIB
    for name, contents in files.items():
        assert read(here / name) == contents


def test_clear_empties_the_cache_and_check_finds_wrong_blocks(
    tree: tuple[Watched, Path, dict[str, bytes]]
) -> None:
    watched, here, files = tree
    mountpoint = str(watched.mount.path)
    assert efcfs("warmup", str(here)).returncode == 0
    assert efcfs("cache", "check", mountpoint).returncode == 0
    size_bytes = len(files["d1/19.bin"])
    for path in Path(str(watched.tier("mem")["path"])).glob("data-*/*/*"):
        if path.stat().st_size == size_bytes:
            with open(path, "r+b") as file:
                os.pwrite(file.fileno(), bytes([file.read(1)[0] ^ 1]), 0)
    checked = efcfs("cache", "check", mountpoint)
    assert (checked.returncode, checked.stdout.splitlines()[-1]) == (2, "1 wrong blocks dropped")
    assert efcfs("cache", "clear", mountpoint).returncode == 0
    assert watched.tier("mem")["items"] == 0
    assert read(here / "d1/19.bin") == files["d1/19.bin"]
    told = efcfs("cache", "info", mountpoint).stdout.splitlines()[-1].split()
    assert told[:3] == [mountpoint, "mem", watched.tier("mem")["path"]]  # whole, though it is no terminal


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["warmup"], "warmup what?"),
        (["warmup", "/etc"], "/etc is not in an efcfs mount"),
        (["warmup", "--list", "/no/such/list"], "/no/such/list"),
        (["warmup", "--rate", "fast", "MNT"], "'fast' is not a size"),
        (["warmup", "--rate", "0", "MNT"], "--rate 0 would never end"),
        (["cache", "resize", "MNT", "mem", "900t"], "is on a disk of"),
        (["cache", "resize", "MNT", "mem", "0"], "`efcfs cache clear` empties the cache"),
        (["cache", "resize", "MNT", "mem", "huge"], "'huge' is not a size"),
        (["cache", "resize", "MNT", "tape", "1g"], "there is no tier tape"),
        (["cache", "clear", "/etc"], "/etc is not an efcfs mount"),
    ],
)
def test_bad_input_gets_one_clear_line(
    tree: tuple[Watched, Path, dict[str, bytes]], command: list[str], said: str
) -> None:
    mountpoint = str(tree[0].mount.path)
    done = efcfs(*(mountpoint if word == "MNT" else word for word in command))
    assert done.returncode in (1, 2)
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_list_may_be_of_any_length(server: Ganesha, export: Path, tmp_path: Path) -> None:
    (export / "a directory with a long name").mkdir()
    names = [f"{export.name}/a directory with a long name/{i:0100}" for i in range(2000)]
    for name in names:
        (export.parent / name).write_bytes(b"x")
    with Watched(server, tmp_path / "mnt", "mem=256m") as watched:
        (tmp_path / "list").write_text("".join(f"{watched.mount.path}/{name}\n" for name in names))
        assert efcfs("warmup", "--list", str(tmp_path / "list")).stdout.startswith("done: 2000 files")
        told = efcfs("warmup", "--list", str(tmp_path / "list"), "--check").stdout
        assert told.startswith("2000 files") and "mem 0.0 MB (100 %)" in told


def test_symbolic_links_that_are_named_are_followed(
    tree: tuple[Watched, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    _, here, _ = tree
    (here / "current").symlink_to("d1")
    (here / "d2" / "up").symlink_to("../current/../d0/readme.txt")
    (here / "out").symlink_to("/etc")
    (here / "round").symlink_to("round")
    (tmp_path / "outside").symlink_to(here)
    assert efcfs("warmup", str(here / "current")).stdout.startswith("done: 7 files")
    assert efcfs("warmup", str(here / "d2" / "up")).stdout.startswith("done: 1 files")
    assert efcfs("warmup", str(tmp_path / "outside" / "d0")).stdout.startswith("done: 8 files")
    for name, said in (("out", "is a symbolic link to /etc"), ("round", "is a symbolic link to round")):
        done = efcfs("warmup", str(here / name))
        assert done.returncode == 2 and said in done.stdout


def test_a_mount_without_a_cache_says_so(server: Ganesha, tmp_path: Path) -> None:
    with Mount(server, tmp_path / "mnt", "mem=0") as mount:
        for words in ("warmup", "warmup --check", "warmup --check --metadata-only", "cache check", "cache evict"):
            done = efcfs(*words.split(), str(mount.path))
            assert done.returncode == 2 and "has no cache: mount it with mem= or ssd=" in done.stderr
        assert efcfs("warmup", "--metadata-only", str(mount.path)).returncode == 0
        assert "no cache" in efcfs("cache", "info", str(mount.path)).stdout
        assert mount.status()["tiers"] == []


def test_a_tree_that_is_larger_than_the_cache_is_warmed_in_part_and_the_rest_is_named(
    tree: tuple[Watched, Path, dict[str, bytes]]
) -> None:
    watched, here, files = tree
    assert efcfs("cache", "resize", str(watched.mount.path), "mem", "8m").returncode == 0
    done = efcfs("warmup", str(here))
    assert done.returncode == 2 and "of the cache are in use by this job" in done.stdout
    assert int(str(watched.tier("mem")["used_bytes"])) > 4 * MIB
    for name, contents in files.items():
        assert read(here / name) == contents


def test_a_warmed_tree_takes_the_place_of_what_was_read_before(server: Ganesha, export: Path, tmp_path: Path) -> None:
    for name in ("old", "new"):
        (export / name).write_bytes(random.Random(name).randbytes(48 * MIB))
    with Watched(server, tmp_path / "mnt", "mem=64m,nocto,actimeo=600") as watched:
        here = watched.mount.path / export.name
        assert efcfs("cache", "clear", str(watched.mount.path)).returncode == 0
        assert efcfs("warmup", str(here / "old")).returncode == 0
        assert efcfs("warmup", str(here / "new")).returncode == 0
        assert "(100 %)" in efcfs("warmup", "--check", str(here / "new")).stdout


def test_what_memory_cannot_hold_is_warmed_on_the_disks(server: Ganesha, export: Path, tmp_path: Path) -> None:
    files = {f"{i}": random.Random(i).randbytes(5 * MIB + i) for i in range(30)}
    for name, data in files.items():
        (export / name).write_bytes(data)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    options = f"mem=16m,ssd={tmp_path}/one:1g,ssd={tmp_path}/two:1g"
    with Watched(server, tmp_path / "mnt", options) as watched:
        here = watched.mount.path / export.name
        assert efcfs("warmup", str(here)).returncode == 0
        assert "together 157.3 MB (100 %)" in efcfs("warmup", "--check", str(here)).stdout
        before = watched.fetched()
        assert efcfs("warmup", str(here)).returncode == 0  # has nothing to do
        assert all(read(here / name) == data for name, data in files.items())
        assert watched.fetched() - before < 10 * MIB  # of 157


def test_a_size_that_was_set_outlives_the_daemon_and_other_mounts(server: Ganesha, tmp_path: Path) -> None:
    with Watched(server, tmp_path / "mnt", "mem=64m") as watched:
        mount = watched.mount

        def capacity_bytes() -> object:
            return watched.tier("mem")["capacity_bytes"]

        assert efcfs("cache", "resize", str(mount.path), "mem", "80m").returncode == 0
        with Mount(server, tmp_path / "other"):  # which asks for no size
            assert capacity_bytes() == 80 * MIB
        assert efcfs("upgrade", "-o", "nconnect=2", str(mount.path)).returncode == 0
        assert capacity_bytes() == 80 * MIB
        mount.daemon_may_die = True
        pid = mount.status()["daemon_pid"]
        os.kill(int(str(pid)), signal.SIGKILL)
        wait_until(lambda: mount.status().get("daemon_pid") not in (pid, None))
        assert capacity_bytes() == 80 * MIB
        assert efcfs("upgrade", "-o", "mem=96m", str(mount.path)).returncode == 0
        assert capacity_bytes() == 96 * MIB
