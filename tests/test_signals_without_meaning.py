"""A signal that means nothing changes nothing; one that ends a worker is named in the log."""

import os
import signal
import socket
from pathlib import Path

import pytest
from conftest import Gate, Service, read_all, wait_until

MEANT = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD}
FAULTS = {signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS}
# Those that stop a process are for whoever has it in hand, at the terminal or with a debugger.
STOPPING = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
MEANINGLESS = sorted(signal.valid_signals() - MEANT - FAULTS - STOPPING - {signal.SIGKILL})
IGNORED_BY_WORKERS = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE,
                      signal.SIGALRM]

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at signals through Linux's /proc")


def send(pid: int, signals: list[int] | list[signal.Signals]) -> None:
    """Send SIGNALS to PID, and wait until all have arrived."""
    for signum in signals:
        os.kill(pid, signum)
    sent = sum(1 << signum - 1 for signum in signals)

    def pending() -> int:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return (int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)) & sent

    wait_until(lambda: not pending(), "signals to arrive")


def test_none_changes_anything_for_the_manager(service: Service) -> None:
    assert signal.SIGUSR2 in MEANINGLESS
    assert len(MEANINGLESS) > 30  # with the real-time signals
    manager = service.start("-w", "2")
    everybody, log = {manager, *service.generations(), *service.workers()}, service.log
    wait_until(lambda: service.processes() == everybody, "those who forked the manager to end")
    for signum in MEANINGLESS:
        send(manager, [signum])
    for _ in range(2):
        send(manager, list(MEANINGLESS))
    assert service.processes() == everybody
    assert service.log == log
    assert int(service.ask("x").split()[0]) in everybody
    assert service.run("--status").stdout == f"{manager}\n"


def test_none_changes_anything_for_a_manager_that_waits_for_an_import(service: Service) -> None:
    service.write_handler("import os, time\nwhile not os.path.exists(f'{os.path.dirname(__file__)}/go'):\n"
                          "    time.sleep(0.01)\ndef handle(text):\n    return text\n")
    start = service.popen("-p", str(service.port), "-w", "1", "--handler", "service:handle")
    service.wait_for_records("Loading configuration.")
    send(service.manager(), list(MEANINGLESS))
    (service.home / "go").touch()
    out, err = start.communicate(timeout=50)
    assert (start.returncode, err) == (0, "")
    assert out == f"daemontest.py: {service.manager()} started, 1 workers on port {service.port}\n"
    assert service.ask("x").endswith(" x\n")


@pytest.mark.parametrize("when", ["idle", "handler running", "text on its way"])
def test_workers_ignore_what_is_not_for_them(service: Service, when: str) -> None:
    gate = Gate(service)
    service.start("-w", "1", *gate.arguments)
    [worker] = service.workers()
    with service.connect() as client:
        if when != "idle":
            client.sendall(b"x\n" if when == "handler running" else b"x" * 3000)
            wait_until(lambda: service.has_client(worker), "the worker to accept")
        if when == "handler running":
            gate.wait_for()
        for _ in range(2):
            send(worker, IGNORED_BY_WORKERS)
        gate.open()
        if when != "handler running":
            client.sendall(b"\n")
            client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"%d let through\n" % worker
    assert service.workers() == {worker}
    assert not service.records("Caught")


def test_a_generation_ignores_what_is_not_for_it(service: Service) -> None:
    service.start("-w", "2")
    generation = service.generation()
    workers = service.workers()
    for _ in range(2):
        send(generation, IGNORED_BY_WORKERS)
    assert int(service.ask("x").split()[0]) in workers
    assert service.generations() == {generation}
    assert service.workers() == workers
    assert not service.records("Caught")


def test_a_real_time_signal_that_kills_a_worker_is_named(service: Service) -> None:
    names = {signal.SIGRTMIN: "SIGRTMIN", signal.SIGRTMIN + 1: r"SIGRTMIN\+1", signal.SIGRTMIN + 5: r"SIGRTMIN\+5"}
    service.expected.append(r"Child Process Died\. \(SIGRTMIN")
    service.start("-w", str(len(names)))
    workers = sorted(service.workers())
    for worker, (signum, name) in zip(workers, names.items(), strict=True):
        os.kill(worker, signum)
        service.wait_for_records(rf"Child Process Died\. \({name}\)$")
    died = {int(match["pid"]): match["message"] for match in service.records("Child Process Died")}
    assert died == {worker: "Child Process Died. ({})".format(name.replace("\\", ""))
                    for worker, name in zip(workers, names.values(), strict=True)}
