"""A module that fails as soon as "go" exists beside it."""

import os
import time

print("importing")
for _ in range(3000):  # half a minute at the most
    if os.path.exists(f"{os.path.dirname(__file__)}/go"):
        raise RuntimeError("no good")
    time.sleep(0.01)
