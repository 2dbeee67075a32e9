"""Whatever process of the service is killed or hangs, the others go on or leave in good order, and little is lost."""

import os
import re
import signal
import socket
import time
from contextlib import suppress

import pytest
from conftest import Held, Load, Service, alive, read_all, seconds_between, wait_until
from modules import DEAF, HANDLER, HARMFUL, HeldImport, draining, saying

CRASHING = """
import os, signal, time

def handle(text):
    with open("HOME/called", "a") as file:
        file.write(f"{os.getpid()}\\n")
    match text:
        case "kill": os.kill(os.getpid(), signal.SIGKILL)
        case "crash": os.kill(os.getpid(), signal.SIGSEGV)
        case "exit 3": os._exit(3)
        case "exit 0": os._exit(0)
        case "sleep": time.sleep(1000)
        case "deaf": exec(DEAF)
        case "a while": time.sleep(0.4)
    return text
"""


def start(service: Service, *arguments: str) -> int:
    service.write_handler(CRASHING.replace("HOME", str(service.home)).replace("DEAF", repr(DEAF)))
    return service.start(*HANDLER, *arguments)


def hang(service: Service, *texts: str) -> dict[int, socket.socket]:
    """Hang a worker with each of TEXTS; these workers and their clients."""
    hung: dict[int, socket.socket] = {}
    called = service.home / "called"
    for text in texts:
        client = service.begin(text.encode())
        wait_until(lambda: called.exists() and called.read_text().count("\n") > len(hung), f"{text} to begin")
        hung[int(called.read_text().split()[-1])] = client
    return hung


def kill_generation(service: Service) -> int:
    """Kill the one generation; its PID."""
    service.expected.append(r"Generation Died\. \(SIGKILL\)")
    generation = service.generation()
    os.kill(generation, signal.SIGKILL)
    return generation


def assert_no_reply(connection: socket.socket) -> None:
    with connection, suppress(ConnectionResetError):
        assert read_all(connection) == b""


def assert_stops(service: Service) -> None:
    began = time.monotonic()
    stopped = service.stop()
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert time.monotonic() - began < 20  # of the grace of 30 s
    assert not service.processes()


# ---- Workers -------------------------------------------------------------------------------

DEATHS = {"kill": "SIGKILL", "crash": "SIGSEGV", "exit 3": "exit status 3", "exit 0": "exit status 0"}


def test_a_dead_worker_loses_its_text_alone_and_is_replaced_a_second_later(service: Service) -> None:
    service.expected.append("Child Process Died")
    start(service, "-w", "6", "-n", "1000000")
    workers = service.workers()
    with Load(service, 2, pause=0.02) as load:
        for text in DEATHS:
            assert_no_reply(service.begin(text.encode()))
        died = service.wait_for_records("Child Process Died", 4)
        started = service.wait_for_records("Child Process Started.", 10)[6:]
        load.wait_for(10)
    assert {match["message"] for match in died} == {f"Child Process Died. ({cause})" for cause in DEATHS.values()}
    for death, birth in zip(died, started, strict=True):
        assert 0.85 < seconds_between(death, birth) < 10  # the record of the death may be late
    assert load.failures == []
    assert workers - service.workers() == {int(match["pid"]) for match in died}
    assert len(service.workers()) == 6


def test_workers_that_die_at_birth_are_forked_at_a_bounded_rate_until_they_live(service: Service) -> None:
    service.expected.append("Child Process Died")
    service.write_handler(f"import os\ndef die():\n    if os.path.exists({str(service.home / 'die')!r}):\n"
                          f"        os._exit(7)\nos.register_at_fork(after_in_child=die)\n{saying('alive')}")
    service.start("-w", "3", *HANDLER)
    (service.home / "die").touch()
    began = time.monotonic()
    for worker in service.workers():  # whose places are filled at once, since they leave in good order
        os.kill(worker, signal.SIGTERM)
    service.wait_for_records(r"Child Process Died\. \(exit status 7\)", 6)
    assert len(service.records("Child Process Died")) <= 3 * (time.monotonic() - began + 2)
    (service.home / "die").unlink()
    wait_until(lambda: len(service.workers()) == 3, "workers that live")
    assert service.ask("x").endswith(" alive\n")


def test_a_fork_that_fails_is_logged_and_tried_again_a_second_later(service: Service) -> None:
    service.expected.append("Cannot Fork: ")
    full = service.home / "full"
    service.write_handler("import os\nfork = os.fork\ndef fork_or_fail():\n"
                          f"    if os.path.exists({str(full)!r}):\n        raise BlockingIOError(11, 'no room')\n"
                          f"    return fork()\nos.fork = fork_or_fail\n{saying('alive')}")
    service.start("-w", "2", *HANDLER)
    full.touch()
    os.kill(min(service.workers()), signal.SIGTERM)
    [failed] = service.wait_for_records("Cannot Fork: no room$")
    full.unlink()
    assert 0.85 < seconds_between(failed, service.wait_for_records("Child Process Started.", 3)[2]) < 10
    assert service.ask("x").endswith(" alive\n")


# ---- Handlers that hang --------------------------------------------------------------------

def test_time_is_each_handlers_own_and_not_the_clients_nor_the_workers(service: Service) -> None:
    start(service, "-w", "1", "--handler-timeout", "1")
    [worker] = service.workers()
    with service.begin(b"x" * 3000, end=False) as client:
        assert [service.ask("a while") for _ in range(3)] == 3 * [f"{worker} a while\n"]
        answered = time.monotonic()
        wait_until(lambda: time.monotonic() > answered + 1.1, "a worker idle for longer than a handler may run")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"%d %b\n" % (worker, b"x" * 3000)


def test_a_reload_with_all_workers_hung_serves_at_once_and_kills_them_after_the_grace(service: Service) -> None:
    service.expected.append("Child Process Killed")
    service.configure("workers = 2")
    manager = start(service, "--grace", "2")
    hung = hang(service, "sleep", "deaf")
    service.configure("workers = 1")
    began = time.monotonic()
    os.kill(manager, signal.SIGHUP)
    new = int(service.ask("x").split()[0])
    assert time.monotonic() - began < 1.9
    assert all(map(alive, hung))
    killed = service.wait_for_records("Child Process Killed", 2)
    assert time.monotonic() - began > 1.9
    assert {(int(match["pid"]), match["message"]) for match in killed} == {
        (pid, "Child Process Killed. (still running after the grace)") for pid in hung}
    wait_until(lambda: service.workers() == {new}, "the hung to go")
    for client in hung.values():
        assert_no_reply(client)


def test_a_handler_that_hangs_in_c_is_killed_at_its_time_though_its_generation_is_dead(service: Service) -> None:
    start(service, "-w", "3", "--handler-timeout", "1.5")
    began = time.monotonic()
    [(worker, client)] = hang(service, "deaf").items()
    kill_generation(service)
    wait_until(lambda: not alive(worker), "the worker to be killed", 12)
    assert time.monotonic() - began > 1.5
    line = CRASHING[:CRASHING.index('"deaf"')].count("\n") + 1
    assert re.search(rf'hread 0x.*\n(  File .*\n)*  File ".*/service\.py", line {line} in handle\n', service.log)
    assert_no_reply(client)


# ---- The generation ------------------------------------------------------------------------

def test_a_dead_generation_is_started_anew_a_second_later_and_nothing_is_lost(service: Service) -> None:
    held = Held(service)
    service.start("-w", "3", *held.arguments)
    workers = service.workers()
    with service.begin() as client, service.begin(b"x" * 3000, end=False) as slow_client:
        [busy] = held.wait_for()
        generation = kill_generation(service)
        [died] = service.wait_for_records("Generation Died")
        assert (int(died["pid"]), died["message"]) == (generation, "Generation Died. (SIGKILL)")
        begun = service.wait_for_records("Loading configuration.", 2)[1]
        assert 0.85 < seconds_between(died, begun) < 10
        wait_until(lambda: not any(map(alive, workers - {busy})), "the idle workers to leave")
        wait_until(lambda: len(service.workers()) == 3, "the new generation's workers")
        assert alive(busy)
        slow_client.shutdown(socket.SHUT_WR)
        new = held.wait_for(2)[1]
        held.release()
        assert read_all(client) == b"%d let through\n" % busy
        assert read_all(slow_client) == b"%d let through\n" % new
    with Load(service, 2, pause=0.02) as load:
        load.wait_for(10)
        kill_generation(service)
        service.wait_for_records("Loading configuration.", 3)
        load.wait_for(10)
    assert load.failures == []
    assert not service.records("Child Process Died")


def test_the_next_generation_goes_on_when_the_previous_one_dies_while_it_drains(service: Service) -> None:
    with draining(service) as (last, _, reloading, finish):
        new = service.generations() - {last}
        os.kill(last, signal.SIGKILL)
        assert reloading.communicate(timeout=50) == (f"daemontest.py: {service.manager()} reloaded\n", "")
        assert service.ask("x").endswith(" new\n")
        finish()
    assert service.generations() == new


def test_a_generation_that_cannot_be_started_anew_is_tried_again_each_second(service: Service) -> None:
    service.expected += ["Generation Failed: ", "Handler Not Loaded:", "^    ", "^Fatal"]
    service.write_handler(saying("old"))
    manager = service.start("-w", "2", *HANDLER)
    service.write_handler("raise RuntimeError('no good')")
    kill_generation(service)
    first, second = service.wait_for_records("Generation Failed: ", 2)[:2]
    assert first["message"].startswith("Generation Failed: cannot load handler service:handle: RuntimeError: no good ")
    assert 0.85 < seconds_between(first, second) < 10
    assert service.run("--status").stdout == f"{manager}\n"
    with service.begin() as client:  # who waits meanwhile
        service.write_handler(saying("new"))
        assert read_all(client).endswith(b" new\n")
    service.write_handler(HARMFUL["segfaults"][0])
    kill_generation(service)
    service.wait_for_records("Generation Failed: .*SIGSEGV")
    assert_stops(service)


@pytest.mark.parametrize("how", ["sleep", "deaf"])
def test_signals_count_while_a_dead_generations_successor_is_imported(service: Service, how: str) -> None:
    handler = HeldImport(service)
    service.start("-w", "1", *HANDLER)
    handler.hold(how)
    kill_generation(service)
    given_up = handler.wait_for(2)
    handler.say("new")
    handler.hold("sleep")  # those imports that follow
    reloading = service.popen("--reload")
    handler.wait_for(3)
    wait_until(lambda: not alive(given_up), "the import that is given up to end")
    handler.release()
    assert service.ask("x").endswith(" new\n")
    assert reloading.communicate(timeout=50)[1] == ""
    handler.hold(how)
    kill_generation(service)
    handler.wait_for(4)
    assert_stops(service)


@pytest.mark.parametrize("ending", ["stop", "reload"])
def test_a_generation_that_does_not_react_is_killed_after_the_grace(service: Service, ending: str) -> None:
    service.expected.append(r"(Generation|Keeper Process) Killed\. \(still running after the grace")
    service.start("-w", "2", "--grace", "0.4")
    generation, workers = service.generation(), service.workers()
    os.kill(generation, signal.SIGSTOP)
    began = time.monotonic()
    if ending == "stop":
        assert_stops(service)
    else:
        assert service.run("--reload").returncode == 0
        assert service.ask("x").endswith(" your text size: 1\n")
    assert 0.4 < time.monotonic() - began < 20
    wait_until(lambda: not any(map(alive, {generation, *workers})), "it and its workers to go")
    assert int(service.records("Generation Killed")[0]["pid"]) == generation
