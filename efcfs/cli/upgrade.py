"""`efcfs upgrade`: replace a mount's daemon while it is used, by one of another version or with other options."""

import os
import subprocess
import sys
from dataclasses import replace

import click

from efcfs import control
from efcfs.cli.cache_check import check_cache
from efcfs.cli.main import EX_SYSTEM, EX_USAGE, Failure
from efcfs.config import MountConfig, UsageError, changed

# The keeper gives up earlier.
TIMEOUT_S = 60.0


@click.command()
@click.option("--python", "python", metavar="PATH", help="the interpreter of a virtual environment with another efcfs")
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="mount options that shall change")
@click.argument("mountpoint")
def upgrade(mountpoint: str, python: str | None, options: tuple[str, ...]) -> int:
    """Replace the daemon of a mount while it is used.

    Programs see a pause of a fraction of a second. When the new daemon does not get ready the old one goes on, and the
    command says why.
    """
    mounted = control.find(mountpoint)
    if mounted is None:
        raise Failure(f"{mountpoint} is not an efcfs mount: `efcfs status` lists them", EX_USAGE)
    config = ask(mounted, {"cmd": "config"})
    if options:
        try:
            now = MountConfig.from_json(config)
            other = changed(now, options)
        except UsageError as error:
            raise Failure(str(error), EX_USAGE) from None
        # Not the disks that it has: one that fails now is no reason.
        check_cache(replace(other, ssd=tuple(tier for tier in other.ssd if tier not in now.ssd)))
        config = other.to_json()
    interpreter = checked(python) if python is not None else sys.executable
    os.nice(19)  # our end must not take the processor from the new daemon, which has a queue of requests then
    ask(mounted, {"cmd": "upgrade", "daemon": [interpreter, "-m", "efcfs.daemon"], "config": config})
    return 0


def ask(mounted: control.Mounted, request: control.Answer) -> control.Answer:
    try:
        answer = control.ask(mounted, request, TIMEOUT_S)
    except control.NoAnswer as why:
        raise Failure(f"{mounted.mountpoint} is not upgraded: {why}", EX_SYSTEM) from None
    if "error" in answer:
        raise Failure(f"{mounted.mountpoint} is not upgraded: {answer['error']}", EX_SYSTEM)
    return answer


def checked(python: str) -> str:
    """The interpreter's absolute path, if efcfs can be imported there."""
    path = os.path.abspath(python)
    try:
        done = subprocess.run(
            [path, "-c", "import efcfs.daemon"], cwd="/", capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(
            f"--python {python} does not run ({error}): name the python of a virtual environment", EX_USAGE
        ) from None
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failure(f"--python {python} cannot run efcfs ({why}): install efcfs there", EX_USAGE)
    return path
