"""The wire: a text of any length in, its reply out, or a refusal that arrives. Rude clients harm nobody."""

import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from conftest import Held, Service, read_all, serving, wait_until

HANDLER = """
def handle(text):
    word, _, count = text.partition(" ")
    return "x" * int(count) if word == "reply" else f"your text size: {len(text)}"
"""
LONG = 2**24  # bytes; the default of --max-text


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests, whose processes stay the same whatever clients do."""
    with serving(tmp_path_factory.mktemp("usual") / "home") as service:
        service.write_handler(HANDLER)
        service.start("-n", "1000000", "--handler", "service:handle")
        processes = service.processes()
        yield service
        assert size(service.ask("alive").encode()) == 5
        assert service.processes() == processes


def size(reply: bytes) -> int:
    match = re.fullmatch(rb"\d+ your text size: (\d+)\n", reply)
    assert match, reply
    return int(match[1])


def refusal(service: Service, reply: bytes) -> str:
    match = re.fullmatch(r"(\d+) error: (.+)\n", reply.decode())
    assert match, reply
    assert int(match[1]) in service.workers() | {service.keeper()}
    return match[2]


def silent(connection: socket.socket, seconds: float) -> bool:
    """Pause for SECONDS, which the server is to notice; whether nothing came."""
    return not select.select([connection], [], [], seconds)[0]


def reset(connection: socket.socket) -> None:
    """Close CONNECTION with a reset instead of an end of file."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# ---- Texts ----------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "", "\n", "a\r\n", "あいう\n", "e\u0301", "𝄞👩\u200d👧", "\ufeffx", "あ" * (LONG // 3), "x" * LONG], ids=range(9))
def test_code_points_are_counted(usual: Service, text: str) -> None:
    assert size(usual.ask(text).encode()) == len(text)


@pytest.mark.parametrize("count", [LONG + 1, 100_000_000])
@pytest.mark.parametrize("half_close", [True, False], ids=["half-close", "open side"])
def test_a_text_that_is_too_long_is_refused_while_it_is_sent(usual: Service, count: int, half_close: bool) -> None:
    with usual.begin(b"x" * count, half_close) as client:
        assert refusal(usual, read_all(client)) == f"text longer than {LONG} bytes"


def test_a_character_may_come_in_pieces(usual: Service) -> None:
    with usual.begin(b"x" * 2001, end=False) as client:  # so much that no pause ends it
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in "𝄞".encode():
            client.sendall(bytes([byte]))
            assert silent(client, 0.05)
        client.shutdown(socket.SHUT_WR)
        assert size(read_all(client)) == 2002


@pytest.mark.parametrize(("text", "offset", "half_close"), [
    (b"\xff", 0, True), (b"ab\xffcd\xff", 2, False), ("é\nあ".encode()[:-1], 3, False), (b"x\xed\xa0\x80", 1, True),
    (b"x" * 2**17 + b"\x80" + b"x" * 2**17, 2**17, True)], ids=["byte", "two", "half a character", "surrogate", "long"])
def test_a_text_that_is_not_utf_8_is_refused_with_its_offset(
        usual: Service, text: bytes, offset: int, half_close: bool) -> None:
    with usual.begin(text, half_close) as client:
        assert refusal(usual, read_all(client)) == f"text is not UTF-8 at byte offset {offset}"


def test_all_workers_serve_at_the_same_time(service: Service) -> None:
    held = Held(service)
    service.start("-w", "3", *held.arguments)
    clients = [service.begin() for _ in range(3)]
    workers = held.wait_for(3)
    assert {*workers} == service.workers()
    held.release()
    assert {int(read_all(client).split()[0]) for client in clients} == {*workers}


@pytest.mark.parametrize(("count", "clients"), [(100_000_000, 1), (20_000_000, 5)])
def test_a_reply_of_any_size_arrives_whole(usual: Service, count: int, clients: int) -> None:
    with ThreadPoolExecutor() as pool:
        for reply in pool.map(usual.ask, [f"reply {count}"] * clients):
            assert reply.partition(" ")[2] == "x" * count + "\n"


# ---- Clients of the original kind, which keep their side open -------------------------

def seconds_to_reply(service: Service, text: bytes) -> float:
    began = time.monotonic()
    with service.begin(text, end=False) as client:
        assert size(read_all(client)) == len(text)
        return time.monotonic() - began


@pytest.mark.parametrize(("text", "least", "most"), [
    (b"x\n", 0.09, 0.9), (b"x" * 1999 + b"\n", 0.09, 0.9), (b"a\nb", 0.99, 5), (b"x" * 2000, 0.99, 5)],
    ids=["newline", "newline 2000", "newline within", "2000"])
def test_an_open_side_is_answered_after_a_silence(usual: Service, text: bytes, least: float, most: float) -> None:
    assert least <= min(seconds_to_reply(usual, text) for _ in range(3 if most < 1 else 1)) < most


def test_a_silence_never_ends_a_text_of_more_than_2000_bytes(usual: Service) -> None:
    with usual.begin(b"x" * 2000 + b"\n", end=False) as client:
        assert silent(client, 1.3)
        client.sendall(b"more\n")
        client.shutdown(socket.SHUT_WR)
        assert size(read_all(client)) == 2006


def test_a_newline_does_not_end_what_goes_on_at_once(usual: Service) -> None:
    in_time, reply = False, b""
    while not in_time:  # "two" comes too late on a busy machine
        began = time.monotonic()
        with usual.begin(b"one\n", end=False) as client, suppress(ConnectionError):
            assert silent(client, 0.02)
            client.sendall(b"two\n")
            in_time = time.monotonic() - began < 0.1
            reply = read_all(client)
    assert size(reply) == 8


def test_a_silent_client_is_closed_at_the_timeout_without_a_reply(service: Service) -> None:
    service.start("--timeout", "1")
    with service.connect() as client:
        began = time.monotonic()
        assert read_all(client) == b""
        assert time.monotonic() - began >= 0.9  # the kernel counts it, in its own ticks
    service.stop()
    assert not service.records("Client: ")


@pytest.mark.parametrize(("begin", "then"), [(b"x" * 2001, b""), (b"x\n" * 2000, b""), (b"x", b"x")],
                         ids=["stalls", "stalls after a newline", "trickles"])
def test_a_text_that_does_not_end_is_refused_at_the_timeout(service: Service, begin: bytes, then: bytes) -> None:
    service.start("-w", "2", "--timeout", "0.7")
    began = time.monotonic()
    with service.begin(begin, end=False) as client:
        while silent(client, 0.05) and time.monotonic() - began < 10:
            with suppress(ConnectionError):  # what came before the connection's end can still be read
                client.sendall(then)
        assert 0.6 < time.monotonic() - began < 6
        assert refusal(service, read_all(client)) == "text not ended within 0.7 s"
        assert service.records(r"Client: 127\.0\.0\.1; Refused: text not ended within 0\.7 s\.")


# ---- Rude clients ---------------------------------------------------------------------

def test_connections_without_a_byte_are_no_requests(usual: Service) -> None:
    before = len(usual.records("Client: "))
    for _ in range(50):
        reset(usual.connect())
    assert size(usual.ask("last").encode()) == 4  # after the others, in the queue of the listening socket
    assert len(usual.records("Client: ")) == before + 1
    for _ in range(50):
        usual.connect().close()  # which looks like a half-close, and so is a text of size 0
    assert size(usual.ask("last").encode()) == 4


@pytest.mark.parametrize(("text", "half_close", "then"), [
    (b"x" * 3000, False, "pause"), (b"x", False, ""), (b"x\n", True, ""), (b"reply 30000000", True, "reply")],
    ids=["in text", "in short text", "after text", "in reply"])
def test_a_reset_at_any_point_harms_nobody(usual: Service, text: bytes, half_close: bool, then: str) -> None:
    def unfinished() -> int:
        started, ended = (usual.records(f"Client Query Processing {word}") for word in ("Started", "Ended"))
        return len(started) - len(ended)

    for _ in range(8):
        client = usual.begin(text, half_close)
        assert not then or (then == "pause" and silent(client, 0.02)) or client.recv(10000)
        reset(client)
    assert size(usual.ask("x").encode()) == 1
    wait_until(lambda: unfinished() == 0, "every request to end")


def test_a_reset_while_the_handler_runs_harms_nobody(service: Service) -> None:
    held = Held(service)
    service.start("-w", "1", *held.arguments)
    client = service.begin()
    [worker] = held.wait_for()
    reset(client)
    held.release()
    assert service.ask("x") == f"{worker} let through\n"


def test_a_client_that_goes_on_sending_reads_its_refusal_later(service: Service) -> None:
    service.start("-w", "1", "--max-text", "4000")
    with service.begin(b"x" * 4001, end=False) as client:
        for _ in range(20):  # bytes that lie unread when a connection is closed would reset it
            client.sendall(b"x" * 10_000)
            assert size(service.ask("x").encode()) == 1
        assert refusal(service, read_all(client)) == "text longer than 4000 bytes"
