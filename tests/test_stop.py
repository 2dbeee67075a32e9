"""A stop is graceful, and over when it says so."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import DAEMON, Gate, Service, read_all, wait_until


def test_stop_waits_for_the_request_in_hand(service: Service) -> None:
    gate = Gate(service)
    manager = service.start("-w", "3", *gate.arguments)
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = gate.wait_for()
        stop = service.popen("-t")
        wait_until(lambda: service.workers(manager) == {busy}, "the idle workers to leave")
        assert stop.poll() is None
        assert service.pid_file.exists()
        gate.open()
        assert read_all(client) == b"%d let through\n" % busy
    output, errors = stop.communicate(timeout=50)
    assert not service.processes()
    assert (stop.returncode, output, errors) == (0, f"daemontest.py {manager} Server terminated.\n", "")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGQUIT])
def test_int_and_quit_stop_gracefully_too(service: Service, signum: signal.Signals) -> None:
    gate = Gate(service)
    manager = service.start("-w", "2", *gate.arguments)
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = gate.wait_for()
        os.kill(manager, signum)
        wait_until(lambda: service.workers(manager) == {busy}, "the idle worker to leave")
        gate.open()
        assert read_all(client) == b"%d let through\n" % busy
    wait_until(lambda: not service.processes(), "the stop")
    assert not service.pid_file.exists()
    assert service.records(f"Caught {signum.name}$")[0]["pid"] == str(manager)
    assert service.records("")[-1]["message"] == "Server Terminated."


def test_nobody_listens_after_a_stop(service: Service) -> None:
    service.start()
    service.stop()
    for host in ("127.0.0.1", "::1"):
        with pytest.raises(ConnectionRefusedError):
            service.connect(host)


def test_silent_clients_do_not_delay_a_stop(service: Service) -> None:
    service.start("-w", "1", "--timeout", "50")
    with service.connect(), service.connect():
        began = time.monotonic()
        service.stop()
        assert time.monotonic() - began < 10  # of the 50 s that these clients might take
    assert not service.processes()


def test_stopping_what_does_not_run_fails(service: Service) -> None:
    done = service.stop()
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "daemontest.py: not running\n")
    assert not service.pid_file.exists()


def test_status_tells_whether_it_runs(service: Service) -> None:
    manager = service.start()
    running = service.run("--status")
    assert (running.returncode, running.stdout, running.stderr) == (0, f"{manager}\n", "")
    service.stop()
    stopped = service.run("--status")
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (3, "", "daemontest.py: not running\n")


def test_status_is_told_by_the_exit_status_even_if_its_words_cannot_be_written(service: Service) -> None:
    for redirection in ("2>/dev/full", "2>&-"):
        done = subprocess.run(["sh", "-c", f'exec "$0" "$1" --status {redirection}', sys.executable, str(DAEMON)],
                              env=service.env, stdout=subprocess.PIPE, timeout=50)
        assert (done.returncode, done.stdout) == (3, b"")
