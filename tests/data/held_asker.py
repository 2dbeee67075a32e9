"""Runs the command that follows, held up where it has just made a FIFO."""

import os
import runpy
import sys
import time

make = os.mkfifo


def make_and_wait(path: str, mode: int) -> None:
    make(path, mode)
    with open(f"{os.path.dirname(__file__)}/held", "w"):
        pass
    for _ in range(6000):  # a minute at the most
        if os.path.exists(f"{os.path.dirname(__file__)}/go"):
            break
        time.sleep(0.01)


os.mkfifo = make_and_wait
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
