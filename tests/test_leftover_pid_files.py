"""A PID file left over never blocks a start, whatever stands in it, and nobody named in it is ever signalled."""

import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import DAEMON, DATA, DEADLINE, Service, alive, wait_until

NOT_RUNNING = "daemontest.py: not running\n"
CONTENTS = {
    "empty": b"", "garbage": b"garbage\n", "binary": bytes(range(0x80, 0xa0)), "negative": b"-1\n",
    "zero": b"0\n", "one": b"1\n", "huge": b"9" * 40 + b"\n", "beyond the last PID": b"4194305\n",
    "not ASCII": "\u0661\u0662\u0663\n".encode(),
    "stranger": b"%d\n", "stranger's group": b"-%d\n",
}


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process, with a process group of its own, that dies of any signal."""
    sleep = subprocess.Popen(["sleep", "300"], start_new_session=True)
    yield sleep
    sleep.kill()
    sleep.wait()


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_what_is_left_over_is_not_running_not_signalled_and_not_in_the_way(
        service: Service, stranger: subprocess.Popen[bytes], content: bytes) -> None:
    content = content.replace(b"%d", b"%d" % stranger.pid)
    service.pid_file.write_bytes(content)
    with ThreadPoolExecutor() as pool:
        # In a session of their own, which is what a signal to "process 0" would end.
        outcomes = pool.map(lambda action: service.run(action, start_new_session=True), ["--status", "-t", "--reload"])
    assert [(done.returncode, done.stdout, done.stderr) for done in outcomes] == [
        (3, "", NOT_RUNNING), (1, "", NOT_RUNNING), (1, "", NOT_RUNNING)]
    assert service.pid_file.read_bytes() == content
    manager = service.start("-w", "1", start_new_session=True)
    assert service.pid_file.read_bytes() == b"%d\n" % manager
    assert service.ask("x").endswith(" your text size: 1\n")
    assert stranger.poll() is None
    assert service.stop().returncode == 0
    assert not service.pid_file.exists()
    assert stranger.poll() is None


def test_a_stop_does_not_wait_for_a_service_that_is_started_just_then_with_a_file_that_cannot_be_removed(
        service: Service) -> None:
    service.env["PYTHONPATH"] = str(DATA / "unremovable")
    stopped = service.start("-w", "1", *service.use_handler("does_as_told"))
    with ThreadPoolExecutor() as pool:
        busy = pool.submit(service.ask, "hold gate")
        wait_until((service.home / "held-gate").exists, "the handler to run")
        stop = service.popen("-t")
        service.wait_for_records("Caught SIGTERM")
        stop.send_signal(signal.SIGSTOP)  # as if it were not scheduled
        (service.home / "gate").touch()
        assert busy.result().endswith(" your text size: 9\n")
    wait_until(lambda: not alive(stopped), "the service to stop")
    service.start("-w", "1")
    stop.send_signal(signal.SIGCONT)
    assert stop.communicate(timeout=DEADLINE) == (f"daemontest.py {stopped} Server terminated.\n", "")
    assert service.ask("x").endswith(" your text size: 1\n")


def test_a_pid_file_that_a_stranger_has_locked_is_one_line_and_no_signal(
        service: Service, stranger: subprocess.Popen[bytes]) -> None:
    contents = [b"garbage\n", b"-1\n", b"", b"-%d\n" % stranger.pid, b"9" * 14 + b"\n"]
    paths = [service.home / f"{number}.pid" for number in range(len(contents))]
    commands = [(*action, "--pid-file", path) for path in paths
                for action in (("--status",), ("-t",), ("--reload",), ("-p", str(service.port)))]
    with ExitStack() as stack, ThreadPoolExecutor(len(commands)) as pool:
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
            fcntl.flock(stack.enter_context(path.open("r+b")), fcntl.LOCK_EX)
        outcomes = list(pool.map(lambda command: service.run(*command, start_new_session=True), commands))
        assert [path.read_bytes() for path in paths] == contents
    for command, done in zip(commands, outcomes, strict=True):
        assert (done.returncode in (1, 3), done.stdout) == (True, ""), command
        assert re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr), (command, done.stderr)
    assert stranger.poll() is None
    assert not service.processes()
    for service.pid_file in paths:
        service.start("-w", "1", "--pid-file", service.pid_file)
        assert service.run("-t", "--pid-file", service.pid_file).returncode == 0


def test_a_start_that_somebody_who_asks_keeps_from_the_lock_ends_in_one_line(service: Service) -> None:
    service.pid_file.touch()
    with service.pid_file.open() as file:  # as by a --status that has been suspended
        fcntl.flock(file, fcntl.LOCK_SH)
        done = service.run("-p", str(service.port), "-w", "1")
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr), done.stderr
    assert not service.processes()
    service.start("-w", "1")


def assert_clear_error(done: subprocess.CompletedProcess[str], path: Path | str, why: str) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: [^\n]*{re.escape(str(path))}: {why}\n", done.stderr), done.stderr


def make_directory(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def below_a_file(path: Path) -> None:
    path.parent.touch()


def no_directory(path: Path) -> None:
    assert not path.parent.exists()


@pytest.mark.parametrize(("make", "name", "why"), [
    (make_directory, "pid", "Is a directory"), (make_loop, "pid", "is a symbolic link"),
    (make_pipe, "pid", "not a regular file"), (below_a_file, "below/pid", "Not a directory"),
    (no_directory, "nowhere/pid", "No such file or directory"),
])
def test_a_pid_file_that_cannot_be_is_a_clear_error(service: Service, make: object, name: str, why: str) -> None:
    path = service.home / name
    make(path)  # type: ignore[operator]
    before = sorted(service.home.iterdir())
    assert_clear_error(service.run("-p", str(service.port), "--pid-file", path), path, why)
    assert not service.processes()
    assert sorted(service.home.iterdir()) == before
    for action in ("--status", "-t"):  # nothing runs, but it may also be that nobody can tell
        done = service.run(action, "--pid-file", path)
        assert (done.returncode, done.stdout) in ((1, ""), (3, ""))
        assert re.fullmatch(r"daemontest\.py: (not running|cannot read PID file [^\n]+)\n", done.stderr)


def run_mounted(service: Service, prepare: str, pid_file: str) -> subprocess.CompletedProcess[str]:
    """A start with a small file system of its own, PREPAREd by a shell in it, that holds the PID file.

    The last line of the output lists what is there afterwards.
    """
    mounted = service.home / "mounted"
    mounted.mkdir()
    possible = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", mounted], capture_output=True)
    if possible.returncode:
        pytest.skip("a file system can be mounted only by root")
    script = f'mount -t tmpfs -o size=4096 none "$0" && cd "$0" && {prepare} "$@"; status=$?; ls "$0"; exit $status'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, mounted, sys.executable, DAEMON, "-p", str(service.port),
         "--pid-file", mounted / pid_file], cwd=service.home, env=service.env, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize(("prepare", "why", "left"), [
    ("mount -o remount,ro . &&", "Read-only file system", ""),
    ("echo 1 > pid && mount -o remount,ro . &&", "Read-only file system", "pid\n"),
    ("head -c 4096 /dev/zero > full &&", "No space left on device", "full\n"),
], ids=["read-only", "read-only, left over", "full"])
def test_a_file_system_that_takes_no_pid_file_is_a_clear_error(
        service: Service, prepare: str, why: str, left: str) -> None:
    done = run_mounted(service, prepare, "pid")
    assert (done.returncode, done.stdout) == (1, left)
    assert re.fullmatch(rf"daemontest\.py: [^\n]*{why}[^\n]*\n", done.stderr), done.stderr
    assert not service.processes()
