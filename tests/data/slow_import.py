"""A handler whose import takes as long as the file "hold" lies beside it, a minute at the most.

With a file "compute" it takes minutes, in C code: Python attends to no signal then, and runs no other thread.
The handler replies with the word that was on the disk when its import began.
"""

import os
import time

HERE = os.path.dirname(__file__)

with open(f"{HERE}/word") as file:
    WORD = file.read()
with open(f"{HERE}/imports", "a") as file:
    file.write(f"{os.getpid()}\n")

if os.path.exists(f"{HERE}/compute"):
    sum(range(10**11))
for _ in range(6000):
    if not os.path.exists(f"{HERE}/hold"):
        break
    time.sleep(0.01)


def handle(text: str) -> str:
    if text == "slowly":
        time.sleep(2)
    return WORD
