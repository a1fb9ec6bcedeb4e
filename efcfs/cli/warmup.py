"""`efcfs warmup`: bring files into the cache before somebody waits for them."""

import os
import time

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from efcfs import control
from efcfs.cli.main import EX_SYSTEM, EX_USAGE, Failure
from efcfs.config import UsageError, size_bytes

POLL_S = 0.1
# A request has at most 1 MiB: a path of 4,096 bytes, each of them escaped, may take 24 KiB of it.
PATHS_AT_ONCE = 40


@click.command()
@click.argument("paths", nargs=-1)
@click.option("--list", "list_file", type=click.Path(), help="a file with a path a line")
@click.option("--match", metavar="GLOB", help="only files whose name matches; with a /, whose path in the mount does")
@click.option("--metadata-only", is_flag=True, help="names and attributes, no data")
@click.option("--rate", metavar="SIZE", help="at most so many bytes a second, such as 200m")
@click.option("--jobs", type=click.IntRange(1, 64), default=8, show_default=True, help="files at once")
@click.option("--background", is_flag=True, help="do not wait for the end")
@click.option("--check", is_flag=True, help="tell how much is cached, verified, and read nothing")
@click.option("--cancel", is_flag=True, help="cancel the jobs of the mounts that hold PATHS")
def warmup(
    paths: tuple[str, ...], list_file: str | None, match: str | None, metadata_only: bool, rate: str | None,
    jobs: int, background: bool, check: bool, cancel: bool,
) -> int:  # fmt: skip
    """Read PATHS (files or trees in efcfs mounts) into the cache. The job runs in the mount's daemon."""
    wanted = list(paths) + (read_list(list_file) if list_file is not None else [])
    if not wanted:
        raise Failure("warmup what? Name paths in an efcfs mount, or --list FILE", EX_USAGE)
    by_mount = sort_by_mount(wanted)
    if cancel:
        for mounted in by_mount:
            count = asked(mounted, {"cmd": "cancel"})["cancelled"]
            click.echo(f"{mounted.mountpoint}: {count} cancelled")
        return 0
    try:
        rate_bytes_per_s = size_bytes(rate, "--rate") if rate is not None else None
    except UsageError as error:
        raise Failure(str(error), EX_USAGE) from None
    if rate_bytes_per_s == 0:
        raise Failure("--rate 0 would never end: give a rate such as 200m, or leave it out", EX_USAGE)
    failed = 0
    for mounted, inside in by_mount.items():
        request: control.Answer = {
            "cmd": "job", "kind": "check" if check else "warm", "match": match, "jobs": jobs,
            "metadata_only": metadata_only, "rate_bytes_per_s": rate_bytes_per_s,
        }  # fmt: skip
        number = begin(mounted, request, inside)
        if background:
            click.echo(f"{mounted.mountpoint}: job {number} runs; `efcfs warmup --cancel {mounted.mountpoint}` ends it")
            continue
        job = follow(mounted, number)
        report(job)
        failed += int(str(job["failed"])) + (job["state"] != "done")
    return EX_SYSTEM if failed else 0


def read_list(name: str) -> list[str]:
    try:
        with open(name, errors="surrogateescape") as file:
            return [line.rstrip("\n") for line in file if line.strip()]
    except OSError as error:
        raise Failure(f"{name}: {error.strerror}: --list needs a file with a path a line", EX_USAGE) from None


def sort_by_mount(paths: list[str]) -> dict[control.Mounted, list[str]]:
    """The paths as their mounts see them. The mounts themselves are not touched, if it can be: they may hang."""
    mounts = sorted(control.mounts(), key=lambda m: len(m.mountpoint), reverse=True)
    found: dict[control.Mounted, list[str]] = {}
    for path in paths:
        # The second for a symbolic link outside of the mounts that leads into one.
        for full in (os.path.abspath(path), os.path.realpath(path)):
            mounted = next((m for m in mounts if f"{full}/".startswith(f"{m.mountpoint}/")), None)
            if mounted is not None:
                found.setdefault(mounted, []).append(full[len(mounted.mountpoint) :] or "/")
                break
        else:
            raise Failure(f"{path} is not in an efcfs mount: `efcfs status` lists them", EX_USAGE)
    return found


def begin(mounted: control.Mounted, request: control.Answer, paths: list[str]) -> object:
    """Start a job over these paths; returns its number. A long list goes piece by piece."""
    pieces = [paths[start : start + PATHS_AT_ONCE] for start in range(0, len(paths), PATHS_AT_ONCE)]
    number = asked(mounted, {**request, "paths": pieces[0], "more": len(pieces) > 1})["number"]
    for i, piece in enumerate(pieces[1:], 2):
        asked(mounted, {"cmd": "job_paths", "number": number, "paths": piece, "more": i < len(pieces)})
    return number


def asked(mounted: control.Mounted, request: control.Answer) -> control.Answer:
    """The daemon's answer. Raises Failure."""
    try:
        answer = control.ask(mounted, request)
    except control.NoAnswer as why:
        raise Failure(f"{mounted.mountpoint}: {why}", EX_SYSTEM) from None
    if "error" in answer:
        raise Failure(f"{mounted.mountpoint}: {answer['error']}", EX_SYSTEM)
    return answer


def follow(mounted: control.Mounted, number: object) -> control.Answer:
    """Show a job until it ends; leave it running at Ctrl-C."""
    columns = (
        TextColumn("{task.fields[files]} files"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, files="")
        try:
            while True:
                job = asked(mounted, {"cmd": "job_status", "number": number})
                progress.update(
                    task, completed=int(str(job["bytes"])), files=f"{job['files']}/{job['found_files']}",
                    total=int(str(job["found_bytes"])) if job["walked"] else None,
                )  # fmt: skip
                if job["state"] != "running":
                    return job
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            raise Failure(
                f"job {number} goes on in the background: `efcfs warmup --cancel {mounted.mountpoint}` ends it",
                EX_SYSTEM,
            ) from None


def report(job: control.Answer) -> None:
    """The job's result, and what failed, on stdout."""
    files, total, elapsed_s = int(str(job["files"])), int(str(job["bytes"])), float(str(job["elapsed_s"]))
    if job["kind"] == "check":
        cached = job["cached_bytes"]
        assert isinstance(cached, dict)
        anywhere = cached.pop("any", 0)
        if len(cached) > 1:
            cached["together"] = anywhere
        parts = [f"{name} {n / 1e6:,.1f} MB ({100 * n // total if total else 100} %)" for name, n in cached.items()]
        click.echo(f"{files} files, {total / 1e6:,.1f} MB; cached and verified: {', '.join(parts) or 'nothing'}")
    else:
        speed = total / 1e6 / elapsed_s if elapsed_s else 0
        click.echo(f"{job['state']}: {files} files, {total / 1e6:,.1f} MB in {elapsed_s:.1f} s, {speed:,.0f} MB/s")
    failures = job["failures"]
    assert isinstance(failures, list)
    for line in failures:
        click.echo(f"failed: {line}")
    if int(str(job["failed"])) > len(failures):
        click.echo(f"and {int(str(job['failed'])) - len(failures)} more")
