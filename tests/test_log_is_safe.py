"""The log keeps its form, whatever clients send, however many write, and even when it cannot be written."""

import os
import re
import signal
import unicodedata
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import CONTINUATION, RECORD, Service, wait_until

FORGED = "2026-11-23T10:00:00.123+0900 * 1 Server Terminated."
HOSTILE = {
    "carriage return": f"x\r{FORGED}", "line feed": f"x\n{FORGED}\n\n{FORGED}", "both": f"x\r\n{FORGED}\r\n",
    "vertical tab and form feed": f"x\v{FORGED}\f{FORGED}", "separators": f"x\x1c{FORGED}\x1d{FORGED}\x1e{FORGED}",
    "next line": f"x\x85{FORGED}", "line separator": f"x\u2028{FORGED}", "paragraph separator": f"x\u2029{FORGED}",
    "cursor up, erase": "\x1b[1A\x1b[2K", "title": "\x1b]0;title\x07", "one-byte CSI": "\x9b2J\x9d0;title\x9c",
    "bell, backspace, delete": "\a\b\x7f", "overwritten": "hidden\b\b\b\b\b\bshown!", "tab": "\tx\t", "nul": "a\0b",
    "bidirectional overrides": "\u202aa\u202bb\u202cc\u202dd\u202ee", "isolates": "\u2066a\u2067b\u2068c\u2069d",
    "marks": "\u200ea\u200fb\u061cc", "zero width": "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg\u180eh",
    "tags": "".join(map(chr, range(0xe0000, 0xe0080))), "private": "\ue000\U000f0000", "unassigned": "\u0378\U000e0fff",
    "no-characters": "\ufffe\uffff", "no-break spaces": "\xa0\u2007\u202f", "backslash": r"\x1b[2J \n \\",
    "indented": f"    x\n     {FORGED}", "everything that is not shown": "".join(
        c for c in map(chr, range(0x30000)) if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")),
}
HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}  # the categories of what does not show itself



def log_lines(service: Service, printed: Callable[[str], bool] = lambda line: False) -> list[str]:
    """The lines of the log but for those PRINTED: all must be records or belong to one, and show all they are."""
    text = service.log_file.read_bytes().decode()
    assert text.endswith("\n")
    lines = [line for line in text.split("\n")[:-1] if not printed(line)]
    assert [line for line in lines if not RECORD.fullmatch(line) and not CONTINUATION.fullmatch(line)] == []
    assert [line for line in lines if {unicodedata.category(character) for character in line} & HIDDEN] == []
    assert all(line.isprintable() for line in lines)
    assert CONTINUATION.fullmatch(lines[0]) is None
    return lines


def texts(service: Service, record: str, printed: Callable[[str], bool] = lambda line: False) -> list[str]:
    """What stands under each record that ends like RECORD, as it was before it was made printable."""
    found: list[list[str]] = []
    for line in log_lines(service, printed):
        if RECORD.fullmatch(line):
            begun = line.endswith(record)
            if begun:
                found.append([])
        elif begun:
            found[-1].append(line[4:])
    return [re.sub(r"\\(u....|U........|x..|[nrt\\])", lambda escape: escape[0].encode().decode("unicode_escape"),
                   "\n".join(lines)) for lines in found]


def test_no_text_forges_a_record_moves_the_cursor_or_hides_text(service: Service) -> None:
    service.start("-w", "2", "-n", "1000")
    for text in HOSTILE.values():
        assert service.ask(text).endswith(f" your text size: {len(text)}\n")
    service.ask(b"\xff\n* 1 Child Process Started.\n")
    service.stop()
    assert len(service.records("Server Terminated")) == 1
    # Two different texts never look alike: each can be had back from the log.
    assert texts(service, "Received Text:") == [text.removesuffix("\n") for text in HOSTILE.values()]


def test_nothing_that_a_handler_raises_forges_a_record(service: Service) -> None:
    service.expected += ["Handler Failed", "Traceback", "LookupError"]
    service.start("-w", "1", "-n", "1000", *service.use_handler("tells_its_text"))
    for text in HOSTILE.values():
        assert service.ask(f"lines {text}").endswith(" error: handler failed\n")
    service.stop()
    assert len(service.records("Server Terminated")) == 1
    assert len(service.records("Handler Failed")) == len(HOSTILE)
    traces = "".join(texts(service, "Handler Failed:"))
    assert all(text.split("\n")[0] in traces for text in HOSTILE.values())


def test_no_module_or_setting_forges_a_record(service: Service) -> None:
    service.expected.append("Nothing Changed")
    manager = service.start("-w", "1")
    service.configure(f'log_file = "a\\r\\n{FORGED}\\u202e/b"\n')
    os.kill(manager, signal.SIGHUP)
    service.wait_for_records("Nothing Changed")
    service.configure('handler = "evil:handle"\n')
    service.write_handler(f"raise RuntimeError('a\\n{FORGED}\\x1b[2J')\n", "evil")
    os.kill(manager, signal.SIGHUP)
    service.wait_for_records("Nothing Changed", 2)
    log_lines(service)
    assert not service.records("Server Terminated")


@pytest.mark.parametrize("printing", [False, True], ids=["", "printing"])
def test_records_are_never_torn_under_load(service: Service, printing: bool) -> None:
    clients, requests = 8, 40
    service.start("-w", str(clients), "-n", "20", *(service.use_handler("echoes") if printing else ()))

    def text(client: int, request: int) -> str:
        line = f"client {client} request {request}"
        lines = [f"{line} line {number}: あ" for number in range(100)]
        return "\n".join(lines)[:2000].rpartition("\n")[0]

    def ask(client: int) -> None:
        for request in range(requests):
            service.ask(text(client, request))

    def printed(line: str) -> bool:
        return printing and bool(re.fullmatch(r"client \d request \d+ line \d+: あ", line))

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    service.stop()
    sent = [text(client, request) for client in range(clients) for request in range(requests)]
    assert sorted(texts(service, "Received Text:", printed)) == sorted(sent)
    assert len(service.records("Client Query Processing Ended.")) == clients * requests
    lines = Counter(line for line in service.log.split("\n") if printed(line))
    assert lines == Counter("\n".join(4 * sent).split("\n") if printing else ())  # the handler prints it so often


def test_on_a_full_disk_the_service_runs_on(service: Service) -> None:
    manager = service.start("-w", "2", "-n", "7", "--log-file", "/dev/full", *service.use_handler("echoes"))
    for text in ["x", "raise", "x" * 100_000, "あ\n" * 1000] * 5:
        assert service.ask(text).endswith(" error: handler failed\n" if text == "raise" else " printed\n")
    workers = wait_until(lambda: len(found := service.workers()) == 2 and found, "recycled workers")
    os.kill(manager, signal.SIGHUP)
    workers = service.wait_for_new_workers(workers)
    os.kill(min(workers), signal.SIGKILL)
    assert service.ask("x").endswith(" printed\n")
    assert service.ask(b"\xff").endswith(" error: text is not UTF-8 at byte offset 0\n")
    assert service.run("--status").stdout == f"{manager}\n"
    stopped = service.stop()
    assert (stopped.returncode, stopped.stdout) == (0, f"daemontest.py {manager} Server terminated.\n")
    assert not service.processes()


def test_in_the_foreground_a_standard_error_that_nobody_reads_any_more_costs_only_records(service: Service) -> None:
    reading, writing = os.pipe()
    with service.foreground("-w", "2", stderr=writing) as process:
        os.close(writing)
        log = b""
        while log.count(b"Child Process Started.") < 2:
            log += os.read(reading, 10000)
        os.close(reading)
        assert service.ask("x").endswith(" your text size: 1\n")
        workers = service.workers()
        assert service.run("--reload").returncode == 0  # after which the start is over, too
        service.wait_for_new_workers(workers)
        assert service.ask("x").endswith(" your text size: 1\n")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(50) == 0


