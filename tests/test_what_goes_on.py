"""USR1 tells what goes on, at once, and changes nothing; processes are told apart by their names."""

import os
import re
import signal
import socket
import subprocess
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from conftest import Gate, Load, Service, read_all, wait_until

WORKER = re.compile(r"Worker: (?P<served>\d+) texts? served, (?P<in_hand>\d+) clients? in hand, "
                    r"handler (?P<handler>idle|running for (?P<seconds>\d+\.\d) s)(?P<leaving>, leaving)?")
GENERATION = re.compile(r"Generation (?P<number>\d+): since (?P<since>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d), "
                        r"(?P<workers>\d+) workers, (?P<state>serving|leaving)")


def ask_what_goes_on(service: Service, workers: int) -> dict[int, re.Match[str]]:
    """Send USR1; what is told of each worker, once no other is told of: one that has just gone may still be."""
    def ask() -> list[re.Match[str]] | None:
        before = len(service.records("Worker: "))
        os.kill(service.manager(), signal.SIGUSR1)
        told = service.wait_for_records("Worker: ", before + workers)[before:]
        return told if len(told) == workers else None

    told: list[re.Match[str]] = wait_until(ask, f"{workers} workers to be told of")
    found = {int(match["pid"]): WORKER.fullmatch(match["message"]) for match in told}
    assert len(found) == workers, [match["message"] for match in told]
    for match in told:
        assert match["kind"] == "*"
        assert found[int(match["pid"])], match["message"]
    return found  # type: ignore[return-value]


def test_it_names_the_generation_and_since_when(service: Service) -> None:
    before = datetime.now().replace(microsecond=0)
    manager = service.start("-w", "3")
    for number in (1, 2):
        after = datetime.now()
        workers = service.workers()
        assert ask_what_goes_on(service, 3).keys() == workers
        told = service.records("Generation ")[-1]
        match = GENERATION.fullmatch(told["message"])
        assert match, told["message"]
        assert {int(told["pid"])} == service.generations()
        assert (match["number"], match["workers"], match["state"]) == (str(number), "3", "serving")
        assert before <= datetime.fromisoformat(match["since"]) <= after
        if number == 1:
            before = datetime.now().replace(microsecond=0)
            os.kill(manager, signal.SIGHUP)
            service.wait_for_new_workers(workers)
            service.generation()


def test_a_reload_that_fails_counts_as_a_generation_that_has_not_served(service: Service) -> None:
    service.expected.append("Nothing Changed")
    manager = service.start("-w", "1")
    generation, workers = service.generation(), service.workers()
    service.configure("handler = 'missing:handle'")
    os.kill(manager, signal.SIGHUP)
    service.wait_for_records("Nothing Changed")
    wait_until(lambda: service.generations() == {generation}, "the one that failed to go")
    assert ask_what_goes_on(service, 1).keys() == workers
    [told] = service.records("Generation ")
    assert told["message"].startswith("Generation 1: ")
    assert int(told["pid"]) == generation


def test_it_counts_the_texts_that_a_worker_has_served(service: Service) -> None:
    service.start("-w", "2")
    served = dict.fromkeys(service.workers(), 0)
    for _ in range(12):
        served[int(service.ask("x").split()[0])] += 1
    # A worker notes that it has served when the client may have its reply already.
    wait_until(lambda: {worker: int(told["served"]) for worker, told in ask_what_goes_on(service, 2).items()} == served,
               f"{served}")


def test_it_counts_the_clients_in_hand_which_need_not_have_sent_a_whole_text(service: Service) -> None:
    service.start("-w", "1")
    [worker] = service.workers()
    clients = [service.connect() for _ in range(3)]
    for client in clients:
        client.sendall(b"x" * 3000)  # more than may be taken for a whole text without a half-close
    wait_until(lambda: ask_what_goes_on(service, 1)[worker]["in_hand"] == "3", "three clients in hand")
    told = ask_what_goes_on(service, 1)[worker]
    assert (told["served"], told["handler"], told["leaving"]) == ("0", "idle", None)
    for client in clients:
        client.shutdown(socket.SHUT_WR)
        assert read_all(client).endswith(b" your text size: 3000\n")
        client.close()
    wait_until(lambda: ask_what_goes_on(service, 1)[worker]["in_hand"] == "0", "no client in hand")
    assert ask_what_goes_on(service, 1)[worker]["served"] == "3"


def test_it_tells_for_how_long_a_handler_has_been_running_and_which_worker_leaves(service: Service) -> None:
    gate = Gate(service)
    manager = service.start("-w", "2", *gate.arguments)
    began = time.monotonic()
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = gate.wait_for()
        running = time.monotonic()
        told = ask_what_goes_on(service, 2)
        [idle] = told.keys() - {busy}
        assert (told[idle]["handler"], told[idle]["in_hand"], told[idle]["leaving"]) == ("idle", "0", None)
        assert (told[busy]["in_hand"], told[busy]["leaving"]) == ("1", None)
        assert float(told[busy]["seconds"]) <= time.monotonic() - began + 0.1
        time.sleep(0.5)
        later = ask_what_goes_on(service, 2)[busy]
        assert time.monotonic() - began + 0.1 >= float(later["seconds"]) >= 0.4
        assert time.monotonic() - running >= 0.5
        os.kill(manager, signal.SIGHUP)
        wait_until(lambda: len(service.workers() - {busy, idle}) == 2 and not psutil.pid_exists(idle), "a reload")
        wait_until(lambda: ask_what_goes_on(service, 3)[busy]["leaving"], "the busy one to have been told")
        told = ask_what_goes_on(service, 3)
        assert {worker for worker, match in told.items() if match["leaving"]} == {busy}
        assert told[busy]["seconds"]
        states = [GENERATION.fullmatch(match["message"]) for match in service.records("Generation ")[-2:]]
        assert [(match["number"], match["state"]) for match in states if match] == [("1", "leaving"), ("2", "serving")]
        gate.open()
        assert read_all(client) == b"%d let through\n" % busy


def test_it_is_told_at_once_while_a_module_is_being_imported(service: Service) -> None:
    (service.home / "word").write_text("one")
    manager = service.start("-w", "1", *service.use_handler("slow_import"))
    workers = service.workers()
    (service.home / "hold").touch()
    os.kill(manager, signal.SIGHUP)
    wait_until(lambda: (service.home / "imports").read_text().count("\n") == 2, "the import")
    assert ask_what_goes_on(service, 1).keys() == workers
    assert {match["message"] for match in service.records("Generation 2")} == {"Generation 2: 1 workers, loading"}
    (service.home / "hold").unlink()
    service.wait_for_new_workers(workers)


def test_it_changes_nothing_however_often_it_is_asked(service: Service) -> None:
    manager = service.start("-w", "2", "-n", "1000000")
    generations, workers = service.generations(), service.workers()
    with Load(service, 2) as load:
        for _ in range(200):
            os.kill(manager, signal.SIGUSR1)
            for pid in (*generations, *workers):
                os.kill(pid, signal.SIGUSR1)
            time.sleep(0.001)
        load.wait_for(50)
    assert load.failures == []
    assert (service.manager(), service.generations(), service.workers()) == (manager, generations, workers)
    assert not service.records("Child Process (Died|Ended)|Generation (Died|Ended)")


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="processes are named by Linux's /proc")
def test_ps_tells_the_processes_apart(service: Service) -> None:
    manager = service.start("-w", "2")
    for _ in range(2):
        names = {manager: "daemontest-mngr"}
        names |= dict.fromkeys(service.generations(), "daemontest-gen")
        names |= dict.fromkeys(service.workers(), "daemontest-work")
        assert len(names) == 4
        assert {pid: Path(f"/proc/{pid}/comm").read_text() for pid in names} == {
            pid: f"{name}\n" for pid, name in names.items()}
        shown = subprocess.run(["ps", "-o", "comm=", "-p", str(manager)], capture_output=True, text=True, timeout=50)
        assert shown.stdout == "daemontest-mngr\n"
        workers = service.workers()
        os.kill(manager, signal.SIGHUP)
        service.wait_for_new_workers(workers)
        service.generation()
