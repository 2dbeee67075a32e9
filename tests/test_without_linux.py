"""What only Linux has costs speed where it is missing, never a promise: once all of it without."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import DATA, Load, Service, alive, serving, wait_until
from slow_clients import (
    Crowd,
    Kind,
    SlowSender,
    at_rest,
    in_hand,
    keeper,
    not_reading,
    original,
    silent,
    slow_short_text,
    stalled,
    trickling,
    urgent,
)

LOOK = """
import os, select, signal, socket

print([hasattr(select, "epoll"), hasattr(select, "EPOLLEXCLUSIVE"), hasattr(os, "pidfd_open"),
       hasattr(signal, "pidfd_send_signal"), hasattr(socket, "MSG_MORE"), hasattr(socket, "TCP_DEFER_ACCEPT"),
       hasattr(socket, "TCP_INFO")])
"""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """One whose processes all lack these names."""
    with serving(tmp_path / "home") as service:
        service.env["PYTHONPATH"] = str(DATA / "fallbacks")
        yield service


def start(service: Service, *arguments: str) -> int:
    return service.start(*service.use_handler("does_as_told"), *arguments)


def test_the_names_are_missing_in_the_processes_of_the_daemon(service: Service) -> None:
    there = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, env=service.env)
    assert (there.stdout, there.stderr) == (f"{[False] * 7}\n", "")
    start(service, "-w", "1")
    files = [os.readlink(file) for worker in service.workers() for file in Path(f"/proc/{worker}/fd").iterdir()]
    assert files
    assert "anon_inode:[eventpoll]" not in files
    assert service.ask("x").endswith(" your text size: 1\n")


def test_it_starts_serves_tells_its_state_and_stops(service: Service) -> None:
    manager = start(service, "-w", "2")
    assert service.run("--status").stdout == f"{manager}\n"
    assert service.run("-p", str(service.port)).stderr.startswith("daemontest.py: cannot start: already running")
    assert service.ask("あ" * 100000).endswith(" your text size: 100000\n")
    assert service.ask(b"\xff").endswith(" error: text is not UTF-8 at byte offset 0\n")
    with Crowd(service.port, original, 5, waits=False) as crowd:
        crowd.wait_until_served()
    assert [reply.partition(b" ")[2] for reply in crowd.replies] == [b"your text size: 31\n"] * 5
    stopped = service.stop()
    assert (stopped.returncode, stopped.stdout) == (0, f"daemontest.py {manager} Server terminated.\n")
    assert not service.processes()


def test_workers_are_recycled_and_none_is_lost_slow_or_not(service: Service) -> None:
    start(service, "-w", "3", "-n", "20")
    most = 0
    with Load(service, 3) as load, Crowd(service.port, slow_short_text, 20, waits=False) as slow:
        while slow.thread.is_alive():
            most = max(most, len(service.workers()))
            time.sleep(0.02)
        wait_until(lambda: len(load.replies) > 100, "the others to have been served, too")
    assert (load.failures, slow.failures) == ([], [])
    assert [reply.partition(b" ")[2] for reply in slow.replies] == [b"your text size: 5000\n"] * 20
    assert most <= 6
    assert not service.records("Child Process Died")


def test_it_reloads_at_a_signal_and_by_the_command(service: Service) -> None:
    manager = start(service, "-w", "2", "-n", "1000000", "--timeout", "60")
    old = service.workers()
    sender = SlowSender(service.connect())
    worker = wait_until(lambda: keeper(service, sender), "it in hand")
    with Load(service, 2, pause=0.005) as load:
        os.kill(manager, signal.SIGHUP)
        wait_until(lambda: len(service.workers() - old) == 2, "new workers")
        assert sender.finish() == f"{worker} your text size: 2101\n"
        old = service.wait_for_new_workers(old)
        done = service.run("--reload")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"daemontest.py: {manager} reloaded\n", "")
        service.wait_for_new_workers(old)
        load.wait_for(10)
    assert load.failures == []


def test_a_failed_reload_changes_nothing_and_says_why(service: Service) -> None:
    manager = start(service, "-w", "2")
    old = service.workers()
    service.expected.append("Nothing Changed: ")
    (service.home / "does_as_told.py").write_text("raise RuntimeError('no')")
    done = service.run("--reload")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("daemontest.py: nothing changed: cannot load handler does_as_told:handle: ")
    assert service.workers() == old
    assert service.manager() == manager
    assert service.ask("x").endswith(" your text size: 1\n")


@pytest.mark.parametrize("kind", [silent, stalled, trickling, urgent, not_reading])
def test_no_slow_client_holds_a_worker(service: Service, kind: Kind) -> None:
    start(service, "-w", "2", "-n", "1000000", "--timeout", "50", "--max-text", "100000000")
    workers = service.workers()
    with Crowd(service.port, kind, 30, text=b"reply 5000000") as crowd:
        wait_until(lambda: in_hand(service, *workers) == 30, "them in hand")
        for _ in range(10):
            began = time.monotonic()
            assert service.ask("whole\n").endswith(" your text size: 6\n")
            assert time.monotonic() - began < 10  # the slow ones' timeout is later
        assert (crowd.replies, crowd.failures) == ([], [])
        if kind is not trickling:
            wait_until(lambda: at_rest(workers), "the workers to rest")
    assert service.workers() == workers


def test_the_silent_are_let_go_at_the_timeout_and_at_a_stop(service: Service) -> None:
    start(service, "-w", "1", "--timeout", "1")
    began = time.monotonic()
    with Crowd(service.port, silent, 20) as crowd:
        crowd.wait_until_served()
        assert 0.9 < time.monotonic() - began < 10
    assert crowd.replies == [b""] * 20
    assert not service.records("Client: ")
    start_again = service.stop()
    assert start_again.returncode == 0
    start(service, "-w", "1", "--timeout", "60")
    with Crowd(service.port, silent, 20) as crowd:
        began = time.monotonic()
        assert service.stop().returncode == 0
        assert time.monotonic() - began < 15  # the grace is 30 s
        crowd.wait_until_served()


def test_a_slow_sender_does_not_wait_for_a_handler_while_another_worker_is_free(service: Service) -> None:
    start(service, "-w", "2", "-n", "1000000", "--timeout", "60")
    late = 0  # times that the free worker was not scheduled at once
    with ThreadPoolExecutor() as pool:
        for number in range(8):
            sender = SlowSender(service.connect())
            worker = wait_until(lambda sender=sender: keeper(service, sender), "it in hand")
            held, go = service.home / f"held-{number}", service.home / str(number)
            holding = pool.submit(service.ask, f"hold {number}")
            try:
                holder = wait_until(lambda held=held: held.exists() and held.read_text(), "a text to be held")
                free = int(holder) != worker
                if free:
                    assert sender.finish() == f"{worker} your text size: 2101\n"
            finally:
                go.touch()
            if not free:
                late += 1
                assert sender.finish() == f"{worker} your text size: 2101\n"
            assert holding.result().endswith(" your text size: 6\n")
    assert late <= 2


def test_hung_handlers_are_killed_and_a_killed_manager_leaves_the_port_free(service: Service) -> None:
    service.expected.append(r"Child Process Died\. \(SIGKILL: handler ran longer than 0.7 s\)")
    manager = start(service, "-w", "2", "--handler-timeout", "0.7")
    with ThreadPoolExecutor() as pool:
        hung = pool.submit(service.ask, "sleep 100")
        service.wait_for_records("Child Process Died", 1)
        assert isinstance(hung.exception(), OSError) or hung.result() == ""
    os.kill(manager, signal.SIGKILL)
    wait_until(lambda: not service.processes(), "its generation and workers to end", 10)
    start(service, "-w", "1")
    assert service.ask("x").endswith(" your text size: 1\n")


def test_a_start_is_given_up_while_the_module_s_import_hangs(service: Service) -> None:
    starting = service.popen("-p", str(service.port), *service.use_handler("hangs_at_import"))
    wait_until((service.home / "importing").exists, "the import to hang")
    starting.send_signal(signal.SIGINT)
    said, why = starting.communicate(timeout=50)
    assert (starting.returncode, said, why) == (1, "", "daemontest.py: interrupted\n")
    assert not service.processes()
    assert not service.pid_file.exists()
    assert not alive(starting.pid)
