"""A handler that executes its text, after it has printed."""

import io  # noqa: F401, for the text
import sys  # noqa: F401


def handle(text):
    print("said")
    exec(text)
    return "done"
