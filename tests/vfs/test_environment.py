"""LMDB in memory that is allocated before: what a kill leaves, and what happens where there is no room."""

import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from efcfs.nfs.nfs3 import NF3REG, Fattr
from efcfs.vfs.environment import RESERVED_BYTES, Environment
from efcfs.vfs.inodes import ROOT_INO, Found, Inodes

# Says each number when it is committed in both databases; the one of 200 before is gone then. Keys come in no order.
WRITING = """
import hashlib, os, sys
from pathlib import Path
import lmdb
from efcfs.vfs.environment import Environment

path, writemap, number = Path(sys.argv[1]), sys.argv[2] == "writemap", int(sys.argv[3])
if writemap:
    env = Environment(path, databases=2)
    change = env.change
    one, two = env.database(b"one"), env.database(b"two")
else:  # as efcfs opened it before it used WRITEMAP
    env = lmdb.open(str(path), map_size=4 << 30, max_dbs=2, sync=False, metasync=False)
    one, two = env.open_db(b"one"), env.open_db(b"two")
    def change(work):
        with env.begin(write=True) as txn:
            work(txn)
def key(number):
    return hashlib.sha256(b"%d" % number).digest()
def write(txn):
    txn.put(key(number), b"%d" % number * 40, db=one)
    txn.put(b"%d" % number, key(number) * 5, db=two)
    txn.delete(key(number - 200), db=one)
    txn.delete(b"%d" % (number - 200), db=two)
while True:
    change(write)
    os.write(1, b"%d\\n" % number)
    number += 1
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def test_what_was_committed_is_there_whole_whenever_the_writer_is_killed(directory: Path) -> None:
    rng, next_number = random.Random(23), 0
    for kill in range(60):
        how = "plain" if kill % 4 == 3 else "writemap"
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITING, directory / "env", how, str(next_number)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        with writer, writer.stdout:
            first = writer.stdout.readline()
            until = time.perf_counter() + rng.random() * 0.03
            while time.perf_counter() < until:
                pass  # to be killed at a moment of no pattern
            writer.kill()
            acknowledged = int((first + writer.stdout.read()).split(b"\n")[-2])
        env = Environment(directory / "env", databases=2)
        one, two = env.database(b"one"), env.database(b"two")
        with contextlib.closing(env), env.read(one) as txn:
            numbers = sorted(int(value[: len(value) // 40]) for _, value in txn.cursor())
            last = numbers[-1]
            assert last in (acknowledged, acknowledged + 1)
            assert numbers == list(range(max(0, last - 199), last + 1))
            for number in numbers:
                keys = txn.get(b"%d" % number, db=two)
                assert keys is not None and txn.get(bytes(keys[:32])) == b"%d" % number * 40
            assert txn.stat(two)["entries"] == len(numbers)
        next_number = last + 1


def test_a_file_grows_and_all_of_it_is_memory_that_it_has(directory: Path) -> None:
    env = Environment(directory / "env", databases=1)
    with contextlib.closing(env):
        database = env.database(b"one")
        for start in range(0, 30_000, 100):

            def write(txn: object, start: int = start) -> None:
                for number in range(start, start + 100):
                    txn.put(b"%d" % number, bytes(1000), db=database)  # type: ignore[attr-defined]

            env.change(write)
        with env.read(database) as txn:
            assert txn.stat(database)["entries"] == 30_000
    status = (directory / "env" / "data.mdb").stat()
    assert status.st_blocks * 512 >= status.st_size > 30_000_000 > 3 * RESERVED_BYTES


def test_who_rejoins_has_what_another_process_wrote_into_a_longer_file(directory: Path) -> None:
    env = Environment(directory / "env", databases=2)
    with contextlib.closing(env):
        one = env.database(b"one")
        env.change(lambda txn: txn.put(b"first", b"1", db=one))
        other = (
            "import sys; from pathlib import Path; from efcfs.vfs.environment import Environment\n"
            "env = Environment(Path(sys.argv[1]), databases=2); one = env.database(b'one')\n"
            "for i in range(3000): env.change(lambda txn: txn.put(b'%d' % i, bytes(10_000), db=one))\n"
        )
        subprocess.run([sys.executable, "-c", other, directory / "env"], check=True)
        env.rejoin()
        assert env.get(b"2999", one) == bytes(10_000)
        env.change(lambda txn: txn.put(b"last", b"2", db=one))
        assert env.get(b"first", one) == b"1" and env.get(b"last", one) == b"2"


# With what is full, and what there is room for again.
FULL = """
import contextlib, os, sys
from pathlib import Path
from efcfs.nfs.nfs3 import NF3REG, Fattr
from efcfs.vfs.inodes import Found, Inodes

def enter(number):
    attr = Fattr(NF3REG, 0o644, 1, 0, 0, 0, 0, 0, 0, 1, number, number, number, number)
    return inodes.enter([Found(1, b"%d" % number, b"handle %d" % number, attr)])[0].ino

def fill(but_bytes=0):
    with open("/dev/shm/rest", "wb", buffering=0) as rest, contextlib.suppress(OSError):
        while True:
            rest.write(bytes(4096))
    os.truncate("/dev/shm/rest", os.path.getsize("/dev/shm/rest") - but_bytes)

if sys.argv[1] == "from the start":
    fill(but_bytes=600_000)
inodes = Inodes(Path("/dev/shm"), b"root")
if sys.argv[1] == "later":
    fill()
entered = 2
try:
    while True:
        assert enter(entered) == entered
        entered += 1
except OSError as error:
    print(error.strerror)
assert entered > (10_000 if sys.argv[1] == "later" else 100), entered
before = len(inodes)
os.remove("/dev/shm/rest")
for number in range(entered, entered + 10_000):
    assert enter(number) == number
assert len(inodes) == before + 10_000
assert inodes.at(1, b"2").nlookup == 1
print("fine")
"""


@pytest.mark.parametrize("when", ["later", "from the start"])
def test_a_full_dev_shm_is_an_error_and_nothing_remains_of_what_failed(tmp_path: Path, when: str) -> None:
    (tmp_path / "full").write_text(FULL)
    script = f"mount -t tmpfs -o size=24m small /dev/shm && exec {sys.executable} {tmp_path}/full '{when}'"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "no room for identities: /dev/shm is full\nfine\n"), done


def test_a_transaction_that_is_tried_again_in_a_longer_file_counts_each_lookup_once(directory: Path) -> None:
    inodes = Inodes(directory, b"root")
    with contextlib.closing(inodes):
        file = directory / "inodes.lmdb" / "data.mdb"
        lengths = {file.stat().st_size}
        for start in range(2, 60_002, 1000):
            names = [
                Found(ROOT_INO, b"%d" % i, b"handle %d" % i, Fattr(NF3REG, 0o644, 1, 0, 0, 0, 0, 0, 0, 1, i, i, i, i))
                for i in range(start, start + 1000)
            ]
            assert [(inode.ino, inode.nlookup) for inode in inodes.enter(names)] == [
                (i, 1) for i in range(start, start + 1000)
            ]
            assert {inode.nlookup for inode in inodes.enter(names)} == {2}
            lengths.add(file.stat().st_size)
        assert len(lengths) > 5
        assert all(inodes.get(i).nlookup == 2 for i in range(2, 60_002, 777))
