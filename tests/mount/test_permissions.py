"""Permissions as the server sees them: uid, gid and groups of the caller go into every call."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount
from tests.place import Place, wait_until

ALICE, BOB, STAFF = 12345, 12346, 23456


def as_user(uid: int, code: str, path: Path, *, groups: tuple[int, ...] = ()) -> str:
    """Run Python code as another user; returns what it printed, EACCES and the like on an OSError.

    In a forked child, since the interpreter itself may lie where that user cannot execute it.
    """
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        printed: list[str] = []
        try:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            exec(code, {"os": os, "path": str(path), "print": lambda x: printed.append(str(x))})
        except OSError as error:
            printed.append(errno.errorcode[error.errno or 0])
        finally:
            os.write(into, "".join(printed).encode())
            os._exit(0)
    os.close(into)
    with open(out, "rb") as pipe:
        result = pipe.read().decode()
    os.waitpid(child, 0)
    return result


READ = "print(open(path).read())"
WRITE = "open(path, 'w').write('x'); print('ok')"


def test_a_file_of_one_user_is_closed_to_another(place: Place) -> None:
    os.chmod(place.there, 0o777)
    path = place.here / "private"
    assert as_user(ALICE, WRITE, path) == "ok"
    os.chmod(place.there / "private", 0o600)
    assert os.stat(place.there / "private").st_uid == ALICE
    assert as_user(ALICE, READ, path) == "x"
    assert as_user(BOB, READ, path) == "EACCES"
    assert as_user(BOB, WRITE, path) == "EACCES"


def test_supplementary_groups_count(place: Place) -> None:
    (place.there / "shared").write_text("for staff")
    os.chown(place.there / "shared", ALICE, STAFF)
    os.chmod(place.there / "shared", 0o660)
    assert as_user(BOB, READ, place.here / "shared") == "EACCES"
    assert as_user(BOB, READ, place.here / "shared", groups=(99, STAFF)) == "for staff"
    assert as_user(BOB, WRITE, place.here / "shared", groups=(STAFF,)) == "ok"


def test_a_directory_without_x_hides_what_another_user_has_seen(place: Place) -> None:
    (place.there / "dir").mkdir()
    (place.there / "dir/file").write_text("seen")
    os.chown(place.there / "dir", ALICE, ALICE)
    os.chmod(place.there / "dir", 0o700)
    assert as_user(ALICE, READ, place.here / "dir/file") == "seen"
    assert as_user(BOB, READ, place.here / "dir/file") == "EACCES"
    assert as_user(BOB, "print(os.stat(path))", place.here / "dir/file") == "EACCES"


def test_a_directory_that_may_be_listed_and_not_entered_shows_names_only(place: Place) -> None:
    (place.there / "dir").mkdir()
    (place.there / "dir/file").touch()
    os.chmod(place.there / "dir", 0o744)
    assert as_user(BOB, "print(os.listdir(path))", place.here / "dir") == "['file']"


def test_only_the_owner_changes_mode_and_times(place: Place) -> None:
    (place.there / "file").touch()
    os.chown(place.there / "file", ALICE, STAFF)
    os.chmod(place.there / "file", 0o664)
    path = place.here / "file"
    assert as_user(BOB, "os.chmod(path, 0o777)", path) == "EPERM"
    assert as_user(BOB, "os.utime(path, (1, 1))", path) in ("EPERM", "EACCES")
    # Who may write may set the times to now.
    assert as_user(BOB, "os.utime(path); print('ok')", path, groups=(STAFF,)) == "ok"
    assert as_user(ALICE, "os.chmod(path, 0o600); print('ok')", path) == "ok"


def test_a_sticky_directory_protects_the_files_of_others(place: Place) -> None:
    os.chmod(place.there, 0o1777)
    assert as_user(ALICE, WRITE, place.here / "file") == "ok"
    assert as_user(BOB, "os.unlink(path)", place.here / "file") in ("EPERM", "EACCES")


def test_a_program_that_may_be_executed_and_not_read_runs(place: Place) -> None:
    (place.there / "true").write_bytes(Path("/bin/true").read_bytes())
    os.chmod(place.there / "true", 0o711)
    done = subprocess.run([place.here / "true"], user=ALICE, group=ALICE, extra_groups=[], check=False)
    assert done.returncode == 0


def test_an_open_file_stays_writable_after_its_mode_was_taken_away(place: Place) -> None:
    os.chmod(place.there, 0o777)
    code = (
        "f = open(path, 'wb', buffering=0)\nf.write(b'1')\nos.chmod(path, 0o400)\n"
        "f.write(b'2')\nf.close()\nprint('ok')"
    )
    assert as_user(ALICE, code, place.here / "file") == "ok"
    assert (place.there / "file").read_bytes() == b"12"


def test_under_root_squash_root_is_nobody(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("squashed")
    with Ganesha(root, squash="Root_Squash") as server, Mount(server, root / "mnt") as mount:
        here, there = mount.path, server.directory
        (there / "root-only").write_text("secret")
        os.chmod(there / "root-only", 0o600)
        with pytest.raises(PermissionError):
            (here / "root-only").read_text()
        os.chmod(there, 0o755)
        with pytest.raises(PermissionError):
            (here / "new").touch()
        os.chmod(there, 0o777)
        (here / "new").touch()
        assert os.stat(there / "new").st_uid == 65534


def test_who_may_not_link_an_open_file_may_replace_it_by_rename(place: Place) -> None:
    """Linux refuses hard links to the files of others (fs.protected_hardlinks)."""
    place.there.chmod(0o777)
    (place.here / "file").write_bytes(b"of root")
    with open(place.here / "file", "rb") as held:
        replace = "open(path + '.new', 'w').write('of bob'); os.rename(path + '.new', path); print('ok')"
        assert as_user(BOB, replace, place.here / "file") == "ok"
        assert held.read() == b"of root"
        assert (place.here / "file").read_bytes() == b"of bob"
        assert sum(name.startswith(".nfs") for name in os.listdir(place.there)) == 1
    wait_until(lambda: os.listdir(place.there) == ["file"])  # it was opened within the last second
