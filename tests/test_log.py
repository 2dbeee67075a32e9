"""The log: records of one line, written at once and whole wherever it goes, that no text can forge."""

import os
import re
import select
import signal
import socket
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from threading import Thread

import psutil
import pytest
from conftest import CONTINUATION, RECORD, Held, Service, wait_until

FORGED = "2026-11-23T10:00:00.123+0900 * 1 Server Terminated."
INDENTED = "^    "
HANDLER = ("--handler", "service:handle")

# A handler whose exception contains the text, in one of three ways.
TELLS = """
TABLE = {}

def handle(text):
    if text.startswith("lines"):
        raise LookupError(text)
    if text.startswith("chain"):
        try:
            return TABLE[text]
        except KeyError as why:
            raise ValueError(f"no such word: {text}") from why
    return TABLE[text]
"""
ECHOES = """
import sys

def handle(text):
    print(text)
    print(text, end="")
    print()
    sys.stderr.write(f"{text}\\n")
    if text.startswith("raise"):
        raise RuntimeError
    return "printed"
"""


def below(service: Service, message: str) -> list[str]:
    """What stands below each record whose message ends with MESSAGE, without its indentation."""
    found: list[list[str]] = []
    within = False
    for line in service.log_file.read_bytes().decode().split("\n"):
        if match := RECORD.fullmatch(line):
            within = match["message"].endswith(message)
            if within:
                found.append([])
        elif within and CONTINUATION.fullmatch(line):
            found[-1].append(line[4:])
    return ["\n".join(lines) for lines in found]


def unescaped(logged: str) -> str:
    return re.sub(r"\\(u....|U.{8}|x..|[nrt\\])", lambda escape: escape[0].encode().decode("unicode_escape"), logged)


# ---- Form -----------------------------------------------------------------------------


def test_a_life_is_told_in_the_words_of_the_original(service: Service) -> None:
    manager = service.start("-w", "1", "-n", "5")
    generation, [worker] = service.generation(), service.workers()
    service.ask("how long?\n")
    service.wait_for_records("Client Query Processing Ended.")  # later than the reply, if the half-close was
    service.stop()
    told = iter([(match["kind"], int(match["pid"]), match["message"]) for match in service.records()])
    for record in [  # in this order, others between them
        ("*", manager, "Daemon Server Started. Prefork Workers: 1."),
        ("*", manager, "Max Requests per Child: 5"),
        ("*", manager, f"Manager Process ID: {manager}"),
        ("*", generation, "Loading configuration."),
        ("*", worker, "Child Process Started."),
        ("-", worker, "Client Query Processing Started."),
        ("-", worker, "Client: 127.0.0.1; Received Text:"),
        ("-", worker, "Client Query Processing Ended."),
        ("*", manager, "Caught SIGTERM"),
        ("*", worker, "Child Process Ended. (4)"),
        ("*", manager, "Server Terminated."),
    ]:
        assert record in told, service.log


def test_the_log_names_the_versions_that_run(service: Service) -> None:
    version = service.run("--version").stdout.split()[1]
    service.start()
    [record] = service.records("daemontest ")
    assert re.fullmatch(rf"daemontest {re.escape(version)}, Python 3\.\d+\.\d+\S*", record["message"])


@pytest.mark.parametrize(("zone", "offset"), [("JST-9", timedelta(hours=9)), ("NST3:30", timedelta(hours=-3.5))])
def test_times_are_local_with_their_offset(service: Service, zone: str, offset: timedelta) -> None:
    service.env["TZ"] = zone
    before = datetime.now().astimezone()
    service.start()
    after = datetime.now().astimezone()
    times = [datetime.fromisoformat(match["time"]) for match in service.records()]
    assert {moment.utcoffset() for moment in times} == {offset}
    assert before - timedelta(milliseconds=1) <= min(times) <= max(times) <= after  # records drop what is below 1 ms


def test_a_client_is_named_by_the_form_of_address_it_uses(service: Service) -> None:
    service.start()
    for host in ("127.0.0.1", "::1"):
        service.ask("x", host)
    assert [match["message"] for match in service.records("Client: ")] == [
        "Client: 127.0.0.1; Received Text:", "Client: ::1; Received Text:"]


def test_the_log_is_for_its_owner_and_group_only(service: Service) -> None:
    service.start(umask=0)
    assert service.log_file.stat().st_mode & 0o777 == 0o640


# ---- Texts ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["one\n  two\n\nthree\n", "no newline", "\n", "あいう 𝄞\n"])
def test_each_line_of_a_text_is_indented(service: Service, text: str) -> None:
    service.start()
    service.ask(text)
    assert below(service, "Received Text:") == [text.removesuffix("\n")]


@pytest.mark.parametrize(("text", "least", "most"), [
    ("x" * 2000, 2000, 2000), ("x" * 1999 + "yTAIL", 2000, 2000), ("あ" * 10_000, 1000, 1360), ("\0" * 2000, 800, 1020),
    ("x\n" * 2000, 1000, 1360), ("x" * 10_000_000, 2000, 2000)],
    ids=["2000", "2004", "3 bytes each", "escaped", "lines", "10 MB"])
def test_2000_characters_of_a_text_are_logged_or_what_4096_bytes_hold(
        service: Service, text: str, least: int, most: int) -> None:
    service.start("-w", "1")
    service.ask(text)
    [logged] = map(unescaped, below(service, "Received Text:"))
    service.stop()
    cut = [match["message"] for match in service.records("Logged")]
    assert least <= len(logged) <= most
    assert text.startswith(logged)
    if len(text) == 2000 == len(logged):
        assert cut == []
    else:
        told = re.fullmatch(rf"Logged (\d+) of {len(text)} Characters\.", *cut)
        assert told, cut
        assert 0 <= int(told[1]) - len(logged) <= 1  # the newline it may end with does not show


def test_a_text_is_logged_before_the_handler_runs(service: Service) -> None:
    held = Held(service)
    service.start(*held.arguments)
    with service.connect() as client:
        client.sendall(b"what was it?\n")
        held.wait_for()
        assert below(service, "Received Text:") == ["what was it?"]
        assert not service.records("Client Query Processing Ended.")
        held.release()


@pytest.mark.parametrize(("what", "told", "untold"), [
    ("texts", ["Client Query Processing Started.", "Client: 127.0.0.1; Received Text:"], []),
    ("requests", ["Client Query Processing Started.", "Client: 127.0.0.1; Received Text."], ["a secret"]),
    ("life", [], ["a secret", "Client Query Processing", "Received"])])
def test_the_log_may_be_quieter(service: Service, what: str, told: list[str], untold: list[str]) -> None:
    service.expected += ["Handler Failed", INDENTED]
    service.write_handler("def handle(text):\n    return str(1 // len(text.strip()))")
    service.configure(f"log = '{what}'")
    service.start("-w", "1", *HANDLER)
    for text in (b"a secret", b"\n", b"\xff"):
        service.ask(text)
    service.stop()
    messages = [match["message"] for match in service.records()]
    for message in ["Child Process Started.", "Handler Failed:", "Server Terminated.", *told,
                    "Client: 127.0.0.1; Refused: text is not UTF-8 at byte offset 0."]:
        assert message in messages
    assert "ZeroDivisionError" in service.log
    assert [words for words in untold if words in service.log] == []
    assert what != "texts" or below(service, "Received Text:")[0] == "a secret"


# ---- Forgeries ------------------------------------------------------------------------

HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}  # the categories of characters that do not show
HOSTILE = [
    f"x\r{FORGED}", f"x\n{FORGED}\n\n{FORGED}", f"x\r\n{FORGED}\r\n", f"x\v{FORGED}\f{FORGED}",
    f"x\x1c{FORGED}\x1d{FORGED}\x1e{FORGED}", f"x\x85{FORGED}", f"x\u2028{FORGED}", f"x\u2029{FORGED}",
    "\x1b[1A\x1b[2K", "\x1b]0;title\x07",
    "\x9b2J\x9d0;title\x9c", "\a\x7f", "hidden\b\b\b\b\b\bshown!", "\tx\t", "a\0b",
    "\ue000\U000f0000", "\u0378\U000e0fff\U000e0041", "\ufffe\uffff", "\xa0\u2007\u202f", r"\x1b[2J \n \\",
    f"    x\n     {FORGED}",
    *(characters[i:i + 200] for characters in ["".join(
        c for c in map(chr, range(0x30000)) if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp"))]
      for i in range(0, len(characters), 200)),
]


def assert_honest(service: Service) -> None:
    """Each line of the log is a record or belongs to one, and shows all that it is."""
    lines = service.log_file.read_bytes().decode().split("\n")[:-1]
    assert [line for line in lines if not RECORD.fullmatch(line) and not CONTINUATION.fullmatch(line)] == []
    assert [line for line in lines if {unicodedata.category(character) for character in line} & HIDDEN] == []
    assert not [match for match in service.records() if match["pid"] == "1"]


def test_no_text_forges_a_record_moves_the_cursor_or_hides_text(service: Service) -> None:
    service.start("-w", "2", "-n", "1000")
    for text in HOSTILE:
        assert service.ask(text).endswith(f" your text size: {len(text)}\n")
    service.ask(b"\xff\n* 1 Child Process Started.\n")
    service.stop()
    assert_honest(service)
    # Two different texts never look alike: each can be had back from the log.
    assert [*map(unescaped, below(service, "Received Text:"))] == [text.removesuffix("\n") for text in HOSTILE]


def test_no_exception_forges_a_record(service: Service) -> None:
    service.expected += ["Handler Failed", INDENTED]
    service.write_handler(TELLS)
    service.start("-w", "1", "-n", "1000", *HANDLER)
    for text in HOSTILE:
        assert service.ask(f"lines {text}").endswith(" error: handler failed\n")
    service.stop()
    assert_honest(service)
    traces = [*map(unescaped, below(service, "Handler Failed:"))]
    assert len(traces) == len(HOSTILE)
    assert all(text.split("\n")[0] in trace for text, trace in zip(HOSTILE, traces, strict=True))


@pytest.mark.parametrize("bad", ["setting", "module"])
def test_no_configuration_forges_a_record(service: Service, bad: str) -> None:
    service.expected += ["Reload Failed", "Handler Not Loaded", INDENTED]
    manager = service.start("-w", "1")
    service.write_handler(f"raise RuntimeError('a\\n{FORGED}\\x1b[2J')\n")
    service.configure('handler = "service:handle"\n' if bad == "module" else f'log_file = "a\\r\\n{FORGED}\\u202e/b"\n')
    os.kill(manager, signal.SIGHUP)
    service.wait_for_records("Reload Failed")
    assert_honest(service)


# ---- Whole records, wherever they go --------------------------------------------------


class Reader(Thread):
    """Reads a log that is no file, slowly at first, so that writers have to wait, until its end."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor, self.pieces = descriptor, list[bytes]()
        self.start()

    def run(self) -> None:
        while piece := os.read(self.descriptor, 65536):
            self.pieces.append(piece)
            if len(self.pieces) < 1000:
                time.sleep(0.0002)
        os.close(self.descriptor)


def into_pipe(service: Service, *arguments: str) -> int:
    reading, writing = os.pipe2(os.O_DIRECT)  # each write is read by itself
    service.foreground(*arguments, stderr=writing)
    os.close(writing)
    return reading


def into_socket(service: Service, *arguments: str) -> int:
    ours, theirs = socket.socketpair()  # as the journal's
    service.foreground(*arguments, stderr=theirs)
    theirs.close()
    return ours.detach()


def into_named_pipe(service: Service, *arguments: str) -> int:
    os.mkfifo(service.home / "pipe")
    reading = os.open(service.home / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    service.foreground("--log-file", service.home / "pipe", *arguments)
    os.set_blocking(reading, True)
    return reading


def layouts() -> list[str]:
    """Texts that cross the 4096th byte of a write at many places, some just where a forged record begins."""
    lines = "\n".join(["😀" * 240] * 4) + "\n" + "\n".join([FORGED] * 15)
    return [form for offset in range(0, 60, 2)
            for form in ("x" * offset + "\n" + lines, "x" * offset + "😀" * 1000 + FORGED * 15)]


@pytest.mark.parametrize("into", [into_pipe, into_socket, into_named_pipe])
def test_no_text_tears_a_record_of_many_workers(service: Service, into: Callable[..., int]) -> None:
    service.write_handler(TELLS)
    reading = into(service, "-w", "8", "-n", "1000", *HANDLER)
    wait_until(lambda: service.run("--status").returncode == 0, "the start")
    reader = Reader(reading)

    def ask_all(_: int) -> None:
        for text in layouts():
            assert service.ask(text).endswith(" error: handler failed\n")  # its text is in the log twice

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask_all, range(8)))
    assert service.stop().returncode == 0
    reader.join()
    log = b"".join(reader.pieces).decode()  # no character is torn, either
    lines = log.split("\n")[:-1]
    assert [line for line in lines if not RECORD.fullmatch(line) and not CONTINUATION.fullmatch(line)] == []
    records = [match for match in map(RECORD.fullmatch, lines) if match]
    assert not [match[0] for match in records if match["pid"] == "1"]
    if into is into_pipe:
        assert [piece for piece in reader.pieces if not piece.endswith(b"\n") or not RECORD.match(piece.decode())] == []
        assert max(map(len, reader.pieces)) <= select.PIPE_BUF
    if into is not into_named_pipe:  # which costs records when it is full, but never a part of one
        count = Counter(match["message"] for match in records)
        for message in "Client Query Processing Started.", "Handler Failed:", "Client Query Processing Ended.":
            assert count[message] == 8 * len(layouts())


def test_what_is_written_at_once_keeps_together_under_load(service: Service) -> None:
    clients, requests = 8, 40
    service.write_handler(ECHOES)
    service.start("-w", str(clients), "-n", "20", *HANDLER)
    texts = ["\n".join(f"client {client} request {request} line {line}: あ" for line in range(40))
             for client in range(clients) for request in range(requests)]
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(service.ask, texts))
    service.stop()
    lines = Counter(service.log.split("\n"))
    for line in "\n".join(texts).split("\n"):
        assert (lines[line], lines[f"    {line}"]) == (3, 1), line
    assert len(service.records("Client Query Processing Ended.")) == len(texts)
    logged = below(service, "Received Text:")
    assert sorted(logged) == sorted(texts)


@pytest.mark.parametrize("text", ["word", "lines", "chain"])
def test_a_traceback_is_cut_in_its_middle_and_quickly(service: Service, text: str) -> None:
    service.expected += ["Handler Failed", INDENTED]
    service.write_handler(TELLS)
    service.start("-w", "1", *HANDLER)
    [worker] = service.workers()
    text += ("\n" if text == "lines" else "y") * 2**22 + "END"
    took = []
    for _ in range(3):
        before = sum(psutil.Process(worker).cpu_times()[:2])
        assert service.ask(text).endswith(" error: handler failed\n")
        took.append(sum(psutil.Process(worker).cpu_times()[:2]) - before)
    assert min(took) < 1, took  # s, by its own clock, since other processes may keep it waiting
    traces = below(service, "Handler Failed:")
    assert len(traces) == 3
    for trace in traces:
        assert trace.startswith("Traceback (most recent call last):\n")
        assert trace.rstrip("'").endswith("END")
        assert 500 < len(trace) < select.PIPE_BUF  # its lines are indented by four more


# ---- A log that cannot be written -----------------------------------------------------


def test_on_a_full_disk_the_service_runs_on(service: Service) -> None:
    service.write_handler(ECHOES)
    manager = service.start("-w", "2", "-n", "7", "--log-file", "/dev/full", *HANDLER)
    for text in ["x", "raise", "x" * 100_000, "あ\n" * 1000] * 5:
        assert service.ask(text).endswith(" error: handler failed\n" if text == "raise" else " printed\n")
    workers = wait_until(lambda: len(found := service.workers()) == 2 and found, "recycled workers")
    os.kill(manager, signal.SIGHUP)
    workers = service.wait_for_new_workers(workers)
    os.kill(min(workers), signal.SIGKILL)
    assert service.ask("x").endswith(" printed\n")
    assert service.ask(b"\xff").endswith(" error: text is not UTF-8 at byte offset 0\n")
    assert service.run("--status").stdout == f"{manager}\n"
    assert service.stop().returncode == 0


def test_a_standard_error_that_nobody_reads_any_more_costs_only_records(service: Service) -> None:
    reading, writing = os.pipe()
    daemon = service.foreground("-w", "2", stderr=writing)
    os.close(writing)
    wait_until(lambda: service.run("--status").returncode == 0, "the start")
    os.close(reading)
    assert service.ask("x").endswith(" your text size: 1\n")
    assert service.run("--reload").returncode == 0
    assert service.ask("x").endswith(" your text size: 1\n")
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.wait(50) == 0


def test_a_named_pipe_that_nobody_reads_is_refused(service: Service) -> None:
    os.mkfifo(service.home / "pipe")
    done = service.run("-p", str(service.port), "--log-file", "pipe")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"daemontest\.py: cannot open log file [^\n]+\n", done.stderr)
    assert not service.pid_file.exists()


@pytest.mark.parametrize("how", ["HUP", "--reload"])
def test_a_reload_opens_the_log_anew(service: Service, how: str) -> None:
    manager = service.start("-w", "2")
    old = service.workers()
    rotated = service.log_file.rename(service.home / "rotated.log")
    os.kill(manager, signal.SIGHUP) if how == "HUP" else service.run("--reload")
    service.wait_for_new_workers(old)
    wait_until(lambda: not old & service.processes(), "the old workers to end")
    before = rotated.read_bytes()
    service.ask("after")
    os.kill(manager, signal.SIGUSR1)
    service.wait_for_records("Status: worker", 2)
    service.stop()
    assert rotated.read_bytes() == before
    assert b"Daemon Server Started." in before
    assert below(service, "Received Text:") == ["after"]
    assert service.records("Server Terminated.")
    assert service.log_file.stat().st_mode & 0o777 == 0o640
