"""The tables of bench.py --slow: daemontest with slow clients, and what the next client of other servers waits.

Each is compared with the same service without slow clients, in the same run, or with what would be possible.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import resource
import shlex
import socket
import statistics
import sys
import time
from multiprocessing.pool import Pool

import psutil
from bench import PATIENCE, POEM, ROOT, SERVERS, WARM_UP, Server, at_rest, daemontest, load, print_table, running
from slow_clients import (
    BEGINNING,
    PAUSE,
    PIECES,
    Client,
    Crowd,
    Kind,
    not_reading,
    original,
    silent,
    slow_line,
    slow_short_text,
    stall_after,
    stalled,
    stalled_in_a_large_text,
    trickling,
)

SETTLE = 1.0  # s for a crowd to have been taken in hand
ASKED = 20  # whole texts, one after the other

PLAIN = daemontest("daemontest")


def with_handler() -> Server:
    """daemontest with the handler tests/data/does_as_told.py, for replies of any length."""
    start = f'cp {shlex.quote(str(ROOT))}/tests/data/does_as_told.py . && exec "$@"'
    return Server("daemontest", ["sh", "-c", start, "sh", *daemontest("", "--handler", "does_as_told:handle").command])


# ---- Beside a crowd -----------------------------------------------------------------

CROWDS: dict[str, tuple[Server, Kind, int]] = {
    "1000 stalled in mid-text": (PLAIN, stalled, 1000),
    "1000 trickling a byte each 0.5 s": (PLAIN, trickling, 1000),
    "200 not reading a reply of 10 MB": (with_handler(), not_reading, 200),
    "5000 silent": (PLAIN, silent, 5000),
}
BESIDE = {"next text ms": ".2f", "later by ms": ".2f", "slowest ms": ".1f", "requests/s": ".0f",
          "of those alone": ".2f"}
FIGURE = {"    figure": ".2f"}


def seconds_of_next_text(port: int, address: str) -> float:
    """How long the next whole text takes, all in all."""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE, source_address=(address, 0)) as connection:
        connection.sendall(POEM)
        connection.shutdown(socket.SHUT_WR)
        reply = connection.recv(1000, socket.MSG_WAITALL)
    if not reply.endswith(b"\n"):
        raise ValueError(f"wrong reply: {reply!r}")
    return time.perf_counter() - began


def beside(clients: Pool, port: int, requests: int) -> dict[str, float]:
    """The columns of a row: what others have of the service now."""
    asked = [clients.apply(seconds_of_next_text, (port, "127.0.1.99")) for _ in range(ASKED)]
    seconds, taken = load(clients, port, POEM, requests)
    return {"next text ms": statistics.median(asked) * 1e3, "slowest ms": max(asked) * 1e3,
            "requests/s": len(taken) / seconds}


def measure_crowd(clients: Pool, server: Server, kind: Kind, count: int, requests: int) -> dict[str, float]:
    """The columns of a row, compared with the same service alone: the mean of a moment before and one after."""
    with running(server) as (port, process):
        load(clients, port, POEM, requests)
        before = beside(clients, port, requests)
        with Crowd(port, kind, count, come_back=True, text=b"reply 10000000", patience=12.0):
            time.sleep(SETTLE)
            row = beside(clients, port, requests)
        at_rest(process)
        after = beside(clients, port, requests)
    alone = {column: (before[column] + after[column]) / 2 for column in before}
    return row | {"later by ms": row["next text ms"] - alone["next text ms"],
                  "of those alone": row["requests/s"] / alone["requests/s"]}


# ---- Those who are slow themselves --------------------------------------------------


def served_of_possible(kind: Kind, count: int, seconds_each: float, size: int, seconds: float = 8.0) -> float:
    """How many are served, COUNT at a time, of as many as there could be if they waited for nothing but their lines."""
    with running(PLAIN) as (port, _), Crowd(port, kind, count, come_back=True, waits=False) as crowd:
        time.sleep(seconds)
        whole_rounds = crowd.replied_at[:len(crowd.replied_at) // count * count]  # since all come at the same time
        rate = (len(whole_rounds) - count) / (whole_rounds[-1] - whole_rounds[count - 1])
        if lost(crowd, size):
            raise ValueError(f"{kind.__name__}: {lost(crowd, size)} lost: {crowd.failures[:3]}")
    return rate / (count / seconds_each)


def lost(crowd: Crowd, size: int) -> int:
    good = b"your text size: %d\n" % size
    return len(crowd.failures) + sum(reply.partition(b" ")[2] != good for reply in crowd.replies)


def measure_losses(clients: Pool, requests: int) -> dict[str, float]:
    """Full load, and slow clients, about a tenth as many, on workers that are replaced every 100 texts."""
    with running(PLAIN) as (port, _):
        load(clients, port, POEM, WARM_UP)
        with Crowd(port, slow_short_text, 1000, come_back=True, waits=False) as crowd:
            _, taken = load(clients, port, POEM, requests)  # which checks each reply
            crowd.come_back = False
            crowd.wait_until_served()
    return {"fast requests": len(taken), "slow requests at the same time": len(crowd.replies),
            "of them lost": lost(crowd, 5000)}


# ---- Memory -------------------------------------------------------------------------


async def stalled_in_pieces(client: Client) -> bytes:
    await client.connect()
    for _ in range(30):
        await client.send(b"x" * 70)
        await client.delivered()
    client.in_place()
    return await client.reply()


def measure_memory(clients: Pool) -> dict[str, float]:
    """By how many MiB the service grows (proportional set size)."""
    crowds: dict[str, tuple[Kind, int]] = {
        "1000 stalled": (stalled, 1000), "1000 stalled that sent in pieces": (stalled_in_pieces, 1000),
        "200 stalled texts of 1 MiB": (stalled_in_a_large_text, 200)}
    rows = {}
    for name, (kind, count) in crowds.items():
        with running(daemontest("daemontest", "--timeout", "60", "--max-text", str(2**26))) as (port, process):
            load(clients, port, POEM, WARM_UP)
            before = memory(process)
            with Crowd(port, kind, count) as crowd:
                time.sleep(SETTLE)
                rows[name] = memory(process) - before
                if crowd.replies or crowd.failures:
                    raise ValueError(f"{name}: not all are in hand")
    return rows


def memory(process: psutil.Process) -> float:
    return float(sum(each.memory_full_info().pss for each in at_rest(process)) / 2**20)


# ---- Peers --------------------------------------------------------------------------

GIVE_UP = 30.0  # s that the next client waits at the most
WAITS = {"ms beside 5 stalled": ".1f", "ms beside 1000 stalled": ".1f"}  # what the next client waits
STANDARD_LIBRARY = {"asyncio", "ThreadingTCPServer", "ForkingTCPServer"}  # of which the last waits at 40 processes

WSGI = """
import os

def application(environ, start_response):
    text = environ["wsgi.input"].read().decode()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} your text size: {len(text)}\\n".encode()]
"""


def peers() -> dict[Server, bytes]:
    """Each, and what a request to it begins with."""
    servers = {PLAIN: b"", **{server: b"" for server in SERVERS if server.name in STANDARD_LIBRARY}}
    if importlib.util.find_spec("gunicorn"):
        start = f"cat > application.py <<'END'\n{WSGI}END\n" 'exec "$@" --bind "127.0.0.1:$PORT" application'
        gunicorn = [sys.executable, "-m", "gunicorn", "--workers", "5", "--backlog", "4096", "--log-level", "critical"]
        servers[Server("gunicorn, 5 sync workers", ["sh", "-c", start, "sh", *gunicorn])] = (
            b"POST / HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(POEM))
    return servers


async def stalled_in_its_text(client: Client) -> bytes:
    return await stall_after(client, client.crowd.text)


def next_client_waits(port: int, head: bytes) -> float:
    """How long, or infinite if it gives up."""
    began = time.perf_counter()
    with socket.socket() as connection, contextlib.suppress(OSError):
        connection.settimeout(GIVE_UP)
        connection.connect(("127.0.0.1", port))
        connection.sendall(head + POEM)
        if not head:
            connection.shutdown(socket.SHUT_WR)
        if connection.recv(1000):
            return time.perf_counter() - began
    return math.inf


def measure_peer(server: Server, head: bytes) -> dict[str, float]:
    row = {}
    for column, count in zip(WAITS, (5, 1000), strict=True):
        with running(server) as (port, _):
            text = head + POEM[:50] if head else BEGINNING
            with Crowd(port, stalled_in_its_text, count, come_back=True, text=text):
                time.sleep(SETTLE)
                row[column] = next_client_waits(port, head) * 1e3
    return row


# ---- All tables ---------------------------------------------------------------------


def print_tables(clients: Pool, rounds: int, requests: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for 5000 clients of this process's own

    rows: dict[str, list[dict[str, float]]] = {f"beside {name}": [] for name in CROWDS}
    others: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for (server, kind, count), of_crowd in zip(CROWDS.values(), rows.values(), strict=True):
            of_crowd.append(measure_crowd(clients, server, kind, count, requests))
        for name, value in (
                ("50 at a time that need 1.4 s each", served_of_possible(slow_line, 50, PIECES * PAUSE, 229376)),
                ("16 at a time of the original kind", served_of_possible(original, 16, 0.1, 31))):
            others.setdefault(f"{name}: served, of possible", []).append(dict.fromkeys(FIGURE, value))
        for name, value in measure_losses(clients, 5 * requests).items():
            others.setdefault(f"ten per cent slow ones: {name}", []).append(dict.fromkeys(FIGURE, value))
        for name, value in measure_memory(clients).items():
            others.setdefault(f"{name}: MiB", []).append(dict.fromkeys(FIGURE, value))
    print_table(rows, BESIDE)
    print()
    print_table(others, FIGURE)
    print()
    print_table({server.name: [measure_peer(server, head)] for server, head in peers().items()}, WAITS)
