"""A handler that starts a process, and terminates it if it is told so."""

import multiprocessing
import time

FORK = multiprocessing.get_context("fork")


def work(begun):
    begun.set()
    time.sleep(600)


def handle(text):
    begun = FORK.Event()
    process = FORK.Process(target=work, args=(begun,))
    process.start()
    begun.wait()
    if text == "terminate":
        process.terminate()
        process.join()
        return "terminated"
    return str(process.pid)
