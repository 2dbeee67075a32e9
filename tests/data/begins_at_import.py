"""A handler whose module begins, when it is imported, what a Python program undoes at its end."""

import multiprocessing
import os
import tempfile
import time


def help_on():
    time.sleep(100)


DIRECTORY = tempfile.TemporaryDirectory(dir=os.path.dirname(__file__))
HELPER = multiprocessing.get_context("fork").Process(target=help_on, daemon=True)
HELPER.start()


def handle(text):
    return f"{HELPER.pid} {DIRECTORY.name}"
