"""A handler that prints what it is told, in several ways."""

import os
import sys

print("imported")
print("without a newline at import", end="")


def handle(text):
    match text:
        case "forgery":
            print("2026-11-23T10:00:00.123+0900 * 1 Server Terminated.")
        case "lines":
            print("two\nlines\rone\x1b[2J", file=sys.stderr)
        case "surrogate":
            print("a lone \udc80")
        case "no newline":
            print("no newline", end="")
        case "pieces":
            for piece in ("p", "ie", "ces\nand ", "a", " half"):
                sys.stdout.write(piece)
        case "both":
            print("out", file=sys.stdout)
            print("err", file=sys.stderr)
        case "descriptor":
            os.write(1, b"by the descriptor\n")
        case "flush":
            print("flushed", flush=True)
            sys.stdout.flush()
            sys.stderr.flush()
        case "long":
            print("long " * 100_000)
        case "many":
            for number in range(1000):
                print(f"line {number}")
        case "nothing":
            print(end="")
    return text
