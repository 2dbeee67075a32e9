"""Time is charged to whom it belongs: no client waits for another's handler, nor pays for the service's own delays."""

import os
import signal
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from conftest import Service, alive, read_all, wait_until
from slow_clients import SlowSender, in_hand, keeper

REST = "your text size: 2101\n"  # of a slow sender's reply, after the PID


def start(service: Service, *arguments: str) -> int:
    """Start with a handler that does as told; the manager's PID."""
    return service.start(*service.use_handler("does_as_told"), *arguments)


def slow_sender(service: Service) -> tuple[SlowSender, int]:
    """A slow sender, and the worker that has it in hand."""
    sender = SlowSender(service.connect())
    return sender, wait_until(lambda: keeper(service, sender), "it in hand")


def ask_at_once(service: Service, text: str) -> str:
    """Ask with TEXT and its half-close in one packet, so that it is whole when it comes."""
    with service.connect() as connection:
        connection.sendall(text.encode(), socket.MSG_MORE)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection).decode()


def has_sent_all(sender: SlowSender) -> bool:
    return hasattr(sender, "last_byte")


def held(service: Service, name: str) -> int:
    """Wait until the handler holds the text NAME; its worker."""
    file = service.home / f"held-{name}"
    wait_until(lambda: file.exists() and file.read_text().endswith("\n"), f"{name} to be held")
    return int(file.read_text())


def let_go(service: Service, name: str) -> None:
    (service.home / name).touch()


# ---- Of handlers --------------------------------------------------------------------


def test_a_slow_sender_does_not_wait_for_a_handler_while_another_worker_is_free(service: Service) -> None:
    start(service, "-w", "2", "-n", "1000000", "--timeout", "60")
    late = 0  # times that the free worker was not scheduled at once
    with ThreadPoolExecutor() as pool:
        for number in range(15):
            sender, worker = slow_sender(service)
            held_text = pool.submit(service.ask, f"hold {number}")
            try:
                free = held(service, str(number)) != worker
                if free:
                    assert sender.finish() == f"{worker} {REST}"
            finally:
                let_go(service, str(number))
            if not free:
                late += 1
                assert sender.finish() == f"{worker} {REST}"
            assert held_text.result().endswith(f" your text size: {5 + len(str(number))}\n")
    assert late <= 2, "the worker with a client in hand is not the first choice"


def test_all_free_workers_are_taken_before_one_that_has_slow_senders_in_hand(service: Service) -> None:
    start(service, "-w", "4", "-n", "1000000", "--timeout", "60")
    late = 0  # times that a free worker was not scheduled at once
    with ThreadPoolExecutor() as pool:
        for numbers in (range(first, first + 3) for first in range(10, 28, 3)):
            sender, worker = slow_sender(service)
            try:
                texts = [pool.submit(ask_at_once, service, f"hold {number}") for number in numbers]
                busy = {held(service, str(number)) for number in numbers}
                assert len(busy) == 3
                if worker not in busy:
                    assert busy == service.workers() - {worker}
                    assert sender.finish() == f"{worker} {REST}"
            finally:
                for number in numbers:
                    let_go(service, str(number))
            if worker in busy:
                late += 1
                assert sender.finish() == f"{worker} {REST}"
            assert all(text.result().endswith(" your text size: 7\n") for text in texts)
    assert late <= 2


def test_workers_that_all_have_slow_senders_in_hand_run_handlers_at_the_same_time(service: Service) -> None:
    start(service, "-w", "3", "-n", "1000000", "--timeout", "60")
    senders = [SlowSender(service.connect()) for _ in range(30)]
    wait_until(lambda: in_hand(service) == 30, "all of them in hand")
    with ThreadPoolExecutor() as pool:
        try:
            texts = [pool.submit(ask_at_once, service, f"hold {number}") for number in range(3)]
            assert {held(service, str(number)) for number in range(3)} == service.workers()
        finally:
            for number in range(3):
                let_go(service, str(number))
        assert all(text.result().endswith(" your text size: 6\n") for text in texts)
    assert all(sender.finish().endswith(REST) for sender in senders)


def test_beside_handlers_of_a_second_a_slow_sender_is_answered_within_a_moment_of_its_last_byte(
        service: Service) -> None:
    start(service, "-w", "3", "-n", "1000000", "--timeout", "60")
    with ThreadPoolExecutor() as pool:
        waits: list[float] = []
        while len(waits) < 6 and sum(wait < 0.5 for wait in waits) < 3:  # on a loaded machine, some may be late
            sender, _ = slow_sender(service)
            working = pool.submit(service.ask, "sleep 1")
            time.sleep(0.2)  # amid the handler's second
            assert sender.finish().endswith(REST)
            waits.append(sender.waited)
            assert working.result().endswith(" your text size: 7\n")
    assert sum(wait < 0.5 for wait in waits) >= 3, waits


def test_a_client_is_not_refused_for_the_time_that_its_worker_was_busy(service: Service) -> None:
    start(service, "-w", "1", "--timeout", "2.5")
    with ThreadPoolExecutor() as pool:
        during, after = SlowSender(service.connect()), SlowSender(service.connect())
        [worker] = service.workers()
        wait_until(lambda: in_hand(service, worker) == 2, "both in hand")
        working = pool.submit(service.ask, "hold it")
        assert held(service, "it") == worker
        time.sleep(2.8)  # longer than the timeout
        answer = pool.submit(during.finish)
        wait_until(lambda: has_sent_all(during), "the first to have sent all, while the worker is busy")
        let_go(service, "it")
        assert working.result() == f"{worker} your text size: 7\n"
        assert after.finish() == f"{worker} {REST}"
        assert answer.result() == f"{worker} {REST}"


def test_clients_that_come_while_the_only_worker_is_busy_are_all_answered(service: Service) -> None:
    start(service, "-w", "1", "--timeout", "1.5")
    with ThreadPoolExecutor(30) as pool:
        working = pool.submit(service.ask, "hold it")
        worker = held(service, "it")
        waiting: list[Future[str]] = [pool.submit(service.ask, "x" * 2001) for _ in range(20)]
        senders = [SlowSender(service.connect()) for _ in range(5)]
        time.sleep(1.8)  # longer than the timeout
        finished = [pool.submit(sender.finish) for sender in senders]
        wait_until(lambda: all(map(has_sent_all, senders)), "the senders to have sent all")
        let_go(service, "it")
        assert working.result() == f"{worker} your text size: 7\n"
        assert {reply.result() for reply in waiting} == {f"{worker} your text size: 2001\n"}
        assert {reply.result() for reply in finished} == {f"{worker} {REST}"}


# ---- Of the machine -----------------------------------------------------------------


def suspend(pids: list[int], seconds: float) -> None:
    """Suspend all of these processes, as a machine does that sleeps; those first that watch over the others' time."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
    finally:
        for pid in reversed(pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_a_service_that_was_suspended_answers_what_it_had_in_hand(service: Service) -> None:
    manager = start(service, "-w", "3", "--timeout", "4", "--handler-timeout", "4", "--grace", "1")
    workers, generations = service.workers(), service.generations()
    sender = SlowSender(service.connect())
    wait_until(lambda: in_hand(service, *workers) == 1, "it in hand")
    with ThreadPoolExecutor() as pool:
        working = [pool.submit(service.ask, text) for text in ("sleep 1", "compute 0.1")]
        service.wait_for_records("Client: .*; Received Text:", 2)  # which both handlers get now
        suspend([manager, *generations, *workers], 4.3)
        assert sender.finish().endswith(f" {REST}")
        assert sorted(reply.result().partition(" ")[2] for reply in working) == [
            "your text size: 11\n", "your text size: 7\n"]
    assert service.workers() == workers


def test_a_service_that_was_suspended_while_it_stopped_answers_what_it_had_in_hand(service: Service) -> None:
    manager = start(service, "-w", "2", "--timeout", "4", "--grace", "4")
    workers, generations = service.workers(), service.generations()
    sender = SlowSender(service.connect())
    wait_until(lambda: in_hand(service, *workers) == 1, "it in hand")
    with ThreadPoolExecutor() as pool:
        working = pool.submit(service.ask, "sleep 1")
        service.wait_for_records("Client: .*; Received Text:")  # which the handler gets now
        os.kill(manager, signal.SIGTERM)
        service.wait_for_records("Caught SIGTERM")
        suspend([manager, *generations, *workers], 4.3)
        assert sender.finish().endswith(f" {REST}")
        assert working.result().endswith(" your text size: 7\n")
    wait_until(lambda: not alive(manager), "the manager to end")
