"""Handlers' modules for the tests of loading and reloading: some that do harm, and one that takes its time."""

import subprocess
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

from conftest import Held, Service, read_all, wait_until

HANDLER = ("--handler", "service:handle")
# Never ends, in C: Python attends to no signal, and runs no other thread.  It takes no processor time.
DEAF = """import ctypes
lock = ctypes.create_string_buffer(64)
while True:
    ctypes.PyDLL(None).pthread_mutex_lock(lock)
"""
HASTE = 15.0  # s; what is done at once may take as long on a loaded machine
LOAD = "cannot load handler service:handle: "

# Kinds of service.py: the source, and a pattern for why it cannot be loaded.
HARMFUL = {
    "raises": ("import helper\n1 / 0", LOAD + r"ZeroDivisionError: division by zero \(/.*/service\.py, line 2\)"),
    "exits": ("import helper\nraise SystemExit(0)", LOAD + r"SystemExit: 0 \(/.*/service\.py, line 2\)"),
    "has much to say": ("raise ValueError('あ' * 2000)", LOAD + r"ValueError: あ{398} \(/.*, line 1\)"),
    "leaves with 0": ("import helper, os\nos._exit(0)", LOAD + r".*\(exit status 0\)"),
    "segfaults": ("import ctypes\nctypes.string_at(0)", LOAD + r".*\(SIGSEGV\)"),
    "waits for a child": ("import os\nos.wait()", LOAD + r"ChildProcessError: .*\(/.*/service\.py, line 2\)"),
    "kills its workers": ("import os\nos.register_at_fork(after_in_child=lambda: os._exit(7))\ndef handle(_): 1",
                          r"cannot .*\(exit status 7\)"),
}
IMPORT = """
import os, time
WORD = open("HOME/word").read()
with open("HOME/imports", "a") as file:
    file.write(f"{os.getpid()}\\n")
if os.path.exists("HOME/deaf"):
    exec(DEAF)
while os.path.exists("HOME/sleep"):
    time.sleep(0.01)
def handle(text):
    time.sleep(text == "slowly")
    return WORD
"""


def saying(word: str) -> str:
    """The source of a handler that replies with WORD."""
    return f"def handle(text):\n    return {word!r}\n"


class HeldImport:
    """service.py, whose import the test may hold up; its handler replies with what was the word at the import."""

    def __init__(self, service: Service, word: str = "old") -> None:
        self.home = service.home
        service.write_handler(IMPORT.replace("HOME", str(self.home)).replace("DEAF", repr(DEAF)))
        self.say(word)

    def say(self, word: str) -> None:
        (self.home / "word").write_text(word)

    def hold(self, how: str = "sleep") -> None:
        """Hold up the imports that follow: in Python's sleep, or in C code ("deaf")."""
        (self.home / how).touch()
        self.release({"sleep", "deaf"} - {how})

    def release(self, ways: Set[str] = frozenset({"sleep", "deaf"})) -> None:
        """Hold up no more imports in these WAYS; let those go on that sleep."""
        for how in ways:
            (self.home / how).unlink(missing_ok=True)

    def wait_for(self, count: int) -> int:
        """Wait until the import has begun COUNT times; the last one's process."""
        file = self.home / "imports"
        wait_until(lambda: file.exists() and file.read_text().count("\n") >= count, f"{count} imports")
        return int(file.read_text().split()[-1])


@contextmanager
def draining(service: Service) -> Iterator[tuple[int, int, subprocess.Popen[str], Callable[[], None]]]:
    """A reload that waits for one request: the last generation, its busy worker, the command, what ends the request."""
    held = Held(service)
    service.start("-w", "2", *held.arguments)
    last, old = service.generation(), service.workers()
    with service.begin() as client:
        [busy] = held.wait_for()
        service.write_handler(saying("new"), "held")
        reloading = service.popen("--reload")
        wait_until(lambda: service.workers() & old == {busy} and len(service.workers()) == 3, "two new workers")
        def finish() -> None:
            held.release()
            assert read_all(client) == b"%d let through\n" % busy
        yield last, busy, reloading, finish
