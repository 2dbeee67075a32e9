"""testclient.py sends all of its input, and prints the reply, or one line that says why there is none."""

import fcntl
import os
import re
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

import pytest
from conftest import CLIENT, Service, free_port, read_all, wait_until

LONG = b"x" * 50_000_000


def run(*arguments: str, text: bytes = b"x", redirection: str = "") -> subprocess.CompletedProcess[bytes]:
    command = ["sh", "-c", f'exec "$0" "$@" {redirection}', sys.executable, CLIENT, *arguments]
    return subprocess.run(command, input=text, capture_output=True, timeout=50)


@contextmanager
def fake_server(behave: Callable[[socket.socket], object]) -> Iterator[int]:
    """The port of a server that does what BEHAVE says with its only client."""
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        listener.settimeout(20)

        def serve() -> None:
            with listener.accept()[0] as connection, suppress(OSError):
                connection.settimeout(20)
                behave(connection)

        thread = Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def assert_failed(done: subprocess.CompletedProcess[bytes], why: str) -> None:
    """Exit 1, nothing on standard output, and one line that matches WHY on standard error."""
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(rf"testclient\.py: {why}\n", done.stderr.decode()), done.stderr


@pytest.mark.parametrize("text", [b"", b"x\n", "あ\nい".encode()])
def test_one_newline_is_added_and_the_whole_reply_printed(text: bytes) -> None:
    reply = b"1 first\n" + b"line\n" * 50_000 + b"2 error: only quoted\n"
    sent = []

    def behave(connection: socket.socket) -> None:
        sent.append(read_all(connection))
        connection.sendall(reply[:10])
        time.sleep(0.1)  # so that it comes in pieces
        connection.sendall(reply[10:])

    with fake_server(behave) as port:
        done = run(f"-p{port}", text=text)
    assert sent == [text + b"\n"]
    assert (done.returncode, done.stdout, done.stderr) == (0, reply, b"")


@pytest.mark.parametrize(("text", "why"), [
    (b"\xff", "text is not UTF-8 at byte offset 0"), (LONG, "text longer than 16777216 bytes")], ids=["short", "long"])
def test_a_refusal_is_an_error(service: Service, text: bytes, why: str) -> None:
    service.start()
    assert_failed(service.client(text), rf"refused: \d+ error: {why}")


@pytest.mark.parametrize("end", ["wait", "reset"])
def test_a_refusal_is_read_though_nobody_takes_the_text(end: str) -> None:
    ended = Event()

    def refuse(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"1 error: enough\n")  # the unread rest makes a close now a reset
        if end == "wait":
            connection.shutdown(socket.SHUT_WR)
            ended.wait(50)

    with fake_server(refuse) as port:
        done = run(f"-p{port}", text=LONG)
        ended.set()
    assert_failed(done, ".*1 error: enough")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1%nosuch", "a..b", "a\nb..c", ""])  # no name of them is looked up
def test_no_connection_is_an_error(host: str) -> None:
    port = free_port()
    why = "Connection refused" if host == "127.0.0.1" else r"\S.*"
    assert_failed(run("-s", host, f"-p{port}"), rf"cannot connect to {host[:1]}.*port {port}: {why}")


@pytest.mark.parametrize("part", [b"", b"1 your text si"])
def test_half_a_reply_is_not_printed(part: bytes) -> None:
    with fake_server(lambda connection: read_all(connection) and connection.sendall(part)) as port:
        assert_failed(run(f"-p{port}"), "no whole reply: .+")


@pytest.mark.parametrize("text", [b"x", LONG], ids=["waiting", "sending"])
def test_the_timeout_is_an_error(text: bytes) -> None:
    # A listener that nobody accepts from: the kernel takes the connection, and what fits into its buffers.
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        port = listener.getsockname()[1]
        began = time.monotonic()
        assert_failed(run(f"-p{port}", "--timeout=0.5", text=text), f"no answer from localhost port {port}: .+")
        assert 0.5 <= time.monotonic() - began < 20


@pytest.mark.parametrize(("redirection", "why"), [
    (">/dev/full", "cannot write to standard output: No space left on device"),
    ("<&-", "cannot read standard input: .+")])
def test_unusable_streams_are_an_error(service: Service, redirection: str, why: str) -> None:
    service.start()
    assert_failed(run(f"-p{service.port}", redirection=redirection), why)


def test_without_standard_error_the_exit_status_tells() -> None:
    done = run(f"-p{free_port()}", redirection="2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_non_blocking_streams_lose_nothing() -> None:
    reply = b"1 " + b"x" * 1_000_000 + b"\n"
    received = []
    (input_end, writing), (reading, output_end) = os.pipe(), os.pipe()
    for end in (input_end, output_end):
        os.set_blocking(end, False)

    def bytes_in(pipe: int) -> int:
        return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)

    def behave(connection: socket.socket) -> None:
        received.append(read_all(connection))
        connection.sendall(reply)

    with (fake_server(behave) as port,
          subprocess.Popen([sys.executable, CLIENT, f"-p{port}"], stdin=input_end, stdout=output_end) as client):
        os.close(output_end)
        for part in (b"first ", b"second ", b"third"):
            os.write(writing, part)
            wait_until(lambda: bytes_in(input_end) == 0, "the client to read")
        os.close(writing)
        wait_until(lambda: bytes_in(reading) == 65536, "the pipe to be full")
        with open(reading, "rb") as file:
            assert file.read() == reply
    assert (client.returncode, received) == (0, [b"first second third\n"])
    os.close(input_end)


@pytest.mark.parametrize("arguments", ["-p 65536", "-p abc", "-s", "--timeout 0", "--timeout inf", "--tim 1", "file"])
def test_wrong_usage(arguments: str) -> None:
    done = run(*arguments.split())
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(rb"usage: testclient\.py .*\ntestclient\.py: error: .+\n", done.stderr), done.stderr


def test_help_tells_the_defaults() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, b"")
    assert re.search(rb"-s HOST .*localhost.*\n.*-p PORT .*36000.*\n.*--timeout SECONDS\s.*60", done.stdout)


# An entry point, with a connection that gets the very port it goes to, as may happen to ephemeral ports.
ENTRY_POINT = """
import socket, sys

class Unlucky(socket.socket):
    def connect(self, address):
        self.bind(address)
        super().connect(address)

socket.socket = Unlucky
from testclient import main
sys.exit(main())
"""


def test_a_connection_to_itself_counts_as_refused() -> None:
    port = free_port()
    command = [sys.executable, "-c", ENTRY_POINT, "-s127.0.0.1", f"-p{port}"]
    done = subprocess.run(command, input=b"x", capture_output=True, timeout=50, cwd=CLIENT.parent)
    assert_failed(done, f"cannot connect to 127.0.0.1 port {port}: Connection refused")
