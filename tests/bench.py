#!/usr/bin/env python3
"""A benchmark: daemontest beside servers of the standard library that do the same job.

    .venv/bin/python tests/bench.py [--rounds N] [--requests N] [--large N] [--server 'NAME=COMMAND']...
    .venv/bin/python tests/bench.py --slow [--rounds N] [--requests N]

Each server in turn is started anew, warmed up, and driven by 16 clients in processes of their own: one
poem per connection, ended by a half-close, every reply checked.  That is repeated for some rounds, so
that whatever else the machine does hits all alike; the table shows each column's median.

CPU is the user and system time of all the service's processes per request, in microseconds, and as a
multiple of the first row's.  Memory is their proportional set size after the load; what they share with
the clients, such as the interpreter's code, is counted in part only.  The last column is the rate of
texts of 1 MiB.  daemontest alone has a keeper, whose time is counted, replaces its workers after 100 requests each,
and writes a log.

With --slow: what slow clients take from the others, each time compared with the same service without them, and
from those who are slow; then how long the next client of other servers waits beside stalled ones.

To measure another daemontest.py than this one, name it in the environment variable DAEMONTEST.
To compare a server of your own, give a command that serves on the port named in the environment
variable PORT, stays in the foreground, and answers `PID your text size: N` and a newline.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import re
import resource
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.pool import Pool
from typing import Any

import psutil
import slow_clients as slow
from conftest import ROOT, free_port
from slow_clients import IP_BIND_ADDRESS_NO_PORT, Crowd, Kind

POEM = (ROOT / "tests" / "data" / "poem.txt").read_bytes() + b"\n"
LARGE = POEM * (2**20 // len(POEM)) + b" " * (2**20 % len(POEM))
CLIENTS = 16
WARM_UP = 320  # requests
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
    daemontest("daemontest, 50 workers", "--workers", "50"),
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
                    raise RuntimeError("does not start")
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

def ask(port: int, text: bytes, address: str = "127.0.1.99") -> tuple[float, int]:
    """How long one whole text takes, all in all, and the length of its reply."""
    began, size = time.perf_counter(), 0
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE, source_address=(address, 0)) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(2**20):
            size, last = size + len(piece), piece
    if not size or not last.endswith(b"\n"):
        raise ValueError("no whole reply")
    return time.perf_counter() - began, size


all_ready: Any = None  # a barrier that the client processes share


def share_barrier(barrier: Any) -> None:
    global all_ready
    all_ready = barrier


def drive(number: int, port: int, text: bytes, requests: int) -> tuple[float, float, list[float]]:
    """Make the requests one after the other; when the first began, the last ended, and how long each took, in s.

    Each client has its own source address, or together they would run out of ports.  For the same
    reason the kernel is to choose the port when it knows the whole connection, not before.
    """
    good_reply = re.compile(rb"[1-9]\d* your text size: %d\n" % len(text.decode())).fullmatch
    source = (f"127.0.1.{number}", 0)
    taken: list[float] = []
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    all_ready.wait(PATIENCE)
    begin = time.perf_counter()
    for _ in range(requests):
        start = time.perf_counter()
        with socket.socket() as connection:
            connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            connection.bind(source)
            connection.connect(("127.0.0.1", port))
            connection.sendall(text)
            connection.shutdown(socket.SHUT_WR)
            reply = connection.recv(1000, socket.MSG_WAITALL)  # that is, until the server closes
        taken.append(time.perf_counter() - start)
        if not good_reply(reply):
            raise ValueError(f"wrong reply: {reply!r}")
    signal.alarm(0)
    return begin, time.perf_counter(), taken


def give_up(*_: Any) -> None:
    raise TimeoutError(f"no reply within {PATIENCE} s")


def load(clients: Pool, port: int, text: bytes, requests: int) -> tuple[float, list[float]]:
    """Drive the server by all clients at once; how long that took, and each request, in s."""
    each = max(1, requests // CLIENTS)
    done = clients.starmap(drive, [(number, port, text, each) for number in range(1, CLIENTS + 1)], chunksize=1)
    begins, ends, taken = zip(*done, strict=True)
    return max(ends) - min(begins), list(itertools.chain(*taken))


# ---- Measuring ----------------------------------------------------------------------

COLUMNS = {"requests/s": ".0f", "CPU us": ".1f", "CPU x": ".2f", "p50 ms": ".2f", "p99 ms": ".2f", "slowest ms": ".1f",
           "memory MiB": ".1f", "1 MiB texts MiB/s": ".0f"}


def measure(clients: Pool, server: Server, requests: int, large: int) -> dict[str, float]:
    """One server's part of a round: the columns of its row."""
    with running(server) as (port, process):
        load(clients, port, POEM, WARM_UP)
        before = cpu_time(at_rest(process))
        seconds, taken = load(clients, port, POEM, round(requests * server.share))
        service = at_rest(process)
        row = {"requests/s": len(taken) / seconds, "CPU us": (cpu_time(service) - before) / len(taken) * 1e6,
               "p50 ms": statistics.median(taken) * 1e3, "p99 ms": statistics.quantiles(taken, n=100)[-1] * 1e3,
               "slowest ms": max(taken) * 1e3, "memory MiB": memory(service)}
        if large:
            seconds, taken = load(clients, port, LARGE, large)
            row["1 MiB texts MiB/s"] = len(taken) / seconds
        return row


def at_rest(manager: psutil.Process) -> list[psutil.Process]:
    """All of the service's processes, once those that have ended are reaped and their successors are up."""
    while True:
        time.sleep(0.2)
        service = [manager, *manager.children(recursive=True)]
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.STATUS_ZOMBIE not in [process.status() for process in service]:
                return service


def memory(service: list[psutil.Process]) -> float:
    """MiB."""
    return float(sum(process.memory_full_info().pss for process in service) / 2**20)


def cpu_time(service: list[psutil.Process]) -> float:
    """Seconds that the processes have used, and those of their children that they have reaped.

    /proc/PID/stat counts in steps of 10 ms, too coarse to be summed over 50 workers; a process's own clock
    (clock_getcpuclockid(3), of which this is the number on Linux) is exact.  For what has been reaped there
    is only /proc/PID/stat, but the kernel itself adds that up exactly: it is rounded once, not per child.
    """
    total = 0.0
    for process in service:
        reaped = process.cpu_times()
        total += time.clock_gettime(~process.pid << 3 | 2) + reaped.children_user + reaped.children_system
    return total


# ---- With slow clients --------------------------------------------------------------

SETTLE = 1.0  # s for a crowd to be where it is to be
HANDLER = """
import time

def handle(text):
    match text.split():
        case ["sleep", seconds]:
            time.sleep(float(seconds))
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


def beside(clients: Pool, port: int, requests: int) -> dict[str, float]:
    """The columns of a row: what others have of the service now."""
    asked = [clients.apply(ask, (port, POEM))[0] for _ in range(20)]
    seconds, taken = load(clients, port, POEM, requests)
    return {"next text ms": statistics.median(asked) * 1e3, "slowest ms": max(asked) * 1e3,
            "requests/s": len(taken) / seconds}


def measure_crowd(clients: Pool, server: Server, kind: Kind, count: int, requests: int) -> dict[str, float]:
    """The columns of a row, compared with the same service alone: the mean of a moment before and one after."""
    with running(server) as (port, process):
        load(clients, port, POEM, requests)
        before = beside(clients, port, requests)
        with Crowd(port, kind, count, again=True, text=b"reply 10000000" if kind is slow.not_reading else b"",
                   patience=12.0) as crowd:
            crowd.wait_until_in_place()
            time.sleep(SETTLE)
            row = beside(clients, port, requests)
        at_rest(process)
        after = beside(clients, port, requests)
    alone = {column: (before[column] + after[column]) / 2 for column in before}
    return row | {"later by ms": row["next text ms"] - alone["next text ms"],
                  "of those alone": row["requests/s"] / alone["requests/s"]}


def served(kind: Kind, count: int, size: int, seconds: float = 8.0) -> tuple[float, float]:
    """How many are served each second, COUNT at a time, and the processor time of each, in us."""
    with running(PLAIN) as (port, process), Crowd(port, kind, count, again=True) as crowd:
        time.sleep(SETTLE)
        before, began = cpu_time(at_rest(process)), len(crowd.replies)
        time.sleep(seconds)
        us = (cpu_time(at_rest(process)) - before) / (len(crowd.replies) - began) * 1e6
        whole_rounds = crowd.replied_at[:len(crowd.replied_at) // count * count]  # since all come at the same time
        if crowd.failures or {reply.partition(b" ")[2] for reply in crowd.replies} != {b"your text size: %d\n" % size}:
            raise ValueError(f"{kind.__name__}: some were lost: {crowd.failures[:3]}")
    return (len(whole_rounds) - count) / (whole_rounds[-1] - whole_rounds[count - 1]), us


def slowest_beside_handlers(handlers: int, seconds: float = 10.0) -> dict[str, float]:
    """How long those in two parts, and those of the original kind, wait beside so many HANDLERS of 1 s; in ms."""
    with running(with_handler()) as (port, _), contextlib.ExitStack() as stack:
        for _ in range(handlers):
            stack.enter_context(Crowd(port, slow.whole, 1, again=True, text=b"sleep 1"))
        crowds = [stack.enter_context(Crowd(port, kind, count, again=True))
                  for kind, count in ((slow.two_parts, 25), (slow.original, 8))]
        time.sleep(seconds)
        return {f"{crowd.kind.__name__} beside {handlers} handlers of 1 s: slowest, ms": max(crowd.waits) * 1e3
                for crowd in crowds}


def measure_long_replies(clients: Pool) -> dict[str, float]:
    rows = {}
    with running(with_handler()) as (port, _):
        for megabytes, at_once in ((1, 1), (100, 1), (500, 1), (100, 5)):
            done = clients.starmap(ask, [(port, b"reply %d" % (megabytes * 10**6))] * at_once, chunksize=1)
            assert all(size > megabytes * 10**6 for _, size in done)
            rows[f"{at_once} replies of {megabytes} MB at a time: s"] = max(seconds for seconds, _ in done)
    return rows


def measure_peer(server: Server) -> dict[str, float]:
    """What the next client waits at the most 30 s for."""
    row = {}
    for column, count in zip(WAITS, (5, 1000), strict=True):
        with running(server) as (port, _), Crowd(port, slow.stalled, count, again=True):
            time.sleep(SETTLE)
            began = time.perf_counter()
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(POEM)
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(OSError):
                    row[column] = (time.perf_counter() - began) * 1e3 if connection.recv(1000) else math.inf
            row.setdefault(column, math.inf)
    return row


WAITS = {"ms beside 5 stalled": ".1f", "ms beside 1000 stalled": ".1f"}


def print_slow_tables(clients: Pool, rounds: int, requests: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for 5000 clients of this process's own
    rows: dict[str, list[dict[str, float]]] = {f"beside {name}": [] for name in CROWDS}
    figures: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for (server, kind, count), of_crowd in zip(CROWDS.values(), rows.values(), strict=True):
            of_crowd.append(measure_crowd(clients, server, kind, count, requests))
        lines, _ = served(slow.slow_line, 50, 229376)
        original, _ = served(slow.original, 16, 31)
        rate, us = served(slow.two_parts, 200, 34)
        found = {"50 lines that need 1.4 s each: served, of possible": lines / (50 / 1.4),
                 "16 of the original kind: served, of possible": original / (16 / 0.1),
                 "200 in two parts: each second": rate, "200 in two parts: CPU us": us,
                 **slowest_beside_handlers(0), **slowest_beside_handlers(3),
                 **measure_long_replies(clients)}
        for name, value in found.items():
            figures.setdefault(name, []).append(dict.fromkeys(FIGURE, value))
    print_table(rows, BESIDE)
    print_table(figures, FIGURE)
    peers = [server for server in SERVERS if "50" not in server.name]
    print_table({server.name: [measure_peer(server)] for server in peers}, WAITS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of which the median counts (default: 5)")
    parser.add_argument("--requests", type=int, default=8000, metavar="N",
                        help="for each server in each round; for the slowest a part of it (default: 8000)")
    parser.add_argument("--large", type=int, default=160, metavar="N", help="texts of 1 MiB (default: 160; 0: none)")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=COMMAND",
                        help="one more server to compare with; may be repeated")
    parser.add_argument("--slow", action="store_true", help="measure with slow clients instead")
    parser.add_argument("--only", default="", metavar="REGEX", help="measure only the servers whose name this matches")
    options = parser.parse_args()
    own = [Server(name, shlex.split(command)) for name, _, command in (o.partition("=") for o in options.server)]
    servers = [server for server in SERVERS + own if re.match(options.only, server.name)]
    rows: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}

    context = multiprocessing.get_context("fork")
    with context.Pool(CLIENTS, share_barrier, (context.Barrier(CLIENTS),)) as clients:
        if options.slow:
            print_slow_tables(clients, options.rounds, options.requests)
            return
        for _ in range(options.rounds):
            for server in servers:
                try:
                    row = measure(clients, server, options.requests, options.large)
                except (OSError, ValueError, RuntimeError, psutil.Error) as why:
                    sys.exit(f"bench.py: {server.name}: {why}")
                rows[server.name].append(row)
                row["CPU x"] = row["CPU us"] / rows[servers[0].name][-1]["CPU us"]

    print_table(rows, COLUMNS)


def print_table(rows: dict[str, list[dict[str, float]]], columns: dict[str, str]) -> None:
    """For each row and column the median of all rounds; COLUMNS names them and tells their form."""
    width = max(map(len, rows))
    print(" " * width, *columns, sep="  ")
    for name, row_of_rounds in rows.items():
        cells = []
        for column, form in columns.items():
            values = [row[column] for row in row_of_rounds if column in row]
            cells.append(f"{statistics.median(values) if values else math.nan:{len(column)}{form}}")
        print(f"{name:{width}}", *cells, sep="  ")
    print()


if __name__ == "__main__":
    main()
