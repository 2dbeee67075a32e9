"""The command of the README's container, in one: as process 1 and nobody, on a root that is read-only."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import DAEMON, DEADLINE, ROOT, Service, wait_until
from readme import block, program


class Container:
    """Like `docker run --read-only --tmpfs /tmp` with the README's ENTRYPOINT, but for the network, which is shared."""

    def __init__(self, service: Service, *arguments: str, cgroup: Path | None = None) -> None:
        """ARGUMENTS follow the command.  The service's home can be read in its place."""
        self.service = service
        entrypoint = re.search(r"^ENTRYPOINT (.*)$", block("USER nobody"), re.MULTILINE)
        assert entrypoint
        self.command = json.loads(entrypoint[1])
        seen = [str(path) for path in (ROOT, sys.prefix, sys.base_prefix, service.home)]  # though it may lie in /tmp
        jail = [program("bwrap"), "--unshare-all", "--share-net", "--as-pid-1", "--die-with-parent",
                "--uid", "65534", "--gid", "65534", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc",
                "--tmpfs", "/tmp", *(word for path in seen for word in ("--ro-bind", path, path)),
                "--setenv", "HOME", "/nonexistent"]
        trial = subprocess.run([*jail, "true"], capture_output=True, text=True, timeout=DEADLINE)
        if trial.returncode:
            pytest.skip(f"bubblewrap does not work here: {trial.stderr.strip()}")
        enter = ["sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', cgroup] if cgroup else []
        with service.log_file.open("a") as log:
            self.bwrap = subprocess.Popen(
                [*enter, *jail, sys.executable, DAEMON, *self.command[1:], "-p", str(service.port), *arguments],
                cwd="/", env=service.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self) -> Container:
        self.service.wait_for_records("Child Process Started.")
        self.manager, = self.service.children(self.bwrap.pid)
        self.service.serving_generation(self.manager)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bwrap.poll() is None:
            self.bwrap.kill()  # and so process 1, and so all
            self.bwrap.wait(DEADLINE)
        wait_until(lambda: not self.service.processes(), "the container's processes to go")

    def execute(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The daemon's command in the container, like `docker exec`."""
        enter = [program("nsenter"), "-t", str(self.manager), "--user", "--mount", "--pid", "--preserve-credentials"]
        return subprocess.run([*enter, sys.executable, DAEMON, *arguments], cwd="/", env=self.service.env, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=50)


def test_it_serves_as_process_1_and_nobody_where_it_can_write_nothing_but_its_pid_file(service: Service) -> None:
    with Container(service) as container:
        assert service.ask("あ").endswith(" your text size: 1\n")
        status = Path(f"/proc/{container.manager}/status").read_text()
        assert re.search(r"^NSpid:\t\d+\t1$", status, re.MULTILINE)
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
        [mapped] = Path(f"/proc/{container.manager}/uid_map").read_text().strip().split("\n")
        assert mapped.split()[0] == "65534"
        root = Path(f"/proc/{container.manager}/root")
        assert (root / "tmp/daemontest.pid").read_text() == "1\n"
        assert service.records("Daemon Server Started.")[0]["pid"] == "1"


def test_term_ends_it_within_a_moment(service: Service) -> None:
    with Container(service) as container:
        service.ask("x")
        begun = time.monotonic()
        os.kill(container.manager, signal.SIGTERM)
        assert container.bwrap.wait(DEADLINE) == 0
        assert time.monotonic() - begun < 5  # of a normal one's tenth of a second
        assert service.records("Server Terminated.")


def test_it_reloads_from_within(service: Service) -> None:
    """By the command shown for `docker exec`."""
    commands = block("docker build -t daemontest .")
    shown = re.search(r"^docker exec daemontest daemontest\.py (.*)$", commands, re.MULTILINE)
    assert shown
    shutil.copy(Path(__file__).with_name("data") / "one_word.py", service.home)
    (service.home / "word").write_text("old")
    configuration = service.configure('handler = "one_word:handle"\n')
    with Container(service, "-c", str(configuration)) as container:
        assert service.ask("x").endswith(" old\n")
        (service.home / "word").write_text("new")
        done = container.execute(*shown[1].split())
        assert (done.returncode, done.stdout, done.stderr) == (0, "daemontest.py: 1 reloaded\n", "")
        assert {service.ask("x").split()[1] for _ in range(6)} == {"new"}


def test_it_buries_every_orphan(service: Service) -> None:
    configuration = service.configure(f'handler = "{service.use_handler("leaves_orphans")[1]}"\nworkers = 2\n')
    with Container(service, "-c", str(configuration)) as container:
        manager = psutil.Process(container.manager)
        before = len(manager.children())
        assert len(service.ask("10").split()) == 11
        assert len(manager.children()) == before + 10
        (service.home / "go").touch()
        wait_until(lambda: len(manager.children()) == before, "the orphans to be buried")


def test_without_a_place_for_the_pid_file_it_says_so(service: Service) -> None:
    """As it would in a container without the command's --pid-file, or without --tmpfs."""
    container = Container(service, "--pid-file", "/nonexistent/daemontest.pid")
    try:
        assert container.bwrap.wait(DEADLINE) == 1
        assert service.log == ("daemontest.py: cannot use PID file /nonexistent/daemontest.pid: "
                               "No such file or directory\n")
    finally:
        container.__exit__()


# ---- Memory -----------------------------------------------------------------------------


def new_group(megabytes: int) -> Path:
    """A new cgroup whose processes may have so much memory.  Skips where there can be none."""
    for line in Path("/proc/mounts").read_text().split("\n"):
        _, place, kind, options, *_ = [*line.split(" "), *[""] * 4]
        names = {"memory.limit_in_bytes": kind == "cgroup" and "memory" in options.split(","),
                 "memory.max": kind == "cgroup2"}
        group = Path(place, f"daemontest-memory-{os.getpid()}")
        for name in (name for name, found in names.items() if found):
            with suppress(OSError):
                group.mkdir()
                try:
                    (group / name).write_text(f"{megabytes << 20}\n")
                except OSError:
                    group.rmdir()
                    raise
                return group
    pytest.skip("no cgroup in which to limit memory")


@contextmanager
def limited_to(megabytes: int) -> Iterator[Path]:
    group = new_group(megabytes)
    try:
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the cgroup to be empty")
        group.rmdir()


def test_at_the_memory_limit_a_worker_is_killed_and_replaced(service: Service) -> None:
    service.expected.append(r"Child Process Died. \(SIGKILL\)")
    configuration = service.configure(f'handler = "{service.use_handler("takes_memory")[1]}"\n')
    with limited_to(200) as cgroup, Container(service, "-c", str(configuration), cgroup=cgroup) as container:
        assert service.ask("1000000").endswith(" took 1000000\n")
        workers = service.workers(container.manager)
        assert service.ask(str(500 << 20)) == ""
        service.wait_for_records(r"Child Process Died. \(SIGKILL\)")
        assert service.ask("1000000").endswith(" took 1000000\n")
        wait_until(lambda: len(service.workers(container.manager)) == 5, "the killed worker's successor")
        assert len(workers - service.workers(container.manager)) == 1
        assert service.children(container.bwrap.pid) == {container.manager}
