"""Each signal does what it promises, at any moment, also in a row and in storms, and no request is lost over it."""

import os
import random
import re
import signal
import socket
import time
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from signal import SIGHUP, SIGTERM, SIGUSR1

import pytest
from conftest import Held, Load, Service, alive, read_all, wait_until
from modules import DEAF

LONG = b"x" * 2100  # so much of a text that only a half-close ends it
IGNORED_BY_MANAGER = [signal.SIGPIPE, signal.SIGALRM, signal.SIGUSR2]
IGNORED_BY_OTHERS = [SIGHUP, signal.SIGINT, signal.SIGQUIT, SIGUSR1, signal.SIGUSR2, signal.SIGPIPE]


def send(pid: int, signum: int) -> None:
    """Send SIGNUM to PID, and wait until it has arrived."""
    os.kill(pid, signum)

    def arrived() -> bool:
        with suppress(FileNotFoundError):  # it has gone
            sets = re.findall(r"^S\w+Pnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
            return not any(int(pending, 16) & 1 << signum - 1 for pending in sets)
        return True

    wait_until(arrived, "the signal to arrive")


def everybody(service: Service) -> set[int]:
    return {service.manager(), service.keeper(), *service.generations(), *service.workers()}


def test_meaningless_signals_change_nothing(service: Service) -> None:
    held = Held(service)
    manager = service.start("-w", "2", "--timeout", "30", *held.arguments)
    before = everybody(service)
    with service.connect() as slow, service.connect() as client:
        slow.sendall(LONG)
        client.sendall(b"x\n")
        held.wait_for()
        for pid in before:
            for signum in IGNORED_BY_MANAGER if pid == manager else IGNORED_BY_OTHERS:
                send(pid, signum)
        held.release()
        slow.shutdown(socket.SHUT_WR)
        assert [read_all(client).partition(b" ")[2] for client in (client, slow)] == [b"let through\n"] * 2
    assert service.ask("x").endswith(" let through\n")
    assert everybody(service) == before
    assert not service.records("Caught|Status")


def test_worker_told_to_leave_says_so_and_is_replaced_at_once(service: Service) -> None:
    service.start("-w", "2")
    waits: list[float] = []
    while len(waits) < 50:
        before = service.workers()
        leaving = min(before)
        os.kill(leaving, SIGHUP)
        os.getrandom(len(waits) * 600)  # takes up to 80 us, in which it looks at SIGHUP
        began = time.monotonic()
        os.kill(leaving, SIGTERM)
        wait_until(lambda: len(service.workers() - before) == 1, "a new worker")  # noqa: B023
        waits.append(time.monotonic() - began)
        wait_until(lambda: before - service.workers() == {leaving}, "the old worker to go")  # noqa: B023
    assert min(waits) < 0.8  # a worker that died is replaced only after 1 s
    assert len(service.records("Caught SIGTERM")) == len(waits)


@pytest.mark.parametrize("text", [b"x\n", LONG], ids=["in its handler", "still coming"])
def test_text_whose_worker_is_told_to_leave_is_answered(service: Service, text: bytes) -> None:
    held = Held(service)
    service.start("-w", "1", "--timeout", "30", *held.arguments)
    [worker] = service.workers()
    with service.connect() as client:
        client.sendall(text)
        if text == b"x\n":
            assert held.wait_for() == [worker]
        send(worker, SIGTERM)
        if text != b"x\n":
            service.wait_for_new_workers({worker})
        held.release()
        client.shutdown(socket.SHUT_WR)
        pid, _, reply = read_all(client).partition(b" ")
        assert reply == b"let through\n"
        assert (int(pid) == worker) == (text == b"x\n")
    service.wait_for_new_workers({worker})


def test_term_before_a_worker_is_set_up_counts(service: Service) -> None:
    service.start("-w", "1")
    told: set[int] = set()
    for _ in range(20):
        while not (new := service.workers() - told):  # without a pause, not to miss the moment
            pass  # if a TERM is lost, the test's timeout ends it
        told |= new
        for worker in new:
            os.kill(worker, SIGTERM)
    wait_until(lambda: service.workers().isdisjoint(told) and len(service.workers()) == 1, "one worker more")


@pytest.mark.parametrize("signals", [[SIGHUP, SIGTERM], [SIGTERM, SIGTERM], [SIGHUP, SIGTERM, SIGHUP]],
                         ids=lambda signals: "+".join(signum.name[3:] for signum in signals))
def test_signals_back_to_back_end_in_a_clean_stop(service: Service, signals: list[signal.Signals]) -> None:
    for attempt in range(1, 4):
        manager = service.start("-w", "3")
        for signum in signals:
            with suppress(ProcessLookupError):  # a quick manager may have ended after the first
                os.kill(manager, signum)
        wait_until(lambda: not alive(manager), "the manager to go")  # noqa: B023
        assert not service.processes()
        assert len(service.records("Server Terminated.")) == attempt


@pytest.mark.parametrize("signum", [SIGTERM, SIGHUP], ids=["TERM", "HUP"])
def test_signals_count_from_the_moment_the_pid_file_is_written(service: Service, signum: int) -> None:
    service.expected.append("Start Failed: caught SIGTERM")
    for attempt in range(4):
        start = service.popen("-p", str(service.port), "-w", "3")
        content = ""
        while not content.endswith("\n"):  # without pauses, not to miss the moment; the test's timeout ends it
            with suppress(FileNotFoundError):
                content = service.pid_file.read_text()
        time.sleep(attempt and random.uniform(0, 0.03))  # the timing is what is tested
        os.kill(manager := int(content), signum)
        outcome = (*start.communicate(timeout=30), start.returncode)
        if outcome != ("", "daemontest.py: cannot start: caught SIGTERM\n", 1) or signum == SIGHUP:
            assert outcome == (f"daemontest.py: {manager} started, 3 workers on port {service.port}\n", "", 0)
        if signum == SIGHUP:
            service.wait_for_records("Caught SIGHUP", attempt + 1)
            wait_until(lambda: "Loading configuration." in service.log.rpartition("Caught SIGHUP")[2], "the next load")
            assert service.stop().stdout == f"daemontest.py {manager} Server terminated.\n"
        wait_until(lambda: not service.processes(), "all to go")
        assert not service.pid_file.exists()


def test_storm_of_signals_under_load_loses_no_request(service: Service) -> None:
    manager = service.start("-w", "5", "-n", "20", "--timeout", "30")
    most = terms = 0
    with Load(service, 4) as load, ExitStack() as stack:
        slow = [stack.enter_context(service.connect()) for _ in range(10)]
        for client in slow:
            client.sendall(LONG)
        for _ in range(60):
            os.kill(manager, SIGHUP)
            os.kill(manager, SIGUSR1)
            with suppress(IndexError, ProcessLookupError):
                os.kill(random.choice(sorted(service.workers())), SIGTERM)
                terms += 1
            for generation in service.generations():  # whoever both looks see was alive between them
                most = max(most, len(service.children(generation) & service.children(generation)))
            time.sleep(0.02)
        load.wait_for(200)
        for client in slow:
            client.shutdown(socket.SHUT_WR)
        assert {read_all(client).partition(b" ")[2] for client in slow} == {b"your text size: 2100\n"}
    assert load.failures == []
    assert {reply.partition(b" ")[2] for reply in load.replies} == {b"your text size: 1\n"}
    assert terms > 30
    assert most <= 10, "more than twice the workers in a generation"
    wait_until(lambda: len(everybody(service)) == len(service.processes()) == 8, "five workers, and no others")
    assert not service.records("Child Process (Died|Killed)|Generation (Died|Failed)")


def ask_status(service: Service, expected: str) -> re.Match[str]:
    """Send USR1 until the manager tells a status in which EXPECTED, a pattern, is found; return what was found."""
    def told() -> re.Match[str] | None:
        os.kill(service.manager(), SIGUSR1)
        return re.search(expected, service.log, re.DOTALL)

    return wait_until(told, f"a status with {expected}")


def test_usr1_counts_clients_bytes_and_texts(service: Service) -> None:
    before = int(time.time())
    service.start("-w", "1", "--timeout", "30")
    service.ask("x")
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(service.connect()).sendall(LONG)
        found = ask_status(service, rf"\* {service.keeper()} Status: keeper with 3 clients, 6300 bytes\n.*"
                           rf"\* {service.generation()} Status: generation 1, serving since (\S+), 1 workers?\n.*"
                           rf"\* {min(service.workers())} Status: worker with 1 texts? served, handler idle\n")
        assert before <= datetime.fromisoformat(found[1]).timestamp() <= time.time()
    ask_status(service, "keeper with 3 clients.*keeper with 0 clients, 0 bytes\n")


def test_usr1_tells_for_how_long_a_handler_runs_and_which_generations_there_are(service: Service) -> None:
    held = Held(service)
    manager = service.start("-w", "2", *held.arguments)
    began = time.monotonic()
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = held.wait_for()
        running = time.monotonic()
        wait_until(lambda: time.monotonic() > running + 0.5, "the clock")
        found = ask_status(service, rf"\* {busy} Status: worker with 0 texts served, handler running for (\d+\.\d) s\n")
        assert 0.4 <= float(found[1]) <= time.monotonic() - began + 0.1
        os.kill(manager, SIGHUP)
        ask_status(service, "generation 1, leaving.*generation 2, serving")
        held.release()


def test_usr1_is_answered_at_once_while_a_module_is_imported(service: Service) -> None:
    manager = service.start("-w", "1")
    service.write_handler(f"print('importing', flush=True)\n{DEAF}")
    service.configure("handler = 'service:handle'")
    os.kill(manager, SIGHUP)
    wait_until(lambda: "\nimporting\n" in service.log, "the import")
    ask_status(service, "generation 1, serving.*generation 2, loading")


def test_ps_tells_the_processes_apart(service: Service) -> None:
    service.start("-w", "2")
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in service.processes()]
    assert sorted(names) == ["daemontest-gen", "daemontest-keep", "daemontest-mngr", *["daemontest-work"] * 2]
