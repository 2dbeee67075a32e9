#!/usr/bin/env python3
"""A benchmark: daemontest beside servers of the standard library that do the same job.

    .venv/bin/python tests/bench.py [--slow] [--rounds N]

Each server in turn is started anew, warmed up, and driven by 16 clients in processes of their own: one poem for each
connection, every reply checked.  That is repeated for some rounds; the table shows each column's median.

CPU is the processor time of all the service's processes for each request, in microseconds, and as a multiple of the
first row's.  Memory is their proportional set size after the load.  daemontest alone replaces its workers, after 100
requests each, and writes a log.

With --slow: what slow clients take from the others, compared with the same service without them, and how they fare.
To measure another daemontest.py than this one, name it in the environment variable DAEMONTEST.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import re
import resource
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.pool import Pool

import psutil
import slow_clients as slow
from conftest import ROOT, free_port
from slow_clients import IP_BIND_ADDRESS_NO_PORT, Crowd, Kind

POEM = (ROOT / "tests" / "data" / "poem.txt").read_bytes() + b"\n"
LARGE = POEM * (2**20 // len(POEM)) + b" " * (2**20 % len(POEM))
CLIENTS = 16
WARM_UP, REQUESTS, LARGE_REQUESTS = 320, 8000, 160  # for each server in each round
PATIENCE = 60  # s that a server may take to start, or for its part of a round


# ---- The servers --------------------------------------------------------------------

SOCKETSERVER = """
import os, socketserver, sys

class Length(socketserver.StreamRequestHandler):
    def handle(self):
        text = self.rfile.read().decode()
        self.wfile.write(f"{os.getpid()} your text size: {len(text)}\\n".encode())

class Server(getattr(socketserver, sys.argv[1])):
    allow_reuse_address = True
    request_queue_size = 4096  # with the default of 5, clients wait for seconds

Server(("", int(os.environ["PORT"])), Length).serve_forever()
"""

ASYNCIO = """
import asyncio, os

async def answer(reader, writer):
    text = (await reader.read()).decode()
    writer.write(f"{os.getpid()} your text size: {len(text)}\\n".encode())
    await writer.drain()
    writer.close()

async def serve():
    server = await asyncio.start_server(answer, "0.0.0.0", int(os.environ["PORT"]), backlog=4096)
    await server.serve_forever()

asyncio.run(serve())
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Server:
    name: str
    command: Sequence[str]  # finds its port in the environment
    share: float = 1.0  # of the requests of a round, lest a slow one take most of the time


def daemontest(name: str, *arguments: str) -> Server:
    start = 'exec "$@" --port "$PORT"'
    script = os.environ.get("DAEMONTEST", str(ROOT / "daemontest.py"))
    return Server(name, ["sh", "-c", start, "sh", sys.executable, script, "--foreground", "--log-file",
                         "~/daemontest.log", *arguments])


SERVERS = [
    daemontest("daemontest"),
    Server("asyncio", [sys.executable, "-c", ASYNCIO]),
    Server("ThreadingTCPServer", [sys.executable, "-c", SOCKETSERVER, "ThreadingTCPServer"], 0.5),
    Server("ForkingTCPServer", [sys.executable, "-c", SOCKETSERVER, "ForkingTCPServer"], 0.1),
]


@contextlib.contextmanager
def running(server: Server) -> Iterator[tuple[int, psutil.Process]]:
    """The server, in a HOME of its own: its port and first process.  At the end nothing of it is left."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        process = subprocess.Popen(server.command, cwd=home, env={**os.environ, "HOME": home, "PORT": str(port)},
                                   stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(OSError, ValueError):
                    ask(port, POEM)
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{server.name} does not start")
                time.sleep(0.02)
            yield port, psutil.Process(process.pid)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# ---- The clients --------------------------------------------------------------------

def ask(port: int, text: bytes, client: int = 99) -> float:
    """How long one whole text takes, all in all, in s; each client has an address, lest they run out of ports."""
    began = time.perf_counter()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE, 0))
        connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        connection.bind((f"127.0.1.{client}", 0))
        connection.connect(("127.0.0.1", port))
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        reply = connection.recv(1000, socket.MSG_WAITALL)  # that is, until the server closes
    if not re.fullmatch(rb"[1-9]\d* your text size: %d\n" % len(text.decode()), reply):
        raise ValueError(f"wrong reply: {reply!r}")
    return time.perf_counter() - began


def drive(client: int, port: int, text: bytes, requests: int) -> tuple[float, float, list[float]]:
    """Make the requests one after the other; when the first began, the last ended, and how long each took, in s."""
    begin = time.perf_counter()
    taken = [ask(port, text, client) for _ in range(requests)]
    return begin, time.perf_counter(), taken


def load(clients: Pool, port: int, text: bytes, requests: int) -> tuple[float, list[float]]:
    """Drive the server by all clients at once; how long that took, and each request, in s."""
    each = max(1, requests // CLIENTS)
    done = clients.starmap(drive, [(number, port, text, each) for number in range(1, CLIENTS + 1)], chunksize=1)
    begins, ends, taken = zip(*done, strict=True)
    return max(ends) - min(begins), list(itertools.chain(*taken))


# ---- Measuring ----------------------------------------------------------------------

COLUMNS = {"requests/s": ".0f", "CPU us": ".1f", "CPU x": ".2f", "p50 ms": ".2f", "p99 ms": ".2f", "slowest ms": ".1f",
           "memory MiB": ".1f", "1 MiB texts MiB/s": ".0f"}


def measure(clients: Pool, server: Server) -> dict[str, float]:
    """One server's part of a round: the columns of its row."""
    with running(server) as (port, process):
        load(clients, port, POEM, WARM_UP)
        before = cpu_time(at_rest(process))
        seconds, taken = load(clients, port, POEM, round(REQUESTS * server.share))
        used = cpu_time(service := at_rest(process)) - before
        memory = sum(process.memory_full_info().pss for process in service) / 2**20
        large, _ = load(clients, port, LARGE, LARGE_REQUESTS)
        return {"requests/s": len(taken) / seconds, "CPU us": used / len(taken) * 1e6,
                "p50 ms": statistics.median(taken) * 1e3, "p99 ms": statistics.quantiles(taken, n=100)[-1] * 1e3,
                "slowest ms": max(taken) * 1e3, "memory MiB": memory, "1 MiB texts MiB/s": LARGE_REQUESTS / large}


def at_rest(manager: psutil.Process) -> list[psutil.Process]:
    """All of the service's processes, once those that have ended are reaped and their successors are up."""
    while True:
        time.sleep(0.2)
        service = [manager, *manager.children(recursive=True)]
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.STATUS_ZOMBIE not in [process.status() for process in service]:
                return service


def cpu_time(service: list[psutil.Process]) -> float:
    """Seconds used by the processes, on their own clocks (clock_getcpuclockid(3)), and by children they have reaped."""
    total = 0.0
    for process in service:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):  # a worker has just ended
            reaped = process.cpu_times()
            total += time.clock_gettime(~process.pid << 3 | 2) + reaped.children_user + reaped.children_system
    return total


# ---- With slow clients --------------------------------------------------------------

SETTLE = 1.0  # s for a crowd to be where it is to be
HANDLER = """
def handle(text):
    match text.split():
        case ["reply", count]:
            return "x" * int(count)
    return f"your text size: {len(text)}"
"""


def with_handler() -> Server:
    start = f"cat > service.py <<'END'\n{HANDLER}END\n" 'exec "$@"'
    return Server("daemontest", ["sh", "-c", start, "sh", *daemontest("", "--handler", "service:handle").command])


PLAIN = SERVERS[0]
CROWDS: dict[str, tuple[Server, Kind, int]] = {
    "1000 stalled in mid-text": (PLAIN, slow.stalled, 1000),
    "1000 trickling a byte each 0.5 s": (PLAIN, slow.trickling, 1000),
    "200 not reading a reply of 10 MB": (with_handler(), slow.not_reading, 200),
    "5000 silent": (PLAIN, slow.silent, 5000),
}
BESIDE = {"next text ms": ".2f", "later by ms": ".2f", "slowest ms": ".1f", "requests/s": ".0f",
          "of those alone": ".2f"}
FIGURE = {"    figure": ".2f"}


def beside(clients: Pool, port: int) -> dict[str, float]:
    """The columns of a row: what others have of the service now."""
    asked = [clients.apply(ask, (port, POEM)) for _ in range(20)]
    seconds, taken = load(clients, port, POEM, REQUESTS)
    return {"next text ms": statistics.median(asked) * 1e3, "slowest ms": max(asked) * 1e3,
            "requests/s": len(taken) / seconds}


def measure_crowd(clients: Pool, server: Server, kind: Kind, count: int) -> dict[str, float]:
    """The columns of a row, compared with the same service alone."""
    with running(server) as (port, _):
        load(clients, port, POEM, REQUESTS)
        alone = beside(clients, port)
        with Crowd(port, kind, count, again=True, text=b"reply 10000000" if kind is slow.not_reading else b"",
                   patience=12.0) as crowd:
            crowd.wait_until_in_place()
            time.sleep(SETTLE)
            row = beside(clients, port)
    return row | {"later by ms": row["next text ms"] - alone["next text ms"],
                  "of those alone": row["requests/s"] / alone["requests/s"]}


def served(kind: Kind, count: int, size: int, seconds: float = 9.0) -> tuple[float, float]:
    """How many are served each second, COUNT at a time, and the processor time of each, in us."""
    with running(PLAIN) as (port, process), Crowd(port, kind, count, again=True) as crowd:
        time.sleep(2.0)
        used = cpu_time(at_rest(process))
        before, began = len(crowd.replies), time.monotonic()
        time.sleep(seconds)
        replies, took = len(crowd.replies) - before, time.monotonic() - began
        used = cpu_time(at_rest(process)) - used
        if crowd.failures or {reply.partition(b" ")[2] for reply in crowd.replies} != {b"your text size: %d\n" % size}:
            raise ValueError(f"{kind.__name__}: some were lost: {crowd.failures[:3]}")
    return replies / took, used / replies * 1e6


def print_slow_tables(clients: Pool, rounds: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for 5000 clients of this process's own
    rows: dict[str, list[dict[str, float]]] = {f"beside {name}": [] for name in CROWDS}
    figures: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for (server, kind, count), of_crowd in zip(CROWDS.values(), rows.values(), strict=True):
            of_crowd.append(measure_crowd(clients, server, kind, count))
        lines, _ = served(slow.slow_line, 50, 229376)
        original, _ = served(slow.original, 16, 31)
        rate, us = served(slow.two_parts, 200, 34)
        found = {"50 lines that need 1.4 s each: served, of possible": lines / (50 / 1.4),
                 "16 of the original kind: served, of possible": original / (16 / 0.1),
                 "200 in two parts: each second": rate, "200 in two parts: CPU us": us}
        for name, value in found.items():
            figures.setdefault(name, []).append(dict.fromkeys(FIGURE, value))
    print_table(rows, BESIDE)
    print_table(figures, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of which the median counts (default: 5)")
    parser.add_argument("--slow", action="store_true", help="measure with slow clients instead")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {server.name: [] for server in SERVERS}
    with multiprocessing.get_context("fork").Pool(CLIENTS) as clients:
        if options.slow:
            print_slow_tables(clients, options.rounds)
            return
        for _ in range(options.rounds):
            for server in SERVERS:
                rows[server.name].append(row := measure(clients, server))
                row["CPU x"] = row["CPU us"] / rows[SERVERS[0].name][-1]["CPU us"]
    print_table(rows, COLUMNS)


def print_table(rows: dict[str, list[dict[str, float]]], columns: dict[str, str]) -> None:
    """For each row and column the median of all rounds; COLUMNS names them and tells their form."""
    width = max(map(len, rows))
    print(" " * width, *columns, sep="  ")
    for name, row_of_rounds in rows.items():
        cells = [f"{statistics.median(row[column] for row in row_of_rounds):{len(column)}{form}}"
                 for column, form in columns.items()]
        print(f"{name:{width}}", *cells, sep="  ")
    print()


if __name__ == "__main__":
    main()
