#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""testclient: send standard input to daemontest as one text, and print the reply.

Exit status: 0 and the reply on standard output; 1 and one line on standard error if the
service cannot be reached, gives no whole reply, or refuses the text; 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import select
import socket
import sys
import time

PROGRAM = "testclient.py"


class Failure(Exception):
    """An error to print on one line: what failed, and why."""


def main() -> int:
    """Run the command, and return its exit status."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None if closed: print(file=None) prints on standard output
    options = parse_command_line()
    try:
        text = read_text() + b"\n"
        deadline = time.monotonic() + options.timeout
        try:
            with connect(options.s, options.p, deadline) as connection:
                reply = exchange(connection, text, deadline)
        except TimeoutError as why:
            raise Failure(f"no answer from {options.s} port {options.p}: nothing within {options.timeout:g} s") from why
        print_reply(reply)
    except Failure as why:
        print(f"{PROGRAM}: {' '.join(str(why).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return 0


def parse_command_line() -> argparse.Namespace:
    """Return the options; print a usage line and exit if they are wrong."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, allow_abbrev=False, usage="%(prog)s [-s HOST] [-p PORT] [--timeout SECONDS] < FILE",
        description="Send standard input to daemontest as one text, and print the reply.")
    parser.add_argument("-s", metavar="HOST", default="localhost", help="where the service runs (default: %(default)s)")
    parser.add_argument("-p", metavar="PORT", default=36000, type=port, help="its TCP port (default: %(default)s)")
    parser.add_argument("--timeout", metavar="SECONDS", default=60.0, type=seconds,
                        help="time for the whole exchange (default: 60)")
    return parser.parse_args()


def port(argument: str) -> int:
    """Return ARGUMENT as a port number. Raise ArgumentTypeError."""
    if not re.fullmatch("[0-9]{1,5}", argument) or not 1 <= int(argument) <= 65535:
        raise argparse.ArgumentTypeError("expected a whole number from 1 to 65535")
    return int(argument)


def seconds(argument: str) -> float:
    """Return ARGUMENT as a time in seconds. Raise ArgumentTypeError."""
    try:
        value = float(argument)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError("expected a number of seconds above 0, at most 86400")
    return value


def read_text() -> bytes:
    """Return all of standard input. Raise Failure if it cannot be read to its end."""
    text = bytearray()
    try:
        while True:
            try:
                piece = os.read(0, 2**20)
            except BlockingIOError:  # O_NONBLOCK belongs to the open file: any process that shares it may have set it
                wait_for(0, select.POLLIN)
                continue
            if not piece:
                return bytes(text)
            text += piece
    except OSError as why:
        raise Failure(f"cannot read standard input: {why.strerror}") from why


def wait_for(descriptor: int, event: int) -> None:
    """Wait, without a deadline, until DESCRIPTOR is ready."""
    poller = select.poll()
    poller.register(descriptor, event)
    poller.poll()


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """Connect to the first address of HOST that accepts. Raise Failure, or TimeoutError at DEADLINE."""
    failed: OSError | UnicodeError = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            connection = None
            try:
                connection = socket.socket(family, kind, protocol)
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                connection.connect(address)
                if connection.getsockname() == connection.getpeername():
                    # Nobody listens, and the kernel took this very port for our end: we have connected to ourselves.
                    raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
                return connection
            except OSError as why:
                if connection:
                    connection.close()
                failed = why
    except (OSError, UnicodeError) as why:  # HOST is unknown, or cannot be a host's name
        failed = why
    if isinstance(failed, TimeoutError) and time.monotonic() >= deadline:
        raise failed
    raise Failure(f"cannot connect to {host} port {port}: {getattr(failed, 'strerror', None) or failed}") from failed


def exchange(connection: socket.socket, text: bytes, deadline: float) -> bytes:
    """Send TEXT, half-close, and return the reply, which may come before all of TEXT has been sent.

    Raise Failure if the connection ends before the reply does, TimeoutError at DEADLINE.
    """
    unsent = memoryview(text)
    reply = bytearray()
    lost = "connection closed"
    connection.setblocking(False)
    poller = select.poll()  # select() fails with descriptors above 1023, and our parent may have left as many open
    poller.register(connection, select.POLLIN | select.POLLOUT)
    while True:
        left = deadline - time.monotonic()
        ready = poller.poll(math.ceil(max(0.0, left) * 1000))
        if left <= 0:
            raise TimeoutError
        if ready and unsent:
            try:
                unsent = unsent[connection.send(unsent):]
                if not unsent:
                    connection.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                pass
            except OSError as why:
                lost = why.strerror or lost
                unsent = unsent[:0]  # send no more, but read on: the service may have refused the text
            if not unsent:
                poller.modify(connection, select.POLLIN)
        if ready:
            try:
                piece = connection.recv(65536)
            except BlockingIOError:
                continue
            except OSError as why:
                lost = why.strerror or lost
                break
            if not piece:
                break
            reply += piece
    if not reply.endswith(b"\n"):
        raise Failure(f"no whole reply: {lost}")
    return bytes(reply)


def print_reply(reply: bytes) -> None:
    """Print REPLY. Raise Failure if it is a refusal, or cannot be printed."""
    if re.match(rb"[0-9]+ error: ", reply):
        raise Failure("refused: " + " ".join(reply.decode(errors="replace").split()))
    unprinted = memoryview(reply)
    try:
        while unprinted:
            try:
                unprinted = unprinted[os.write(1, unprinted):]
            except BlockingIOError:  # as with standard input
                wait_for(1, select.POLLOUT)
    except OSError as why:
        raise Failure(f"cannot write to standard output: {why.strerror}") from why


if __name__ == "__main__":
    sys.exit(main())
