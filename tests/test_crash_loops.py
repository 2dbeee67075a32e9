"""A service whose workers die does not spin, can be stopped, and recovers when it can."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Load, Service, wait_until

DEADLY = """
import os, signal

def handle(text):
    match text:
        case "kill": os.kill(os.getpid(), signal.SIGKILL)
        case "segv": os.kill(os.getpid(), signal.SIGSEGV)
        case "exit": os._exit(3)
    return text
"""

DIES_AT_BIRTH = """
import os

def die():
    if os.path.exists("{HOME}/die"):
        os._exit(7)

os.register_at_fork(after_in_child=die)

def handle(text):
    return text
"""


def assert_stops(service: Service) -> None:
    began = time.monotonic()
    stopped = service.stop()
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert time.monotonic() - began < 20  # of the grace of 30 s
    assert not service.processes()


def test_workers_that_die_at_each_request_are_forked_at_a_bounded_rate(service: Service) -> None:
    service.expected.append("Child Process Died")
    service.write_handler(DEADLY)
    service.start("-w", "3", "--handler", "service:handle")
    began = time.monotonic()
    with Load(service, 2, b"kill") as first, Load(service, 2, b"segv") as second, Load(service, 2, b"exit") as third:
        service.wait_for_records("Child Process Died", 9)  # each place filled, died and filled again twice
        assert time.monotonic() - began > 1.5
        assert len(service.records("Child Process Started.")) <= 3 * (time.monotonic() - began + 2)
        assert_stops(service)
        assert first.replies == second.replies == third.replies == []
    assert {match["message"] for match in service.records("Child Process Died")} <= {
        "Child Process Died. (SIGKILL)", "Child Process Died. (SIGSEGV)", "Child Process Died. (exit status 3)"}


def test_the_log_names_what_a_worker_died_of_while_others_serve_and_it_is_replaced(service: Service) -> None:
    service.expected.append("Child Process Died")
    service.write_handler(DEADLY)
    service.start("-w", "4", "--handler", "service:handle")
    before, dead = service.workers(), set()
    for count, (text, cause) in enumerate((("kill", "SIGKILL"), ("segv", "SIGSEGV"), ("exit", "exit status 3")), 1):
        try:
            assert service.ask(text) == ""
        except ConnectionResetError:
            pass
        assert service.ask("x").endswith(" x\n")
        died = service.wait_for_records("Child Process Died", count)[-1]
        assert died["message"] == f"Child Process Died. ({cause})"
        assert died["pid"] in {record["pid"] for record in service.records("Child Process Started.")}
        dead.add(int(died["pid"]))
    assert len(dead) == 3
    wait_until(lambda: len(service.workers()) == 4, "new workers")
    assert before - service.workers() == before & dead  # a replacement may be among the dead, if this took a second


def test_workers_that_die_at_birth_are_forked_at_a_bounded_rate(service: Service) -> None:
    service.expected.append("Child Process Died")
    service.write_handler(DIES_AT_BIRTH.replace("{HOME}", str(service.home)))
    service.start("-w", "3", "--handler", "service:handle")
    (service.home / "die").touch()
    began = time.monotonic()
    for worker in service.workers():  # whose places are filled at once, since they leave in good order
        os.kill(worker, signal.SIGTERM)
    service.wait_for_records(r"Child Process Died\. \(exit status 7\)", 6)
    deaths = len(service.records("Child Process Died"))
    assert deaths <= 3 * (time.monotonic() - began + 2)
    (service.home / "die").unlink()
    wait_until(lambda: len(service.workers()) == 3, "workers that live")
    assert service.ask("x").endswith(" x\n")
    assert_stops(service)


def test_a_reload_whose_workers_die_at_birth_changes_nothing(service: Service) -> None:
    service.expected += ["Child Process Died", "Nothing Changed: "]
    service.write_handler(DIES_AT_BIRTH.replace("{HOME}", str(service.home)))
    manager = service.start("-w", "3", "--handler", "service:handle")
    generation, workers = service.generations(), service.workers()
    (service.home / "die").touch()
    os.kill(manager, signal.SIGHUP)
    [failed] = service.wait_for_records("Nothing Changed: ")
    assert failed["message"] == "Nothing Changed: cannot start: a worker died (exit status 7)"
    wait_until(lambda: service.processes() == {manager, *generation, *workers}, "the failed to go")
    assert 1 <= len(service.records(r"Child Process Died\. \(exit status 7\)")) <= 3
    assert service.ask("x").endswith(" x\n")
    (service.home / "die").unlink()
    os.kill(manager, signal.SIGHUP)
    service.wait_for_new_workers(workers)
    assert_stops(service)


def test_a_start_whose_workers_die_at_birth_fails_and_leaves_nothing(service: Service) -> None:
    service.expected += ["cannot start: a worker died", "Child Process Died"]
    service.write_handler(DIES_AT_BIRTH.replace("{HOME}", str(service.home)))
    (service.home / "die").touch()
    done = service.run("-p", str(service.port), "--handler", "service:handle")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "daemontest.py: cannot start: a worker died (exit status 7)\n"
    assert not service.processes()
    assert not service.pid_file.exists()


# ---- fork() that fails ---------------------------------------------------------------

PIDS = Path("/sys/fs/cgroup/pids")


@pytest.fixture
def limit(service: Service) -> Iterator[Callable[..., None]]:
    """Sets how many processes there may be in a control group, and puts manager and generation into it.

    Those two are as many as there may be at "2"; workers forked later belong to the group, too.  With PID, that process
    is put into a group of its own, where no zombie of another try counts.
    """
    group = PIDS / f"daemontest-{service.mark}"
    try:
        group.mkdir()
        assert (group / "pids.max").exists()
    except (OSError, AssertionError):
        pytest.skip("needs root and the pids controller of cgroup v1")

    def set_limit(value: str, pid: int | None = None) -> None:
        place = group / value if pid else group
        place.mkdir(exist_ok=True)
        (place / "pids.max").write_text(value)
        for moved in [pid] if pid else [service.manager(), *service.generations()]:
            (place / "cgroup.procs").write_text(str(moved))

    yield set_limit
    (group / "pids.max").write_text("max")
    if service.pid_file.exists():
        service.stop()
    for place in (*filter(Path.is_dir, group.iterdir()), group):
        for pid in (place / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda: not (place / "cgroup.procs").read_text(), "the control group to be empty")  # noqa: B023
        place.rmdir()


FAILURE = "cannot fork a worker: Resource temporarily unavailable"


def test_a_fork_that_fails_is_logged_and_tried_again(service: Service, limit: Callable[..., None]) -> None:
    manager = service.start("-w", "2")
    generation = service.generation()
    limit("2")
    staying, leaving = service.workers()
    began = time.monotonic()
    os.kill(leaving, signal.SIGTERM)
    service.wait_for_records(FAILURE, 2)
    first, second = service.records(FAILURE)[:2]
    assert first["pid"] == second["pid"] == str(generation)
    wait_until(lambda: service.workers() == {staying}, "the other to be gone")
    assert int(service.ask("x").split()[0]) == staying
    limit("max")
    wait_until(lambda: len(service.workers()) == 2, "the missing worker")
    assert staying in service.workers()
    assert (service.manager(), service.generations()) == (manager, {generation})
    failures = len(service.records(FAILURE))
    assert failures <= time.monotonic() - began + 2  # one a second
    assert_stops(service)


def test_forks_that_fail_leave_no_place_empty_for_ever(service: Service, limit: Callable[..., None]) -> None:
    service.start("-w", "3")
    old = service.workers()
    limit("3")  # room for one new worker
    for worker in old:
        os.kill(worker, signal.SIGTERM)
    service.wait_for_records(FAILURE)
    assert service.ask("x").endswith(" your text size: 1\n")
    limit("max")
    wait_until(lambda: len(service.workers()) == 3 and not service.workers() & old, "new workers")


@pytest.mark.parametrize(("most", "why"), [
    ("2", "cannot fork a generation: Resource temporarily unavailable"), ("3", FAILURE), ("4", FAILURE)])
def test_a_reload_for_which_forks_fail_changes_nothing(
        service: Service, limit: Callable[..., None], most: str, why: str) -> None:
    service.expected.append(f"Nothing Changed: {why}")
    manager = service.start("-w", "2")
    generation, old = service.generations(), service.workers()
    limit(most)
    os.kill(manager, signal.SIGHUP)
    [failed] = service.wait_for_records("Nothing Changed: ")
    assert failed["message"] == f"Nothing Changed: {why}"
    wait_until(lambda: service.processes() == {manager, *generation, *old}, "the failed to go")
    assert service.ask("x").endswith(" your text size: 1\n")
    limit("max")
    os.kill(manager, signal.SIGHUP)
    service.wait_for_new_workers(old)
    assert_stops(service)


def test_a_generation_that_cannot_be_forked_anew_is_tried_again(
        service: Service, limit: Callable[..., None]) -> None:
    service.expected += [r"Generation Died\. \(SIGKILL\)", "Generation Failed: cannot fork a generation: "]
    manager = service.start("-w", "2")
    generation = service.generation()
    limit("1")
    os.kill(generation, signal.SIGKILL)
    [failed, *_] = service.wait_for_records("Generation Failed: ", 2)
    assert failed["message"] == "Generation Failed: cannot fork a generation: Resource temporarily unavailable"
    limit("max")
    assert service.ask("x").endswith(" your text size: 1\n")
    assert service.manager() == manager
    assert_stops(service)


def test_a_service_that_cannot_fork_stops_on_request(service: Service, limit: Callable[..., None]) -> None:
    service.expected.append("Nothing Changed: cannot fork a generation: ")
    manager = service.start("-w", "2")
    limit("2")
    os.kill(min(service.workers()), signal.SIGTERM)
    service.wait_for_records(FAILURE)
    os.kill(manager, signal.SIGHUP)
    service.wait_for_records("Nothing Changed: ")
    assert_stops(service)


def test_a_start_that_cannot_fork_says_so_and_leaves_nothing(service: Service, limit: Callable[..., None]) -> None:
    service.expected += ["Manager Failed: cannot fork"]
    refused = []
    for most in range(1, 10):
        done = service.run("-p", str(service.port), "-w", "3",
                           preexec_fn=lambda: limit(str(most), os.getpid()))  # noqa: B023
        if done.returncode == 0:
            assert service.stop().returncode == 0
        else:
            refused.append(most)
            assert (done.returncode, done.stdout) == (1, ""), most
            assert re.fullmatch(r"daemontest\.py: cannot [^\n]+: [^\n]*Resource temporarily unavailable\n",
                                done.stderr), (most, done.stderr)
        assert not service.processes(), most
        assert not service.pid_file.exists()
    # There are the launcher, its child, manager, generation and workers; init may leave a zombie of the way.
    assert refused in ([*range(1, 7)], [*range(1, 8)], [*range(1, 9)])
