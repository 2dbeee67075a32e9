"""No client holds a worker: whoever is slow costs a descriptor and his bytes, nothing more."""

import socket
import struct
import time
from contextlib import ExitStack
from statistics import median

import pytest
from conftest import Service, wait_until
from slow_clients import (
    Crowd,
    Kind,
    SlowSender,
    in_hand,
    not_reading,
    original,
    sending_on,
    sending_without_end,
    silent,
    slow_line,
    stalled,
    stalled_in_a_large_text,
    trickling,
    urgent,
)

PROMPT = 2.0  # s; as a rule, also on a loaded machine.  A slow client that held a worker would hold it for 30 s
LATEST = 15.0  # s; even if a process is not scheduled for a while
TOO_LONG = b"x" * 5001
LIMITS = ("-n", "1000000", "--timeout", "30", "--max-text", "5000")


def start(service: Service, *arguments: str) -> set[int]:
    """Start with a handler that does as told; the workers."""
    service.start(*service.use_handler("does_as_told"), *arguments)
    return service.workers()


def assert_prompt(service: Service, times: int = 10) -> None:
    """The next whole texts are answered as if nobody else were there."""
    took = []
    for _ in range(times):
        began = time.monotonic()
        assert service.ask("whole\n").endswith(" your text size: 6\n")
        took.append(time.monotonic() - began)
    assert_quick(took)


def assert_quick(took: list[float]) -> None:
    assert median(took) < (PROMPT if len(took) > 1 else LATEST), took
    assert max(took) < LATEST, took


@pytest.mark.parametrize(("workers", "count"), [(1, 20), (5, 200)])
@pytest.mark.parametrize(("kind", "text"), [
    (stalled, b""), (trickling, b""), (urgent, b""), (sending_on, TOO_LONG), (silent, b"")],
    ids=["stalled", "trickling", "urgent", "sending_on", "silent"])
def test_the_next_text_is_answered_at_once_beside(
        service: Service, kind: Kind, text: bytes, workers: int, count: int) -> None:
    serving = start(service, "-w", str(workers), *LIMITS)
    with Crowd(service.port, kind, count, text=text) as crowd:
        if kind is not silent:  # whom the kernel may keep
            wait_until(lambda: in_hand(service) == count, "all of them in hand")
        assert_prompt(service)
        assert (crowd.replies, crowd.failures) == ([], []), "they are to be there still"
        if kind is not silent:
            wait_until(lambda: in_hand(service) == count, "them alone, and all of them, in hand")
    assert_prompt(service, 1)
    assert service.workers() == serving


@pytest.mark.parametrize(("workers", "count"), [(1, 5), (5, 50)])
def test_the_next_text_is_answered_at_once_beside_those_who_do_not_read_their_reply(
        service: Service, workers: int, count: int) -> None:
    serving = start(service, "-w", str(workers), "-n", "1000000", "--timeout", "30", "--max-text", "100000000")
    with Crowd(service.port, not_reading, count, text=b"reply 6000000") as crowd:
        wait_until(lambda: in_hand(service) == count, "all of them in hand")
        assert_prompt(service)
        assert (crowd.replies, crowd.failures) == ([], [])
        wait_until(lambda: in_hand(service) == count, "them alone, and all of them, in hand")
    assert_prompt(service, 1)
    assert service.workers() == serving


def test_the_next_text_is_answered_at_once_beside_endless_senders(service: Service) -> None:
    serving = start(service, "-w", "1", "-n", "1000000", "--timeout", "2", "--max-text", "5000")
    with Crowd(service.port, sending_without_end, 5, text=TOO_LONG) as crowd:
        assert_prompt(service)
        wait_until(lambda: len(crowd.failures) == 5, "all of them to be cut off")
        assert crowd.replies == []
    assert service.workers() == serving


def test_all_kinds_of_slow_clients_at_a_time_hold_not_even_a_single_worker(service: Service) -> None:
    serving = start(service, "-w", "1", "-n", "1000000", "--timeout", "30", "--max-text", "10000000")
    texts = {sending_on: bytes(10_000_001), not_reading: b"reply 6000000"}
    with ExitStack() as crowds:
        for kind in (stalled, stalled_in_a_large_text, trickling, urgent, sending_on, silent, not_reading):
            crowds.enter_context(Crowd(service.port, kind, 3, text=texts.get(kind, b"")))
        assert_prompt(service)
        wait_until(lambda: in_hand(service) >= 6 * 3, "all but the silent in hand")
    assert service.workers() == serving


def test_each_stalled_client_is_refused_at_its_own_timeout(service: Service) -> None:
    [worker] = start(service, "-w", "1", "--timeout", "1.5")
    with Crowd(service.port, stalled, 50) as crowd:
        in_place = time.monotonic()
        crowd.wait_until_served()
        assert time.monotonic() - in_place < 30  # one after the other, it would be 75 s
    assert crowd.failures == []
    assert crowd.replies == [f"{worker} error: text not ended within 1.5 s\n".encode()] * 50


def test_a_client_that_stalled_is_answered_when_it_goes_on(service: Service) -> None:
    [worker] = start(service, "-w", "1", *LIMITS)
    senders = [SlowSender(service.connect()) for _ in range(20)]
    wait_until(lambda: in_hand(service, worker) == 20, "all of them in hand")
    assert_prompt(service, 1)
    for sender in reversed(senders):
        assert sender.finish() == f"{worker} your text size: 2101\n"
    assert_quick([sender.waited for sender in senders])


def test_clients_that_reset_in_mid_text_take_nobody_along(service: Service) -> None:
    [worker] = start(service, "-w", "1", *LIMITS)
    senders = [SlowSender(service.connect()) for _ in range(20)]
    wait_until(lambda: in_hand(service, worker) == 20, "all of them in hand")
    for sender in senders[::2]:
        sender.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sender.connection.close()
    wait_until(lambda: in_hand(service, worker) == 10, "half of them to be gone")
    for sender in senders[1::2]:
        assert sender.finish() == f"{worker} your text size: 2101\n"
    assert service.workers() == {worker}
    assert len(service.records("Client: .*; Lost: Connection reset by peer")) == 10


def test_slow_lines_limit_how_fast_their_texts_are_served_and_not_the_number_of_workers(service: Service) -> None:
    start(service, "-w", "1", "--timeout", "50")
    began = time.monotonic()
    with Crowd(service.port, slow_line, 30, waits=False) as crowd:
        crowd.wait_until_served()
    assert time.monotonic() - began < 25  # one after the other, it would be 42 s
    assert crowd.failures == []
    assert [reply.partition(b" ")[2] for reply in crowd.replies] == [b"your text size: 229376\n"] * 30


def test_clients_of_the_original_kind_are_served_at_the_same_time(service: Service) -> None:
    start(service, "-w", "1", *LIMITS)
    began = time.monotonic()
    with Crowd(service.port, original, 200, waits=False) as crowd:
        crowd.wait_until_served()
    assert time.monotonic() - began < 12  # one after the other, it would be 20 s
    assert crowd.failures == []
    assert [reply.partition(b" ")[2] for reply in crowd.replies] == [b"your text size: 31\n"] * 200
