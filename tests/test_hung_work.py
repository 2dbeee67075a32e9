"""A worker whose handler hangs is killed and replaced; it holds up neither a stop nor a reload."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from conftest import Load, Service, alive, wait_until

HANGS = """
import os, time

def handle(text):
    with open(f"{HERE}/in-hand", "a") as file:
        file.write(f"{os.getpid()}\\n")
    match text:
        case "sleep": time.sleep(1000)
        case "compute": sum(range(10**12))  # in C, where no signal is looked after
    return text
"""


HANGING = ("sleep", "compute")


def start(service: Service, *arguments: str) -> int:
    service.write_handler(HANGS.replace("{HERE}", str(service.home)))
    service.expected.append(r"Child Process Died\. \(SIGKILL: ")
    return service.start("--handler", "service:handle", *arguments)


def hang(service: Service, text: str) -> tuple[socket.socket, int]:
    """Hang a worker; the connection, and the worker's PID."""
    in_hand = service.home / "in-hand"
    before = len(lines(in_hand))
    connection = service.connect()
    connection.sendall(text.encode())
    connection.shutdown(socket.SHUT_WR)
    wait_until(lambda: len(lines(in_hand)) > before, "the request in hand")
    return connection, int(lines(in_hand)[-1])


def lines(file: Path) -> list[str]:
    return file.read_text().split("\n")[:-1] if file.exists() else []


def assert_no_reply(connection: socket.socket) -> None:
    try:
        assert connection.recv(100) == b""
    except ConnectionResetError:
        pass
    connection.close()


def assert_killed(service: Service, hung: list[tuple[socket.socket, int]], cause: str) -> None:
    for connection, pid in hung:
        wait_until(lambda: not alive(pid), "the hung worker to be killed")  # noqa: B023
        assert_no_reply(connection)
    died = service.wait_for_records("Child Process Died", len(hung))
    assert {(int(match["pid"]), match["message"]) for match in died} == {
        (pid, f"Child Process Died. (SIGKILL: {cause})") for _, pid in hung}


def test_workers_whose_handler_hangs_are_killed_and_replaced(service: Service) -> None:
    start(service, "-w", "3", "--handler-timeout", "2")
    workers = service.workers()
    began = time.monotonic()
    hung = [hang(service, text) for text in HANGING]
    [free] = workers - {pid for _, pid in hung}
    assert service.ask("x") == f"{free} x\n"
    assert time.monotonic() - began < 2  # of the time that the hung ones have
    assert_killed(service, hung, "handler ran longer than 2 s")
    assert time.monotonic() - began > 2
    new = wait_until(lambda: len(living := service.workers()) == 3 and living, "new workers")
    assert workers - new == {pid for _, pid in hung}
    assert service.ask("x").endswith(" x\n")


def test_a_stop_with_hung_workers_ends_after_the_grace(service: Service) -> None:
    start(service, "-w", "3", "--grace", "1")
    hung = [hang(service, text) for text in HANGING]
    began = time.monotonic()
    stopped = service.stop()
    assert 0.9 < time.monotonic() - began < 15  # half of the grace that there is without being told
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert not service.processes()
    assert_killed(service, hung, "not done within the grace")
    assert service.records()[-1]["message"] == "Server Terminated."


def test_after_a_reload_with_hung_workers_new_ones_serve_at_once_and_the_hung_are_killed_after_the_grace(
        service: Service) -> None:
    manager = start(service, "-w", "2", "--grace", "3")
    hung = [hang(service, text) for text in HANGING]
    began = time.monotonic()
    os.kill(manager, signal.SIGHUP)
    new = int(service.ask("x").split()[0])
    assert time.monotonic() - began < 2.9
    assert new not in {pid for _, pid in hung}
    assert all(alive(pid) for _, pid in hung)
    assert_killed(service, hung, "not done within the grace")
    assert time.monotonic() - began > 2.9
    assert len(service.workers()) == 2
    assert new in service.workers()
    assert service.ask("x").endswith(" x\n")


def test_busy_workers_are_never_taken_for_hung(service: Service) -> None:
    manager = service.start("-w", "4", "-n", "1000000")
    generation, workers = service.generation(), service.workers(manager)
    # Each signal has the generation look after its workers, at another moment of their work.
    signals = f"n=0; while [ $n -lt 3000000 ] && kill -CHLD {generation}; do n=$((n + 1)); done"
    look = subprocess.Popen(["sh", "-c", signals])
    try:
        with Load(service, 4) as load:
            for _ in range(6):  # this machine may take its time, but has to come on
                load.wait_for(1000)
    finally:
        look.kill()
        look.wait()
    assert not service.records("Child Process Died")
    assert service.workers(manager) == workers
    assert load.failures == []


def test_after_reloads_to_fewer_workers_with_more_hung_a_new_one_serves_at_once(service: Service) -> None:
    service.configure("workers = 4")
    manager = start(service, "--grace", "3")
    hung = [hang(service, text) for text in HANGING]
    service.configure("workers = 1")
    began = time.monotonic()
    idle = service.workers() - {pid for _, pid in hung}
    os.kill(manager, signal.SIGHUP)
    wait_until(lambda: not service.workers() & idle, "the idle workers to leave")
    new = int(service.ask("x").split()[0])
    assert new not in {pid for _, pid in hung}
    os.kill(manager, signal.SIGHUP)  # waits for the hung ones' end, since their generation is still leaving
    assert int(service.ask("x").split()[0]) == new
    assert all(alive(pid) for _, pid in hung)
    assert time.monotonic() - began < 2.9
    assert_killed(service, hung, "not done within the grace")
    assert time.monotonic() - began > 2.9
    wait_until(lambda: new not in service.workers(), "the new worker to leave")
    assert int(service.ask("x").split()[0]) not in {new, *(pid for _, pid in hung)}
    assert len(service.workers()) == 1
