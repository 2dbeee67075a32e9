"""Handlers' modules for the tests of loading and reloading: eight that harm themselves, and one that takes its time."""

from __future__ import annotations

from conftest import Service, wait_until

LOAD = "cannot load handler service:handle: "


def saying(word: str) -> str:
    """The source of a handler that replies with WORD."""
    return f"def handle(text):\n    return {word!r}\n"


# Kinds of service.py: the source, and a pattern for why it cannot be loaded.
HARMFUL = {
    "raises": ("import helper\n1 / 0", LOAD + r"ZeroDivisionError: division by zero \(/.*/service\.py, line 2\)"),
    "is no Python": ("import helper\ndef handle(text)", LOAD + r"SyntaxError: .*service\.py, line 2\)"),
    "exits": ("import helper\nraise SystemExit(0)", LOAD + r"SystemExit: 0 \(/.*/service\.py, line 2\)"),
    "leaves with 0": ("import helper, os\nos._exit(0)", LOAD + r".*\(exit status 0\)"),
    "segfaults": ("import ctypes\nctypes.string_at(0)", LOAD + r".*\(SIGSEGV\)"),
    "waits for a child": ("import os\nos.wait()", LOAD + r"ChildProcessError: .*\(/.*/service\.py, line 2\)"),
    "closes all descriptors": ("import os\nos.closerange(0, 1000)\nraise OSError", "cannot .*"),
    "kills its workers": ("import os\nos.register_at_fork(after_in_child=lambda: os._exit(7))\n" + saying("never"),
                          r"cannot .*\(exit status 7\)"),
}

HELD = """
import os, time

with open("HOME/word") as file:
    WORD = file.read()
with open("HOME/imports", "a") as file:
    file.write(f"{os.getpid()}\\n")
if os.path.exists("HOME/compute"):
    sum(range(10**11))  # in C, for minutes: Python attends to no signal, and runs no other thread
for _ in range(6000):  # a minute at the most
    if not os.path.exists("HOME/sleep"):
        break
    time.sleep(0.01)

def handle(text):
    if text == "slowly":
        time.sleep(1)
    return WORD
"""


class HeldImport:
    """A handler whose import the test may hold up; it replies with the word that was said when the import began."""

    def __init__(self, service: Service, word: str = "old", how: str = "") -> None:
        self.home = service.home
        self.arguments = ("--handler", "service:handle")
        service.write_handler(HELD.replace("HOME", str(self.home)))
        self.say(word)
        if how:
            self.hold(how)

    def say(self, word: str) -> None:
        (self.home / "word").write_text(word)

    def hold(self, how: str = "sleep") -> None:
        """Hold up the imports that follow: in Python's sleep, or in C code ("compute")."""
        self.release()
        (self.home / how).touch()

    def release(self) -> None:
        """Hold up no more imports; let go those that sleep."""
        for how in ("sleep", "compute"):
            (self.home / how).unlink(missing_ok=True)

    def processes(self) -> list[int]:
        """The processes that have begun the import, in this order."""
        file = self.home / "imports"
        return [int(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def wait_for(self, count: int) -> int:
        """Wait until the import has begun COUNT times; the last one's process."""
        wait_until(lambda: len(self.processes()) >= count, f"{count} imports")
        return self.processes()[-1]
