"""Leaving is one thing, by TERM, for a reload or for its requests: be replaced at once, finish what is in hand."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from conftest import Load, Service, alive, wait_until
from slow_clients import (
    Crowd,
    SlowSender,
    at_rest,
    in_hand,
    keeper,
    listener,
    original,
    silent,
    slow_short_text,
    sockets,
    stalled,
    trickling,
    urgent,
)

REST = "your text size: 2101\n"  # of a slow sender's reply, after the PID


def served_by(reply: str) -> int:
    return int(reply.split()[0])


def slow_senders(service: Service, count: int) -> list[SlowSender]:
    """COUNT of them, in the hands of the service's workers."""
    senders = [SlowSender(service.connect()) for _ in range(count)]
    wait_until(lambda: in_hand(service) == count, "all of them in hand")
    return senders


def workers_at_one_time(service: Service) -> int:
    """How many workers there were at one moment: a look takes time, but who is seen by two was there between them."""
    return len(service.workers() & service.workers())


def assert_at_rest(service: Service) -> None:
    wait_until(lambda: at_rest(service.processes()), "the service to rest")


# ---- One worker ---------------------------------------------------------------------


def use_up_its_requests(service: Service, worker: int) -> None:
    assert [served_by(service.ask("x")) for _ in range(3)] == [worker] * 3


def terminate(service: Service, worker: int) -> None:
    os.kill(worker, signal.SIGTERM)


def hang_up(service: Service, worker: int) -> None:
    os.kill(service.manager(), signal.SIGHUP)


by_all_ways = pytest.mark.parametrize("dismiss", [use_up_its_requests, terminate, hang_up])


@by_all_ways
def test_a_worker_that_leaves_is_replaced_at_once_and_finishes_with_those_in_hand(
        service: Service, dismiss: Callable[[Service, int], None]) -> None:
    service.start("-w", "1", "-n", "5", "--timeout", "30")
    [worker] = service.workers()
    senders = slow_senders(service, 2)
    began = time.monotonic()
    dismiss(service, worker)
    [successor] = wait_until(lambda: service.workers() - {worker}, "its successor")
    wait_until(lambda: listener(service).isdisjoint(sockets(worker)), "the worker to accept no more")
    assert served_by(service.ask("x")) == successor
    assert time.monotonic() - began < 15  # of the 30 s that those in hand may take
    assert alive(worker)
    assert [sender.finish() for sender in senders] == [f"{worker} {REST}"] * 2
    wait_until(lambda: not alive(worker), "the worker to leave")
    assert [int(record["pid"]) for record in service.records("Child Process Ended")] == [worker]


@by_all_ways
def test_a_worker_that_leaves_waits_no_longer_than_the_timeout_for_those_in_hand(
        service: Service, dismiss: Callable[[Service, int], None]) -> None:
    service.start("-w", "1", "-n", "5", "--timeout", "2")
    [worker] = service.workers()
    with Crowd(service.port, stalled, 2) as crowd:
        wait_until(lambda: in_hand(service, worker) == 2, "both in hand")
        dismiss(service, worker)
        crowd.wait_until_served()
    assert crowd.replies == [f"{worker} error: text not ended within 2 s\n".encode()] * 2
    wait_until(lambda: not alive(worker), "the worker to leave")  # also before the grace of 30 s
    wait_until(lambda: len(service.workers()) == 1, "its successor alone")


def test_who_has_never_sent_a_byte_costs_no_request(service: Service) -> None:
    service.start("-w", "1", "-n", "4", "--timeout", "1")
    [worker] = service.workers()
    began = time.monotonic()
    with Crowd(service.port, urgent, 3) as crowd:  # whom the kernel hands over without data
        crowd.wait_until_served()
    assert time.monotonic() - began >= 1  # so they have been in hand
    assert (crowd.replies, crowd.failures) == ([b""] * 3, [])
    assert [served_by(service.ask("x")) for _ in range(4)] == [worker] * 4
    assert served_by(service.ask("x")) != worker
    assert [record["message"] for record in service.wait_for_records("Child Process Ended")] == [
        "Child Process Ended. (0)"]


def test_with_slow_clients_beyond_all_measure_everybody_is_served(service: Service) -> None:
    service.start("-w", "1", "-n", "1", "--timeout", "60")
    senders = []
    for number in range(10):  # each uses up a worker
        senders.append(SlowSender(service.connect()))
        wait_until(lambda number=number: in_hand(service) == number + 1, "it in hand")
        assert len(service.workers()) <= 2
        began = time.monotonic()
        assert service.ask("x").endswith(" your text size: 1\n")
        assert time.monotonic() - began < 10
    assert all(sender.finish().endswith(REST) for sender in senders)
    wait_until(lambda: len(service.workers()) == 1, "those that leave to be gone")


# ---- All of them --------------------------------------------------------------------


def test_a_stop_waits_for_those_who_have_begun_and_lets_the_silent_go_at_once(service: Service) -> None:
    service.start("-w", "2", "--timeout", "30")
    with ExitStack() as crowds:
        mute = [crowds.enter_context(Crowd(service.port, kind, 5)) for kind in (urgent, silent)]
        wait_until(lambda: in_hand(service) >= 5, "the urgent in hand")
        sender = SlowSender(service.connect())
        wait_until(lambda: in_hand(service) >= 6, "the slow sender, too")
        stop = service.popen("-t")
        service.wait_for_records("Caught SIGTERM")
        mute[0].wait_until_served()
        assert stop.poll() is None
        assert sender.finish().endswith(f" {REST}")
        assert stop.communicate(timeout=20)[1] == ""
        assert stop.returncode == 0
        assert mute[0].replies == [b""] * 5
    assert not service.processes()


def test_a_stop_beside_the_silent_alone_takes_no_time(service: Service) -> None:
    service.start("-w", "2", "--timeout", "30")
    with Crowd(service.port, urgent, 20), Crowd(service.port, silent, 20):
        wait_until(lambda: in_hand(service) >= 20, "the urgent in hand")
        began = time.monotonic()
        assert service.stop().returncode == 0
        assert time.monotonic() - began < 15  # of the 30 s of their timeout and of the grace


def test_a_stop_waits_no_longer_than_the_grace(service: Service) -> None:
    service.expected.append(r"Child Process Died\. \(SIGKILL: not done within the grace\)")
    service.start("-w", "1", "--timeout", "30", "--grace", "1")
    with Crowd(service.port, trickling, 5):
        wait_until(lambda: in_hand(service) == 5, "all of them in hand")
        began = time.monotonic()
        assert service.stop().returncode == 0
        assert 0.9 < time.monotonic() - began < 15  # of the 30 s of their timeout
    assert not service.processes()


def test_none_of_the_slow_is_lost_under_full_load_while_workers_are_recycled(service: Service) -> None:
    service.start("-w", "3", "-n", "100", "--timeout", "20")
    most = 0
    with (Load(service, 4) as load, Crowd(service.port, original, 4, come_back=True, waits=False) as originals,
          Crowd(service.port, slow_short_text, 60, waits=False) as slow):
        while slow.thread.is_alive() or len(load.replies) <= 500 or not originals.replies:  # so many recycle workers
            most = max(most, workers_at_one_time(service))
            time.sleep(0.02)
    assert (load.failures, slow.failures, originals.failures) == ([], [], [])
    assert [reply.partition(b" ")[2] for reply in slow.replies] == [b"your text size: 5000\n"] * 60
    assert {reply.partition(b" ")[2] for reply in originals.replies} == {b"your text size: 31\n"}
    assert len(service.records("Child Process Ended.")) >= 3, "workers were recycled meanwhile"
    assert most <= 6
    assert not service.records("Child Process Died")


def test_none_of_the_slow_is_lost_in_reloads_under_load(service: Service) -> None:
    manager = service.start("-w", "2", "-n", "100", "--timeout", "20")
    with Load(service, 2) as load, Crowd(service.port, slow_short_text, 30, waits=False) as slow:
        most = 0
        for number in range(20):
            os.kill(manager, signal.SIGHUP)
            most = max(most, workers_at_one_time(service))
            load.wait_for(20 + number)
        while slow.thread.is_alive():
            most = max(most, workers_at_one_time(service))
            time.sleep(0.02)
    assert (load.failures, slow.failures) == ([], [])
    assert [reply.partition(b" ")[2] for reply in slow.replies] == [b"your text size: 5000\n"] * 30
    assert most <= 4
    assert not service.records("Child Process Died")


# ---- Afterwards ---------------------------------------------------------------------


def test_the_service_is_idle_beside_the_stalled_and_when_they_have_gone(service: Service) -> None:
    service.start("-w", "3", "-n", "10", "--timeout", "30")
    with Crowd(service.port, stalled, 100), Crowd(service.port, urgent, 10):
        for _ in range(50):
            service.ask("x")
        assert_at_rest(service)
    wait_until(lambda: len(service.workers()) == 3 and not in_hand(service), "them to be gone")
    assert_at_rest(service)
    assert service.ask("x").endswith(" your text size: 1\n")


def test_a_worker_that_leaves_with_a_client_in_hand_does_not_spin_when_the_manager_is_gone(service: Service) -> None:
    manager = service.start("-w", "2", "--timeout", "30")
    [sender] = slow_senders(service, 1)
    worker = wait_until(lambda: keeper(service, sender), "it in hand")
    os.kill(worker, signal.SIGTERM)
    wait_until(lambda: len(service.workers()) == 3, "its successor")
    os.kill(manager, signal.SIGKILL)
    wait_until(lambda: len(service.processes()) <= 2, "the others to end")
    wait_until(lambda: at_rest({worker}), "the worker to rest")
    assert sender.finish() == f"{worker} {REST}"
    wait_until(lambda: not service.processes(), "all to end")


def test_when_the_manager_is_gone_slow_clients_are_answered_and_the_next_start_succeeds(service: Service) -> None:
    manager = service.start("-w", "2", "--timeout", "30")
    senders = slow_senders(service, 6)
    os.kill(manager, signal.SIGKILL)
    wait_until(lambda: not alive(manager), "the manager to be gone")
    assert all(sender.finish().endswith(REST) for sender in senders)
    wait_until(lambda: not service.processes(), "all to end")
    service.start("-w", "2")
    assert service.ask("x").endswith(" your text size: 1\n")
