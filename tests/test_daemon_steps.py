"""The steps that make a process a daemon: whatever it was started from, it keeps nothing of it."""

import fcntl
import os
import select
import stat
import subprocess
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from conftest import Service, serving, wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at processes through Linux's /proc")


@dataclass
class Daemon:
    """A service started in bad manners: from a terminal, with umask 0 and descriptors of its parent's."""

    service: Service
    terminal: int  # the launching command's tty_nr
    eof: bool  # whether what the launching command had open was closed when it returned
    foreign: set[str] = field(default_factory=set)  # what the parent's descriptors lead to

    def everyone(self) -> list[int]:
        """The manager, the generation and three workers."""
        return [self.service.manager(), *self.service.generations(), *self.service.workers()]


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
    assert len(daemon.everyone()) == 5
    sessions = {os.getsid(pid) for pid in daemon.everyone()}
    assert len(sessions) == 1
    assert not sessions & {os.getsid(0), manager}  # who leads no session cannot get a terminal again
    assert [stat_fields(pid)[4] for pid in daemon.everyone()] == ["0"] * 5


def test_its_working_directory_is_the_root(daemon: Daemon) -> None:
    assert [os.readlink(f"/proc/{pid}/cwd") for pid in daemon.everyone()] == ["/"] * 5


def test_its_umask_is_its_own(daemon: Daemon) -> None:
    assert [status(pid)["Umask"] for pid in daemon.everyone()] == ["0027"] * 5


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


READING, WRITING, OWN = {os.O_RDONLY}, {os.O_WRONLY}, {os.O_RDONLY, os.O_WRONLY}  # the ends of a pipe


def opened_beside_the_usual(pid: int) -> tuple[dict[str, set[int]], list[str]]:
    """What PID has open beside standard streams and listener: pipes, with the ends that it has, and all else."""
    [listener] = listeners(pid)
    pipes: dict[str, set[int]] = {}
    others = []
    for number, name in descriptors(pid).items():
        if name.startswith("pipe:"):
            pipes.setdefault(name, set()).add(access_mode(pid, number))
        elif number not in (0, 1, 2, listener):
            others.append(name)
    return pipes, others


def sockets(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("socket:")]


def test_every_descriptor_of_the_manager_is_explained(daemon: Daemon) -> None:
    manager, generation = daemon.service.manager(), daemon.service.generation()
    # The connection with the launching command ends a moment after that command; that with the generation stays.
    wait_until(lambda: len(sockets(opened_beside_the_usual(manager)[1])) == 1, "one connection alone")
    pipes, others = opened_beside_the_usual(manager)
    assert sorted({*others} - {*sockets(others)}) == [str(daemon.service.pid_file)]
    assert [*pipes.values()] == [OWN]  # by which a signal ends its wait
    theirs = opened_beside_the_usual(generation)
    assert not {*pipes} & {*theirs[0]}
    assert not {*others} & {*theirs[1]}


def test_every_descriptor_of_the_generation_is_explained(daemon: Daemon) -> None:
    generation = daemon.service.generation()
    pipes, others = opened_beside_the_usual(generation)
    assert len(sockets(others)) == 1  # the connection with the manager
    assert sorted({*others} - {*sockets(others)}) in ([], ["/"])  # the working directory; not the PID file
    # By one a signal ends its wait; the end of the other tells the workers that it is gone.
    assert [*pipes.values()] == [OWN, OWN]


def test_every_descriptor_of_a_worker_is_explained(daemon: Daemon) -> None:
    generation = daemon.service.generation()
    managers, generations = (set(opened_beside_the_usual(pid)[0]) for pid in (daemon.service.manager(), generation))
    for worker in daemon.service.workers():
        pipes, others = opened_beside_the_usual(worker)
        assert sorted({*others} - {"/"}) == ["anon_inode:[eventpoll]"]  # what it waits with; not the PID file
        # One tells it that the generation is gone; by the other, its own, a signal ends its wait, and nobody else's.
        assert sorted(pipes.values(), key=sorted) == [READING, OWN]
        assert not set(pipes) & managers
        assert [pipes[name] for name in set(pipes) & generations] == [READING]
        rest = set().union(*(descriptors(pid).values() for pid in daemon.everyone() if pid != worker))
        assert [pipes[name] for name in set(pipes) - rest] == [OWN]
