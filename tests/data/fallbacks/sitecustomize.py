"""On the path of a Python, makes it one for a system that is not Linux: what only Linux has is missing."""

import os
import select
import signal
import socket

for module, names in {
    os: ("pidfd_open",),
    select: ("epoll", "EPOLLEXCLUSIVE"),
    signal: ("pidfd_send_signal",),
    socket: ("MSG_MORE", "TCP_DEFER_ACCEPT", "TCP_INFO"),
}.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
