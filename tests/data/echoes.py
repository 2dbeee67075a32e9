"""A handler that prints its text in four ways, then raises it if it is told so."""

import sys


def handle(text):
    print(text)
    print(text, end="")
    print()
    sys.stdout.write(f"{text}\n")
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
    if text.startswith("raise"):
        raise RuntimeError(text)
    return "printed"
