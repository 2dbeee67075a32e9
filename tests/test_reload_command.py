"""--reload tells the truth: it returns when the reload is over, and says how it went."""

import os
import re
import shutil
import signal
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import DAEMON, DATA, Service, wait_until


def reloads(service: Service, *arguments: str | Path) -> None:
    """Reload; it must go well, in the words of the contract."""
    done = service.run("--reload", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"daemontest.py: {service.manager()} reloaded\n", "")


def changes_nothing(service: Service, why: str) -> None:
    """Reload; nothing must change, for the reason that matches WHY, and the service serve on."""
    service.expected += ["Nothing Changed: "]
    workers, records = service.workers(), len(service.records("Nothing Changed: "))
    done = service.run("--reload")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: nothing changed: {why}\n", done.stderr), done.stderr
    assert service.workers() == workers
    told = service.wait_for_records("Nothing Changed: ", records + 1)[records:]
    assert [record["message"] for record in told] == [f"Nothing Changed: {done.stderr[:-1].split(': ', 2)[2]}"]


def replies(service: Service, count: int = 8) -> set[str]:
    return {service.ask("x").split()[1] for _ in range(count)}


def questions(service: Service) -> list[Path]:
    return list(service.home.glob("daemontest.pid.*"))


# ---- It returns when the reload is over -------------------------------------------------


def test_after_it_has_returned_only_the_new_code_answers(service: Service) -> None:
    (service.home / "word").write_text("0")
    service.start(*service.use_handler("one_word"))
    for word in ("1", "2", "3", "4"):
        (service.home / "word").write_text(word)
        old = service.workers()
        reloads(service)
        assert replies(service) == {word}
        assert not {int(line.split()[0]) for line in (service.ask("x") for _ in range(8))} & old
    assert questions(service) == []


def test_it_waits_for_an_import_that_takes_its_time(service: Service) -> None:
    (service.home / "word").write_text("old")
    service.start(*service.use_handler("slow_import"), "-w", "2")
    (service.home / "word").write_text("new")
    (service.home / "hold").touch()
    reloading = service.popen("--reload")
    wait_until(lambda: len((service.home / "imports").read_text().split()) == 2, "the import to begin")
    assert replies(service) == {"old"}
    assert reloading.poll() is None
    (service.home / "hold").unlink()
    output, errors = reloading.communicate(timeout=50)
    assert (reloading.returncode, output, errors) == (0, f"daemontest.py: {service.manager()} reloaded\n", "")
    assert replies(service) == {"new"}


def test_it_does_not_wait_for_those_whom_the_old_workers_have_in_hand(service: Service) -> None:
    service.start(*service.use_handler("does_as_told"), "-w", "2")
    with service.connect() as client:
        client.sendall(b"hold gate")
        client.shutdown(socket.SHUT_WR)
        held = service.home / "held-gate"
        wait_until(lambda: held.exists() and held.read_text().endswith("\n"), "the handler to be called")
        holder = int(held.read_text())
        reloads(service)
        assert holder in service.workers()
        assert not {int(service.ask("x").split()[0]) for _ in range(8)} & {holder}
        (service.home / "gate").touch()
        assert client.recv(1000) == b"%d your text size: 9\n" % holder


def test_every_one_of_several_at_a_time_is_told_when_its_own_change_is_in_force(service: Service) -> None:
    """Each adds a line, reloads, and must then be answered by code that has read that line."""
    (service.home / "word").write_text("")
    service.start(*service.use_handler("one_word"), "-w", "2")
    writing, missed = threading.Lock(), []

    def change(letter: str) -> None:
        with writing:
            word = service.home / "word"
            (service.home / f"word.{letter}").write_text(word.read_text() + letter)
            os.replace(service.home / f"word.{letter}", word)  # so that nobody reads half of it
        reloads(service)
        missed.extend(reply for reply in (service.ask("x") for _ in range(4)) if letter not in reply)

    with ThreadPoolExecutor() as pool:
        list(pool.map(change, "abcdef"))  # which raises what one of them has raised
    assert not missed
    assert set(service.ask("x").split()[1]) == set("abcdef")
    assert questions(service) == []


def test_it_finds_the_service_by_its_configuration_and_by_its_pid_file(service: Service) -> None:
    service.configure(f'port = {service.port}\npid_file = "other.pid"\n')
    service.pid_file = service.home / "other.pid"
    done = service.run()
    assert done.returncode == 0, done.stderr
    reloads(service)
    reloads(service, "-c", service.home / "daemontest.toml")
    reloads(service, "-c", os.devnull, "--pid-file", "other.pid")
    missed = service.run("--reload", "-c", os.devnull)
    assert (missed.returncode, missed.stdout, missed.stderr) == (1, "", "daemontest.py: not running\n")
    assert len(service.records("Caught SIGHUP")) == 3


def test_one_that_is_held_up_while_it_asks_is_told_all_the_same(service: Service) -> None:
    service.start("-w", "1")
    asker = service.home / "held_asker.py"
    shutil.copy(DATA / asker.name, asker)
    asking = service.popen(DAEMON, "--reload", script=asker)
    wait_until((service.home / "held").exists, "it to make the question")
    reloads(service)  # another's
    (service.home / "go").touch()
    assert asking.communicate(timeout=50) == (f"daemontest.py: {service.manager()} reloaded\n", "")
    assert len(service.records("Caught SIGHUP")) == 2
    assert list(service.home.glob("daemontest.pid.*")) == []


def test_a_hup_meanwhile_delays_it_and_no_more(service: Service) -> None:
    (service.home / "word").write_text("old")
    manager = service.start(*service.use_handler("slow_import"), "-w", "2")
    (service.home / "hold").touch()
    reloading = service.popen("--reload")
    wait_until(lambda: len((service.home / "imports").read_text().split()) == 2, "the import to begin")
    (service.home / "word").write_text("new")
    os.kill(manager, signal.SIGHUP)
    wait_until(lambda: len((service.home / "imports").read_text().split()) == 3, "the import to begin afresh")
    assert reloading.poll() is None
    (service.home / "hold").unlink()
    assert reloading.communicate(timeout=50) == (f"daemontest.py: {manager} reloaded\n", "")
    assert replies(service) == {"new"}


# ---- Nothing has changed ----------------------------------------------------------------


def test_a_bad_configuration_is_told(service: Service) -> None:
    service.start("-w", "2")
    path = service.configure("workers = 0\n")
    changes_nothing(service, re.escape(f"bad configuration {path}: workers: expected a whole number from 1 to 10000"))
    service.configure("workers =\n")
    changes_nothing(service, rf"bad configuration {re.escape(str(path))}: expected TOML: .*")
    service.configure("")
    reloads(service)


BAD_MODULES = {
    "raises": ("raise RuntimeError('no good')", "RuntimeError: no good"),
    "is no Python": ("def", "SyntaxError: .*"),
    "lacks the function": ("", "AttributeError: module 'service' has no attribute 'handle'"),
    "exits": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "leaves with 0": ("import os\nos._exit(0)", r"the process died \(exit status 0\)"),
    "crashes": ("import ctypes\nctypes.string_at(0)", r"the process died \(SIGSEGV\)"),
    "kills itself": ("import os\nos.kill(os.getpid(), 9)", r"the process died \(SIGKILL\)"),
    "lays out a second line": ("raise RuntimeError('no\\ngood')", r"RuntimeError: no\\ngood"),
}


def test_a_module_that_cannot_be_loaded_is_told_in_the_words_of_the_log(service: Service) -> None:
    good = "def handle(text):\n    return 'old'"
    service.write_handler(good)
    service.start("--handler", "service:handle", "-w", "2")
    for source, why in BAD_MODULES.values():
        service.write_handler(source)
        changes_nothing(service, f"cannot load handler service:handle: {why}")
        assert replies(service, 4) == {"old"}
    service.write_handler(good.replace("old", "new"))
    reloads(service)
    assert replies(service) == {"new"}
    assert questions(service) == []


def test_a_log_that_cannot_be_opened_is_told(service: Service) -> None:
    service.start("-w", "2")
    service.configure('log_file = "/missing/log"\n')
    changes_nothing(service, "cannot open log file /missing/log: No such file or directory")


def test_what_waits_for_a_restart_is_no_failure(service: Service) -> None:
    service.configure(f"port = {service.port}\nworkers = 2\n")
    assert service.run().returncode == 0
    service.configure('port = 1\nworkers = 3\npid_file = "other.pid"\n')
    reloads(service, "--pid-file", service.pid_file)
    service.wait_for_records("Waiting for a Restart: port, pid_file$")
    wait_until(lambda: len(service.workers()) == 3, "the old workers, which accept no more, to be gone")
    service.configure("")  # for the stop, which is to find the PID file


# ---- Nobody is there, or not for long ---------------------------------------------------


def test_without_a_service_it_fails_and_leaves_nothing(service: Service) -> None:
    done = service.run("--reload")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "daemontest.py: not running\n")
    service.pid_file.write_text(f"{os.getpid()}\n")  # a leftover file that names another's process
    done = service.run("--reload")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "daemontest.py: not running\n")
    assert questions(service) == []
    service.pid_file.unlink()


@pytest.mark.parametrize(("end", "why"), [(signal.SIGKILL, "the service stopped meanwhile"),
                                          (signal.SIGTERM, "nothing changed: the service stops")])
def test_a_service_that_ends_meanwhile_is_told(service: Service, end: signal.Signals, why: str) -> None:
    (service.home / "word").write_text("old")
    manager = service.start(*service.use_handler("slow_import"), "-w", "2")
    (service.home / "hold").touch()
    reloading = service.popen("--reload")
    wait_until(lambda: len((service.home / "imports").read_text().split()) == 2, "the import to begin")
    os.kill(manager, end)
    output, errors = reloading.communicate(timeout=50)
    assert (reloading.returncode, output) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: {why}\n", errors), errors
    wait_until(lambda: not service.processes(), "the service to be gone, its import given up")
    assert questions(service) == []
    service.pid_file.unlink(missing_ok=True)


def test_interrupted_it_leaves_nothing_and_the_reload_goes_on(service: Service) -> None:
    (service.home / "word").write_text("old")
    service.start(*service.use_handler("slow_import"), "-w", "2")
    (service.home / "word").write_text("new")
    (service.home / "hold").touch()
    reloading = service.popen("--reload")
    wait_until(lambda: len((service.home / "imports").read_text().split()) == 2, "the import to begin")
    reloading.send_signal(signal.SIGINT)
    assert reloading.communicate(timeout=50) == ("", "daemontest.py: interrupted\n")
    assert reloading.returncode == 1
    assert questions(service) == []
    (service.home / "hold").unlink()
    wait_until(lambda: replies(service) == {"new"}, "the new code")


# ---- What others leave beside the PID file ----------------------------------------------


def test_fifos_that_killed_askers_have_left_are_cleared_away(service: Service) -> None:
    (service.home / "word").write_text("old")
    service.start(*service.use_handler("slow_import"), "-w", "2")
    (service.home / "hold").touch()
    asker = service.popen("--reload")
    wait_until(lambda: len((service.home / "imports").read_text().split()) == 2, "the import to begin")
    asker.kill()
    asker.communicate(timeout=50)
    assert len(questions(service)) == 1
    os.mkfifo(service.home / "daemontest.pid.reload-0-0")  # of one killed before it had sent HUP
    (service.home / "hold").unlink()
    reloads(service)
    wait_until(lambda: questions(service) == [], "all FIFOs to be gone; the asker's own may have been answered first")


def test_files_that_are_no_fifos_are_left_alone(service: Service) -> None:
    service.start("-w", "2")
    notes, link, aim = (service.home / name for name in ("daemontest.pid.reload-notes", "daemontest.pid.reload-link",
                                                         "aim"))
    notes.write_text("mine")
    aim.write_text("mine, too")
    link.symlink_to(aim)
    reloads(service)
    assert (notes.read_text(), aim.read_text(), link.is_symlink()) == ("mine", "mine, too", True)


def test_a_fifo_is_for_its_owner_alone(service: Service) -> None:
    (service.home / "word").write_text("old")
    service.start(*service.use_handler("slow_import"), "-w", "1")
    (service.home / "hold").touch()
    asker = service.popen("--reload", umask=0)
    wait_until(lambda: len((service.home / "imports").read_text().split()) == 2, "the import to begin")
    question, = questions(service)
    assert stat.filemode(question.stat().st_mode) == "prw-------"
    (service.home / "hold").unlink()
    assert asker.communicate(timeout=50)[1] == ""


# ---- Wrong usage ------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [
    ("-b", "127.0.0.1"), ("-p", "12345"), ("-w", "2"), ("-n", "7"), ("--handler", "service:handle"), ("--timeout", "1"),
    ("--handler-timeout", "1"), ("--grace", "1"), ("--max-text", "5"), ("--log-file", "other.log")])
def test_a_setting_that_cannot_reach_the_service_is_wrong_usage(service: Service, setting: tuple[str, str]) -> None:
    done = service.run("--reload", *setting)
    assert (done.returncode, done.stdout) == (2, "")
    usage, *_, told = done.stderr.strip().split("\n")
    assert usage.startswith("usage: daemontest.py ")
    assert told.startswith("daemontest.py: error: --reload ")


def test_refused_settings_reach_no_service(service: Service) -> None:
    service.start("-w", "2")
    workers = service.workers()
    assert service.run("--reload", "-w", "3").returncode == 2
    assert service.workers() == workers
    assert service.records("Caught SIGHUP") == []


def test_a_verdict_that_cannot_be_printed_is_a_failure(service: Service) -> None:
    service.start("-w", "2")
    with open("/dev/full", "w") as full:
        done = service.popen("--reload", stdout=full)
        assert done.communicate(timeout=50)[1] == "daemontest.py: cannot write to standard output: " \
                                                  "No space left on device\n"
    assert done.returncode == 1
