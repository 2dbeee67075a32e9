"""Your own service is imported once in a generation, after detaching, and what it opens then is every worker's."""

import os
import re
import socket

import psutil
import pytest
from conftest import DEADLINE, Service, alive, read_all, wait_until


def test_it_is_imported_once_in_the_generation_which_is_detached_by_then(service: Service) -> None:
    manager = service.start("-w", "3", "-n", "1", *service.use_handler("imported_once"))
    generation = service.generation()
    workers = set()
    for _ in range(8):
        told, importer, session, directory, worker = service.ask("x").split()
        assert int(importer) == generation != manager
        assert int(session) == os.getsid(manager) != os.getsid(0)
        assert directory == "/"
        assert told == worker != importer
        workers.add(worker)
        # Beside too many that leave, a worker would serve more than one.
        wait_until(lambda: not alive(int(worker)), "the worker to go")  # noqa: B023
    assert len(workers) == 8  # each served one request, and none of them imported anything
    assert (service.home / "imports").read_text() == "imported\n"


def test_a_check_imports_it_once_too(service: Service) -> None:
    assert service.run("--check", *service.use_handler("imported_once")).returncode == 0
    assert (service.home / "imports").read_text() == "imported\n"


def test_a_file_opened_at_import_stays_open_and_is_read_by_every_worker(service: Service) -> None:
    table = service.home / "table.txt"
    table.write_text("one two six ")
    service.start("-w", "2", "-n", "1", *service.use_handler("reads_open_file"))
    table.unlink()
    assert [service.ask(str(place)).split()[1] for place in (0, 1, 2, 1, 0)] == ["one", "two", "six", "two", "one"]


def test_a_connection_opened_at_import_is_usable_by_the_workers(service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE)
        service.env["PEER_PORT"] = str(server.getsockname()[1])
        service.start("-w", "2", "-n", "1", *service.use_handler("keeps_connection"))
        peer, _ = server.accept()
        with peer:
            peer.settimeout(DEADLINE)
            for word in ("first", "second", "third"):
                with service.connect() as client:
                    client.sendall(word.encode())
                    client.shutdown(socket.SHUT_WR)
                    assert peer.recv(100) == word.encode()
                    peer.sendall(word.upper().encode())
                    assert read_all(client).split()[1] == word.upper().encode()


def test_a_large_table_is_in_memory_once_for_all_workers(service: Service) -> None:
    service.write_handler("TABLE = {str(number): str(-number) for number in range(300_000)}\n"
                          "def handle(text):\n    return TABLE[text]\n")
    manager = service.start("-w", "2", "--handler", "service:handle")
    generation = service.generation()
    assert [service.ask(str(number)).split()[1] for number in range(1, 60)] == [str(-n) for n in range(1, 60)]
    table = psutil.Process(generation).memory_full_info().rss
    assert table > 40e6
    assert psutil.Process(manager).memory_full_info().rss < table
    for worker in service.workers():
        assert psutil.Process(worker).memory_full_info().uss < table / 4


# ---- A failing import ----------------------------------------------------------------


IMPORT_FAILURES = {
    "missing module": (None, "ModuleNotFoundError: No module named 'service'"),
    "missing function": ("def other(text):\n    return text", "AttributeError: .*handle"),
    "not callable": ("handle = 'text'", "TypeError: handle is not "),
    "syntax error": ("def handle(text)\n    return text", "SyntaxError: .*service.py, line 1"),
    "many lines": ("raise ValueError('first\\nsecond\\x1b[2J')", r"ValueError: first\\nsecond\\x1b\[2J"),
    "exit": ("raise SystemExit('no more')", "SystemExit: no more"),
    "exit without a word": ("import sys; sys.exit()", "SystemExit"),
    "environment": ("import os; os.environ['NO_SUCH_THING']", "KeyError: 'NO_SUCH_THING'"),
    "failure that fails": ("class Mute(Exception):\n    def __str__(self):\n        raise RuntimeError\nraise Mute",
                           "(service[.])?Mute"),
    "failure that exits": ("class Mute(Exception):\n    def __str__(self):\n        raise SystemExit\nraise Mute",
                           "(service[.])?Mute"),
    "missing helper": ("import nohelper_", "ModuleNotFoundError: No module named 'nohelper_'"),
}


@pytest.mark.parametrize("case", IMPORT_FAILURES)
def test_a_failing_import_is_told_in_one_line_and_leaves_nothing(service: Service, case: str) -> None:
    source, why = IMPORT_FAILURES[case]
    if source is not None:
        service.write_handler(source)
    service.expected += ["Manager Failed: ", "Handler Not Loaded:", "^    "]
    in_foreground = service.foreground("--log-file", "foreground.log", "--handler", "service:handle")
    output, errors = in_foreground.communicate(timeout=50)
    assert (in_foreground.returncode, output) == (1, "")
    started = service.run("-p", str(service.port), "--handler", "service:handle")
    assert (started.returncode, started.stdout) == (1, "")
    assert started.stderr == errors
    assert re.fullmatch(rf"daemontest\.py: cannot load handler service:handle: {why}[^\n]*\n", errors), errors
    assert not service.processes()
    assert not service.pid_file.exists()
    assert service.records("Manager Failed: cannot load handler service:handle: ")
    if "that " not in case:  # an exception that cannot be told has no traceback either
        assert "\n    Traceback (most recent call last):\n" in service.log
