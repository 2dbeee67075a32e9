"""Under a service manager such as systemd: it is told what is true, and its listening socket is used."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import DAEMON, DEADLINE, MARK, Service, alive, wait_until

SHOW_ENVIRONMENT = "import os\ndef handle(text):\n    return ' '.join(os.environ)"

# What a service manager does between fork and exec: the sockets become descriptors 3 and following.
HAND_OVER = """
import fcntl, os, sys
pid, descriptors, *command = sys.argv[1:]
away = [fcntl.fcntl(int(descriptor), fcntl.F_DUPFD, 30) for descriptor in descriptors.split()]
for place, descriptor in enumerate(away, 3):
    os.dup2(descriptor, place)
os.environ.update(LISTEN_FDS=str(len(away)), LISTEN_PID=pid or str(os.getpid()), LISTEN_FDNAMES="a name")
os.execv(command[0], command)
"""


class NotifySocket:
    """What sd_notify(3) writes to."""

    def __init__(self, service: Service, abstract: bool) -> None:
        self.name = f"@daemontest-{service.mark}" if abstract else str(service.home / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.name.replace("@", "\0", 1) if abstract else self.name)
        self.socket.settimeout(DEADLINE)
        service.env["NOTIFY_SOCKET"] = self.name

    def next(self) -> dict[str, str]:
        """The next message's assignments."""
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().strip().split("\n"))


@contextlib.contextmanager
def notify_socket(service: Service, abstract: bool = False) -> Iterator[NotifySocket]:
    notified = NotifySocket(service, abstract)
    with notified.socket:
        yield notified


def hand_over(service: Service, *sockets: socket.socket, arguments: tuple[str, ...] = (),
              listen_pid: str = "", action: str | None = "-f") -> subprocess.Popen[str]:
    """Start with SOCKETS handed over; LISTEN_PID is that of the new process unless another is given."""
    descriptors = [each.fileno() for each in sockets]
    return subprocess.Popen(
        [sys.executable, "-c", HAND_OVER, listen_pid, " ".join(map(str, descriptors)),
         sys.executable, str(DAEMON), *filter(None, [action]), "--log-file", str(service.log_file), *arguments],
        cwd=service.home, env=service.env, pass_fds=descriptors, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def listener(service: Service) -> socket.socket:
    """A listening socket of the test's own, on the service's port."""
    return socket.create_server(("127.0.0.1", service.port), backlog=socket.SOMAXCONN)


# ---- Notification -----------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_it_tells_when_it_answers_when_it_reloads_and_when_it_stops(service: Service, abstract: bool) -> None:
    if abstract and sys.platform != "linux":
        pytest.skip("abstract addresses are Linux's own")
    service.write_handler("def handle(text):\n    return 'old'")
    with notify_socket(service, abstract) as notified:
        daemon = service.foreground("--handler", "service:handle", "-w", "2", stderr=subprocess.DEVNULL)
        ready = notified.next()
        assert (ready["READY"], ready["MAINPID"]) == ("1", str(daemon.pid))
        assert len(service.workers()) == 2
        assert service.ask("x").endswith(" old\n")

        service.write_handler("def handle(text):\n    return 'new'")
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        os.kill(daemon.pid, signal.SIGHUP)
        reloading = notified.next()
        assert reloading["RELOADING"] == "1"
        assert before <= int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        assert notified.next()["READY"] == "1"
        assert {service.ask("x").split()[1] for _ in range(5)} == {"new"}

        os.kill(daemon.pid, signal.SIGTERM)
        assert notified.next()["STOPPING"] == "1"
        assert daemon.wait(50) == 0
        assert daemon.communicate() == ("", None)


def test_a_reload_that_fails_ends_being_ready_too(service: Service) -> None:
    with notify_socket(service) as notified:
        daemon = service.foreground("-w", "1", stderr=subprocess.DEVNULL)
        assert "READY" in notified.next()
        workers = service.workers()
        service.configure("workers = 0")
        os.kill(daemon.pid, signal.SIGHUP)
        assert "RELOADING" in notified.next()
        assert notified.next()["READY"] == "1"
        assert service.workers() == workers
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.communicate(timeout=50)


def test_it_never_tells_to_be_ready_when_it_fails_to_start(service: Service) -> None:
    with notify_socket(service) as notified:
        daemon = service.foreground("--handler", "missing:handle")
        _, errors = daemon.communicate(timeout=50)
        assert daemon.returncode == 1
        assert "missing:handle" in errors
        notified.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            assert "READY" not in notified.next()


def test_a_service_manager_that_does_not_listen_costs_a_record_and_no_service(service: Service) -> None:
    service.expected += ["Cannot Notify: "]
    service.env["NOTIFY_SOCKET"] = str(service.home / "missing")
    daemon = service.foreground("--log-file", service.log_file)
    service.wait_for_records("Cannot Notify: No such file or directory")
    assert service.ask("x").endswith(" your text size: 1\n")
    assert service.stop().returncode == 0
    daemon.communicate(timeout=50)


def test_none_of_it_reaches_the_handler(service: Service) -> None:
    service.write_handler(SHOW_ENVIRONMENT)
    with notify_socket(service), listener(service) as ours:
        daemon = hand_over(service, ours, arguments=("--handler", "service:handle"))
        names = service.ask("x").split()
        assert MARK in names
        assert [name for name in names if name.startswith(("NOTIFY_", "LISTEN_"))] == []
        assert service.stop().returncode == 0
        daemon.communicate(timeout=50)


# ---- What it says that it is doing ------------------------------------------------------

TIME = r"\d\d:\d\d:\d\d"


def test_its_status_says_what_it_is_doing_at_each_step(service: Service) -> None:
    service.expected.append("Nothing Changed: ")
    with notify_socket(service) as notified:
        daemon = service.foreground("--log-file", service.log_file)

        def reload(text: str) -> list[str]:
            path.write_text(text)
            os.kill(daemon.pid, signal.SIGHUP)
            steps = [notified.next(), notified.next()]
            assert ["RELOADING" in steps[0], "READY" in steps[1]] == [True, True]
            return [step["STATUS"] for step in steps]

        path = service.home / "daemontest.toml"
        assert re.fullmatch(f"5 workers, generation 1 since {TIME}", notified.next()["STATUS"])

        loading, serving = reload("workers = 2")
        assert loading == "loading generation 2"
        assert re.fullmatch(f"2 workers, generation 2 since {TIME}", serving)

        loading, failed = reload("workers = 0")
        assert loading == "loading generation 3"
        assert re.fullmatch(f"{re.escape(serving)}; generation 3 failed: bad configuration {path}: workers: .*", failed)

        service.write_handler("raise RuntimeError('no good\\nSTOPPING=1')")
        _, failed = reload("workers = 2\nhandler = 'service:handle'")
        assert failed.startswith(f"{serving}; generation ")
        assert failed.endswith(r" failed: cannot load handler service:handle: RuntimeError: no good\nSTOPPING=1")

        _, serving = reload("workers = 3")
        assert re.fullmatch(rf"3 workers, generation \d since {TIME}", serving)  # what failed is history now

        os.kill(daemon.pid, signal.SIGTERM)
        stopping = notified.next()
        assert (stopping["STOPPING"], stopping["STATUS"]) == ("1", "stopping")
        daemon.communicate(timeout=50)


def test_its_status_tells_of_a_generation_that_died_and_of_its_successors(service: Service) -> None:
    service.expected += [r"Generation Died\.", "Generation Failed: "]
    good = "def handle(text):\n    return 'good'"
    service.write_handler(good)
    with notify_socket(service) as notified:
        daemon = service.foreground("--log-file", service.log_file, "--handler", "service:handle", "-w", "2")
        assert notified.next()["STATUS"].startswith("2 workers, generation 1 since ")
        generation, = service.generations(daemon.pid)
        service.write_handler("raise RuntimeError('no good')")
        os.kill(generation, signal.SIGKILL)
        assert notified.next() == {"STATUS": "generation 1 died: SIGKILL"}
        failed = {"STATUS": "generation 2 failed: cannot load handler service:handle: RuntimeError: no good"}
        wait_until(lambda: notified.next() == failed, "the next generation to fail")
        service.write_handler(good)
        wait_until(lambda: re.fullmatch(rf"2 workers, generation \d since {TIME}", notified.next()["STATUS"]),
                   "one that serves")
        assert service.ask("x").endswith(" good\n")
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.communicate(timeout=50)


# ---- The listening socket -----------------------------------------------------------------


def test_systemd_socket_activate_starts_it_for_its_first_client(service: Service) -> None:
    """The socket that it is handed is the one used, whatever port the settings name."""
    activate = shutil.which("systemd-socket-activate")
    if not activate:
        pytest.skip("systemd-socket-activate is not installed")
    service.write_handler(SHOW_ENVIRONMENT)
    with open(service.home / "stderr", "w") as stderr:
        activated = subprocess.Popen(
            [activate, "-l", f"127.0.0.1:{service.port}", "-E", "HOME", "-E", MARK, sys.executable, str(DAEMON), "-f",
             "-p", "1", "--handler", "service:handle", "--log-file", "daemontest.log"],
            cwd=service.home, env=service.env, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr)
    try:
        wait_until(lambda: "Listening on" in (service.home / "stderr").read_text(), "the service manager")
        assert not service.pid_file.exists()
        names = service.ask("x").partition(" ")[2].split()
        assert MARK in names
        assert [name for name in names if name.startswith("LISTEN_")] == []
        assert alive(service.manager())
        assert service.stop().returncode == 0
    finally:
        activated.kill()
        activated.wait(50)


def test_a_start_in_the_background_uses_it_too(service: Service) -> None:
    with listener(service) as ours:
        started = hand_over(service, ours, action=None)
        output, errors = started.communicate(timeout=50)
        assert (started.returncode, errors) == (0, "")
        assert output == f"daemontest.py: {service.manager()} started, 5 workers on port {service.port}\n"
        assert service.ask("x").endswith(" your text size: 1\n")


def datagram() -> list[socket.socket]:
    found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    found.bind(("127.0.0.1", 0))
    return [found]


def two() -> list[socket.socket]:
    return [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]


def not_listening() -> list[socket.socket]:
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    return [found]


def local() -> list[socket.socket]:
    found = socket.socket(socket.AF_UNIX)
    found.bind("")  # any abstract address
    found.listen()
    return [found]


@pytest.mark.parametrize("wrong", [datagram, two, not_listening, local])
def test_anything_but_one_listening_tcp_socket_is_refused(
        service: Service, wrong: Callable[[], list[socket.socket]]) -> None:
    sockets = wrong()
    try:
        daemon = hand_over(service, *sockets, arguments=("-p", str(service.port)))
        output, errors = daemon.communicate(timeout=50)
    finally:
        for each in sockets:
            each.close()
    assert (daemon.returncode, output) == (1, "")
    assert re.fullmatch(r"daemontest\.py: cannot use LISTEN_FDS: expected one listening TCP socket\n", errors), errors
    assert not service.pid_file.exists()
    assert not service.log_file.exists()


def test_what_was_handed_to_another_process_is_not_ours(service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        daemon = hand_over(service, theirs, arguments=("-p", str(service.port)), listen_pid=str(os.getpid()))
        wait_until(lambda: service.records("Child Process Started."), "the start")
        assert service.ask("x").endswith(" your text size: 1\n")
        theirs.setblocking(False)
        with socket.create_connection(theirs.getsockname()):
            wait_until(lambda: can_accept(theirs), "a connection of their own")
        assert service.stop().returncode == 0
        daemon.communicate(timeout=50)


def can_accept(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def test_a_socket_that_outlives_three_restarts_under_load_loses_no_request(service: Service) -> None:
    managers, asked, failures = [], [0] * 4, []
    enough = threading.Event()

    def load(place: int) -> None:
        for _ in range(200_000):
            if enough.is_set():
                return
            try:
                reply = service.ask(f"{place}" * (place + 1))
                assert re.fullmatch(rf"\d+ your text size: {place + 1}\n", reply), reply
            except (OSError, AssertionError) as why:
                failures.append(repr(why))
                return
            asked[place] += 1

    with notify_socket(service) as notified, listener(service) as ours:
        threads = [threading.Thread(target=load, args=(place,), daemon=True) for place in range(len(asked))]
        try:
            for restart in range(4):
                daemon = hand_over(service, ours, arguments=("-w", "2", "-n", "50"))
                if not restart:
                    for thread in threads:
                        thread.start()
                before = list(asked)
                wait_until(lambda before=before: failures or all(now > then + 10 for now, then in
                                                                zip(asked, before, strict=True)), "the load")
                managers.append(daemon.pid)
                assert "READY" in notified.next()  # a stop before that would be a failed start
                if restart < 3:
                    assert service.stop().returncode == 0
                    assert "STOPPING" in notified.next()
                    assert daemon.communicate(timeout=50) == ("", "")
                    assert not alive(daemon.pid)
        finally:
            enough.set()
            for thread in threads:
                thread.join(DEADLINE)
        assert service.stop().returncode == 0
        daemon.communicate(timeout=50)
    assert failures == []
    assert len(set(managers)) == 4
    assert not any(thread.is_alive() for thread in threads)
    ended = len(service.records("Client Query Processing Ended."))
    assert ended == sum(asked)


def test_a_service_manager_that_reads_nothing_stops_nothing(service: Service) -> None:
    service.expected.append("Cannot Notify")
    with notify_socket(service) as notified:
        daemon = service.foreground("-w", "1", "--log-file", "daemontest.log", stderr=subprocess.DEVNULL)
        assert "READY" in notified.next()
        for _ in range(1000):  # more than the socket takes
            if service.records("Cannot Notify"):
                break
            before = len(service.records("Caught SIGHUP"))
            os.kill(daemon.pid, signal.SIGHUP)
            service.wait_for_records("Caught SIGHUP", before + 1)
        assert service.records("Cannot Notify: Resource temporarily unavailable")
        assert service.stop().returncode == 0
        daemon.communicate(timeout=50)
