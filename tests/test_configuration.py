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
        pathlib.Path(__file__).with_name("called").touch()
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
        "log_file": "our.log", "log": "requests"}
    assert set(settings) == setting_names(service)
    given = []
    if source == "file":
        write_settings(service.home / "daemontest.toml", settings)
    else:
        write_settings(service.home / "daemontest.toml", {
            "bind": "127.0.0.3", "port": free_port(), "workers": 4, "max_requests": 9, "handler": "missing:handle",
            "timeout": 20, "handler_timeout": 20, "grace": 20, "max_text": 10, "pid_file": "other.pid",
            "log_file": "other.log", "log": "life"})
        given = options(settings)
    service.pid_file, service.log_file = service.home / "our.pid", service.home / "our.log"
    service.expected.append("Child Process Killed")

    def hang() -> socket.socket:
        """A client whose text is in a handler that hangs."""
        (service.home / "called").unlink(missing_ok=True)
        client = service.connect()
        client.sendall(b"hang")
        client.shutdown(socket.SHUT_WR)
        wait_until((service.home / "called").exists, "the handler's call")
        return client

    started = service.run(*given)
    assert re.fullmatch(rf"daemontest\.py: \d+ started, 2 workers on port {service.port}\n", started.stdout), started
    assert len(service.workers()) == 2
    assert service.records("Max Requests per Child: 7$")
    with hang() as hung, service.connect() as late:
        late.sendall(b"x" * 3000)
        # bind, handler, max_text, log
        assert service.ask("x").endswith(" configured\n")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", service.port))
        assert service.ask("x" * 4000).endswith(" configured\n")
        assert service.ask("x" * 4001).endswith(" error: text longer than 4000 bytes\n")
        assert service.records(r"Client: 127\.0\.0\.1; Received Text\.")
        # timeout, handler_timeout
        assert read_all(late).decode().endswith(" error: text not ended within 1.5 s\n")
        assert read_all(hung) == b""
    service.wait_for_records(r"Child Process Killed\. \(handler ran longer than 2 s\)")
    # max_requests
    wait_until(lambda: service.ask("x") and service.records(r"Child Process Ended\. \(0\)"), "a worker's last text")
    # grace
    with hang() as client:
        os.kill(service.manager(), signal.SIGTERM)
        assert read_all(client) == b""
    wait_until(lambda: not service.processes(), "the stop")
    assert service.records("Server Terminated.")
    assert service.records(r"Child Process Killed\. \(still running after the grace\)")
    # pid_file, log_file
    assert {path.name for path in service.home.iterdir()} - {"unknown.toml"} == {
        "daemontest.toml", "service.py", "called", "our.log"}


def test_a_file_named_with_c_is_read_instead_of_the_one_in_the_home_directory(service: Service) -> None:
    service.configure("workers = 4")
    (service.home / "our.toml").write_text("max_requests = 7")
    service.start("-c", "our.toml")
    assert service.records("Max Requests per Child: 7$")
    assert len(service.workers()) == 5


def test_relative_names_in_a_file_are_taken_from_its_directory(service: Service) -> None:
    there, elsewhere = service.home / "there", service.home / "elsewhere"
    for directory in (there, elsewhere):
        directory.mkdir()
    (there / "our.toml").write_text(
        "pid_file = 'run.pid'\nlog_file = '../relative.log'\nworkers = 2\nhandler = 'service:handle'")
    (there / "service.py").write_text("def handle(text):\n    return 'there'")
    service.start("-c", "../there/our.toml", cwd=elsewhere)
    service.pid_file, service.log_file = there / "run.pid", service.home / "relative.log"
    assert service.ask("x").endswith(" there\n")
    old = service.workers()
    assert len(old) == 2
    assert service.run("--status", "-c", "there/our.toml").stdout == f"{service.manager()}\n"
    assert service.run("--reload", "-c", there / "our.toml", cwd="/").returncode == 0
    service.wait_for_new_workers(old)
    assert not service.records("Needs a Restart")
    assert service.run("-t", "-c", "our.toml", cwd=there).returncode == 0
    assert sorted(path.name for path in elsewhere.iterdir()) == []


def test_relative_names_on_the_command_line_are_taken_from_the_current_directory(service: Service) -> None:
    there, elsewhere = service.home / "there", service.home / "elsewhere"
    for directory in (there, elsewhere):
        directory.mkdir()
    (there / "our.toml").write_text("pid_file = 'run.pid'")
    names = ("-c", "../there/our.toml", "--pid-file", "run.pid")
    service.start(*names, "--log-file", "../relative.log", cwd=elsewhere)
    service.pid_file, service.log_file = elsewhere / "run.pid", service.home / "relative.log"
    assert service.records("Daemon Server Started.")
    assert service.run("--status", "-c", there / "our.toml").returncode == 3
    assert service.run("-t", *names, cwd=elsewhere).returncode == 0


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
    "nested too deeply": ("workers = " + 5000 * "[", "expected TOML"),
    "key given twice": ("port = 1\nport = 2", "expected TOML"),
    "not UTF-8": (b"handler = '\xff'", "expected TOML.*utf-8"),
    "unknown key": ("wokers = 5", "wokers: unknown key, expected one of bind, port, workers"),
    "option's spelling": ("max-requests = 5", "max-requests: unknown key, expected one of .*max_requests"),
    "unknown table": ("[server]\nport = 5", "server: unknown key"),
    "table for a number": ("[workers]\nnumber = 5", "workers: expected a whole number from 1 to"),
    "list for a number": ("port = [36000]", "port: expected a whole number from 1 to 65535"),
    "number for a name": ("log_file = 1", "log_file: expected a string, FILE"),
    "bool for a whole number": ("workers = true", "workers: expected a whole number"),
    "string for seconds": ("timeout = '10'", "timeout: expected a number of seconds"),
    "fraction for a whole number": ("workers = 1.5", "workers: expected a whole number"),
    "port 65536": ("port = 65536", "port: expected a whole number from 1 to 65535"),
    "no workers": ("workers = 0", "workers: expected a whole number from 1 to"),
    "far too many workers": ("workers = 1" + 30 * "0", "workers: expected a whole number from 1 to"),
    "no time": ("timeout = 0", "timeout: expected a number of seconds from "),
    "endless time": ("grace = inf", "grace: expected a number of seconds from "),
    "no number": ("timeout = nan", "timeout: expected a number of seconds from "),
    "handler without a function": ("handler = 'service'", "handler: expected a string, MODULE:FUNCTION"),
    "no such log": ("log = 'nothing'", "log: expected a string, .*texts.*requests.*life"),
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
def test_a_mistake_is_refused_naming_file_key_and_what_is_expected(idle: Service, case: str) -> None:
    content, why = MISTAKES[case]
    path = idle.home / "daemontest.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = idle.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: bad configuration {path}: {why}[^\n]*\n", done.stderr), done.stderr
    assert [file.name for file in idle.home.iterdir()] == ["daemontest.toml"]


@pytest.mark.parametrize("action", ["--check", "--reload", "-f", "--status", "-t"])
def test_every_action_refuses_a_mistake(service: Service, action: str) -> None:
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


def test_a_running_service_is_found_though_its_configuration_broke(service: Service) -> None:
    manager = service.start()
    service.configure("workers = ")
    status = service.run("--status")
    assert (status.returncode, status.stdout, status.stderr) == (0, f"{manager}\n", "")
    stopped = service.stop()
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert stopped.stdout == f"daemontest.py {manager} Server terminated.\n"


def test_a_check_starts_nothing(service: Service) -> None:
    service.write_handler("def handle(text):\n    return text")
    service.configure("handler = 'service:handle'\nworkers = 8\ntimeout = 2.5\n")
    done = service.run("--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "daemontest.py: configuration is good\n", "")
    assert sorted(file.name for file in service.home.iterdir()) == ["daemontest.toml", "service.py"]


