"""A PID file costs nobody a file or a process: it is no file of the user's, no link, and names no stranger."""

import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DAEMON, Service, alive, wait_until

ACTIONS = [(), ("-t",), ("--status",), ("--reload",)]
NOBODY = 65534


# ---- Files of the user's --------------------------------------------------------------


def facts(path: Path) -> tuple[bytes, int, int, int]:
    """What must not change of the file at PATH."""
    status = path.stat()
    return path.read_bytes(), status.st_ino, status.st_mode, status.st_mtime_ns


def assert_refused(done: subprocess.CompletedProcess[str], path: Path) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: [^\n]*{re.escape(str(path))}[^\n]*\n", done.stderr), done.stderr


CONTENTS = {
    "notes": b"Milk, bread\nCall Anna at 5\n", "two words": b"buy milk\n", "two numbers": b"17\n18\n",
    "a long word": b"x" * 33 + b"\n", "a long word without an end": b"x" * 5000, "a picture": bytes(range(256)) * 20,
    "an assignment": b"workers = 2\n", "blank lines and more": b"\n\nnotes\nnotes\n",
    "a word after many blank lines, and more": b"\n" * 5000 + b"notes\nnotes\n",
    "a number and much later more": b"17\n" + b" " * 5000 + b"notes\n",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_file_with_more_than_a_word_is_refused_and_left_as_it_is(service: Service, content: bytes) -> None:
    path = service.home / "mine"
    path.write_bytes(content)
    before = facts(path)
    assert_refused(service.run("-p", str(service.port), "--pid-file", path), path)
    assert facts(path) == before
    assert not service.processes()


def test_no_action_touches_such_a_file(service: Service) -> None:
    path = service.home / "notes"
    path.write_bytes(CONTENTS["notes"])
    before = facts(path)
    for action in (*ACTIONS, ("-f",)):
        done = service.run(*action, "--pid-file", path, *([] if action in ACTIONS[1:] else ["-p", str(service.port)]))
        assert (done.returncode in (1, 3), done.stdout) == (True, ""), action
        assert re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr), action
        assert facts(path) == before, action


@pytest.mark.parametrize("given", ["option", "key"])
def test_the_configuration_is_refused_and_left_as_it_is(service: Service, given: str) -> None:
    path = service.configure(f"port = {service.port}\n" + ('pid_file = "daemontest.toml"\n' if given == "key" else ""))
    before = facts(path)
    assert_refused(service.run(*(["--pid-file", "daemontest.toml"] if given == "option" else [])), path)
    assert facts(path) == before
    assert not service.processes()


def test_the_handler_is_refused_and_left_as_it_is(service: Service) -> None:
    path = service.write_handler("def handle(text):\n    return text\n")
    before = facts(path)
    assert_refused(service.run("-p", str(service.port), "--handler", "service:handle", "--pid-file", path), path)
    assert facts(path) == before
    assert not service.processes()


@pytest.mark.parametrize("content", [b"x" * 32 + b"\n", b"x" * 32, b"12345", b"1" * 60 + b"\n"])
def test_a_number_or_one_short_word_is_a_leftover_and_replaced(service: Service, content: bytes) -> None:
    service.pid_file.write_bytes(content)
    manager = service.start("-w", "1")
    assert service.pid_file.read_bytes() == b"%d\n" % manager


# ---- Links ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["notes", "leftover", "missing"])
def test_a_symbolic_link_is_refused_and_leads_to_no_change(service: Service, target: str) -> None:
    link, file = service.home / "link", service.home / target
    link.symlink_to(target)
    if target != "missing":
        file.write_bytes(CONTENTS["notes"] if target == "notes" else b"4194305\n")
    before = file.exists() and facts(file)
    for action in ACTIONS:
        done = service.run(*action, "--pid-file", link, *([] if action else ["-p", str(service.port)]))
        assert (done.returncode in (1, 3), done.stdout) == (True, ""), action
        assert re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr), action
        assert link.is_symlink()
        assert (file.exists() and facts(file)) == before, action
    assert_refused(service.run("-p", str(service.port), "--pid-file", link), link)
    assert not service.processes()


def test_a_link_to_the_pid_file_of_a_running_service_does_it_no_harm(service: Service) -> None:
    manager = service.start("-w", "1")
    link = service.home / "link"
    link.symlink_to(service.pid_file)
    assert_refused(service.run("-p", str(service.port), "--pid-file", link), link)
    assert service.pid_file.read_text() == f"{manager}\n"
    assert service.run("--status").stdout == f"{manager}\n"


def test_a_directory_may_be_reached_by_a_link(service: Service) -> None:
    """As /var/run is."""
    (service.home / "real").mkdir()
    (service.home / "run").symlink_to("real")
    service.pid_file = service.home / "run" / "daemontest.pid"
    manager = service.start("-w", "1", "--pid-file", service.pid_file)
    assert (service.home / "real" / "daemontest.pid").read_text() == f"{manager}\n"
    stopped = service.run("-t", "--pid-file", service.pid_file)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert not list((service.home / "real").iterdir())


# ---- One file, two names --------------------------------------------------------------


SPELLINGS = {"dots": "here/../both", "a link": "link", "a hard link": "hard", "a linked directory": "there/both"}


def spell(service: Service, how: str) -> str:
    """Another name of the file called both."""
    (service.home / "here").mkdir()
    (service.home / "there").symlink_to(".")
    if how == "a link":
        (service.home / "link").symlink_to("both")
    if how == "a hard link":
        (service.home / "both").touch()
        (service.home / "hard").hardlink_to(service.home / "both")
    return SPELLINGS[how]


@pytest.mark.parametrize("how", SPELLINGS)
def test_the_pid_file_is_not_the_log_under_another_name(service: Service, how: str) -> None:
    name = spell(service, how)
    for pid_file in ("both", *([name] if how in ("dots", "a linked directory", "a hard link") else [])):
        log_file = name if pid_file == "both" else "both"
        done = service.run("-p", str(service.port), "--pid-file", pid_file, "--log-file", log_file)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr), done.stderr
        assert "both" in done.stderr or name in done.stderr
        assert not service.processes()
        for file in (service.home / "both", service.home / name):
            assert not file.exists() or file.read_bytes() == b""


@pytest.mark.parametrize("how", ["dots", "a link", "a linked directory"])
def test_a_reload_does_not_make_the_pid_file_the_log(service: Service, how: str) -> None:
    service.expected.append("Nothing Changed")
    service.pid_file = service.home / "both"
    name = spell(service, how)
    manager = service.start("-w", "1", "--pid-file", service.pid_file)
    service.configure(f'log_file = "{name}"')
    os.kill(manager, signal.SIGHUP)
    service.wait_for_records("Nothing Changed: ")
    service.ask("x")
    assert service.pid_file.read_text() == f"{manager}\n"
    assert service.run("-t", "--pid-file", service.pid_file).returncode == 0


# ---- Strangers ------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can signal the processes of others")


@pytest.fixture
def shared(service: Service) -> Iterator[Path]:
    """A directory that everybody may enter, for the PID file."""
    with tempfile.TemporaryDirectory(prefix="daemontest") as name:
        os.chmod(name, 0o755)
        service.pid_file = Path(name) / "daemontest.pid"
        yield service.pid_file


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that die of any signal."""
    sleeping: list[subprocess.Popen[bytes]] = []
    yield sleeping
    for sleeper in sleeping:
        sleeper.kill()
        sleeper.wait()


def sleep_as(user: int, lock: Path | None = None) -> subprocess.Popen[bytes]:
    """A process of USER's that has locked LOCK, which it may only read."""

    def become() -> None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        if lock:
            descriptor = os.open(lock, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.set_inheritable(descriptor, True)

    return subprocess.Popen(["sleep", "100"], cwd="/", preexec_fn=become, close_fds=False)


@needs_root
@pytest.mark.parametrize(("owner", "named"), [(0, NOBODY), (NOBODY, 0)], ids=["root's file", "nobody's file"])
def test_root_signals_no_process_that_is_not_the_files_owners_whoever_locked_it(
        service: Service, shared: Path, sleepers: list[subprocess.Popen[bytes]], owner: int, named: int) -> None:
    shared.touch()
    os.chown(shared, owner, -1)
    os.chmod(shared, 0o644)
    sleepers.append(sleep_as(NOBODY, shared))  # its lock keeps others out, though it may not write
    sleepers.append(sleep_as(named))
    with open(shared, "r+") as file:
        file.write(f"{sleepers[named == 0].pid}\n")
    before = facts(shared)
    for action in ("-t", "--reload"):
        done = service.run(action, "--pid-file", shared, timeout=20)
        assert (done.returncode, done.stdout) == (1, ""), action
        assert re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr), done.stderr
    started = service.run("-p", str(service.port), "--pid-file", shared, timeout=20)
    assert (started.returncode, started.stdout) == (1, "")
    assert [sleeper.poll() for sleeper in sleepers] == [None, None]
    assert facts(shared) == before


@needs_root
def test_a_leftover_with_a_strangers_process_stops_nobody_and_is_replaced(
        service: Service, shared: Path, sleepers: list[subprocess.Popen[bytes]]) -> None:
    sleepers.append(sleep_as(NOBODY))
    shared.write_text(f"{sleepers[0].pid}\n")
    done = service.run("-t", "--pid-file", shared)
    assert (done.returncode, done.stderr) == (1, "daemontest.py: not running\n")
    manager = service.start("-w", "1", "--pid-file", shared)
    assert shared.read_text() == f"{manager}\n"
    assert service.run("-t", "--pid-file", shared).returncode == 0
    assert sleepers[0].poll() is None


@needs_root
def test_root_can_stop_and_reload_the_service_of_another_user(service: Service, shared: Path) -> None:
    as_nobody = ["setpriv", "--reuid", str(NOBODY), "--clear-groups", "--inh-caps", "+dac_read_search",
                 "--ambient-caps", "+dac_read_search"]  # so that it can read this Python, wherever that is
    if not shutil.which("setpriv") or subprocess.run([*as_nobody, "true"], capture_output=True).returncode:
        pytest.skip("setpriv may not be run here")
    os.chown(shared.parent, NOBODY, -1)
    service.log_file = shared.with_name("daemontest.log")
    started = subprocess.run(
        [*as_nobody, sys.executable, DAEMON, "-p", str(service.port), "-w", "1", "--pid-file", shared,
         "--log-file", service.log_file], cwd="/", env=service.env, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=50)
    assert (started.returncode, started.stderr) == (0, "")
    manager = service.manager()
    assert os.stat(f"/proc/{manager}").st_uid == shared.stat().st_uid == NOBODY
    assert stat.S_IMODE(shared.stat().st_mode) & 0o022 == 0
    assert service.run("--status", "--pid-file", shared).stdout == f"{manager}\n"
    workers = service.workers()
    assert service.run("--reload", "--pid-file", shared).returncode == 0
    service.wait_for_new_workers(workers)
    assert service.run("-t", "--pid-file", shared).returncode == 0
    wait_until(lambda: not alive(manager), "the stop")
    assert not shared.exists()
