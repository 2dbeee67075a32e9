"""The configuration: every setting by file and by option, and every mistake refused in one line that helps."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Service, free_port, read_all, serving, wait_until

HANG = """
import pathlib, time

def handle(text):
    if text == "hang":
        pathlib.Path(__file__).with_name("in-hand").touch()
        time.sleep(20)
    return "configured"
"""


def setting_names(service: Service) -> set[str]:
    """The keys that the program itself says it has."""
    (service.home / "unknown.toml").write_text("no_such_key = 1")
    message = service.run("--check", "-c", "unknown.toml").stderr
    return set(message.rpartition("expected one of ")[2].strip().split(", "))


def write_settings(path: Path, settings: dict[str, object]) -> None:
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))


def options(settings: dict[str, object]) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]


# ---- What a setting does --------------------------------------------------------------


@pytest.mark.parametrize("source", ["file", "command line over file"])
def test_every_setting_takes_effect(service: Service, source: str) -> None:
    """Each of them shows in what the service does; the command line beats the file, the file beats the default."""
    service.write_handler(HANG)
    settings: dict[str, object] = {
        "bind": "127.0.0.1", "port": service.port, "workers": 2, "max_requests": 7, "handler": "service:handle",
        "timeout": 1.5, "handler_timeout": 2, "grace": 0.2, "max_text": 4000, "pid_file": "our.pid",
        "log_file": "our.log"}
    assert set(settings) == setting_names(service)
    given = []
    if source == "file":
        write_settings(service.home / "daemontest.toml", settings)
    else:
        write_settings(service.home / "daemontest.toml", {
            "bind": "127.0.0.3", "port": free_port(), "workers": 4, "max_requests": 9, "handler": "missing:handle",
            "timeout": 20, "handler_timeout": 20, "grace": 20, "max_text": 10, "pid_file": "other.pid",
            "log_file": "other.log"})
        given = options(settings)
    service.pid_file, service.log_file = service.home / "our.pid", service.home / "our.log"
    service.expected += ["Child Process Died"]

    started = service.run(*given)
    assert re.fullmatch(rf"daemontest\.py: \d+ started, 2 workers on port {service.port}\n", started.stdout), started
    assert len(service.workers()) == 2
    assert service.records("Max Requests per Child: 7$")
    # handler_timeout, of a worker to which nothing else comes meanwhile
    hung = service.connect()
    hung.sendall(b"hang")
    hung.shutdown(socket.SHUT_WR)
    wait_until((service.home / "in-hand").exists, "the handler's call")
    # timeout
    late = service.connect()
    late.sendall(b"x" * 3000)
    # bind
    assert service.ask("x").endswith(" configured\n")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", service.port))
    # max_text
    assert service.ask("x" * 4000).endswith(" configured\n")
    assert service.ask("x" * 4001).endswith(" error: text longer than 4000 bytes\n")
    # max_requests: four have come to the other worker, and after these one that has had seven accepts no more
    for _ in range(11):
        service.ask("x")
    with late:
        assert read_all(late).decode().endswith(" error: text not ended within 1.5 s\n")
    assert service.wait_for_records(r"Child Process Ended\. \(0\)")
    with hung:
        assert read_all(hung) == b""
    service.wait_for_records(r"Child Process Died\. \(SIGKILL: handler ran longer than 2 s\)")
    # grace
    (service.home / "in-hand").unlink()
    with service.connect() as client:
        client.sendall(b"hang")
        client.shutdown(socket.SHUT_WR)
        wait_until((service.home / "in-hand").exists, "the handler's call")
        os.kill(service.manager(), signal.SIGTERM)
        assert read_all(client) == b""
    wait_until(lambda: not service.processes(), "the stop")
    assert service.records("Server Terminated.")
    assert service.records(r"Child Process Died\. \(SIGKILL: not done within the grace\)")
    # pid_file, log_file
    assert {path.name for path in service.home.iterdir()} - {"unknown.toml"} == {
        "daemontest.toml", "service.py", "in-hand", "our.log"}


def test_a_file_named_with_c_is_read_instead_of_the_one_in_the_home_directory(service: Service) -> None:
    service.configure("workers = 4")
    (service.home / "our.toml").write_text("max_requests = 7")
    service.start("-c", "our.toml")
    assert service.records("Max Requests per Child: 7$")
    assert len(service.workers()) == 5


def test_an_empty_file_changes_nothing(service: Service) -> None:
    service.configure("# nothing yet\n")
    service.start()
    assert len(service.workers()) == 5


def test_relative_names_are_taken_from_where_the_command_was_started_now_and_at_a_reload(service: Service) -> None:
    directory = service.home / "started" / "here"
    directory.mkdir(parents=True)
    (service.home / "our.toml").write_text("pid_file = 'run.pid'\nlog_file = '../relative.log'\nworkers = 2\n")
    service.start("-c", "../../our.toml", cwd=directory)
    service.pid_file, service.log_file = directory / "run.pid", service.home / "started" / "relative.log"
    old = service.workers()
    assert len(old) == 2
    assert service.run("--status", "-c", "our.toml").returncode == 3  # another directory, another PID file
    assert service.run("--reload", "-c", "../../our.toml", cwd=directory).returncode == 0
    service.wait_for_new_workers(old)
    assert not service.records("Waiting for a Restart")
    assert service.run("-t", "-c", "../../our.toml", cwd=directory).returncode == 0


def test_a_tilde_is_the_home_directory(service: Service) -> None:
    (service.home / "deep").mkdir()
    service.configure("pid_file = '~/tilde.pid'\nlog_file = '~/deep/tilde.log'")
    service.start(cwd="/")
    service.pid_file, service.log_file = service.home / "tilde.pid", service.home / "deep" / "tilde.log"
    assert service.records("Daemon Server Started.")
    assert service.stop().returncode == 0


# ---- Mistakes -------------------------------------------------------------------------


MISTAKES: dict[str, tuple[str | bytes, str]] = {
    "syntax": ("workers 5\n", "expected TOML"),
    "half a line": ("workers = 5\nport =", "expected TOML"),
    "nested too deeply": ("workers = " + 5000 * "[", "expected TOML"),
    "key given twice": ("port = 1\nport = 2", "expected TOML"),
    "not UTF-8": (b"handler = '\xff'", "expected TOML.*utf-8"),
    "UTF-16": ("port = 1".encode("utf-16"), "expected TOML"),
    "unknown key": ("wokers = 5", "wokers: unknown key, expected one of bind, port, workers"),
    "option's spelling": ("max-requests = 5", "max-requests: unknown key, expected one of .*max_requests"),
    "config is no key": ("config = 'x'", "config: unknown key"),
    "action is no key": ("reload = true", "reload: unknown key"),
    "unknown table": ("[server]\nport = 5", "server: unknown key"),
    "table for a number": ("[workers]\nnumber = 5", "workers: expected a whole number from 1 to"),
    "table for a name": ("handler.module = 'x'", "handler: expected a string, MODULE:FUNCTION"),
    "list for a number": ("port = [36000]", "port: expected a whole number from 1 to 65535"),
    "date for a number": ("timeout = 2026-11-23", "timeout: expected a number of seconds"),
    "number for a name": ("log_file = 1", "log_file: expected a string, FILE"),
    "bool for a name": ("pid_file = true", "pid_file: expected a string, FILE"),
    "bool for a whole number": ("workers = true", "workers: expected a whole number"),
    "bool for seconds": ("grace = true", "grace: expected a number of seconds"),
    "string for a whole number": ("port = '36000'", "port: expected a whole number"),
    "string for seconds": ("timeout = '10'", "timeout: expected a number of seconds"),
    "fraction for a whole number": ("workers = 1.5", "workers: expected a whole number"),
    "port 0": ("port = 0", "port: expected a whole number from 1 to 65535"),
    "port 65536": ("port = 65536", "port: expected a whole number from 1 to 65535"),
    "no workers": ("workers = 0", "workers: expected a whole number from 1 to"),
    "negative workers": ("workers = -5", "workers: expected a whole number from 1 to"),
    "far too many workers": ("workers = 1" + 30 * "0", "workers: expected a whole number from 1 to"),
    "no requests": ("max_requests = 0", "max_requests: expected a whole number from 1 to"),
    "no text": ("max_text = 0", "max_text: expected a whole number from 1 to"),
    "no time": ("timeout = 0", "timeout: expected a number of seconds from "),
    "negative time": ("handler_timeout = -1", "handler_timeout: expected a number of seconds from "),
    "endless time": ("grace = inf", "grace: expected a number of seconds from "),
    "no number": ("timeout = nan", "timeout: expected a number of seconds from "),
    "handler without a function": ("handler = 'service'", "handler: expected a string, MODULE:FUNCTION"),
    "handler as a file": ("handler = 'service.py'", "handler: expected a string, MODULE:FUNCTION"),
    "empty address": ("bind = ''", "bind: expected a string, ADDRESS"),
    "empty name": ("log_file = ''", "log_file: expected a string, FILE"),
    "name that cannot be": ('pid_file = "a\\u0000b"', "pid_file: expected a string, FILE"),
    "escapes": ('"\\u001b[2J\\n" = 1', r"\\x1b\[2J\\n: unknown key"),
}


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that is never started."""
    with serving(tmp_path_factory.mktemp("idle") / "home") as service:
        yield service


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_refused_in_one_line_naming_file_and_key_and_what_is_expected(idle: Service, case: str) -> None:
    content, why = MISTAKES[case]
    path = idle.home / "daemontest.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = idle.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: bad configuration {path}: {why}[^\n]*\n", done.stderr), done.stderr
    assert [file.name for file in idle.home.iterdir()] == ["daemontest.toml"]


@pytest.mark.parametrize("action", ["--check", "--reload", "-f", "--status", "-t"])
def test_every_action_refuses_it(service: Service, action: str) -> None:
    path = service.configure("workers = 0")
    done = service.run(action)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: bad configuration {path}: workers: expected [^\n]+\n", done.stderr)


def test_a_file_that_cannot_be_read_is_refused(service: Service) -> None:
    (service.home / "directory").mkdir()
    for name, why in (("missing.toml", "No such file or directory"), ("directory", "Is a directory"),
                      ("daemontest.toml/x", "No such file or directory")):
        done = service.run("-c", name)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"daemontest.py: cannot read configuration {service.home / name}: {why}\n"
    assert [file.name for file in service.home.iterdir()] == ["directory"]


def test_a_file_of_the_home_directory_that_cannot_be_read_is_refused_too(service: Service) -> None:
    path = service.home / "daemontest.toml"
    path.mkdir()
    done = service.run("--check")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"daemontest.py: cannot read configuration {path}: Is a directory\n"


def test_a_configuration_that_broke_since_the_start_does_not_keep_the_service_from_being_asked_and_stopped(
        service: Service) -> None:
    manager = service.start()
    service.configure("workers = ")
    status = service.run("--status")
    assert (status.returncode, status.stdout, status.stderr) == (0, f"{manager}\n", "")
    stopped = service.stop()
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert stopped.stdout == f"daemontest.py {manager} Server terminated.\n"


def test_a_good_configuration_is_told_so_and_nothing_is_started(service: Service) -> None:
    service.write_handler("def handle(text):\n    return text")
    service.configure("handler = 'service:handle'\nworkers = 8\ntimeout = 2.5\n")
    done = service.run("--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "daemontest.py: configuration is good\n", "")
    assert sorted(file.name for file in service.home.iterdir()) == ["daemontest.toml", "service.py"]


def test_a_file_that_is_to_be_both_pid_file_and_log_is_refused(service: Service) -> None:
    done = service.run("--pid-file", "both", "--log-file", service.home / "both")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"daemontest.py: bad settings: pid_file and log_file are both {service.home}/both\n"


def test_an_empty_name_of_a_configuration_file_is_refused(service: Service) -> None:
    done = service.run("--check", "-c", "")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"daemontest\.py: cannot read configuration [^\n]+\n", done.stderr)


def test_a_pipe_as_log_that_nobody_reads_is_refused(service: Service) -> None:
    os.mkfifo(service.home / "pipe")
    done = service.run("-p", service.port, "--log-file", "pipe")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"daemontest\.py: cannot open log file [^\n]+\n", done.stderr)
    assert not service.pid_file.exists()
