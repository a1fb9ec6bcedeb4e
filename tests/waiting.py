"""Programs that work in a mount and wait for the test in between.

Processes of their own: the test's must not hang in a mount, nor have files open that its children would close.
"""

import contextlib
import select
import subprocess
import sys


class Waiting:
    """Runs `program`, Python of the standard library, which prints a line when it has come somewhere, and reads one
    before it goes on."""

    def __init__(self, program: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", program, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def told(self, timeout_s: float = 20) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        assert ready, "the program hangs"
        return self.process.stdout.readline().rstrip("\n")

    def go_on(self, line: object = "") -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def ask(self, line: object = "") -> str:
        self.go_on(line)
        return self.told()

    def end(self, timeout_s: float = 60) -> str:
        """Let it go on to its end; returns what it prints meanwhile."""
        printed, _ = self.process.communicate("\n", timeout_s)
        return printed

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        # It does not end while it waits for a mount that nobody serves; the end of the mount will end it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=2)
