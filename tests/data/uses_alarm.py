"""A handler that interrupts itself with the alarm signal."""

import signal
import time


class Late(Exception):
    pass


def late(*_):
    raise Late


def handle(text):
    signal.signal(signal.SIGALRM, late)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(20)
    except Late:
        return "late"
