"""Signals sent back to back all count, even those that come before the service is ready."""

import os
import random
import signal
import time
from contextlib import suppress
from signal import SIGHUP, SIGTERM

import pytest
from conftest import Service, alive, wait_until

TIMES = 10  # signals back to back
MOMENTS = 6  # between the PID file and readiness


@pytest.mark.parametrize("signals", [
    [SIGHUP, SIGTERM], [SIGTERM, SIGHUP], [SIGHUP, SIGHUP, SIGTERM], [SIGTERM, SIGTERM]],
                         ids=lambda signals: "+".join(signum.name[3:] for signum in signals))
def test_signals_back_to_back_always_end_in_a_clean_stop(service: Service, signals: list[signal.Signals]) -> None:
    for attempt in range(TIMES):
        manager = service.start("-w", "3")
        workers = service.workers(manager)
        assert len(workers) == 3
        if attempt % 2:
            service.ask("x")
        for signum in signals:
            with suppress(ProcessLookupError):  # a quick manager may have ended after the first
                os.kill(manager, signum)
        wait_until(lambda: not alive(manager), "the manager to go")  # noqa: B023
        assert not service.processes()
        assert not service.pid_file.exists()
        ended = [match for match in service.records("Server Terminated.") if match["pid"] == str(manager)]
        assert len(ended) == 1
    assert len(service.records("Child Process Ended.")) == len(service.records("Child Process Started."))
    assert len(service.records("Server Terminated.")) == TIMES


def start_and_signal_at_once(service: Service, signals: list[signal.Signals],
                             pause: float) -> tuple[int, int, str, str]:
    """Start, and send SIGNALS as soon as the PID file has a content.

    Returns the PID, the exit status and what the start said.
    """
    launcher = service.popen("-p", str(service.port), "-w", "3")

    def written() -> int:
        try:
            content = service.pid_file.read_text()
        except FileNotFoundError:
            return 0
        return int(content) if content.endswith("\n") else 0

    manager = 0
    end = time.monotonic() + 20
    while not manager and time.monotonic() < end:  # without pauses, not to miss the moment
        manager = written()
    assert manager
    time.sleep(pause)  # the moment itself is the stimulus
    for signum in signals:
        os.kill(manager, signum)
    out, err = launcher.communicate(timeout=30)
    return manager, launcher.returncode, out, err


@pytest.mark.parametrize("signals", [[SIGTERM], [SIGHUP, SIGTERM]], ids=["TERM", "HUP+TERM"])
def test_a_stop_the_moment_the_pid_file_is_written_counts(service: Service, signals: list[signal.Signals]) -> None:
    for attempt in range(MOMENTS):
        manager, status, out, err = start_and_signal_at_once(service, signals, attempt and random.uniform(0, 0.02))
        if status:  # where a start takes so long that the stop ends it
            assert (status, out, err) == (1, "", "daemontest.py: cannot start: caught SIGTERM\n")
        else:
            assert (out, err) == (f"daemontest.py: {manager} started, 3 workers on port {service.port}\n", "")
        wait_until(lambda: not service.processes(), "all processes to go")
        assert not service.pid_file.exists()
    assert len(service.records("Server Terminated.")) == MOMENTS


def test_a_hup_the_moment_the_pid_file_is_written_counts(service: Service) -> None:
    for attempt in range(MOMENTS):
        manager, status, _, err = start_and_signal_at_once(service, [SIGHUP], attempt and random.uniform(0, 0.02))
        assert (status, err) == (0, "")
        service.wait_for_records("Loading configuration.", 2 * (attempt + 1))
        assert service.ask("x").endswith(" your text size: 1\n")
        assert service.manager() == manager
        stopped = service.stop()
        assert (stopped.returncode, stopped.stdout) == (0, f"daemontest.py {manager} Server terminated.\n")
        assert not service.processes()
