"""Storms of signals: whoever connects is served, and afterwards the service is as before."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from conftest import Load, Service, wait_until
from slow_clients import in_hand

WORKERS = 5


def children(pid: int) -> set[int]:
    """The living and the not yet reaped children of PID, if it lives; quick, so that many samples can be taken."""
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()


def workers(manager: int) -> set[int]:
    """The workers of all generations, in the same way."""
    return set().union(*map(children, children(manager)))


def at_one_time(look: Callable[[], set[int]]) -> int:
    """How many processes there were at one moment: a look takes time, but who is seen by two was there between them."""
    return len(look() & look())


def tell_one_to_leave(candidates: set[int], signum: signal.Signals = signal.SIGTERM) -> int:
    """Send SIGNUM to one of the CANDIDATES, unless it has just gone; how many signals were sent."""
    if candidates:
        try:
            os.kill(random.choice(sorted(candidates)), signum)
        except ProcessLookupError:
            return 0
    return len(candidates) and 1


def test_100_hups_and_terms_to_workers_under_load_lose_no_request(service: Service) -> None:
    manager = service.start("-w", str(WORKERS), "-n", "20")
    most = generations = terms = 0
    with Load(service, 4) as load:
        next_hup = time.monotonic()
        for _ in range(100):
            os.kill(manager, signal.SIGHUP)
            next_hup += 0.05
            terms += tell_one_to_leave(workers(manager))
            while True:  # the pause between two signals, used to count processes
                most = max(most, at_one_time(lambda: workers(manager)))
                generations = max(generations, at_one_time(lambda: children(manager)))
                if (left := next_hup - time.monotonic()) <= 0:
                    break
                time.sleep(min(left, 0.005))
        load.wait_for(max(200, 301 - len(load.replies)))
    assert load.failures == []
    assert {reply.partition(b" ")[2] for reply in load.replies} == {b"your text size: 1\n"}
    assert terms > 50
    assert most <= 2 * WORKERS
    assert generations == 2
    wait_until(lambda: len(children(manager)) == 1 and len(service.workers(manager)) == WORKERS
               and all(is_new(service, pid) for pid in service.workers(manager)), "new workers, and no others")
    wait_until(lambda: service.processes() == {manager, *children(manager), *service.workers(manager)},
               "no other processes")
    assert len(service.records("Child Process Died")) == 0
    assert len(service.records("Caught SIGHUP")) >= 20


def is_new(service: Service, pid: int) -> bool:
    """Whether worker PID was started after the last reload."""
    since = service.log.rpartition("Loading configuration.")[2]
    return f" {pid} Child Process Started." in since


def kill_one(service: Service, candidates: set[int]) -> tuple[int, int]:
    """Kill one of the CANDIDATES, unless it has just gone; how many were killed, with how many clients in hand.

    It is stopped first, so that it neither accepts nor answers anybody between the count and its death.
    """
    try:
        victim = random.choice(sorted(candidates))
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: state_of(victim) in "TZX", "it to stop")
        held = in_hand(service, victim)
        os.kill(victim, signal.SIGKILL)
    except (IndexError, ProcessLookupError):
        return 0, 0
    return 1, held


def state_of(pid: int) -> str:
    """T for a process that has been stopped, "" for one that has gone (proc(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_a_worker_killed_loses_no_more_than_the_request_in_its_hands(service: Service) -> None:
    service.expected.append(r"Child Process Died\. \(SIGKILL\)")
    manager = service.start("-w", str(WORKERS), "-n", "20")
    kills = held = 0
    with Load(service, 4) as load:
        for _ in range(10):
            load.wait_for(20)
            killed, in_its_hands = kill_one(service, service.workers(manager))
            kills, held = kills + killed, held + in_its_hands
        wait_until(lambda: len(service.workers(manager)) == WORKERS, f"{WORKERS} workers")
        load.wait_for(100)
    assert kills >= 5
    assert len(load.failures) <= held, load.failures
    assert len(service.records("Child Process Died")) <= kills
    assert {reply.partition(b" ")[2] for reply in load.replies} == {b"your text size: 1\n"}
    assert not [why for why in load.failures if "refused" in why]
