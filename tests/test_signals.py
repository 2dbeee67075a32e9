"""Each signal does what it promises, at any moment, also in a row and in storms, and no request is lost over it."""

import os
import random
import re
import signal
import socket
import time
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from signal import SIGHUP, SIGTERM

import pytest
from conftest import Held, Load, Service, alive, read_all, wait_until

IGNORED_BY_THE_MANAGER = [signal.SIGPIPE, signal.SIGALRM, signal.SIGUSR2]
IGNORED_BY_OTHERS = [SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE]


def send(pid: int, signals: list[signal.Signals]) -> None:
    """Send SIGNALS to PID, and wait until all have arrived."""
    for signum in signals:
        os.kill(pid, signum)
    sent = sum(1 << signum - 1 for signum in signals)

    def pending() -> int:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return (int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)) & sent

    wait_until(lambda: not pending(), "signals to arrive")


def everybody(service: Service) -> set[int]:
    return {service.manager(), service.keeper(), *service.generations(), *service.workers()}


# ---- What is ignored ----------------------------------------------------------------


def test_signals_that_mean_nothing_to_the_manager_change_nothing(service: Service) -> None:
    manager = service.start("-w", "2")
    before, log = everybody(service), service.log
    for _ in range(3):
        send(manager, IGNORED_BY_THE_MANAGER)
    assert everybody(service) == before
    assert service.log == log
    assert int(service.ask("x").split()[0]) in before


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "at work"])
def test_signals_for_the_manager_change_nothing_when_sent_to_the_others(service: Service, busy: bool) -> None:
    held = Held(service)
    manager = service.start("-w", "2", "--timeout", "30", *held.arguments)
    before = everybody(service)
    with ExitStack() as stack:
        if busy:
            slow, client = (stack.enter_context(service.connect()) for _ in range(2))
            slow.sendall(b"x" * 2100)  # so much that only a half-close ends it
            client.sendall(b"x\n")
            held.wait_for()
        for pid in before - {manager}:
            for signum in IGNORED_BY_OTHERS:
                send(pid, [signum])
        held.release()
        if busy:
            slow.shutdown(socket.SHUT_WR)
            assert [read_all(client).partition(b" ")[2] for client in (client, slow)] == [b"let through\n"] * 2
        assert service.ask("x").endswith(" let through\n")
    assert everybody(service) == before
    assert not service.records("Caught|Status")


# ---- TERM to a worker ---------------------------------------------------------------


def test_a_worker_told_to_leave_is_replaced_at_once(service: Service) -> None:
    service.start("-w", "2")
    waits: list[float] = []
    while len(waits) < 3 or (min(waits) >= 0.8 and len(waits) < 10):  # a busy machine may need several tries
        before = service.workers()
        leaving = min(before)
        began = time.monotonic()
        os.kill(leaving, SIGTERM)
        wait_until(lambda: len(service.workers() - before) == 1, "a new worker")  # noqa: B023
        waits.append(time.monotonic() - began)
        wait_until(lambda: before - service.workers() == {leaving}, "the old worker to go")  # noqa: B023
        words = [record["message"] for record in service.records() if record["pid"] == str(leaving)]
        assert words == ["Child Process Started.", "Caught SIGTERM", "Child Process Ended. (100)"]
    assert min(waits) < 0.8  # without the second that the place of a worker that died stays empty


@pytest.mark.parametrize("text", [b"x\n", b"x" * 2100], ids=["in its handler", "still coming"])
def test_a_text_is_answered_whose_worker_is_told_to_leave(service: Service, text: bytes) -> None:
    held = Held(service)
    service.start("-w", "1", "--timeout", "30", *held.arguments)
    [worker] = service.workers()
    with service.connect() as client:
        client.sendall(text)
        if text == b"x\n":
            assert held.wait_for() == [worker]
        send(worker, [SIGTERM])
        if text != b"x\n":
            service.wait_for_new_workers({worker})
        held.release()
        client.shutdown(socket.SHUT_WR)
        pid, _, reply = read_all(client).partition(b" ")
        assert reply == b"let through\n"
        assert (int(pid) == worker) == (text == b"x\n")
    service.wait_for_new_workers({worker})
    assert not service.records("Child Process (Died|Killed)")


def test_a_term_counts_that_comes_before_a_worker_is_set_up(service: Service) -> None:
    service.start("-w", "1")
    told: set[int] = set()
    for _ in range(30):
        while not (new := service.workers() - told):  # without a pause, not to miss the moment: the test's timeout
            pass  # ends it where a TERM is lost
        told |= new
        for worker in new:
            os.kill(worker, SIGTERM)
    wait_until(lambda: service.workers().isdisjoint(told) and len(service.workers()) == 1, "one worker more")
    assert not service.records("Child Process (Died|Killed)")


# ---- In a row -----------------------------------------------------------------------


@pytest.mark.parametrize("signals", [
    [SIGHUP, SIGTERM], [SIGTERM, SIGHUP], [SIGHUP, SIGHUP, SIGTERM], [SIGTERM, SIGTERM], [SIGHUP, SIGTERM, SIGHUP]],
    ids=lambda signals: "+".join(signum.name[3:] for signum in signals))
def test_signals_back_to_back_always_end_in_a_clean_stop(service: Service, signals: list[signal.Signals]) -> None:
    for attempt in range(1, 9):
        manager = service.start("-w", "3")
        if attempt % 2:
            service.ask("x")
        for signum in signals:
            with suppress(ProcessLookupError):  # a quick manager may have ended after the first
                os.kill(manager, signum)
        wait_until(lambda: not alive(manager), "the manager to go")  # noqa: B023
        assert not service.processes()
        assert not service.pid_file.exists()
        assert len(service.records("Server Terminated.")) == attempt
    ended = service.records("Child Process (Ended|Killed)")  # killed: of a generation that was not wanted any more
    assert len(ended) == len(service.records("Child Process Started."))


@pytest.mark.parametrize("signals", [[SIGTERM], [SIGHUP, SIGTERM], [SIGHUP]], ids=["TERM", "HUP+TERM", "HUP"])
def test_signals_count_from_the_moment_the_pid_file_is_written(service: Service, signals: list[signal.Signals]) -> None:
    service.expected.append("Start Failed: caught SIGTERM")
    for attempt in range(8):
        start = service.popen("-p", str(service.port), "-w", "3")
        content = ""
        while not content.endswith("\n"):  # without pauses, not to miss the moment; the test's timeout ends it
            with suppress(FileNotFoundError):
                content = service.pid_file.read_text()
        time.sleep(attempt and random.uniform(0, 0.03))  # the moment itself is the stimulus
        for signum in signals:
            os.kill(manager := int(content), signum)
        out, err = start.communicate(timeout=30)
        if start.returncode:  # where the stop ends the start
            assert SIGTERM in signals
            assert (start.returncode, out, err) == (1, "", "daemontest.py: cannot start: caught SIGTERM\n")
        else:
            assert (out, err) == (f"daemontest.py: {manager} started, 3 workers on port {service.port}\n", "")
        if SIGTERM not in signals:
            service.wait_for_records("Caught SIGHUP", attempt + 1)
            wait_until(lambda: "Loading configuration." in service.log.rpartition("Caught SIGHUP")[2], "the next load")
            assert service.ask("x").endswith(" your text size: 1\n")
            assert service.stop().stdout == f"daemontest.py {manager} Server terminated.\n"
        wait_until(lambda: not service.processes(), "all to go")
        assert not service.pid_file.exists()


# ---- Storms -------------------------------------------------------------------------


def test_100_hups_and_terms_to_workers_under_load_lose_no_request(service: Service) -> None:
    manager = service.start("-w", "5", "-n", "20", "--timeout", "30")
    most = terms = 0
    with Load(service, 4) as load, ExitStack() as stack:
        slow = [stack.enter_context(service.connect()) for _ in range(10)]
        for client in slow:
            client.sendall(b"x" * 2100)  # so much that only a half-close ends it
        for _ in range(100):
            os.kill(manager, SIGHUP)
            with suppress(IndexError, ProcessLookupError):
                os.kill(random.choice(sorted(service.workers())), SIGTERM)
                terms += 1
            for _ in range(3):  # a look takes time, but who is seen by two was there between them
                most = max(most, len(service.workers() & service.workers()))
                time.sleep(0.01)
        load.wait_for(200)
        for client in slow:
            client.shutdown(socket.SHUT_WR)
        assert {read_all(client).partition(b" ")[2] for client in slow} == {b"your text size: 2100\n"}
    assert load.failures == []
    assert {reply.partition(b" ")[2] for reply in load.replies} == {b"your text size: 1\n"}
    assert terms > 50
    assert most <= 10  # twice the workers
    wait_until(lambda: len(everybody(service)) == len(service.processes()) == 8, "five workers, and no others")
    since = service.log.rpartition("Loading configuration.")[2]
    assert all(f" {pid} Child Process Started." in since for pid in service.workers())
    assert not service.records("Child Process (Died|Killed)|Generation (Died|Failed)")
    assert len(service.records("Caught SIGHUP")) >= 20


# ---- USR1: what goes on -------------------------------------------------------------


KEEPER = re.compile(r"Status: keeper with (?P<clients>\d+) clients?, (?P<bytes>\d+) bytes")
GENERATION = re.compile(r"Status: generation (?P<number>\d+), (?P<state>loading|serving|leaving)"
                        r"( since (?P<since>\S+))?, (?P<workers>\d+) workers?")
WORKER = re.compile(r"Status: worker with (?P<served>\d+) texts? served, "
                    r"handler (?P<handler>idle|running for (?P<seconds>\d+\.\d) s)(?P<ending>, ending)?")


def ask_status(service: Service, workers: int) -> tuple[re.Match[str], list[re.Match[str]], dict[int, re.Match[str]]]:
    """Send USR1 until so many WORKERS are told of; what is told of keeper, generations and each worker."""
    def told() -> list[re.Match[str]] | None:
        before = len(service.records("Status: "))
        os.kill(service.manager(), signal.SIGUSR1)
        with suppress(pytest.fail.Exception):  # one that has just gone may have been told of, or a new one not yet
            wait_until(lambda: len([record for record in service.records("Status: ")[before:]
                                    if record["message"].startswith("Status: worker")]) == workers, "workers", 0.5)
            return service.records("Status: ")[before:]
        return None

    records = wait_until(told, f"{workers} workers to be told of")
    assert {record["kind"] for record in records} == {"*"}
    of_worker = {int(record["pid"]): record["message"] for record in records if ": worker" in record["message"]}
    [keeper] = [record for record in records if ": keeper" in record["message"]]
    of_generation = [GENERATION.match(record["message"]) for record in records if ": generation" in record["message"]]
    assert int(keeper["pid"]) == service.keeper()
    matches = KEEPER.match(keeper["message"]), of_generation, {pid: WORKER.match(message)
                                                               for pid, message in of_worker.items()}
    assert all((matches[0], *matches[1], *matches[2].values())), [record["message"] for record in records]
    return matches  # type: ignore[return-value]


def test_usr1_names_each_generation_and_counts_each_workers_texts(service: Service) -> None:
    before = time.time()
    manager = service.start("-w", "3")
    for number in ("1", "2"):
        after = time.time()
        served = dict.fromkeys(service.workers(), 0)
        for _ in range(12):
            served[int(service.ask("x").split()[0])] += 1

        def told(served: dict[int, int] = served) -> bool:
            return {pid: int(match["served"]) for pid, match in ask_status(service, 3)[2].items()} == served

        wait_until(told, f"{served}")  # a worker notes it when the client may have its reply already
        _, [generation], _ = ask_status(service, 3)
        assert (generation["number"], generation["state"], generation["workers"]) == (number, "serving", "3")
        assert int(before) <= datetime.fromisoformat(generation["since"]).timestamp() <= after
        if number == "1":
            wait_until(lambda: time.time() > after + 1.1, "the clock")  # noqa: B023
            before = time.time()
            os.kill(manager, SIGHUP)
            service.wait_for_new_workers({*served})
            service.generation()


def test_usr1_counts_clients_and_bytes_of_the_keeper(service: Service) -> None:
    service.start("-w", "1", "--timeout", "30")
    for count in (0, 3, 0):
        with ExitStack() as stack:
            clients = [stack.enter_context(service.connect()) for _ in range(count)]
            for client in clients:
                client.sendall(b"x" * 3000)  # so much that only a half-close ends it

            def told(count: int = count) -> bool:
                keeper, _, workers = ask_status(service, 1)
                assert [worker["handler"] for worker in workers.values()] == ["idle"]
                return int(keeper["clients"]) == count and int(keeper["bytes"]) >= 3000 * count

            wait_until(told, f"{count} clients")
            for client in clients:
                client.shutdown(socket.SHUT_WR)
                assert read_all(client).endswith(b" your text size: 3000\n")


def test_usr1_tells_for_how_long_a_handler_has_been_running_and_which_generation_leaves(service: Service) -> None:
    held = Held(service)
    manager = service.start("-w", "2", *held.arguments)
    began = time.monotonic()
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = held.wait_for()
        running = time.monotonic()
        told = ask_status(service, 2)[2]
        [idle] = told.keys() - {busy}
        assert (told[idle]["handler"], told[idle]["ending"]) == ("idle", None)
        assert float(told[busy]["seconds"]) <= time.monotonic() - began + 0.1
        wait_until(lambda: time.monotonic() > running + 0.5, "the clock")
        told = ask_status(service, 2)[2]
        assert 0.4 <= float(told[busy]["seconds"]) <= time.monotonic() - began + 0.1
        os.kill(manager, SIGHUP)
        wait_until(lambda: len(service.workers() - {busy, idle}) == 2 and not alive(idle), "the reload")
        _, generations, told = ask_status(service, 3)
        assert [worker for worker, match in told.items() if match["handler"] != "idle"] == [busy]
        assert [(match["number"], match["state"]) for match in generations] == [("1", "leaving"), ("2", "serving")]
        held.release()
        assert read_all(client) == b"%d let through\n" % busy


def test_usr1_is_answered_at_once_while_a_module_is_imported(service: Service) -> None:
    manager = service.start("-w", "1")
    service.write_handler("print('importing', flush=True)\nsum(range(10**12))\n")  # in C, deaf to signals
    service.configure("handler = 'service:handle'")
    os.kill(manager, SIGHUP)
    wait_until(lambda: "\nimporting\n" in service.log, "the import")
    _, generations, told = ask_status(service, 1)
    assert told.keys() <= service.workers()
    assert [(match["number"], match["state"]) for match in generations] == [("1", "serving"), ("2", "loading")]


def test_usr1_changes_nothing_however_often_it_is_sent(service: Service) -> None:
    manager = service.start("-w", "2", "-n", "1000000")
    before = everybody(service)
    with Load(service, 2) as load:
        for _ in range(200):
            for pid in before:
                os.kill(pid, signal.SIGUSR1)
            time.sleep(0.001)
        load.wait_for(50)
    assert load.failures == []
    assert (service.manager(), everybody(service)) == (manager, before)


def test_ps_tells_the_processes_apart(service: Service) -> None:
    manager = service.start("-w", "2")
    for _ in range(2):
        names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in service.processes()]
        assert sorted(names) == ["daemontest-gen", "daemontest-keep", "daemontest-mngr", *["daemontest-work"] * 2]
        workers = service.workers()
        os.kill(manager, SIGHUP)
        service.wait_for_new_workers(workers)
        wait_until(lambda: len(service.processes()) == 5, "the old ones to go")
