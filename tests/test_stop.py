"""A stop is graceful, however it comes, and over when it says so; a killed manager takes all others with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress

import pytest
from conftest import DAEMON, DEADLINE, Held, Load, Service, alive, read_all, wait_until
from modules import DEAF

BEGUN = b"x" * 2100  # a text that has begun: so much that only a half-close ends it


# ---- What a stop waits for ------------------------------------------------------------

@pytest.mark.parametrize("how", ["-t", "SIGTERM", "SIGINT", "SIGQUIT"])
def test_stop_waits_for_the_request_in_hand(service: Service, how: str) -> None:
    held = Held(service)
    manager = service.start("-w", "3", *held.arguments)
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = held.wait_for()
        stop = service.popen("-t") if how == "-t" else os.kill(manager, signal.Signals[how])
        wait_until(service.refuses, "nobody to accept any more")
        assert stop is None or stop.poll() is None
        assert alive(manager)
        held.release()
        assert read_all(client) == b"%d let through\n" % busy
    if stop:
        assert stop.communicate(timeout=50) == (f"daemontest.py {manager} Server terminated.\n", "")
        assert stop.returncode == 0
        assert not service.processes()
    wait_until(lambda: not service.processes(), "the stop")
    assert not service.pid_file.exists()
    caught = "SIGTERM" if how == "-t" else how
    assert str(manager) in [record["pid"] for record in service.records(f"Caught {caught}$")]
    assert len(service.records(r"Child Process Ended\. \(\d+\)$")) == 3
    assert service.records()[-1]["message"] == "Server Terminated."


@pytest.mark.parametrize("how", ["Ctrl-C", "pkill"])
def test_signal_sent_to_all_processes_at_once_is_a_stop(service: Service, how: str) -> None:
    """As a terminal sends it to those in its foreground, or `pkill -f daemontest.py`."""
    held = Held(service)
    daemon = service.foreground("-w", "3", *held.arguments, "--log-file", service.log_file, start_new_session=True)
    service.wait_for_records("Child Process Started.", 3)
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = held.wait_for()
        if how == "Ctrl-C":
            os.killpg(daemon.pid, signal.SIGINT)
        else:
            for pid in service.processes():
                with suppress(ProcessLookupError):  # it has gone already, told by another
                    os.kill(pid, signal.SIGTERM)
        wait_until(service.refuses, "nobody to accept any more")
        held.release()
        assert read_all(client) == b"%d let through\n" % busy
    assert (daemon.wait(DEADLINE), daemon.communicate()) == (0, ("", ""))
    assert not service.processes()
    assert not service.pid_file.exists()


def test_stop_waits_for_texts_that_have_begun_and_lets_the_silent_go(service: Service) -> None:
    service.start("-w", "2", "--timeout", "30")
    with ExitStack() as stack:
        silent = [stack.enter_context(service.connect()) for _ in range(5)]
        for client in silent:
            client.send(b"!", socket.MSG_OOB)  # no data, but it ends TCP_DEFER_ACCEPT, so the keeper gets them
        slow = stack.enter_context(service.connect())
        slow.sendall(BEGUN)
        wait_until(lambda: service.kept()[0] == 6, "the keeper to have them")
        stop = service.popen("-t")
        assert [read_all(client) for client in silent] == [b""] * 5  # at once, not after their 30 s
        assert stop.poll() is None
        slow.shutdown(socket.SHUT_WR)
        assert read_all(slow).endswith(b" your text size: 2100\n")
        assert stop.wait(DEADLINE) == 0
        assert not service.processes()


def test_stop_waits_no_longer_than_the_grace(service: Service) -> None:
    service.expected.append(r"Child Process Killed\. \(still running after the grace\)")
    held = Held(service)
    service.start("-w", "1", "--handler-timeout", "40", "--grace", "1", *held.arguments)
    with service.connect() as client:
        client.sendall(b"x\n")
        held.wait_for()
        began = time.monotonic()
        assert service.stop().returncode == 0
        assert 0.9 < time.monotonic() - began < 15
        assert not service.processes()
    assert len(service.records("Child Process Killed")) == 1


def test_nobody_listens_when_the_pid_file_has_gone(service: Service) -> None:
    for _ in range(4):
        manager = service.start("-w", "2")
        os.kill(manager, signal.SIGTERM)
        while service.pid_file.exists():  # without a pause, not to miss the moment; the test's timeout ends it
            pass
        for host in ("127.0.0.1", "::1"):
            with pytest.raises(ConnectionRefusedError):
                service.connect(host)
        wait_until(lambda: not service.processes(), "all to go")


# ---- What the commands say ------------------------------------------------------------

def test_what_does_not_run_is_told_with_its_pid_file(service: Service) -> None:
    manager = service.start("-w", "1")
    asked = service.run("--status")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, f"{manager}\n", "")
    service.stop()
    for arguments, path in ([], service.pid_file), (["--pid-file", "other.pid"], service.home / "other.pid"):
        for action, status in ("-t", 1), ("--status", 3), ("--reload", 1):
            done = service.run(action, *arguments)
            assert (done.returncode, done.stdout) == (status, "")
            assert done.stderr == f"daemontest.py: not running (PID file {path})\n"
            assert not path.exists()


@pytest.mark.parametrize(("action", "setting"), [("-t", "-w 3"), ("--status", "--log life"), ("--reload", "--grace 1")])
def test_settings_that_cannot_reach_the_service_are_refused(service: Service, action: str, setting: str) -> None:
    done = service.run(action, *setting.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")
    assert setting.split()[0] in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_exit_status_tells_even_if_the_words_cannot_be_written(service: Service, redirection: str) -> None:
    done = subprocess.run(["sh", "-c", f'exec "$0" "$1" --status {redirection}', sys.executable, str(DAEMON)],
                          env=service.env, stdout=subprocess.PIPE, timeout=50)
    assert (done.returncode, done.stdout) == (3, b"")


# ---- A killed manager -----------------------------------------------------------------

def kill(manager: int) -> None:
    os.kill(manager, signal.SIGKILL)
    wait_until(lambda: not alive(manager), "the manager to die")


def test_after_a_killed_manager_all_go_and_the_next_start_finds_the_port_free(service: Service) -> None:
    took = []
    for _ in range(3):
        manager = service.start("-w", "3")
        kill(manager)
        began = time.monotonic()
        wait_until(lambda: not service.processes() and service.refuses(), "all to go", 10)
        took.append(time.monotonic() - began)
        assert service.pid_file.read_text() == f"{manager}\n"
    assert [service.run(action).returncode for action in ("--status", "-t", "--reload")] == [3, 1, 1]
    manager = service.start("-w", "1")
    assert service.run("--reload").stdout == f"daemontest.py: {manager} reloaded\n"
    assert min(took) < 1.0  # the fastest: on a loaded machine, some take longer


def test_after_a_killed_manager_both_generations_finish_what_they_have(service: Service) -> None:
    held = Held(service)
    manager = service.start("-w", "2", "--timeout", "30", *held.arguments)
    old = service.workers(manager)
    with service.connect() as client, service.connect() as another, service.connect() as slow:
        client.sendall(b"x\n")
        [busy] = held.wait_for()
        os.kill(manager, signal.SIGHUP)
        wait_until(lambda: service.workers() & old == {busy} and len(service.workers() - old) == 2, "the reload")
        another.sendall(b"x\n")
        [_, busy_too] = held.wait_for(2)
        slow.sendall(BEGUN)
        wait_until(lambda: service.kept()[0] == 1, "the keeper to have it")
        kill(manager)
        wait_until(service.refuses, "nobody to accept any more", 10)
        held.release()
        assert read_all(client) == b"%d let through\n" % busy
        assert read_all(another) == b"%d let through\n" % busy_too
        slow.shutdown(socket.SHUT_WR)
        assert read_all(slow).endswith(b" let through\n")
    wait_until(lambda: not service.processes(), "all to go", 10)


def test_after_a_killed_manager_under_load_every_text_that_was_begun_is_ended(service: Service) -> None:
    for _ in range(2):
        manager = service.start("-w", "3", "-n", "20")
        with Load(service) as load:
            load.wait_for(50)
            kill(manager)
            wait_until(lambda: not service.processes() and service.refuses(), "all to go", 10)
        assert {reply.partition(b" ")[2] for reply in load.replies} == {b"your text size: 1\n"}
        begun, ended = (service.records(f"Client Query Processing {word}") for word in ("Started", "Ended"))
        assert len(begun) == len(ended)


def test_after_a_killed_manager_a_hung_worker_ends_at_its_handlers_time(service: Service) -> None:
    service.expected.append(r"Child Process Killed\. \(handler ran longer than 1\.5 s\)")
    service.write_handler(f"def handle(text):\n    print('hangs')\n    exec({DEAF!r})\n")
    manager = service.start("-w", "3", "--handler", "service:handle", "--handler-timeout", "1.5")
    with service.connect() as client:
        began = time.monotonic()
        client.sendall(b"x\n")
        wait_until(lambda: "\nhangs\n" in service.log, "the handler to hang")
        kill(manager)
        wait_until(lambda: not service.processes(), "all to go", 10)
        assert time.monotonic() - began > 1.4
    assert " line 3 in handle\n" in service.log  # where it hung
