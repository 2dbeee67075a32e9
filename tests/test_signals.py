"""Each signal does what it promises, and no request is lost over it."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

import psutil
from conftest import Gate, Service, read_all, wait_until

IGNORED_BY_ALL = [signal.SIGPIPE, signal.SIGALRM, signal.SIGUSR2]
FOR_THE_MANAGER = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1]


def send(pid: int, signals: list[signal.Signals]) -> None:
    """Send SIGNALS to PID, and wait until all have arrived."""
    for signum in signals:
        os.kill(pid, signum)
    status = Path(f"/proc/{pid}/status")

    def pending() -> int:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        sent = sum(1 << signum - 1 for signum in signals)
        return (int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)) & sent

    wait_until(lambda: not pending(), "signals to arrive")


def ask_until(done: Event, service: Service) -> list[str]:
    """The replies to requests made one after the other, 3000 at the most."""
    replies = []
    while not done.is_set() and len(replies) < 3000:
        replies.append(service.ask("x"))
    return replies


# ---- Manager ------------------------------------------------------------------------


def test_hup_replaces_every_worker_and_loses_no_request(service: Service) -> None:
    manager = service.start("-w", "3", "-n", "100000")
    workers = [service.workers()]
    done = Event()
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask_until, done, service) for _ in range(4)]
        try:
            for _ in range(5):
                os.kill(manager, signal.SIGHUP)
                workers.append(service.wait_for_new_workers(workers[-1]))
        finally:
            done.set()
        replies = [reply for client in clients for reply in client.result()]
    assert len(replies) > 20
    assert {reply.split(" ", 1)[1] for reply in replies} == {"your text size: 1\n"}
    assert {int(reply.split()[0]) for reply in replies} <= set().union(*workers)
    assert len(set().union(*workers)) == 18
    assert service.manager() == manager


def test_hup_waits_for_the_request_in_hand_while_others_are_served_by_new_workers(service: Service) -> None:
    gate = Gate(service)
    manager = service.start("-w", "1", *gate.arguments)
    with service.connect() as client:
        client.sendall(b"x\n")
        [old] = gate.wait_for()
        os.kill(manager, signal.SIGHUP)
        with ThreadPoolExecutor() as pool:
            other = pool.submit(service.ask, "x")
            [_, new] = gate.wait_for(2)
            assert service.workers() == {old, new}
            gate.open()
            assert other.result() == f"{new} let through\n"
        assert read_all(client) == b"%d let through\n" % old
    wait_until(lambda: service.workers() == {new}, "the old worker to leave")


def test_hup_reopens_the_log(service: Service) -> None:
    manager = service.start()
    workers = service.workers()
    rotated = service.log_file.rename(service.home / "daemontest.log.1")
    os.kill(manager, signal.SIGHUP)
    service.wait_for_new_workers(workers)
    assert service.log_file.stat().st_mode & 0o7777 == 0o640
    old = rotated.read_text()
    assert "Child Process Started." in old
    reply = service.ask("after the rotation")
    assert service.records("Client: ")[0]["pid"] == reply.split()[0]
    service.stop()
    assert service.records("Server Terminated.")
    assert rotated.read_text() == old


def test_pipe_alrm_and_usr2_change_nothing(service: Service) -> None:
    manager = service.start("-w", "3")
    workers = service.workers()
    for _ in range(3):
        send(manager, IGNORED_BY_ALL)
    assert int(service.ask("x").split()[0]) in workers
    assert service.workers() == workers
    assert service.manager() == manager


def test_a_stop_sent_to_all_processes_at_once_is_a_stop(service: Service) -> None:
    """As `pkill -f daemontest.py` sends it."""
    gate = Gate(service)
    service.start("-w", "3", *gate.arguments)
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = gate.wait_for()
        for pid in service.processes():
            with suppress(ProcessLookupError):  # it has gone already, told by another
                os.kill(pid, signal.SIGTERM)
        gate.open()
        assert read_all(client) == b"%d let through\n" % busy
    wait_until(lambda: not service.processes(), "the stop")
    assert not service.pid_file.exists()
    assert service.records()[-1]["message"] == "Server Terminated."


# ---- Generation ---------------------------------------------------------------------


def test_a_generation_ignores_what_is_for_the_manager(service: Service) -> None:
    manager = service.start("-w", "2")
    generation, workers = service.generation(), service.workers()
    for _ in range(2):
        send(generation, IGNORED_BY_ALL + FOR_THE_MANAGER)
    assert int(service.ask("x").split()[0]) in workers
    assert (service.manager(), service.generations(), service.workers()) == (manager, {generation}, workers)


# ---- Workers ------------------------------------------------------------------------


def test_workers_ignore_what_is_for_the_manager_even_with_a_request_in_hand(service: Service) -> None:
    gate = Gate(service)
    service.start("-w", "2", *gate.arguments)
    workers = service.workers()
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = gate.wait_for()
        for worker in workers:
            send(worker, IGNORED_BY_ALL + FOR_THE_MANAGER)
        gate.open()
        assert read_all(client) == b"%d let through\n" % busy
    assert service.workers() == workers


def test_a_worker_told_to_leave_is_replaced_at_once(service: Service) -> None:
    service.start("-w", "2")
    waits: list[float] = []
    while len(waits) < 3 or (min(waits) >= 0.8 and len(waits) < 10):  # a busy machine may need several tries
        before = service.workers()
        leaving = min(before)
        began = time.monotonic()
        os.kill(leaving, signal.SIGTERM)
        wait_until(lambda: len(service.workers() - before) == 1, "a new worker")  # noqa: B023
        waits.append(time.monotonic() - began)
        wait_until(lambda: before - service.workers() == {leaving}, "the old worker to go")  # noqa: B023
        words = [match["message"] for match in service.records() if match["pid"] == str(leaving)]
        assert words == ["Child Process Started.", "Caught SIGTERM", "Child Process Ended. (100)"]
    assert min(waits) < 0.8  # without the second that the place of a worker that died stays empty


def test_a_worker_told_to_leave_finishes_the_request_whose_text_is_still_coming(service: Service) -> None:
    service.start("-w", "1")
    [busy] = service.workers()
    with service.connect() as client:
        client.sendall(b"x" * 3000)
        accepted = psutil.Process(busy).net_connections
        wait_until(lambda: any(tcp.status == "ESTABLISHED" for tcp in accepted()), "the worker to accept")
        send(busy, [signal.SIGTERM])
        client.sendall(b"\n")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"%d your text size: 3001\n" % busy
    service.wait_for_new_workers({busy})


def test_a_worker_told_to_leave_finishes_the_request_that_its_handler_works_on(service: Service) -> None:
    gate = Gate(service)
    service.start("-w", "1", *gate.arguments)
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = gate.wait_for()
        send(busy, [signal.SIGTERM])
        gate.open()
        assert read_all(client) == b"%d let through\n" % busy
    service.wait_for_new_workers({busy})
