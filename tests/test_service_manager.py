"""Under a service manager such as systemd, played by the test: it is told what is true, and its socket is used."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from conftest import DAEMON, DEADLINE, MARK, Load, Service, alive, wait_until
from modules import saying

SHOW_ENVIRONMENT = "import os\ndef handle(text):\n    return ' '.join(os.environ)"
SERVES = r"daemontest \d[.\d]*: {workers} workers?, generation {number} since \d\d:\d\d:\d\d"

# What a service manager does between fork and exec: the sockets become descriptors 3 and following.
HAND_OVER = """
import fcntl, os, sys
descriptors, *command = sys.argv[1:]
away = [fcntl.fcntl(int(descriptor), fcntl.F_DUPFD, 30) for descriptor in descriptors.split()]
for place, descriptor in enumerate(away, 3):
    os.dup2(descriptor, place)
os.environ.update(LISTEN_FDS=str(len(away)), LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="a name")
os.execv(command[0], command)
"""


class NotifySocket:
    """What sd_notify(3) writes to."""

    def __init__(self, service: Service, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(name.replace("@", "\0", 1))
        self.socket.settimeout(DEADLINE)
        service.env["NOTIFY_SOCKET"] = name

    def next(self) -> dict[str, str]:
        """The next message's assignments."""
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().strip().split("\n"))


@pytest.fixture
def notified(service: Service) -> Iterator[NotifySocket]:
    notified = NotifySocket(service, f"@daemontest-{service.mark}")  # an abstract address
    with notified.socket:
        yield notified


def serves(message: dict[str, str], workers: int, number: str) -> bool:
    """Whether a message tells of WORKERS workers and generation NUMBER."""
    return bool(re.fullmatch(SERVES.format(workers=workers, number=number), message.get("STATUS", "")))


def hand_over(service: Service, *sockets: socket.socket, arguments: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start with SOCKETS handed over."""
    descriptors = [each.fileno() for each in sockets]
    return subprocess.Popen(
        [sys.executable, "-c", HAND_OVER, " ".join(map(str, descriptors)),
         sys.executable, str(DAEMON), "-f", "--log-file", str(service.log_file), *arguments],
        cwd=service.home, env=service.env, pass_fds=descriptors, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_tells_when_it_answers_when_it_reloads_and_when_it_stops(service: Service) -> None:
    service.expected += ["Reload Failed: "]
    service.write_handler(saying("old"))
    notified = NotifySocket(service, str(service.home / "notify"))
    with notified.socket:
        daemon = service.foreground("--handler", "service:handle", "--log-file", service.log_file)
        ready = notified.next()
        assert (ready["READY"], ready["MAINPID"]) == ("1", str(daemon.pid))
        assert serves(ready, 5, "1"), ready
        assert service.ask("x").endswith(" old\n")

        def reload() -> dict[str, str]:
            """Reload; the message that ends it."""
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            os.kill(daemon.pid, signal.SIGHUP)
            reloading = notified.next()
            assert reloading["RELOADING"] == "1"
            assert before <= int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            over = notified.next()
            assert over["READY"] == "1"
            return over

        service.write_handler(saying("new"))
        service.configure("workers = 2")
        assert serves(reload(), 2, "2")
        wait_until(lambda: {service.ask("x").split()[1] for _ in range(5)} == {"new"}, "the new code alone")
        service.configure("workers = 0")
        assert serves(reload(), 2, "2"), "nothing has changed"
        service.configure("workers = 3")
        assert serves(reload(), 3, r"\d")

        os.kill(daemon.pid, signal.SIGTERM)
        assert notified.next()["STOPPING"] == "1"
        assert daemon.communicate(timeout=50) == ("", "")


def test_it_never_tells_to_be_ready_when_it_fails_to_start(service: Service, notified: NotifySocket) -> None:
    daemon = service.foreground("--handler", "missing:handle")
    _, errors = daemon.communicate(timeout=50)
    assert daemon.returncode == 1
    assert "missing:handle" in errors
    notified.socket.setblocking(False)
    with suppress(BlockingIOError):
        while message := notified.next():
            assert "READY" not in message


def test_it_tells_when_its_generation_has_died(service: Service, notified: NotifySocket) -> None:
    service.expected.append("Generation Died")
    service.foreground("-w", "1", "--log-file", service.log_file)
    assert serves(notified.next(), 1, "1")
    os.kill(service.generation(), signal.SIGKILL)
    assert "generation 1 died: SIGKILL" in notified.next()["STATUS"]
    assert serves(notified.next(), 1, "2")
    assert service.stop().returncode == 0


def test_it_logs_that_nobody_listens_and_serves(service: Service) -> None:
    service.expected.append("Cannot Notify: ")
    service.env["NOTIFY_SOCKET"] = str(service.home / "nobody")
    service.start("-w", "1")
    assert service.records("Cannot Notify: No such file or directory$")
    assert service.ask("x").endswith(" your text size: 1\n")


def listener(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=socket.SOMAXCONN)


def test_its_socket_is_used_whatever_the_settings_name_and_none_of_it_reaches_the_handler(
        service: Service, notified: NotifySocket) -> None:
    service.write_handler(SHOW_ENVIRONMENT)
    with listener(service.port) as ours, listener() as other:
        daemon = hand_over(service, ours, arguments=("--handler", "service:handle", "-p", str(other.getsockname()[1])))
        names = service.ask("x").split()
        assert MARK in names
        assert [name for name in names if name.startswith(("NOTIFY_", "LISTEN_"))] == []
        assert service.stop().returncode == 0
        daemon.communicate(timeout=50)


def datagram() -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    found.bind(("127.0.0.1", 0))
    return found


@pytest.mark.parametrize(("number", "wrong", "why"), [
    (1, datagram, "TCP"), (1, socket.socket, "listening"), (2, listener, "one socket, not 2")],
    ids=["datagram", "not-listening", "two"])
def test_anything_but_one_listening_tcp_socket_is_refused_at_once(
        service: Service, number: int, wrong: Callable[[], socket.socket], why: str) -> None:
    sockets = [wrong() for _ in range(number)]
    daemon = hand_over(service, *sockets, arguments=("-p", str(service.port)))
    output, errors = daemon.communicate(timeout=DEADLINE)
    for each in sockets:
        each.close()
    assert (daemon.returncode, output) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: cannot use LISTEN_FDS: [^\n]*{why}[^\n]*\n", errors), errors
    assert not service.pid_file.exists()


def test_a_socket_that_outlives_restarts_under_load_loses_no_request(service: Service, notified: NotifySocket) -> None:
    with listener(service.port) as ours, Load(service, pause=0.01) as load:
        for _ in range(3):
            daemon = hand_over(service, ours, arguments=("-w", "2", "-n", "50"))
            assert "READY" in notified.next()  # a stop before that would be a failed start
            load.wait_for(20)
            assert service.stop().returncode == 0
            assert "STOPPING" in notified.next()
            assert daemon.communicate(timeout=50) == ("", "")
            assert not alive(daemon.pid)
        daemon = hand_over(service, ours, arguments=("-w", "2"))
        load.wait_for(20)
    assert load.failures == []
    assert service.stop().returncode == 0
    daemon.communicate(timeout=50)
