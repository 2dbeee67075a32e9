"""The PID file's lock says whether the service runs: a leftover blocks nothing, a stranger's file loses nothing."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import DAEMON, Service, alive

NOBODY = 65534
Sleep = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def sleep_as() -> Iterator[Sleep]:
    """Start a process of USER's, that dies of any signal, and holds a lock on the file LOCK, which it may only read."""
    sleeping: list[subprocess.Popen[bytes]] = []

    def sleep(user: int, lock: Path | None = None) -> subprocess.Popen[bytes]:
        def become() -> None:
            if user != os.getuid():
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            if lock:
                descriptor = os.open(lock, os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.set_inheritable(descriptor, True)

        sleeping.append(subprocess.Popen(["sleep", "100"], cwd="/", preexec_fn=become, close_fds=False,
                                         start_new_session=True))
        return sleeping[-1]

    yield sleep
    for process in sleeping:
        process.kill()
        process.wait()


def facts(path: Path) -> tuple[int, bytes, int, int, int, int] | None:
    """Return what must not change of the file at PATH, or of the link there and its target."""
    if not path.exists():
        return None
    status, content = path.stat(), path.read_bytes() if path.is_file() else b""
    return path.lstat().st_mode, content, status.st_ino, status.st_uid, status.st_mode, status.st_mtime_ns


def assert_all_fail(service: Service, path: Path, why: str = "") -> None:
    """Each action with PATH as the PID file fails, in one line that says WHY, and changes nothing."""
    before, processes = facts(path), service.processes()
    commands = [["-t"], ["--status"], ["--reload"], ["-p", str(service.port)]]
    with ThreadPoolExecutor() as pool:  # each in its own session, or a mistaken kill(0) would end the tests, too
        outcomes = [*pool.map(lambda each: service.run(*each, "--pid-file", path, start_new_session=True), commands)]
    for done in outcomes:
        assert (done.returncode in (1, 3), done.stdout) == (True, ""), done
        assert re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr), done
    assert why in outcomes[3].stderr
    assert str(path) in outcomes[3].stderr
    assert facts(path) == before
    assert service.processes() == processes


# ---- Leftovers ------------------------------------------------------------------------

@pytest.mark.parametrize("content", ["", "x" * 32, "0\n", "4194305\n", "PID\n", "-PID\n"])
def test_leftover_is_not_running_not_signalled_and_not_in_the_way(
        service: Service, sleep_as: Sleep, content: str) -> None:
    stranger = sleep_as(os.getuid())
    content = content.replace("PID", str(stranger.pid))
    service.pid_file.write_text(content)
    for action, status in ("-t", 1), ("--status", 3), ("--reload", 1):
        done = service.run(action, start_new_session=True)
        assert (done.returncode, done.stdout) == (status, "")
        assert done.stderr == f"daemontest.py: not running (PID file {service.pid_file})\n"
    assert service.pid_file.read_text() == content
    manager = service.start("-w", "1", start_new_session=True)
    assert service.pid_file.read_text() == f"{manager}\n"
    assert service.stop().returncode == 0
    assert not service.pid_file.exists()
    assert stranger.poll() is None


def test_directory_may_be_reached_by_a_link_and_is_left_empty(service: Service) -> None:
    """Such a link is /var/run."""
    (service.home / "real").mkdir()
    (service.home / "run").symlink_to("real")
    path = service.home / "run" / "daemontest.pid"
    manager = service.start("-w", "1", "--pid-file", path)
    assert (service.home / "real" / "daemontest.pid").read_text() == f"{manager}\n"
    assert service.run("--reload", "--pid-file", path).returncode == 0
    assert service.run("-t", "--pid-file", path).returncode == 0
    assert not list((service.home / "real").iterdir())


# ---- What is no PID file --------------------------------------------------------------

@pytest.mark.parametrize("content", ["buy milk\n", "x" * 33 + "\n", "17\n" + " " * 5000 + "notes\n"],
                         ids=["two words", "a word of 33", "a number first"])
def test_file_with_more_than_a_word_is_refused_and_left_as_it_is(service: Service, content: str) -> None:
    path = service.home / "mine"
    path.write_text(content)
    assert_all_fail(service, path)


@pytest.mark.parametrize(("make", "name", "why"), [
    (Path.mkdir, "pid", "Is a directory"),
    (os.mkfifo, "pid", "not a regular file"),
    (lambda path: path.parent.touch(), "below/pid", "Not a directory"),
    (lambda path: None, "nowhere/pid", "No such file or directory"),
], ids=["directory", "FIFO", "below a file", "nowhere"])
def test_impossible_pid_file_is_reported(service: Service, make: Callable[[Path], None], name: str, why: str) -> None:
    make(service.home / name)
    assert_all_fail(service, service.home / name, f"{service.home / name}: {why}")


@pytest.mark.parametrize("target", ["notes", "running", "missing", "itself"])
def test_symbolic_link_is_refused_and_leads_to_no_change(service: Service, target: str) -> None:
    link, file = service.home / "link", service.home / "daemontest.pid"
    if target == "running":
        service.start("-w", "1")
    elif target == "notes":
        file.write_text("notes and more\n")
    link.symlink_to(link if target == "itself" else file)
    assert_all_fail(service, link, "is a symbolic link")
    assert link.is_symlink()
    assert file.exists() == (target not in ("missing", "itself"))


def test_full_file_system_is_told(service: Service) -> None:
    mounted = service.home / "mounted"
    mounted.mkdir()
    script = 'mount -t tmpfs -o size=4096 none "$0" && head -c 4096 /dev/zero > "$0/full" && "$@"; status=$?; ' \
             'ls "$0"; exit $status'
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", mounted], capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, mounted, sys.executable, DAEMON, "-p", str(service.port),
         "--pid-file", mounted / "pid"], env=service.env, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (1, "full\n")
    assert re.fullmatch(r"daemontest\.py: [^\n]*No space left on device[^\n]*\n", done.stderr), done.stderr
    assert not service.processes()


# ---- Strangers ------------------------------------------------------------------------

def test_stranger_who_holds_the_lock_is_reported_not_signalled(service: Service, sleep_as: Sleep) -> None:
    service.pid_file.touch()
    stranger = sleep_as(os.getuid(), service.pid_file)
    service.pid_file.write_text(f"-{stranger.pid}\n")
    assert_all_fail(service, service.pid_file)
    assert stranger.poll() is None
    service.pid_file.unlink()


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
    assert os.stat(f"/proc/{service.manager()}").st_uid == shared.stat().st_uid == NOBODY
    return service.manager()


@needs_root
@pytest.mark.parametrize(("owner", "named"), [(0, NOBODY), (NOBODY, 0)], ids=["root's file", "nobody's file"])
def test_only_processes_of_the_files_owner_are_signalled(service: Service, shared: Path, sleep_as: Sleep,
                                                             owner: int, named: int) -> None:
    shared.touch(0o644)
    os.chown(shared, owner, -1)
    locker, sleeper = sleep_as(NOBODY, shared), sleep_as(named)
    shared.write_text(f"{(sleeper if named == 0 else locker).pid}\n")
    assert_all_fail(service, shared)
    assert (locker.poll(), sleeper.poll()) == (None, None)
    shared.unlink()


@needs_root
def test_any_user_may_ask_for_the_status_and_nothing_else(service: Service, shared: Path) -> None:
    manager = service.start("-w", "1", "--pid-file", shared)
    asked = run_as_nobody(service, "--status", "--pid-file", shared)
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, f"{manager}\n", "")
    for action in ("-t", "--reload"):
        done = run_as_nobody(service, action, "--pid-file", shared)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"daemontest\.py: [^\n]*not permitted[^\n]*\n", done.stderr), done.stderr
    assert alive(manager)
    assert service.run("-t", "--pid-file", shared).returncode == 0


@needs_root
@pytest.mark.parametrize("trap", ["none", "symbolic link", "FIFO", "missing"])
def test_root_can_reload_and_stop_anothers_service_and_falls_into_no_trap(
        service: Service, shared: Path, nobodys: int, trap: str) -> None:
    """Whatever that user puts in the place of any file beside the PID file."""
    secret = service.home / "secret"
    secret.write_text("1 1 secret\n")
    secret.chmod(0o600)
    before = facts(secret)
    for file in {*shared.parent.iterdir()} - {shared, service.log_file} if trap != "none" else ():
        file.unlink()
        if trap == "symbolic link":
            file.symlink_to(secret)
        elif trap == "FIFO":
            os.mkfifo(file)
            os.chown(file, NOBODY, -1)
    names = {*shared.parent.iterdir()}
    done = service.run("--reload", "--pid-file", shared, timeout=30)
    assert done.stdout == f"daemontest.py: {nobodys} reloaded\n" if trap == "none" else done.returncode in (0, 1)
    assert "secret" not in done.stdout + done.stderr
    assert not done.stderr or re.fullmatch(r"daemontest\.py: [^\n]+\n", done.stderr)
    assert facts(secret) == before
    assert {*shared.parent.iterdir()} <= names
    assert {file.lstat().st_uid for file in shared.parent.iterdir() if not file.is_symlink()} == {NOBODY}
    assert service.run("--status", "--pid-file", shared).stdout == f"{nobodys}\n"
    assert service.run("-t", "--pid-file", shared).returncode == 0
    assert not alive(nobodys)
