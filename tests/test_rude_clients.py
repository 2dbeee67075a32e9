"""Slow, silent and rude clients hold nobody up, leave no traceback and end no worker."""

import os
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

from conftest import Service, read_all, wait_until

BIG = 30_000_000  # bytes; more than the kernel takes from a server whose client does not read

BIG_REPLIES = """
import time

def handle(text):
    if text.startswith("slow"):
        with open("{HERE}/in-hand", "a") as file:
            file.write("x")
        time.sleep(0.2)
    return "x" * {BIG} if text.startswith("big") else f"your text size: {len(text)}"
"""


@contextmanager
def the_same_workers(service: Service, *arguments: str) -> Iterator[None]:
    """A service whose workers must all be there, and serve, after what is done to them."""
    service.write_handler(BIG_REPLIES.replace("{BIG}", str(BIG)).replace("{HERE}", str(service.home)))
    service.start("-n", "1000000", "--handler", "service:handle", *arguments)
    workers = service.workers()
    yield
    assert service.workers() == workers
    answered = wait_until(lambda: size_of(service, "alive") == 5, "an answer")
    assert answered
    assert service.workers() == workers
    assert not service.records("Child Process Died")
    assert "Traceback" not in service.log


def size_of(service: Service, text: str) -> int:
    return int(service.ask(text).rpartition(" ")[2])


def reset(connection: socket.socket) -> None:
    """Close CONNECTION with a reset instead of an end of file."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_200_silent_connections_hold_no_worker(service: Service) -> None:
    with the_same_workers(service, "-w", "2", "--timeout", "1"), ExitStack() as silent:
        connections = [silent.enter_context(service.connect()) for _ in range(200)]
        waits: list[float] = []
        begun = time.monotonic()
        # Beyond the moment at which the kernel hands them over nevertheless.
        while time.monotonic() < begun + 4 or len(waits) < 100:
            began = time.monotonic()
            assert size_of(service, "x") == 1
            waits.append(time.monotonic() - began)
            time.sleep(0.002)  # clients come one after the other, not as a storm
        # Each silent client that held a worker would hold it for a second, and all of them for 100 s.
        assert sum(seconds > 0.9 for seconds in waits) < 3  # which the machine may take, too
        for connection in connections:
            assert read_all(connection) == b""
        assert time.monotonic() - begun < 40
    assert len(service.records("Client: ")) == len(waits) + 1


def test_silent_connections_never_hinder_those_who_speak_later(service: Service) -> None:
    with the_same_workers(service, "-w", "1", "--timeout", "30"), ExitStack() as silent:
        connections = [silent.enter_context(service.connect()) for _ in range(20)]
        assert size_of(service, "x") == 1
        for connection in connections:
            connection.sendall(b"now\n")
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection).endswith(b" your text size: 4\n")


def test_texts_that_stall_or_trickle_are_refused_at_the_timeout(service: Service) -> None:
    def stall(data: bytes) -> tuple[bytes, float]:
        with service.connect() as connection:
            began = time.monotonic()
            connection.sendall(data)
            return read_all(connection), time.monotonic() - began

    def trickle(data: bytes) -> tuple[bytes, float]:
        with service.connect() as connection:
            began = time.monotonic()
            connection.sendall(data)
            connection.settimeout(0.05)
            for _ in range(200):  # never silent for long
                try:
                    return connection.recv(100), time.monotonic() - began
                except TimeoutError:
                    with suppress(ConnectionError):  # what came before the connection's end can still be read
                        connection.sendall(b"x")
            raise AssertionError("not refused")

    with the_same_workers(service, "-w", "2", "--timeout", "0.7"):
        workers = service.workers()
        rude = [(stall, b"x" * 2001), (stall, b"x\n" * 2000), (trickle, b"x"), (trickle, b"x" * 3000)]
        with ThreadPoolExecutor(4) as pool:
            let_go = [pool.submit(*act) for act in rude]
            for refusal, seconds in (each.result() for each in let_go):
                pid, _, reason = refusal.partition(b" ")
                assert (int(pid) in workers, reason) == (True, b"error: text not ended within 0.7 s\n")
                assert 0.6 < seconds < 6
        assert len(service.records("Client: .*; Refused: text not ended within 0.7 s")) == 4


def test_a_client_that_never_reads_its_reply_is_let_go_at_the_timeout(service: Service) -> None:
    with the_same_workers(service, "-w", "1", "--timeout", "0.7"), service.connect() as connection:
        began = time.monotonic()
        connection.sendall(b"big")
        connection.shutdown(socket.SHUT_WR)
        service.wait_for_records("Client: .*; Reply Not Taken: timed out")
        assert 0.6 < time.monotonic() - began < 6
        assert size_of(service, "x") == 1


def test_a_client_that_reads_a_big_reply_gets_all_of_it(service: Service) -> None:
    with the_same_workers(service, "-w", "1"), service.connect() as connection:
        connection.sendall(b"big")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection).partition(b" ")[2] == b"x" * BIG + b"\n"


def test_resets_at_any_point_end_no_worker(service: Service) -> None:
    in_hand = service.home / "in-hand"

    def before_any_data(connection: socket.socket) -> None:
        reset(connection)

    def mid_text(connection: socket.socket) -> None:
        connection.sendall(b"x" * 3000)
        wait_until(lambda: accepted(service), "a worker to accept")
        reset(connection)

    def mid_short_text(connection: socket.socket) -> None:
        connection.sendall(b"x")
        reset(connection)

    def right_after_the_text(connection: socket.socket) -> None:
        connection.sendall(b"x\n")
        connection.shutdown(socket.SHUT_WR)
        reset(connection)

    def while_the_handler_runs(connection: socket.socket) -> None:
        before = in_hand.stat().st_size if in_hand.exists() else 0
        connection.sendall(b"slow\n")
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: in_hand.exists() and in_hand.stat().st_size > before, "the handler to be called")
        reset(connection)

    def amid_the_reply(connection: socket.socket) -> None:
        connection.sendall(b"big\n")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(10000)
        reset(connection)

    def while_the_worker_lingers(connection: socket.socket) -> None:
        connection.sendall(b"x\n")
        assert connection.recv(100)
        connection.sendall(b"more")
        reset(connection)

    with the_same_workers(service, "-w", "2"):
        for point in (before_any_data, mid_text, mid_short_text, right_after_the_text, while_the_handler_runs,
                      amid_the_reply, while_the_worker_lingers):
            for _ in range(4):
                point(service.connect())
        wait_until(lambda: not accepted(service), "all connections to be closed")
        assert size_of(service, "x") == 1

    def count(word: str) -> int:
        return len(service.records(f"Client Query Processing {word}"))

    wait_until(lambda: count("Started") == count("Ended"), "every request to end")


def accepted(service: Service) -> bool:
    return any(service.has_client(pid) for pid in service.workers())


def test_half_a_character_is_refused_with_its_offset(service: Service) -> None:
    with the_same_workers(service, "-w", "4"):
        def answer(data: bytes, half_close: bool) -> str:
            with service.connect() as connection:
                connection.sendall(data)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
                return read_all(connection).decode().partition(" ")[2]

        halves = {"あ".encode()[:1]: 0, "あ".encode()[:2]: 0, "xあ".encode()[:3]: 1, "😀".encode()[:3]: 0}
        with ThreadPoolExecutor(8) as pool:
            answers = {(offset, pool.submit(answer, half, closed)) for half, offset in halves.items()
                       for closed in (True, False)}
        for offset, reply in answers:
            assert reply.result() == f"error: text is not UTF-8 at byte offset {offset}\n"


def test_clients_that_connect_and_close_do_no_harm(service: Service) -> None:
    with the_same_workers(service, "-w", "2"):
        for number in range(100):
            connection = service.connect()
            reset(connection) if number % 2 else connection.close()
    # A close without a byte is seen as a half-close, and so as a text of size 0.
    assert {match["message"].partition("; ")[2] for match in service.records("Client: ")} <= {
        "Received Text:", "Reply Not Taken: Connection reset by peer.", "Reply Not Taken: Broken pipe."}


def test_a_client_that_sends_100_mb_is_told_that_it_is_too_much(service: Service) -> None:
    with the_same_workers(service, "-w", "2"):
        workers = service.workers()
        for half_close in (True, False):
            with service.connect() as connection:
                piece = os.urandom(1_000_000)
                for _ in range(100):
                    connection.sendall(piece)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
                pid, _, reason = read_all(connection).partition(b" ")
                assert (int(pid) in workers, reason) == (True, b"error: text longer than 16777216 bytes\n")
