"""A handler whose module runs commands in a thread and waits for each of them."""

import os
import subprocess
import threading
import time

HERE = os.path.dirname(__file__)


def run():
    statuses = []
    for _ in range(5):
        command = subprocess.Popen(["sh", "-c", "sleep 0.02; exit 5"])
        while command.poll() is None:  # while the workers are looked after
            time.sleep(0.005)
        statuses.append(command.returncode)
    with open(f"{HERE}/statuses", "w") as file:
        file.write(f"{statuses}\n")


threading.Thread(target=run).start()


def handle(text):
    return text
