"""Slow clients of every kind, for the tests and the benchmark.

A kind is a coroutine that reads as what such a client does, from its connection to its end.  One event
loop plays a crowd of them, in one thread, so that thousands cost the measuring side little.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import itertools
import math
import os
import socket
import struct
import termios
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from conftest import Service

PATIENCE = 60.0  # s that a crowd may take to be in place, and a slow client to be answered
BEGINNING = b"x" * 2100  # of a text: so much that only a half-close ends it
HELD_UP = 0.8  # s of this process's own silence, after which the service may have taken a text for ended (1 s)
PIECES, PIECE, PAUSE = 14, b"x" * 16384, 0.1  # of a text on a slow line: 1.4 s
IP_BIND_ADDRESS_NO_PORT = 24  # Linux; in Python's socket module from 3.12 on


class HeldUp(Exception):
    """This process was not scheduled for so long that its client fell silent; what came of it tells nothing."""


class Client:
    """One connection of a crowd."""

    sent_at, longest_silence = math.inf, 0.0

    def __init__(self, crowd: Crowd, number: int) -> None:
        self.crowd, self.socket = crowd, socket.socket()
        self.socket.setblocking(False)
        # Many addresses, so that ports do not run out; the kernel chooses the port when it knows the whole connection.
        self.socket.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        self.socket.bind((f"127.0.2.{number % 250 + 1}", 0))

    async def connect(self) -> None:
        await asyncio.get_running_loop().sock_connect(self.socket, ("127.0.0.1", self.crowd.port))

    async def send(self, data: bytes) -> None:
        self.longest_silence = self.silence()
        await asyncio.get_running_loop().sock_sendall(self.socket, data)
        self.sent_at = time.monotonic()

    def silence(self) -> float:
        """For how long at the most it has sent nothing."""
        return max(self.longest_silence, time.monotonic() - self.sent_at)

    async def delivered(self) -> None:
        """Wait until the kernel has delivered all that was sent; otherwise its buffer would hide a slow line's pace."""
        while struct.unpack("i", fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)))[0]:
            await asyncio.sleep(0.005)

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    async def reply(self) -> bytes:
        """All that comes until the end of file."""
        reply = b""
        while piece := await asyncio.get_running_loop().sock_recv(self.socket, 65536):
            reply += piece
        return reply

    def in_place(self) -> None:
        """Say that the client is now what it is to be: stalled, silent or the like."""
        self.crowd.count_in_place()


Kind = Callable[[Client], Awaitable[bytes]]  # which returns the reply


# ---- Kinds --------------------------------------------------------------------------


async def silent(client: Client) -> bytes:
    await client.connect()
    client.in_place()
    return await client.reply()


async def urgent(client: Client) -> bytes:
    """One urgent byte: it wakes whoever waits for data, but is none."""
    await client.connect()
    client.socket.send(b"!", socket.MSG_OOB)
    client.in_place()
    return await client.reply()


async def stalled(client: Client) -> bytes:
    return await stall_after(client, BEGINNING)


async def stalled_in_a_large_text(client: Client) -> bytes:
    return await stall_after(client, bytes(2**20))


async def stall_after(client: Client, beginning: bytes) -> bytes:
    await client.connect()
    await client.send(beginning)
    await client.delivered()
    client.in_place()
    return await client.reply()


async def trickling(client: Client) -> bytes:
    """A byte each half second; so it is never silent for long, and its text never ends."""
    await client.connect()
    reply = asyncio.ensure_future(client.reply())
    try:
        await client.send(b"x")
        client.in_place()
        while not reply.done():
            await asyncio.sleep(0.5)
            await client.send(b"x")
    except ConnectionError:  # refused meanwhile
        pass
    finally:
        reply.cancel()
    if client.silence() > HELD_UP:
        raise HeldUp
    return b""


async def not_reading(client: Client) -> bytes:
    """Does not read its reply, until it is cut off or gives up."""
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await client.connect()
    await client.send(client.crowd.text)
    client.half_close()
    await asyncio.get_running_loop().sock_recv(client.socket, 1)  # the reply has begun to come
    client.in_place()
    await asyncio.sleep(client.crowd.patience)
    return b""


async def sending_on(client: Client) -> bytes:
    """Sends what is refused, and then goes on sending as if nothing had been said."""
    await client.connect()
    await client.send(client.crowd.text)
    await asyncio.get_running_loop().sock_recv(client.socket, 1)  # the refusal has come
    client.in_place()
    try:
        while True:
            await asyncio.sleep(0.2)
            await client.send(b"x")
    except ConnectionError as why:
        raise HeldUp if client.silence() > HELD_UP else why from None


async def sending_without_end(client: Client) -> bytes:
    """The same, as fast as the service takes it."""
    await client.connect()
    await client.send(client.crowd.text)
    await asyncio.get_running_loop().sock_recv(client.socket, 1)
    client.in_place()
    while True:
        await client.send(PIECE)


async def slow_line(client: Client) -> bytes:
    """Needs 1.4 s to deliver a text that does not fit into the buffers on the way."""
    await client.connect()
    clock = asyncio.get_running_loop().time
    due = clock()
    for _ in range(PIECES):
        await client.send(PIECE)
        due += PAUSE
        await asyncio.sleep(due - clock())
        await client.delivered()
        if clock() > due + 0.005:  # the line had to wait, and does not make up for it
            due = clock()
    client.half_close()
    return await client.reply()


async def slow_short_text(client: Client) -> bytes:
    """Needs 1.4 s, too, but for a text of 5 kB."""
    await client.connect()
    for _ in range(2):
        await client.send(b"x" * 2500)
        await asyncio.sleep(PIECES * PAUSE / 2)
    client.half_close()
    return await client.reply()


async def original(client: Client) -> bytes:
    """Like the original client: sends a line, keeps its sending side open, and waits."""
    await client.connect()
    await client.send(b"the text of an original client\n")
    return await client.reply()


# ---- Many of them -------------------------------------------------------------------


class Crowd:
    """COUNT clients of one KIND at a time.  With COME_BACK, each comes again and again when it has been served.

    One that was held up comes again in any case.

    As a context it is in place from the beginning: COUNT clients have said so, if theirs is a kind that does.
    """

    def __init__(self, port: int, kind: Kind, count: int, *, come_back: bool = False, waits: bool = True,
                 text: bytes = b"x", patience: float = PATIENCE) -> None:
        self.port, self.kind, self.count, self.come_back, self.waits = port, kind, count, come_back, waits
        self.text, self.patience = text, patience
        self.replies: list[bytes] = []
        self.replied_at: list[float] = []
        self.failures: list[str] = []
        self.numbers = itertools.count()
        self.come = 0
        self.all_in_place, self.loop = Event(), asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_until_complete, args=(self.play(),))

    def __enter__(self) -> Crowd:
        self.thread.start()
        if self.waits and not self.all_in_place.wait(PATIENCE):
            self.disperse()
            raise TimeoutError(f"{self.come} of {self.count} in place; {self.failures[:3]}")
        return self

    def __exit__(self, *_: object) -> None:
        self.disperse()

    def disperse(self) -> None:
        """Have all clients leave as they are."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(lambda: [task.cancel() for task in self.tasks])
        self.thread.join()
        self.loop.close()

    def wait_until_served(self) -> None:
        """Wait until each has been served, or failed."""
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            raise TimeoutError(f"{len(self.replies)} of {self.count} served; {self.failures[:3]}")

    def count_in_place(self) -> None:
        self.come += 1
        if self.come == self.count:
            self.all_in_place.set()

    async def play(self) -> None:
        self.tasks = [asyncio.ensure_future(self.one_after_the_other()) for _ in range(self.count)]
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def one_after_the_other(self) -> None:
        while True:
            client = Client(self, next(self.numbers))
            try:
                self.replies.append(await self.kind(client))
                self.replied_at.append(time.monotonic())
            except HeldUp:
                continue
            except OSError as why:
                self.failures.append(f"{type(why).__name__}: {why}")
                await asyncio.sleep(0.01)
            finally:
                client.socket.close()
            if not self.come_back:
                return


class SlowSender:
    """A single client that has sent the beginning of a text, and takes its time with the rest."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.port = connection, connection.getsockname()[1]
        self.connection.sendall(BEGINNING)

    def finish(self) -> str:
        """Send the rest; the reply."""
        self.connection.sendall(b"x")
        self.connection.shutdown(socket.SHUT_WR)
        self.last_byte = time.monotonic()
        with self.connection:
            reply = b""
            while piece := self.connection.recv(65536):
                reply += piece
        self.waited = time.monotonic() - self.last_byte
        return reply.decode()


# ---- What the service makes of them -------------------------------------------------


def in_hand(service: Service, *workers: int) -> int:
    """How many clients the service's workers, or these, have accepted and not closed.  Quick, hence by /proc/PID/fd."""
    ours = listener(service)
    return sum(len(sockets(worker) - ours) for worker in workers or service.workers())


def listener(service: Service) -> set[str]:
    """The sockets of the service's living manager."""
    return own_sockets(service.manager(), service.mark)


@functools.cache
def own_sockets(manager: int, mark: str) -> set[str]:
    """The sockets of MANAGER's own.  The MARK says which, since another service's manager may have had the same PID."""
    return sockets(manager)


def sockets(pid: int) -> set[str]:
    links = set()
    with suppress(OSError):  # it has gone
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                links.add(os.readlink(file))
    return {link for link in links if link.startswith("socket:")}


def keeper(service: Service, sender: SlowSender) -> int | None:
    """The worker that has SENDER in hand."""
    for worker in service.workers():
        with suppress(psutil.Error):
            if sender.port in [end.raddr.port for end in psutil.Process(worker).net_connections("tcp") if end.raddr]:
                return worker
    return None


def cpu_seconds(pids: set[int]) -> float:
    """What these processes have used, by their own clocks: /proc/PID/stat counts in steps of 10 ms, too coarse.

    The number of a process's clock on Linux is that of clock_getcpuclockid(3).
    """
    used = 0.0
    for pid in pids:
        with suppress(OSError):  # it has gone
            used += time.clock_gettime(~pid << 3 | 2)
    return used


def at_rest(pids: set[int]) -> bool:
    """Whether these processes do next to nothing for a moment; one that spins is never at rest."""
    before, began = cpu_seconds(pids), time.monotonic()
    time.sleep(0.4)
    return cpu_seconds(pids) - before < 0.1 * (time.monotonic() - began)
