"""A machine to try units on: the real systemd as process 1 of namespaces of its own.

Its root is a throw-away overlay over that of the machine that runs the tests, so every program is there, and nothing
that happens in it reaches outside.  Its network is its own loopback device.  It boots in less than a second.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import daemon
import lockfile
import pytest
from conftest import DAEMON, DEADLINE, Load, Service, wait_until
from readme import block

CLONE_NEWNET = 0x40000000
BOOT = Path(__file__).with_name("boot_systemd.sh")
PYTHON = f"/opt/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}"


class Machine:
    def __init__(self, init: int) -> None:
        self.init = init
        self.root = Path(f"/proc/{init}/root")
        self.began = 0.0  # when the test did

    def run(self, command: str, timeout: float = 50) -> subprocess.CompletedProcess[str]:
        """A line of shell in the machine, as root."""
        return subprocess.run(["nsenter", "-t", str(self.init), "-a", "sh", "-c", command], cwd="/", text=True,
                              env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=timeout)

    def do(self, command: str) -> str:
        """A line of shell that must succeed; its output."""
        done = self.run(command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.do(f"systemctl show --value -p {name} {unit}").strip()

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Like conftest's, but asks less often: each question costs some processes."""
        def rested() -> Any:
            return condition() or time.sleep(0.2)

        wait_until(rested, what)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        (self.root / path[1:]).write_text(text)
        (self.root / path[1:]).chmod(mode)

    def enter_network(self) -> None:
        """From now on this thread alone opens its sockets in the machine."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{self.init}/ns/net") as network:
            if libc.setns(network.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def inside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call FUNCTION where its sockets are opened in the machine."""
        with ThreadPoolExecutor(1, initializer=self.enter_network) as thread:
            return thread.submit(function, *arguments).result()


class LoadInside(Load):
    """Load whose clients are in MACHINE."""

    def __init__(self, machine: Machine, service: Service, **options: Any) -> None:
        super().__init__(service, **options)
        self.machine = machine

    def ask_on(self, source: str) -> None:
        self.machine.enter_network()
        super().ask_on(source)


def install(machine: Machine) -> None:
    """What `pip install .` puts below the virtual environment /opt/daemontest, without a network."""
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):  # and is to be found where this Python is now
        machine.do("echo /opt/python/lib > /etc/ld.so.conf.d/python.conf && ldconfig")
    machine.do(f"{PYTHON} -m venv --without-pip /opt/daemontest")
    packages = machine.root / f"opt/daemontest/lib/{Path(PYTHON).name}/site-packages"
    for package in (daemon, lockfile):
        assert package.__file__
        source = Path(package.__file__).parent
        shutil.copytree(source, packages / source.name)
        for metadata in source.parent.glob(f"*{source.name}-*.dist-info"):  # python-daemon asks for its version
            shutil.copytree(metadata, packages / metadata.name)
    script = DAEMON.read_text().split("\n", 1)[1]
    machine.write("/opt/daemontest/bin/daemontest.py", f"#!/opt/daemontest/bin/python3\n{script}", 0o755)


def group_of_its_own() -> Path:
    """A new cgroup for the machine's systemd to rule."""
    for line in Path("/proc/mounts").read_text().split("\n"):
        if line.split(" ")[2:3] == ["cgroup2"]:
            group = Path(line.split(" ")[1], f"daemontest-{os.getpid()}")
            with suppress(OSError):
                group.mkdir()
                return group
    pytest.skip("no cgroup2 to give systemd a group of its own")


def find_systemd(unshared: subprocess.Popen[bytes], log: Path) -> int:
    """The PID of the machine's process 1, once it has become systemd.  Skips if it never does."""
    def found() -> int | None:
        if unshared.poll() is not None:
            pytest.skip(f"this machine does not let systemd start in namespaces of its own: {log.read_text().strip()}")
        children = Path(f"/proc/{unshared.pid}/task/{unshared.pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
            return int(children[0])
        return None

    pid: int = wait_until(found, "systemd to start")
    return pid


def set_up(machine: Machine) -> None:
    """By README's commands, but for pip's, which needs a network."""
    for command in block("useradd .*").strip().split("\n"):
        if "pip install" not in command:
            machine.do(command)


@contextmanager
def booted() -> Iterator[Machine]:
    """The machine, with daemontest installed.  Skips, saying why, where it cannot be."""
    for name in ("/lib/systemd/systemd", "unshare", "nsenter", "pivot_root", "ip", "useradd"):
        if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            pytest.skip(f"{name} is not installed")
    if os.geteuid():
        pytest.skip("only root can make a machine of its own")
    group = group_of_its_own()
    base = tempfile.mkdtemp(prefix="daemontest-machine-")
    log = Path(f"{base}.log")
    start = ('echo 0 > "$1/cgroup.procs" && shift && '
             'exec unshare --pid --fork --kill-child --mount --net --uts --ipc --cgroup "$@"')
    with log.open("wb") as console:
        unshared = subprocess.Popen(["sh", "-c", start, "sh", group, "sh", str(BOOT), base, sys.base_prefix],
                                    stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True)
    try:
        machine = Machine(find_systemd(unshared, log))
        wait_until(lambda: machine.run("systemctl is-system-running").stdout in ("running\n", "degraded\n"), "its boot")
        install(machine)
        set_up(machine)
        yield machine
        os.kill(machine.init, signal.SIGRTMIN + 3)  # halt
        unshared.wait(DEADLINE)
    finally:
        unshared.kill()  # which kills process 1, and so all others
        unshared.wait()
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the machine's processes to go")
        for directory, _, _ in os.walk(group, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)
        os.rmdir(base)
        log.unlink()
