"""A generation is a process of its own between the manager and the workers: it comes, goes and dies without loss."""

import os
import signal
import time
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise

import psutil
import pytest
from conftest import Gate, Load, Service, alive, read_all, wait_until

ONE = "def handle(text):\n    return 'one'"
TWO = "def handle(text):\n    return 'two'"
BROKEN = "raise RuntimeError('no good')"


def messages(service: Service, pid: int) -> list[str]:
    return [match["message"] for match in service.records() if int(match["pid"]) == pid]


def wait_for_reply(service: Service, reply: str) -> None:
    wait_until(lambda: service.ask("x").partition(" ")[2] == f"{reply}\n", f"the reply {reply!r}")


def seconds_between(first: dict[str, str], second: dict[str, str]) -> float:
    """The time from one record to another."""
    return (datetime.fromisoformat(second["time"]) - datetime.fromisoformat(first["time"])).total_seconds()


# ---- Processes ------------------------------------------------------------------------


def test_the_manager_has_a_generation_which_has_the_workers(service: Service) -> None:
    manager = service.start("-w", "3")
    generation = service.generation()
    workers = service.workers()
    assert len(workers) == 3
    assert service.processes() == {manager, generation, *workers}
    for process in (generation, *workers):
        assert os.getpgid(process) == process
        assert os.getsid(process) == os.getsid(manager)


def test_the_handler_is_imported_by_the_generation_once(service: Service) -> None:
    service.write_handler(f"""
import os
IMPORTED_BY = f"{{os.getpid()}} {{os.getppid()}}"
with open({str(service.home / "imports")!r}, "a") as file:
    file.write(IMPORTED_BY + "\\n")

def handle(text):
    return f"{{IMPORTED_BY}} {{os.getppid()}}"
""")
    manager = service.start("-w", "2", "-n", "1", "--handler", "service:handle")
    imports = ""
    for _ in range(2):
        generation = service.generation()
        imports += f"{generation} {manager}\n"
        replies = []
        for _ in range(5):
            replies.append(service.ask("x").split())
            # Beside too many that leave, a worker would serve more than one.
            wait_until(lambda: not alive(int(replies[-1][0])), "the worker to go")  # noqa: B023
        assert len({worker for worker, *_ in replies}) == 5
        assert {tuple(rest) for _, *rest in replies} == {(str(generation), str(manager), str(generation))}
        assert (service.home / "imports").read_text() == imports
        os.kill(manager, signal.SIGHUP)
        wait_until(lambda old=generation: service.generations() and old not in service.generations(), "a reload")


def test_the_coming_and_going_of_generations_is_told_in_few_words(service: Service) -> None:
    manager = service.start("-w", "1")
    first, [old] = service.generation(), service.workers()
    os.kill(manager, signal.SIGHUP)
    [new] = service.wait_for_new_workers({old})
    second = service.generation()
    assert service.stop().returncode == 0
    assert messages(service, manager) == [
        "Daemon Server Started. Prefork Workers: 1.", "Max Requests per Child: 100", f"Manager Process ID: {manager}",
        "Caught SIGHUP", f"Manager Process ID: {manager}", "Caught SIGTERM", "Server Terminated."]
    assert messages(service, first) == messages(service, second) == ["Loading configuration."]
    for worker in (old, new):
        assert messages(service, worker) == ["Child Process Started.", "Caught SIGTERM", "Child Process Ended. (100)"]
    assert {int(match["pid"]) for match in service.records()} == {manager, first, second, old, new}


# ---- Reload -----------------------------------------------------------------------------


def test_the_last_generation_is_told_to_leave_when_the_next_is_up_and_never_before(service: Service) -> None:
    manager = service.start("-w", "3")
    for _ in range(5):
        old = service.workers()
        os.kill(manager, signal.SIGHUP)
        new = service.wait_for_new_workers(old)
        told = [(int(match["pid"]), match["message"]) for match in service.records()]
        last_up = max(told.index((worker, "Child Process Started.")) for worker in new)
        first_left = min(told.index((worker, "Caught SIGTERM")) for worker in old)
        assert last_up < first_left


def test_hups_that_come_while_a_generation_leaves_wait_for_it_and_are_one(service: Service) -> None:
    gate = Gate(service)
    manager = service.start("-w", "2", *gate.arguments)
    first, old = service.generation(), service.workers()
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = gate.wait_for()
        os.kill(manager, signal.SIGHUP)
        wait_until(lambda: service.workers() & old == {busy}, "the idle worker to leave")
        [second] = service.generations() - {first}
        for count in range(2, 6):
            os.kill(manager, signal.SIGHUP)
            service.wait_for_records("Caught SIGHUP", count)
        assert service.run("--status").returncode == 0
        assert service.generations() == {first, second}
        assert len(service.records("Loading configuration.")) == 2
        gate.open()
        assert read_all(client) == b"%d let through\n" % busy
    wait_until(lambda: not service.generations() & {first, second}, "the third generation")
    assert service.ask("x").endswith(" let through\n")
    assert len(service.records("Loading configuration.")) == 3
    assert len(service.workers()) == 2


def test_a_failed_one_leaves_nothing_but_a_line_in_the_log(service: Service) -> None:
    service.expected.append("Nothing Changed: ")
    service.write_handler(ONE)
    manager = service.start("-w", "2", "--handler", "service:handle")
    processes, opened, log = service.processes(), psutil.Process(manager).num_fds(), service.log
    service.write_handler(BROKEN)
    os.kill(manager, signal.SIGHUP)
    [failed] = service.wait_for_records("Nothing Changed: ")
    assert failed["message"] == "Nothing Changed: cannot load handler service:handle: RuntimeError: no good"
    wait_until(lambda: service.processes() == processes and not zombies(manager), "the failed to go")
    wait_until(lambda: psutil.Process(manager).num_fds() <= opened, f"no more than {opened} descriptors")
    added = service.log.removeprefix(log).split("\n")[:-1]
    assert [line.split(" ", 3)[3] for line in added] == [
        "Caught SIGHUP", f"Manager Process ID: {manager}", "Loading configuration.", failed["message"]]


def zombies(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children() if child.status() == psutil.STATUS_ZOMBIE]


def test_thirty_reloads_leave_neither_descriptors_nor_zombies_nor_memory_behind(service: Service) -> None:
    manager = service.start("-w", "1")
    process = psutil.Process(manager)

    def reload() -> None:
        generation, workers = service.generation(), service.workers()
        os.kill(manager, signal.SIGHUP)
        wait_until(lambda: generation not in service.generations() and not workers & service.workers()
                   and service.workers(), "a reload")

    def settle() -> None:
        service.generation()
        wait_until(lambda: not zombies(manager), "the last one to be reaped")

    reload()
    settle()
    opened, memory = process.num_fds(), process.memory_full_info().uss
    for _ in range(30):
        reload()
    settle()
    wait_until(lambda: process.num_fds() <= opened, f"no more than {opened} descriptors")
    assert process.memory_full_info().uss < memory + 500e3


# ---- Death ------------------------------------------------------------------------------


def stop_first(generation: int) -> None:
    """Killed in a state in which it cannot say farewell."""
    os.kill(generation, signal.SIGSTOP)
    os.kill(generation, signal.SIGKILL)


DEATHS: dict[str, Callable[[int], None]] = {
    "SIGKILL": stop_first,
    "SIGSEGV": lambda generation: os.kill(generation, signal.SIGSEGV),
    "SIGABRT": lambda generation: os.kill(generation, signal.SIGABRT),
}


def test_one_that_dies_is_started_anew_after_a_second_and_everybody_is_answered(service: Service) -> None:
    service.expected.append(r"Generation Died\. \(")
    manager = service.start("-w", "2")
    with Load(service, 2, pause=0.02) as load:
        for count, (cause, kill) in enumerate(DEATHS.items(), 1):
            load.wait_for(10)
            generation = service.serving_generation()
            kill(generation)
            died = service.wait_for_records("Generation Died", count)[-1]
            assert (int(died["pid"]), died["message"]) == (generation, f"Generation Died. ({cause})")
            begun = service.wait_for_records("Manager Process ID", count + 1)[-1]
            assert seconds_between(died, begun) > 0.85  # the record of the death may be late
            wait_until(lambda: len(service.workers()) == 2, "new workers")
        load.wait_for(10)
    assert load.failures == []
    assert service.manager() == manager
    assert not service.records("Child Process Died")
    wait_until(lambda: not zombies(manager), "the dead to be reaped")


def test_the_workers_of_one_that_dies_finish_what_they_have_and_leave(service: Service) -> None:
    service.expected.append(r"Generation Died\. \(SIGKILL\)")
    gate = Gate(service)
    manager = service.start("-w", "3", *gate.arguments)
    generation, workers = service.generation(), service.workers()
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = gate.wait_for()
        os.kill(generation, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, workers - {busy})), "the idle workers to leave")
        assert alive(busy)
        wait_until(lambda: len(service.workers()) == 3, "a new generation's workers")
        service.serving_generation()
        new = service.workers()
        assert not new & workers
        os.kill(manager, signal.SIGHUP)  # waits, as for any generation of which there are still workers
        service.wait_for_records("Caught SIGHUP")
        assert service.run("--status").returncode == 0
        assert service.workers() == new
        gate.open()
        assert read_all(client) == b"%d let through\n" % busy
    wait_until(lambda: not alive(busy), "the busy worker to leave")
    assert [match["message"] for match in service.records() if int(match["pid"]) == busy][-1].startswith(
        "Child Process Ended.")
    service.wait_for_new_workers(new)


def test_one_that_cannot_be_started_anew_is_tried_again_every_second(service: Service) -> None:
    service.expected += [r"Generation Died\. \(SIGKILL\)", "Generation Failed: cannot load handler service:handle: "]
    service.write_handler(ONE)
    manager = service.start("-w", "2", "--handler", "service:handle")
    service.write_handler(BROKEN)
    os.kill(service.generation(), signal.SIGKILL)
    failed = service.wait_for_records("Generation Failed: ", 3)
    for match in failed:
        assert match["message"] == "Generation Failed: cannot load handler service:handle: RuntimeError: no good"
    for first, second in pairwise(failed):
        assert 0.85 < seconds_between(first, second) < 10  # a record may be late
    assert service.run("--status").stdout == f"{manager}\n"
    with service.connect() as client:  # who waits meanwhile
        client.sendall(b"x\n")
        service.write_handler(TWO)
        assert read_all(client).endswith(b" two\n")
    wait_until(lambda: len(service.workers()) == 2, "new workers")
    assert service.manager() == manager


def test_a_hup_does_not_wait_for_the_second_in_which_none_is_there(service: Service) -> None:
    service.expected += [r"Generation Died\. \(SIGKILL\)", "Generation Failed: ", "Nothing Changed: "]
    service.write_handler(ONE)
    manager = service.start("-w", "1", "--handler", "service:handle")
    service.write_handler(BROKEN)
    os.kill(service.generation(), signal.SIGKILL)
    waits: list[float] = []
    while min(waits, default=1) >= 0.8 and len(waits) < 10:  # a busy machine may need several tries
        failed = service.wait_for_records("Generation Failed: ", len(waits) + 1)[-1]
        os.kill(manager, signal.SIGHUP)
        waits.append(seconds_between(failed, service.wait_for_records("Nothing Changed: ", len(waits) + 1)[-1]))
    assert min(waits) < 0.8
    service.write_handler(TWO)
    os.kill(manager, signal.SIGHUP)
    wait_for_reply(service, "two")


def test_a_stop_does_not_wait_for_one_that_cannot_be_started_anew(service: Service) -> None:
    service.expected += [r"Generation Died\. \(SIGKILL\)", "Generation Failed: "]
    service.write_handler(ONE)
    service.start("-w", "1", "--handler", "service:handle")
    service.write_handler(BROKEN)
    os.kill(service.generation(), signal.SIGKILL)
    service.wait_for_records("Generation Failed: ")
    began = time.monotonic()
    assert service.stop().returncode == 0
    assert time.monotonic() - began < 10
    assert not service.processes()
    assert service.records()[-1]["message"] == "Server Terminated."


def test_one_that_dies_while_it_leaves_is_not_started_anew(service: Service) -> None:
    service.expected.append(r"Generation Died\. \(SIGKILL\)")
    gate = Gate(service)
    manager = service.start("-w", "1", *gate.arguments)
    first, [busy] = service.generation(), service.workers()
    with service.connect() as client:
        client.sendall(b"x\n")
        assert gate.wait_for() == [busy]
        os.kill(manager, signal.SIGHUP)
        wait_until(lambda: len(service.workers()) == 2, "the second generation")
        [second] = service.generations() - {first}
        wait_until(lambda: service.serving_generation() == second, "the second generation to serve")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: service.generations() == {second}, "the first generation to die")
        time.sleep(1.2)  # in which a new one would be started
        assert service.generations() == {second}
        assert alive(busy)
        gate.open()
        assert read_all(client) == b"%d let through\n" % busy
    wait_until(lambda: not alive(busy), "the busy worker to leave")
    assert len(service.records("Loading configuration.")) == 2


@pytest.mark.parametrize("ending", ["stop", "reload"])
def test_one_that_does_not_react_is_killed_after_the_grace(service: Service, ending: str) -> None:
    service.expected.append(r"Died\. \(SIGKILL: not done within the grace\)")
    manager = service.start("-w", "2", "--grace", "1")
    generation, workers = service.generation(), service.workers()
    os.kill(generation, signal.SIGSTOP)
    began = time.monotonic()
    if ending == "stop":
        assert service.stop().returncode == 0
        assert not service.processes()
    else:
        os.kill(manager, signal.SIGHUP)
        wait_until(lambda: len(service.workers() - workers) == 2, "the new workers")
        wait_until(lambda: not alive(generation) and not any(map(alive, workers)), "the old to go")
        assert service.ask("x").endswith(" your text size: 1\n")
    assert 0.9 < time.monotonic() - began < 20  # by default it would be 30


def test_workers_that_lose_generation_and_manager_at_once_leave(service: Service) -> None:
    service.expected.append(r"Generation Died\. \(SIGKILL\)")  # by a manager that is still quick enough
    manager = service.start("-w", "3")
    generation = service.generation()
    for pid in (generation, manager):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not service.processes(), "the workers to leave")
    service.start("-w", "1")
    assert service.ask("x").endswith(" your text size: 1\n")
