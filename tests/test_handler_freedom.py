"""Your own service may use what a Python program may use: signals, commands, processes, threads, locks."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import DEADLINE, Service, read_all, wait_until


def test_it_may_read_its_standard_input_which_is_empty(service: Service) -> None:
    service.write_handler("import sys\ndef handle(text):\n    return repr(sys.stdin.read())")
    service.start("--handler", "service:handle")
    assert re.fullmatch(r"\d+ ''\n", service.ask("x"))


def test_it_may_use_the_alarm_signal(service: Service) -> None:
    service.start("-w", "1", *service.use_handler("uses_alarm"))
    [worker] = service.workers()
    assert [service.ask("x") for _ in range(2)] == [f"{worker} late\n"] * 2


def test_commands_it_runs_inherit_the_standard_descriptors_and_no_other_and_no_blocked_signal(service: Service) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here to ask")
    service.start(*service.use_handler("shows_inheritance"))
    descriptors, blocked, _ = service.ask("x").split("\n", 2)
    assert descriptors.split()[1:] == ["0", "1", "2"]
    assert int(blocked.split(":")[1], 16) == 0


def test_it_may_fork_a_helper_when_it_is_imported(service: Service) -> None:
    manager = service.start("-w", "1", *service.use_handler("has_helper"))  # it returns, though the helper lives on
    helper = int(service.ask("x").split()[1])
    assert helper in service.processes()
    os.kill(helper, signal.SIGKILL)
    wait_until(lambda: helper not in service.processes(), "the helper to go")
    assert service.stop().stdout == f"daemontest.py {manager} Server terminated.\n"
    assert not service.records("Child Process Died")


def test_its_module_may_wait_for_commands_that_it_runs_beside_the_workers(service: Service) -> None:
    service.start("-w", "2", "-n", "1", *service.use_handler("waits_for_commands"))
    statuses = service.home / "statuses"

    def told() -> bool:
        service.ask("x")
        return statuses.exists() and statuses.read_text().endswith("\n")

    wait_until(told, "the commands")
    assert statuses.read_text() == "[5, 5, 5, 5, 5]\n"


def test_it_may_lock_files_with_lockfile(service: Service) -> None:
    service.start("-w", "1", *service.use_handler("locks_file"))
    assert [service.ask("x").split()[1] for _ in range(2)] == ["locked"] * 2


def test_a_default_timeout_that_it_sets_is_not_that_of_its_clients(service: Service) -> None:
    service.write_handler("import socket\nsocket.setdefaulttimeout(0.05)\ndef handle(text):\n    return text")
    service.start("-w", "1", "--handler", "service:handle")
    with service.connect() as client:
        client.sendall(b"neither a newline nor an end")
        assert read_all(client).endswith(b" neither a newline nor an end\n")


def test_a_thread_that_it_starts_at_import_keeps_no_command_from_ending(service: Service) -> None:
    service.write_handler("import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
                          "def handle(text):\n    return text")
    chosen = ("--handler", "service:handle")

    def stops() -> bool:
        began = time.monotonic()
        return service.stop().returncode == 0 and time.monotonic() - began < 20  # of the grace of 30 s

    assert service.run("--check", *chosen).returncode == 0
    assert service.run("--check", "--handler", "service:missing").returncode == 1
    service.start(*chosen)
    assert service.run("--reload").returncode == 0
    assert stops()
    daemon = service.foreground(*chosen, stderr=subprocess.DEVNULL)
    wait_until(lambda: service.run("--status").returncode == 0, "the start")
    assert service.run("--reload").returncode == 0  # so the start is over: a stop before that would make it a failure
    assert stops()
    assert daemon.wait(DEADLINE) == 0
    daemon.communicate()


@pytest.mark.parametrize("handler", ["uses_threads", "uses_threads_early"])
def test_it_may_use_threads_and_what_is_built_on_them(service: Service, handler: str) -> None:
    service.use_handler("uses_threads")
    service.start("-w", "1", "-n", "2", *service.use_handler(handler))
    assert [service.ask("abc").split()[1:] for _ in range(3)] == [["aabbcc", "True"]] * 3
    assert service.log.split("\n").count("logged") == 3


def test_what_it_does_to_signals_at_import_deafens_nobody(service: Service) -> None:
    service.start("-w", "1", "-n", "1", *service.use_handler("spoils_signals"))
    served = {int(service.ask("x").split()[0]) for _ in range(5)}
    assert len(served) == 5
    wait_until(lambda: len(service.workers()) == 1 and not service.workers() & served, "the sixth worker alone")
    workers = service.workers()
    os.kill(service.manager(), signal.SIGHUP)
    service.wait_for_new_workers(workers)
    assert service.stop().returncode == 0
    assert service.records()[-1]["message"] == "Server Terminated."
    assert not service.pid_file.exists()


def test_a_process_that_it_forks_can_be_terminated_and_delays_no_reply(service: Service) -> None:
    service.start("-w", "1", *service.use_handler("terminates_process"))
    assert service.ask("terminate").endswith(" terminated\n")
    left = int(service.ask("leave").split()[1])  # it has the connection open, and yet this reply has come to its end
    assert left in service.processes()
    os.kill(left, signal.SIGKILL)
