"""Under the supervisors of the README other than systemd: the real programs, with its lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import DAEMON, Service, alive, wait_until
from readme import adapted, block, program
from systemd_machine import Machine, booted


@pytest.fixture
def service(service: Service) -> Service:
    """Its port in the configuration, and its PID file where the lines below name it."""
    service.configure(f"port = {service.port}\nworkers = 2\n")
    service.pid_file = service.home / "pid"
    return service


def adapt(service: Service, text: str, **changes: str) -> str:
    """The README's TEXT with the test's own paths and user."""
    return adapted(text, {"/opt/daemontest/bin/daemontest.py": f"{sys.executable} {DAEMON}",
                          "/etc/daemontest": str(service.home), "/var/lib/daemontest": str(service.home), **changes})


def reload_within(service: Service) -> None:
    workers = service.workers()
    done = service.run("--reload", "--pid-file", service.pid_file)
    assert (done.returncode, done.stderr) == (0, "")
    wait_until(lambda: not service.workers() & workers, "the old workers, which accept no more, to end")


# ---- supervisord ------------------------------------------------------------------------

CONTROL = """
[supervisord]
nodaemon = true
logfile = {home}/supervisord.log
pidfile = {home}/supervisord.pid
childlogdir = {home}

[unix_http_server]
file = {home}/control

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl = unix://{home}/control

"""


class Supervisord:
    def __init__(self, service: Service) -> None:
        self.service = service
        self.configuration = service.home / "supervisord.conf"
        lines = adapt(service, block("[program:daemontest]"), **{"user=daemontest": f"user={service.home.owner()}"})
        # Elsewhere a log of its own is what supervisord gives every program.
        self.configuration.write_text(f"{CONTROL.format(home=service.home)}{lines}stderr_logfile={service.log_file}\n")
        self.control = program("supervisorctl")
        self.running = subprocess.Popen([program("supervisord"), "-c", self.configuration], cwd=service.home,
                                        env=service.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.STDOUT)

    def do(self, *command: str) -> str:
        return subprocess.run([self.control, "-c", self.configuration, *command], env=self.service.env,
                              cwd=self.service.home, capture_output=True, text=True, timeout=50).stdout


@pytest.fixture
def supervisord(service: Service) -> Iterator[Supervisord]:
    supervisord = Supervisord(service)
    yield supervisord
    supervisord.running.terminate()
    supervisord.running.wait(50)
    assert not service.pid_file.exists()


def test_supervisord_starts_it_reloads_it_and_stops_it(service: Service, supervisord: Supervisord) -> None:
    service.wait_for_records("Child Process Started.", 2)
    wait_until(lambda: re.match(r"daemontest +RUNNING ", supervisord.do("status")), "supervisord to be content")
    manager = service.manager()
    reload_within(service)
    assert supervisord.do("signal", "HUP", "daemontest") == "daemontest: signalled\n"
    service.wait_for_records("Caught SIGHUP", 2)
    assert service.ask("x").endswith(" your text size: 1\n")
    assert service.manager() == manager
    assert supervisord.do("stop", "daemontest") == "daemontest: stopped\n"
    assert not alive(manager)
    service.wait_for_records("Server Terminated.")  # which supervisord writes
    assert not service.records(".*Died")


def test_supervisord_waits_longer_than_the_grace() -> None:
    seconds = re.search(r"^stopwaitsecs=(\d+)$", block("[program:daemontest]"), re.MULTILINE)
    assert seconds
    assert int(seconds[1]) > 30


# ---- runit ------------------------------------------------------------------------------


class Runit:
    def __init__(self, service: Service) -> None:
        self.service = service
        self.control, run = program("sv"), service.home / "sv" / "run"
        script = block("#!/bin/sh", "exec 2>&1")
        run.parent.mkdir()
        run.write_text(adapt(service, script, **{"-u daemontest": f"-u {service.home.owner()}"}))
        run.chmod(0o755)
        program("chpst")
        with service.log_file.open("w") as log:
            self.running = subprocess.Popen([program("runsv"), run.parent], cwd="/", env=service.env,
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def do(self, *command: str) -> tuple[int, str]:
        done = subprocess.run([self.control, *command, self.service.home / "sv"], env=self.service.env, cwd="/",
                              capture_output=True, text=True, timeout=50)
        return done.returncode, done.stdout


@pytest.fixture
def runit(service: Service) -> Iterator[Runit]:
    runit = Runit(service)
    yield runit
    runit.running.terminate()  # which stops the service first
    runit.running.wait(50)
    assert not service.pid_file.exists()


def test_runit_starts_it_reloads_it_and_stops_it_as_shown(service: Service, runit: Runit) -> None:
    service.wait_for_records("Child Process Started.", 2)
    wait_until(service.pid_file.exists, "the PID file")
    manager = service.manager()
    reload_within(service)
    assert runit.do("hup")[0] == 0
    service.wait_for_records("Caught SIGHUP", 2)
    assert service.ask("x").endswith(" your text size: 1\n")
    assert service.manager() == manager
    status, told = runit.do("-w", "45", "stop")  # as the README has it
    assert (status, told[:9]) == (0, "ok: down:")
    assert not alive(manager)
    assert service.records("Server Terminated.")
    assert not service.records(".*Died")


def test_runit_starts_it_anew_when_it_was_killed(service: Service, runit: Runit) -> None:
    service.wait_for_records("Child Process Started.", 2)
    wait_until(service.pid_file.exists, "the PID file")
    manager = service.manager()
    service.expected.append("cannot listen")  # as long as the killed manager's workers have not left
    os.kill(manager, 9)
    service.wait_for_records("Daemon Server Started.", 2)
    wait_until(lambda: service.pid_file.read_text() not in ("", f"{manager}\n"), "the new manager")
    assert service.ask("x").endswith(" your text size: 1\n")


# ---- Both, as the README's user ------------------------------------------------------------


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Where the real paths and the real user are."""
    program("supervisord")
    program("runsv")
    with booted() as machine:
        for command in block("mkdir /etc/daemontest && touch /etc/daemontest/daemontest.toml").strip().split("\n"):
            if "pip install" not in command:
                machine.do(command)
        machine.do(block("install -d -o daemontest /var/lib/daemontest"))
        yield machine


def runs_as_its_user(machine: Machine) -> None:
    machine.wait_until(lambda: machine.run("pgrep -c -u daemontest").stdout == "7\n", "manager, generation, 5 workers")
    told = machine.do("/opt/daemontest/bin/daemontest.py --reload --pid-file /var/lib/daemontest/pid")  # as root
    assert told.endswith(" reloaded\n")


def is_gone(machine: Machine) -> None:
    assert machine.run("pgrep -u daemontest").stdout == ""
    assert machine.do("ls /var/lib/daemontest") == ""


def test_supervisord_runs_it_as_its_user(machine: Machine) -> None:
    machine.write("/etc/supervisor/conf.d/daemontest.conf", block("[program:daemontest]"))
    machine.do("supervisord -c /etc/supervisor/supervisord.conf")
    runs_as_its_user(machine)
    machine.do("supervisorctl stop daemontest")
    is_gone(machine)
    machine.do("supervisorctl shutdown")


def test_runit_runs_it_as_its_user(machine: Machine) -> None:
    machine.do("mkdir -p /etc/sv/daemontest")
    machine.write("/etc/sv/daemontest/run", block("#!/bin/sh", "exec 2>&1"), 0o755)
    machine.do("runsv /etc/sv/daemontest > /dev/null 2>&1 &")
    runs_as_its_user(machine)
    machine.do("sv -w 45 stop /etc/sv/daemontest")
    is_gone(machine)
    machine.do("sv exit /etc/sv/daemontest")
