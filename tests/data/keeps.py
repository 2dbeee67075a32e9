"""A handler that keeps things for later, in each of the ways that a Python program has."""

import atexit
import concurrent.futures
import functools
import gzip
import multiprocessing
import os
import signal
import threading
import time

HERE = os.path.dirname(__file__)
FILE = open(f"{HERE}/kept", "a")  # buffered: nothing is in it before it is flushed
BINARY_FILE = open(f"{HERE}/kept", "ab")
OTHERS = []


@functools.cache
def pool():
    """The worker's own: a pool has pipes, which no two processes can share."""
    return concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork"))


def note(worker, what):
    with open(f"{HERE}/kept", "a") as file:
        file.write(f"{worker} {what}\n")


def note_at_exit():
    note(os.getpid(), "atexit at import")
    print(f"exit of {os.getpid()}")


def hang_without_alarm():
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(100)


def note_later(worker, what):
    time.sleep(1)
    note(worker, what)


def note_when_told(worker, what):
    for _ in range(3000):  # half a minute at the most
        if os.path.exists(f"{HERE}/go"):
            note(worker, what)
            break
        time.sleep(0.01)


atexit.register(note_at_exit)


def handle(text):
    worker = os.getpid()
    match text:
        case "file opened at import":
            FILE.write(f"{worker} {text}\n")
        case "binary file opened at import":
            BINARY_FILE.write(f"{worker} {text}\n".encode())
        case "file":
            OTHERS.append(open(f"{HERE}/kept", "a"))
            OTHERS[-1].write(f"{worker} {text}\n")
        case "compressed file":
            OTHERS.append(gzip.open(f"{HERE}/compressed", "wt"))
            OTHERS[-1].write(text)
        case "atexit":
            atexit.register(note, worker, text)
        case "thread":
            threading.Thread(target=note_later, args=(worker, text)).start()
        case "pool":
            pool().submit(note_later, worker, text)
        case "pool at work":
            pool().submit(os.getpid).result()
        case "patient thread":
            threading.Thread(target=note_when_told, args=(worker, text)).start()
        case "endless thread":
            threading.Thread(target=time.sleep, args=(100,)).start()
        case "endless atexit":
            atexit.register(time.sleep, 100)
        case "endless atexit without alarm":
            atexit.register(hang_without_alarm)
        case "endless pool":
            pool().submit(time.sleep, 100)
    return text
