"""As process 1 of a container it serves, reloads, stops, and reaps whatever has lost its parent there.

In bubblewrap as README's container: as nobody, on a read-only root.  Skipped without bwrap, unshare or nsenter, or the
right to use them (root, or user namespaces).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import DAEMON, DEADLINE, ROOT, Service, wait_until
from readme import block, program

HANDLER = """
import os, signal, subprocess

def handle(text):
    match text.split():
        case ["orphan", seconds]:  # which the shell leaves behind
            return subprocess.check_output(["sh", "-c", f"sleep {seconds} > /dev/null & echo $!"], text=True).strip()
        case ["stop"]:
            os.kill(1, signal.SIGTERM)
    return "VERSION 1"
"""


def skip_unless_works(*jail: str | Path) -> None:
    trial = subprocess.run([*jail, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50)
    if trial.returncode:
        pytest.skip(f"{jail[0]} does not work here: {trial.stderr.strip()}")


class Container:
    """Like `docker run --read-only --tmpfs /tmp` with README's ENTRYPOINT, but for the network, which is shared.

    The service's home can be read in its place.
    """

    def __init__(self, service: Service, *arguments: str) -> None:
        seen = [ROOT, Path(sys.prefix), Path(sys.base_prefix), service.home]  # though they may lie in /tmp
        jail = [program("bwrap"), "--unshare-all", "--share-net", "--as-pid-1", "--die-with-parent", "--uid", "65534",
                "--gid", "65534", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp",
                *(word for path in seen for word in ("--ro-bind", path, path)), "--setenv", "HOME", "/nonexistent"]
        skip_unless_works(*jail)
        entrypoint = re.search(r"^ENTRYPOINT (.*)$", block("USER nobody"), re.MULTILINE)
        assert entrypoint
        command = [*json.loads(entrypoint[1])[1:], "-p", str(service.port), "-c", service.home / "daemontest.toml"]
        self.service = service
        with service.log_file.open("a") as log:
            self.jail = subprocess.Popen([*jail, sys.executable, DAEMON, *command, *arguments], cwd="/",
                                         env=service.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self) -> Container:
        self.service.wait_for_records("Child Process Started.", 2)
        [self.manager] = self.service.children(self.jail.pid)

        def serves() -> list[re.Match[str]]:
            os.kill(self.manager, signal.SIGUSR1)
            return self.service.records("Status: generation .* serving")

        wait_until(serves, "it to serve, since a stop before that gives the start up")
        return self

    def __exit__(self, *_: object) -> None:
        self.jail.kill()  # and so process 1, and so all
        self.jail.wait(DEADLINE)
        wait_until(lambda: not self.service.processes(), "the container's processes to go")

    def workers(self) -> set[int]:
        return self.service.workers(self.manager)

    def zombies(self) -> list[int]:
        found = []
        for process in psutil.Process(self.manager).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def orphans(self) -> set[int]:
        """The manager's children that are none of the daemon's own."""
        found = set()
        for process in psutil.Process(self.manager).children():
            with suppress(psutil.NoSuchProcess):  # it has been reaped meanwhile
                if process.name() == "sleep":
                    found.add(process.pid)
        return found


@pytest.fixture
def container(service: Service) -> Iterator[Container]:
    service.write_handler(HANDLER)
    service.configure('handler = "service:handle"\nworkers = 2\n')
    with Container(service) as container:
        yield container


def test_it_serves_as_process_1(container: Container, service: Service) -> None:
    assert service.ask("x").endswith(" VERSION 1\n")
    assert service.records("Manager Process ID: 1$")
    assert re.search(r"^NSpid:\t\d+\t1$", Path(f"/proc/{container.manager}/status").read_text(), re.MULTILINE)


def test_it_reaps_every_orphan(container: Container, service: Service) -> None:
    for _ in range(10):
        service.ask("orphan 2")
    assert len(container.orphans()) == 10
    wait_until(lambda: not container.orphans() and not container.zombies(), "the orphans to be reaped")
    assert not service.records(".*Died"), "they were none of its own"


def test_it_reloads_by_the_command_shown(container: Container, service: Service) -> None:
    """Like `docker exec`."""
    shown = re.search(r"^docker exec daemontest daemontest\.py (.*)$", block("docker build .*"), re.MULTILINE)
    assert shown
    enter = [program("nsenter"), "-t", str(container.manager), "--user", "--mount", "--pid", "--preserve-credentials"]
    service.write_handler(HANDLER.replace("VERSION 1", "VERSION 2"))
    done = subprocess.run([*enter, sys.executable, DAEMON, *shown[1].split()], cwd="/", env=service.env, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "daemontest.py: 1 reloaded\n", "")
    assert {service.ask("x").split()[2] for _ in range(6)} == {"2"}
    assert not container.zombies()


@pytest.mark.parametrize("by", ["docker", "a process inside"])
def test_it_stops_at_once_whatever_still_runs_there(container: Container, service: Service, by: str) -> None:
    service.ask("orphan 60")
    began = time.monotonic()
    if by == "docker":
        os.kill(container.manager, signal.SIGTERM)
    else:
        service.ask("stop")
    assert container.jail.wait(DEADLINE) == 0
    assert time.monotonic() - began < 10  # the grace is 30 s
    assert service.records()[-1]["message"] == "Server Terminated."
