"""A handler that tells where it was imported, and notes each import."""

import os

HERE = os.path.dirname(__file__)
IMPORTED = f"{os.getpid()} {os.getsid(0)} {os.getcwd()}"
with open(f"{HERE}/imports", "a") as file:
    file.write("imported\n")


def handle(text):
    return f"{IMPORTED} {os.getpid()}"
