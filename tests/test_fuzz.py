"""Any bytes, in any segmentation, get the right reply; any configuration is taken or refused in one line."""

import math
import re
import socket
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from conftest import Service, read_all, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MAX_TEXT = 4000  # bytes
OPEN_SIDE = 2000  # bytes; beyond, only a half-close ends a text
TIMEOUT = 1.5
LONGEST_PAUSE = 0.06  # s; a client silent for longer after a newline may be taken to have ended its text
LONGEST = 0.2  # s; beyond, what is left of the timeout is less than the silence that ends other texts


# ---- The wire -------------------------------------------------------------------------

BOUNDED = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

PIECES = st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode),
                   st.text("あ😀é\n\r\\\0 x", max_size=50).map(str.encode),
                   st.sampled_from([b"\n", b"\0", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
                                    b"\xe3\x81"]))
TEXTS = st.one_of(
    PIECES, st.lists(PIECES, max_size=8).map(b"".join),
    # around the limits
    st.builds(lambda piece, size, end: (piece * size)[:size] + end, PIECES.filter(len),
              st.one_of(st.integers(OPEN_SIDE - 3, OPEN_SIDE + 3), st.integers(MAX_TEXT - 3, MAX_TEXT + 3),
                        st.integers(0, 3 * MAX_TEXT)), PIECES))
SEGMENTED = st.builds(lambda text, cuts: [text[begin:end] for begin, end in pairwise([0, *cuts, 4 * MAX_TEXT])],
                      TEXTS, st.lists(st.integers(0, 3 * MAX_TEXT), max_size=6).map(sorted))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("fuzz") / "home") as service:
        service.start("-w", "16", "-n", "1000000000", "--timeout", str(TIMEOUT), "--max-text", str(MAX_TEXT))
        yield service


def right_reply(text: bytes, half_closed: bool) -> str:
    if len(text) > MAX_TEXT:
        return f"error: text longer than {MAX_TEXT} bytes\n"
    if not half_closed and len(text) > OPEN_SIDE:
        return f"error: text not ended within {TIMEOUT:g} s\n"
    try:
        return f"your text size: {len(text.decode())}\n"
    except UnicodeDecodeError as why:
        return f"error: text is not UTF-8 at byte offset {why.start}\n"


def ask(service: Service, segments: list[bytes], half_close: bool) -> tuple[int, str] | None:
    """The PID and the reply; None if this process was held up so long that the text may have been taken for ended."""
    moments = [time.monotonic()]

    def in_time() -> bool:
        return (max(later - earlier for earlier, later in pairwise(moments)) < LONGEST_PAUSE
                and moments[-1] - moments[0] < LONGEST)

    with service.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for segment in segments:
                connection.sendall(segment)
                moments.append(time.monotonic())
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            moments.append(time.monotonic())
            reply = read_all(connection).decode()
        except OSError:
            moments.append(time.monotonic())
            if in_time():
                raise
    if not in_time():
        return None
    pid, _, rest = reply.partition(" ")
    return int(pid), rest


class Judge:
    """Holds each reply against the right one; asks again when this process was held up, which tells nothing."""

    def __init__(self, service: Service, half_close: bool) -> None:
        self.service, self.half_close = service, half_close
        self.processes = service.workers() | {service.keeper()}

    def ask(self, segments: list[bytes]) -> None:
        while (found := ask(self.service, segments, self.half_close)) is None:
            pass
        pid, reply = found
        assert pid in self.processes
        assert reply == right_reply(b"".join(segments), self.half_close)


def test_a_text_that_is_half_closed_gets_the_right_reply(running: Service) -> None:
    judge = Judge(running, half_close=True)

    @settings(max_examples=300, **BOUNDED)
    @given(SEGMENTED)
    def try_it(segments: list[bytes]) -> None:
        judge.ask(segments)

    try_it()
    assert running.workers() | {running.keeper()} == judge.processes


def test_a_text_on_an_open_side_gets_the_right_reply(running: Service) -> None:
    judge = Judge(running, half_close=False)

    @settings(max_examples=3, **BOUNDED)
    @given(st.lists(SEGMENTED.filter(b"".join), min_size=16, max_size=16))
    def try_it(texts: list[list[bytes]]) -> None:
        with ThreadPoolExecutor(16) as pool:  # since each takes a second or more
            list(pool.map(judge.ask, texts))

    try_it()
    assert running.workers() | {running.keeper()} == judge.processes


# ---- The configuration ----------------------------------------------------------------

WHOLE = {"port": 65535, "workers": 10_000, "max_requests": None, "max_text": None}  # keys and their greatest values
SECONDS = ["timeout", "handler_timeout", "grace"]
NAMES = ["bind", "pid_file", "log_file", "handler", "log"]
VALUES = st.one_of(
    st.integers(-2, 70_000), st.sampled_from([0.01, 0.5, 86400.0, 86401.0, -1.0, math.inf, math.nan]), st.booleans(),
    st.text("ab:./~ é\0\n\"'\\", max_size=6), st.sampled_from(["texts", "requests", "life", "127.0.0.1"]),
    st.lists(st.integers(), max_size=2))


def is_good(key: str, value: object) -> bool | None:
    """Whether KEY may have VALUE; None where that depends on more than the value."""
    if key in WHOLE:
        return type(value) is int and value >= 1 and (WHOLE[key] is None or value <= WHOLE[key])
    if key in SECONDS:
        return type(value) in (int, float) and 0.01 <= value <= 86400
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    return value in ("texts", "requests", "life") if key == "log" else None


def literal(value: object) -> str:
    """VALUE in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(character):08x}" for character in value) + '"'
    return repr(value)


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that is never started."""
    with serving(tmp_path_factory.mktemp("idle") / "home") as service:
        yield service


def check(idle: Service, content: bytes) -> str:
    """The reason for which the configuration is refused, if it is."""
    path = idle.home / "daemontest.toml"
    path.write_bytes(content)
    done = idle.run("--check")
    if done.returncode == 0:
        assert (done.stdout, done.stderr) == ("daemontest.py: configuration is good\n", "")
        return ""
    assert (done.returncode, done.stdout) == (1, "")
    found = re.fullmatch(r"daemontest\.py: ([^\n]+)\n", done.stderr)
    assert found, done.stderr
    assert found[1].isprintable()
    return found[1]


def test_settings_are_taken_or_refused_by_name(idle: Service) -> None:
    @settings(max_examples=20, **BOUNDED)
    @given(st.dictionaries(st.sampled_from([*WHOLE, *SECONDS, *NAMES, "wokers"]), VALUES, max_size=3))
    def try_it(chosen: dict[str, object]) -> None:
        why = check(idle, "".join(f"{key} = {literal(value)}\n" for key, value in chosen.items()).encode())
        verdicts = {key: is_good(key, value) for key, value in chosen.items()}
        if False in verdicts.values() or "wokers" in chosen:
            found = re.fullmatch(rf"bad configuration {idle.home}/daemontest\.toml: (\w+): .*expected .+", why)
            assert found, why
            assert verdicts[found[1]] is not True
        elif None not in verdicts.values():
            assert why == ""

    try_it()


def test_bytes_that_are_no_toml_are_refused_as_such(idle: Service) -> None:
    @settings(max_examples=20, **BOUNDED)
    @given(st.one_of(st.binary(max_size=60), st.text("port=wks[]{}\"'#.\n 0123é\0", max_size=40).map(str.encode)))
    def try_it(content: bytes) -> None:
        try:
            keys = tomllib.loads(content.decode()).keys()
        except (UnicodeDecodeError, tomllib.TOMLDecodeError):
            assert "expected TOML" in check(idle, content)
        else:
            assert (check(idle, content) == "") <= (keys <= {*WHOLE, *SECONDS, *NAMES})

    try_it()
