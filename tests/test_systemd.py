"""The README's units under a real systemd, on a machine of their own."""

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DATA, Service
from readme import block, program
from systemd_machine import LoadInside, Machine, booted

CONFIGURATION = "/etc/daemontest/daemontest.toml"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Set up by the README's commands, but for pip's, which needs a network."""
    with booted() as machine:
        for command in block("mkdir /etc/daemontest && touch /etc/daemontest/daemontest.toml").strip().split("\n"):
            if "pip install" not in command:
                machine.do(command)
        machine.write("/etc/systemd/system/daemontest.service", block("[Service]"))
        machine.write("/etc/systemd/system/daemontest.socket", block("[Socket]"))
        machine.do("systemctl daemon-reload")
        yield machine


@pytest.fixture
def unit(machine: Machine) -> Iterator[Machine]:
    """The machine with the service enabled and not started, its configuration empty."""
    machine.write(CONFIGURATION, "")
    machine.do("systemctl -q enable daemontest")
    yield machine
    machine.do("systemctl -q disable --now daemontest.socket && systemctl stop daemontest && systemctl reset-failed")
    assert machine.run("pgrep -u daemontest").stdout == ""


@pytest.fixture
def clients(tmp_path: Path) -> Service:
    """No daemon of its own, but the clients of the one at the README's port."""
    clients = Service(tmp_path)
    clients.port = 36000
    return clients


def use_handler(machine: Machine, name: str, *settings: str) -> None:
    """Configure the handler tests/data/NAME.py."""
    machine.write(f"/etc/daemontest/{name}.py", (DATA / f"{name}.py").read_text())
    machine.write(CONFIGURATION, "\n".join([f'handler = "{name}:handle"', *settings]))


def status(machine: Machine) -> str:
    return machine.show("daemontest", "StatusText")


def journal(machine: Machine, since: float) -> str:
    return machine.do(f"journalctl --sync; journalctl -o cat -u daemontest --since @{since:.6f}")


def start(machine: Machine) -> int:
    """Start the service; the manager's PID, as the machine sees it."""
    machine.do("systemctl start daemontest")
    return int(machine.show("daemontest", "MainPID"))


# ---- Start and stop ---------------------------------------------------------------------


def test_it_is_enabled_and_started_as_shown_and_says_what_it_is_doing(unit: Machine, clients: Service) -> None:
    unit.do("systemctl -q disable daemontest")
    for command in block("systemctl enable --now daemontest").strip().split("\n"):
        unit.do(command)
    assert unit.inside(clients.ask, "あ\n").endswith(" your text size: 2\n")
    assert unit.do("systemctl is-enabled daemontest") == "enabled\n"
    shown = unit.do("systemctl status daemontest")
    assert "Active: active (running)" in shown
    assert re.search(r'Status: "5 workers, generation 1 since \d\d:\d\d:\d\d"', shown)
    manager = unit.show("daemontest", "MainPID")
    commands = unit.do("ps -o user=,comm= -u daemontest").split("\n")
    assert sorted(commands) == ["", *["daemont+ daemontest-gen"], "daemont+ daemontest-mngr",
                                *["daemont+ daemontest-work"] * 5]
    assert unit.do("/opt/daemontest/bin/daemontest.py --status --pid-file /run/daemontest/pid") == f"{manager}\n"


def test_a_stop_is_graceful_and_counts_as_success(unit: Machine, clients: Service) -> None:
    before = time.time()
    start(unit)
    unit.inside(clients.ask, "x")
    unit.do("systemctl stop daemontest")
    assert unit.show("daemontest", "Result") == "success"
    assert unit.show("daemontest", "ActiveState") == "inactive"
    told = journal(unit, before)
    assert len(re.findall(r" Child Process Ended\. ", told)) == 5
    assert " Server Terminated." in told
    assert "Died" not in told


def test_a_start_that_fails_says_why(unit: Machine) -> None:
    unit.write(CONFIGURATION, "workers = 0\n")
    before = time.time()
    assert unit.run("systemctl start daemontest").returncode == 1
    assert f"daemontest.py: bad configuration {CONFIGURATION}: workers: expected" in journal(unit, before)


def test_it_waits_for_a_port_that_is_taken(unit: Machine, clients: Service) -> None:
    with unit.inside(socket.create_server, ("127.0.0.1", clients.port)):
        assert unit.run("systemctl start daemontest").returncode == 1
        unit.wait_until(lambda: unit.show("daemontest", "SubState") == "auto-restart", "systemd to wait")
    unit.wait_until(lambda: unit.show("daemontest", "ActiveState") == "active", "the next try")
    assert unit.inside(clients.ask, "x").endswith(" your text size: 1\n")
    shown = unit.do("systemctl show -p RestartUSec,StartLimitBurst,StartLimitIntervalUSec daemontest").split()
    times = {name: float(value.removesuffix("s")) for name, value in (line.split("=") for line in shown)}
    # Never too many starts, however long the port is taken.
    assert times["RestartUSec"] * times["StartLimitBurst"] >= times["StartLimitIntervalUSec"]


# ---- Reload -----------------------------------------------------------------------------


def test_a_reload_returns_when_only_the_new_code_answers(unit: Machine, clients: Service) -> None:
    unit.write("/etc/daemontest/word", "first")
    use_handler(unit, "one_word")
    manager = start(unit)
    for word in ("second", "third"):
        unit.write("/etc/daemontest/word", word)
        unit.do("systemctl reload daemontest")
        assert {unit.inside(clients.ask, "x").split()[1] for _ in range(6)} == {word}
    assert re.fullmatch(r"5 workers, generation 3 since \d\d:\d\d:\d\d", status(unit))
    assert int(unit.show("daemontest", "MainPID")) == manager


def test_a_reload_that_changes_nothing_fails_and_the_status_says_why(unit: Machine, clients: Service) -> None:
    start(unit)
    before = time.time()
    unit.write(CONFIGURATION, "workers = 0\n")
    assert unit.run("systemctl reload daemontest").returncode == 1
    why = f"bad configuration {CONFIGURATION}: workers: expected a whole number from 1 to 10000"
    assert f"daemontest.py: nothing changed: {why}\n" in journal(unit, before)
    unit.wait_until(lambda: status(unit).endswith(f" failed: {why}"), "the status")
    assert unit.show("daemontest", "ActiveState") == "active"
    assert unit.inside(clients.ask, "x").endswith(" your text size: 1\n")

    unit.write(CONFIGURATION, "workers = 2\n")
    unit.do("systemctl reload daemontest")
    assert re.fullmatch(r"2 workers, generation 2 since \d\d:\d\d:\d\d", status(unit))


def test_a_module_that_crashes_at_a_reload_changes_nothing(unit: Machine, clients: Service) -> None:
    unit.write("/etc/daemontest/word", "good")
    use_handler(unit, "one_word")
    start(unit)
    before = time.time()
    unit.write("/etc/daemontest/one_word.py", "import ctypes\nctypes.string_at(0)\n")
    assert unit.run("systemctl reload daemontest").returncode == 1
    why = "cannot load handler one_word:handle: the process died (SIGSEGV)"
    assert f"daemontest.py: nothing changed: {why}\n" in journal(unit, before)
    unit.wait_until(lambda: status(unit).endswith(f"; generation 2 failed: {why}"), "the status")
    assert unit.inside(clients.ask, "x").endswith(" good\n")


def test_the_hup_of_kill_reloads_too(unit: Machine) -> None:
    manager = start(unit)
    unit.do(f"kill -HUP {manager}")
    unit.wait_until(lambda: "generation 2 since" in status(unit), "the next generation")
    unit.wait_until(lambda: unit.show("daemontest", "SubState") == "running", "systemd to know that the reload is over")


# ---- What goes wrong --------------------------------------------------------------------


def test_a_killed_manager_is_started_anew_after_2_s(unit: Machine, clients: Service) -> None:
    manager = start(unit)
    unit.do(f"kill -KILL {manager}")
    unit.wait_until(lambda: unit.show("daemontest", "NRestarts") == "1", "the restart")
    unit.wait_until(lambda: unit.show("daemontest", "ActiveState") == "active", "the service")
    assert int(unit.show("daemontest", "MainPID")) != manager
    assert unit.inside(clients.ask, "x").endswith(" your text size: 1\n")


def test_a_hung_handler_keeps_nobody_waiting_and_a_stop_no_longer_than_the_grace(
        unit: Machine, clients: Service) -> None:
    use_handler(unit, "does_as_told", "handler_timeout = 0.5", "grace = 0.5")
    before = time.time()
    start(unit)
    with unit.inside(clients.connect) as hung:
        hung.sendall(b"sleep 60\n")
        unit.wait_until(lambda: "    sleep 60" in journal(unit, before), "the handler to hang")
        assert unit.inside(clients.ask, "あ").endswith(" your text size: 1\n")
        unit.wait_until(lambda: "Died. (SIGKILL: handler ran longer than 0.5 s)" in journal(unit, before), "its end")

    unit.write(CONFIGURATION, 'handler = "does_as_told:handle"\ngrace = 0.5\n')
    unit.do("systemctl reload daemontest")
    before = time.time()
    with unit.inside(clients.connect) as hung:
        hung.sendall(b"sleep 60\n")
        unit.wait_until(lambda: "    sleep 60" in journal(unit, before), "the handler to hang")
        unit.do("systemctl stop daemontest")
    assert unit.show("daemontest", "Result") == "success"
    assert "Died. (SIGKILL: not done within the grace)" in journal(unit, before)


def test_the_grace_is_over_before_systemd_loses_patience(unit: Machine) -> None:
    pause = unit.show("daemontest", "TimeoutStopUSec").removesuffix("s")
    assert float(pause) > 30 + 10  # the default grace, and what its end may take


# ---- Hardening --------------------------------------------------------------------------


def test_the_unit_is_hardened_as_far_as_its_section_says(unit: Machine) -> None:
    told = unit.do("systemd-analyze security --no-pager daemontest")
    level = re.search(r"Overall exposure level for daemontest.service: ([\d.]+)", told)
    assert level, told
    assert float(level[1]) <= 1.5  # 1.3 with systemd 252
    verified = unit.run("systemd-analyze verify --man=no daemontest.service daemontest.socket")
    assert (verified.returncode, [line for line in verified.stderr.split("\n") if "daemontest" in line]) == (0, [])


def test_the_log_file_may_be_where_the_section_says(unit: Machine, clients: Service) -> None:
    unit.write(CONFIGURATION, 'log_file = "/var/log/daemontest/log"\n')
    start(unit)
    unit.inside(clients.ask, "x")
    log = (unit.root / "var/log/daemontest/log").read_text()
    assert "Daemon Server Started." in log
    assert "Received Text:" in log
    assert unit.do("stat -c '%U %a' /var/log/daemontest/log") == "daemontest 640\n"


def test_logrotate_rotates_that_log_as_shown(unit: Machine, clients: Service) -> None:
    program("logrotate")
    unit.write(CONFIGURATION, 'log_file = "/var/log/daemontest/log"\n')
    unit.write("/etc/logrotate.d/daemontest", block("    postrotate"))
    start(unit)
    unit.inside(clients.ask, "before")
    unit.do("logrotate --force /etc/logrotate.d/daemontest")
    unit.inside(clients.ask, "after")
    logs = [(unit.root / f"var/log/daemontest/{name}").read_text() for name in ("log.1", "log")]
    assert [[word for word in ("before", "after") if f"    {word}\n" in log] for log in logs] == [["before"], ["after"]]


# ---- The socket -------------------------------------------------------------------------


def use_socket(machine: Machine) -> None:
    """What the README says to do while the service runs."""
    for command in block("systemctl enable --now daemontest.socket").strip().split("\n"):
        machine.do(command)


def test_the_socket_takes_over_in_the_order_shown(unit: Machine, clients: Service) -> None:
    start(unit)
    assert unit.run("systemctl start daemontest.socket").returncode == 1  # hence the order
    use_socket(unit)
    assert unit.do("systemctl is-active daemontest.socket daemontest.service") == "active\nactive\n"
    assert unit.inside(clients.ask, "x").endswith(" your text size: 1\n")


def test_a_restart_under_load_loses_no_request(unit: Machine, clients: Service) -> None:
    use_socket(unit)
    managers = {unit.show("daemontest", "MainPID")}
    with LoadInside(unit, clients, clients=4) as load:
        for _ in range(3):
            load.wait_for(20)
            unit.do("systemctl restart daemontest")
            managers.add(unit.show("daemontest", "MainPID"))
        load.wait_for(20)
    assert load.failures == []
    assert len(managers) == 4


def test_the_socket_starts_the_service_for_a_client_after_a_stop(unit: Machine, clients: Service) -> None:
    use_socket(unit)
    unit.run("systemctl stop daemontest")
    assert unit.show("daemontest", "ActiveState") == "inactive"
    assert unit.inside(clients.ask, "x").endswith(" your text size: 1\n")
    unit.wait_until(lambda: unit.show("daemontest", "ActiveState") == "active", "systemd to know that it is up")


def test_a_killed_manager_keeps_the_clients_of_the_socket_waiting_and_no_more(unit: Machine, clients: Service) -> None:
    use_socket(unit)
    manager = unit.show("daemontest", "MainPID")
    unit.do(f"kill -KILL {manager}")
    unit.wait_until(lambda: unit.show("daemontest", "MainPID") != manager, "systemd to notice")
    assert unit.inside(clients.ask, "x").endswith(" your text size: 1\n")
    assert unit.show("daemontest", "NRestarts") == "1"
