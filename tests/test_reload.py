"""A reload, by HUP or by --reload: all of the new, or nothing of it."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import Service, alive, free_port, read_all, wait_until

HANDLER = """
import helper

def handle(text):
    import later  # the module that it found when it was imported, whatever has become of the file
    return f"WORD {helper.WORD} {later.WORD}"
"""


def write_version(service: Service, word: str) -> None:
    """Handler and helpers whose reply is WORD three times."""
    service.write_handler(f"WORD = {word!r}", "helper")
    service.write_handler(f"WORD = {word!r}", "later")
    service.write_handler("import later\n" + HANDLER.replace("WORD ", f"{word} "))


def hup(service: Service) -> None:
    os.kill(service.manager(), signal.SIGHUP)


def reload(service: Service) -> None:
    done = service.run("--reload")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"daemontest.py: {service.manager()} reloaded\n"


def replies(service: Service, count: int = 10) -> set[str]:
    """What clients are told, without the PIDs."""
    return {service.ask("x").partition(" ")[2] for _ in range(count)}


by_both_ways = pytest.mark.parametrize("renew", [hup, reload])


# ---- What is good is applied ------------------------------------------------------------


@by_both_ways
def test_the_number_of_workers_goes_up_and_down(service: Service, renew: Callable[[Service], None]) -> None:
    service.configure("workers = 2")
    service.start()
    for number in (5, 1):
        old = service.workers()
        service.configure(f"workers = {number}")
        renew(service)
        wait_until(lambda n=number, old=old: len(service.workers()) == n and not service.workers() & old,
                   f"{number} new workers")
    assert service.ask("x").endswith(" your text size: 1\n")
    assert not service.records("Child Process Died")


def test_limits_are_those_of_the_new_configuration(service: Service) -> None:
    service.configure("workers = 1")
    service.start()
    [old] = service.workers()
    service.configure("workers = 1\nmax_text = 10\nmax_requests = 2\n")
    hup(service)
    [new] = service.wait_for_new_workers({old})
    assert service.ask("x" * 11) == f"{new} error: text longer than 10 bytes\n"
    assert service.ask("x" * 10) == f"{new} your text size: 10\n"
    assert service.ask("x" * 10) != f"{new} your text size: 10\n"


def test_what_the_command_line_said_still_counts(service: Service) -> None:
    service.configure("workers = 2")
    service.start("-w", "3")
    old = service.workers()
    service.configure("workers = 5")
    hup(service)
    assert len(service.wait_for_new_workers(old)) == 3


def test_a_configuration_file_that_came_or_went_counts(service: Service) -> None:
    service.start("-w", "1")
    old = service.workers()
    path = service.configure("max_text = 5")
    hup(service)
    old = service.wait_for_new_workers(old)
    assert replies(service, 1) == {"your text size: 1\n"}
    assert service.ask("123456").endswith(" error: text longer than 5 bytes\n")
    path.unlink()
    hup(service)
    service.wait_for_new_workers(old)
    assert service.ask("123456").endswith(" your text size: 6\n")


@by_both_ways
def test_new_code_is_seen_even_if_its_file_is_as_long_and_as_old(
        service: Service, renew: Callable[[Service], None]) -> None:
    """Python itself takes a compiled file for new by the whole seconds and the size of its source."""
    write_version(service, "one")
    files = [service.home / f"{name}.py" for name in ("service", "helper", "later")]
    for file in files:
        os.utime(file, (1e9, 1e9))
    service.start("-w", "2", "--handler", "service:handle")
    assert replies(service) == {"one one one\n"}
    old = service.workers()
    write_version(service, "two")
    for file in files:
        os.utime(file, (1e9, 1e9))
    renew(service)
    service.wait_for_new_workers(old)
    assert replies(service) == {"two two two\n"}


def test_another_handler_may_be_named(service: Service) -> None:
    service.write_handler("def one(text):\n    return 'one'\ndef two(text):\n    return 'two'")
    service.write_handler("def handle(text):\n    return 'three'", "other")
    names = {"service:one": "one\n", "service:two": "two\n", "other:handle": "three\n", "html:escape": "x\n"}
    service.configure("handler = 'service:one'\nworkers = 2")
    service.start()
    for name, reply in names.items():
        old = service.workers()
        service.configure(f"handler = {name!r}\nworkers = 2")
        hup(service)
        service.wait_for_new_workers(old)
        assert replies(service, 3) == {reply}


def test_a_package_is_imported_anew_as_a_whole(service: Service) -> None:
    (service.home / "ours").mkdir()
    (service.home / "ours" / "words.py").write_text("WORD = 'one'")
    (service.home / "ours" / "service.py").write_text("from .words import WORD\ndef handle(text):\n    return WORD")
    service.start("-w", "2", "--handler", "ours.service:handle")
    assert replies(service) == {"one\n"}
    old = service.workers()
    (service.home / "ours" / "words.py").write_text("WORD = 'two'")
    hup(service)
    service.wait_for_new_workers(old)
    assert replies(service) == {"two\n"}


def test_another_log_file_is_used_from_then_on(service: Service) -> None:
    service.start("-w", "2")
    old, before = service.workers(), service.log_file
    service.configure("log_file = 'new.log'")
    hup(service)
    service.wait_for_new_workers(old)
    service.log_file = service.home / "new.log"
    service.wait_for_records("Child Process Started.", 2)
    service.ask("where is it?")
    assert "    where is it?\n" in service.log
    assert "where is it?" not in before.read_text()
    assert service.log_file.stat().st_mode & 0o777 == 0o640


def test_what_waits_for_a_restart_is_logged_and_the_rest_applied(service: Service) -> None:
    service.configure(f"port = {service.port}\nworkers = 2")
    assert service.run().returncode == 0
    old, manager = service.workers(), service.manager()
    service.configure(f"bind = '127.0.0.1'\nport = {free_port()}\npid_file = 'other.pid'\nworkers = 3")
    hup(service)
    wait_until(lambda: len(service.workers()) == 3 and not service.workers() & old, "3 new workers")
    [waiting] = service.records("Waiting for a Restart")
    assert all(key in waiting["message"] for key in ("bind", "port", "pid_file"))
    assert "workers" not in waiting["message"]
    assert service.ask("x", host="::1").endswith(" your text size: 1\n")
    assert service.manager() == manager
    assert not (service.home / "other.pid").exists()
    assert service.run("-t", "--pid-file", service.pid_file).returncode == 0


# ---- What is bad changes nothing --------------------------------------------------------


BAD = {
    "syntax": ("workers = ", None, "bad configuration .*daemontest.toml: expected TOML"),
    "nesting": ("workers = " + 5000 * "[", None, "bad configuration .*daemontest.toml: expected TOML"),
    "value": ("workers = 0", None, "bad configuration .*daemontest.toml: workers: expected a whole number"),
    "log file": ("log_file = 'missing/log'", None, "cannot open log file .*/missing/log: No such file or directory"),
    "handler that is missing": ("handler = 'missing:handle'", None, "cannot load handler missing:handle: "),
    "handler that does not compile": ("workers = 3", "def handle(text)", "cannot load handler service:handle: Synt"),
    "handler that fails late": ("workers = 3", "import helper, later\nopen('/missing')",
                                "cannot load handler service:handle: FileNotFoundError"),
    "handler that exits": ("workers = 3", "import later\nraise SystemExit(0)",
                           "cannot load handler service:handle: SystemExit"),
    "handler whose failure fails": (
        "workers = 3", "class Mute(Exception):\n    def __str__(self):\n        raise RuntimeError\nraise Mute",
        "cannot load handler service:handle: (service[.])?Mute"),
    "handler whose failure exits": (
        "workers = 3", "class Mute(Exception):\n    def __str__(self):\n        raise SystemExit\nraise Mute",
        "cannot load handler service:handle: (service[.])?Mute"),
    "function that is missing": ("workers = 3", "import helper", "cannot load handler service:handle: AttributeE"),
}


def break_it(service: Service, case: str) -> None:
    """Spoil what the next reload reads, and change the rest of it, too."""
    configuration, source, _ = BAD[case]
    if "handler" not in configuration:
        configuration += "\nhandler = 'service:handle'"
    write_version(service, "bad")
    if source:
        service.write_handler(source)
    service.configure(configuration)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_one_is_logged_and_changes_nothing(service: Service, case: str) -> None:
    """Workers forked afterwards, too, have the old handler and its old helpers."""
    service.expected += ["Nothing Changed: "]
    write_version(service, "old")
    service.configure("workers = 2\nhandler = 'service:handle'")
    service.start()
    old = service.workers()
    break_it(service, case)
    hup(service)
    [logged] = service.wait_for_records("Nothing Changed: ")
    assert re.match(f"Nothing Changed: {BAD[case][2]}", logged["message"])
    assert replies(service) == {"old old old\n"}
    assert service.workers() == old
    for worker in old:
        os.kill(worker, signal.SIGTERM)
    service.wait_for_new_workers(old)
    assert replies(service) == {"old old old\n"}


@pytest.mark.parametrize("case", BAD)
def test_the_command_says_why_nothing_changed(service: Service, case: str) -> None:
    service.expected += ["Nothing Changed: "]
    write_version(service, "old")
    service.configure("workers = 2\nhandler = 'service:handle'")
    service.start()
    old = service.workers()
    break_it(service, case)
    done = service.run("--reload")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: nothing changed: {BAD[case][2]}[^\n]*\n", done.stderr), done.stderr
    assert replies(service, 5) == {"old old old\n"}
    assert service.workers() == old
    [logged] = service.records("Nothing Changed: ")
    assert logged["message"].lower() == done.stderr.removeprefix("daemontest.py: ").removesuffix("\n").lower()


def test_two_bad_ones_do_not_spoil_the_good_one_that_follows(service: Service) -> None:
    service.expected += ["Nothing Changed: "]
    write_version(service, "old")
    service.configure("workers = 2\nhandler = 'service:handle'")
    service.start()
    old = service.workers()
    for count, case in enumerate(("handler that fails late", "syntax"), 1):
        break_it(service, case)
        hup(service)
        service.wait_for_records("Nothing Changed: ", count)
        assert replies(service) == {"old old old\n"}
    assert service.workers() == old
    write_version(service, "new")
    service.configure("workers = 2\nhandler = 'service:handle'")
    hup(service)
    service.wait_for_new_workers(old)
    assert replies(service) == {"new new new\n"}


def test_a_service_that_does_not_run_cannot_be_reloaded(service: Service) -> None:
    done = service.run("--reload")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "daemontest.py: not running\n")
    service.pid_file.write_text(f"{os.getpid()}\n")  # left over, and its PID now another's: SIGHUP would end this test
    done = service.run("--reload")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "daemontest.py: not running\n")
    service.pid_file.unlink()


# ---- Nobody is left waiting --------------------------------------------------------------

BUSY = """
import os, time
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
print(flush=True)
end = time.monotonic() + 0.5
while time.monotonic() < end:
    pass
"""


@contextmanager
def starved(processes: set[int], besides: set[int]) -> Iterator[subprocess.Popen[bytes]]:
    """PROCESSES do not run, for half a second at the most; this one, those BESIDES and their children do.

    Nor does whatever else is on that processor, other tests for instance: so it is to be over soon.
    """
    cpus = os.sched_getaffinity(0)
    theirs = {min(cpus)}
    for pid in processes:
        os.sched_setaffinity(pid, theirs)
    for pid in besides:
        os.sched_setaffinity(pid, cpus - theirs)
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE,
                          preexec_fn=lambda: os.sched_setaffinity(0, theirs)) as busy:
        try:
            os.sched_setaffinity(0, cpus - theirs)
            assert busy.stdout and busy.stdout.read(1), "no real-time priority"
            yield busy
        finally:
            busy.kill()
            os.sched_setaffinity(0, cpus)


def has_term_pending(pid: int) -> bool:
    [pending] = re.findall(r"^ShdPnd:\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(pending, 16) & 1 << signal.SIGTERM - 1)


def test_once_the_command_has_returned_no_old_worker_takes_a_client(service: Service) -> None:
    service.start("-w", "1", *service.use_handler("does_as_told"))
    [old] = service.workers()
    with service.connect() as busy, service.connect() as client:
        busy.sendall(b"hold" + b" " * 3000 + b"gate")
        wait_until(lambda: service.has_client(old), "it in hand")
        busy.shutdown(socket.SHUT_WR)
        wait_until((service.home / "held-gate").exists, "the handler to run")
        reload(service)
        [new] = service.workers() - {old}
        os.kill(new, signal.SIGSTOP)  # as if it were not scheduled
        try:
            client.sendall(b"x")
            client.shutdown(socket.SHUT_WR)
            (service.home / "gate").touch()
            assert read_all(busy) == b"%d your text size: 3008\n" % old
            wait_until(lambda: not alive(old), "the old worker to end")
        finally:
            os.kill(new, signal.SIGCONT)
        assert read_all(client) == b"%d your text size: 1\n" % new


@pytest.mark.skipif(os.geteuid() != 0 or len(os.sched_getaffinity(0)) < 2, reason="real-time priority needs root")
def test_a_client_that_calls_a_worker_which_has_just_been_told_to_leave_is_served(service: Service) -> None:
    manager = service.start("-w", "2")
    old = service.workers()
    with starved(old, {manager, *service.generations()}) as busy:
        hup(service)
        wait_until(lambda: len(service.workers() - old) == 2, "new workers")
        wait_until(lambda: all(psutil.Process(new).status() == psutil.STATUS_SLEEPING
                               for new in service.workers() - old), "new workers that wait")
        wait_until(lambda: busy.poll() is not None or all(map(has_term_pending, old)), "old workers to be told")
        client = service.connect()
        client.sendall(b"x")
        client.shutdown(socket.SHUT_WR)
    with client:
        assert read_all(client).endswith(b" your text size: 1\n")
    wait_until(lambda: not service.workers() & old, "old workers to leave")
