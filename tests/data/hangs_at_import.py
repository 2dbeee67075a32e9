"""A handler whose module never ends to be imported; the file 'importing' tells that it has begun."""

import os
import time

open(f"{os.path.dirname(__file__)}/importing", "w").close()
while True:
    time.sleep(60)
