"""Imports point one way: cli → control → daemon → fuse → vfs → cache, nfs (docs/design.md)."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "efcfs"
MODULES = sorted(ROOT.rglob("*.py"))
# What a room may import of efcfs, besides itself.
ALLOWED = {
    "nfs": set(),
    "cache": set(),
    "vfs": {"cache", "nfs"},
    "fuse": {"vfs", "nfs"},
    "config": {"nfs", "vfs"},
    "control": set(),
    "keeper": set(),
    "daemon": {"cache", "config", "control", "fuse", "keeper", "nfs", "vfs"},
    "recovery": {"config", "nfs", "vfs"},
    "cli": {"cache", "config", "control", "keeper", "recovery"},
}
CODECS = {"xdr", "rpc", "nfs3", "nfs3_calls", "nfs3_replies", "mount3", "portmap2"}


def imported(module: Path) -> set[str]:
    """The full names of all modules that a module imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room(module: Path) -> str:
    return module.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(module: Path) -> None:
    if room(module) == "__init__":
        return
    of_ours = {name.split(".")[1] for name in imported(module) if name.startswith("efcfs.")} - {"__version__"}
    assert of_ours - {room(module)} <= ALLOWED[room(module)]


def test_modules_import_each_other_one_way_inside_a_room_too() -> None:
    # The commands import `cli.main`, which imports the one that is asked for.
    modules = {"efcfs." + ".".join(m.relative_to(ROOT).with_suffix("").parts): m for m in MODULES if room(m) != "cli"}
    graph = {name: imported(module) & modules.keys() for name, module in modules.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_only_fuse_imports_pyfuse3() -> None:
    users = {room(module) for module in MODULES if "pyfuse3" in imported(module)}
    assert users == {"fuse"}


def test_only_link_opens_sockets_to_the_server() -> None:
    users = {m.name for m in MODULES if room(m) in ("nfs", "vfs", "fuse") and "socket.socket(" in m.read_text()}
    assert users == {"link.py"}


def test_codecs_do_no_input_or_output() -> None:
    for module in MODULES:
        if module.stem in CODECS:
            assert not imported(module) & {"socket", "trio", "asyncio", "select", "ssl"}, module


def test_only_the_indexes_know_lmdb_keys() -> None:
    # damage.py, store.py and tier.py name LMDB's errors only, and environment.py keeps what others put into it.
    users = {m.name for m in MODULES if "lmdb" in imported(m)}
    assert users == {
        "daemon.py", "damage.py", "environment.py", "index.py", "inodes.py", "listings.py", "store.py", "tier.py",
    }  # fmt: skip
    assert {m.name for m in MODULES if "lmdb.open(" in m.read_text()} == {"environment.py", "index.py"}


def test_the_keeper_imports_nothing_but_the_standard_library() -> None:
    for module in (ROOT / "keeper").glob("*.py"):
        assert {name.split(".")[0] for name in imported(module)} <= sys.stdlib_module_names | {"efcfs"}
