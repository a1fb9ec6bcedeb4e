"""`mount.efcfs SOURCE DIR [-sfnv] [-o OPTIONS]`: what mount(8) and /etc/fstab call."""

import sys

import click

from efcfs.cli.main import run
from efcfs.cli.mount import start


@click.command()
@click.option("-s", "sloppy", is_flag=True, help="ignore unknown options")
@click.option("-f", "fake", is_flag=True, help="do everything but mount")
@click.option("-n", is_flag=True, help="no /etc/mtab (there is none)")
@click.option("-v", "verbose", is_flag=True, help="log more")
@click.option("-r", "read_only", is_flag=True, help="mount read-only")
@click.option("-w", "read_write", is_flag=True, help="mount for reading and writing")
@click.option("-o", "options", multiple=True, help="mount options")
@click.option("-t", "fstype", help="the type that mount(8) was given")
@click.option("-N", "namespace", hidden=True)
@click.argument("source")
@click.argument("mountpoint")
def mount_efcfs(
    source: str, mountpoint: str, options: tuple[str, ...], sloppy: bool, fake: bool, n: bool, verbose: bool,
    read_only: bool, read_write: bool, fstype: str | None, namespace: str | None,
) -> int:  # fmt: skip
    """Mount an efcfs; called by mount(8)."""
    if read_only:
        options += ("ro",)
    return 0 if fake else start(source, mountpoint, options, verbose=verbose, sloppy=sloppy)


def main() -> None:
    sys.exit(run(mount_efcfs, sys.argv[1:]))
