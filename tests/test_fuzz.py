"""Any bytes, in any segmentation, with or without half-close: the right length or the right refusal, always."""

import socket
import time
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


def right_answer(text: bytes, half_closed: bool) -> str:
    if len(text) > MAX_TEXT:
        return f"error: text longer than {MAX_TEXT} bytes\n"
    if not half_closed and len(text) > OPEN_SIDE:
        return f"error: text not ended within {TIMEOUT:g} s\n"
    try:
        return f"your text size: {len(text.decode())}\n"
    except UnicodeDecodeError as why:
        return f"error: text is not UTF-8 at byte offset {why.start}\n"


def answer(service: Service, segments: list[bytes], half_close: bool) -> tuple[int, str] | None:
    """The PID and the answer; None if this process was held up so long that the text may have been taken for ended."""
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
    """Holds each answer against the right one; asks again when this process was held up, which tells nothing."""

    def __init__(self, service: Service, half_close: bool) -> None:
        self.service, self.half_close = service, half_close
        self.workers = service.workers()

    def ask(self, segments: list[bytes]) -> None:
        while (found := answer(self.service, segments, self.half_close)) is None:
            pass
        pid, reply = found
        assert pid in self.workers
        assert reply == right_answer(b"".join(segments), self.half_close)


def test_any_text_that_is_half_closed_is_answered_right(running: Service) -> None:
    judge = Judge(running, half_close=True)

    @settings(max_examples=300, **BOUNDED)
    @given(SEGMENTED)
    def try_it(segments: list[bytes]) -> None:
        judge.ask(segments)

    try_it()
    assert running.workers() == judge.workers


def test_any_text_that_is_not_half_closed_is_answered_right(running: Service) -> None:
    judge = Judge(running, half_close=False)

    @settings(max_examples=3, **BOUNDED)
    @given(st.lists(SEGMENTED.filter(b"".join), min_size=16, max_size=16))
    def try_it(texts: list[list[bytes]]) -> None:
        with ThreadPoolExecutor(16) as pool:  # since each takes a second or more
            list(pool.map(judge.ask, texts))

    try_it()
    assert running.workers() == judge.workers
