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
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
from conftest import CLIENT, DAEMON, DEADLINE, POEM, Service, free_port, read_all, wait_until

HANGS = "import time\nprint('importing')\ntime.sleep(600)\n"  # a module whose import does not end

LOAD_FAILS = ["Start Failed: cannot load handler", "Handler Not Loaded", "Traceback", "^    ", r"^\w+Error: "]


def assert_nothing_left(service: Service) -> None:
    assert not service.processes()
    assert not service.pid_file.exists()


def assert_one_line(errors: str) -> None:
    assert re.fullmatch(r"daemontest\.py: [^\n]+\n", errors), errors


# ---- What a start says --------------------------------------------------------------


def test_a_start_names_manager_workers_and_port_when_all_are_there(service: Service) -> None:
    start = service.popen("-p", str(service.port), "-w", "30")
    assert start.stdout
    line = start.stdout.readline()
    manager = service.manager()
    assert len(service.workers(manager)) == 30
    assert line == f"daemontest.py: {manager} started, 30 workers on port {service.port}\n"
    assert service.pid_file.read_text() == f"{manager}\n"
    assert service.ask("x").endswith(" your text size: 1\n")
    assert (*start.communicate(timeout=50), start.returncode) == ("", "", 0)


def test_a_second_start_is_refused_and_changes_nothing(service: Service) -> None:
    manager = service.start("-w", "2")
    wait_until(lambda: len(service.processes()) == 5, "those who forked the manager to end")
    before, log = service.processes(), service.log
    second = service.run("-p", str(free_port()))
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == f"daemontest.py: cannot start: already running (PID file {service.pid_file})\n"
    assert (service.manager(), service.processes(), service.log) == (manager, before, log)


@pytest.mark.parametrize(("arguments", "why"), [
    (("--log-file", "."), "HOME.*: .*directory"),
    (("--log-file", "missing/file"), "HOME/missing/file: .*No such file or directory"),
    (("--log-file", "daemontest.py/file"), "HOME/daemontest.py/file: .*Not a directory"),
    (("-b", "192.0.2.1"), r"cannot listen on 192\.0\.2\.1 port PORT: \w"),  # nobody's (RFC 5737)
    (("-b", "::1%nosuch"), r"cannot listen on ::1%nosuch port PORT: \w"),  # names that fail without a question
    (("-b", "a..b"), r"cannot listen on a\.\.b port PORT: '?\w"),  # to the network
    (("--handler", "missing:handle"), "cannot load handler missing:handle: "),
    (("--handler", "kills:handle"), r"cannot load handler kills:handle: the process died \(SIGKILL\)"),
    (("--pid-file", "missing/pid"), "HOME/missing/pid: No such file or directory"),
])
def test_a_start_that_cannot_be_is_refused_in_one_line(service: Service, arguments: tuple[str, ...], why: str) -> None:
    service.expected += LOAD_FAILS
    service.write_handler("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", "kills")
    (service.home / "daemontest.py").touch()
    done = service.run("-p", str(service.port), *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr)
    why = why.replace("HOME", str(service.home)).replace("PORT", str(service.port))
    assert re.search(why, done.stderr), done.stderr
    assert_nothing_left(service)
    assert not list(service.home.glob("daemontest.pid*"))


def test_a_port_that_another_listens_on_is_refused_until_it_is_free(service: Service) -> None:
    with socket.create_server(("127.0.0.1", service.port)):
        done = service.run("-p", str(service.port))
        assert (done.returncode, done.stdout) == (1, "")
        assert re.match(rf"daemontest\.py: cannot listen on port {service.port}: Address already in use", done.stderr)
        assert_one_line(done.stderr)
        assert "connection" not in done.stderr  # as below
        assert_nothing_left(service)
    service.start("-w", "1")


def test_a_port_that_an_outgoing_connection_has_is_told_from_one_that_somebody_listens_on(service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as outgoing:
        outgoing.bind(("127.0.0.1", service.port))
        outgoing.connect(server.getsockname())
        done = service.run("-p", str(service.port))
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr)
    assert re.match(rf"daemontest\.py: cannot listen on port {service.port}: Address already in use.*connection",
                    done.stderr), done.stderr
    assert_nothing_left(service)


@pytest.mark.parametrize("output", ["/dev/full", "a file open for reading"])
def test_a_start_that_cannot_say_that_it_succeeded_fails_and_hides_nothing(service: Service, output: str) -> None:
    with open(*(("/dev/full", "w") if output == "/dev/full" else (os.devnull, "r"))) as stdout:
        _, errors = (start := service.popen("-p", str(service.port), stdout=stdout)).communicate(timeout=50)
    assert start.returncode == 1
    assert errors.startswith("daemontest.py: cannot write to standard output: ")
    assert_one_line(errors)
    # The service may have been given up, or be there for -t: not half there.
    assert service.run("--status").returncode == 3 or service.stop().returncode == 0
    assert_nothing_left(service)


def test_a_start_whose_manager_is_killed_says_so(service: Service) -> None:
    service.write_handler("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef handle(text): return text\n")
    done = service.run("-p", str(service.port), "--handler", "service:handle")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "daemontest.py: cannot start: the manager died\n")
    assert service.run("--status").returncode == 3
    wait_until(lambda: not service.processes(), "the others to notice")


@pytest.mark.parametrize("given_up", [False, True], ids=["fails", "given up"])
def test_a_start_never_stops_the_service_that_somebody_else_starts_meanwhile(service: Service, given_up: bool) -> None:
    service.expected += LOAD_FAILS
    service.write_handler("import os, time\nprint('importing')\nwhile not os.path.exists(f'{os.path.dirname(__file__)}"
                          "/go'):\n    time.sleep(0.01)\nraise RuntimeError('no good')\n")
    start = service.popen("-p", str(free_port()), "--handler", "service:handle")
    wait_until(lambda: "\nimporting\n" in service.log, "the import")
    start.send_signal(signal.SIGSTOP)  # so that it learns of all this only afterwards
    (service.home / "go").touch()
    service.wait_for_records("Server Terminated|Start Failed")
    manager = wait_until(lambda: service.run("-p", str(service.port)).returncode == 0 and service.manager(), "a start")
    if given_up:
        start.send_signal(signal.SIGINT)
    start.send_signal(signal.SIGCONT)
    out, errors = start.communicate(timeout=50)
    assert (start.returncode, out) == (1, "")
    assert_one_line(errors)
    assert "service:handle: RuntimeError: no good" in errors or (given_up and "interrupted" in errors)
    assert service.run("--status").stdout == f"{manager}\n"
    assert service.ask("x").endswith(" your text size: 1\n")


@pytest.mark.parametrize(("bind", "answering"), [
    ((), ["127.0.0.1", "127.0.0.2", "::1"]),
    (("-b", "127.0.0.1"), ["127.0.0.1"]),
    (("--bind", "::1"), ["::1"]),
])
def test_it_listens_where_it_is_told_and_nowhere_else(service: Service, bind: tuple[str, ...],
                                                      answering: list[str]) -> None:
    service.start(*bind)
    for host in ("127.0.0.1", "127.0.0.2", "::1"):
        if host in answering:
            assert service.ask("x", host).endswith(" your text size: 1\n")
        else:
            with pytest.raises(ConnectionRefusedError):
                service.connect(host)


def test_a_start_after_a_stop_finds_the_port_free_at_once_and_adds_to_the_log(service: Service) -> None:
    for number in (1, 2, 3):
        service.start("-w", "1")
        with service.connect() as client:
            client.sendall(b"x\n")  # keeps its side open, so the server closes first, and TCP remembers it on its port
            assert read_all(client).endswith(b" your text size: 2\n")
        service.stop()
        assert len(service.records("Daemon Server Started.")) == number


# ---- The steps that make a process a daemon -----------------------------------------


def test_a_daemon_keeps_nothing_of_what_it_was_started_from(service: Service) -> None:
    """Started from a terminal, with umask 0, in a directory of its own, and with descriptors that it does not know."""
    controlling, terminal = os.openpty()
    reading, writing = os.pipe()

    def bad_manners() -> None:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        os.umask(0)

    with open(service.home / "secret", "w") as secret:
        foreign = {os.readlink(f"/proc/self/fd/{number}") for number in (terminal, writing, secret.fileno())}
        manager = service.start("-w", "2", stdin=terminal, start_new_session=True, preexec_fn=bad_manners,
                                pass_fds=(secret.fileno(), writing))
    os.close(writing)
    assert select.select([reading], [], [], 5)[0]
    assert os.read(reading, 1) == b""  # nobody has kept it
    log = str(service.log_file)
    everybody = {manager, service.keeper(), *service.generations(), *service.workers()}
    assert len(everybody) == 5
    for pid in everybody:
        process = psutil.Process(pid)
        assert (process.terminal(), process.cwd()) == (None, "/")
        assert os.getsid(pid) not in (os.getsid(0), pid)  # who leads no session cannot get a terminal again
        assert re.search(r"^Umask:\s*0027$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        opened = {int(name): os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
        assert [opened[number] for number in range(3)] == ["/dev/null", log, log]
        assert not foreign & {*opened.values()}
    assert len({os.getsid(pid) for pid in everybody}) == 1
    assert service.log_file.stat().st_mode & 0o7777 == 0o640
    assert service.pid_file.stat().st_mode & 0o7777 == 0o644  # for monitors of any user
    for descriptor in (reading, terminal, controlling):
        os.close(descriptor)


# ---- Odd environments ---------------------------------------------------------------


ALL_SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGINT, signal.SIGQUIT, signal.SIGALRM]


def ignore_signals() -> None:
    for signum in ALL_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def ignore_and_block_signals() -> None:
    ignore_signals()
    block_signals()


def leave_nowhere() -> None:
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")


def assert_whole_life(service: Service, manager: int) -> None:
    """The service answers, replaces workers, reloads and stops as anywhere else."""
    workers = service.workers(manager)
    assert len(workers) == 2
    assert service.ask("あ\n").endswith(" your text size: 2\n")
    leaving = min(workers)
    os.kill(leaving, signal.SIGTERM)
    wait_until(lambda: leaving not in service.workers() and len(service.workers()) == 2, "a new worker")
    workers = service.workers()
    os.kill(manager, signal.SIGHUP)
    service.wait_for_new_workers(workers)
    assert service.ask("いろは").endswith(" your text size: 3\n")
    assert psutil.Process(manager).cwd() == "/"
    assert os.getsid(manager) != os.getsid(0)
    stopped = service.run("-t", "--pid-file", service.pid_file)
    assert (stopped.returncode, stopped.stdout) == (0, f"daemontest.py {manager} Server terminated.\n")
    assert not service.processes()
    assert "\n    あ\n" in service.log_file.read_text("utf-8")


@pytest.mark.parametrize("set_up", [ignore_signals, block_signals, ignore_and_block_signals, leave_nowhere])
def test_it_lives_a_whole_life(service: Service, set_up: Any) -> None:
    assert_whole_life(service, service.start("-w", "2", preexec_fn=set_up))


def test_it_lives_a_whole_life_with_a_socket_as_standard_input(service: Service) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        manager = service.start("-w", "2", stdin=theirs)
        theirs.close()
        assert ours.recv(1) == b""  # nobody has kept it
        assert_whole_life(service, manager)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_it_lives_a_whole_life_with_standard_descriptors_closed(service: Service, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    done = service.run("-p", str(service.port), "-w", "2", preexec_fn=close)
    manager = service.manager()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if 1 in closed else
                           f"daemontest.py: {manager} started, 2 workers on port {service.port}\n")
    for pid in (manager, *service.workers()):
        assert [os.readlink(f"/proc/{pid}/fd/{descriptor}") for descriptor in (0, 1, 2)] == [
            "/dev/null", str(service.log_file), str(service.log_file)]
    for action in ("--status", "--reload"):
        assert service.run(action, preexec_fn=close).returncode == 0
    assert_whole_life(service, manager)


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [{}, C_LOCALE], ids=["nothing", "a C locale"])
def test_it_lives_a_whole_life_without_a_home(service: Service, environment: dict[str, str]) -> None:
    if Path(f"{pwd.getpwuid(os.getuid()).pw_dir}/daemontest.toml").exists():
        pytest.skip("this user has a daemontest.toml of their own")
    harness = {name: value for name, value in service.env.items() if name.startswith("DAEMONTEST")}
    assert_whole_life(service, service.start("-w", "2", "--pid-file", service.pid_file, "--log-file", service.log_file,
                                             env=environment | harness))


def test_it_lives_a_whole_life_in_a_home_that_its_locale_cannot_name(service: Service) -> None:
    service.home /= "ホーム"
    service.home.mkdir()
    service.pid_file, service.log_file = service.home / "daemontest.pid", service.home / "daemontest.log"
    service.env |= {"HOME": str(service.home), **C_LOCALE}
    service.write_handler("def handle(text):\n    print(text)\n    return f'{len(text)} ほ' + text\n")
    service.start("-w", "1", "--handler", "service:handle")
    assert service.ask("あ😀").endswith(" 2 ほあ😀\n")
    assert "\nあ😀\n" in service.log_file.read_text("utf-8")
    service.stop()
    assert_whole_life(service, service.start("-w", "2"))


def test_it_lives_a_whole_life_with_the_highest_descriptor_limit(service: Service) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # only root may go beyond, and not everywhere
        highest = int(Path("/proc/sys/fs/nr_open").read_text())
        resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE, (most, highest))
        resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE, (most, most))
        most = highest
    manager = service.start("-w", "2", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)))
    assert resource.prlimit(manager, resource.RLIMIT_NOFILE) == (most, most)
    assert_whole_life(service, manager)


def open_many() -> None:
    """More than select(2) can take, for every command to inherit."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (2200, 2200))
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor in range(null + 1, 1100):
        os.dup2(null, descriptor)


def test_no_command_minds_more_than_1024_open_descriptors_and_the_service_keeps_none(service: Service) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2200:
        pytest.skip("this user may not have so many descriptors")
    service.expected += LOAD_FAILS

    def said(*arguments: str, script: Path = DAEMON, **options: Any) -> str:
        done = service.run(*arguments, script=script, preexec_fn=open_many, close_fds=False, **options)
        return done.stdout + done.stderr

    assert said("--check") == "daemontest.py: configuration is good\n"
    failed = said("-p", str(service.port), "--handler", "missing:handle")
    assert re.fullmatch("daemontest.py: cannot load handler missing:handle: [^\n]+\n", failed), failed
    assert said("-p", str(service.port)).endswith(f" started, 5 workers on port {service.port}\n")
    manager = service.manager()
    for pid in {manager, service.keeper(), *service.generations(), *service.workers()}:
        assert len(os.listdir(f"/proc/{pid}/fd")) < 30
    assert said("--status") == f"{manager}\n"
    assert said("--reload") == f"daemontest.py: {manager} reloaded\n"
    with POEM.open("rb") as text:
        reply = said("-s", "127.0.0.1", "-p", str(service.port), script=CLIENT, stdin=text)
    assert reply.endswith(f" your text size: {len(POEM.read_text('utf-8')) + 1}\n")
    assert said("-t") == f"daemontest.py {manager} Server terminated.\n"
    daemon = service.foreground("-w", "2", preexec_fn=open_many, close_fds=False)
    wait_until(lambda: said("--status") == f"{daemon.pid}\n", "the start")
    assert said("--reload") == f"daemontest.py: {daemon.pid} reloaded\n"
    daemon.terminate()
    assert daemon.wait(DEADLINE) == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_it_lives_in_the_foreground_of_a_parent_that_ignores_and_blocks_signals(
        service: Service, signum: signal.Signals) -> None:
    daemon = service.foreground("-w", "2", "--log-file", "daemontest.log", preexec_fn=ignore_and_block_signals)
    wait_until(lambda: service.run("--status").stdout == f"{daemon.pid}\n", "the start")
    assert service.run("--reload").returncode == 0  # so the start is over: a stop before that would make it fail
    workers = service.workers()
    os.kill(daemon.pid, signal.SIGHUP)
    service.wait_for_new_workers(workers)
    os.kill(daemon.pid, signum)
    assert daemon.wait(DEADLINE) == 0


def test_it_lives_in_the_foreground_of_a_terminal_that_stops_background_output(service: Service) -> None:
    controlling, terminal = os.openpty()
    settings = termios.tcgetattr(terminal)
    settings[3] |= termios.TOSTOP
    termios.tcsetattr(terminal, termios.TCSANOW, settings)
    daemon = service.foreground("-w", "2", stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
                                preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0))

    def read_to(record: bytes) -> None:
        shown = b""
        while record not in shown:  # the test's timeout ends it
            shown += os.read(controlling, 10000)

    read_to(b"Child Process Started.")
    assert service.ask("あ\n").endswith(" your text size: 2\n")
    daemon.terminate()
    read_to(b"Server Terminated.")
    assert daemon.wait(DEADLINE) == 0
    os.close(terminal)
    os.close(controlling)


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
], ids=["below a shell that is PID 1", "with IPv6 switched off"])
def test_it_lives_a_whole_life_in_namespaces(service: Service, namespaces: list[str], set_up: str) -> None:
    if subprocess.run(["unshare", *namespaces, "true"], capture_output=True).returncode:
        pytest.skip(f"unshare {' '.join(namespaces)} may not be run here")
    script = (set_up + LIFE).replace("DAEMON", f"'{sys.executable}' '{DAEMON}'").replace(
        "CLIENT", f"'{sys.executable}' '{CLIENT}'").replace("PORT", str(service.port))
    done = subprocess.run(["unshare", *namespaces, "sh", "-c", script], cwd=service.home, env=service.env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50)
    assert done.stderr == ""
    assert re.fullmatch(LIVED, done.stdout), done.stdout
    assert_nothing_left(service)


# ---- Many starts at once ------------------------------------------------------------


STARTS = 10


def start_at_once(service: Service, ports: list[int]) -> list[tuple[int, str, str]]:
    """Start on each of PORTS at the same time; each start's exit status and output."""
    starts = [service.popen("-p", str(port), "-w", "2") for port in ports]
    outputs = [start.communicate(timeout=50) for start in starts]
    return [(start.returncode, *output) for start, output in zip(starts, outputs, strict=True)]


@pytest.mark.parametrize("same_port", [True, False], ids=["same port", "different ports"])
def test_exactly_one_of_many_starts_wins(service: Service, same_port: bool) -> None:
    refused = (1, "", f"daemontest.py: cannot start: already running (PID file {service.pid_file})\n")
    for leftover in (False, True, False, True):
        if leftover:
            service.pid_file.write_text("999999\n")
        ports = [service.port] * STARTS if same_port else [free_port() for _ in range(STARTS)]
        ended = start_at_once(service, ports)
        [won] = {*ended} - {refused}
        assert ended.count(refused) == STARTS - 1
        manager, service.port = service.manager(), int(won[1].split()[-1])
        assert service.port in ports
        assert won == (0, f"daemontest.py: {manager} started, 2 workers on port {service.port}\n", "")
        assert start_at_once(service, ports[:4]) == [refused] * 4
        wait_until(lambda: len(service.processes()) == 5, "one manager, keeper and generation, and two workers, alone")
        assert service.ask("x").endswith(" your text size: 1\n")
        assert service.stop().stdout == f"daemontest.py {manager} Server terminated.\n"
        assert_nothing_left(service)


def test_who_asks_for_the_status_makes_no_start_or_stop_fail(service: Service) -> None:
    done = Event()

    def ask_on() -> None:
        while not done.is_set():
            asked = service.run("--status")
            assert (asked.returncode, asked.stderr) in [
                (0, ""), (3, f"daemontest.py: not running (PID file {service.pid_file})\n")]

    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(ask_on) for _ in range(3)]
        try:
            for _ in range(4):
                service.start("-w", "1")
                assert service.stop().returncode == 0
        finally:
            done.set()
        for asker in askers:
            asker.result()
    assert not service.pid_file.exists()


# ---- Ctrl-C at a start --------------------------------------------------------------


MOMENTS = 20  # spread over a start, from its beginning to its end
SECONDS = 20  # for the moments of one test: on a busy machine they are fewer


def is_pythons_own(errors: str) -> bool:
    """Whether ERRORS are those of a Python interrupted in its beginning, in imports, or reading the command line.

    In some moments of its own beginning Python tells of it and goes on.
    """
    in_functions = re.search(rf'{re.escape(str(DAEMON))}", line \d+, in \w', errors)
    return "KeyboardInterrupt" in errors and (not in_functions or bool(re.search("importlib|argparse", errors)))


def interrupt(service: Service, after: float, *arguments: str) -> tuple[int, str, str]:
    """Start, and press Ctrl-C AFTER so many seconds, until it ends; exit status and output."""
    start = service.popen("-p", str(service.port), "-w", "2", *arguments, start_new_session=True)
    time.sleep(after)  # the moment itself is the stimulus
    for patience in (DEADLINE / 2, DEADLINE):  # twice, since Python itself may go on
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(start.pid, signal.SIGINT)  # as a terminal does
        with suppress(subprocess.TimeoutExpired):
            out, err = start.communicate(timeout=patience)
            return start.returncode, out, "" if is_pythons_own(err) else err
    pytest.fail(f"interrupted in vain after {after:.3f} s")


@pytest.mark.parametrize("action", [(), ("-f", "--log-file", "daemontest.log")], ids=["background", "foreground"])
def test_ctrl_c_at_any_moment_ends_a_start_and_leaves_nothing(service: Service, action: tuple[str, ...]) -> None:
    began = time.monotonic()
    service.start("-w", "2")
    took = time.monotonic() - began
    service.stop()
    moments = sorted(range(MOMENTS), key=lambda number: number % 4)  # so that they are spread also where time ends
    outcomes = []
    for number in [*moments, MOMENTS * 2, MOMENTS * 5]:
        if time.monotonic() > began + SECONDS and number < MOMENTS:
            continue
        after = number / MOMENTS * took
        status, out, err = interrupt(service, after, *action)
        if status:
            assert (out, err) in [("", ""), ("", "daemontest.py: interrupted\n"),
                                  ("", "daemontest.py: cannot start: caught SIGINT\n")], after
        else:  # it was too late for the start
            assert err == "", after
            if not action:
                assert service.ask("x").endswith(" your text size: 1\n"), after
                assert service.stop().stdout.split()[1] == out.split()[1], after
        outcomes.append(status)
        wait_until(lambda: not service.processes(), f"all to go, interrupted after {after:.3f} s")
        assert not service.pid_file.exists(), after
    assert any(outcomes)
    assert outcomes[-1] == 0


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGINT] * 20, [signal.SIGTERM], [signal.SIGKILL]],
                         ids=["Ctrl-C", "many Ctrl-C", "TERM", "KILL"])
def test_a_start_that_is_ended_while_its_handler_hangs_in_its_import_leaves_nothing(
        service: Service, signals: list[signal.Signals]) -> None:
    service.write_handler(HANGS)
    start = service.popen("-p", str(service.port), "--handler", "service:handle", start_new_session=True)
    wait_until(lambda: "importing\n" in service.log, "the import")
    for signum in signals:
        with suppress(ProcessLookupError):
            os.killpg(start.pid, signum)
    said = start.communicate(timeout=50)
    assert said == ("", "daemontest.py: interrupted\n") or (said == ("", "") and signals != [signal.SIGINT])
    assert start.returncode not in (0, None)
    wait_until(lambda: not service.processes(), "all to go")
    assert service.run("--status").returncode == 3


def test_ctrl_c_after_a_start_has_been_told_changes_nothing(service: Service) -> None:
    for _ in range(4):
        start = service.popen("-p", str(service.port), "-w", "2")
        assert start.stdout and start.stdout.readline().endswith(f"started, 2 workers on port {service.port}\n")
        start.send_signal(signal.SIGINT)
        assert start.communicate(timeout=50) == ("", "")
        assert start.returncode == 0
        assert service.ask("x").endswith(" your text size: 1\n")
        assert service.stop().returncode == 0
