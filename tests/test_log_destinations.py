"""Wherever the log goes, no record is torn, forged, joined to another or longer than it may be."""

import os
import re
import resource
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest
from conftest import CONTINUATION, RECORD, Service, wait_until
from slow_clients import cpu_seconds

FORGED = "2026-11-23T10:00:00.123+0900 * 1 Server Terminated."
PIPE_BUF = select.PIPE_BUF  # bytes that a pipe takes in one piece, or not at all
MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4} [*-] \d+ "


# ---- A log that is no regular file ------------------------------------------------------


class Reader(Thread):
    """Reads the log from a descriptor, slowly at first, so that writers have to wait, until its end."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor, self.log = descriptor, bytearray()
        self.start()

    def run(self) -> None:
        while piece := os.read(self.descriptor, 3000):
            self.log += piece
            if len(self.log) < 1_000_000:
                time.sleep(0.0002)

    def lines(self) -> list[str]:
        """All lines, when everybody who can write is gone."""
        self.join()
        text = self.log.decode()  # no character is torn, either
        assert text.endswith("\n")
        return text.split("\n")[:-1]


def laid_out(offset: int) -> str:
    """A text that crosses the 4096th byte of a write; with one of 60 OFFSETs just where a forged record begins."""
    return "x" * offset + "\n" + "\n".join(["😀" * 240] * 4) + "\n" + "\n".join([FORGED] * 15)


def one_line(offset: int) -> str:
    """The same, on a single line that is too long for a write."""
    return "x" * offset + "😀" * 1000 + FORGED * 15


def in_pipe(service: Service, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    reading, writing = os.pipe()
    daemon = service.foreground(*arguments, stderr=writing)
    os.close(writing)
    return daemon, reading


def in_socket(service: Service, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    ours, theirs = socket.socketpair()  # as the journal's
    daemon = service.foreground(*arguments, stderr=theirs)
    theirs.close()
    return daemon, ours.detach()


def in_named_pipe(service: Service, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    os.mkfifo(service.home / "pipe")
    reading = os.open(service.home / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    daemon = service.foreground("--log-file", service.home / "pipe", *arguments)
    os.set_blocking(reading, True)
    return daemon, reading


@pytest.mark.parametrize("go", [in_pipe, in_socket, in_named_pipe])
def test_no_text_tears_or_forges_a_record(
        service: Service, go: Callable[..., tuple[subprocess.Popen[str], int]]) -> None:
    clients, offsets = 8, range(60)
    daemon, reading = go(service, "-w", str(clients), "-n", "1000", *service.use_handler("tells_its_text"))
    wait_until(lambda: service.run("--status").returncode == 0, "the start")
    reader = Reader(reading)
    texts = [form(offset) for form in (laid_out, one_line) for offset in offsets]

    def ask_all(_: int) -> None:
        for text in texts:
            assert service.ask(text).endswith(" error: handler failed\n")  # its text is in the log twice

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask_all, range(clients)))
    assert service.stop().returncode == 0
    daemon.communicate(timeout=50)
    lines = reader.lines()
    os.close(reading)
    assert [line for line in lines if not RECORD.fullmatch(line) and not CONTINUATION.fullmatch(line)] == []
    assert max(len(line.encode()) for line in lines) < PIPE_BUF
    records = [match for match in map(RECORD.fullmatch, lines) if match]
    assert not [match[0] for match in records if match["pid"] == "1"]
    if go is not in_named_pipe:  # which costs records when it is full, but never a part of one
        requests = clients * len(texts)
        for message in ("Client Query Processing Started.", "Handler Failed:", "Client Query Processing Ended."):
            assert sum(match["message"] == message for match in records) == requests
        assert sum(line.count("😀") for line in lines) >= requests * 1000
        assert lines.count(f"    {FORGED}") >= clients * len(offsets) * 15


# ---- A write that a full disk cuts short --------------------------------------------------


class Disk:
    """Where the log is; nothing more can be written to it until there is room again."""

    def fill(self, service: Service) -> None:
        raise NotImplementedError

    def make_room(self, service: Service) -> None:
        raise NotImplementedError


class SmallFileSystem(Disk):
    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", path], capture_output=True)
        if mounted.returncode:
            pytest.skip("a file system can be mounted only by root")

    def fill(self, service: Service) -> None:
        with open(self.path / "filler", "wb", 0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                return

    def make_room(self, service: Service) -> None:
        (self.path / "filler").unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", self.path], check=True)


class SizeLimit(Disk):
    """A limit to the size of each file: cuts a write short at any byte."""

    def __init__(self, spare: int) -> None:
        self.spare = spare

    def set(self, service: Service, size: int) -> None:
        for pid in {service.manager(), *service.generations(), *service.workers()}:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def fill(self, service: Service) -> None:
        self.set(service, service.log_file.stat().st_size + self.spare)

    def make_room(self, service: Service) -> None:
        self.set(service, resource.RLIM_INFINITY)


@pytest.fixture(params=["full disk", "cut in the first record", "cut in the text"])
def disk(service: Service, request: pytest.FixtureRequest) -> Iterator[Disk]:
    if request.param == "full disk":
        small = SmallFileSystem(service.home / "small")
        service.log_file = small.path / "log"
        yield small
        if service.pid_file.exists():
            service.stop()
        small.unmount()
    else:
        yield SizeLimit(40 if request.param == "cut in the first record" else 1000)


def assert_whole_since(service: Service, cut: int) -> None:
    """Each record after the first CUT bytes of the log stands on a line of its own."""
    lines = service.log_file.read_bytes()[cut:].decode(errors="replace").split("\n")
    assert [line for line in lines if re.search(f".{MOMENT}", line)] == []
    assert [line for line in lines[1:-1] if not RECORD.fullmatch(line) and not CONTINUATION.fullmatch(line)] == []


def cut_a_record(service: Service, disk: Disk) -> int:
    """Have a record of the only worker cut short; the size of the log then."""
    disk.fill(service)
    before = 0
    while before < (size := service.log_file.stat().st_size):
        before = size
        assert service.ask("cut short " + "x" * 1900).endswith(" your text size: 1910\n")
    assert not service.log.endswith("\n")
    return size


def test_the_next_record_of_the_same_worker_is_on_a_line_of_its_own(service: Service, disk: Disk) -> None:
    service.start("-w", "1", "--log-file", service.log_file)
    cut = cut_a_record(service, disk)
    disk.make_room(service)
    service.ask("there is room")
    wait_until(lambda: service.log.endswith(" Client Query Processing Ended.\n"), "the records")
    assert "\n    there is room\n" in service.log
    assert service.log_file.read_bytes()[cut:cut + 1] == b"\n"
    assert_whole_since(service, cut)


def test_the_next_record_of_another_process_is_on_a_line_of_its_own(service: Service, disk: Disk) -> None:
    manager = service.start("-w", "1", "--log-file", service.log_file)
    cut = cut_a_record(service, disk)
    disk.make_room(service)
    os.kill(manager, signal.SIGUSR1)
    wait_until(lambda: re.search(r"Generation \d+: .*\n", service.log[cut - 100:]), "the manager's records")
    service.wait_for_records("Worker: ")
    assert service.log_file.read_bytes()[cut:cut + 1] == b"\n"
    assert_whole_since(service, cut)


# ---- An exception that contains the text ----------------------------------------------


@pytest.mark.parametrize("text", ["word", "lines", "chain"])
def test_an_exception_that_contains_a_long_text_is_logged_in_part_and_quickly(service: Service, text: str) -> None:
    service.expected += ["Handler Failed", "Error", "Traceback", "exception"]
    service.start("-w", "1", *service.use_handler("tells_its_text"))
    [worker] = service.workers()
    text += ("\n" if text == "lines" else "y") * 2**22
    took = []
    for attempt in range(3):
        before = len(service.log)
        used = cpu_seconds({worker})
        assert service.ask(text).endswith(" error: handler failed\n")
        took.append(cpu_seconds({worker}) - used)
        service.wait_for_records("Client Query Processing Ended.", attempt + 1)
        grown = len(service.log) - before
        indentation = 4 * service.log[before:].count("\n")
        assert grown - indentation < 4000 + 2000 + 1000  # the traceback, the text and the records around them
    assert 0 < min(took) < 1, took  # s, by its own clock, since other processes may keep it waiting
    assert len(service.records("Handler Failed:")) == 3
