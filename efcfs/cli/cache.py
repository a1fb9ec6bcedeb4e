"""`efcfs cache`: what the cache holds, and changing it while it is in use."""

import click

from efcfs import control
from efcfs.cli.cache_check import check_size
from efcfs.cli.main import EX_SYSTEM, EX_USAGE, Failure
from efcfs.cli.table import echo_table
from efcfs.cli.warmup import asked, begin, follow, report, sort_by_mount
from efcfs.config import UsageError, memory_bytes, size_bytes


@click.group()
def cache() -> None:
    """Look at the cache of a mount, and change it."""


@cache.command()
@click.argument("mountpoint", required=False)
def info(mountpoint: str | None) -> int:
    """Show the tiers of one mount, or of all."""
    mounts = [mount_at(mountpoint)] if mountpoint is not None else control.mounts()
    rows, silent = [], 0
    for mounted in mounts:
        try:
            tiers = asked(mounted, {"cmd": "status"})["tiers"]
        except Failure as failure:  # the others are shown all the same
            click.echo(f"efcfs: {failure}", err=True)
            silent += 1
            continue
        assert isinstance(tiers, list)
        if not tiers:
            click.echo(f"{mounted.mountpoint}: no cache: see the log, or mount it with mem= or ssd=")
        for t in tiers:
            rows.append((
                mounted.mountpoint, t["name"], t["path"], t["state"], f"{t['used_bytes'] / 1e6:,.1f} MB",
                f"{t['capacity_bytes'] / 1e6:,.1f} MB",
                *(f"{t[key]:,}" for key in ("items", "hits", "misses", "evictions", "bad_checksums")),
            ))  # fmt: skip
    if rows:
        head = ("mount point", "tier", "path", "state", "used", "of", "items", "hits", "misses", "evicted", "bad")
        echo_table(head, rows)
    elif not mounts:
        click.echo("no efcfs mounts")
    return EX_SYSTEM if silent else 0


@cache.command()
@click.argument("mountpoint")
@click.argument("tier")
@click.argument("size")
def resize(mountpoint: str, tier: str, size: str) -> int:
    """Give TIER (mem, ssd0 …) of a mount another SIZE, for all mounts that share it."""
    mounted = mount_at(mountpoint)
    try:
        capacity_bytes = size_bytes(size, f"size {size}", memory_bytes() if tier == "mem" else None)
    except UsageError as error:
        raise Failure(str(error), EX_USAGE) from None
    tiers = asked(mounted, {"cmd": "status"})["tiers"]
    assert isinstance(tiers, list)
    for path in (t["path"] for t in tiers if t["name"] == tier and t["state"] == "up"):
        check_size(path, capacity_bytes)
    asked(mounted, {"cmd": "resize", "tier": tier, "capacity_bytes": capacity_bytes})
    return 0


@cache.command()
@click.argument("paths", nargs=-1, required=True)
def evict(paths: tuple[str, ...]) -> int:
    """Take files or trees out of the cache."""
    failed = 0
    for mounted, inside in sort_by_mount(list(paths)).items():
        job = follow(mounted, begin(mounted, {"cmd": "job", "kind": "evict"}, inside))
        report(job)
        failed += int(str(job["failed"]))
    return EX_SYSTEM if failed else 0


@cache.command()
@click.argument("mountpoint")
def clear(mountpoint: str) -> int:
    """Empty all tiers of a mount, also for the mounts that share them."""
    asked(mount_at(mountpoint), {"cmd": "clear"})
    return 0


@cache.command()
@click.argument("mountpoint")
def check(mountpoint: str) -> int:
    """Compare every cached block of the files in a mount with its sum; a wrong one is dropped and counted."""
    mounted = mount_at(mountpoint)
    before = bad_checksums(mounted)
    job = follow(mounted, begin(mounted, {"cmd": "job", "kind": "check"}, ["/"]))
    report(job)
    bad = bad_checksums(mounted) - before
    click.echo(f"{bad} wrong blocks dropped")
    return EX_SYSTEM if bad else 0


def bad_checksums(mounted: control.Mounted) -> int:
    tiers = asked(mounted, {"cmd": "status"})["tiers"]
    assert isinstance(tiers, list)
    return sum(int(t["bad_checksums"]) for t in tiers)


def mount_at(mountpoint: str) -> control.Mounted:
    found = control.find(mountpoint)
    if found is None:
        raise Failure(f"{mountpoint} is not an efcfs mount: `efcfs status` lists them", EX_USAGE)
    return found
