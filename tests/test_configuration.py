"""The configuration: every setting by file and by option, and every mistake refused in one line that helps."""

import os
import re
import signal
import socket
import time

import pytest
from conftest import Service, free_port, read_all, wait_until

HANG = """
import time

def handle(text):
    if text == "hang":
        print("called")
        time.sleep(20)
    return "configured"
"""


def toml(settings: dict[str, object]) -> str:
    return "".join(f"{key} = {value!r}\n" for key, value in settings.items())


@pytest.mark.parametrize("source", ["file", "command line over file"])
def test_every_setting_takes_effect(service: Service, source: str) -> None:
    service.write_handler(HANG)
    settings: dict[str, object] = {
        "bind": "127.0.0.1", "port": service.port, "workers": 2, "max_requests": 7, "handler": "service:handle",
        "timeout": 0.7, "handler_timeout": 1, "grace": 0.2, "max_text": 4000, "pid_file": "~/our.pid",
        "log_file": "~/our.log", "log": "requests"}
    service.configure("no_such_key = 1")
    known = service.run("--check").stderr.rpartition("expected one of ")[2].strip()
    assert set(settings) == set(known.split(", "))
    options: list[str] = []
    if source == "file":
        service.configure(toml(settings))
    else:
        service.configure(toml({
            "bind": "127.0.0.3", "port": free_port(), "workers": 4, "max_requests": 9, "handler": "missing:handle",
            "timeout": 20, "handler_timeout": 20, "grace": 20, "max_text": 10, "pid_file": "other.pid",
            "log_file": "other.log", "log": "life"}))
        options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    service.pid_file, service.log_file = service.home / "our.pid", service.home / "our.log"
    service.expected.append("Child Process Killed")

    def hang() -> socket.socket:
        """A client whose text is in a handler that hangs."""
        before, client = service.log.count("called"), service.begin(b"hang")
        wait_until(lambda: service.log.count("called") > before, "the handler's call")
        return client

    started = service.run(*options)
    assert re.fullmatch(rf"daemontest\.py: \d+ started, 2 workers on port {service.port}\n", started.stdout), started
    assert len(service.workers()) == 2
    assert service.records("Max Requests per Child: 7$")
    began = time.monotonic()
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
        assert read_all(late).decode().endswith(" error: text not ended within 0.7 s\n")
        assert read_all(hung) == b""
        assert time.monotonic() - began < 8  # of the 10 s that are the default
    service.wait_for_records(r"Child Process Killed\. \(handler ran longer than 1 s\)")
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
    assert {path.name for path in service.home.iterdir()} == {"daemontest.toml", "service.py", "our.log"}


@pytest.mark.parametrize("by", ["file", "option"])
def test_relative_names(service: Service, by: str) -> None:
    """In a file they begin in the file's directory, on the command line in the current one."""
    there, here = service.home / "there", service.home / "here"
    for directory in (there, here):
        directory.mkdir()
    names = {"pid_file": "run.pid", "log_file": "../our.log"}
    (there / "our.toml").write_text("handler = 'rhyme:handle'\nworkers = 2\n" + (toml(names) if by == "file" else ""))
    (there / "rhyme.py").write_text("def handle(text):\n    return 'there'")
    pid_file = () if by == "file" else ("--pid-file", names["pid_file"])
    log_file = () if by == "file" else ("--log-file", names["log_file"])
    service.start("-c", "../there/our.toml", *pid_file, *log_file, cwd=here)
    service.pid_file, service.log_file = (there if by == "file" else here) / "run.pid", service.home / "our.log"
    assert service.ask("x").endswith(" there\n")
    old = service.workers()
    assert len(old) == 2
    assert service.run("--status", "-c", "../there/our.toml", *pid_file, cwd=here).returncode == 0
    reloaded = service.run("--reload", "-c", there / "our.toml", *pid_file, cwd="/" if by == "file" else here)
    assert reloaded.returncode == 0
    assert not service.workers() & old
    assert not service.records("Needs a Restart")
    assert service.run("-t", "-c", "../there/our.toml", *pid_file, cwd=here).returncode == 0
    assert list(here.iterdir()) == []


MISTAKES: dict[str, tuple[bytes, str]] = {
    "syntax": (b"workers 5\n", "expected TOML"),
    "not UTF-8": (b"handler = '\xff'", "expected TOML.*utf-8"),
    "unknown key": (b"max-requests = 5", "max-requests: unknown key, expected one of bind, .*max_requests"),
    "table": (b"[workers]\nnumber = 5", "workers: expected a whole number from 1 to"),
    "bool for a number": (b"workers = true", "workers: expected a whole number"),
    "port": (b"port = 65536", "port: expected a whole number from 1 to 65535"),
    "no time": (b"timeout = 0", "timeout: expected a number of seconds from "),
    "endless time": (b"grace = inf", "grace: expected a number of seconds from "),
    "no function": (b"handler = 'service'", "handler: expected a string, MODULE:FUNCTION"),
    "no such log": (b"log = 'nothing'", "log: expected a string, .*texts.*requests.*life"),
    "impossible name": (b'pid_file = "a\\u0000b"', "pid_file: expected a string, FILE"),
    "escapes": (b'"\\u001b[2J\\n" = 1', r"\\x1b\[2J\\n: unknown key"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_refused_naming_file_key_and_what_is_expected(service: Service, case: str) -> None:
    content, why = MISTAKES[case]
    path = service.home / "daemontest.toml"
    path.write_bytes(content)
    done = service.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: bad configuration {path}: {why}[^\n]*\n", done.stderr), done.stderr
    assert [file.name for file in service.home.iterdir()] == ["daemontest.toml"]


@pytest.mark.parametrize("action", ["--check", "--reload", "-f", "--status", "-t"])
def test_every_action_refuses_a_mistake(service: Service, action: str) -> None:
    path = service.configure("workers = 0")
    done = service.run(action)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: bad configuration {path}: workers: expected [^\n]+\n", done.stderr)


@pytest.mark.parametrize(("name", "why"), [("missing.toml", "No such file or directory"), ("/", "Is a directory")])
def test_a_file_that_cannot_be_read(service: Service, name: str, why: str) -> None:
    done = service.run("-c", name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"daemontest.py: cannot read configuration {service.home / name}: {why}\n"


def test_a_running_service_is_found_by_its_pid_file_though_the_configuration_broke(service: Service) -> None:
    manager = service.start()
    other = service.configure("workers = ").rename(service.home / "other.toml")
    for action in ("-t", "--status", "--reload"):
        done = service.run(action, "-c", str(other))
        assert (done.returncode, done.stdout) == (1, ""), "it is not the service of another configuration"
    service.configure("workers = ")
    assert service.run("--status", "--pid-file", str(service.pid_file)).stdout == f"{manager}\n"
    stop = service.run("-t", "--pid-file", str(service.pid_file))
    assert stop.stdout == f"daemontest.py {manager} Server terminated.\n"


def test_check_starts_nothing_and_shows_the_traceback(service: Service) -> None:
    path = service.write_handler("def handle(text):\n    return text")
    service.configure("handler = 'service:handle'")
    done = service.run("--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "daemontest.py: configuration is good\n", "")
    path.write_text("\n1 / 0")
    done = service.run("--check")
    assert (done.returncode, done.stdout) == (1, "")
    what = "ZeroDivisionError: division by zero"
    assert re.fullmatch(r"Traceback \(most recent call last\):\n(  .*\n)*"
                        rf"  File \"{path}\", line 2, in <module>\n(  .*\n)*"
                        rf"{what}\ndaemontest\.py: cannot load handler service:handle: {what} \({path}, line 2\)\n",
                        done.stderr), done.stderr
    assert {file.name for file in service.home.iterdir()} == {"daemontest.toml", "service.py"}
