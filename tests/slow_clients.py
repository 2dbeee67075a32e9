"""Slow clients of every kind, for the tests and the benchmark.

A kind is a coroutine that reads as what such a client does once it is connected.
"""

from __future__ import annotations

import asyncio
import fcntl
import random
import socket
import struct
import termios
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from threading import Event, Thread

PATIENCE = 50.0  # s that a crowd may take to be in place, and a slow client to be answered
BEGINNING = b"x" * 2100  # of a text: so long that only a half-close ends it
PIECES, PIECE, PAUSE = 14, b"x" * 16384, 0.1  # of a text on a slow line, which takes 1.4 s
IP_BIND_ADDRESS_NO_PORT = 24  # in Python's socket module from 3.12 on


class Client:
    """One of a crowd."""

    def __init__(self, crowd: Crowd) -> None:
        self.crowd, self.socket, self.loop = crowd, socket.socket(), crowd.loop
        self.socket.setblocking(False)
        # Many addresses, so that ports do not run out; the kernel chooses the port when it knows the whole connection.
        self.socket.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        self.socket.bind((f"127.0.2.{random.randint(1, 250)}", 0))

    async def send(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.socket, data)

    async def delivered(self) -> None:
        """Wait until the kernel has delivered all that was sent, lest its buffer hide a slow line's pace."""
        while struct.unpack("i", fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)))[0]:
            if self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise ConnectionResetError
            await asyncio.sleep(0.005)

    async def receive(self, size: int = 65536) -> bytes:
        return await self.loop.sock_recv(self.socket, size)

    async def reply(self) -> bytes:
        """Return all that comes until the end of file, and note how long it took to come."""
        asked, reply = time.monotonic(), bytearray()
        while piece := await self.receive():
            reply += piece
        self.crowd.waits.append(time.monotonic() - asked)
        return bytes(reply)

    async def stay(self) -> bytes:
        """Do nothing more."""
        self.crowd.count_in_place()
        return await self.reply()


Kind = Callable[[Client], Awaitable[bytes]]  # gets a connection, returns the reply


async def silent(client: Client) -> bytes:
    return await client.stay()


async def urgent(client: Client) -> bytes:
    """Sends one urgent byte, which wakes whoever waits for data, but is none."""
    client.socket.send(b"!", socket.MSG_OOB)
    return await client.stay()


async def stalled(client: Client) -> bytes:
    """Sends the crowd's text, and never its end."""
    await client.send(client.crowd.text or BEGINNING)
    await client.delivered()
    return await client.stay()


async def trickling(client: Client) -> bytes:
    """Sends a byte each half second, so that it is never silent for long."""
    await client.send(BEGINNING)
    client.crowd.count_in_place()
    while True:
        await asyncio.sleep(0.5)
        await client.send(b"x")


async def not_reading(client: Client) -> bytes:
    """Does not read its reply."""
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await client.send(client.crowd.text)
    client.socket.shutdown(socket.SHUT_WR)
    await client.receive(1)  # the reply has begun to come
    client.crowd.count_in_place()
    await asyncio.sleep(client.crowd.patience)
    return b""


async def staying(client: Client) -> bytes:
    """Reads its reply to the end, and keeps its own side open."""
    await client.send(b"the text of one who stays\n")
    await client.reply()
    client.crowd.count_in_place()
    await asyncio.sleep(client.crowd.patience)
    return b""


async def sending_on(client: Client) -> bytes:
    """Sends a text that is refused, and goes on as if nothing had been said."""
    await client.send(client.crowd.text)
    await client.receive(1)  # the refusal has come
    client.crowd.count_in_place()
    with suppress(ConnectionError):  # cut off at its timeout
        while True:
            await client.send(b"x")
            await asyncio.sleep(0.2)
    return b""


async def slow_line(client: Client) -> bytes:
    """Needs 1.4 s to deliver a text that does not fit into the buffers on the way."""
    due = client.loop.time()
    for _ in range(PIECES):
        await client.send(PIECE)
        due += PAUSE
        await asyncio.sleep(due - client.loop.time())
        await client.delivered()
        if client.loop.time() > due + 0.005:  # the line had to wait, and does not make up for it
            due = client.loop.time()
    client.socket.shutdown(socket.SHUT_WR)
    return await client.reply()


async def two_parts(client: Client) -> bytes:
    """Sends a text in two packets, 20 ms apart."""
    await client.send(b"the text ")
    await asyncio.sleep(0.02)
    await client.send(b"of a client in two parts\n")
    client.socket.shutdown(socket.SHUT_WR)
    return await client.reply()


async def original(client: Client) -> bytes:
    """Does as the original client: sends a line, keeps its sending side open, and waits."""
    await client.send(b"the text of an original client\n")
    return await client.reply()


class Crowd:
    """COUNT clients of one KIND at a time, in one thread.  With AGAIN, each comes again when it has been served."""

    def __init__(self, port: int, kind: Kind, count: int, *, again: bool = False, text: bytes = b"",
                 patience: float = PATIENCE) -> None:
        self.port, self.kind, self.count, self.again = port, kind, count, again
        self.text, self.patience = text, patience
        self.replies: list[bytes] = []
        self.waits: list[float] = []  # s from the last byte of a text to the end of its reply
        self.failures: list[str] = []
        self.in_place, self.all_in_place = 0, Event()
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_until_complete, args=(self.play(),))

    def __enter__(self) -> Crowd:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Have all clients leave as they are."""
        if self.thread.is_alive():
            with suppress(RuntimeError):  # it has just ended
                self.loop.call_soon_threadsafe(lambda: [task.cancel() for task in self.tasks])
        self.thread.join()
        self.loop.close()

    def wait_until_in_place(self) -> None:
        """Wait until each client makes the service wait."""
        if not self.all_in_place.wait(PATIENCE):
            raise TimeoutError(f"{self.in_place} of {self.count} in place; {self.failures[:3]}")

    def wait_until_served(self) -> None:
        """Wait until each client has been served for the last time, or has failed."""
        self.again = False
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            raise TimeoutError(f"{len(self.replies)} of {self.count} served; {self.failures[:3]}")

    def count_in_place(self) -> None:
        self.in_place += 1
        if self.in_place == self.count:
            self.all_in_place.set()

    async def play(self) -> None:
        self.tasks = [asyncio.ensure_future(self.play_one()) for _ in range(self.count)]
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def play_one(self) -> None:
        while True:
            client = Client(self)
            try:
                await self.loop.sock_connect(client.socket, ("127.0.0.1", self.port))
                self.replies.append(await self.kind(client))
            except OSError as why:
                self.failures.append(f"{type(why).__name__}: {why}")
                await asyncio.sleep(0.01)
            finally:
                client.socket.close()
            if not self.again:
                return
