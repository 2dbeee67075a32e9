"""Signals count at once while a handler's module is being imported, for seconds or for ever."""

import fcntl
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import DEADLINE, Load, Service, alive, wait_until

HOLDS = ["hold", "compute"]  # in Python's sleep, and in C code that attends to no signal
HASTE = 15.0  # s; what is done at once may take as long on a loaded machine, and the import takes a minute


class Slow:
    """A handler whose import the test holds up, of a word that it replies with."""

    def __init__(self, service: Service, word: str = "one", hold: str = "") -> None:
        self.service = service
        self.arguments = service.use_handler("slow_import")
        self.say(word)
        if hold:
            self.hold(hold)

    def say(self, word: str) -> None:
        (self.service.home / "word").write_text(word)

    def hold(self, how: str = "hold") -> None:
        """Have the next import take long."""
        (self.service.home / "hold").touch()
        if how == "compute":
            (self.service.home / "compute").touch()
        else:
            (self.service.home / "compute").unlink(missing_ok=True)

    def let_go(self) -> None:
        """End imports that are held up, unless in C code; hold up no more."""
        for name in HOLDS:
            (self.service.home / name).unlink(missing_ok=True)

    def imports(self) -> list[int]:
        """The processes in which an import has begun."""
        file = self.service.home / "imports"
        return [int(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def wait_for(self, count: int) -> int:
        """Wait until COUNT imports have begun; the last one's process."""
        wait_until(lambda: len(self.imports()) >= count, f"{count} imports")
        return self.imports()[-1]


def start(service: Service, slow: Slow, *arguments: str) -> "subprocess.Popen[str]":
    """Start; returns when the import has begun."""
    count = len(slow.imports())
    launcher = service.popen("-p", str(service.port), *slow.arguments, *arguments)
    slow.wait_for(count + 1)
    return launcher


def assert_nothing_is_left(service: Service) -> None:
    assert not service.processes()
    assert not service.pid_file.exists()


def replies(service: Service, count: int = 5) -> set[str]:
    return {service.ask("x").partition(" ")[2] for _ in range(count)}


# ---- At a start -----------------------------------------------------------------------


@pytest.mark.parametrize("hold", HOLDS)
def test_a_start_is_given_up_with_ctrl_c(service: Service, hold: str) -> None:
    launcher = start(service, Slow(service, hold=hold))
    began = time.monotonic()
    launcher.send_signal(signal.SIGINT)
    assert launcher.communicate(timeout=DEADLINE) == ("", "daemontest.py: interrupted\n")
    assert launcher.returncode == 1
    assert time.monotonic() - began < HASTE
    assert_nothing_is_left(service)


@pytest.mark.parametrize(("hold", "signum"), [("hold", signal.SIGKILL), ("compute", signal.SIGKILL),
                                              ("hold", signal.SIGTERM), ("compute", signal.SIGHUP)])
def test_a_start_is_given_up_when_nobody_waits_for_it_any_more(
        service: Service, hold: str, signum: signal.Signals) -> None:
    service.expected.append("^.* Manager Failed: |^    ")
    launcher = start(service, Slow(service, hold=hold))
    launcher.send_signal(signum)
    launcher.communicate(timeout=DEADLINE)
    wait_until(lambda: not service.processes(), "the start to be given up", HASTE)
    assert_nothing_is_left(service)


@pytest.mark.parametrize(("hold", "signum"), [("hold", signal.SIGTERM), ("compute", signal.SIGTERM),
                                              ("hold", signal.SIGQUIT), ("compute", signal.SIGINT)])
def test_a_stop_counts(service: Service, hold: str, signum: signal.Signals) -> None:
    launcher = start(service, Slow(service, hold=hold))
    manager = service.manager()
    began = time.monotonic()
    os.kill(manager, signum)
    output, errors = launcher.communicate(timeout=DEADLINE)
    assert time.monotonic() - began < HASTE
    assert (launcher.returncode, output) == (1, "")
    assert errors.startswith("daemontest.py: ")
    assert errors.count("\n") == 1
    assert_nothing_is_left(service)
    assert [match["message"] for match in service.records() if int(match["pid"]) == manager][-2:] == [
        f"Caught {signum.name}", "Server Terminated."]


def test_a_stop_by_command_counts(service: Service) -> None:
    launcher = start(service, Slow(service, hold="hold"))
    manager = service.manager()
    stopped = service.stop()
    assert (stopped.returncode, stopped.stdout) == (0, f"daemontest.py {manager} Server terminated.\n")
    assert service.processes() <= {launcher.pid}  # which may be about to end
    launcher.communicate(timeout=DEADLINE)
    assert launcher.returncode == 1
    assert_nothing_is_left(service)


@pytest.mark.parametrize(("hold", "signum"), [("hold", signal.SIGTERM), ("compute", signal.SIGINT)])
def test_a_stop_counts_in_the_foreground(service: Service, hold: str, signum: signal.Signals) -> None:
    slow = Slow(service, hold=hold)
    daemon = service.foreground(*slow.arguments, "--log-file", service.log_file)
    slow.wait_for(1)
    began = time.monotonic()
    daemon.send_signal(signum)
    daemon.communicate(timeout=DEADLINE)
    assert time.monotonic() - began < HASTE
    assert_nothing_is_left(service)


@pytest.mark.parametrize("hold", HOLDS)
def test_a_hup_starts_it_afresh_with_what_is_on_the_disk_by_then(service: Service, hold: str) -> None:
    service.configure("workers = 1")
    slow = Slow(service, "one", hold)
    launcher = start(service, slow)
    manager, [first] = service.manager(), slow.imports()
    slow.hold()
    slow.say("two")
    service.configure("workers = 2")
    os.kill(manager, signal.SIGHUP)
    assert slow.wait_for(2) != first
    slow.let_go()
    output, errors = launcher.communicate(timeout=DEADLINE)
    assert (launcher.returncode, errors) == (0, "")
    assert output == f"daemontest.py: {manager} started, 2 workers on port {service.port}\n"
    assert replies(service) == {"two\n"}
    wait_until(lambda: not alive(first), "the import that is given up to end")
    assert len(service.workers()) == 2
    assert len(slow.imports()) == 2


def reached(service: Service) -> dict[str, bool]:
    """Which steps a start has reached."""
    content = service.pid_file.read_text() if service.pid_file.exists() else ""
    log = service.log
    return {"launched": True, "PID file": service.pid_file.exists(), "PID": content.endswith("\n"),
            "log": "Daemon Server Started" in log, "generation": "Manager Process ID" in log,
            "import": "Loading configuration" in log, "worker": "Child Process Started" in log,
            "workers": log.count("Child Process Started") == 3}


STEPS = ["launched", "PID file", "PID", "log", "generation", "import", "worker", "workers"]


@pytest.mark.parametrize("step", STEPS)
def test_whenever_the_launcher_is_killed_or_interrupted_there_is_a_whole_service_or_none(
        service: Service, step: str) -> None:
    service.expected.append("Manager Failed: |^    ")
    for signum in (signal.SIGKILL, signal.SIGINT):
        if step == "launched" and signum == signal.SIGINT:
            continue  # Python itself may not be up to take it
        launcher = service.popen("-p", str(service.port), "-w", "3")
        end = time.monotonic() + DEADLINE
        while not reached(service)[step]:  # without pauses, not to miss the moment
            assert time.monotonic() < end, step
        time.sleep(random.choice([0.0, random.uniform(0, 0.01)]))  # the moment itself is the stimulus
        launcher.send_signal(signum)
        output, errors = launcher.communicate(timeout=DEADLINE)
        if signum == signal.SIGINT:
            assert (launcher.returncode, output, errors) in [
                (1, "", "daemontest.py: interrupted\n"),
                (0, f"daemontest.py: {pid(service)} started, 3 workers on port {service.port}\n", "")]
            assert bool(service.processes()) == (launcher.returncode == 0)
        wait_until(lambda: is_gone(service) or serves(service), "a whole service or none", HASTE)
        with suppress(OSError, ValueError):  # it has gone, or is about to: it answered before it gave the start up
            os.kill(service.manager(), signal.SIGTERM)
        wait_until(lambda: is_gone(service), "the stop")
        service.log_file.unlink(missing_ok=True)
        service.pid_file.unlink(missing_ok=True)  # which a launcher that was killed early cannot remove


def pid(service: Service) -> str:
    return service.pid_file.read_text().strip() if service.pid_file.exists() else "none"


def is_gone(service: Service) -> bool:
    """Whether no process is left, nor one that is just being forked: those that become the manager hold the lock."""
    try:
        with service.pid_file.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        pass
    except BlockingIOError:
        return False
    return not service.processes()


def serves(service: Service) -> bool:
    """Whether a whole service runs and answers."""
    try:
        return len(service.workers()) == 3 and service.ask("x").endswith(" your text size: 1\n")
    except (OSError, ValueError):  # no PID file, no PID in it, or nobody who listens
        return False


def test_a_launcher_that_is_held_up_while_signals_count_tells_of_one_start(service: Service) -> None:
    slow = Slow(service, hold="hold")
    launcher = start(service, slow)
    launcher.send_signal(signal.SIGSTOP)
    slow.let_go()
    manager = service.manager()
    first = service.serving_generation()
    os.kill(manager, signal.SIGHUP)
    wait_until(lambda: service.serving_generation() != first and len(service.generations()) == 1, "a reload")
    service.serving_generation()
    launcher.send_signal(signal.SIGCONT)
    assert launcher.communicate(timeout=DEADLINE) == (
        f"daemontest.py: {manager} started, 5 workers on port {service.port}\n", "")
    assert launcher.returncode == 0
    assert replies(service) == {"one\n"}


# ---- At a reload ------------------------------------------------------------------------


@pytest.mark.parametrize("hold", HOLDS)
def test_meanwhile_the_last_generation_serves_and_keeps_its_workers(service: Service, hold: str) -> None:
    service.expected.append(r"Child Process Died\. \(SIGKILL\)")
    slow = Slow(service)
    manager = service.start("-w", "2", "-n", "3", *slow.arguments)
    generation = service.generations()
    slow.say("two")
    slow.hold(hold)
    os.kill(manager, signal.SIGHUP)
    importing = slow.wait_for(2)
    assert service.generations() == {*generation, importing}
    assert replies(service, 10) == {"one\n"}  # which takes four workers
    for signum in (signal.SIGTERM, signal.SIGKILL):
        workers = wait_until(lambda: those_that_stay(service, 2, 3), "two workers")
        os.kill(min(workers), signum)
        wait_until(lambda: len(service.workers() - {min(workers)}) == 2, f"a new worker after {signum.name}")  # noqa: B023
    assert replies(service) == {"one\n"}
    assert alive(importing)
    assert service.run("--status").stdout == f"{manager}\n"
    began = time.monotonic()
    assert service.stop().returncode == 0
    assert time.monotonic() - began < HASTE
    assert_nothing_is_left(service)


def those_that_stay(service: Service, count: int, requests: int) -> set[int]:
    """The workers, once they are COUNT of which none has had its REQUESTS and is about to leave; until then nothing."""
    workers = service.workers()
    had = Counter(int(match["pid"]) for match in service.records("Client Query Processing Started."))
    return workers if len(workers) == count and all(had[worker] < requests for worker in workers) else set()


@pytest.mark.parametrize("hold", HOLDS)
def test_a_hup_starts_a_reload_afresh_with_what_is_on_the_disk_by_then(service: Service, hold: str) -> None:
    slow = Slow(service)
    manager = service.start("-w", "1", *slow.arguments)
    workers = service.workers()
    slow.hold(hold)
    for count, word in enumerate(("two", "three", "four"), 2):
        slow.say(word)
        if word == "four":
            slow.hold()  # which ends when it is let go, and no sooner
        os.kill(manager, signal.SIGHUP)
        slow.wait_for(count)
        assert len(service.generations()) <= 2
    slow.let_go()
    service.wait_for_new_workers(workers)
    assert replies(service) == {"four\n"}
    service.generation()
    assert not any(map(alive, slow.imports()[:-1]))
    assert len(slow.imports()) == 4
    assert not service.records("Nothing Changed")


@pytest.mark.parametrize("hold", HOLDS)
def test_when_the_manager_is_killed_an_import_ends_with_it(service: Service, hold: str) -> None:
    slow = Slow(service)
    manager = service.start("-w", "1", *slow.arguments)
    slow.hold(hold)
    os.kill(manager, signal.SIGHUP)
    slow.wait_for(2)
    os.kill(manager, signal.SIGKILL)
    wait_until(lambda: not service.processes() and service.refuses(), "the generations to go", HASTE)
    slow.let_go()
    service.start("-w", "1", *slow.arguments)
    assert replies(service) == {"one\n"}


def test_when_the_manager_is_killed_what_an_import_has_forked_ends_with_it(service: Service) -> None:
    service.write_handler("def handle(text):\n    return 'one'\n")
    manager = service.start("-w", "1", "--handler", "service:handle")
    service.write_handler("import os, time\nif os.fork():\n    print('forked')\ntime.sleep(60)\n")
    os.kill(manager, signal.SIGHUP)
    wait_until(lambda: "forked\n" in service.log, "the import to fork")
    os.kill(manager, signal.SIGKILL)
    wait_until(lambda: not service.processes() and service.refuses(), "all to go", HASTE)


def test_a_generation_that_dies_during_a_reload_is_followed_by_the_one_that_loads(service: Service) -> None:
    service.expected.append(r"Generation Died\. \(SIGKILL\)")
    slow = Slow(service)
    manager = service.start("-w", "1", *slow.arguments)
    generation, [worker] = service.generation(), service.workers()
    slow.say("two")
    slow.hold()
    os.kill(manager, signal.SIGHUP)
    importing = slow.wait_for(2)
    os.kill(generation, signal.SIGKILL)
    service.wait_for_records("Generation Died")
    wait_until(lambda: not alive(worker), "the dead one's worker to leave")
    slow.let_go()
    assert replies(service) == {"two\n"}
    assert service.generations() == {importing}
    assert len(slow.imports()) == 2


def test_thirty_hups_in_three_seconds_with_slow_requests_in_hand_lose_none(service: Service) -> None:
    slow = Slow(service)
    manager = service.start("-w", "2", *slow.arguments)
    most = {"generations": 0, "workers": 0}

    def count(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            most["generations"] = max(most["generations"], at_one_time(lambda: children(manager)))
            most["workers"] = max(most["workers"], at_one_time(
                lambda: set().union(*map(children, children(manager)))))
            time.sleep(0.005)

    with Load(service, 2, b"slowly") as load, Load(service, 2, pause=0.05) as quick:
        for number in range(30):
            slow.say(f"word {number}")
            os.kill(manager, signal.SIGHUP)
            count(0.1)
        wait_until(lambda: replies(service, 1) == {"word 29\n"}, "the last word")
        count(0.5)
    assert load.failures == quick.failures == []
    assert len(load.replies) >= 2
    assert most["generations"] == 2
    assert 2 <= most["workers"] <= 4
    assert len(service.records("Caught SIGHUP")) >= 15
    assert service.manager() == manager
    wait_until(lambda: (len(generations := service.generations()), len(workers := service.workers())) == (1, 2)
               and service.processes() == {manager, *generations, *workers}, "one generation and its workers alone")


def children(pid: int) -> set[int]:
    """The children of PID, also those not yet reaped; quick, so that many samples can be taken."""
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()


def at_one_time(look: Callable[[], set[int]]) -> int:
    """How many processes there were at one moment: a look takes time, but who is seen by two was there between them."""
    return len(look() & look())


# ---- In a generation that is started anew ----------------------------------------------------


@pytest.mark.parametrize("hold", HOLDS)
def test_signals_count_while_one_is_started_anew(service: Service, hold: str) -> None:
    service.expected.append(r"Generation Died\. \(SIGKILL\)|Generation Failed: .* the process died \(SIGKILL\)")
    slow = Slow(service)
    manager = service.start("-w", "1", *slow.arguments)
    generation = service.generation()
    slow.hold(hold)
    os.kill(generation, signal.SIGKILL)
    importing = slow.wait_for(2)
    slow.say("two")
    os.kill(manager, signal.SIGHUP)
    assert slow.wait_for(3) != importing
    wait_until(lambda: not alive(importing), "the import that is given up to end")
    slow.let_go()
    if hold == "compute":  # it is still at it
        os.kill(manager, signal.SIGHUP)
    assert replies(service) == {"two\n"}
    generation = service.generation()
    slow.hold(hold)
    begun = len(slow.imports())
    os.kill(generation, signal.SIGKILL)
    slow.wait_for(begun + 1)
    began = time.monotonic()
    assert service.stop().returncode == 0
    assert time.monotonic() - began < HASTE
    assert_nothing_is_left(service)
