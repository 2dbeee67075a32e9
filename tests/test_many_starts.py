"""Of many simultaneous starts exactly one wins; the others say why, and nothing is left of them."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from conftest import DAEMON, Service, free_port, wait_until

STARTS = 12
TIMES = 2


def start_at_once(service: Service, ports: list[int]) -> list[tuple[int, int, str, str]]:
    """The PID, exit status and output of a start on each of PORTS, all at the same time."""
    launchers = [subprocess.Popen([sys.executable, str(DAEMON), "-p", str(port), "-w", "2"], cwd=service.home,
                                  env=service.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for port in ports]
    ended = []
    for launcher in launchers:
        out, err = launcher.communicate(timeout=50)
        ended.append((launcher.pid, launcher.returncode, out, err))
    return ended


def refusal(service: Service) -> str:
    return f"daemontest.py: cannot start: already running (PID file {service.pid_file})\n"


def wait_until_only(service: Service, processes: set[int]) -> None:
    """Wait until no others are left: those who forked the manager may end a moment after it has told of its start."""
    assert service.processes() >= processes
    wait_until(lambda: service.processes() == processes, "all others to go")


@pytest.mark.parametrize("leftover", [False, True], ids=["without a PID file", "with a PID file left over"])
@pytest.mark.parametrize("same_port", [True, False], ids=["same port", "different ports"])
def test_exactly_one_of_many_starts_wins(service: Service, same_port: bool, leftover: bool) -> None:
    for _ in range(TIMES):
        if leftover:
            service.pid_file.write_text("999999\n")
        ports = [service.port] * STARTS if same_port else [free_port() for _ in range(STARTS)]
        ended = start_at_once(service, ports)
        won = [out for _, status, out, _ in ended if status == 0]
        lost = [(status, out, err) for _, status, out, err in ended if status]
        assert lost == [(1, "", refusal(service))] * (STARTS - 1)
        manager = service.manager()
        service.port = int(won[0].split()[-1])
        assert service.port in ports
        assert won == [f"daemontest.py: {manager} started, 2 workers on port {service.port}\n"]
        wait_until_only(service, {manager, *service.generations(manager), *service.workers(manager)})
        assert service.ask("x").endswith(" your text size: 1\n")
        stopped = service.stop()
        assert (stopped.returncode, stopped.stdout) == (0, f"daemontest.py {manager} Server terminated.\n")
        assert not service.processes()
        assert not service.pid_file.exists()


def test_starts_against_a_running_service_all_lose_and_change_nothing(service: Service) -> None:
    manager = service.start("-w", "2")
    before = {manager, *service.generations(manager), *service.workers(manager)}
    for port in (service.port, free_port()):
        ended = start_at_once(service, [port] * STARTS)
        assert [(status, out, err) for _, status, out, err in ended] == [
            (1, "", refusal(service))] * STARTS
    wait_until_only(service, before)
    assert service.manager() == manager


def test_who_asks_for_the_status_never_makes_a_start_or_a_stop_fail(service: Service) -> None:
    done = Event()

    def ask_on() -> set[tuple[int, str]]:
        answers = set()
        for _ in range(1000):
            if done.is_set():
                break
            asked = service.run("--status")
            assert asked.returncode or asked.stdout.strip().isdigit()
            answers.add((asked.returncode, asked.stderr))
        return answers

    with ThreadPoolExecutor(4) as pool:
        askers = [pool.submit(ask_on) for _ in range(4)]
        try:
            for _ in range(2 * TIMES):
                service.start("-w", "1")
                assert service.stop().returncode == 0
        finally:
            done.set()
        answers = set().union(*(asker.result() for asker in askers))
    assert answers <= {(0, ""), (3, "daemontest.py: not running\n")}
    assert not service.pid_file.exists()
