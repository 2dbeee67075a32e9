"""The README's blocks, for the tests that run them as they stand there."""

import os
import re
import shutil
import textwrap

import pytest
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```\w*\n((?:.*\n)*?)```$|((?:^(?: {4}.*)?\n)+)", re.MULTILINE)


def blocks() -> list[tuple[str, str]]:
    """Every block, fenced or indented, without its indentation; with the paragraph before it."""
    found = []
    for match in BLOCK.finditer(TEXT):
        if text := textwrap.dedent(match[1] or match[2]).strip("\n"):
            found.append((f"{text}\n", TEXT[:match.start()].rstrip("\n").rpartition("\n\n")[2]))
    return found


def block(line: str) -> str:
    """The one block with a line that matches the pattern LINE."""
    found = [text for text, _ in blocks() if re.search(f"^{line}$", text, re.MULTILINE)]
    assert len(found) == 1, f"{len(found)} blocks with {line!r} in the README"
    return found[0]


def adapted(text: str, changes: dict[str, str]) -> str:
    """TEXT for the test's own paths and ports; each of CHANGES must find its place."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def program(name: str) -> str:
    """The path of a program that the README names; without it the test is skipped."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if not path:
        pytest.skip(f"{name} is not installed")
    return path
