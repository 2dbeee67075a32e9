"""A handler that reads words of three letters from a file that was opened at import."""

import os

TABLE = open(f"{os.path.dirname(__file__)}/table.txt", "rb")


def handle(text):
    return os.pread(TABLE.fileno(), 3, 4 * int(text)).decode()
