"""Files with set-id bits: who may write them does, and the bits go, as on any other file system."""

import os
import subprocess
from pathlib import Path

from tests.mount.test_permissions import as_user
from tests.place import Place

MEMBER, GROUP = 12345, 23456
WAYS = {
    "write": "fd = os.open(path, os.O_WRONLY); os.pwrite(fd, b'more', 0); os.close(fd)",
    "append": "fd = os.open(path, os.O_WRONLY | os.O_APPEND); os.write(fd, b'more'); os.close(fd)",
    "truncate": "os.truncate(path, 2)",
    "ftruncate": "fd = os.open(path, os.O_WRONLY); os.ftruncate(fd, 2); os.close(fd)",
    "O_TRUNC": "os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))",
    "mmap": "import mmap; fd = os.open(path, os.O_RDWR); m = mmap.mmap(fd, 4); m[0] = 1; m.flush(); os.close(fd)",
}


def shared(directory: Path, name: str, mode: int) -> None:
    (directory / name).write_bytes(b"notes")
    os.chown(directory / name, 0, GROUP)
    os.chmod(directory / name, mode)


def test_members_of_its_group_write_a_file_with_set_id_bits(place: Place) -> None:
    os.chmod(place.there, 0o777)
    seen: dict[tuple[str, str], str] = {}
    for mode in (0o2775, 0o4775, 0o6775):
        for way, code in WAYS.items():
            name = f"{mode:o}{way}"
            shared(place.there, name, mode)
            told = as_user(MEMBER, f"{code}; print('done')", place.here / name, groups=(GROUP,))
            seen[f"{mode:o}", way] = told
            # Whether truncating or a mapping's bytes take the bits away is the server's affair: this one keeps them.
            left = os.stat(place.here / name).st_mode & 0o7777
            assert left == os.stat(place.there / name).st_mode & 0o7777, f"{mode:o} {way}: {left:o}"
            assert left == 0o775 or way not in ("write", "append"), f"{mode:o} {way}: {left:o}"
    assert set(seen.values()) == {"done"}, seen


def test_the_kernel_runs_it_no_more_as_its_owner(place: Place) -> None:
    os.chmod(place.there, 0o777)
    shared(place.there, "tool", 0o4775)
    (place.there / "tool").write_bytes(Path("/usr/bin/id").read_bytes())
    os.chmod(place.there / "tool", 0o4775)
    tool = place.here / "tool"

    def runs_as() -> str:
        return subprocess.run([tool, "-u"], user=MEMBER, capture_output=True, text=True, check=True).stdout.strip()

    os.stat(tool)  # the kernel knows its mode, and for how long
    before = runs_as()
    told = as_user(MEMBER, f"{WAYS['append']}; print('done')", tool, groups=(GROUP,))
    assert (before, told, runs_as()) == ("0", "done", str(MEMBER))
