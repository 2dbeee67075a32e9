"""A worker serves exactly its number of texts, then another takes its place at once, also if its end takes time."""

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
    """Ask; the worker's PID."""
    return int(service.ask("x").split()[0])


def count_workers(service: Service) -> int:
    """How many workers there are at one time: a look takes time, but who is seen by two was there between them."""
    return len(service.workers() & service.workers())


def test_one_worker_after_the_other_serves_exactly_its_texts(service: Service) -> None:
    service.start("-w", "1", "-n", "3")
    served = [ask(service) for _ in range(12)]
    assert [len(list(replies)) for _, replies in groupby(served)] == [3, 3, 3, 3]
    ended = service.wait_for_records(r"Child Process Ended\. \(0\)$", 4)
    assert sorted(int(record["pid"]) for record in ended) == sorted(served[::3])  # the next may have served meanwhile


def test_none_of_several_workers_serves_more_or_ends_early(service: Service) -> None:
    service.start("-w", "3", "-n", "4")
    with ThreadPoolExecutor(6) as pool:
        served = Counter(pool.map(ask, [service] * 200))
    full = {worker for worker, count in served.items() if count >= 4}
    # Where the machine is so slow that as many are ending as are to serve, another goes on.
    assert sum(served[worker] > 4 for worker in full) <= len(full) / 10
    ended = service.wait_for_records(r"Child Process Ended\. \(0\)$", len(full))
    assert {int(record["pid"]) for record in ended} == full
    assert len(served) - len(full) <= 3  # the workers of now
    assert not service.records(r"Child Process Ended\. \([^0]")


def test_a_worker_that_has_served_its_texts_is_replaced_at_once(service: Service) -> None:
    service.start("-w", "1", "-n", "1")
    began = time.monotonic()
    assert len({ask(service) for _ in range(30)}) == 30
    assert time.monotonic() - began < 15  # the delay after a death would make it 29 s


def test_a_client_without_a_text_costs_no_text(service: Service) -> None:
    service.start("-w", "1", "-n", "4", "--timeout", "1")
    [worker] = service.workers()
    with ExitStack() as stack:
        silent = [stack.enter_context(service.connect()) for _ in range(6)]
        for client in silent[:3]:
            client.send(b"!", socket.MSG_OOB)  # wakes whoever waits for data, but is none
        assert [read_all(client) for client in silent] == [b""] * 6
    assert [ask(service) for _ in range(4)] == [worker] * 4
    assert ask(service) != worker


def test_texts_that_come_slowly_count_for_the_worker_that_answers_them(service: Service) -> None:
    service.start("-w", "1", "-n", "3", "--timeout", "30")
    with ExitStack() as stack:
        clients = [stack.enter_context(service.connect()) for _ in range(9)]
        for client in clients:
            client.sendall(b"x" * 2100)  # so much that only a half-close ends it
        for _ in range(3):
            ask(service)
        assert len(service.workers()) <= 2  # those who make it wait keep no worker
        served = []
        for client in clients:
            client.shutdown(socket.SHUT_WR)
            pid, _, reply = read_all(client).partition(b" ")
            assert reply == b"your text size: 2100\n"
            served.append(int(pid))
    assert [len(list(replies)) for _, replies in groupby(served)] == [3, 3, 3]


def test_under_load_no_request_is_lost_and_there_are_never_more_than_twice_the_workers(service: Service) -> None:
    service.start("-w", "3", "-n", "20", "--timeout", "30")
    most = 0
    with Load(service, 4) as load, ExitStack() as stack:
        slow = [stack.enter_context(service.connect()) for _ in range(20)]
        for client in slow:
            client.sendall(b"x" * 2100)
        while len(load.replies) < 600:  # the test's timeout ends it
            most = max(most, count_workers(service))
        for client in slow:
            client.shutdown(socket.SHUT_WR)
        assert {read_all(client).partition(b" ")[2] for client in slow} == {b"your text size: 2100\n"}
    assert load.failures == []
    assert len(service.records("Child Process Ended.")) >= 20
    assert most <= 6


# ---- Ends that take time ------------------------------------------------------------


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
    """Write a handler whose workers take SECONDS to end; the arguments that name it."""
    source = SLOW_END.replace("{HOME}", str(service.home)).replace("{SECONDS}", str(seconds))
    service.write_handler(source)
    return "--handler", "service:handle"


def slowest(service: Service, clients: int, seconds: float) -> tuple[Counter[int], float, int]:
    """Let CLIENTS ask on for SECONDS; each worker's texts, the longest wait, and the most workers at one time."""
    end = time.monotonic() + seconds

    def ask_on(_: int) -> list[tuple[int, float]]:
        asked = []
        while (began := time.monotonic()) < end:
            asked.append((ask(service), time.monotonic() - began))
            time.sleep(0.005)
        return asked

    most = 0
    with ThreadPoolExecutor(clients) as pool:
        clients_asked = [pool.submit(ask_on, number) for number in range(clients)]
        while not all(asked.done() for asked in clients_asked):
            most = max(most, count_workers(service))
            time.sleep(0.01)
        asked = [one for some in clients_asked for one in some.result()]
    return Counter(worker for worker, _ in asked), max(wait for _, wait in asked), most


@pytest.mark.parametrize(("workers", "texts"), [(1, 10), (3, 20), (3, 300)])
def test_ends_of_2_s_do_not_stall_the_service(service: Service, workers: int, texts: int) -> None:
    service.start("-w", str(workers), "-n", str(texts), *use_slow_end(service, 2))
    served, longest, most = slowest(service, 3, 7)
    assert longest < 1  # where nobody serves, it is up to 2 s
    assert workers < most <= 2 * workers
    ended = [int(line) for line in (service.home / "ended").read_text().split()]
    assert len(ended) == len({*ended}) >= workers
    # None ended early, and some went on while as many were ending as are to serve.
    assert min(served[worker] for worker in ended) >= texts
    assert texts == 300 or max(served.values()) > texts


def test_a_successor_serves_while_the_last_one_still_ends(service: Service) -> None:
    service.start("-w", "1", "-n", "2", *use_slow_end(service, 4))
    first, again, second = ask(service), ask(service), ask(service)
    assert first == again != second
    assert alive(first)
    os.kill(service.manager(), signal.SIGUSR1)
    service.wait_for_records("Status: worker with 2 texts served, handler idle, ending$")
    assert not (service.home / "ended").exists()
    # As many are ending as are to serve: the second goes on beyond its number.
    assert [ask(service) for _ in range(5)] == [second] * 5
    wait_until(lambda: not alive(first), "the first to end")
    wait_until(lambda: ask(service) != second, "the second to be replaced")


def test_a_worker_told_to_leave_has_a_successor_while_it_ends(service: Service) -> None:
    service.start("-w", "1", *use_slow_end(service, 3))
    worker = ask(service)
    began = time.monotonic()
    os.kill(worker, signal.SIGTERM)
    wait_until(lambda: len(service.workers()) == 2, "its successor")
    assert ask(service) != worker
    assert time.monotonic() - began < 2.5  # of the 3 s that its end takes
    assert alive(worker)
    wait_until(lambda: not alive(worker), "it to end")
    assert service.records(r"Child Process Ended\. \(99\)$")[0]["pid"] == str(worker)


def test_there_are_never_more_than_twice_the_workers_whoever_is_told_to_leave(service: Service) -> None:
    service.start("-w", "2", *use_slow_end(service, 2))
    told: set[int] = set()
    most, end = 0, time.monotonic() + 4
    while time.monotonic() < end:
        with ThreadPoolExecutor(4) as pool:  # so that each has an end that takes time
            told |= {*pool.map(ask, [service] * 4)}
        for worker in told & service.workers():
            os.kill(worker, signal.SIGTERM)
        most = max(most, count_workers(service))
    assert 2 < most <= 4
    assert len(told) > 4


def test_slow_ends_are_waited_for_by_reload_and_stop_and_cut_by_the_grace(service: Service) -> None:
    service.expected.append(r"Child Process Killed\. \(still running after the grace\)")
    manager = service.start("-w", "1", "--grace", "3", *use_slow_end(service, 1))
    first = ask(service)
    assert service.run("--reload").returncode == 0
    second = ask(service)
    assert (service.home / "ended").read_text() == f"{first}\n"
    use_slow_end(service, 50)
    assert service.run("--reload").returncode == 0
    assert (service.home / "ended").read_text() == f"{first}\n{second}\n"
    third = ask(service)
    began = time.monotonic()
    assert service.stop().stdout == f"daemontest.py {manager} Server terminated.\n"
    assert 2.5 < time.monotonic() - began < 20
    assert not alive(third)
    assert [int(record["pid"]) for record in service.records("Child Process Killed")] == [third]
