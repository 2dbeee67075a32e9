"""The harness: drives the real scripts in a HOME of their own, on a free port, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DAEMON = ROOT / "daemontest.py"
CLIENT = ROOT / "testclient.py"
POEM = ROOT / "tests" / "data" / "poem.txt"
DEADLINE = 20.0  # s; how long a loaded machine may take for what normally takes milliseconds
PARALLEL = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])  # tests that run at the same time share no ports
MARK = "DAEMONTEST_HARNESS"  # in the environment of every process that a test starts

for signum in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(signum) == signal.SIG_IGN:  # as under nohup(1), or in a shell's background
        signal.signal(signum, lambda *_: None)  # which the commands that the tests start do not inherit

RECORD = re.compile(r"(?P<time>[\d-]{10}T[\d:]{8}\.\d{3}[+-]\d{4}) (?P<kind>[*-]) (?P<pid>\d+) (?P<message>.+)")
CONTINUATION = re.compile(r"    .*")


def wait_until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """The condition's first true value; fails the test after DEADLINE s."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {deadline:g} s in vain for {what}")
        time.sleep(0.005)
    return value


def free_port() -> int:
    """A port nobody uses, below the range from which the kernel takes ports for outgoing connections."""
    while True:
        port = random.randrange(12000 + PARALLEL, 32000, 16)
        with suppress(OSError), socket.socket(socket.AF_INET6) as probe:  # TIME-WAIT counts as used, too
            probe.bind(("::", port))
            return port


def alive(pid: int) -> bool:
    """Whether process PID is, and is no zombie.  By /proc itself: psutil takes most of the suite's time."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:  # it has gone
        return False


class Service:
    """One daemontest of the test's own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self.mark = uuid.uuid4().hex
        self.env = {**os.environ, "HOME": str(home), MARK: self.mark}
        self.pid_file = home / "daemontest.pid"
        self.log_file = home / "daemontest.log"
        self.expected: list[str] = []  # patterns of lines about faults in the log that the test makes on purpose

    def run(self, *arguments: str | Path, script: Path = DAEMON, timeout: float = 50,
            **options: Any) -> subprocess.CompletedProcess[str]:
        """A command of the daemon's (or client's), to its end."""
        options = {"cwd": self.home, "env": self.env, "stdin": subprocess.DEVNULL, **options}
        return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True,
                              timeout=timeout, **options)

    def start(self, *arguments: str | Path, **options: Any) -> int:
        """Start in the background on this service's port; the manager's PID."""
        done = self.run("-p", str(self.port), *arguments, **options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        match = re.fullmatch(r"daemontest\.py: (\d+) started, \d+ workers on port \d+\n", done.stdout)
        assert match, done.stdout
        return int(match[1])

    def popen(self, *arguments: str | Path, script: Path = DAEMON, **options: Any) -> subprocess.Popen[str]:
        """Begin a command of the daemon's (or client's)."""
        options = {"cwd": self.home, "env": self.env, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                   "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen([sys.executable, str(script), *map(str, arguments)], **options)

    def foreground(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Begin a start with -f."""
        return self.popen("-f", "-p", str(self.port), *arguments, **options)

    def stop(self) -> subprocess.CompletedProcess[str]:
        return self.run("-t")

    def configure(self, text: str) -> Path:
        path = self.home / "daemontest.toml"
        path.write_text(text)
        return path

    def write_handler(self, source: str, name: str = "service") -> Path:
        path = self.home / f"{name}.py"
        path.write_text(source)
        return path

    def connect(self, host: str = "127.0.0.1", timeout: float = DEADLINE) -> socket.socket:
        return socket.create_connection((host, self.port), timeout=timeout)

    def ask(self, text: str | bytes, host: str = "127.0.0.1", timeout: float = DEADLINE) -> str:
        """Send TEXT, half-close, and return the whole reply."""
        with self.connect(host, timeout) as connection:
            connection.sendall(text.encode() if isinstance(text, str) else text)
            connection.shutdown(socket.SHUT_WR)
            return read_all(connection).decode()

    def begin(self, text: bytes = b"x", end: bool = True) -> socket.socket:
        """Send TEXT, and half-close if that is its END; the connection."""
        connection = self.connect()
        connection.sendall(text)
        if end:
            connection.shutdown(socket.SHUT_WR)
        return connection

    def refuses(self) -> bool:
        """Whether nobody listens any more: a process that ends closes its files a moment after it has lost its name."""
        try:
            self.connect().close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # the listener was shut down meanwhile
            pass
        return False

    def client(self, text: str | bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """testclient.py with TEXT as its standard input."""
        command = [sys.executable, str(CLIENT), "-s", "127.0.0.1", "-p", str(self.port), *arguments]
        return subprocess.run(command, input=text.encode() if isinstance(text, str) else text, capture_output=True,
                              env=self.env, timeout=50)

    def manager(self) -> int:
        return int(self.pid_file.read_text())

    def children(self, pid: int) -> set[int]:
        """The living children of PID."""
        found: set[int] = set()
        for _ in range(2):  # while one is being reaped, the kernel may miss others
            with suppress(OSError):  # it has gone
                found.update(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        return {*filter(alive, found)}

    def named(self, name: str, parent: int | None = None) -> set[int]:
        """The living children of PARENT, the manager unless it is given, whose name in ps is NAME."""
        found = set()
        for child in self.children(parent or self.manager()):
            with suppress(OSError):  # it has gone
                if Path(f"/proc/{child}/comm").read_text() == f"{name}\n":
                    found.add(child)
        return found

    def keeper(self) -> int:
        """The keeper, once there is no other."""
        wait_until(lambda: len(self.named("daemontest-keep")) == 1, "one keeper")
        [keeper] = self.named("daemontest-keep")
        return keeper

    def generations(self, manager: int | None = None) -> set[int]:
        """The living generations."""
        return self.named("daemontest-gen", manager)

    def generation(self) -> int:
        """The one generation, once there is no other."""
        wait_until(lambda: len(self.generations()) == 1, "one generation")
        [generation] = self.generations()
        return generation

    def workers(self, manager: int | None = None) -> set[int]:
        """The living workers of all generations."""
        return set().union(*(self.named("daemontest-work", each) for each in self.generations(manager)))

    def wait_for_new_workers(self, old: set[int]) -> set[int]:
        """Wait until as many workers have taken the place of OLD; the new ones."""
        found: set[int] = wait_until(lambda: len(new := self.workers()) == len(old) and not new & old and new,
                                     f"{len(old)} new workers")
        return found

    def processes(self) -> set[int]:
        """Every living process that this test started and that runs the daemon."""
        found = set()
        for directory in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has gone, or is another user's
                if (f"{MARK}={self.mark}".encode() in (directory / "environ").read_bytes()
                        and os.fsencode(DAEMON) in (directory / "cmdline").read_bytes().split(b"\0")
                        and alive(int(directory.name))):
                    found.add(int(directory.name))
        return found

    def assert_nothing_left(self) -> None:
        wait_until(lambda: not self.processes(), "all processes to go")
        assert not list(self.home.glob("daemontest.pid*"))

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def records(self, pattern: str = "") -> list[re.Match[str]]:
        """The log's records whose message matches PATTERN from its beginning."""
        found = (RECORD.fullmatch(line) for line in self.log.split("\n"))
        return [match for match in found if match and re.match(pattern, match["message"])]

    def wait_for_records(self, pattern: str, count: int = 1, deadline: float = DEADLINE) -> list[re.Match[str]]:
        wait_until(lambda: len(self.records(pattern)) >= count, f"{count} of {pattern!r} in the log", deadline)
        return self.records(pattern)

    def kept(self) -> tuple[int, int]:
        """How many clients and bytes the keeper says that it has in hand."""
        before = len(self.records("Status: keeper with"))
        os.kill(self.manager(), signal.SIGUSR1)
        told = self.wait_for_records("Status: keeper with", before + 1)[-1]["message"]
        match = re.search(r"with (\d+) clients?, (\d+) bytes?", told)
        assert match, told
        return int(match[1]), int(match[2])

    def trouble(self) -> list[str]:
        """The log's lines about faults that the test did not expect."""
        signs = re.compile(r"Traceback|Died|Killed|Failed|Cannot|Error\b")
        return [line for line in self.log.split("\n") if not line.startswith("     ") and signs.search(line)
                and not any(re.search(pattern, line) for pattern in self.expected)]


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the end of file."""
    reply = bytearray()
    while piece := connection.recv(65536):
        reply += piece
    return bytes(reply)


def seconds_between(first: re.Match[str], second: re.Match[str]) -> float:
    """The time from one record to another."""
    return (datetime.fromisoformat(second["time"]) - datetime.fromisoformat(first["time"])).total_seconds()


class Load:
    """Clients that ask again and again, each from an address of its own, so that ports do not run out."""

    def __init__(self, service: Service, clients: int = 4, text: bytes = b"x", pause: float = 0.0) -> None:
        self.service, self.text, self.pause = service, text, pause
        self.replies: list[bytes] = []
        self.failures: list[str] = []
        self.done = Event()
        self.threads = [Thread(target=self.ask_on, args=(f"127.0.{random.randint(1, 254)}.{number + 1}",))
                        for number in range(clients)]

    def ask_on(self, source: str) -> None:
        while not self.done.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self.service.port), DEADLINE, (source, 0)) as connection:
                    connection.sendall(self.text)
                    connection.shutdown(socket.SHUT_WR)
                    reply = read_all(connection)
                if not reply.endswith(b"\n"):
                    raise EOFError(f"no whole reply: {reply!r}")
                self.replies.append(reply)
            except (OSError, EOFError) as why:
                self.failures.append(str(why))
                time.sleep(0.01)
            time.sleep(self.pause)

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for thread in self.threads:
            thread.join()

    def wait_for(self, count: int) -> None:
        """Wait until COUNT more requests have been answered."""
        goal = len(self.replies) + count
        wait_until(lambda: len(self.replies) >= goal, f"{count} more replies")


HELD = """
import os, time

def handle(text):
    with open(f"{HERE}/in-hand", "a") as file:
        file.write(f"{os.getpid()}\\n")
    for _ in range(6000):  # a minute at the most
        if os.path.exists(f"{HERE}/released"):
            return "let through"
        time.sleep(0.01)
"""


class Held:
    """A handler that holds every request until the test releases them."""

    def __init__(self, service: Service) -> None:
        self.home = service.home
        service.write_handler(HELD.replace("{HERE}", str(self.home)), "held")
        self.arguments = ("--handler", "held:handle")

    def workers(self) -> list[int]:
        """The PIDs of the workers that have called the handler, in the order of the calls."""
        file = self.home / "in-hand"
        return [int(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def wait_for(self, count: int = 1) -> list[int]:
        """Wait until the handler has been called COUNT times; the PIDs of its workers."""
        wait_until(lambda: len(self.workers()) >= count, f"{count} requests in hand")
        return self.workers()

    def release(self) -> None:
        (self.home / "released").touch()


@contextmanager
def serving(home: Path) -> Iterator[Service]:
    """A service to start; at the end it is stopped by TERM, and must have left nothing behind."""
    home.mkdir()
    service = Service(home)
    try:
        yield service
        with suppress(OSError, ValueError):  # there is no PID file, or only what the test has put there
            if (manager := service.manager()) in service.processes():
                os.kill(manager, signal.SIGTERM)
                wait_until(lambda: not alive(manager), "the stop", 40)
        wait_until(lambda: not service.processes(), "all to go, handlers' helpers, too", 10)
    finally:
        for pid in service.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not service.trouble(), service.log[-5000:]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path / "home") as service:
        yield service
