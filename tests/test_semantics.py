"""docs/semantics.md: each promise names tests that prove it, and those are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "semantics.md").read_text()
PROMISES = re.findall(r"^- (.+?)$", PAGE, re.MULTILINE)
TESTS = {
    node.name
    for path in ROOT.glob("tests/**/test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
}


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_names_the_tests_that_prove_it(promise: str) -> None:
    named = re.search(r" <!-- ((?:test_\w+ ?)+) ?-->$", promise)
    assert named, f"no test is named behind: {promise}"
    assert set(named[1].split()) <= TESTS


def test_the_page_has_promises_in_one_form_only() -> None:
    assert len(PROMISES) == PAGE.count("<!--") > 40
