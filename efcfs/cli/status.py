"""`efcfs status`: the mounts of this machine and how they are."""

import json

import click

from efcfs import control
from efcfs.cli.main import EX_USAGE, Failure
from efcfs.cli.table import echo_table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="a list with one object a mount")
@click.argument("mountpoint", required=False)
def status(mountpoint: str | None, as_json: bool) -> int:
    """Show one mount, or all."""
    if mountpoint is None:
        mounts = control.mounts()
    else:
        found = control.find(mountpoint)
        if found is None:
            raise Failure(f"{mountpoint} is not an efcfs mount: `efcfs status` lists them", EX_USAGE)
        mounts = [found]
    answers = [ask(mounted) for mounted in mounts]
    if as_json:
        click.echo(json.dumps(answers, indent=2))
    elif answers:
        show(answers)
    else:
        click.echo("no efcfs mounts")
    return 0


def ask(mounted: control.Mounted) -> control.Answer:
    try:
        return control.ask(mounted, {"cmd": "status"})
    except control.NoAnswer as why:
        return {"mountpoint": mounted.mountpoint, "source": mounted.source, "keeper_pid": mounted.keeper_pid,
                "error": str(why)}  # fmt: skip


def show(answers: list[control.Answer]) -> None:
    head = ("mount point", "source", "server", "links", "in flight", "reconnects", "daemon", "up", "failovers",
            "upgrades")  # fmt: skip
    rows = []
    for a in answers:
        if "error" in a:
            rows.append((str(a["mountpoint"]), str(a["source"]), str(a["error"]), *[""] * (len(head) - 3)))
            continue
        links, server = a["links"], a["server"]
        assert isinstance(links, list) and isinstance(server, dict)
        rows.append((
            str(a["mountpoint"]), str(a["source"]), str(server["state"]),
            f"{sum(link['state'] == 'up' for link in links)} of {len(links)}",
            f"{sum(link['in_flight_bytes'] for link in links) / 1e6:.1f} MB",
            str(sum(link["reconnects"] for link in links)),
            str(a["daemon_pid"]), f"{a['uptime_s']} s", str(a["failovers"]), str(a["upgrades"]),
        ))  # fmt: skip
    echo_table(head, rows)
