"""The log: records of one line, written at once and whole wherever it goes, that no text can forge."""

import os
import re
import select
import signal
import socket
import sys
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
# A handler whose exception contains the text.
RAISES = """
def handle(text):
    try:
        return {}[text]
    except KeyError as why:
        raise ValueError(f"no such word: {text}") from why
"""
HANDLER = ("--handler", "service:handle")
TROUBLE = ["Handler Failed", "Reload Failed", "Handler Not Loaded", "^    "]


def below(service: Service, message: str) -> list[str]:
    """What stands below each record whose message ends with MESSAGE, without its indentation."""
    found = re.findall(rf"{message}\n((?:    .*\n)*)", service.log_file.read_bytes().decode())
    return [re.sub("^    ", "", lines, flags=re.MULTILINE).removesuffix("\n") for lines in found]


def unescaped(logged: str) -> str:
    return re.sub(r"\\(u....|U.{8}|x..|[nrt\\])", lambda escape: escape[0].encode().decode("unicode_escape"), logged)


# ---- Form -----------------------------------------------------------------------------

def test_a_life_is_told_in_the_words_of_the_original(service: Service) -> None:
    manager = service.start("-w", "1", "-n", "5", umask=0)
    assert service.log_file.stat().st_mode & 0o777 == 0o640
    generation, [worker] = service.generation(), service.workers()
    for host in ("127.0.0.1", "::1"):
        service.ask("how long?\n", host)
    service.stop()
    told = iter([(match["kind"], int(match["pid"]), match["message"]) for match in service.records()])
    version = service.run("--version").stdout.split()[1]
    python = ".".join(map(str, sys.version_info[:3]))
    for record in [  # in this order, others between them
        ("*", manager, "Daemon Server Started. Prefork Workers: 1."),
        ("*", manager, "Max Requests per Child: 5"),
        ("*", manager, f"daemontest {version}, Python {python}"),
        ("*", manager, f"Manager Process ID: {manager}"),
        ("*", generation, "Loading configuration."),
        ("*", worker, "Child Process Started."),
        ("-", worker, "Client Query Processing Started."),
        ("-", worker, "Client: 127.0.0.1; Received Text:"),
        ("-", worker, "Client Query Processing Ended."),
        ("-", worker, "Client: ::1; Received Text:"),
        ("*", manager, "Caught SIGTERM"),
        ("*", worker, "Child Process Ended. (3)"),
        ("*", manager, "Server Terminated."),
    ]:
        assert record in told, service.log


@pytest.mark.parametrize(("zone", "offset"), [("JST-9", timedelta(hours=9)), ("NST3:30", timedelta(hours=-3.5))])
def test_times_are_local_with_their_offset(service: Service, zone: str, offset: timedelta) -> None:
    service.env["TZ"] = zone
    before = datetime.now().astimezone()
    service.start()
    after = datetime.now().astimezone()
    times = [datetime.fromisoformat(match["time"]) for match in service.records()]
    assert {moment.utcoffset() for moment in times} == {offset}
    assert before - timedelta(milliseconds=1) <= min(times) <= max(times) <= after  # records drop what is below 1 ms


@pytest.mark.parametrize(("what", "told", "untold"), [
    ("texts", ["Client Query Processing Started.", "Client: 127.0.0.1; Received Text:"], []),
    ("requests", ["Client Query Processing Started.", "Client: 127.0.0.1; Received Text."], ["a secret"]),
    ("life", [], ["a secret", "Client Query Processing", "Received"])])
def test_the_log_may_be_quieter(service: Service, what: str, told: list[str], untold: list[str]) -> None:
    service.expected += TROUBLE
    service.write_handler("def handle(text):\n    return str(1 // len(text.strip()))")
    service.configure(f"log = '{what}'")
    service.start("-w", "1", *HANDLER)
    for text in (b"a secret", b"\n", b"\xff"):
        service.ask(text)
    service.stop()
    messages = Counter(match["message"] for match in service.records())
    for message in ["Child Process Started.", "Handler Failed:", "Server Terminated.", *told,
                    "Client: 127.0.0.1; Refused: text is not UTF-8 at byte offset 0."]:
        assert messages[message], message
    assert messages["Client Query Processing Started."] == messages["Client Query Processing Ended."]
    assert "ZeroDivisionError" in service.log
    assert [words for words in untold if words in service.log] == []


@pytest.mark.parametrize("text", ["one\n  two\n\nthree\n", "no newline", "\n", "あいう 𝄞\n"])
def test_each_line_of_a_text_is_indented_before_the_handler_runs(service: Service, text: str) -> None:
    held = Held(service)
    service.start(*held.arguments)
    with service.begin(text.encode()):
        held.wait_for()
        assert below(service, "Received Text:") == [text.removesuffix("\n")]
        held.release()


@pytest.mark.parametrize("text", [
    "z" * 2000, "z" * 1999 + "yTAIL", "あ" * 10_000, "\0" * 2000, "z\n" * 2000, "z" * 10**7],
    ids=["2000", "2004", "3 bytes each", "escaped", "lines", "10 MB"])
def test_a_long_text_is_cut_at_2000_characters_and_a_long_record_in_its_middle(service: Service, text: str) -> None:
    service.start("-w", "1")
    service.ask(text)
    service.stop()
    [logged] = below(service, "Received Text:")
    begin, cut, end = re.sub(r"\n *\.\.\.\n", "\n...\n", logged).partition("\n...\n")
    if cut:  # perhaps within an escape
        assert text.startswith(unescaped(begin.rstrip("\\x0\n ")))
        assert text[:2000].removesuffix("\n").endswith(unescaped(end.lstrip("x0 \n")))
        assert 1000 < len(logged) < len(logged.encode()) + 1 <= select.PIPE_BUF
    else:
        assert begin == text[:2000].removesuffix("\n")
    told = [match["message"] for match in service.records("Logged")]
    assert told == ([f"Logged at Most 2000 of {len(text)} Characters."] if len(text) > 2000 else [])


# ---- Forgeries ------------------------------------------------------------------------

HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}  # the categories of characters that do not show
CONTROLS = "".join(c for c in map(chr, range(0x30000)) if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp"))
HOSTILE = [
    f"x\r{FORGED}", f"x\n{FORGED}\n\n{FORGED}", f"x\v{FORGED}\f{FORGED}\x1c{FORGED}\x85{FORGED}\u2028{FORGED}",
    "\x1b[1A\x1b[2K\x1b]0;title\x07", "\x9b2J\x9d0;title\x9c", "hidden\b\b\b\b\b\bshown!", r"\x1b[2J \n \\",
    "\ue000\U000f0000\u0378\U000e0fff\ufffe\uffff\xa0\u2007\u202f", f"    x\n     {FORGED}",
    *(CONTROLS[begin:begin + 200] for begin in range(0, len(CONTROLS), 200))]


def assert_honest(log: str) -> None:
    """Each line is a record or belongs to one, and shows all that it is."""
    lines = log.split("\n")[:-1]
    assert [line for line in lines if not RECORD.fullmatch(line) and not CONTINUATION.fullmatch(line)] == []
    assert [line for line in lines if {unicodedata.category(character) for character in line} & HIDDEN] == []
    assert FORGED not in lines


def test_no_text_and_no_exception_forges_a_record_or_hides_text(service: Service) -> None:
    service.expected += TROUBLE
    service.write_handler(RAISES)
    service.start("-w", "1", "-n", "1000", *HANDLER)
    for text in HOSTILE:
        assert service.ask(text).endswith(" error: handler failed\n")
    service.ask(b"\xff\n* 1 Child Process Started.\n")
    service.stop()
    assert_honest(service.log_file.read_bytes().decode())
    # Different texts never look alike: each can be had back from the log.
    assert [*map(unescaped, below(service, "Received Text:"))] == HOSTILE
    traces = [*map(unescaped, below(service, "Handler Failed:"))]
    assert all(f"no such word: {text}" in trace for text, trace in zip(HOSTILE, traces, strict=True))


def test_no_configuration_forges_a_record(service: Service) -> None:
    service.expected += TROUBLE
    service.start("-w", "1")
    service.configure(f'log_file = "a\\r\\n{FORGED}\\u202e/b"')
    assert service.run("--reload").returncode == 1
    assert service.records("Reload Failed")
    assert_honest(service.log_file.read_bytes().decode())


@pytest.mark.parametrize("text", ["y" * 2**22, "\n" * 2**22], ids=["word", "lines"])
def test_a_traceback_is_cut_in_its_middle_and_quickly(service: Service, text: str) -> None:
    service.expected += TROUBLE
    service.write_handler(RAISES)
    service.start("-w", "1", *HANDLER)
    [worker] = service.workers()
    before = sum(psutil.Process(worker).cpu_times()[:2])  # its own clock, since others may keep it waiting
    assert service.ask(f"{text}END").endswith(" error: handler failed\n")
    assert sum(psutil.Process(worker).cpu_times()[:2]) - before < 2
    [trace] = below(service, "Handler Failed:")
    assert trace.startswith("Traceback (most recent call last):\n")
    assert trace.endswith("END")
    assert 500 < len(trace) < select.PIPE_BUF


# ---- Whole records, wherever they go --------------------------------------------------

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


@pytest.mark.parametrize("into", [into_pipe, into_socket, into_named_pipe])
def test_records_of_many_workers_are_never_torn(service: Service, into: Callable[..., int]) -> None:
    service.write_handler(RAISES)
    reading = into(service, "-w", "8", "-n", "1000", *HANDLER)
    wait_until(lambda: service.run("--status").returncode == 0, "the start")
    pieces: list[bytes] = []

    def read() -> None:
        while piece := os.read(reading, 65536):
            pieces.append(piece)
            time.sleep(0.0002)  # so that writers have to wait

    reader = Thread(target=read)
    reader.start()
    # Texts that cross the 4096th byte of a write at many places, some just where a forged record begins.
    texts = ["x" * offset + "\n" + ("😀" * 240 + "\n") * 4 + f"{FORGED}\n" * 15 for offset in range(0, 60, 2)] * 8
    with ThreadPoolExecutor(8) as pool:
        assert all(reply.endswith(" error: handler failed\n") for reply in pool.map(service.ask, texts))
    assert service.stop().returncode == 0
    reader.join()
    os.close(reading)
    log = b"".join(pieces).decode()  # no character is torn, either
    assert_honest(log)
    if into is into_pipe:
        assert [piece for piece in pieces if not piece.endswith(b"\n") or not RECORD.match(piece.decode())] == []
        assert max(map(len, pieces)) <= select.PIPE_BUF
    if into is not into_named_pipe:  # which costs records when it is full, but never a part of one
        for message in "Client Query Processing Started.", "Handler Failed:", "Client Query Processing Ended.":
            assert log.count(message) == len(texts)


# ---- A log that cannot be written -----------------------------------------------------

def test_on_a_full_disk_the_service_runs_on(service: Service) -> None:
    service.write_handler("def handle(text):\n    print(text, flush=True)\n    return 'printed' if text != 'x' else 1")
    manager = service.start("-w", "2", "-n", "7", "--log-file", "/dev/full", *HANDLER)
    for text in ["x", "", "x" * 100_000, "あ\n" * 1000] * 5:
        assert service.ask(text).endswith(" error: handler failed\n" if text == "x" else " printed\n")
    assert service.run("--reload").returncode == 0
    os.kill(min(service.workers()), signal.SIGKILL)
    assert service.ask("").endswith(" printed\n")
    assert service.run("--status").stdout == f"{manager}\n"
    assert service.stop().returncode == 0


def test_a_standard_error_that_nobody_reads_any_more_costs_only_records(service: Service) -> None:
    reading, writing = os.pipe()
    daemon = service.foreground(stderr=writing)
    os.close(writing)
    wait_until(lambda: service.run("--status").returncode == 0, "the start")
    os.close(reading)
    assert service.run("--reload").returncode == 0
    assert service.ask("x").endswith(" your text size: 1\n")
    assert service.stop().returncode == 0
    assert daemon.wait(50) == 0


def test_a_reload_opens_the_log_anew(service: Service) -> None:
    manager = service.start("-w", "2")
    rotated = service.log_file.rename(service.home / "rotated.log")
    assert service.run("--reload").returncode == 0
    before = rotated.read_bytes()
    service.ask("after")
    os.kill(manager, signal.SIGUSR1)
    service.wait_for_records("Status: worker", 2)
    service.stop()
    assert rotated.read_bytes() == before
    assert b"Daemon Server Started." in before
    assert below(service, "Received Text:") == ["after"]
    assert service.log_file.stat().st_mode & 0o777 == 0o640
