"""A process that a handler forks keeps no client waiting, nor the port, nor the lock, whatever its worker does."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from conftest import Service, alive, read_all, wait_until

FORKS = ["os.fork together", "os.fork apart", "multiprocessing together", "concurrent.futures together"]
OVERDUE = r"Child Process Died\. \(SIG[A-Z]+: not done within the grace\)"  # multiprocessing waits for its processes
TIMES = 12  # stops after which the port must be free


class Forks:
    """The service whose handler forks, and the forks it has made."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.handler = service.use_handler("forks")

    def made(self) -> list[tuple[int, int]]:
        """The PID of each fork, and of its worker."""
        file = self.service.home / "forks"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [(int(fork), int(worker)) for fork, worker in map(str.split, lines)]

    def wait_for(self, count: int) -> tuple[int, int]:
        """Wait until COUNT forks have been made; the last one and its worker."""
        wait_until(lambda: len(self.made()) >= count, f"{count} forks")
        return self.made()[-1]

    def ask_for_each(self) -> list[int]:
        """Have each kind of fork made, by workers that answer; the forks' PIDs."""
        for number, fork in enumerate(FORKS, 1):
            assert self.service.ask(f"{fork} answer").endswith(" the worker's\n")
            self.wait_for(number)
        return [fork for fork, _ in self.made()]


@pytest.fixture
def forks(service: Service) -> Iterator[Forks]:
    forks = Forks(service)
    yield forks
    for fork, _ in forks.made():
        if fork in service.processes():
            os.kill(fork, signal.SIGKILL)


def assert_port_is_free(service: Service) -> None:
    with socket.create_server(("::", service.port), family=socket.AF_INET6, dualstack_ipv6=True):
        pass


def assert_lock_is_free(service: Service) -> None:
    status = service.run("--status")
    assert (status.returncode, status.stderr) == (3, "daemontest.py: not running\n")


def assert_ends(client: socket.socket) -> None:
    """The connection comes to its end, though no reply has come."""
    try:
        assert read_all(client) == b""
    except ConnectionResetError:
        pass


# ---- Clients --------------------------------------------------------------------------


def test_no_client_of_a_worker_that_has_answered_is_kept_waiting(service: Service, forks: Forks) -> None:
    service.start("-w", "1", "--timeout", "60", *forks.handler)
    [worker] = service.workers()
    with service.connect() as other:
        other.sendall(b"x" * 3000)  # in the worker's hand, and so in that of its forks
        wait_until(lambda: service.has_client(worker), "the worker to accept")
        for number, fork in enumerate(FORKS, 1):
            assert service.ask(f"{fork} answer") == f"{worker} the worker's\n"
            with service.connect() as open_side:
                open_side.sendall(f"{fork} answer\n".encode())
                assert read_all(open_side) == f"{worker} the worker's\n".encode()
            forks.wait_for(number if "concurrent" in fork else 2 * number)
        other.shutdown(socket.SHUT_WR)
        assert read_all(other) == f"{worker} the worker's\n".encode()
    assert len(forks.made()) > len(FORKS)
    assert all(alive(fork) for fork, _ in forks.made())


@pytest.mark.parametrize("death", ["handler timeout", "SIGKILL"])
def test_no_client_of_a_worker_that_has_died_is_kept_waiting(service: Service, forks: Forks, death: str) -> None:
    service.expected.append(r"Child Process Died\. \(SIGKILL")
    seconds = "2" if death == "handler timeout" else "50"
    service.start("-w", str(len(FORKS)), "--handler-timeout", seconds, *forks.handler)
    with ExitStack() as stack:
        clients = [stack.enter_context(service.connect()) for _ in FORKS]
        for number, (fork, client) in enumerate(zip(FORKS, clients, strict=True), 1):
            client.sendall(f"{fork} hang".encode())
            client.shutdown(socket.SHUT_WR)
            forks.wait_for(number)
        if death == "SIGKILL":
            for _, worker in forks.made():
                os.kill(worker, signal.SIGKILL)
        for client in clients:
            assert_ends(client)
    apart = [fork for fork, _ in forks.made()][FORKS.index("os.fork apart")]
    assert alive(apart)
    for _ in range(3):
        assert service.ask("x").endswith(" the worker's\n")
    died = service.wait_for_records(r"Child Process Died\. \(SIGKILL", len(FORKS))
    assert {int(match["pid"]) for match in died} == {worker for _, worker in forks.made()}


def test_no_client_in_the_hand_of_a_worker_that_is_killed_is_kept_waiting(service: Service, forks: Forks) -> None:
    service.expected.append(r"Child Process Died\. \(SIGKILL")
    service.start("-w", "1", "--timeout", "60", *forks.handler)
    [worker] = service.workers()
    with service.connect() as client:
        client.sendall(b"x" * 3000)
        wait_until(lambda: service.has_client(worker), "the worker to accept")
        forks.ask_for_each()
        os.kill(worker, signal.SIGKILL)
        assert_ends(client)
    assert service.ask("x").endswith(" the worker's\n")


def test_no_client_waits_for_the_fork_of_a_worker_that_has_left(service: Service, forks: Forks) -> None:
    service.expected.append(OVERDUE)
    service.start("-w", "1", "-n", "1", "--grace", "0.5", *forks.handler)
    forks.ask_for_each()

    def all_have_left() -> bool:
        assert service.ask("x").endswith(" the worker's\n")  # the last one stays while too many others are leaving
        return not any(alive(worker) for _, worker in forks.made())

    wait_until(all_have_left, "the workers to leave")
    assert {service.ask("x").partition(" ")[2] for _ in range(5)} == {"the worker's\n"}


# ---- The port and the lock ------------------------------------------------------------


def test_after_a_stop_the_port_and_the_lock_are_free(service: Service, forks: Forks) -> None:
    service.expected.append(OVERDUE)
    service.start("-w", "2", "--grace", "0.5", *forks.handler)
    made = forks.ask_for_each()
    assert service.stop().returncode == 0
    assert_port_is_free(service)
    assert_lock_is_free(service)
    assert alive(made[FORKS.index("os.fork apart")])
    service.start("-w", "1")
    assert service.ask("x").endswith(" your text size: 1\n")


def test_after_a_manager_that_was_killed_the_port_and_the_lock_are_free(service: Service, forks: Forks) -> None:
    manager = service.start("-w", "2", "--grace", "0.5", *forks.handler)
    service.expected.append(OVERDUE)
    made = forks.ask_for_each()
    served = service.generations() | service.workers()
    os.kill(manager, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, served)), "the generation and its workers to go")
    assert_port_is_free(service)
    assert_lock_is_free(service)
    assert alive(made[FORKS.index("os.fork apart")])
    service.start("-w", "1")
    assert service.ask("x").endswith(" your text size: 1\n")


@pytest.mark.parametrize("end", ["stop", "SIGKILL"])
def test_a_fork_of_the_handlers_module_keeps_neither_the_port_nor_the_lock(
        service: Service, forks: Forks, end: str) -> None:
    manager = service.start("-w", "2", *service.use_handler("forks_at_import"))
    fork, generation = forks.wait_for(1)
    served = {generation, *service.workers()} - {fork}
    if end == "stop":
        assert service.stop().returncode == 0
    else:
        os.kill(manager, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, served)), "the generation and its workers to go")
    assert alive(fork)
    assert_port_is_free(service)
    assert_lock_is_free(service)
    service.start("-w", "1")
    assert service.ask("x").endswith(" your text size: 1\n")


def test_the_port_is_free_when_the_pid_file_is_gone(service: Service) -> None:
    for attempt in range(TIMES):
        daemon = service.foreground("-w", "8", "--log-file", service.log_file)
        service.wait_for_records("Child Process Started.", 8 * (attempt + 1))
        service.serving_generation(daemon.pid)
        assert service.ask("x").endswith(" your text size: 1\n")
        os.kill(daemon.pid, signal.SIGTERM)
        end = time.monotonic() + 20
        while service.pid_file.exists() and time.monotonic() < end:
            pass  # at once: the moment in which the port is not free yet is short
        assert not service.pid_file.exists()
        assert_port_is_free(service)
        assert daemon.communicate(timeout=50) == ("", "")
        assert daemon.returncode == 0


# ---- A fork that goes the worker's way ------------------------------------------------


@pytest.mark.parametrize("how", ["return", "raise", "exit"])
def test_a_fork_that_leaves_the_handler_ends_there(service: Service, forks: Forks, how: str) -> None:
    service.expected += ["Handler Failed", "Traceback", "RuntimeError"]
    service.start("-w", "1", "--timeout", "60", *forks.handler)
    [worker] = service.workers()
    with service.connect() as other:
        other.sendall(b"x" * 3000)
        wait_until(lambda: service.has_client(worker), "the worker to accept")
        for number in range(1, 4):
            assert service.ask(f"{how} together answer") == f"{worker} the worker's\n"
            fork, _ = forks.wait_for(number)
            wait_until(lambda: not alive(fork), "the fork to end")  # noqa: B023
        other.shutdown(socket.SHUT_WR)
        assert read_all(other) == f"{worker} the worker's\n".encode()
    assert service.ask("x") == f"{worker} the worker's\n"
    assert service.processes() == {service.manager(), *service.generations(), worker}
    ended = [int(match["pid"]) for match in service.records("(Client Query Processing|Child Process) Ended")]
    assert set(ended) == {worker}
    assert len(ended) == 5
    assert service.run("--status").stdout == f"{service.manager()}\n"
