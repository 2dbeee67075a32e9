"""The wire: a text of any length in, its reply out, or a refusal that arrives. Rude clients harm nobody."""

import os
import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
from conftest import Held, Service, read_all, serving, wait_until

REPLIES = """
import time

def handle(text):
    match text.split():
        case ["reply", count]:
            return "x" * int(count)
        case ["sleep"]:
            open(f"{HERE}/called", "a").write("x")
            time.sleep(0.2)
    return f"your text size: {len(text)}"
"""


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that need nothing but the default settings; its workers stay."""
    with serving(tmp_path_factory.mktemp("usual") / "home") as service:
        service.start("-n", "1000000")
        yield service


@contextmanager
def unharmed(service: Service, *arguments: str) -> Iterator[None]:
    """A service whose processes must all be there, and serve, after what is done to them."""
    service.write_handler(REPLIES.replace("{HERE}", str(service.home)))
    service.start("-n", "1000000", "--handler", "service:handle", *arguments)
    processes = service.processes()
    yield
    assert size(service.ask("alive")) == 5
    assert service.processes() == processes
    assert "Traceback" not in service.log


def size(reply: str | bytes) -> int:
    text = reply.decode() if isinstance(reply, bytes) else reply
    match = re.fullmatch(r"\d+ your text size: (\d+)\n", text)
    assert match, text
    return int(match[1])


def refusal(service: Service, reply: str | bytes) -> str:
    text = reply.decode() if isinstance(reply, bytes) else reply
    match = re.fullmatch(r"(\d+) error: (.+)\n", text)
    assert match, text
    assert int(match[1]) in service.workers() or int(match[1]) == service.keeper()
    return match[2]


def silent(connection: socket.socket, seconds: float) -> bool:
    """Whether nothing comes for SECONDS; the pause is what the server is to see."""
    return not select.select([connection], [], [], seconds)[0]


def reset(connection: socket.socket) -> None:
    """Close CONNECTION with a reset instead of an end of file."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# ---- Texts ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 1999, 2000, 2001, 65536, 2**20, 2**24])
def test_a_text_of_any_size_is_counted(usual: Service, count: int) -> None:
    assert size(usual.ask(b"x" * count)) == count


@pytest.mark.parametrize("count", [2**24 + 1, 100_000_000])
@pytest.mark.parametrize("half_close", [True, False], ids=["half-close", "open side"])
def test_a_text_that_is_too_long_is_refused_while_it_is_sent(usual: Service, count: int, half_close: bool) -> None:
    with usual.connect() as client:
        client.sendall(os.urandom(1000) * (count // 1000 + 1))
        if half_close:
            client.shutdown(socket.SHUT_WR)
        assert refusal(usual, read_all(client)) == "text longer than 16777216 bytes"


def test_max_text_counts_bytes_to_the_last_one(service: Service) -> None:
    service.start("--max-text", "5000")
    assert size(service.ask("é" * 2500)) == 2500
    assert refusal(service, service.ask("é" * 2500 + "x")) == "text longer than 5000 bytes"


@pytest.mark.parametrize(("text", "count"), [
    ("\n", 1), ("a\r\n", 3), ("\0\x1b", 2), ("あいう\n", 4), ("e\u0301", 2), ("𝄞👩\u200d👧", 4), ("\ufeffx", 2)])
def test_code_points_are_counted_not_bytes(usual: Service, text: str, count: int) -> None:
    assert size(usual.ask(text)) == count


def test_a_character_may_come_in_pieces(usual: Service) -> None:
    with usual.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(b"x" * 2001)  # so much that no pause ends it, however long this machine makes one
        for byte in "𝄞".encode():
            client.sendall(bytes([byte]))
            assert silent(client, 0.05)
        client.shutdown(socket.SHUT_WR)
        assert size(read_all(client)) == 2002


@pytest.mark.parametrize("half_close", [True, False], ids=["half-close", "open side"])
@pytest.mark.parametrize(("text", "offset"), [
    (b"\xff", 0), (b"ab\xffcd\xff", 2), ("é\nあ".encode()[:-1], 3), ("😀".encode()[:3], 0), (b"x\xed\xa0\x80", 1),
    (b"xy\xc0\xaf", 2), (b"x" * 2**17 + b"\x80" + b"x" * 2**17, 2**17)],
    ids=["byte", "first-of-two", "half-a-character", "three-of-four", "surrogate", "overlong", "long"])
def test_a_text_that_is_not_utf_8_is_refused_with_its_offset(
        usual: Service, text: bytes, offset: int, half_close: bool) -> None:
    with usual.connect() as client:
        client.sendall(text)
        if half_close or len(text) > 2000:  # beyond, a pause ends no text
            client.shutdown(socket.SHUT_WR)
        assert refusal(usual, read_all(client)) == f"text is not UTF-8 at byte offset {offset}"


def test_texts_in_parallel_get_each_its_own_reply(usual: Service) -> None:
    with ThreadPoolExecutor(8) as pool:
        counts = range(0, 30_000, 500)
        assert [size(reply) for reply in pool.map(lambda count: usual.ask("あ" * count), counts)] == list(counts)


def test_all_workers_serve_at_the_same_time(service: Service) -> None:
    held = Held(service)
    service.start("-w", "3", *held.arguments)
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(service.ask, "x") for _ in range(3)]
        assert set(held.wait_for(3)) == service.workers()
        held.release()
        assert {int(reply.result().split()[0]) for reply in replies} == set(held.wait_for(3))


# ---- Replies --------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "clients"), [(1_000_000, 1), (100_000_000, 1), (20_000_000, 5)])
def test_a_reply_of_any_size_arrives_whole(service: Service, count: int, clients: int) -> None:
    def ask(_: int) -> bool:
        with service.connect() as connection:
            connection.sendall(b"reply %d" % count)
            connection.shutdown(socket.SHUT_WR)
            return read_all(connection).partition(b" ")[2] == b"x" * count + b"\n"

    with unharmed(service, "-w", "2"), ThreadPoolExecutor() as pool:
        assert list(pool.map(ask, range(clients))) == [True] * clients


# ---- Clients of the original kind, which keep their side open -------------------------


def seconds_to_reply(service: Service, text: bytes) -> float:
    with service.connect() as client:
        began = time.monotonic()
        client.sendall(text)
        assert size(read_all(client)) == len(text)
        return time.monotonic() - began


@pytest.mark.parametrize(("text", "least", "most"), [
    (b"x\n", 0.1, 0.9), (b"x" * 1999 + b"\n", 0.1, 0.9), (b"x", 1, 5), (b"a\nb", 1, 5), (b"x" * 2000, 1, 5)],
    ids=["newline", "newline 2000", "anything", "newline within", "anything 2000"])
def test_an_open_side_is_answered_after_a_silence(usual: Service, text: bytes, least: float, most: float) -> None:
    assert least <= min(seconds_to_reply(usual, text) for _ in range(3 if most < 1 else 1)) < most


def test_a_silence_never_ends_a_text_of_more_than_2000_bytes(usual: Service) -> None:
    with usual.connect() as client:
        client.sendall(b"x" * 2000 + b"\n")
        assert silent(client, 1.3)
        client.sendall(b"more\n")
        client.shutdown(socket.SHUT_WR)
        assert size(read_all(client)) == 2006


def test_a_newline_does_not_end_what_goes_on_at_once(usual: Service) -> None:
    for _ in range(5):
        with usual.connect() as client, suppress(ConnectionError):  # on a loaded machine "two" may come too late
            began = time.monotonic()
            client.sendall(b"one\n")
            assert silent(client, 0.02)
            client.sendall(b"two\n")
            in_time = time.monotonic() - began < 0.1
            reply = read_all(client)
            if in_time:
                assert size(reply) == 8
                return
    pytest.skip("this machine is too busy to send two pieces within 0.1 s")


# ---- Time -----------------------------------------------------------------------------


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
    with unharmed(service, "-w", "2", "--timeout", "0.7"), service.connect() as client:
        began = time.monotonic()
        client.sendall(begin)
        while silent(client, 0.05) and time.monotonic() - began < 10:
            with suppress(ConnectionError):  # what came before the connection's end can still be read
                client.sendall(then)
        assert 0.6 < time.monotonic() - began < 6
        assert refusal(service, read_all(client)) == "text not ended within 0.7 s"
        assert service.records(r"Client: 127\.0\.0\.1; Refused: text not ended within 0\.7 s\.")


# ---- Rude clients ---------------------------------------------------------------------


def test_clients_that_reset_or_close_before_a_byte_are_no_requests(usual: Service) -> None:
    before = usual.log
    for _ in range(50):
        reset(usual.connect())
    usual.ask("last")  # after the others, in the queue of the listening socket
    assert usual.log.removeprefix(before).count("Client: ") == 1


def test_clients_that_connect_and_close_do_no_harm(service: Service) -> None:
    with unharmed(service, "-w", "2"):
        for _ in range(100):
            service.connect().close()
    # A close without a byte looks like a half-close, and so is a text of size 0.
    assert {match["message"].partition("; ")[2].partition(":")[0] for match in service.records("Client: ")} <= {
        "Received Text", "Reply Not Delivered"}


@pytest.mark.parametrize(("text", "half_close", "then"), [
    (b"x" * 3000, False, "pause"), (b"x", False, ""), (b"x\n", True, ""), (b"sleep", True, "called"),
    (b"reply 30000000", True, "replied"), (b"x\n", False, "replied")],
    ids=["in text", "in short text", "after text", "in handler", "in reply", "after reply"])
def test_a_reset_at_any_point_harms_nobody(service: Service, text: bytes, half_close: bool, then: str) -> None:
    file = service.home / "called"
    with unharmed(service, "-w", "2"):
        for number in range(8):
            client = service.connect()
            client.sendall(text)
            if half_close:
                client.shutdown(socket.SHUT_WR)
            if then == "called":
                wait_until(lambda: file.exists() and file.stat().st_size > number, "the call")  # noqa: B023
            else:
                assert not then or (then == "pause" and silent(client, 0.02)) or client.recv(10000)
            reset(client)
        assert size(service.ask("x")) == 1

    def count(word: str) -> int:
        return len(service.records(f"Client Query Processing {word}"))

    wait_until(lambda: count("Started") == count("Ended"), "every request to end")


def test_urgent_data_is_no_text(service: Service) -> None:
    with unharmed(service, "-w", "1", "--timeout", "30"), service.connect() as client:
        client.send(b"!", socket.MSG_OOB)
        assert size(service.ask("x")) == 1
        assert silent(client, 1.2)  # for which a byte would have been answered
        client.sendall(b"abc")
        client.shutdown(socket.SHUT_WR)
        assert size(read_all(client)) == 3


def test_a_client_that_goes_on_sending_reads_its_refusal_later(service: Service) -> None:
    with unharmed(service, "-w", "1", "--max-text", "4000"), service.connect() as client:
        client.sendall(b"x" * 4001)
        for _ in range(20):  # bytes that lie unread when a connection is closed would reset it
            client.sendall(b"x" * 10_000)
            assert size(service.ask("x")) == 1
        assert refusal(service, read_all(client)) == "text longer than 4000 bytes"
