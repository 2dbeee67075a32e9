"""The README's blocks, for the tests that run them as they stand there."""

import os
import re
import shutil
import textwrap

import pytest
from conftest import ROOT

README = ROOT / "README.md"


def blocks() -> list[str]:
    """Every indented block, without its indentation."""
    found = re.findall(r"(?:^(?: {4}.*)?\n)+", README.read_text(), re.MULTILINE)
    return [textwrap.dedent(text).strip("\n") + "\n" for text in found if text.strip()]


def block(*lines: str) -> str:
    """The one block that has each of LINES."""
    found = [text for text in blocks() if set(lines) <= set(text.split("\n"))]
    assert len(found) == 1, f"{len(found)} blocks with {lines} in the README"
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
