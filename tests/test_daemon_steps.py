"""The steps that make a process a daemon: whatever it was started from, it keeps nothing of it."""

import fcntl
import os
import select
import stat
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import Service, serving

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at processes through Linux's /proc")


@dataclass
class Daemon:
    """A service started in bad manners: from a terminal, with umask 0 and descriptors of its parent's."""

    service: Service
    terminal: int  # the launching command's tty_nr
    eof: bool  # whether what the launching command had open was closed when it returned
    foreign: set[str] = field(default_factory=set)  # what the parent's descriptors lead to

    def everyone(self) -> list[int]:
        return [self.service.manager(), *self.service.workers()]


def stat_fields(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat from the third on (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def descriptors(pid: int) -> dict[int, str]:
    """What the open descriptors of PID lead to."""
    return {int(name): os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}


def access_mode(pid: int, descriptor: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text().splitlines())
    return int(fields["flags"], 8) & os.O_ACCMODE


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    home = tmp_path_factory.mktemp("hygiene") / "home"
    controlling, terminal = os.openpty()
    reading, writing = os.pipe()

    def bad_manners() -> None:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        os.umask(0)

    with serving(home) as service, open(home / "secret", "w") as secret:
        options = {"stdin": terminal, "cwd": home, "start_new_session": True, "preexec_fn": bad_manners,
                   "pass_fds": (secret.fileno(), writing)}
        probe = subprocess.run([sys.executable, "-c", "print(open('/proc/self/stat').read().rpartition(')')[2])"],
                               **options, stdout=subprocess.PIPE, text=True, check=True)  # type: ignore[call-overload]
        foreign = {os.readlink(f"/proc/self/fd/{number}") for number in (terminal, writing, secret.fileno())}
        service.start("-w", "3", **options)
        os.close(writing)
        os.close(terminal)
        eof = bool(select.select([reading], [], [], 5)[0]) and os.read(reading, 1) == b""
        yield Daemon(service, int(probe.stdout.split()[4]), eof, foreign)
    os.close(reading)
    os.close(controlling)


def test_it_has_a_session_of_its_own_without_a_terminal(daemon: Daemon) -> None:
    assert daemon.terminal != 0
    manager = daemon.service.manager()
    sessions = {os.getsid(pid) for pid in daemon.everyone()}
    assert len(sessions) == 1
    assert not sessions & {os.getsid(0), manager}  # who leads no session cannot get a terminal again
    assert [stat_fields(pid)[4] for pid in daemon.everyone()] == ["0"] * 4


def test_its_working_directory_is_the_root(daemon: Daemon) -> None:
    assert [os.readlink(f"/proc/{pid}/cwd") for pid in daemon.everyone()] == ["/"] * 4


def test_its_umask_is_its_own(daemon: Daemon) -> None:
    assert [status(pid)["Umask"] for pid in daemon.everyone()] == ["0027"] * 4


def test_its_log_is_for_owner_and_group_only_and_its_pid_file_for_nobody_else_to_write(daemon: Daemon) -> None:
    assert stat.filemode(daemon.service.log_file.stat().st_mode) == "-rw-r-----"
    assert daemon.service.pid_file.stat().st_mode & 0o022 == 0


def test_its_standard_streams_are_the_null_device_and_the_log(daemon: Daemon) -> None:
    log = str(daemon.service.log_file)
    for pid in daemon.everyone():
        opened = descriptors(pid)
        assert [opened[number] for number in range(3)] == ["/dev/null", log, log]


def test_it_keeps_nothing_open_of_what_its_parent_had(daemon: Daemon) -> None:
    assert daemon.eof
    for pid in daemon.everyone():
        assert not set(descriptors(pid).values()) & daemon.foreign


def listeners(pid: int) -> set[int]:
    return {connection.fd for connection in psutil.Process(pid).net_connections() if connection.status == "LISTEN"}


def test_every_descriptor_of_the_manager_is_explained(daemon: Daemon) -> None:
    manager = daemon.service.manager()
    opened = descriptors(manager)
    [listener] = listeners(manager)
    kinds = Counter("pipe" if name.startswith("pipe:") else name
                    for number, name in opened.items() if number not in (0, 1, 2, listener))
    pid_file = str(daemon.service.pid_file)
    assert kinds == {pid_file: 1, "pipe": 2}  # the pipe whose end of file tells the workers that the manager is gone
    assert len({name for name in opened.values() if name.startswith("pipe:")}) == 1


def test_every_descriptor_of_a_worker_is_explained(daemon: Daemon) -> None:
    managers = set(descriptors(daemon.service.manager()).values())
    for worker in daemon.service.workers():
        opened = descriptors(worker)
        [listener] = listeners(worker)
        rest = {number: name for number, name in opened.items() if number not in (0, 1, 2, listener)}
        [lifeline] = [number for number, name in rest.items() if name in managers]  # so not the PID file
        assert rest[lifeline].startswith("pipe:")
        assert access_mode(worker, lifeline) == os.O_RDONLY
        own = Counter(name for number, name in rest.items() if number != lifeline)
        # What it waits with, and the pipe by which a signal ends the wait: of its own, or they would wake others.
        assert own.pop("anon_inode:[eventpoll]") == 1
        [(pipe, ends)] = own.items()
        assert (pipe[:5], ends) == ("pipe:", 2)
        others = set().union(*(descriptors(pid).values() for pid in daemon.everyone() if pid != worker))
        assert pipe not in others
