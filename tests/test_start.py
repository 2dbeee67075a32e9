"""A start tells the truth: it returns when the service answers, or says why not and leaves nothing behind."""

import os
import re
import signal
import socket
import stat
from pathlib import Path

import pytest
from conftest import Service, free_port, read_all, wait_until


def assert_refused(service: Service, *arguments: str | Path, why: str) -> None:
    """A start with ARGUMENTS says in one line WHY not, and leaves neither process nor PID file."""
    done = service.run("-p", str(service.port), *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr), done.stderr
    assert re.search(why, done.stderr), done.stderr
    assert not service.processes()
    assert not service.pid_file.exists()


def test_start_says_who_serves_and_returns_when_all_workers_are_there(service: Service) -> None:
    done = service.run("-p", str(service.port), "-w", "3")
    manager = service.manager()
    assert len(service.workers(manager)) == 3
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"daemontest.py: {manager} started, 3 workers on port {service.port}\n"
    assert service.pid_file.read_text() == f"{manager}\n"


def test_second_start_is_refused_and_changes_nothing(service: Service) -> None:
    manager = service.start("-w", "2")
    workers, log = service.workers(), service.log
    second = service.run("-p", str(free_port()))
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == f"daemontest.py: cannot start: already running (PID file {service.pid_file})\n"
    assert service.manager() == manager
    assert service.workers() == workers
    assert service.processes() == {manager, *service.generations(), *workers}
    assert service.log == log


def test_a_busy_port_is_refused_until_it_is_free(service: Service) -> None:
    with socket.create_server(("127.0.0.1", service.port)):
        assert_refused(service, why=f"port {service.port}: Address already in use")
    service.start()


@pytest.mark.parametrize(("name", "why"), [(".", "directory"), ("missing/file", "No such file or directory"),
                                           ("plain/file", "Not a directory")])
def test_an_unusable_log_file_is_refused(service: Service, name: str, why: str) -> None:
    (service.home / "plain").touch()
    assert_refused(service, "--log-file", name, why=f"{re.escape(str(service.home))}.*: .*{why}")
    assert sorted(file.name for file in service.home.iterdir()) in (["plain"], ["daemontest.log", "plain"])


def test_a_device_as_pid_file_is_refused_and_not_removed(service: Service) -> None:
    null = service.home / "null"  # so that a fault would not remove the machine's own
    try:
        os.mknod(null, stat.S_IFCHR | 0o600, os.stat("/dev/null").st_rdev)
    except PermissionError:
        pytest.skip("a device can be made only by root")
    assert_refused(service, "--pid-file", null, why=f"{null}: not a regular file")
    assert null.is_char_device()


@pytest.mark.parametrize("address", [
    "192.0.2.1",  # nobody's (RFC 5737)
    "::1%nosuch", "a..b",  # names that fail without a question to the network
])
def test_an_address_that_is_not_ours_is_refused(service: Service, address: str) -> None:
    assert_refused(service, "-b", address, why=rf"cannot listen on {re.escape(address)} port {service.port}: '?\w")


def assert_cannot_say_so(service: Service, stdout: int, why: str) -> None:
    """A start that succeeds, but cannot write that to STDOUT, says WHY and leaves nothing behind."""
    start = service.popen("-p", str(service.port), stdout=stdout)
    _, errors = start.communicate(timeout=50)
    assert start.returncode == 1
    assert errors == f"daemontest.py: cannot write to standard output: {why}\n"
    assert not service.processes()
    assert not service.pid_file.exists()


def test_a_start_that_cannot_say_that_it_succeeded_leaves_nothing_behind(service: Service) -> None:
    with open("/dev/full", "w") as full:
        assert_cannot_say_so(service, full.fileno(), "No space left on device")


def test_nor_does_one_whose_output_is_open_for_reading_alone(service: Service) -> None:
    reading, writing = os.pipe()
    assert_cannot_say_so(service, reading, "Bad file descriptor")
    os.close(reading)
    os.close(writing)


def test_a_start_whose_manager_is_killed_says_so_and_leaves_no_pid_file(service: Service) -> None:
    service.write_handler("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef handle(text): return text\n")
    done = service.run("-p", str(service.port), "--handler", "service:handle")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "daemontest.py: cannot start: the manager died\n")
    assert not service.pid_file.exists()
    wait_until(lambda: not service.processes(), "the generation to notice")


def test_a_start_whose_module_kills_its_process_says_so(service: Service) -> None:
    service.expected.append("Manager Failed: cannot load handler")
    service.write_handler("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert_refused(service, "--handler", "service:handle",
                   why=r"cannot load handler service:handle: the process died \(SIGKILL\)")


def test_a_start_given_up_with_ctrl_c_leaves_nothing_even_if_the_handler_hangs_in_its_import(service: Service) -> None:
    service.write_handler("import time\nprint('importing')\ntime.sleep(600)\n")
    start = service.popen("-p", str(service.port), "--handler", "service:handle")
    wait_until(lambda: "\nimporting\n" in service.log, "the import")
    start.send_signal(signal.SIGINT)
    assert start.communicate(timeout=50) == ("", "daemontest.py: interrupted\n")
    assert start.returncode == 1
    assert not service.processes()
    assert not service.pid_file.exists()


@pytest.mark.parametrize("given_up", [False, True], ids=["that fails", "that fails and is given up"])
def test_a_start_never_stops_the_service_that_somebody_else_starts_meanwhile(service: Service, given_up: bool) -> None:
    service.expected += ["Manager Failed", "Handler Not Loaded", "^    "]
    start = service.popen("-p", str(free_port()), *service.use_handler("fails_when_told"))
    wait_until(lambda: "\nimporting\n" in service.log, "the import")
    start.send_signal(signal.SIGSTOP)  # so that it learns of all this only afterwards
    (service.home / "go").touch()
    service.wait_for_records("Server Terminated")
    manager = wait_until(lambda: service.run("-p", str(service.port)).returncode == 0 and service.manager(), "a start")
    if given_up:
        start.send_signal(signal.SIGINT)
    start.send_signal(signal.SIGCONT)
    told = "interrupted" if given_up else "cannot load handler fails_when_told:handle: RuntimeError: no good"
    assert start.communicate(timeout=50) == ("", f"daemontest.py: {told}\n")
    assert start.returncode == 1
    assert service.run("--status").stdout == f"{manager}\n"
    assert len(service.records("Server Terminated")) == 1


def answers(service: Service, host: str) -> bool:
    try:
        return service.ask("x", host).endswith(" your text size: 1\n")
    except ConnectionRefusedError:
        return False


@pytest.mark.parametrize(("bind", "answering"), [
    ((), ["127.0.0.1", "127.0.0.2", "::1"]),
    (("-b", "127.0.0.1"), ["127.0.0.1"]),
    (("--bind", "::1"), ["::1"]),
])
def test_it_listens_where_it_is_told_and_nowhere_else(service: Service, bind: tuple[str, ...],
                                                      answering: list[str]) -> None:
    service.start(*bind)
    assert [host for host in ("127.0.0.1", "127.0.0.2", "::1") if answers(service, host)] == answering


def test_start_after_stop_finds_the_port_free_at_once_and_adds_to_the_log(service: Service) -> None:
    service.start()
    with service.connect() as client:
        client.sendall(b"x\n")  # keeps its side open, so the server closes first, and TCP remembers that on its port
        assert read_all(client)
    service.stop()
    service.start()
    assert len(service.records("Daemon Server Started.")) == 2
