"""What a handler keeps is not lost when its worker leaves, which ends as a Python program does, within the grace."""

import gzip
import os
import re
import signal
import time
from collections.abc import Callable

import psutil
import pytest
from conftest import MARK, Service, alive, wait_until

TOLD = ["file opened at import", "binary file opened at import", "file", "atexit", "thread", "pool"]  # told
KEPT = sorted([*TOLD, "atexit at import"])
OVERDUE = r"Child Process Died\. \(SIG[A-Z]+: not done within the grace\)"


def kept(service: Service, worker: int) -> list[str]:
    """What has been kept of WORKER's handler, in alphabetical order."""
    file = service.home / "kept"
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted(line.split(" ", 1)[1] for line in lines if line.startswith(f"{worker} "))


def everything(service: Service) -> set[int]:
    """Every living process that comes of this service, whatever it runs by now."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == service.mark and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def ask_all(service: Service) -> int:
    """Have one worker keep all that there is to keep; its PID."""
    told = {service.ask(text).split()[0] for text in TOLD}
    assert len(told) == 1
    return int(told.pop())


def wait_for_all_to_leave(service: Service, workers: set[int]) -> None:
    """Wait until WORKERS, which have had their requests, are gone.  One stays on while too many others are leaving."""
    wait_until(lambda: service.ask("x") and not any(map(alive, workers)), "workers to leave")


# ---- However a worker leaves ----------------------------------------------------------


def recycle(service: Service, worker: int) -> None:
    """Nothing is left to do: the worker has had its requests."""


def reload(service: Service, worker: int) -> None:
    assert service.run("--reload").returncode == 0


def stop(service: Service, worker: int) -> None:
    assert service.stop().returncode == 0
    assert not alive(worker)  # whoever waits for the command may read what was kept


def tell_to_leave(service: Service, worker: int) -> None:
    os.kill(worker, signal.SIGTERM)
    wait_until(lambda: [match for match in service.records("Caught SIGTERM") if int(match["pid"]) == worker],
               "the worker to notice")


def kill_manager(service: Service, worker: int) -> None:
    os.kill(service.manager(), signal.SIGKILL)


@pytest.mark.parametrize("leave", [recycle, reload, stop, tell_to_leave, kill_manager])
def test_files_are_written_exit_functions_run_and_threads_and_pools_finish(
        service: Service, leave: Callable[[Service, int], None]) -> None:
    requests = len(TOLD) if leave is recycle else 100
    manager = service.start("-w", "1", "-n", str(requests), *service.use_handler("keeps"))
    worker = ask_all(service)
    leave(service, worker)
    wait_until(lambda: not alive(worker), "the worker to leave")
    assert kept(service, worker) == KEPT
    assert f"\nexit of {worker}\n" in service.log  # what is printed then is not lost either
    assert kept(service, manager) == []
    if leave is kill_manager:
        wait_until(lambda: not everything(service), "all processes to go")


def test_workers_that_had_nothing_to_do_run_their_exit_functions_too(service: Service) -> None:
    service.start("-w", "3", *service.use_handler("keeps"))
    workers = service.workers()
    service.stop()
    assert [kept(service, worker) for worker in workers] == [["atexit at import"]] * 3


def test_a_compressed_file_is_whole(service: Service) -> None:
    service.start("-w", "1", *service.use_handler("keeps"))
    service.ask("compressed file")
    service.stop()
    with gzip.open(service.home / "compressed", "rt") as file:
        assert file.read() == "compressed file"


def test_what_takes_its_time_keeps_neither_the_client_nor_the_next_one_waiting(service: Service) -> None:
    service.start("-w", "1", "-n", "1", *service.use_handler("keeps"))
    first = int(service.ask("patient thread").split()[0])
    began = time.monotonic()
    second = int(service.ask("x").split()[0])
    assert time.monotonic() - began < 10  # of the half minute for which that thread is patient
    assert alive(first)
    assert kept(service, first) == []
    (service.home / "go").touch()
    wait_until(lambda: not alive(first), "the worker to leave")
    assert kept(service, first) == ["atexit at import", "patient thread"]
    assert second != first
    assert not service.records("Child Process Died")


def test_a_worker_that_leaves_takes_nothing_along_that_is_the_managers(service: Service) -> None:
    manager = service.start("-w", "2", "-n", "1", *service.use_handler("keeps"))
    wait_for_all_to_leave(service, {int(service.ask("x").split()[0]) for _ in range(3)})
    assert service.pid_file.read_text() == f"{manager}\n"
    assert service.run("--status").stdout == f"{manager}\n"
    assert service.ask("x").endswith(" x\n")


def test_what_its_module_begins_outlives_the_workers_and_ends_with_the_generation(service: Service) -> None:
    service.start("-w", "1", "-n", "1", *service.use_handler("begins_at_import"))
    gone = set()
    for _ in range(3):
        worker, helper, directory = service.ask("x").split()
        gone.add(int(worker))
    wait_for_all_to_leave(service, gone)
    assert alive(int(helper))
    assert os.path.isdir(directory)
    assert service.stop().returncode == 0
    assert not everything(service)
    assert not os.path.exists(directory)


# ---- Nothing is left behind -----------------------------------------------------------


def test_no_process_of_a_pool_is_left_after_a_stop_or_a_reload(service: Service) -> None:
    service.start("-w", "3", *service.use_handler("keeps"))
    for _ in range(20):
        service.ask("pool at work")
    before = everything(service)
    assert len(before) > 5  # manager, generation and workers
    assert service.run("--reload").returncode == 0
    wait_until(lambda: not everything(service) & before - {service.manager()}, "the old workers and their pools to go")
    service.ask("pool at work")
    assert service.stop().returncode == 0
    assert not everything(service)
    assert not service.records("Child Process Died")


# ---- All within the grace -------------------------------------------------------------


@pytest.mark.parametrize("what", ["thread", "atexit", "atexit without alarm", "pool"])
def test_at_a_stop_what_never_ends_is_killed_after_the_grace_and_logged(service: Service, what: str) -> None:
    service.expected.append(OVERDUE)
    service.start("-w", "2", "--grace", "1", *service.use_handler("keeps"))
    worker = int(service.ask(f"endless {what}").split()[0])
    began = time.monotonic()
    stopped = service.stop()
    assert 0.9 < time.monotonic() - began < 15  # half of the grace that there is without being told
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert not alive(worker)
    wait_until(lambda: not everything(service), "what has been killed to go")
    assert [int(match["pid"]) for match in service.records(OVERDUE)] == [worker]
    assert service.records()[-1]["message"] == "Server Terminated."


@pytest.mark.parametrize("what", ["thread", "atexit without alarm"])
@pytest.mark.parametrize("leave", [recycle, reload, tell_to_leave])
def test_what_never_ends_is_killed_after_the_grace_while_others_serve(
        service: Service, leave: Callable[[Service, int], None], what: str) -> None:
    service.expected.append(OVERDUE)
    requests = "1" if leave is recycle else "100"
    service.start("-w", "1", "-n", requests, "--grace", "2.5", *service.use_handler("keeps"))
    worker = int(service.ask(f"endless {what}").split()[0])
    began = time.monotonic()
    leave(service, worker)
    assert int(service.ask("x").split()[0]) != worker
    assert alive(worker)
    wait_until(lambda: not alive(worker), "the worker to be killed")
    assert 2.3 < time.monotonic() - began < 15
    [died] = service.wait_for_records("Child Process Died")
    assert int(died["pid"]) == worker
    assert re.fullmatch(OVERDUE, died["message"])
