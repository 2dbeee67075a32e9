"""A handler whose module ignores signals, and unblocks all."""

import signal

for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
    signal.signal(signum, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_SETMASK, ())


def handle(text):
    return text
