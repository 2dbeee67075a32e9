"""A handler that uses the library which the daemon uses, too."""

import os

import lockfile


def handle(text):
    with lockfile.LockFile(f"{os.path.dirname(__file__)}/locked"):
        return "locked"
