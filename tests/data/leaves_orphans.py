"""A handler that leaves as many processes without a parent behind as the text says, and replies with their IDs.

They end when the file "go" lies beside it, after a minute at the most.  The text "stop" stops process 1.
"""

import os
import signal
import time

HERE = os.path.dirname(__file__)


def wait_for_go() -> None:
    for _ in range(6000):
        if os.path.exists(f"{HERE}/go"):
            break
        time.sleep(0.01)


def leave_orphan() -> int:
    """Fork a process whose parent ends at once; its PID."""
    reading, writing = os.pipe()
    if not (parent := os.fork()):
        if orphan := os.fork():
            os.write(writing, b"%d" % orphan)
        else:
            wait_for_go()
        os._exit(0)
    os.waitpid(parent, 0)
    pid = int(os.read(reading, 20))
    os.close(reading)
    os.close(writing)
    return pid


def handle(text: str) -> str:
    if text == "stop":
        os.kill(1, signal.SIGTERM)
        return ""
    return " ".join(str(leave_orphan()) for _ in range(int(text)))
