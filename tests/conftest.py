"""Fixtures: one server for the session, one mount of it, and a fresh directory for each test."""

import contextlib
import itertools
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount
from tests.place import Place

MountFactory = Callable[..., Mount]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ganesha]:
    with Ganesha(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def mount(server: Ganesha) -> Iterator[Mount]:
    """The export with default options, where every user can reach it (pytest's own directories are 0700)."""
    with tempfile.TemporaryDirectory(prefix="efcfs-test-") as directory:
        Path(directory).chmod(0o755)
        with Mount(server, Path(directory) / "mnt") as mounted:
            yield mounted


@pytest.fixture
def export(server: Ganesha) -> Iterator[Path]:
    """A fresh directory in the export, as it lies on the server's disk."""
    directory = server.directory / uuid.uuid4().hex[:12]
    directory.mkdir()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def place(mount: Mount, export: Path) -> Place:
    """A fresh directory, through the mount and on the server."""
    return Place.of(mount, export)


@pytest.fixture
def mount_factory(server: Ganesha, tmp_path: Path) -> Iterator[MountFactory]:
    """Makes more mounts of the export: mount_factory("noac")."""
    numbers = itertools.count()
    with contextlib.ExitStack() as mounts:

        def make(options: str = "") -> Mount:
            return mounts.enter_context(Mount(server, tmp_path / f"mnt{next(numbers)}", options))

        yield make
