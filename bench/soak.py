"""The soak in full: 8 programs work while the daemon is killed, upgraded, and the server restarted.

    .venv/bin/python -m bench.soak [--kills 1000] [--upgrades 0] [--server] [--programs 8] [--seed 1]

`--kills 0 --upgrades 1000` upgrades every second; both given, both happen. Takes half an hour for 1,000 kills.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

from bench.parts import HERE, Targets, report
from tests.bed import Ganesha, Mount
from tests.faults.soak import Outcome, Pause, Plan, soak

QUIET_S = 60.0
SHOWN = 40
# So many of the longest calls are told, with the moment when they began.
LONGEST = 12


def quantile(pauses: list[Pause], part: float) -> float:
    """Of pauses that are sorted, in milliseconds."""
    return pauses[min(len(pauses) - 1, int(len(pauses) * part))].length_s * 1e3


def row(what: str, pauses: list[Pause]) -> tuple[object, ...]:
    if not pauses:
        return (what, 0, "", "", "")
    for pause in pauses[-LONGEST:]:
        print(f"{pause.begun_s:.3f}  {pause.length_s * 1e3:5.0f} ms  {pause.what}, during {what}")
    return (what, len(pauses), *(quantile(pauses, part) for part in (0.5, 0.99, 1)))


def rows_and_targets(outcome: Outcome) -> tuple[list[tuple[object, ...]], Targets]:
    quiet, _ = outcome.pauses(outcome.quiet)
    kills, kills_away = outcome.pauses(outcome.kills)
    upgrades, upgrades_away = outcome.pauses(outcome.upgrades)
    targets: Targets = {
        "errors": (len(outcome.errors), "≤", 0),
        "wrong or missing bytes and names": (len(outcome.wrong), "≤", 0),
        f"leaked handles ({outcome.leaked_handles})": (float(outcome.leaked_handles != "0"), "≤", 0),
    }
    if kills:
        targets["pause of a kill, p99, ms"] = (quantile(kills, 0.99), "≤", 500)
        targets["pause of a kill, longest, ms"] = (quantile(kills, 1), "≤", 1000)
    if upgrades and not outcome.kills:
        targets["pause of an upgrade, p99, ms"] = (quantile(upgrades, 0.99), "≤", 100)
    return [
        row("nothing, to compare", quiet),
        row("kill", kills), row("kill, server away too", kills_away),
        row("upgrade", upgrades), row("upgrade, server away too", upgrades_away),
    ], targets  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--upgrades", type=int, default=0)
    parser.add_argument("--server", action="store_true", help="kill the server and start it again, in between")
    parser.add_argument("--programs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    plan = Plan(
        kills=asked.kills, upgrades=asked.upgrades, restart_server=asked.server, programs=asked.programs,
        seed=asked.seed, quiet_s=QUIET_S,
    )  # fmt: skip
    began_s = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began_s:5.0f} s  {line}", flush=True)

    root = Path(tempfile.mkdtemp(prefix="efcfs-bench-", dir="/dev/shm"))
    with Ganesha(root) as server, Mount(server, root / "mnt") as mount:
        outcome = soak(server, mount, plan, tell)
    subprocess.run(["rm", "-rf", root], check=True)
    for line in [*outcome.errors[:SHOWN], *outcome.wrong[:SHOWN]]:
        print(line)
    rows, targets = rows_and_targets(outcome)
    kinds = {"kills": asked.kills and asked.upgrades, "upgrades": asked.upgrades, "server": asked.server}
    name = "-".join(["soak", *(kind for kind, asked_for in kinds.items() if asked_for)])
    report(name, ("disturbance", "times", "pause p50 ms", "p99 ms", "longest ms"), rows, targets)
    print(f"{outcome.calls:,} calls, {len(outcome.server_away)} server restarts; {dict(outcome.actions)}")
    # The lines begin with the clock's second, as these moments do: what was wrong after which kill?
    everything = {
        "errors": outcome.errors, "wrong": outcome.wrong, "actions": outcome.actions, "calls": outcome.calls,
        "kills": outcome.kills, "upgrades": outcome.upgrades, "server_away": outcome.server_away,
    }  # fmt: skip
    (HERE / "results" / f"{name}-found.json").write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
