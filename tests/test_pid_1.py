"""As process 1 of a container it buries whatever has lost its parent there; it needs nobody to bury its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
from conftest import DAEMON, DEADLINE, Service, alive, wait_until

UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def can_unshare() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(
        [*UNSHARE, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE).returncode == 0


pytestmark = pytest.mark.skipif(not can_unshare(), reason="needs unshare, and the right to use it")


class Container:
    """The service as process 1 of a PID namespace."""

    def __init__(self, service: Service, *arguments: str) -> None:
        self.service = service
        # Not the PID file that the harness knows: process 1 is another one here than there.
        files = ("--pid-file", service.home / "container.pid", "--log-file", service.log_file)
        command = [*UNSHARE, sys.executable, DAEMON, "-f", "-p", service.port, *files, *arguments]
        self.unshare = subprocess.Popen(list(map(str, command)), cwd=service.home, env=service.env,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        service.wait_for_records("Child Process Started.")
        [self.manager] = service.children(self.unshare.pid)
        service.serving_generation(self.manager)

    def generation(self) -> int:
        return self.service.generation(self.manager)

    def workers(self) -> set[int]:
        return self.service.workers(self.manager)

    def zombies(self) -> list[int]:
        found = []
        for process in psutil.Process(self.manager).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def assert_no_zombies(self) -> None:
        """Also who has just ended is buried."""
        wait_until(lambda: not self.zombies(), "all zombies to be buried")

    def wait(self) -> int:
        """Its exit status."""
        output, errors = self.unshare.communicate(timeout=DEADLINE)
        assert (output, errors) == (b"", b"")
        return self.unshare.returncode

    def close(self) -> None:
        if self.unshare.poll() is None:
            self.unshare.kill()
            self.unshare.communicate()


@pytest.fixture
def container(service: Service) -> Iterator[Container]:
    container = Container(service, "-w", "2", *service.use_handler("leaves_orphans"))
    yield container
    container.close()
    wait_until(lambda: not service.processes(), "the container to go")


def outside(container: Container, inside: set[int]) -> set[int]:
    """The processes whose IDs inside of the container are these."""
    found = set()
    for process in psutil.Process(container.manager).children(recursive=True):
        with open(f"/proc/{process.pid}/status") as file:
            [ids] = [line.split()[1:] for line in file if line.startswith("NSpid:")]
        if int(ids[-1]) in inside:
            found.add(process.pid)
    return found


def test_it_is_process_1(container: Container, service: Service) -> None:
    assert (service.home / "container.pid").read_text() == "1\n"
    assert [int(match["pid"]) for match in service.records("Manager Process ID: 1$")] == [1]
    assert outside(container, {1}) == set()


def test_it_reaps_every_orphan(container: Container, service: Service) -> None:
    orphans: set[int] = set()
    for number in (1, 20, 5):
        told = {int(pid) for pid in service.ask(str(number)).split()[1:]}
        assert len(told) == number
        found = outside(container, told)
        assert len(found) == number
        orphans |= found
    assert {psutil.Process(orphan).ppid() for orphan in orphans} == {container.manager}
    (service.home / "go").touch()
    wait_until(lambda: not any(map(psutil.pid_exists, orphans)), "the orphans to be reaped")
    container.assert_no_zombies()
    assert not service.records(".*Died")  # they were none of its own


def test_it_reaps_the_workers_of_a_generation_that_dies(container: Container, service: Service) -> None:
    service.expected.append(r"Generation Died\. \(SIGKILL\)")
    generation, workers = container.generation(), container.workers()
    os.kill(generation, signal.SIGKILL)
    wait_until(lambda: not any(map(psutil.pid_exists, {generation, *workers})), "generation and workers to be reaped")
    wait_until(lambda: len(container.workers()) == 2, "a new generation's workers")
    assert service.ask("0").endswith(" \n")
    container.assert_no_zombies()


def test_it_reloads(container: Container, service: Service) -> None:
    for _ in range(3):
        generation, workers = container.generation(), container.workers()
        os.kill(container.manager, signal.SIGHUP)
        wait_until(lambda: not alive(generation) and not any(map(alive, workers)), "the old to go")  # noqa: B023
        wait_until(lambda: len(container.workers()) == 2, "new workers")
        assert service.ask("0").endswith(" \n")
    container.assert_no_zombies()


@pytest.mark.parametrize("by", ["its container's manager", "a process inside"])
def test_it_stops_when_told_to_within_moments_whatever_still_runs_there(
        container: Container, service: Service, by: str) -> None:
    assert len(service.ask("3").split()) == 4  # orphans that go on
    began = time.monotonic()
    if by == "a process inside":
        service.ask("stop")
    else:
        os.kill(container.manager, signal.SIGTERM)
    assert container.wait() == 0
    assert time.monotonic() - began < 10  # the grace is 30 s, and the orphans' time a minute
    assert service.records()[-1]["message"] == "Server Terminated."
    assert not (service.home / "container.pid").exists()


def test_it_stops_when_told_to_while_its_handler_is_being_imported(service: Service) -> None:
    (service.home / "word").touch()
    (service.home / "hold").touch()
    arguments = service.use_handler("slow_import")
    command = [*UNSHARE, sys.executable, DAEMON, "-f", "-p", service.port, "--pid-file", service.home / "container.pid",
               "--log-file", service.log_file, *arguments]
    with subprocess.Popen(list(map(str, command)), cwd=service.home, env=service.env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as unshare:
        try:
            wait_until((service.home / "imports").exists, "the import")
            [manager] = service.children(unshare.pid)
            began = time.monotonic()
            os.kill(manager, signal.SIGTERM)
            unshare.communicate(timeout=DEADLINE)
            assert time.monotonic() - began < 10  # the import takes a minute
        finally:
            unshare.kill()
    assert not service.processes()
    assert not (service.home / "container.pid").exists()


# ---- Under a process 1 that is no init ------------------------------------------------------

REAPS_NOBODY = """
import os, subprocess, sys, time
daemontest, done = sys.argv[1:-1], sys.argv[-1]
subprocess.run(daemontest, check=True)
for _ in range(6000):
    if os.path.exists(done):
        break
    time.sleep(0.01)
"""


def test_a_process_1_that_reaps_nobody_hinders_neither_reload_nor_stop(service: Service) -> None:
    service.expected.append(r"Generation Died\. \(SIGKILL\)")
    done, pid_file = service.home / "done", service.home / "container.pid"
    command = [*UNSHARE, sys.executable, "-c", REAPS_NOBODY, sys.executable, DAEMON, "-p", service.port, "-w", "2",
               "--pid-file", pid_file, "--log-file", service.log_file, done]
    service.configure("grace = 1.2")
    with subprocess.Popen(list(map(str, command)), cwd=service.home, env=service.env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as unshare:
        try:
            assert unshare.stdout and b" started, 2 workers " in unshare.stdout.readline()
            manager = named(service, "daemontest-mngr")
            [generation] = service.generations(manager)
            os.kill(generation, signal.SIGKILL)
            wait_until(lambda: service.generations(manager) - {generation} and len(service.workers(manager)) == 2,
                       "a new generation")
            time.sleep(1.5)  # beyond the grace of the dead one's workers
            old = service.workers(manager)
            service.configure("grace = 30")
            os.kill(manager, signal.SIGHUP)
            wait_until(lambda: len(service.workers(manager)) == 2 and not old & service.workers(manager), "a reload")
            assert service.ask("x").endswith(" your text size: 1\n")
            began = time.monotonic()
            os.kill(manager, signal.SIGTERM)
            wait_until(lambda: not alive(manager), "the stop")
            assert time.monotonic() - began < 10  # which is less than the grace
        finally:
            done.touch()
            unshare.communicate(timeout=DEADLINE)
    assert not service.records("Child Process Died")
    assert not pid_file.exists()


def named(service: Service, name: str) -> int:
    """The service's only process with NAME."""
    found = []
    for pid in service.processes():
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).name() == name:
                found.append(pid)
    [only] = found
    return only
