"""Rules of consistency: patterns and their mistakes."""

import pytest

from efcfs.vfs.consistency import Consistency, Mode, RuleError, parse_rules


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("/data", b"/data", True),
        ("/data", b"/data/deep/file", True),
        ("/data", b"/database", False),
        ("/data", b"/other/data", False),
        ("*.frozen", b"/a/b/set.frozen", True),
        ("*.frozen", b"/a/set.frozen/inside", True),
        ("*.frozen", b"/a/frozen", False),
        ("/a/*/c", b"/a/b/c", True),
        ("/a/*/c", b"/a/b/b/c", False),
        ("/a/**/c", b"/a/b/b/c", True),
        ("/r?n", b"/run", True),
        ("/r?n", b"/r/n", False),
        ("/a+b", b"/a+b", True),
        ("/naïve", "/naïve".encode(), True),
    ],
)
def test_a_pattern_matches_what_its_description_says(pattern: str, path: bytes, matches: bool) -> None:
    consistency = Consistency("close-to-open", [(pattern, "strict")])
    assert (consistency.of(path) is Mode.STRICT) == matches


def test_the_first_rule_that_matches_holds() -> None:
    rules = parse_rules("/a/b strict  # before its parent\n\n/a immutable\n")
    consistency = Consistency("close-to-open", rules)
    assert [consistency.of(p) for p in (b"/a/b/x", b"/a/x", b"/x")] == [
        Mode.STRICT, Mode.IMMUTABLE, Mode.CLOSE_TO_OPEN,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["/a", "/a strict now", "/a Strict", "strict /a"])
def test_a_wrong_line_is_named(text: str) -> None:
    with pytest.raises(RuleError, match="line 2"):
        parse_rules(f"# rules\n{text}\n")
