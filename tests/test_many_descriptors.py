"""A parent that has more than 1024 descriptors open, and leaves them to every command, changes nothing."""

import os
import resource
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENT, DEADLINE, POEM, Service

MANY = 1100  # more than select(2) can take


def open_many() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * MANY, 2 * MANY))
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor in range(null + 1, MANY):
        os.dup2(null, descriptor)  # inheritable


CROWDED: dict[str, Any] = {"preexec_fn": open_many, "close_fds": False}
pytestmark = pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * MANY,
                                reason="this user may not have so many descriptors")


def test_every_action_works(service: Service) -> None:
    assert service.run("--check", **CROWDED).stdout == "daemontest.py: configuration is good\n"
    manager = service.start("-w", "2", **CROWDED)
    workers = service.workers()
    assert service.run("--status", **CROWDED).stdout == f"{manager}\n"
    reloaded = service.run("--reload", **CROWDED)
    assert (reloaded.returncode, reloaded.stdout, reloaded.stderr) == (0, f"daemontest.py: {manager} reloaded\n", "")
    service.wait_for_new_workers(workers)
    assert service.ask("x").endswith(" your text size: 1\n")
    stopped = service.run("-t", **CROWDED)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (
        0, f"daemontest.py {manager} Server terminated.\n", "")
    assert not service.processes()


def test_a_start_that_fails_says_so(service: Service) -> None:
    done = service.run("-p", str(service.port), "--handler", "missing:handle", **CROWDED)
    service.expected += ["Manager Failed", "Traceback", "^    ", "ModuleNotFoundError"]
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("daemontest.py: cannot load handler missing:handle: "
                           "ModuleNotFoundError: No module named 'missing'\n")
    assert not service.processes()


def test_the_service_keeps_none_of_them(service: Service) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("looks at processes through Linux's /proc")
    service.start("-w", "2", **CROWDED)
    for pid in service.processes():
        assert len(os.listdir(f"/proc/{pid}/fd")) < 20


def test_it_serves_in_the_foreground(service: Service) -> None:
    daemon = service.foreground("-w", "2", "--log-file", service.log_file, **CROWDED)
    service.wait_for_records("Child Process Started.", 2)
    assert service.ask("x").endswith(" your text size: 1\n")
    workers = service.workers()
    assert service.run("--reload", **CROWDED).returncode == 0
    service.wait_for_new_workers(workers)
    assert service.run("-t", **CROWDED).returncode == 0
    assert daemon.wait(DEADLINE) == 0
    assert daemon.communicate() == ("", "")


def test_the_client_is_answered(service: Service) -> None:
    service.start("-w", "1")
    size = len(POEM.read_text("utf-8")) + 1
    with POEM.open("rb") as text:
        done = service.run("-s", "127.0.0.1", "-p", str(service.port), script=CLIENT, stdin=text, **CROWDED)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f" your text size: {size}\n")
