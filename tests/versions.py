"""Other versions of efcfs, made of this one, and upgrades to them."""

import shutil
import sys
from pathlib import Path

import efcfs
from tests.bed import Mount
from tests.bed import efcfs as command


def upgrade(mount: Mount, *arguments: str) -> str:
    """Returns what the command says when it fails, else nothing; its exit code is 0 then."""
    done = command("upgrade", *arguments, str(mount.path))
    assert bool(done.returncode) == bool(done.stderr) and done.stdout == ""
    return done.stderr


def other_version(directory: Path, **changed: tuple[str, str, str]) -> Path:
    """A python with a copy of efcfs in which (file, old text, new text) are changed."""
    shutil.copytree(Path(efcfs.__file__).parent, directory / "efcfs")
    for file, old, new in changed.values():
        path = directory / "efcfs" / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    python = directory / "python"
    # Found before the package that is installed, which an editable install puts on the path by an import hook.
    (directory / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    )
    python.write_text(f'#!/bin/sh\nPYTHONPATH={directory} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python
