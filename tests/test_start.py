"""A start, from whatever environment, returns when the service answers, or says why not and leaves nothing behind."""

import fcntl
import os
import pwd
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
from conftest import CLIENT, DAEMON, DEADLINE, Service, free_port, read_all, wait_until

LOAD_FAILS = ["Start Failed: cannot load handler", "Handler Not Loaded", "Traceback", "^    ", r"^\w+Error: "]


def assert_fails(done: subprocess.CompletedProcess[str], why: str) -> None:
    """DONE is a start that failed, with one line that says WHY, a pattern."""
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: [^\n]*{why}[^\n]*\n", done.stderr), done.stderr


# ---- What a start says ----------------------------------------------------------------

def test_says_manager_workers_and_port_when_all_are_there(service: Service) -> None:
    start = service.popen("-p", str(service.port), "-w", "20")
    assert start.stdout
    line = start.stdout.readline()
    manager = service.manager()
    assert len(service.workers(manager)) == 20
    assert line == f"daemontest.py: {manager} started, 20 workers on port {service.port}\n"
    assert service.pid_file.read_text() == f"{manager}\n"
    assert service.ask("x").endswith(" your text size: 1\n")
    assert (*start.communicate(timeout=50), start.returncode) == ("", "", 0)


def test_second_start_is_refused_and_changes_nothing(service: Service) -> None:
    manager = service.start("-w", "2")
    wait_until(lambda: len(service.processes()) == 5, "those who forked the manager to end")
    before, log = service.processes(), service.log
    assert_fails(service.run("-p", str(free_port())),
                 re.escape(f"cannot start: already running (PID file {service.pid_file})"))
    assert (service.manager(), service.processes(), service.log) == (manager, before, log)


@pytest.mark.parametrize(("arguments", "why"), [
    (("--log-file", "."), "HOME.*: .*directory"),
    (("--log-file", "missing/file"), "HOME/missing/file: .*No such file or directory"),
    (("--pid-file", "missing/pid"), "HOME/missing/pid: No such file or directory"),
    (("-b", "192.0.2.1"), r"cannot listen on 192\.0\.2\.1 port PORT: \w"),  # nobody's (RFC 5737)
    (("-b", "a..b"), r"cannot listen on a\.\.b port PORT: '?\w"),  # fails without asking the network
    (("--handler", "missing:handle"), "cannot load handler missing:handle: "),
    (("--handler", "kills:handle"), r"cannot load handler kills:handle: the process died \(SIGKILL\)"),
    (("--handler", "orphans:handle"), "cannot start: the manager died"),
])
def test_failed_start_says_why(service: Service, arguments: tuple[str, ...], why: str) -> None:
    service.expected += LOAD_FAILS
    service.write_handler("import os\nos.kill(os.getpid(), 9)\n", "kills")
    service.write_handler("import os\nos.kill(os.getppid(), 9)\ndef handle(text): return text\n", "orphans")
    done = service.run("-p", str(service.port), *arguments)
    assert_fails(done, why.replace("HOME", str(service.home)).replace("PORT", str(service.port)))
    if "orphans:handle" in arguments:
        assert service.run("--status").returncode == 3
        wait_until(lambda: not service.processes(), "the others to notice")
    else:
        service.assert_nothing_left()


@pytest.mark.parametrize("taken_by", ["listener", "connection"])
def test_taken_port_is_refused_until_it_is_free(service: Service, taken_by: str) -> None:
    with socket.socket() as taker, socket.create_server(("127.0.0.1", 0)) as server:
        taker.bind(("127.0.0.1", service.port))
        if taken_by == "listener":
            taker.listen()
        else:
            taker.connect(server.getsockname())
        done = service.run("-p", str(service.port))
        assert_fails(done, f"cannot listen on port {service.port}: Address already in use")
        assert ("connection" in done.stderr) == (taken_by == "connection")
        service.assert_nothing_left()
    if taken_by == "listener":  # a connection keeps its port for a minute
        service.start("-w", "1")


def test_start_that_cannot_print_its_line_fails(service: Service) -> None:
    with open("/dev/full", "w") as full:
        start = service.popen("-p", str(service.port), stdout=full)
        _, errors = start.communicate(timeout=50)
    assert_fails(subprocess.CompletedProcess("", start.returncode, "", errors), "cannot write to standard output: ")
    assert service.stop().returncode == 0  # the service runs nevertheless


@pytest.mark.parametrize(("bind", "answering"), [
    ((), ["127.0.0.1", "127.0.0.2", "::1"]),
    (("-b", "127.0.0.1"), ["127.0.0.1"]),
    (("--bind", "::1"), ["::1"]),
])
def test_listens_where_it_is_told_only(service: Service, bind: tuple[str, ...], answering: list[str]) -> None:
    service.start(*bind)
    for host in ("127.0.0.1", "127.0.0.2", "::1"):
        if host in answering:
            assert service.ask("x", host).endswith(" your text size: 1\n")
        else:
            with pytest.raises(ConnectionRefusedError):
                service.connect(host)


def test_start_after_a_stop_finds_the_port_free_and_adds_to_the_log(service: Service) -> None:
    for number in (1, 2):
        service.start("-w", "1")
        with service.connect() as client:
            client.sendall(b"x\n")  # keeps its side open, so the server closes first, and TCP remembers it on its port
            assert read_all(client).endswith(b" your text size: 2\n")
        service.stop()
        assert len(service.records("Daemon Server Started.")) == number


# ---- The steps that make a process a daemon -------------------------------------------

def test_daemon_keeps_nothing_of_its_parents(service: Service) -> None:
    """Started from a terminal, with umask 0, in a directory of its own, with descriptors that it does not know."""
    controlling, terminal = os.openpty()
    reading, writing = os.pipe()

    def set_up() -> None:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        os.umask(0)

    manager = service.start("-w", "2", stdin=terminal, start_new_session=True, preexec_fn=set_up, pass_fds=(writing,))
    os.close(writing)
    assert select.select([reading], [], [], 5)[0]
    assert os.read(reading, 1) == b"", "somebody has kept the pipe"
    everybody = {manager, service.keeper(), *service.generations(), *service.workers()}
    assert len(everybody) == 5
    for pid in everybody:
        process = psutil.Process(pid)
        assert (process.terminal(), process.cwd()) == (None, "/")
        assert os.getsid(pid) not in (os.getsid(0), pid)  # who leads no session cannot get a terminal again
        assert re.search(r"^Umask:\s*0027$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)] == [
            "/dev/null", str(service.log_file), str(service.log_file)]
    assert service.log_file.stat().st_mode & 0o7777 == 0o640
    assert service.pid_file.stat().st_mode & 0o7777 == 0o644  # for monitors of any user
    for descriptor in (reading, terminal, controlling):
        os.close(descriptor)


# ---- Odd environments -----------------------------------------------------------------

def ignore_and_block_signals() -> None:
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGINT, signal.SIGQUIT, signal.SIGALRM):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def leave_nowhere() -> None:
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")


def open_1100() -> None:
    """Open more than select(2) can take."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (2200, 2200))
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor in range(null + 1, 1100):
        os.dup2(null, descriptor)


def raise_limit() -> None:
    """Let there be as many descriptors as the kernel allows."""
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):  # only root may go beyond its limit, and not everywhere
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def assert_whole_life(service: Service, manager: int, **options: Any) -> None:
    """The service answers, replaces workers, reloads and stops as anywhere else; OPTIONS are those of run()."""
    [leaving, staying] = service.workers(manager)
    assert service.ask("あ\n").endswith(" your text size: 2\n")
    os.kill(leaving, signal.SIGTERM)
    wait_until(lambda: leaving not in (workers := service.workers()) and len(workers) == 2, "a new worker")
    pid_file = ("--pid-file", service.pid_file)
    assert service.run("--reload", *pid_file, **options).returncode == 0
    assert staying not in service.workers()
    assert service.ask("いろは").endswith(" your text size: 3\n")
    assert service.run("--status", *pid_file, **options).returncode == 0
    assert service.run("-t", *pid_file, **options).returncode == 0
    assert not service.processes()
    assert "\n    あ\n" in service.log_file.read_text("utf-8")


@pytest.mark.parametrize("set_up", [ignore_and_block_signals, leave_nowhere, open_1100, raise_limit,
                                    partial(os.close, 0), partial(os.close, 1), partial(os.closerange, 0, 3)],
                         ids=["signals", "no directory", "1100 open", "limit", "0 closed", "1 closed", "0-2 closed"])
def test_lives_whatever_its_parent_did(service: Service, set_up: Any) -> None:
    options = {"preexec_fn": set_up, "close_fds": set_up is not open_1100}
    done = service.run("-p", str(service.port), "-w", "2", "--log-file", service.log_file, **options)
    assert (done.returncode, done.stderr) == (0, "")
    manager = service.manager()
    for pid in (manager, *service.workers()):
        assert len(os.listdir(f"/proc/{pid}/fd")) < 30
    assert_whole_life(service, manager, **options if set_up is not leave_nowhere else {})


def test_lives_with_a_socket_as_standard_input(service: Service) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        manager = service.start("-w", "2", stdin=theirs)
        theirs.close()
        assert ours.recv(1) == b"", "somebody has kept the socket"
        assert_whole_life(service, manager)


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_lives_without_an_environment(service: Service) -> None:
    if Path(f"{pwd.getpwuid(os.getuid()).pw_dir}/daemontest.toml").exists():
        pytest.skip("this user has a daemontest.toml of their own")
    harness = {name: value for name, value in service.env.items() if name.startswith("DAEMONTEST")}
    assert_whole_life(service, service.start("-w", "2", "--pid-file", service.pid_file, "--log-file", service.log_file,
                                             env=harness))


def test_lives_in_a_home_that_its_locale_cannot_name(service: Service) -> None:
    service.home /= "ホーム"
    service.home.mkdir()
    service.pid_file, service.log_file = service.home / "daemontest.pid", service.home / "daemontest.log"
    service.env |= {"HOME": str(service.home), **C_LOCALE}
    service.write_handler("def handle(text):\n    print(text)\n    return f'your text size: {len(text)}'\n")
    manager = service.start("-w", "2", "--handler", "service:handle")
    assert service.ask("あ😀").endswith(" your text size: 2\n")
    assert "\nあ😀\n" in service.log_file.read_text("utf-8")
    assert_whole_life(service, manager)


def test_lives_in_the_foreground_of_a_parent_that_ignores_and_blocks_signals(service: Service) -> None:
    daemon = service.foreground("-w", "2", "--log-file", "daemontest.log", preexec_fn=ignore_and_block_signals)
    wait_until(lambda: service.run("--status").stdout == f"{daemon.pid}\n", "the start")
    assert service.run("--reload").returncode == 0
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(DEADLINE) == 0


LIFE = """
DAEMON -p PORT -w 2
for host in 127.0.0.1 localhost; do printf いろは | CLIENT -s $host -p PORT; done
DAEMON --reload; DAEMON --status; printf いろは | CLIENT -s 127.0.0.1 -p PORT; DAEMON -t
"""
LIVED = (r"daemontest\.py: (\d+) started, 2 workers on port \d+\n(\d+ your text size: 4\n){2}"
         r"daemontest\.py: \1 reloaded\n\1\n\d+ your text size: 4\ndaemontest\.py \1 Server terminated\.\n")


@pytest.mark.parametrize(("namespaces", "set_up"), [
    (["--pid", "--fork", "--kill-child", "--mount-proc"], "test $$ = 1 || exit 9"),
    (["--net"], "ip link set lo up && echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 || exit 9"),
], ids=["below a shell that is PID 1", "without IPv6"])
def test_lives_in_namespaces(service: Service, namespaces: list[str], set_up: str) -> None:
    if subprocess.run(["unshare", *namespaces, "true"], capture_output=True).returncode:
        pytest.skip(f"unshare {' '.join(namespaces)} may not be run here")
    script = (set_up + LIFE).replace("DAEMON", f"'{sys.executable}' '{DAEMON}'").replace(
        "CLIENT", f"'{sys.executable}' '{CLIENT}'").replace("PORT", str(service.port))
    done = subprocess.run(["unshare", *namespaces, "sh", "-c", script], cwd=service.home, env=service.env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50)
    assert done.stderr == ""
    assert re.fullmatch(LIVED, done.stdout), done.stdout
    service.assert_nothing_left()


# ---- Several commands at once ---------------------------------------------------------

@pytest.mark.parametrize("same_port", [True, False], ids=["same port", "different ports"])
def test_exactly_one_of_many_starts_wins(service: Service, same_port: bool) -> None:
    service.pid_file.write_text("999999\n")  # left over
    starts = [service.popen("-p", str(service.port if same_port else free_port()), "-w", "2") for _ in range(8)]
    ended = [(*start.communicate(timeout=50), start.returncode) for start in starts]
    refused = ("", f"daemontest.py: cannot start: already running (PID file {service.pid_file})\n", 1)
    assert ended.count(refused) == 7
    [won] = {*ended} - {refused}
    service.port = int(won[0].split()[-1])
    assert won == (f"daemontest.py: {service.manager()} started, 2 workers on port {service.port}\n", "", 0)
    wait_until(lambda: len(service.processes()) == 5, "one manager, keeper and generation, and two workers, alone")
    assert service.ask("x").endswith(" your text size: 1\n")


def test_asking_for_the_status_makes_no_start_or_stop_fail(service: Service) -> None:
    done = Event()

    def ask_on() -> set[int]:
        statuses = set()
        while not done.is_set():
            statuses.add(service.run("--status").returncode)
        return statuses

    with ThreadPoolExecutor(2) as pool:
        askers = [pool.submit(ask_on) for _ in range(2)]
        try:
            for _ in range(2):
                service.start("-w", "1")
                assert service.stop().returncode == 0
        finally:
            done.set()
        assert all(asker.result() <= {0, 3} for asker in askers)
    assert not service.pid_file.exists()


# ---- Ctrl-C at a start ----------------------------------------------------------------

def is_pythons_own(errors: str) -> bool:
    """Return whether ERRORS are those of a Python interrupted in its imports."""
    if errors.startswith("Fatal Python error: init_"):
        return True
    return "KeyboardInterrupt" in errors and ", in main\n" not in errors


@pytest.mark.parametrize("action", [(), ("-f", "--log-file", "daemontest.log")], ids=["background", "foreground"])
def test_ctrl_c_at_any_moment_leaves_nothing_or_a_service(service: Service, action: tuple[str, ...]) -> None:
    began = time.monotonic()
    service.start("-w", "2")
    took = time.monotonic() - began
    service.stop()
    for after in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 3.0):  # of the time that a start takes
        start = service.popen("-p", str(service.port), "-w", "2", *action, start_new_session=True)
        time.sleep(after * took)  # the moment itself is the stimulus
        for patience in (3, DEADLINE):  # twice, since a Python that has just begun may tell of it and go on
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(start.pid, signal.SIGINT)  # as a terminal does
            with suppress(subprocess.TimeoutExpired):
                out, errors = start.communicate(timeout=patience)
                break
        if start.returncode:
            assert out == ""
            assert is_pythons_own(errors) or errors in ("", "daemontest.py: interrupted\n",
                                                        "daemontest.py: cannot start: caught SIGINT\n"), after
        elif not action:  # it was too late for the start
            assert service.ask("x").endswith(" your text size: 1\n"), after
            assert service.stop().stdout.split()[1] == out.split()[1], after
        service.assert_nothing_left()
    assert start.returncode == 0  # the last


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda signum: signum.name)
def test_start_ended_while_its_handler_hangs_in_its_import_leaves_nothing(service: Service, signum: int) -> None:
    service.write_handler("import time\nprint('importing')\ntime.sleep(600)\n")
    start = service.popen("-p", str(service.port), "--handler", "service:handle")
    wait_until(lambda: "importing\n" in service.log, "the import")
    start.send_signal(signum)
    assert start.communicate(timeout=50) == ("", "daemontest.py: interrupted\n" if signum == signal.SIGINT else "")
    assert start.returncode not in (0, None)
    service.assert_nothing_left()
