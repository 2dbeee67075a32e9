"""Whatever environment it is started in, the service starts, answers, reloads and stops."""

import fcntl
import os
import pwd
import re
import resource
import signal
import socket
import subprocess
import sys
import termios
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import CLIENT, DAEMON, DEADLINE, Service, wait_until

ALL_SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGINT, signal.SIGQUIT, signal.SIGALRM]


def assert_lives_a_whole_life(service: Service, manager: int) -> None:
    """The service answers, replaces workers, reloads and stops as in any other environment."""
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
    assert os.getsid(manager) != os.getsid(0)
    assert psutil.Process(manager).cwd() == "/"
    assert psutil.Process(manager).terminal() is None
    stopped = service.stop()
    assert (stopped.returncode, stopped.stdout) == (0, f"daemontest.py {manager} Server terminated.\n")
    assert not service.processes()
    assert "\n    あ\n" in service.log_file.read_text("utf-8")


def assert_lives(service: Service, *arguments: str | Path, **options: Any) -> None:
    assert_lives_a_whole_life(service, service.start("-w", "2", *arguments, **options))


def test_it_lives_when_standard_input_is_a_socket(service: Service) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert_lives(service, stdin=theirs)
        theirs.close()
        assert ours.recv(1) == b""  # nobody has kept it


@pytest.mark.parametrize("closed", [some for count in (1, 2, 3) for some in combinations((0, 1, 2), count)], ids=str)
def test_it_lives_when_standard_descriptors_are_closed(service: Service, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    done = service.run("-p", str(service.port), "-w", "2", preexec_fn=close)
    manager = service.manager()
    assert done.returncode == 0
    assert done.stdout == ("" if 1 in closed else
                           f"daemontest.py: {manager} started, 2 workers on port {service.port}\n")
    for pid in (manager, *service.workers()):
        assert [os.readlink(f"/proc/{pid}/fd/{descriptor}") for descriptor in (0, 1, 2)] == [
            "/dev/null", str(service.log_file), str(service.log_file)]
    assert service.run("--status", preexec_fn=close).returncode == 0
    if closed in ((0,), (0, 1, 2)):
        assert_lives_a_whole_life(service, manager)
    else:
        assert service.ask("x").endswith(" your text size: 1\n")
        assert service.run("-t", preexec_fn=close).returncode == 0
        assert not service.processes()


@pytest.mark.parametrize("how", ["ignored", "blocked", "ignored and blocked"])
def test_it_lives_when_its_parent_ignores_or_blocks_signals(service: Service, how: str) -> None:
    def set_up() -> None:
        if "ignored" in how:
            for signum in ALL_SIGNALS:
                signal.signal(signum, signal.SIG_IGN)
        if "blocked" in how:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    assert_lives(service, preexec_fn=set_up)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_it_lives_in_the_foreground_when_its_parent_ignores_and_blocks_signals(
        service: Service, signum: signal.Signals) -> None:
    def set_up() -> None:
        for ignored in ALL_SIGNALS:
            signal.signal(ignored, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    with service.foreground("-w", "2", "--log-file", "daemontest.log", preexec_fn=set_up) as process:
        wait_until(lambda: service.run("--status").stdout == f"{process.pid}\n", "the start")
        assert service.run("--reload").returncode == 0  # so the start is over: a stop before that would make it fail
        started = len(service.records("Child Process Started."))
        os.kill(process.pid, signal.SIGHUP)
        service.wait_for_records("Child Process Started.", started + 2)
        os.kill(process.pid, signum)
        assert process.wait(DEADLINE) == 0


def test_it_lives_in_the_foreground_of_a_terminal_that_stops_background_output(service: Service) -> None:
    controlling, terminal = os.openpty()
    settings = termios.tcgetattr(terminal)
    settings[3] |= termios.TOSTOP
    termios.tcsetattr(terminal, termios.TCSANOW, settings)
    daemon = service.foreground("-w", "2", stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
                                preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0))
    wait_until(lambda: service.pid_file.exists() and not service.refuses(), "it to listen")
    assert service.ask("あ\n").endswith(" your text size: 2\n")
    assert b"Child Process Started." in os.read(controlling, 10000)
    daemon.terminate()
    assert daemon.wait(DEADLINE) == 0
    os.close(terminal)
    os.close(controlling)


def test_it_lives_without_a_home(service: Service) -> None:
    home = pwd.getpwuid(os.getuid()).pw_dir  # what is used instead; the files named below keep the test out of it
    if os.path.exists(f"{home}/daemontest.toml"):
        pytest.skip("this user has a daemontest.toml of their own")
    env = {key: value for key, value in service.env.items() if key != "HOME"}
    files = ("--pid-file", service.pid_file, "--log-file", service.log_file)
    assert_lives(service, *files, env=env)


def test_it_lives_in_an_empty_environment(service: Service) -> None:
    mark = {key: value for key, value in service.env.items() if key.startswith("DAEMONTEST")}  # the harness's
    (service.home / "empty.toml").touch()
    assert_lives(service, "-c", "empty.toml", "--pid-file", service.pid_file, "--log-file", service.log_file, env=mark)


@pytest.mark.parametrize("home", ["plain", "ホーム"])
def test_it_lives_in_the_c_locale_without_utf_8_mode(service: Service, home: str) -> None:
    directory = service.home / home
    directory.mkdir()
    service.home = directory
    service.pid_file, service.log_file = directory / "daemontest.pid", directory / "daemontest.log"
    service.env |= {"HOME": str(directory), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert_lives(service)
    refused = service.run("-p", str(service.port), "--pid-file", directory)
    assert refused.returncode == 1
    assert refused.stderr.startswith("daemontest.py: cannot use PID file ")
    assert refused.stderr.count("\n") == 1


def test_a_handler_in_the_c_locale_prints_and_answers_any_character(service: Service) -> None:
    service.env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    service.write_handler("def handle(text):\n    print(text)\n    return 'ほ' + text\n")
    service.start("-w", "1", "--handler", "service:handle")
    assert service.ask("あ😀").endswith(" ほあ😀\n")
    log = service.log_file.read_text("utf-8")
    assert log.count("\n    あ😀\n") == log.count("\nあ😀\n") == 1


def test_it_lives_with_the_highest_descriptor_limit(service: Service) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:  # only root may go beyond, and not everywhere
        highest = int(Path("/proc/sys/fs/nr_open").read_text())
        resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE, (most, highest))
        resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE, (most, most))
        most = highest
    except (OSError, ValueError):
        pass

    def raise_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    manager = service.start("-w", "2", preexec_fn=raise_limit)
    assert resource.prlimit(manager, resource.RLIMIT_NOFILE) == (most, most)
    assert_lives_a_whole_life(service, manager)


def test_it_lives_when_its_working_directory_has_been_removed(service: Service) -> None:
    def leave_nowhere() -> None:
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")

    assert_lives(service, preexec_fn=leave_nowhere)


# ---- Namespaces ---------------------------------------------------------------------


def run_apart(service: Service, namespaces: list[str], script: str) -> subprocess.CompletedProcess[str]:
    """The shell SCRIPT in NAMESPACES of its own; with it ends all that it has started."""
    if subprocess.run(["unshare", *namespaces, "true"], capture_output=True).returncode:
        pytest.skip(f"unshare {' '.join(namespaces)} may not be run here")
    script = script.replace("DAEMON", f"'{sys.executable}' '{DAEMON}'").replace(
        "CLIENT", f"'{sys.executable}' '{CLIENT}'").replace("PORT", str(service.port))
    return subprocess.run(["unshare", *namespaces, "sh", "-c", script], cwd=service.home, env=service.env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50)


LIFE = """
DAEMON -p PORT -w 2 || exit
pid=$(cat daemontest.pid)
printf いろは | CLIENT -s 127.0.0.1 -p PORT
printf いろは | CLIENT -s localhost -p PORT
kill -HUP $pid
test "$(DAEMON --status)" = $pid && echo runs
printf いろは | CLIENT -s 127.0.0.1 -p PORT
DAEMON -t
DAEMON --status 2>&1
"""
LIVED = (r"daemontest\.py: (\d+) started, 2 workers on port \d+\n(\d+ your text size: 4\n){2}runs\n"
         r"\d+ your text size: 4\ndaemontest\.py (\d+) Server terminated\.\ndaemontest\.py: not running\n")


def assert_lived(done: subprocess.CompletedProcess[str], service: Service) -> None:
    assert done.stderr == ""
    assert re.fullmatch(LIVED, done.stdout), done.stdout
    assert not service.pid_file.exists()
    assert not service.processes()


def test_it_lives_when_its_parent_is_a_shell_with_pid_1(service: Service) -> None:
    done = run_apart(service, ["--pid", "--fork", "--kill-child", "--mount-proc"], "test $$ = 1 || exit 9\n" + LIFE)
    assert_lived(done, service)


def test_it_lives_when_ipv6_is_switched_off(service: Service) -> None:
    done = run_apart(service, ["--net"], """
        ip link set lo up || exit
        echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 || exit
    """ + LIFE)
    assert_lived(done, service)


def test_names_that_the_c_locale_cannot_have_are_refused_in_one_line_and_stop_nothing(service: Service) -> None:
    service.env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    service.expected += ["Nothing Changed", "Manager Failed: cannot load handler", "Handler Not Loaded", "^    "]
    for line in ('log_file = "日誌"', 'pid_file = "日誌"', 'handler = "日誌:handle"'):
        (service.home / "other.toml").write_text(line, "utf-8")
        done = service.run("-p", str(service.port), "-c", "other.toml")
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"daemontest\.py: cannot [^\n]+\n", done.stderr), done.stderr
    manager = service.start("-w", "2")
    (service.home / "daemontest.toml").write_text('log_file = "日誌"', "utf-8")
    os.kill(manager, signal.SIGHUP)
    service.wait_for_records("Nothing Changed: cannot open log file")
    (service.home / "daemontest.toml").unlink()
    assert_lives_a_whole_life(service, manager)
