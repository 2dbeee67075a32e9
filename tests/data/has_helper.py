"""A handler whose module forks a helper that lives on."""

import os
import signal

HELPER = os.fork()
if HELPER == 0:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.pause()


def handle(text):
    return str(HELPER)
