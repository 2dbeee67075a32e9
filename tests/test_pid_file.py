"""The PID file's lock says whether the service runs: a leftover blocks nothing, and the file costs nobody anything."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import DAEMON, Service, alive, wait_until

ACTIONS = ["-t", "--status", "--reload"]
NOBODY = 65534


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process, with a process group of its own, that dies of any signal."""
    sleep = subprocess.Popen(["sleep", "300"], start_new_session=True)
    yield sleep
    sleep.kill()
    sleep.wait()


def facts(path: Path) -> tuple[bytes, int, int, int, int] | None:
    """What must not change of the file at PATH."""
    if not path.exists():
        return None
    status = path.stat()
    return path.read_bytes(), status.st_ino, status.st_uid, status.st_mode, status.st_mtime_ns


def try_all(service: Service, path: Path) -> list[subprocess.CompletedProcess[str]]:
    """Every action with PATH as the PID file, in a session of its own, which is what a signal to "process 0" ends."""
    commands = [[action] for action in ACTIONS] + [["-p", str(service.port)], ["-f", "-p", str(service.port)]]
    with ThreadPoolExecutor() as pool:
        return [*pool.map(lambda command: service.run(*command, "--pid-file", path, start_new_session=True), commands)]


def assert_all_fail(service: Service, path: Path) -> None:
    """Every action with PATH as the PID file fails, in one line, and nothing is started."""
    for done in try_all(service, path):
        assert (done.returncode in (1, 3), done.stdout) == (True, ""), done
        assert re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr), done
    assert not service.processes()


# ---- Leftovers ----------------------------------------------------------------------


LEFTOVERS = {
    "empty": b"", "a word": b"garbage\n", "a word of 32": b"x" * 32, "binary": bytes(range(0x80, 0xa0)),
    "negative": b"-1\n", "zero": b"0\n", "one": b"1\n", "huge": b"9" * 32 + b"\n", "beyond the last PID": b"4194305\n",
    "not ASCII": "\u0661\u0662\u0663\n".encode(), "no newline": b"12345",
    "a stranger": b"%d\n", "a stranger's group": b"-%d\n",
}


@pytest.mark.parametrize("content", LEFTOVERS.values(), ids=LEFTOVERS.keys())
def test_a_leftover_is_not_running_not_signalled_and_not_in_the_way(
        service: Service, stranger: subprocess.Popen[bytes], content: bytes) -> None:
    content = content.replace(b"%d", b"%d" % stranger.pid)
    service.pid_file.write_bytes(content)
    with ThreadPoolExecutor() as pool:
        outcomes = [*pool.map(lambda action: service.run(action, start_new_session=True), ACTIONS)]
    assert [(done.returncode, done.stdout, done.stderr) for done in outcomes] == [
        (status, "", f"daemontest.py: not running (PID file {service.pid_file})\n") for status in (1, 3, 1)]
    assert service.pid_file.read_bytes() == content
    manager = service.start("-w", "1", start_new_session=True)
    assert service.pid_file.read_bytes() == b"%d\n" % manager
    assert service.pid_file.stat().st_mode & 0o777 == 0o644
    assert service.ask("x").endswith(" your text size: 1\n")
    assert service.stop().returncode == 0
    assert not service.pid_file.exists()
    assert stranger.poll() is None


def test_nothing_is_left_beside_a_pid_file_that_has_been_removed(service: Service) -> None:
    (service.home / "run").mkdir()
    path = service.home / "run" / "my.pid"
    for _ in range(2):
        service.start("-w", "1", "--pid-file", path)
        assert service.run("--reload", "--pid-file", path).returncode == 0
        assert service.run("-t", "--pid-file", path).returncode == 0
        assert not list(path.parent.iterdir())


def test_a_start_succeeds_over_all_that_a_killed_manager_has_left(service: Service) -> None:
    for _ in range(2):
        manager = service.start("-w", "1")
        os.kill(manager, signal.SIGKILL)
        wait_until(lambda: not service.processes(), "all to go")
        assert service.pid_file.read_text() == f"{manager}\n"
    manager = service.start("-w", "1")
    assert service.run("--reload").stdout == f"daemontest.py: {manager} reloaded\n"


# ---- Files of the user's ------------------------------------------------------------


FILES = {
    "notes": b"Milk, bread\nCall Anna at 5\n", "two words": b"buy milk\n", "two numbers": b"17\n18\n",
    "a word of 33": b"x" * 33 + b"\n", "a long word": b"x" * 5000, "a picture": bytes(range(256)) * 20,
    "blank lines and more": b"\n\nnotes\nnotes\n", "many blank lines and more": b"\n" * 5000 + b"notes\nnotes\n",
    "a number and much later more": b"17\n" + b" " * 5000 + b"notes\n",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_a_file_with_more_than_a_word_is_refused_and_left_as_it_is(service: Service, content: bytes) -> None:
    path = service.home / "mine"
    path.write_bytes(content)
    before = facts(path)
    assert_all_fail(service, path)
    assert facts(path) == before
    assert str(path) in service.run("-p", str(service.port), "--pid-file", path).stderr


@pytest.mark.parametrize("name", ["daemontest.toml", "service.py"])
def test_configuration_and_handler_are_refused_and_left_as_they_are(service: Service, name: str) -> None:
    service.configure(f"port = {service.port}\nhandler = 'service:handle'\n")
    service.write_handler("def handle(text):\n    return text\n")
    before = facts(service.home / name)
    assert_all_fail(service, service.home / name)
    service.configure(f"port = {service.port}\nhandler = 'service:handle'\npid_file = '{name}'\n")
    before = facts(service.home / name)
    done = service.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert str(service.home / name) in done.stderr
    assert facts(service.home / name) == before
    assert not service.processes()


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o20600, os.stat("/dev/null").st_rdev)
    except PermissionError:
        pytest.skip("only root can make a device")


@pytest.mark.parametrize(("make", "name", "why"), [
    (Path.mkdir, "pid", "Is a directory"), (lambda path: path.symlink_to(path.name), "pid", "is a symbolic link"),
    (os.mkfifo, "pid", "not a regular file"), (make_device, "pid", "not a regular file"),
    (lambda path: path.parent.touch(), "below/pid", "Not a directory"),
    (lambda path: None, "nowhere/pid", "No such file or directory"),
], ids=["directory", "loop", "FIFO", "device", "below a file", "nowhere"])
def test_a_pid_file_that_cannot_be_is_told_and_left_as_it_is(service: Service, make: Callable[[Path], None], name: str,
                                                             why: str) -> None:
    path = service.home / name
    make(path)
    before = [(file, file.lstat().st_mode) for file in sorted(service.home.iterdir())]
    assert_all_fail(service, path)
    assert f"{path}: {why}" in service.run("-p", str(service.port), "--pid-file", path).stderr
    assert [(file, file.lstat().st_mode) for file in sorted(service.home.iterdir())] == before


@pytest.mark.parametrize(("prepare", "why", "left"), [
    ("mount -o remount,ro . &&", "Read-only file system", ""),
    ("echo 1 > pid && mount -o remount,ro . &&", "Read-only file system", "pid\n"),
    ("head -c 4096 /dev/zero > full &&", "No space left on device", "full\n"),
], ids=["read-only", "read-only with a leftover", "full"])
def test_a_file_system_that_takes_no_pid_file_is_told(service: Service, prepare: str, why: str, left: str) -> None:
    mounted = service.home / "mounted"
    mounted.mkdir()
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", mounted], capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    script = f'mount -t tmpfs -o size=4096 none "$0" && cd "$0" && {prepare} "$@"; status=$?; ls "$0"; exit $status'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, mounted, sys.executable, DAEMON, "-p", str(service.port),
         "--pid-file", mounted / "pid"], cwd=service.home, env=service.env, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (1, left)
    assert re.fullmatch(rf"daemontest\.py: [^\n]*{why}[^\n]*\n", done.stderr), done.stderr
    assert not service.processes()


# ---- Links --------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"notes and more\n", b"4194305\n", b"%d\n", None],
                         ids=["notes", "leftover", "running", "missing"])
def test_a_symbolic_link_is_refused_and_leads_to_no_change(service: Service, content: bytes | None) -> None:
    link, file = service.home / "link", service.home / "daemontest.pid"
    manager = service.start("-w", "1") if content == b"%d\n" else None
    if content and not manager:
        file.write_bytes(content)
    before = facts(file)
    link.symlink_to(file)
    for done in try_all(service, link):
        assert (done.returncode in (1, 3), done.stdout) == (True, ""), done
        assert re.fullmatch(r"daemontest\.py: [^\n]*link[^\n]*\n", done.stderr), done
    assert link.is_symlink()
    assert facts(file) == before
    if manager:
        assert service.run("--status").stdout == f"{manager}\n"


def test_a_directory_may_be_reached_by_a_link(service: Service) -> None:
    """As /var/run is."""
    (service.home / "real").mkdir()
    (service.home / "run").symlink_to("real")
    path = service.home / "run" / "daemontest.pid"
    manager = service.start("-w", "1", "--pid-file", path)
    assert (service.home / "real" / "daemontest.pid").read_text() == f"{manager}\n"
    assert service.run("--reload", "--pid-file", path).returncode == 0
    assert service.run("-t", "--pid-file", path).returncode == 0
    assert not list((service.home / "real").iterdir())


# ---- Strangers ----------------------------------------------------------------------


def test_a_file_that_a_stranger_has_locked_is_one_line_and_no_signal(
        service: Service, stranger: subprocess.Popen[bytes]) -> None:
    contents = [b"garbage\n", b"-1\n", b"", b"-%d\n" % stranger.pid, b"9" * 14 + b"\n", b"4194305\n"]
    paths = [service.home / f"{number}.pid" for number in range(len(contents))]
    with ExitStack() as stack:
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
            fcntl.flock(stack.enter_context(path.open("r+b")), fcntl.LOCK_EX)
            assert_all_fail(service, path)
        assert [path.read_bytes() for path in paths] == contents
    assert stranger.poll() is None
    service.start("-w", "1", "--pid-file", paths[0])  # now that it is free
    assert service.run("-t", "--pid-file", paths[0]).returncode == 0


def test_a_start_that_an_asker_keeps_from_the_lock_ends_in_one_line(service: Service) -> None:
    service.pid_file.touch()
    with service.pid_file.open() as file:  # as by a --status that has been suspended
        fcntl.flock(file, fcntl.LOCK_SH)
        done = service.run("-p", str(service.port), "-w", "1")
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr), done.stderr
        assert not service.processes()
    service.start("-w", "1")


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can signal the processes of others")
AS_NOBODY = ["setpriv", "--reuid", str(NOBODY), "--clear-groups", "--inh-caps", "+dac_read_search",
             "--ambient-caps", "+dac_read_search"]  # so that it can read this Python, wherever that is


@pytest.fixture
def shared(service: Service) -> Iterator[Path]:
    """A PID file in a directory that everybody may enter."""
    with tempfile.TemporaryDirectory(prefix="daemontest") as name:
        os.chmod(name, 0o755)
        service.pid_file = Path(name) / "daemontest.pid"
        yield service.pid_file


def run_as_nobody(service: Service, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which("setpriv") or subprocess.run([*AS_NOBODY, "true"], capture_output=True).returncode:
        pytest.skip("setpriv may not be run here")
    return subprocess.run([*AS_NOBODY, sys.executable, DAEMON, *map(str, arguments)], cwd="/", env=service.env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50)


@pytest.fixture
def nobodys(service: Service, shared: Path) -> int:
    """The manager of a service of nobody's, whose directory is nobody's, too."""
    os.chown(shared.parent, NOBODY, -1)
    service.log_file = shared.with_name("daemontest.log")
    done = run_as_nobody(service, "-p", str(service.port), "-w", "1", "--pid-file", shared, "--log-file",
                         service.log_file)
    assert (done.returncode, done.stderr) == (0, "")
    manager = service.manager()
    assert os.stat(f"/proc/{manager}").st_uid == shared.stat().st_uid == NOBODY
    return manager


@pytest.fixture
def sleep_as() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process of USER's, that dies of any signal, and has locked LOCK, which it may only read."""
    sleeping: list[subprocess.Popen[bytes]] = []

    def sleep(user: int, lock: Path | None = None) -> subprocess.Popen[bytes]:
        def become() -> None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            if lock:
                descriptor = os.open(lock, os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.set_inheritable(descriptor, True)

        sleeping.append(subprocess.Popen(["sleep", "100"], cwd="/", preexec_fn=become, close_fds=False))
        return sleeping[-1]

    yield sleep
    for process in sleeping:
        process.kill()
        process.wait()


@needs_root
@pytest.mark.parametrize(("owner", "named"), [(0, NOBODY), (NOBODY, 0)], ids=["root's file", "nobody's file"])
def test_no_process_that_is_not_the_files_owners_is_signalled_or_believed_whoever_locked_it(
        service: Service, shared: Path, sleep_as: Callable[..., subprocess.Popen[bytes]], owner: int,
        named: int) -> None:
    shared.touch()
    os.chown(shared, owner, -1)
    os.chmod(shared, 0o644)
    locker = sleep_as(NOBODY, shared)  # its lock keeps others out, though it may not write
    sleeper = sleep_as(named)
    shared.write_text(f"{(sleeper if named == 0 else locker).pid}\n")
    before = facts(shared)
    for done in try_all(service, shared):
        assert (done.returncode in (1, 3), done.stdout) == (True, ""), done
        assert re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr), done
    assert (locker.poll(), sleeper.poll()) == (None, None)
    assert facts(shared) == before


@needs_root
def test_a_monitor_of_any_user_may_ask_for_the_status_and_nothing_else(service: Service, shared: Path) -> None:
    manager = service.start("-w", "1", "--pid-file", shared)
    asked = run_as_nobody(service, "--status", "--pid-file", shared)
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, f"{manager}\n", "")
    for action in ("-t", "--reload"):
        done = run_as_nobody(service, action, "--pid-file", shared)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"daemontest\.py: [^\n]*not permitted[^\n]*\n", done.stderr), done.stderr
    assert alive(manager)
    assert service.run("-t", "--pid-file", shared).returncode == 0
    asked = run_as_nobody(service, "--status", "--pid-file", shared)
    assert (asked.returncode, asked.stderr) == (3, f"daemontest.py: not running (PID file {shared})\n")


@needs_root
def test_root_can_stop_and_reload_the_service_of_another_user(service: Service, shared: Path, nobodys: int) -> None:
    assert service.run("--status", "--pid-file", shared).stdout == f"{nobodys}\n"
    workers = service.workers()
    assert service.run("--reload", "--pid-file", shared).stdout == f"daemontest.py: {nobodys} reloaded\n"
    service.wait_for_new_workers(workers)
    assert {file.stat().st_uid for file in shared.parent.iterdir()} == {NOBODY}
    assert service.run("-t", "--pid-file", shared).returncode == 0
    assert not alive(nobodys)
    assert not shared.exists()


@needs_root
@pytest.mark.parametrize("trap", ["symbolic link", "FIFO", "missing"])
def test_roots_reload_of_another_users_service_follows_changes_and_creates_nothing(
        service: Service, shared: Path, nobodys: int, trap: str) -> None:
    """Whatever that user puts in the place of any file beside the PID file."""
    secret = service.home / "secret"
    secret.write_text("1 1 secret\n")
    secret.chmod(0o600)
    before = facts(secret)
    for file in {*shared.parent.iterdir()} - {shared, service.log_file}:
        file.unlink()
        if trap == "symbolic link":
            file.symlink_to(secret)
        elif trap == "FIFO":
            os.mkfifo(file)
            os.chown(file, NOBODY, -1)
    names = {*shared.parent.iterdir()}
    done = service.run("--reload", "--pid-file", shared, timeout=30)
    assert done.returncode in (0, 1)
    assert "secret" not in done.stdout + done.stderr
    assert not done.stderr or re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr)
    assert facts(secret) == before
    assert {*shared.parent.iterdir()} <= names or trap == "missing"
    assert {file.lstat().st_uid for file in shared.parent.iterdir() if not file.is_symlink()} == {NOBODY}
    assert service.run("--status", "--pid-file", shared).stdout == f"{nobodys}\n"
    assert service.run("-t", "--pid-file", shared).returncode == 0


@needs_root
def test_a_reload_does_not_wait_without_end_when_the_directory_cannot_be_listed(service: Service,
                                                                                shared: Path) -> None:
    manager = service.start("-w", "1", "--pid-file", shared)
    shared.parent.chmod(0o311)
    done = service.run("--reload", "--pid-file", shared, preexec_fn=lambda: os.umask(0o277) and None, timeout=30)
    assert (done.returncode, done.stdout) == (0, f"daemontest.py: {manager} reloaded\n")
    shared.parent.chmod(0o755)
    assert service.run("-t", "--pid-file", shared).returncode == 0
