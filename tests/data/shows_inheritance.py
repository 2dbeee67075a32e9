"""A handler that has a command say which descriptors and blocked signals it was given."""

import subprocess

SHOW = """
for n in $(seq 0 30); do [ -e /proc/$$/fd/$n ] && printf '%s ' $n; done; echo
exec grep SigBlk /proc/self/status
"""


def handle(text):
    return subprocess.run(SHOW, shell=True, stdout=subprocess.PIPE, close_fds=False, text=True, check=True).stdout
