"""What a reader may believe, and for how long: per mount and, by rules, per path.

close-to-open: what another client closed is seen by the next open here. strict: every lookup, getattr and read asks.
immutable: nothing is asked twice, and nothing can be changed. A rule is a pattern and a mode; the first that matches
a file or a directory above it holds. This module knows paths and no files.
"""

import enum
import re
from collections.abc import Sequence


class Mode(enum.Enum):
    CLOSE_TO_OPEN = "close-to-open"
    STRICT = "strict"
    IMMUTABLE = "immutable"


class RuleError(ValueError):
    """str() names the line and what is wrong with it."""


def parse_rules(text: str) -> list[tuple[str, str]]:
    """(pattern, mode) of each line `PATTERN MODE`; # begins a comment. Raises RuleError.

    In a pattern * and ? stand for anything within a name, ** for anything; one that begins with / starts at the
    mount point, another one matches at any depth.
    """
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in {mode.value for mode in Mode}:
            raise RuleError(f"line {number}: '{line.strip()}' is not a pattern and close-to-open, strict or immutable")
        rules.append((words[0], words[1]))
    return rules


class Consistency:
    """The modes of one mount."""

    def __init__(self, default: str = Mode.CLOSE_TO_OPEN.value, rules: Sequence[tuple[str, str]] = ()) -> None:
        self.default = Mode(default)
        self.by_path = bool(rules)
        self._rules = [(_compiled(pattern), Mode(mode)) for pattern, mode in rules]

    def of(self, path: bytes) -> Mode:
        """The mode of a file; `path` starts at the mount point with a /."""
        return next((mode for pattern, mode in self._rules if pattern.fullmatch(path)), self.default)


def _compiled(pattern: str) -> re.Pattern[bytes]:
    parts = {"**": b".*", "*": b"[^/]*", "?": b"[^/]"}
    body = b"".join(
        parts.get(word, re.escape(word.encode("utf-8", "surrogateescape")))
        for word in re.split(r"(\*\*|\*|\?)", pattern.rstrip("/"))
    )
    start = b"" if pattern.startswith("/") else b"(?:/|/.*/)"
    return re.compile(start + body + b"(?:/.*)?", re.DOTALL)
