"""README's units hold under a real systemd what it says of them, on a machine of their own.

Skipped where nobody may make one: without root, systemd, unshare, or a cgroup2 to rule; one test without logrotate.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Service
from machine import LoadInside, Machine, booted
from readme import block, program

CONFIGURATION = "/etc/daemontest/daemontest.toml"
SERVES = " your text size: 1\n"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with booted() as machine:
        machine.write("/etc/systemd/system/daemontest.service", block(r"\[Service\]"))
        machine.write("/etc/systemd/system/daemontest.socket", block(r"\[Socket\]"))
        machine.do("systemctl daemon-reload")
        yield machine


@pytest.fixture
def unit(machine: Machine) -> Iterator[Machine]:
    """The machine with the service not started, its configuration empty."""
    machine.write(CONFIGURATION, "")
    machine.began = time.time()
    yield machine
    machine.do("systemctl -q disable --now daemontest.socket daemontest; systemctl stop daemontest; "
               "systemctl reset-failed")
    assert machine.run("pgrep -u daemontest").stdout == ""


@pytest.fixture
def clients(tmp_path: Path) -> Service:
    """No daemon of its own, but the clients of the one at README's port."""
    clients = Service(tmp_path)
    clients.port = 36000
    return clients


def use_handler(machine: Machine, source: str, *settings: str) -> None:
    machine.write("/etc/daemontest/service.py", source)
    machine.write(CONFIGURATION, "\n".join(['handler = "service:handle"', *settings]))


def status(machine: Machine) -> str:
    return machine.show("daemontest", "StatusText")


def journal(machine: Machine) -> str:
    """What the service has said since the test began: in the journal, or in its own log."""
    logs = machine.run("cat /var/log/daemontest/*").stdout
    return logs + machine.do(f"journalctl --sync; journalctl -o cat -u daemontest --since @{machine.began:.6f}")


def start(machine: Machine) -> int:
    """Start the service; the manager's PID, as the machine sees it."""
    machine.do("rm -f /var/log/daemontest/*; systemctl start daemontest")
    return int(machine.show("daemontest", "MainPID"))


def test_it_starts_and_stops_as_shown_and_says_what_it_does(unit: Machine, clients: Service) -> None:
    for command in block("systemctl enable --now daemontest").strip().split("\n"):
        unit.do(command)
    assert unit.inside(clients.ask, "x").endswith(SERVES)
    assert unit.do("systemctl is-enabled daemontest") == "enabled\n"
    version = unit.do("/opt/daemontest/bin/daemontest.py --version").split()[1]
    assert all(words in status(unit) for words in ("5 workers", "generation 1", version))
    assert sorted(unit.do("ps -o comm= -u daemontest").split()) == [
        "daemontest-gen", "daemontest-keep", "daemontest-mngr", *["daemontest-work"] * 5]
    manager = unit.show("daemontest", "MainPID")
    assert unit.do("/opt/daemontest/bin/daemontest.py --status --pid-file /run/daemontest/pid") == f"{manager}\n"
    unit.do("systemctl stop daemontest")
    assert unit.show("daemontest", "Result") == "success"
    assert re.search(" Server Terminated.", journal(unit))
    assert not re.search("Died|Killed", journal(unit))
    # The grace, 30 s by default, is over before systemd loses patience.
    assert float(unit.show("daemontest", "TimeoutStopUSec").removesuffix("s")) >= 40


def test_killed_manager_is_started_anew(unit: Machine, clients: Service) -> None:
    manager = start(unit)
    unit.do(f"kill -KILL {manager}")
    unit.wait_until(lambda: unit.show("daemontest", "NRestarts") == "1"
                    and unit.show("daemontest", "ActiveState") == "active", "the restart")
    assert unit.inside(clients.ask, "x").endswith(SERVES)


def test_reload_returns_when_only_the_new_code_answers(unit: Machine, clients: Service) -> None:
    use_handler(unit, "def handle(text):\n    return 'first'\n")
    manager = start(unit)
    for word in ("second", "third"):
        use_handler(unit, f"def handle(text):\n    return '{word}'\n")
        unit.do("systemctl reload daemontest")
        assert {unit.inside(clients.ask, "x").split()[1] for _ in range(6)} == {word}
    assert "generation 3" in status(unit)
    unit.do(f"kill -HUP {manager}")
    unit.wait_until(lambda: "generation 4" in status(unit), "the next generation")
    unit.wait_until(lambda: unit.show("daemontest", "SubState") == "running", "systemd to know that the reload is over")
    assert int(unit.show("daemontest", "MainPID")) == manager


@pytest.mark.parametrize(("source", "settings", "why"), [
    ("", "workers = 0", f"bad configuration {CONFIGURATION}: workers: expected a whole number"),
    ("import ctypes\nctypes.string_at(0)\n", "", "cannot load handler service:handle: the process died (SIGSEGV)"),
], ids=["configuration", "module"])
def test_reload_that_changes_nothing_fails_and_says_why(
        unit: Machine, clients: Service, source: str, settings: str, why: str) -> None:
    use_handler(unit, "def handle(text):\n    return 'good'\n")
    start(unit)
    use_handler(unit, source, settings)
    assert unit.run("systemctl reload daemontest").returncode == 1
    assert f"daemontest.py: nothing changed: {why}" in journal(unit)
    assert "generation 1 since" in status(unit)
    assert unit.show("daemontest", "ActiveState") == "active"
    assert unit.inside(clients.ask, "x").endswith(" good\n")


def test_unit_is_hardened(unit: Machine) -> None:
    told = unit.do("systemd-analyze security --no-pager daemontest")
    level = re.search(r"Overall exposure level for daemontest.service: ([\d.]+)", told)
    assert level, told
    assert float(level[1]) <= 1.5  # 1.3 with systemd 252
    verified = unit.run("systemd-analyze verify --man=no daemontest.service daemontest.socket")
    assert (verified.returncode, [line for line in verified.stderr.split("\n") if "daemontest" in line]) == (0, [])


def test_log_file_is_rotated_as_shown(unit: Machine, clients: Service) -> None:
    program("logrotate")
    unit.write(CONFIGURATION, 'log_file = "/var/log/daemontest/log"\n')
    unit.write("/etc/logrotate.d/daemontest", block(r" +postrotate"))
    start(unit)
    for word in ("first", "second", "third"):
        unit.inside(clients.ask, word)
        if word != "third":
            unit.do("logrotate --force /etc/logrotate.d/daemontest")
    unit.do("gunzip -f /var/log/daemontest/*.gz || true")
    logs = [(unit.root / f"var/log/daemontest/{name}").read_text() for name in ("log.2", "log.1", "log")]
    assert [re.findall(r"    (first|second|third)\n", log) for log in logs] == [["first"], ["second"], ["third"]]
    assert unit.do("stat -c '%U %a' /var/log/daemontest/log") == "daemontest 640\n"


def use_socket(machine: Machine) -> None:
    """What README says to do while the service runs."""
    for command in block("systemctl enable --now daemontest.socket").strip().split("\n"):
        machine.do(command)


def test_restart_with_the_socket_loses_no_request(unit: Machine, clients: Service) -> None:
    start(unit)
    use_socket(unit)
    assert unit.do("systemctl is-active daemontest.socket daemontest.service") == "active\nactive\n"
    managers = {unit.show("daemontest", "MainPID")}
    with LoadInside(unit, clients, clients=4) as load:
        for _ in range(3):
            load.wait_for(20)
            unit.do("systemctl restart daemontest")
            managers.add(unit.show("daemontest", "MainPID"))
        load.wait_for(20)
    assert load.failures == []
    assert len(managers) == 4
