"""A handler that does what the text says: hold NAME, sleep S, compute S, reply N, fill; or tells the text's length."""

import os
import time
from contextlib import suppress

HERE = os.path.dirname(__file__)
kept = []


def handle(text: str) -> str:
    match text.split(None, 1):
        case ["hold", name]:  # until there is a file of that name; says in another that it does
            with open(f"{HERE}/held-{name}", "w") as file:
                file.write(f"{os.getpid()}\n")
            for _ in range(6000):  # a minute at the most
                if os.path.exists(f"{HERE}/{name}"):
                    break
                time.sleep(0.01)
        case ["sleep", seconds]:
            time.sleep(float(seconds))
        case ["compute", seconds]:
            end = time.process_time() + float(seconds)
            while time.process_time() < end:
                pass
        case ["reply", count]:
            return "x" * int(count)
        case ["fill"]:  # all descriptors that the worker may have, and leave them open
            with suppress(OSError):
                while True:
                    kept.append(open(os.devnull))
    return f"your text size: {len(text)}"
