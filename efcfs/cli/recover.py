"""`efcfs recover`: what mounts could not write before they ended: show it, write it, save it elsewhere, or drop it."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import click

from efcfs import control, recovery
from efcfs.cli.main import EX_SYSTEM, EX_USAGE, Failure
from efcfs.keeper import directories


@click.command()
@click.option("--into", metavar="DIR", help="save the bytes in files below DIR instead, each at its own offset")
@click.option("--discard", is_flag=True, help="throw them away instead")
@click.argument("name", required=False)
def recover(name: str | None, into: str | None, discard: bool) -> int:
    """Write what a mount could not write before it ended. Without a NAME, list what there is.

    What the server takes is removed here; what it refuses stays, and the command says why.
    """
    kept = {path.name: path for path in places()}
    if name is None:
        for path in kept.values():
            click.echo(f"{path.name}  {describe(path)}")
        if not kept:
            click.echo("nothing is unwritten")
        return 0
    place = kept.get(name)
    if place is None:
        raise Failure(f"there is no {name}: `efcfs recover` lists what there is", EX_USAGE)
    if discard:
        shutil.rmtree(place)
        return 0
    try:
        done, refused = recovery.recover(place, Path(into) if into is not None else None)
    except recovery.Impossible as why:
        raise Failure(str(why), EX_SYSTEM) from None
    for line in (*done, *refused):
        click.echo(line, err=line in refused)
    if refused:
        hint = f"`efcfs recover {name} --into DIR` saves it as local files, --discard drops it"
        raise Failure(f"{len(refused)} of {len(done) + len(refused)} files are still unwritten: {hint}", EX_SYSTEM)
    shutil.rmtree(place)
    return 0


def places() -> Iterator[Path]:
    """The directories of what is unwritten, the oldest first."""
    in_memory = directories.unwritten_in_memory(str(control.state_dir("", os.geteuid()).parent))
    found = [path.parent for base in (directories.unwritten_dir(), in_memory)
             for path in Path(base).glob(f"[!.]*/{directories.MOUNT}")]  # fmt: skip
    return iter(sorted(found, key=lambda path: path.stat().st_mtime))


def describe(place: Path) -> str:
    mount = json.loads((place / directories.MOUNT).read_text())
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(place.stat().st_mtime))
    return f"{mount['source']} at {mount['mountpoint']}, {at}"
