"""testclient.py sends all of its input, and prints the reply, or one line that says why there is none."""

import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import pytest
from conftest import CLIENT, Service, free_port, read_all, serving, wait_until

Done = subprocess.CompletedProcess[bytes]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that need a real one."""
    with serving(tmp_path_factory.mktemp("usual") / "home") as service:
        service.start()
        yield service


def run_client(port: int, *arguments: str, text: bytes = b"x", host: str = "127.0.0.1") -> Done:
    return subprocess.run([sys.executable, str(CLIENT), "-s", host, "-p", str(port), *arguments],
                          input=text, capture_output=True, timeout=50)


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


def assert_failed(done: Done, why: str) -> None:
    """Exit 1, nothing on standard output, and one line that matches WHY on standard error."""
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(rf"testclient\.py: {why}\n", done.stderr.decode()), done.stderr


# ---- Replies ------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "count"), [(b"", 1), (b"x", 2), (b"x\n", 3), ("あ\nい".encode(), 4)])
def test_one_newline_is_added_and_the_reply_printed(usual: Service, text: bytes, count: int) -> None:
    done = usual.client(text)
    assert (done.returncode, done.stderr) == (0, b"")
    assert re.fullmatch(rf"\d+ your text size: {count}\n", done.stdout.decode())


def test_a_reply_may_come_in_pieces_and_have_many_lines() -> None:
    reply = b"1 first\n" + b"line\n" * 50_000 + b"2 error: only quoted\n"

    def behave(connection: socket.socket) -> None:
        assert read_all(connection) == b"x\n"
        connection.sendall(reply[:10])
        time.sleep(0.1)  # so that it comes in pieces
        connection.sendall(reply[10:])

    with fake_server(behave) as port:
        done = run_client(port)
    assert (done.returncode, done.stdout, done.stderr) == (0, reply, b"")


@pytest.mark.parametrize(("text", "why"), [
    (b"\x89PNG\r\n\x1a\n\0\xff", "text is not UTF-8 at byte offset 0"),
    (b"x" * 50_000_000, "text longer than 16777216 bytes")], ids=["quick", "while it sends"])
def test_a_refusal_is_an_error(usual: Service, text: bytes, why: str) -> None:
    assert_failed(usual.client(text), rf"refused: \d+ error: {why}")


def test_a_refusal_ends_the_sending() -> None:
    answered = Event()

    def refuse_and_take_no_more(connection: socket.socket) -> None:
        connection.sendall(b"1 error: enough\n")
        connection.shutdown(socket.SHUT_WR)
        answered.wait(40)

    with fake_server(refuse_and_take_no_more) as port:
        done = run_client(port, "--timeout", "30", text=b"x" * 50_000_000)
        answered.set()
    assert_failed(done, ".*1 error: enough")


def test_a_refusal_is_read_even_if_a_reset_ends_the_sending() -> None:
    def refuse_and_reset(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"1 error: enough\n")

    with fake_server(refuse_and_reset) as port:
        assert_failed(run_client(port, text=b"x" * 50_000_000), ".*1 error: enough")


# ---- No connection ------------------------------------------------------------------


def test_a_port_where_nobody_listens_is_an_error() -> None:
    port = free_port()
    assert_failed(run_client(port), f"cannot connect to 127.0.0.1 port {port}: Connection refused")


@pytest.mark.parametrize("host", ["::1%nosuch", "a..b", "a\nb..c", ""])  # they fail without a question to the network
def test_an_unknown_host_is_an_error(host: str) -> None:
    assert_failed(run_client(free_port(), host=host), rf"cannot connect to {host[:1]}.*port \d+: \S.*")


# A client whose connection takes the very port it goes to as its own, as it may happen in the ephemeral range.
UNLUCKY = """
import runpy, socket, sys

class Unlucky(socket.socket):
    def connect(self, address):
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a service of another test may just have used it
        self.bind(address)
        super().connect(address)
        assert self.getpeername() == self.getsockname()
        print("met itself", file=sys.stderr)

socket.socket = Unlucky
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_connection_to_itself_counts_as_refused(tmp_path: Path) -> None:
    script = tmp_path / "unlucky.py"
    script.write_text(UNLUCKY)
    port = free_port()
    done = subprocess.run([sys.executable, str(script), str(CLIENT), "-s", "127.0.0.1", "-p", str(port)],
                          input=b"x", capture_output=True, timeout=50)
    assert done.stderr.startswith(b"met itself\n")
    done.stderr = done.stderr.removeprefix(b"met itself\n")
    assert_failed(done, f"cannot connect to 127.0.0.1 port {port}: Connection refused")


# ---- No whole reply -----------------------------------------------------------------


def close_at_once(connection: socket.socket) -> None:
    connection.recv(1)


def break_off(connection: socket.socket) -> None:
    read_all(connection)
    connection.sendall(b"1 your text si")


def reset(connection: socket.socket) -> None:
    break_off(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("behave", [close_at_once, read_all, break_off, reset])
def test_half_a_reply_is_not_printed(behave: Callable[[socket.socket], object]) -> None:
    with fake_server(behave) as port:
        assert_failed(run_client(port), "no whole reply: .+")


@pytest.mark.parametrize("text", [b"x", b"x" * 50_000_000], ids=["waiting", "sending"])
def test_the_timeout_is_an_error(text: bytes) -> None:
    # A listener that nobody accepts from: the kernel takes the connection, and what fits into its buffers.
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        port = listener.getsockname()[1]
        began = time.monotonic()
        assert_failed(run_client(port, "--timeout", "0.5", text=text), f"no answer from 127.0.0.1 port {port}: .+")
        assert 0.5 <= time.monotonic() - began < 20


# ---- Its own streams ----------------------------------------------------------------


@pytest.mark.parametrize(("redirection", "why"), [
    (">/dev/full", "cannot write to standard output: No space left on device"),
    (">&-", "cannot write to standard output: .+"),
    ("<&-", "cannot read standard input: .+"),
])
def test_unusable_streams_are_an_error(usual: Service, redirection: str, why: str) -> None:
    command = f'exec "$0" "$1" -s 127.0.0.1 -p {usual.port} {redirection}'
    assert_failed(subprocess.run(["sh", "-c", command, sys.executable, str(CLIENT)], input=b"x",
                                 capture_output=True, timeout=50, cwd=usual.home), why)


def test_an_error_that_cannot_be_printed_is_not_printed_on_standard_output() -> None:
    command = f'exec "$0" "$1" -s 127.0.0.1 -p {free_port()} 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, str(CLIENT)],
                          input=b"x", stdout=subprocess.PIPE, timeout=50)
    assert (done.returncode, done.stdout) == (1, b"")


def bytes_in(pipe: int) -> int:
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


def test_a_non_blocking_standard_input_is_sent_whole(usual: Service) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.write(writing, b"first ")
    command = [sys.executable, str(CLIENT), "-s", "127.0.0.1", "-p", str(usual.port)]
    with subprocess.Popen(command, stdin=reading, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        for part in (b"second ", b"third"):
            wait_until(lambda: bytes_in(reading) == 0, "the client to read")
            os.write(writing, part)
        os.close(writing)
        output, errors = client.communicate(timeout=50)
    os.close(reading)
    assert (client.returncode, errors) == (0, "")
    assert output.endswith(" your text size: 19\n")


def test_a_non_blocking_standard_output_gets_the_whole_reply() -> None:
    reply = b"1 " + b"x" * 1_000_000 + b"\n"
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with fake_server(lambda connection: read_all(connection) and connection.sendall(reply)) as port:
        command = [sys.executable, str(CLIENT), "-s", "127.0.0.1", "-p", str(port)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.PIPE) as client:
            os.close(writing)
            wait_until(lambda: bytes_in(reading) == 65536, "the pipe to be full")
            with open(reading, "rb") as file:
                assert file.read() == reply
            _, errors = client.communicate(timeout=50)
    assert (client.returncode, errors) == (0, b"")


# ---- Usage --------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    "-p 0", "-p 65536", "-p abc", "-p -1", "-p 1e3", "-p", "-s", "--timeout 0", "--timeout -1", "--timeout nan",
    "--timeout inf", "--timeout soon", "--tim 1", "--unknown", "file"])
def test_wrong_usage_is_refused_with_a_usage_line(arguments: str) -> None:
    done = subprocess.run([sys.executable, str(CLIENT), *arguments.split()], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(r"usage: testclient\.py .*\ntestclient\.py: error: .+\n\Z", done.stderr), done.stderr


def test_help_tells_the_defaults() -> None:
    done = subprocess.run([sys.executable, str(CLIENT), "--help"], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"-s HOST .*localhost.*\n.*-p PORT .*36000.*\n.*--timeout SECONDS\s.*60", done.stdout)


@pytest.mark.parametrize("text", [b"x", b"\xff"])
def test_an_entry_point_may_call_its_main(usual: Service, tmp_path: Path, text: bytes) -> None:
    shutil.copy(CLIENT, tmp_path / "_testclient.py")
    command = ["-c", "import sys; from _testclient import main; sys.exit(main())", "-p", str(usual.port)]
    done = subprocess.run([sys.executable, *command], input=text, capture_output=True, timeout=50, cwd=tmp_path)
    expected = usual.client(text)
    assert done.returncode == expected.returncode == (text == b"\xff")
    assert re.sub(rb"\d+ ", b"", done.stdout + done.stderr) == re.sub(rb"\d+ ", b"", expected.stdout + expected.stderr)
