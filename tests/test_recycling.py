"""A worker serves its number of texts, then another takes its place at once, also if its end takes time."""

import os
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby

import pytest
from conftest import Load, Service, alive, read_all, wait_until


def ask(service: Service) -> int:
    """Ask; return the worker's PID."""
    return int(service.ask("x").split()[0])


def count_workers(service: Service) -> int:
    """Return how many workers there are at once: only those that both of two looks see."""
    return len(service.workers() & service.workers())


@pytest.mark.parametrize("texts", [1, 3])
def test_one_worker_after_the_other_serves_exactly_its_texts(service: Service, texts: int) -> None:
    service.start("-w", "1", "-n", str(texts))
    began = time.monotonic()
    served = [ask(service) for _ in range(15 * texts)]
    assert [len(list(replies)) for _, replies in groupby(served)] == [texts] * 15
    assert time.monotonic() - began < 10  # the delay after a death would make it 14 s
    ended = service.wait_for_records(r"Child Process Ended\. \(0\)$", 15)
    assert {int(record["pid"]) for record in ended} == {*served}


def test_under_load_no_request_is_lost_and_there_are_at_most_twice_the_workers(service: Service) -> None:
    service.start("-w", "3", "-n", "20", "--timeout", "30")
    most = 0
    with Load(service, 4) as load, ExitStack() as stack:
        slow = [stack.enter_context(service.connect()) for _ in range(20)]
        for client in slow:
            client.sendall(b"x" * 2100)  # so much that only a half-close ends it
        while len(load.replies) < 600:  # the test's timeout ends it
            most = max(most, count_workers(service))
        for client in slow:
            client.shutdown(socket.SHUT_WR)
        assert {read_all(client).partition(b" ")[2] for client in slow} == {b"your text size: 2100\n"}
    assert load.failures == []
    assert len(service.records(r"Child Process Ended\. \(0\)$")) >= 20
    assert most <= 6


def test_client_without_a_text_does_not_count(service: Service) -> None:
    service.start("-w", "1", "-n", "4", "--timeout", "0.5")
    [worker] = service.workers()
    with ExitStack() as stack:
        silent = [stack.enter_context(service.connect()) for _ in range(6)]
        for client in silent[:3]:
            client.send(b"!", socket.MSG_OOB)  # it wakes a reader, but there is nothing to read
        assert [read_all(client) for client in silent] == [b""] * 6
    assert [ask(service) for _ in range(4)] == [worker] * 4
    assert ask(service) != worker


def test_slow_text_counts_for_the_worker_that_answers_it(service: Service) -> None:
    service.start("-w", "1", "-n", "3", "--timeout", "30")
    with ExitStack() as stack:
        clients = [stack.enter_context(service.connect()) for _ in range(6)]
        for client in clients:
            client.sendall(b"x" * 2100)  # so much that only a half-close ends it
        served = [ask(service) for _ in range(3)]
        for client in clients:
            client.shutdown(socket.SHUT_WR)
            pid, _, reply = read_all(client).partition(b" ")
            assert reply == b"your text size: 2100\n"
            served.append(int(pid))
    assert [len(list(replies)) for _, replies in groupby(served)] == [3, 3, 3]


SLOW_END = """
import atexit, os, time

def end():
    time.sleep({SECONDS})
    with open("{HOME}/ended", "a") as file:
        file.write(f"{os.getpid()}\\n")

def handle(text):
    atexit.unregister(end)
    atexit.register(end)
    return text
"""


def use_slow_end(service: Service, seconds: float) -> tuple[str, str]:
    """Write a handler whose workers take SECONDS to end; return the arguments that name it."""
    service.write_handler(SLOW_END.replace("{HOME}", str(service.home)).replace("{SECONDS}", str(seconds)))
    return "--handler", "service:handle"


def test_slow_ends_do_not_stall_the_service(service: Service) -> None:
    service.start("-w", "3", "-n", "5", *use_slow_end(service, 1.5))
    served: Counter[int] = Counter()
    longest, most, end = 0.0, 0, time.monotonic() + 2.5
    with ThreadPoolExecutor(3) as pool:
        while time.monotonic() < end:
            began = time.monotonic()
            served.update(pool.map(ask, [service] * 3))
            longest = max(longest, time.monotonic() - began)
            most = max(most, count_workers(service))
            time.sleep(0.02)
    assert longest < 1  # if all ended at the same time, a text would wait for up to 1.5 s
    assert 3 < most <= 6
    ended = [int(line) for line in (service.home / "ended").read_text().split()]
    assert len(ended) >= 3
    assert min(served[worker] for worker in ended) >= 5  # none ended early
    assert max(served.values()) > 5  # with three ending already, others went beyond their number


def test_worker_told_to_leave_has_one_successor_while_it_ends(service: Service) -> None:
    service.start("-w", "1", "-n", "2", *use_slow_end(service, 1.5))
    first = ask(service)
    os.kill(first, signal.SIGTERM)
    second = wait_until(lambda: (worker := ask(service)) != first and worker, "its successor")
    assert alive(first)
    os.kill(service.manager(), signal.SIGUSR1)
    service.wait_for_records(r"Status: worker with \d texts? served, handler idle, ending$")
    assert [ask(service) for _ in range(5)] == [second] * 5  # beyond its number: it has no room for a successor
    assert count_workers(service) == 2
    assert not (service.home / "ended").exists()
    wait_until(lambda: not alive(first), "the first to end")
    wait_until(lambda: ask(service) != second, "the second to be replaced")
    assert service.records(r"Child Process Ended\.")[0]["pid"] == str(first)


def test_reload_and_stop_wait_for_slow_ends_until_the_grace(service: Service) -> None:
    service.expected.append(r"Child Process Killed\. \(still running after the grace\)")
    service.start("-w", "1", "--grace", "1", *use_slow_end(service, 0.3))
    first = ask(service)
    use_slow_end(service, 50)
    assert service.run("--reload").returncode == 0
    assert (service.home / "ended").read_text() == f"{first}\n"
    second = ask(service)
    began = time.monotonic()
    assert service.stop().returncode == 0
    assert 0.8 < time.monotonic() - began < 20
    assert [int(record["pid"]) for record in service.records("Child Process Killed")] == [second]
