"""A manager killed with SIGKILL: its generations stop as at TERM; nothing hinders the next start."""

import os
import signal
import socket
import time

import psutil
import pytest
from conftest import Gate, Load, Service, alive, read_all, wait_until

TIMES = 3


def kill(manager: int) -> None:
    os.kill(manager, signal.SIGKILL)
    wait_until(lambda: not alive(manager), "the manager to die")


def wait_for_end(workers: set[int]) -> float:
    """Wait until WORKERS have gone, long before any timeout would end them; the seconds that it took."""
    began = time.monotonic()
    wait_until(lambda: not any(map(alive, workers)), f"workers {workers} to go", 10)
    return time.monotonic() - began


def assert_not_running(service: Service) -> None:
    status, stop = service.run("--status"), service.stop()
    assert (status.returncode, status.stdout, status.stderr) == (3, "", "daemontest.py: not running\n")
    assert (stop.returncode, stop.stdout, stop.stderr) == (1, "", "daemontest.py: not running\n")


def test_idle_workers_go_at_once_and_the_next_start_succeeds(service: Service) -> None:
    took = []
    for _ in range(TIMES):
        manager = service.start("-w", "3")
        processes = service.generations(manager) | service.workers(manager)
        assert len(processes) == 4
        kill(manager)
        took.append(wait_for_end(processes))
        assert service.pid_file.read_text() == f"{manager}\n"
        assert_not_running(service)
    assert min(took) < 1.0, "on a loaded machine, some may take longer"
    service.start()
    assert service.ask("x").endswith(" your text size: 1\n")


def test_the_request_in_hand_is_still_answered(service: Service) -> None:
    gate = Gate(service)
    manager = service.start("-w", "3", *gate.arguments)
    workers = service.workers(manager)
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = gate.wait_for()
        kill(manager)
        wait_for_end(workers - {busy})
        assert_not_running(service)
        assert alive(busy)
        gate.open()
        assert read_all(client) == b"%d let through\n" % busy
    wait_until(lambda: not service.processes(), "the generation to go", 10)
    service.start()


def test_a_text_on_its_way_is_still_answered(service: Service) -> None:
    manager = service.start("-w", "2")
    workers = service.workers(manager)
    with service.connect() as client:
        client.sendall(b"x" * 3000)
        [busy] = wait_until(lambda: {pid for pid in workers if service.has_client(pid)}, "a worker to accept")
        kill(manager)
        wait_for_end(workers - {busy})
        client.sendall(b"x" * 1000)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"%d your text size: 4000\n" % busy
    wait_for_end({busy})


def test_under_load_every_request_in_hand_is_answered_and_the_workers_go(service: Service) -> None:
    took = []
    for attempt in range(TIMES):
        manager = service.start("-w", "3", "-n", "20")
        with Load(service) as load:
            load.wait_for(50)
            began = time.monotonic()
            kill(manager)
            wait_until(lambda: not service.processes() and service.refuses(), "all workers to go", 10)
            took.append(time.monotonic() - began)
        assert_not_running(service)
        assert {reply.partition(b" ")[2] for reply in load.replies} == {b"your text size: 1\n"}
        begun, ended = (service.records(f"Client Query Processing {word}") for word in ("Started", "Ended"))
        assert len(begun) == len(ended) >= len(load.replies) * (attempt == 0)
    assert min(took) < 1.5, "on a loaded machine, some may take longer"


HANGS = """
import os

def handle(text):
    if text == "hang":
        with open("{HOME}/hung", "w") as file:
            file.write(str(os.getpid()))
        sum(range(10**12))  # in C, where no signal is looked after
    return text
"""


@pytest.mark.parametrize(("limit", "cause"), [("--handler-timeout", "handler ran longer than 1.2 s"),
                                              ("--grace", "not done within the grace")])
def test_a_hung_worker_is_killed_in_time_and_the_next_start_succeeds(service: Service, limit: str, cause: str) -> None:
    service.expected.append(r"Child Process Died\. \(SIGKILL: ")
    service.write_handler(HANGS.replace("{HOME}", str(service.home)))
    arguments = ("-w", "3", "--handler", "service:handle")
    manager = service.start(*arguments, limit, "1.2")
    workers = service.workers(manager)
    hung_file = service.home / "hung"
    with service.connect() as client:
        asked = time.monotonic()
        client.sendall(b"hang")
        client.shutdown(socket.SHUT_WR)
        hung = int(wait_until(lambda: hung_file.exists() and hung_file.read_text(), "the handler to hang"))
        began = asked if limit == "--handler-timeout" else time.monotonic()
        kill(manager)
        wait_for_end(workers - {hung})
        assert_not_running(service)
        wait_until(lambda: not service.processes(), "the hung worker to be killed", 10)
        assert time.monotonic() - began > 1.1
    [died] = service.records("Child Process Died")
    assert (int(died["pid"]), died["message"]) == (hung, f"Child Process Died. (SIGKILL: {cause})")
    service.start(*arguments)
    assert service.ask("x").endswith(" x\n")


def test_two_generations_stop_if_it_is_killed_during_a_reload(service: Service) -> None:
    gate = Gate(service)
    manager = service.start("-w", "2", *gate.arguments)
    old = service.workers(manager)
    with service.connect() as client, service.connect() as another:
        client.sendall(b"x\n")
        [busy] = gate.wait_for()
        os.kill(manager, signal.SIGHUP)
        wait_until(lambda: service.workers() & old == {busy}, "the idle worker to leave")
        wait_until(lambda: len(service.workers() - old) == 2, "the next generation")
        another.sendall(b"x\n")
        [_, busy_too] = gate.wait_for(2)
        processes = service.generations() | service.workers()
        kill(manager)
        wait_for_end(processes - service_of(busy, busy_too))
        gate.open()
        assert read_all(client) == b"%d let through\n" % busy
        assert read_all(another) == b"%d let through\n" % busy_too
    wait_until(lambda: not service.processes(), "all to go", 10)
    service.start("-w", "1")


def service_of(*workers: int) -> set[int]:
    """WORKERS and their generations."""
    return {*workers, *(psutil.Process(worker).ppid() for worker in workers)}


@pytest.mark.parametrize("clients", [0, 3])
def test_a_start_right_after_the_kill_succeeds_at_the_first_try(service: Service, clients: int) -> None:
    with Load(service, clients) as load:
        for _ in range(TIMES):
            manager = service.start("-w", "3", "-n", "20")
            load.wait_for(10 * bool(clients))
            os.kill(manager, signal.SIGKILL)
        service.start("-w", "3")
        assert service.ask("x").endswith(" your text size: 1\n")
