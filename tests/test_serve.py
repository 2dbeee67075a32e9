"""The wire: a text of any length in, its number of characters out, or a refusal that arrives."""

import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from conftest import Gate, Service, read_all, serving

MAX_TEXT = 5000
TIMEOUT = 1


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that need nothing but the default settings."""
    with serving(tmp_path_factory.mktemp("usual") / "home") as service:
        service.start()
        yield service


def size(reply: str | bytes) -> int:
    text = reply.decode() if isinstance(reply, bytes) else reply
    match = re.fullmatch(r"\d+ your text size: (\d+)\n", text)
    assert match, text
    return int(match[1])


def refusal(reply: str | bytes) -> str:
    text = reply.decode() if isinstance(reply, bytes) else reply
    match = re.fullmatch(r"\d+ error: (.+)\n", text)
    assert match, text
    return match[1]


def silent(connection: socket.socket, seconds: float) -> bool:
    """Whether nothing comes for SECONDS; the pause is what the server is to see."""
    return not select.select([connection], [], [], seconds)[0]


# ---- Sizes --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 1999, 2000, 2001, 65536, 2**20, 2**24])
def test_every_size_up_to_the_default_limit_is_counted(usual: Service, count: int) -> None:
    assert size(usual.ask(b"x" * count)) == count


def test_one_byte_beyond_the_default_limit_is_refused(usual: Service) -> None:
    assert refusal(usual.ask(b"x" * (2**24 + 1))) == "text longer than 16777216 bytes"


def test_max_text_counts_bytes_to_the_last_one(service: Service) -> None:
    service.start("--max-text", str(MAX_TEXT))
    text = "é" * (MAX_TEXT // 2)
    assert size(service.ask(text)) == MAX_TEXT // 2
    assert refusal(service.ask(text + "x")) == f"text longer than {MAX_TEXT} bytes"


@pytest.mark.parametrize(("text", "count"), [
    ("\n", 1), ("a\r\n", 3), ("\0\x1b", 2), ("あいう\n", 4), ("e\u0301", 2), ("𝄞👩\u200d👧", 4), ("\ufeffx", 2)])
def test_code_points_are_counted_not_bytes(usual: Service, text: str, count: int) -> None:
    assert size(usual.ask(text)) == count


def test_a_character_may_be_split_over_segments(usual: Service) -> None:
    with usual.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(b"x" * 2001)  # so much that no pause ends it, however long this machine makes one
        for byte in "𝄞".encode():
            client.sendall(bytes([byte]))
            assert silent(client, 0.05)
        client.shutdown(socket.SHUT_WR)
        assert size(read_all(client)) == 2002


@pytest.mark.parametrize(("text", "offset"), [
    (b"\xff", 0), (b"ab\xffcd\xff", 2), ("é\nあ".encode()[:-1], 3), (b"x\xed\xa0\x80", 1), (b"xy\xc0\xaf", 2),
    (b"x" * 2**17 + b"\x80" + b"x" * 2**17, 2**17)],
    ids=["byte", "first-of-two", "truncated", "surrogate", "overlong", "in-a-long-text"])
def test_what_is_not_utf_8_is_refused_with_its_offset(usual: Service, text: bytes, offset: int) -> None:
    assert refusal(usual.ask(text)) == f"text is not UTF-8 at byte offset {offset}"


# ---- Clients that keep their sending side open --------------------------------------


def seconds_to_reply(service: Service, text: bytes) -> float:
    """How long TEXT waits for its answer while the client keeps its side open."""
    with service.connect() as client:
        began = time.monotonic()
        client.sendall(text)
        assert size(read_all(client)) == len(text)
        return time.monotonic() - began


def test_an_open_client_is_answered_a_tenth_of_a_second_after_a_newline(usual: Service) -> None:
    waits = [seconds_to_reply(usual, b"x" * 1999 + b"\n") for _ in range(3)]
    assert 0.1 <= min(waits) < 0.9  # not the second that it would be after anything else


def test_an_open_client_is_answered_a_second_after_anything_else(usual: Service) -> None:
    with ThreadPoolExecutor() as pool:
        waits = list(pool.map(seconds_to_reply, [usual] * 3, [b"x", b"a\nb", b"x" * 2000]))
    assert 1.0 <= min(waits) < 5


def test_a_pause_never_ends_a_text_of_more_than_2000_bytes(usual: Service) -> None:
    with usual.connect() as client:
        client.sendall(b"x" * 2000 + b"\n")
        assert silent(client, 1.3)
        client.sendall(b"more\n")
        client.shutdown(socket.SHUT_WR)
        assert size(read_all(client)) == 2006


def test_a_newline_does_not_end_what_goes_on_within_a_tenth_of_a_second(usual: Service) -> None:
    for _ in range(5):
        with usual.connect() as client, suppress(ConnectionError):  # on a loaded machine "two" may come too late
            began = time.monotonic()
            client.sendall(b"one\n")
            time.sleep(0.02)  # what the server is to see
            client.sendall(b"two\n")
            in_time = time.monotonic() - began < 0.1
            reply = read_all(client)
            if in_time:
                assert size(reply) == 8
                return
    pytest.skip("this machine is too busy to send two pieces within 0.1 s")


# ---- Time ---------------------------------------------------------------------------


def test_a_silent_client_is_closed_after_the_timeout_without_a_reply(service: Service) -> None:
    service.start("--timeout", str(TIMEOUT))
    with service.connect() as client:
        began = time.monotonic()
        assert read_all(client) == b""
        assert time.monotonic() - began >= TIMEOUT * 0.9  # the kernel counts it, in its own ticks
    service.stop()
    assert not service.records("Client: ")


def test_a_reset_before_the_first_byte_is_no_request(usual: Service) -> None:
    before = usual.log
    for _ in range(20):
        client = usual.connect()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    usual.ask("last")  # after the others, in the queue of the listening socket
    assert usual.log.removeprefix(before).count("Received Text:") == 1


# ---- Several at a time --------------------------------------------------------------


def test_texts_in_parallel_get_each_its_own_answer(usual: Service) -> None:
    with ThreadPoolExecutor(8) as pool:
        counts = range(0, 30_000, 500)
        assert [size(reply) for reply in pool.map(lambda count: usual.ask("あ" * count), counts)] == list(counts)


def test_all_workers_serve_at_the_same_time(service: Service) -> None:
    gate = Gate(service)
    service.start("-w", "3", *gate.arguments)
    with ThreadPoolExecutor() as pool:
        replies = []
        for count in (1, 2, 3):  # one by one: none is in the hand of a worker whose handler another's text may occupy
            replies.append(pool.submit(service.ask, "x"))
            gate.wait_for(count)
        assert set(gate.in_hand()) == service.workers()
        gate.open()
        assert {int(reply.result().split()[0]) for reply in replies} == service.workers()


def test_the_log_names_clients_by_the_form_of_address_they_use(usual: Service) -> None:
    for host in ("127.0.0.1", "::1"):
        usual.ask("x", host)
    names = [match["message"] for match in usual.records("Client: ")[-2:]]
    assert names == ["Client: 127.0.0.1; Received Text:", "Client: ::1; Received Text:"]
