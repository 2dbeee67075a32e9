"""A reload, by HUP or by --reload, brings all of the new or nothing of it, and loses no request."""

import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest
from conftest import Load, Service, alive, free_port, wait_until
from modules import HANDLER, HARMFUL, HASTE, LOAD, HeldImport, draining


def hup(service: Service) -> None:
    """Send HUP; returns when there are only new workers."""
    old = service.workers()
    os.kill(service.manager(), signal.SIGHUP)
    wait_until(lambda: (new := service.workers()) and not new & old, "new workers alone")


def reload(service: Service) -> None:
    done = service.run("--reload")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"daemontest.py: {service.manager()} reloaded\n", "")


def replies(service: Service, count: int = 8) -> set[str]:
    """What clients are told, without the PIDs."""
    return {service.ask("x").partition(" ")[2].rstrip("\n") for _ in range(count)}


by_both_ways = pytest.mark.parametrize("renew", [hup, reload])


# ---- All of the new ----------------------------------------------------------------------

@by_both_ways
def test_workers_go_up_and_down(service: Service, renew: Callable[[Service], None]) -> None:
    service.configure("workers = 2")
    service.start()
    for number in (5, 1):
        old = service.workers()
        service.configure(f"workers = {number}")
        renew(service)
        wait_until(lambda: len(service.workers()) == number, f"{number} workers")  # noqa: B023
        assert not service.workers() & old
    assert service.ask("x").endswith(" your text size: 1\n")


@by_both_ways
def test_new_code_is_seen_though_its_files_are_as_long_and_as_old(
        service: Service, renew: Callable[[Service], None]) -> None:
    """Python takes a compiled file for new by the whole seconds and the size of its source."""

    def write(word: str) -> None:
        (service.home / "ours" / "words.py").write_text(f"WORD = {word!r}")
        (service.home / "ours" / "main.py").write_text(
            "import helper\nfrom .words import WORD\ndef handle(text):\n    import helper  # not one edited since\n"
            f"    return f'{word} {{WORD}} {{helper.WORD}}'")
        service.write_handler(f"WORD = {word!r}", "helper")
        for file in (*service.home.glob("ours/*.py"), service.home / "helper.py"):
            os.utime(file, (1e9, 1e9))

    (service.home / "ours").mkdir()
    write("one")
    service.start("-w", "2", "--handler", "ours.main:handle")
    assert replies(service) == {"one one one"}
    write("two")
    assert replies(service) == {"one one one"}
    renew(service)
    assert replies(service) == {"two two two"}


def test_settings_of_a_file_come_and_go_and_the_command_line_beats_them(service: Service) -> None:
    service.write_handler("def one(text):\n    return 'one'\ndef two(text):\n    return 'two'")
    service.start("-w", "1", "--log", "texts")
    settings = "workers = 3\nmax_text = 10\nlog = 'life'\n"
    for function in ("one", "two"):
        path = service.configure(f"{settings}handler = 'service:{function}'\nlog_file = '{function}.log'")
        hup(service)
        [worker] = service.workers()
        assert service.ask("x" * 11) .endswith(" error: text longer than 10 bytes\n")
        assert service.ask(f"for {function}") == f"{worker} {function}\n"
        assert f"    for {function}\n" in (service.home / f"{function}.log").read_text()
    path.unlink()
    hup(service)
    assert service.ask("x" * 11).endswith(" your text size: 11\n")
    assert re.findall("for .*", service.log) == [], "since that was another file"


def test_what_cannot_change_needs_a_restart_and_the_rest_is_applied(service: Service) -> None:
    service.configure(f"port = {service.port}\nworkers = 2")
    assert service.run().returncode == 0
    manager = service.manager()
    path = service.configure(f"bind = '127.0.0.1'\nport = {free_port()}\npid_file = 'other.pid'\nworkers = 3")
    hup(service)
    wait_until(lambda: len(service.workers()) == 3, "3 workers")
    [needed] = service.records("Needs a Restart: ")
    assert {*re.findall(r"\w+", needed["message"].partition(": ")[2])} == {"bind", "port", "pid_file"}
    assert service.ask("x", host="::1").endswith(" your text size: 1\n")
    assert service.manager() == manager
    assert not (service.home / "other.pid").exists()
    path.unlink()  # so that a stop finds the PID file


# ---- Or nothing of it --------------------------------------------------------------------

BAD = {  # a further line of the configuration; service.py ("": a good one, None: none); a pattern for why not
    **{name: ("", source, why) for name, (source, why) in HARMFUL.items()},
    "no TOML": ("grace = ", "", "bad configuration .*/daemontest.toml: expected TOML.*"),
    "a value out of range": ("grace = -1", "", "bad configuration .*/daemontest.toml: grace: .*"),
    "a log in no directory": ("log_file = '/no/log'", "", "cannot open log file /no/log: No such file or directory"),
    "a function that is missing": ("", "import helper", LOAD + ".*handle.*"),
    "a module that is missing": ("", None, LOAD + ".*service.*"),
}


def write_words(service: Service, word: str) -> None:
    """Let handler and helper reply with WORD."""
    service.write_handler(f"import helper\ndef handle(text):\n    return f'{word} {{helper.WORD}}'")
    service.write_handler(f"WORD = {word!r}", "helper")


def fail_by_hup(service: Service) -> str:
    """Send HUP, which must fail; the reason, from the log."""
    count = len(service.records("Reload Failed: "))
    os.kill(service.manager(), signal.SIGHUP)
    failed = service.wait_for_records("Reload Failed: ", count + 1)[count]
    assert int(failed["pid"]) == service.manager()
    assert failed["message"].endswith(" (nothing changed)"), failed["message"]
    return failed["message"].removeprefix("Reload Failed: ").removesuffix(" (nothing changed)")


def fail_by_command(service: Service) -> str:
    """Reload, which must fail; the reason, from standard error."""
    done = service.run("--reload", "--pid-file", str(service.pid_file))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"daemontest\.py: nothing changed: [^\n]+\n", done.stderr), done.stderr
    why = done.stderr[:-1].removeprefix("daemontest.py: nothing changed: ")
    assert service.records("Reload Failed: ")[-1]["message"] == f"Reload Failed: {why} (nothing changed)"
    return why


@pytest.mark.parametrize("fail", [fail_by_hup, fail_by_command])
def test_a_bad_reload_says_why_and_changes_nothing(service: Service, fail: Callable[[Service], str]) -> None:
    service.expected += ["Reload Failed: ", "Handler Not Loaded:", "^    ", "^Fatal",
                         r"Child Process Died\. \(exit status 7\)"]
    write_words(service, "old")
    configuration = "workers = 2\nhandler = 'service:handle'\n"
    service.configure(configuration)
    manager = service.start()
    workers, processes = service.workers(), service.processes()
    opened = psutil.Process(manager).num_fds()
    for case, (line, source, why) in BAD.items():
        write_words(service, "bad")
        service.configure(configuration.replace("2", "3") + line)
        if source is None:
            (service.home / "service.py").unlink()
        elif source:
            service.write_handler(source)
        told = fail(service)
        assert re.fullmatch(why, told), (case, told)
        assert service.workers() >= workers, case
        assert replies(service, 3) == {"old old"}, case
    wait_until(lambda: service.processes() == processes, "the failed generations to go")
    wait_until(lambda: psutil.Process(manager).num_fds() <= opened, f"no more than {opened} descriptors")
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    workers = service.wait_for_new_workers(workers)
    assert replies(service) == {"old old"}, "workers forked afterwards"
    write_words(service, "new")
    service.configure(configuration)
    hup(service)
    assert replies(service) == {"new new"}


# ---- Nothing is lost ---------------------------------------------------------------------

def test_the_last_generation_leaves_when_the_next_is_up_and_never_before(service: Service) -> None:
    service.start("-w", "3")
    for _ in range(3):
        old = service.workers()
        hup(service)
        new = service.wait_for_new_workers(old)
        told = [(int(match["pid"]), match["message"]) for match in service.records()]
        last_up = max(told.index((worker, "Child Process Started.")) for worker in new)
        assert last_up < min(told.index((worker, "Caught SIGTERM")) for worker in old)


def test_hups_under_load_lose_no_request(service: Service) -> None:
    handler = HeldImport(service)
    manager = service.start("-w", "2", *HANDLER)
    with Load(service, 2, b"slowly") as slow, Load(service, 2, pause=0.02) as quick:
        for number in range(10):
            handler.say(f"word {number}")
            os.kill(manager, signal.SIGHUP)
            quick.wait_for(5)
            assert len(service.generations() & service.generations()) <= 2, "seen by both looks, so at one time"
        wait_until(lambda: replies(service, 1) == {"word 9"}, "the last word")
    assert slow.failures == quick.failures == []
    assert slow.replies
    wait_until(lambda: (len(service.generations()), len(service.workers()), len(service.processes())) == (1, 2, 5),
               "manager, keeper, one generation and its workers alone")


def test_a_reload_is_over_when_the_last_old_handler_has_ended_and_hups_meanwhile_are_one(service: Service) -> None:
    with draining(service) as (last, busy, reloading, finish):
        manager = service.manager()
        assert replies(service) == {"new"}
        two = service.generations()
        for count in range(2, 6):
            os.kill(manager, signal.SIGHUP)
            service.wait_for_records("Caught SIGHUP", count)
        assert service.run("--status").returncode == 0
        assert service.generations() == two > {last}
        assert reloading.poll() is None
        finish()
    assert reloading.communicate(timeout=50) == (f"daemontest.py: {manager} reloaded\n", "")
    assert not alive(busy)
    wait_until(lambda: len(service.workers()) == 2 and not service.generations() & two, "the third generation alone")
    assert len(service.records("Loading configuration.")) == 3


def test_each_of_several_commands_returns_when_its_own_change_is_in_force(service: Service) -> None:
    HeldImport(service, "")
    service.start("-w", "2", *HANDLER)
    writing, missed = threading.Lock(), []

    def change(letter: str) -> None:
        with writing:
            word = service.home / "word"
            (service.home / "next").write_text(word.read_text() + letter)
            os.replace(service.home / "next", word)  # so that nobody reads half of it
        reload(service)
        missed.extend(reply for reply in replies(service, 4) if letter not in reply)

    with ThreadPoolExecutor() as pool:
        list(pool.map(change, "abcdef"))  # which raises what one of them has raised
    assert not missed


# ---- While the new module is being imported ------------------------------------------------

@pytest.mark.parametrize("how", ["sleep", "deaf"])
def test_during_an_import_the_old_serves_and_a_hup_starts_it_afresh(service: Service, how: str) -> None:
    service.expected.append(r"Child Process Died\. \(SIGKILL\)")
    handler = HeldImport(service)
    manager = service.start("-w", "2", "-n", "3", *HANDLER)
    generation = service.generations()
    handler.say("new")
    handler.hold(how)
    reloading = service.popen("--reload")
    first_import = handler.wait_for(2)
    assert service.generations() == {*generation, first_import}
    assert replies(service, 10) == {"old"}, "10 texts take four workers"
    killed = max(wait_until(lambda: len(service.workers()) == 2 and service.workers(), "two workers"))  # the newest
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: len(service.workers() - {killed}) == 2, "another worker")
    assert replies(service) == {"old"}
    assert service.run("--status").stdout == f"{manager}\n"
    assert alive(first_import)
    handler.say("newer")
    handler.hold("sleep")
    os.kill(manager, signal.SIGHUP)
    handler.wait_for(3)
    wait_until(lambda: not alive(first_import), "the import that is given up to end", HASTE)
    assert reloading.poll() is None
    handler.release()
    assert reloading.communicate(timeout=50) == (f"daemontest.py: {manager} reloaded\n", "")
    assert replies(service) == {"newer"}
    assert handler.wait_for(3) in service.generations()
    assert not service.records("Reload Failed")


@pytest.mark.parametrize("how", ["sleep", "deaf"])
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_service_that_stops_during_an_import_is_a_failure(service: Service, end: signal.Signals, how: str) -> None:
    handler = HeldImport(service)
    manager = service.start("-w", "2", *HANDLER)
    handler.hold(how)
    reloading = service.popen("--reload")
    importing = handler.wait_for(2)
    os.kill(manager, end)
    output, errors = reloading.communicate(timeout=HASTE)
    assert (reloading.returncode, output) == (1, "")
    assert re.fullmatch(r"daemontest\.py: [^\n]*stop[^\n]*\n", errors), errors
    wait_until(lambda: service.processes() <= {importing}, "the service to be gone", HASTE)
    if end == signal.SIGTERM:
        wait_until(lambda: not alive(importing), "the import to be given up", HASTE)
    elif alive(importing):  # it may stay until it returns, without the port and the lock
        handler.release()
        service.start("-w", "1", *HANDLER)
        assert replies(service, 2) == {"old"}
        with suppress(ProcessLookupError):  # it has found its manager gone
            os.kill(importing, signal.SIGKILL)


def test_interrupted_the_command_ends_and_the_reload_goes_on(service: Service) -> None:
    handler = HeldImport(service)
    service.start("-w", "2", *HANDLER)
    handler.say("new")
    handler.hold()
    reloading = service.popen("--reload")
    handler.wait_for(2)
    reloading.send_signal(signal.SIGINT)
    assert reloading.communicate(timeout=HASTE) == ("", "daemontest.py: interrupted\n")
    assert reloading.returncode == 1
    handler.release()
    wait_until(lambda: replies(service) == {"new"}, "the new code")
