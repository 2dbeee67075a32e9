"""A handler whose text says how it forks: HOW together|apart answer|hang."""

import concurrent.futures
import functools
import multiprocessing
import os
import time

HERE = os.path.dirname(__file__)
FORK = multiprocessing.get_context("fork")


@functools.cache
def pool():
    """The worker's own: a pool has pipes, which no two processes can share."""
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=FORK)


def note(worker):
    with open(f"{HERE}/forks", "a") as file:
        file.write(f"{os.getpid()} {worker}\n")


def live_on(worker, where):
    if where == "apart":
        os.setsid()  # no signal to the worker's process group reaches it
    note(worker)
    time.sleep(60)


def handle(text):
    how, where, then = text.split() if text.count(" ") == 2 else ("none", "together", "answer")
    worker = os.getpid()
    match how:
        case "os.fork":
            if os.fork() == 0:
                live_on(worker, where)
                os._exit(0)
        case "multiprocessing":
            FORK.Process(target=live_on, args=(worker, where)).start()
        case "concurrent.futures":
            pool().submit(live_on, worker, where)
        case "return" | "raise" | "exit":
            if os.fork() == 0:
                note(worker)
                if how == "raise":
                    raise RuntimeError("in the fork")
                if how == "exit":
                    raise SystemExit
                return "the fork's"
    if then == "hang":
        time.sleep(60)
    return "the worker's"
