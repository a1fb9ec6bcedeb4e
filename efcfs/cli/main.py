"""`efcfs`: the command line. One module a command; this one names them and keeps tracebacks from the user."""

import sys

EX_USAGE, EX_SYSTEM, EX_MOUNT = 1, 2, 32

try:
    import click
except ModuleNotFoundError as missing:
    sys.exit(f"efcfs: the library {missing.name} is missing: install efcfs again (pip install efcfs)")


from efcfs import __version__  # noqa: E402  # after the libraries it may miss


class Failure(Exception):
    """The command failed; str() is its one line, `code` its exit code, as in mount(8)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version=__version__)
def efcfs() -> None:
    """The elastic file client: mount NFS exports through FUSE.

    Exit codes: 0 success, 1 wrong usage, 2 system error, 32 mount failure.
    """


def run(command: click.Command, arguments: list[str]) -> int:
    """Run a command; one clear line on stderr and the exit code when it fails."""
    try:
        result = command.main(arguments, prog_name="efcfs", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except Failure as failure:
        click.echo(f"efcfs: {failure}", err=True)
        return failure.code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return EX_USAGE
    except click.ClickException as error:
        click.echo(f"efcfs: {error.format_message()}", err=True)
        return EX_USAGE
    except click.Abort:
        click.echo("efcfs: interrupted", err=True)
        return EX_SYSTEM


def main() -> None:
    try:
        from efcfs.cli import (  # noqa: PLC0415  # a library may be missing: say so
            cache,
            mount,
            recover,
            status,
            umount,
            upgrade,
            warmup,
        )  # fmt: skip
    except ModuleNotFoundError as missing:
        sys.exit(f"efcfs: the library {missing.name} is missing: install efcfs again (pip install efcfs)")
    except ImportError as error:
        sys.exit(f"efcfs: a library does not load ({error}): install the package libfuse3-3 and efcfs again")
    commands = (mount.mount, umount.umount, status.status, upgrade.upgrade, recover.recover, warmup.warmup, cache.cache)
    for command in commands:
        efcfs.add_command(command)
    sys.exit(run(efcfs, sys.argv[1:]))


if __name__ == "__main__":
    # Run by -m this file is another module than the one that the commands import Failure from.
    from efcfs.cli.main import main as imported_main

    imported_main()
