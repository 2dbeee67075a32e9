"""A manager killed with SIGKILL: its workers finish the request in hand and go; nothing hinders the next start."""

import os
import signal
import socket
import time

import pytest
from conftest import Gate, Load, Service, alive, read_all, wait_until

TIMES = 3


def kill(manager: int) -> None:
    os.kill(manager, signal.SIGKILL)
    wait_until(lambda: not alive(manager), "the manager to die")


def wait_for_end(workers: set[int]) -> None:
    wait_until(lambda: not any(map(alive, workers)), f"workers {workers} to go", 1.0)


def assert_not_running(service: Service) -> None:
    status, stop = service.run("--status"), service.stop()
    assert (status.returncode, status.stdout, status.stderr) == (3, "", "daemontest.py: not running\n")
    assert (stop.returncode, stop.stdout, stop.stderr) == (1, "", "daemontest.py: not running\n")


def test_idle_workers_go_at_once_and_the_next_start_succeeds(service: Service) -> None:
    for _ in range(TIMES):
        manager = service.start("-w", "3")
        workers = service.workers(manager)
        kill(manager)
        wait_for_end(workers)
        assert service.pid_file.read_text() == f"{manager}\n"
        assert_not_running(service)
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
    wait_for_end({busy})
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
    for attempt in range(TIMES):
        manager = service.start("-w", "3", "-n", "20")
        with Load(service) as load:
            load.wait_for(50)
            began = time.monotonic()
            kill(manager)
            wait_until(lambda: len(service.processes()) == 0, "all workers to go", 1.0)
            assert time.monotonic() - began < 1.5
        assert_not_running(service)
        assert {reply.partition(b" ")[2] for reply in load.replies} == {b"your text size: 1\n"}
        begun, ended = (service.records(f"Client Query Processing {word}") for word in ("Started", "Ended"))
        assert len(begun) == len(ended) >= len(load.replies) * (attempt == 0)


@pytest.mark.parametrize("clients", [0, 3])
def test_a_start_right_after_the_kill_succeeds_at_the_first_try(service: Service, clients: int) -> None:
    with Load(service, clients) as load:
        for _ in range(TIMES):
            manager = service.start("-w", "3", "-n", "20")
            load.wait_for(10 * bool(clients))
            os.kill(manager, signal.SIGKILL)
        service.start("-w", "3")
        assert service.ask("x").endswith(" your text size: 1\n")
