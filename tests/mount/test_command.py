"""The command, its processes, and what it says when something is wrong; against the real server.

Every command here runs with a mark of its own in the environment, which the keeper and the daemon inherit: that
is how a test knows that nothing of its own is left running.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from efcfs import control
from tests.bed import Ganesha, free_port
from tests.place import nice_values, wait_until

USAGE, SYSTEM, FAILURE = 1, 2, 32
EFCFS = [sys.executable, "-m", "efcfs.cli.main"]
HELPER = [sys.executable, "-c", "from efcfs.cli.mount_helper import main; main()"]
NOBODY = 65534
# Another uid, without the rights of root but for reading the interpreter, wherever that is installed.
AS_NOBODY = [
    "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=+dac_read_search", "--",
]  # fmt: skip


class Bench:
    """A mount point for one test, and the processes that were started for it."""

    def __init__(self, server: Ganesha, directory: Path) -> None:
        self.server = server
        self.mark = f"EFCFS_TEST={uuid.uuid4().hex}"
        self.path = directory / "mnt"
        self.path.mkdir()
        self.source = f"127.0.0.1:{server.export}"
        self.ports = f"port={server.port},mountport={server.mount_port}"

    def environment(self, **more: str) -> dict[str, str]:
        name, _, value = self.mark.partition("=")
        return {**os.environ, name: value, **more}

    def run(
        self, *arguments: str, program: list[str] = EFCFS, timeout_s: float = 60, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, *arguments], capture_output=True, text=True, check=False, timeout=timeout_s,
            env=self.environment(**environment), cwd="/",
        )  # fmt: skip

    def mount(self, options: str = "", program: list[str] = EFCFS) -> None:
        done = self.run("mount", "-o", f"{self.ports},{options}", self.source, str(self.path), program=program)
        assert (done.returncode, done.stderr) == (0, "")

    def umount(self, *flags: str, program: list[str] = EFCFS) -> None:
        done = self.run("umount", *flags, str(self.path), program=program)
        assert (done.returncode, done.stderr) == (0, "")

    def status(self) -> dict[str, object]:
        done = self.run("status", "--json", str(self.path))
        assert (done.returncode, done.stderr) == (0, "")
        (status,) = json.loads(done.stdout)
        assert isinstance(status, dict)
        return status

    def pid(self, which: str) -> int:
        pid = self.status()[which]
        assert isinstance(pid, int)
        return pid

    def mounted(self) -> bool:
        return any(m.mountpoint == str(self.path) for m in control.mounts())

    def flags(self) -> set[str]:
        """Per-mount flags in /proc/self/mountinfo."""
        (line,) = (x.split() for x in Path("/proc/self/mountinfo").read_text().splitlines() if f" {self.path} " in x)
        return set(line[5].split(",")) | set(line[-1].split(","))

    def processes(self) -> list[int]:
        """Processes with this test's mark that have not ended."""
        found = []
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdecimal() and self.mark.encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    def state(self, uid: int = 0) -> list[Path]:
        """The mount's directories that exist."""
        places = control.runtime_dir(str(self.path), uid), control.state_dir(str(self.path), uid)
        found = [path for place in places for path in place.parent.glob(f"{place.name}*")]
        return [path for path in found if path.is_dir() and not path.is_symlink()]

    def assert_nothing_is_left(self, uid: int = 0) -> None:
        wait_until(lambda: not self.mounted() and not self.processes() and not self.state(uid))

    def assert_refused(
        self, done: subprocess.CompletedProcess[str], code: int, *words: str, was_mounted: bool = False
    ) -> None:
        """One clear line with these words, this exit code, and nothing mounted or running."""
        assert done.returncode == code, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("efcfs: ")
        for word in words:
            assert word in line
        assert done.stdout == ""
        if not was_mounted:
            self.assert_nothing_is_left()

    def clear(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.mounted():
            subprocess.run(["umount", "-l", self.path], check=True)
        for uid in (0, NOBODY):
            for place in control.runtime_dir(str(self.path), uid), control.state_dir(str(self.path), uid):
                subprocess.run(["rm", "-rf", *place.parent.glob(f"{place.name}*")], check=True)


@pytest.fixture
def bench(server: Ganesha, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(server, tmp_path)
    yield made
    made.clear()


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("nconect=8", ["nconect", "nconnect"]),
        ("timeo=soon", ["timeo", "soon", "whole number"]),
        ("vers=4", ["vers=4", "NFSv3"]),
        ("proto=udp", ["udp", "TCP"]),
    ],
)
def test_a_wrong_option_is_refused(bench: Bench, options: str, words: list[str]) -> None:
    done = bench.run("mount", "-o", options, bench.source, str(bench.path))
    bench.assert_refused(done, USAGE, *words)


@pytest.mark.parametrize("source", ["nas", "nas:export", "/dev/sda1", "fd00::1:/x"])
def test_a_bad_source_is_refused(bench: Bench, source: str) -> None:
    bench.assert_refused(bench.run("mount", source, str(bench.path)), USAGE, source, "SERVER:/EXPORT")


def test_a_missing_argument_is_refused(bench: Bench) -> None:
    bench.assert_refused(bench.run("mount", bench.source), USAGE, "MOUNTPOINT")


def test_a_missing_mount_point_is_refused(bench: Bench) -> None:
    missing = str(bench.path / "not" / "there")
    bench.assert_refused(bench.run("mount", bench.source, missing), FAILURE, missing, "mkdir")


def test_a_mount_point_that_is_no_directory_is_refused(bench: Bench) -> None:
    file = bench.path.with_name("file")
    file.touch()
    bench.assert_refused(bench.run("mount", bench.source, str(file)), FAILURE, str(file), "directory")


def test_a_mount_point_in_use_is_refused_and_its_mount_goes_on(bench: Bench) -> None:
    bench.mount()
    link = bench.path.with_name("link")
    link.symlink_to(bench.path)
    for path in (bench.path, link):
        done = bench.run("mount", "-o", bench.ports, bench.source, str(path))
        bench.assert_refused(done, FAILURE, str(bench.path), "already", "umount", was_mounted=True)
    assert os.path.ismount(bench.path)
    bench.umount()
    bench.assert_nothing_is_left()


def test_a_name_that_does_not_resolve_is_refused(bench: Bench) -> None:
    done = bench.run("mount", "no-such-host.invalid:/x", str(bench.path))
    bench.assert_refused(done, FAILURE, "no-such-host.invalid", "DNS")


def test_a_server_that_refuses_connections_is_refused(bench: Bench) -> None:
    port = free_port()
    done = bench.run("mount", "-o", f"port={port},mountport={port}", bench.source, str(bench.path))
    bench.assert_refused(done, FAILURE, "127.0.0.1", str(port), "check that the server runs")


def test_a_silent_server_is_given_up_after_timeo(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = f"port={silent.getsockname()[1]},mountport={silent.getsockname()[1]}"
        began = time.monotonic()
        done = bench.run("mount", "-o", f"{ports},timeo=10", bench.source, str(bench.path))
        assert 1 <= time.monotonic() - began < 5
    bench.assert_refused(done, FAILURE, "127.0.0.1", "1 s", "timeo")


def test_an_interrupted_command_leaves_nothing(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = f"port={silent.getsockname()[1]},mountport={silent.getsockname()[1]}"
        command = [*EFCFS, "mount", "-o", ports, bench.source, str(bench.path)]
        with subprocess.Popen(command, env=bench.environment(), stderr=subprocess.PIPE, text=True) as process:
            silent.settimeout(20)
            connection, _ = silent.accept()  # the daemon has begun
            process.send_signal(signal.SIGINT)
            _, complaint = process.communicate(timeout=10)
            connection.close()
    assert process.returncode != 0
    assert complaint.strip() == "efcfs: interrupted"
    bench.assert_nothing_is_left()


@pytest.mark.parametrize("export", ["/no/such/export", "/denied"])
def test_an_export_that_is_missing_or_denied_is_refused(bench: Bench, export: str) -> None:
    done = bench.run("mount", "-o", bench.ports, f"127.0.0.1:{export}", str(bench.path))
    bench.assert_refused(done, FAILURE, f"127.0.0.1:{export}", "export")


def test_a_server_without_nfsv3_is_refused(bench: Bench, tmp_path: Path) -> None:
    with Ganesha(tmp_path / "v4", protocols="4") as server:
        ports = f"port={server.port},mountport={server.port}"
        done = bench.run("mount", "-o", ports, bench.source, str(bench.path))
    bench.assert_refused(done, FAILURE, "127.0.0.1", "NFSv3", "enable")


def test_a_machine_without_dev_fuse_is_told_what_to_load(bench: Bench) -> None:
    hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9 && exec \"$@\""
    done = bench.run(
        *EFCFS, "mount", "-o", bench.ports, bench.source, str(bench.path),
        program=["unshare", "--mount", "sh", "-c", hide, "sh"],
    )  # fmt: skip
    bench.assert_refused(done, SYSTEM, "/dev/fuse", "modprobe fuse")


def test_root_without_the_right_to_mount_is_told_which(bench: Bench) -> None:
    done = bench.run(
        *EFCFS, "mount", "-o", bench.ports, bench.source, str(bench.path),
        program=["setpriv", "--bounding-set=-sys_admin", "--"],
    )  # fmt: skip
    bench.assert_refused(done, SYSTEM, str(bench.path), "CAP_SYS_ADMIN")


@pytest.mark.parametrize("library", ["pyfuse3", "lmdb", "trio", "click"])
def test_a_library_that_is_missing_is_named(bench: Bench, tmp_path: Path, library: str) -> None:
    (tmp_path / f"{library}.py").write_text(f"raise ModuleNotFoundError('no {library}', name='{library}')")
    done = bench.run("mount", "-o", bench.ports, bench.source, str(bench.path), PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    bench.assert_refused(done, done.returncode, library, "install")


def test_a_library_that_does_not_load_is_named(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "pyfuse3.py").write_text("raise ImportError('libfuse3.so.3: cannot open shared object file')")
    done = bench.run("mount", "-o", bench.ports, bench.source, str(bench.path), PYTHONPATH=str(tmp_path))
    bench.assert_refused(done, SYSTEM, "libfuse3.so.3", "install")


# -- mounting and unmounting -------------------------------------------------------------------------


def test_a_mount_says_nothing_works_and_leaves_nothing(bench: Bench) -> None:
    bench.mount()
    (bench.path / bench.mark).write_text("here")
    assert (bench.server.directory / bench.mark).read_text() == "here"
    (bench.path / bench.mark).unlink()
    bench.umount()
    bench.assert_nothing_is_left()


def test_umount_returns_when_the_processes_are_gone(bench: Bench) -> None:
    bench.mount()
    bench.umount()
    assert bench.processes() == [] and bench.state() == []


def test_umount_of_mount_8_ends_the_processes_too(bench: Bench) -> None:
    bench.mount()
    subprocess.run(["umount", bench.path], check=True)
    bench.assert_nothing_is_left()


@pytest.mark.parametrize("command", ["umount", "status"])
def test_what_is_no_efcfs_mount_is_refused(bench: Bench, command: str) -> None:
    bench.assert_refused(bench.run(command, str(bench.path)), USAGE, str(bench.path), "not an efcfs mount")


def test_a_busy_mount_stays_and_lazy_ends_it_with_its_last_user(bench: Bench) -> None:
    bench.mount()
    name = uuid.uuid4().hex
    with (bench.path / name).open("w+") as file:
        done = bench.run("umount", str(bench.path))
        bench.assert_refused(done, FAILURE, str(bench.path), "busy", "-l", was_mounted=True)
        assert bench.mounted()
        bench.umount("-l")
        assert not bench.mounted()
        file.write("after")
        file.flush()
        file.seek(0)
        assert file.read() == "after"
    bench.assert_nothing_is_left()
    assert (bench.server.directory / name).read_text() == "after"
    (bench.server.directory / name).unlink()


def test_the_mount_point_of_a_lazily_unmounted_mount_can_be_used_again(bench: Bench) -> None:
    bench.mount()
    name = uuid.uuid4().hex
    old_keeper = bench.pid("keeper_pid")
    with (bench.path / name).open("w+") as old:
        bench.umount("-l")
        bench.mount()
        assert bench.pid("keeper_pid") != old_keeper
        old.write("the old one goes on")
    wait_until(lambda: old_keeper not in bench.processes())
    assert (bench.path / name).read_text() == "the old one goes on"
    assert {bench.pid("keeper_pid"), bench.pid("daemon_pid")} <= set(bench.processes())
    bench.umount()
    bench.assert_nothing_is_left()
    (bench.server.directory / name).unlink()


def test_force_ends_a_mount_whose_server_is_away(bench: Bench) -> None:
    bench.mount("noac")
    bench.server.pause()
    try:
        stuck = subprocess.Popen(["ls", bench.path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: Path(f"/proc/{stuck.pid}/wchan").read_text() == "request_wait_answer")
        assert stuck.poll() is None
        began = time.monotonic()
        bench.umount("-f")
        assert time.monotonic() - began < 5
        assert stuck.wait(5) != 0
        bench.assert_nothing_is_left()
    finally:
        bench.server.resume()


def test_force_ends_a_mount_whose_daemon_hangs(bench: Bench) -> None:
    bench.mount()
    os.kill(bench.pid("daemon_pid"), signal.SIGSTOP)
    began = time.monotonic()
    bench.umount("-f")
    assert time.monotonic() - began < 5
    bench.assert_nothing_is_left()


def test_a_dead_mount_is_recognised_and_umount_l_clears_it(bench: Bench) -> None:
    bench.mount()
    for pid in (bench.pid("keeper_pid"), bench.pid("daemon_pid")):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not bench.processes())
    done = bench.run("mount", "-o", bench.ports, bench.source, str(bench.path))
    bench.assert_refused(done, FAILURE, str(bench.path), "umount", was_mounted=True)
    bench.umount("-l")
    bench.mount()
    bench.umount()
    bench.assert_nothing_is_left()


def test_the_foreground_logs_to_stderr_and_ends_cleanly_on_sigint_and_sigterm(bench: Bench) -> None:
    # Ctrl-C reaches everything in the terminal's process group; a service manager ends the one it started.
    for number, send in ((signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)):
        command = [*EFCFS, "mount", "-f", "-o", bench.ports, bench.source, str(bench.path)]
        with subprocess.Popen(
            command, env=bench.environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            wait_until(lambda: bench.mounted() and os.path.ismount(bench.path))
            bench.status()
            send(process.pid, number)
            _, log = process.communicate(timeout=20)
        assert "mounted" in log and "Traceback" not in log
        bench.assert_nothing_is_left()


def test_sigterm_to_the_keeper_unmounts(bench: Bench) -> None:
    bench.mount()
    os.kill(bench.pid("keeper_pid"), signal.SIGTERM)
    bench.assert_nothing_is_left()


# -- the keeper --------------------------------------------------------------------------------------


def test_the_keeper_is_small(bench: Bench) -> None:
    bench.mount()
    status = Path(f"/proc/{bench.pid('keeper_pid')}/status").read_text()
    assert int(status.split("VmRSS:")[1].split()[0]) < 25 * 1024
    bench.umount()


def test_a_killed_daemon_is_replaced_and_the_mount_answers_without_an_error(bench: Bench) -> None:
    name = uuid.uuid4().hex
    (bench.server.directory / name).write_text("content")
    bench.mount("noac")
    known = (bench.path / name).stat().st_ino
    for _ in range(3):
        killed = bench.pid("daemon_pid")
        os.kill(killed, signal.SIGKILL)
        assert (bench.path / name).stat().st_ino == known
        assert (bench.path / name).read_text() == "content"
        wait_until(lambda old=killed: bench.status().get("daemon_pid", old) != old)  # type: ignore[misc]
    bench.umount()
    bench.assert_nothing_is_left()
    (bench.server.directory / name).unlink()


def test_a_daemon_that_dies_while_the_server_is_down_comes_back_with_the_server(bench: Bench) -> None:
    bench.mount()
    daemon = bench.pid("daemon_pid")
    bench.server.kill()
    try:
        os.kill(daemon, signal.SIGKILL)
        # Time for many refused connections.
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            assert bench.mounted()
            time.sleep(0.1)
    finally:
        bench.server.start()
    wait_until(lambda: subprocess.run(["ls", bench.path], timeout=20, check=False).returncode == 0, 20)
    bench.umount()
    bench.assert_nothing_is_left()


# -- options reach the kernel ------------------------------------------------------------------------


def test_mount_flags_reach_the_kernel(bench: Bench) -> None:
    bench.mount("ro,nosuid,nodev,noexec,noatime")
    assert {"ro", "nosuid", "nodev", "noexec", "noatime", "allow_other"} <= bench.flags()
    with pytest.raises(OSError, match="Read-only file system"):
        (bench.path / "x").touch()
    bench.umount()


def test_root_mounts_without_nosuid_and_nodev_unless_asked(bench: Bench) -> None:
    bench.mount("noallow_other")
    assert not {"nosuid", "nodev", "noexec", "allow_other"} & bench.flags()
    bench.umount()


def test_the_kernel_reads_ahead_4_mib(bench: Bench) -> None:
    bench.mount()
    (line,) = (x.split() for x in Path("/proc/self/mountinfo").read_text().splitlines() if f" {bench.path} " in x)
    assert Path(f"/sys/class/bdi/{line[2]}/read_ahead_kb").read_text() == "4096\n"
    bench.umount()


def test_a_mount_point_with_strange_characters_works(bench: Bench) -> None:
    bench.path = bench.path.with_name("a b\tc\\d#é")
    bench.path.mkdir()
    bench.mount()
    assert bench.status()["mountpoint"] == str(bench.path)
    bench.umount()
    bench.assert_nothing_is_left()


# -- status and the control socket -------------------------------------------------------------------


def test_status_as_json_has_what_monitoring_needs(bench: Bench) -> None:
    bench.mount("nconnect=2")
    status = bench.status()
    assert status["mountpoint"] == str(bench.path)
    assert status["source"] == bench.source
    assert {status["keeper_pid"], status["daemon_pid"]} <= set(bench.processes())
    uptime_s = status["uptime_s"]
    assert isinstance(uptime_s, (int, float)) and 0 <= uptime_s < 60
    assert status["server"] == {"state": "up"}
    links = status["links"]
    assert isinstance(links, list) and len(links) >= 2
    for link in links:
        assert set(link) >= {"address", "state", "in_flight_bytes", "reconnects"}
    everything = json.loads(bench.run("status", "--json").stdout)
    assert [m["mountpoint"] for m in everything].count(str(bench.path)) == 1
    table = bench.run("status", str(bench.path), COLUMNS="200").stdout
    assert bench.source in table
    bench.umount()


def test_status_of_a_hung_daemon_comes_within_ten_seconds_and_says_so(bench: Bench) -> None:
    bench.mount()
    daemon = bench.pid("daemon_pid")
    os.kill(daemon, signal.SIGSTOP)
    began = time.monotonic()
    status = bench.status()
    assert time.monotonic() - began < 10
    assert "did not answer" in str(status["error"])
    assert status["mountpoint"] == str(bench.path)
    os.kill(daemon, signal.SIGCONT)
    bench.umount()


def test_the_control_socket_answers_nonsense_with_an_error_and_goes_on(bench: Bench) -> None:
    bench.mount()
    (mounted,) = (m for m in control.mounts() if m.mountpoint == str(bench.path))
    requests: list[control.Answer] = [{"cmd": "dance"}, {"cmd": 7}, {}]
    for request in requests:
        assert "error" in control.ask(mounted, request)
    for line in (b"not json\n", b"[1]\n", b"\xff\xfe\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(mounted.runtime_dir / "control"))
            client.sendall(line)
            assert "error" in json.loads(client.recv(65536))
    assert control.ask(mounted, {"cmd": "status"})["mountpoint"] == str(bench.path)
    bench.umount()


def test_what_a_mount_keeps_is_closed_to_other_users(bench: Bench) -> None:
    bench.mount()
    for directory in bench.state():
        assert directory.stat().st_mode & 0o077 == 0
        assert directory.parent.stat().st_mode & 0o022 == 0
    assert (control.runtime_dir(str(bench.path), 0) / "control").stat().st_mode & 0o777 == 0o600
    bench.umount()


# -- a user without root -----------------------------------------------------------------------------


@pytest.fixture
def as_nobody(bench: Bench) -> Iterator[list[str]]:
    """Runs a program as nobody, in a mount namespace where /dev/fuse is for everybody, as udev makes it."""
    for directory in bench.path.parents[:3]:
        directory.chmod(0o755)
    device = bench.path.with_name("fuse")
    prepare = 'mknod -m 666 "$0" c 10 229 && mount --bind "$0" /dev/fuse && echo ready && exec cat'
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", prepare, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        yield ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", *AS_NOBODY]
        assert holder.stdin is not None
        holder.stdin.close()


def test_a_user_without_root_mounts_through_fusermount3(bench: Bench, as_nobody: list[str]) -> None:
    os.chown(bench.path, NOBODY, NOBODY)
    bench.mount("noresvport,ro,noexec,noatime", program=[*as_nobody, *EFCFS])
    line = bench.run("-F", f" {bench.path} ", "/proc/self/mountinfo", program=[*as_nobody, "grep"]).stdout
    flags = set(line.split()[5].split(","))
    assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= flags
    assert f"user_id={NOBODY}" in line and "allow_other" not in line
    done = bench.run("status", "--json", str(bench.path), program=[*as_nobody, *EFCFS])
    (status,) = json.loads(done.stdout)
    assert status["source"] == bench.source
    for field in ("keeper_pid", "daemon_pid"):
        assert Path(f"/proc/{status[field]}/status").read_text().split("Uid:")[1].split()[0] == str(NOBODY)
    assert bench.run(str(bench.path), program=[*as_nobody, "ls"]).returncode == 0
    # The spare daemon has no lower priority, which nobody could take back.
    children = Path(f"/proc/{status['keeper_pid']}/task/{status['keeper_pid']}/children")
    wait_until(lambda: len(children.read_text().split()) == 2)
    assert {nice for pid in children.read_text().split() for nice in nice_values(int(pid))} == {0}
    bench.umount(program=[*as_nobody, *EFCFS])
    bench.assert_nothing_is_left(NOBODY)


def test_a_user_without_root_ends_a_mount_by_force(bench: Bench, as_nobody: list[str]) -> None:
    os.chown(bench.path, NOBODY, NOBODY)
    bench.mount("noresvport,noac", program=[*as_nobody, *EFCFS])
    bench.server.pause()
    try:
        with subprocess.Popen([*as_nobody, "ls", str(bench.path)], stderr=subprocess.DEVNULL) as stuck:
            wait_until(lambda: Path(f"/proc/{stuck.pid}/wchan").read_text() == "request_wait_answer")
            began = time.monotonic()
            bench.umount("-f", program=[*as_nobody, *EFCFS])
            assert time.monotonic() - began < 5
            assert stuck.wait(5) != 0
        bench.assert_nothing_is_left(NOBODY)
    finally:
        bench.server.resume()


def test_a_user_who_may_not_mount_there_is_refused(bench: Bench, as_nobody: list[str]) -> None:
    done = bench.run(
        "mount", "-o", f"{bench.ports},noresvport", bench.source, str(bench.path), program=[*as_nobody, *EFCFS]
    )
    bench.assert_refused(done, SYSTEM, str(bench.path), "no write access")


# -- mount(8) ----------------------------------------------------------------------------------------


def test_mount_t_efcfs_works(bench: Bench) -> None:
    done = bench.run("-t", "efcfs", "-o", f"{bench.ports},ro", bench.source, str(bench.path), program=["mount"])
    assert (done.returncode, done.stderr) == (0, "")
    assert "ro" in bench.flags()
    bench.umount()
    bench.assert_nothing_is_left()


def test_a_line_in_fstab_works_and_mount_a_leaves_what_is_mounted(bench: Bench, tmp_path: Path) -> None:
    fstab = tmp_path / "fstab"
    options = f"{bench.ports},nconnect=2,_netdev,nofail,x-systemd.automount,comment=mine"
    fstab.write_text(f"{bench.source} {bench.path} efcfs {options} 0 0\n")
    for arguments in (["-T", str(fstab), str(bench.path)], ["-a", "-T", str(fstab)]):
        done = bench.run(*arguments, program=["mount"])
        assert (done.returncode, done.stderr) == (0, "")
        assert [m.mountpoint for m in control.mounts()].count(str(bench.path)) == 1
    subprocess.run(["umount", bench.path], check=True)
    bench.assert_nothing_is_left()


def test_mount_8_passes_on_the_line_and_the_exit_code(bench: Bench) -> None:
    done = bench.run("-t", "efcfs", "-o", "nconect=8", bench.source, str(bench.path), program=["mount"])
    assert done.returncode == USAGE
    assert "nconnect" in done.stderr


def test_the_helper_ignores_unknown_options_when_sloppy_and_mounts_nothing_when_fake(bench: Bench) -> None:
    options = f"{bench.ports},nconect=8"
    done = bench.run(bench.source, str(bench.path), "-sv", "-o", options, program=HELPER)
    assert (done.returncode, done.stderr) == (0, "")
    assert bench.mounted()
    bench.umount()
    done = bench.run(bench.source, str(bench.path), "-fn", "-o", bench.ports, program=HELPER)
    assert (done.returncode, done.stderr) == (0, "")
    bench.assert_nothing_is_left()
