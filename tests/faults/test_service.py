"""A mount as a systemd service and as process 1 of a container; systemd is played by `keepers.Manager`."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from efcfs import control
from efcfs.keeper import kernel, service
from efcfs.keeper.child import born
from tests.bed import Ganesha, efcfs
from tests.faults.fake_daemon import HELD_OFFSET
from tests.faults.keepers import Kept, Managed, Manager, fake, reading
from tests.place import wait_until

EFCFS = [sys.executable, "-m", "efcfs.cli.main"]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(tmp_path) as made:
        yield made


# -- systemd -----------------------------------------------------------------------------------------


def test_a_service_says_what_it_does_and_leaves_nothing_in_the_store(tmp_path: Path, manager: Manager) -> None:
    with Managed(tmp_path, fake(), manager) as kept:
        wait_until(lambda: set(manager.store) == {service.FUSE, service.STATE})
        assert "FDPOLL=0" in manager.lines  # or each request would wake the service manager
        assert any("mounted at" in line for line in manager.lines if line.startswith("STATUS="))
        os.kill(kept.daemon_pid, signal.SIGKILL)
        wait_until(lambda: any("failovers: 1" in line for line in manager.lines if line.startswith("STATUS=")))
        os.kill(kept.keeper_pid, signal.SIGTERM)
        assert kept.process is not None and kept.process.wait(10) == 0
        wait_until(lambda: "STOPPING=1" in manager.lines and not manager.store)
        kept.assert_nothing_is_left()


@pytest.mark.parametrize("also", ["nothing", "the daemon"])
def test_a_keeper_killed_with_9_gets_its_mount_back_under_an_open_file(
    tmp_path: Path, manager: Manager, also: str
) -> None:
    with (
        Managed(tmp_path, fake("hold", "once"), manager) as kept,
        reading(kept.file) as reader, reading(kept.file) as held,
    ):  # fmt: skip
        held.go_on(HELD_OFFSET)
        wait_until(lambda: bool(list(kept.notes("held"))))
        before = kept.requests()[-1]
        for failovers in 1, 2:
            daemon = kept.daemon_pid
            kill_and_wait(kept, *([daemon] if also == "the daemon" else []))
            reader.go_on(0)
            kept.start()
            assert reader.told() == "first"
            wait_until(lambda: kept.requests()[-1]["keeper_pid"] == kept.keeper_pid)
            assert reader.ask(0) == "first"
            assert born(daemon) == 0
            now = kept.requests()[-1]
            assert [now[key] for key in ("state_dir", "started_at", "config")] == [
                before[key] for key in ("state_dir", "started_at", "config")
            ]
            assert (now["keeper_pid"], now["failovers"], now["patient"]) == (kept.keeper_pid, failovers, True)
            assert control.Mounted(str(kept.path), "", 0).keeper_pid == kept.keeper_pid
        assert held.told() == ""
        reader.process.kill()
        held.process.kill()
        for program in reader, held:
            program.process.wait(5)
        kept.umount()
        kept.assert_nothing_is_left()
        wait_until(lambda: not manager.store)


def kill_and_wait(kept: Kept, *also: int) -> None:
    """The keeper dies as by the kernel's OOM killer."""
    assert kept.process is not None
    for pid in kept.keeper_pid, *also:
        os.kill(pid, signal.SIGKILL)
    kept.process.wait(5)
    wait_until(lambda: not any(map(born, also)))


def test_a_keeper_that_comes_back_knows_of_upgrades(tmp_path: Path, manager: Manager) -> None:
    with Managed(tmp_path, fake(), manager) as kept:
        kept.ask_for_upgrade(fake("any"), content="second")
        wait_until(lambda: len(kept.heard("upgraded")) == 1 and len(kept.daemons()) == 1)
        kill_and_wait(kept)
        kept.start()
        with reading(kept.file) as reader:
            assert reader.ask(0) == "second"
        last = kept.requests()[-1]
        assert (last["upgrades"], last["failovers"], last["daemon"]) == (1, 1, fake("any"))
        kept.umount()
        kept.assert_nothing_is_left()


def test_a_store_of_a_mount_that_is_gone_is_emptied_and_the_mount_made_anew(tmp_path: Path, manager: Manager) -> None:
    with Managed(tmp_path, fake(), manager) as kept:
        kill_and_wait(kept, kept.daemon_pid)
        kernel.unmount(str(kept.path), kernel.device_at(str(kept.path)))  # umount(8) would wait for it
        kept.start()
        with reading(kept.file) as reader:
            assert reader.ask(0) == "first"
        assert kept.requests()[-1]["failovers"] == 0
        kept.umount()
        kept.assert_nothing_is_left()
        wait_until(lambda: not manager.store)


def test_the_command_in_the_foreground_gets_its_mount_back(server: Ganesha, tmp_path: Path, manager: Manager) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    (server.directory / "here").write_text("content")
    options = f"port={server.port},mountport={server.mount_port},noac"
    command = [*EFCFS, "mount", "--foreground", "-o", options, f"127.0.0.1:{server.export}", str(path)]
    process = manager.start(command, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: "READY=1" in manager.lines)
        for failovers in 1, 2:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(5)
            process = manager.start(command, stderr=subprocess.DEVNULL)
            with reading(path / "here") as reader:  # waits, and sees no error
                assert reader.ask(0) == "content"
            # Until then it was the old daemon that answered.
            wait_until(lambda told=(process.pid, failovers): served_by(path) == told)  # type: ignore[misc]
        done = efcfs("umount", str(path))
        assert done.returncode == 0, done.stderr
        assert process.wait(10) == 0
        wait_until(lambda: not manager.store)
    finally:
        (server.directory / "here").unlink()
        efcfs("umount", "-f", str(path))
        if process.poll() is None:
            process.kill()
            process.wait(5)


def served_by(path: Path) -> tuple[object, object]:
    """The keeper, and its count of failovers."""
    (status,) = json.loads(efcfs("status", "--json", str(path)).stdout)
    return status["keeper_pid"], status.get("failovers")


def test_a_start_that_fails_is_one_line_and_its_exit_code(tmp_path: Path, manager: Manager) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    command = [*EFCFS, "mount", "--foreground", "-o", "port=1,mountport=1", "127.0.0.1:/nowhere", str(path)]
    process = manager.start(command, stderr=subprocess.PIPE)
    _, complaint = process.communicate(timeout=20)
    assert process.returncode == 32
    lines = complaint.decode().splitlines()
    assert [line for line in lines if line.startswith("efcfs: ") and "127.0.0.1" in line] == lines[-1:]
    assert "READY=1" not in manager.lines and not manager.store


def test_the_unit_is_in_the_package_and_starts_what_there_is() -> None:
    unit = resources.files("efcfs") / "units" / "efcfs@.service"
    settings = dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line and line[0] != "#")
    assert (settings["Type"], settings["NotifyAccess"], settings["Restart"]) == ("notify", "main", "on-failure")
    assert int(settings["FileDescriptorStoreMax"]) >= len({service.FUSE, service.STATE})
    for name in "ExecStart", "ExecStop":
        program, command = settings[name].split()[:2]
        assert program == "efcfs" and efcfs(command, "--help").returncode == 0


# -- process 1 ---------------------------------------------------------------------------------------


def test_as_process_1_it_reaps_orphans_and_ends_at_sigterm(server: Ganesha, tmp_path: Path) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    options = f"port={server.port},mountport={server.mount_port}"
    command = [*EFCFS, "mount", "--foreground", "-o", options, f"127.0.0.1:{server.export}", str(path)]
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "slave", *command]
    with subprocess.Popen(container, stderr=subprocess.PIPE, text=True) as process:
        (inner,) = wait_for_children(process.pid)

        def inside(*program: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["nsenter", f"--target={inner}", "--mount", "--pid", *program], capture_output=True, text=True,
                check=False, timeout=20,
            )  # fmt: skip

        wait_until(lambda: inside("mountpoint", "-q", str(path)).returncode == 0, 20)
        (status,) = json.loads(inside(*EFCFS, "status", "--json", str(path)).stdout)
        assert status["keeper_pid"] == 1
        # A program that loses its parent becomes a child of process 1, and must not stay a zombie.
        orphan = inside("sh", "-c", "(sh -c 'echo $PPID; exec sleep 0.2' & ) | cat; ps -o pid= -o stat= -o comm= -e")
        assert orphan.returncode == 0
        wait_until(lambda: not any("Z" in line for line in inside("ps", "-o", "stat=", "-e").stdout.splitlines()))
        daemons = inside("ps", "-o", "pid=", "--ppid", "1").stdout.split()
        inside("kill", "-9", *daemons)
        assert inside("stat", str(path)).returncode == 0
        os.kill(inner, signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "mounted at" in log and "told to stop" in log and "Traceback" not in log


def wait_for_children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    wait_until(lambda: path.read_text() != "")
    return [int(child) for child in path.read_text().split()]
