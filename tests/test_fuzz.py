"""Any bytes, in any pieces, get the right reply; any configuration is taken or refused in one line."""

import json
import math
import re
import socket
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise

import pytest
from conftest import Service, read_all
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

MAX_TEXT, OPEN_SIDE = 4000, 2000  # bytes; longer texts are refused, and have to be half-closed
TIMEOUT = 1.5
BOUNDED = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck),
           "phases": [Phase.generate]}  # looking for a smaller case takes too long

PIECES = st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode),
                   st.sampled_from([b"\n", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe3\x81"]))
SIZES = st.one_of(st.integers(OPEN_SIDE - 3, OPEN_SIDE + 3), st.integers(MAX_TEXT - 3, MAX_TEXT + 3),
                  st.integers(0, 3 * MAX_TEXT))
TEXTS = st.one_of(st.lists(PIECES, max_size=8).map(b"".join),
                  st.builds(lambda piece, size, end: (piece * size)[:size] + end, PIECES.filter(len), SIZES, PIECES))
CUTS = st.lists(st.integers(0, 3 * MAX_TEXT), max_size=6).map(lambda cuts: pairwise([0, *sorted(cuts), 4 * MAX_TEXT]))
SEGMENTS = st.builds(lambda text, cuts: [text[begin:end] for begin, end in cuts], TEXTS, CUTS)


def right_reply(text: bytes, half_close: bool) -> str:
    if len(text) > MAX_TEXT:
        return f"error: text longer than {MAX_TEXT} bytes\n"
    if not half_close and len(text) > OPEN_SIDE:
        return f"error: text not ended within {TIMEOUT:g} s\n"
    try:
        return f"your text size: {len(text.decode())}\n"
    except UnicodeDecodeError as why:
        return f"error: text is not UTF-8 at byte offset {why.start}\n"


def check_reply(service: Service, segments: list[bytes], half_close: bool) -> None:
    in_time = False
    while not in_time:  # else the service may have taken a pause of ours for the end of the text
        reply, began = "", time.monotonic()
        with service.connect() as client, suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for segment in segments:
                client.sendall(segment)
            if half_close:
                client.shutdown(socket.SHUT_WR)
            in_time = time.monotonic() - began < 0.06
            reply = read_all(client).decode()
    assert reply.partition(" ")[2] == right_reply(b"".join(segments), half_close)


@pytest.mark.parametrize("half_close", [True, False], ids=["half-close", "open side"])
def test_any_bytes_get_the_right_reply(service: Service, half_close: bool) -> None:
    service.start("-w", "16", "-n", "1000000000", "--timeout", str(TIMEOUT), "--max-text", str(MAX_TEXT))
    before = service.processes()

    @settings(max_examples=20 if half_close else 2, **BOUNDED)
    @given(st.lists(SEGMENTS if half_close else SEGMENTS.filter(b"".join), min_size=16, max_size=16))
    def check(texts: list[list[bytes]]) -> None:
        with ThreadPoolExecutor(16) as pool:  # since each open side takes a second or more
            list(pool.map(lambda segments: check_reply(service, segments, half_close), texts))

    check()
    assert service.processes() == before


WHOLE = {"port": 65535, "workers": 10_000, "max_requests": math.inf, "max_text": math.inf}  # the greatest values
KEYS = [*WHOLE, "timeout", "handler_timeout", "grace", "bind", "pid_file", "log_file", "handler", "log", "wokers"]
VALUES = st.one_of(
    st.integers(-2, 70_000), st.sampled_from([0.01, 0.5, 86400.0, 86401.0, -1.0, math.inf, math.nan, True]),
    st.text("ab:./~ é\0\n\"'\\", max_size=6), st.sampled_from(["texts", "requests", "life", "127.0.0.1"]),
    st.lists(st.integers(), max_size=2))
LITERALS = VALUES.map(lambda value: json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf"))
CONFIGURATIONS = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), LITERALS, max_size=3).map(
        lambda chosen: "".join(f"{key} = {literal}\n" for key, literal in chosen.items()).encode()),
    st.binary(max_size=60), st.text("port=wks[]{}\"'#.\n 0123é\0", max_size=40).map(str.encode))


def is_good(key: str, value: object) -> bool | None:
    """Whether KEY may have VALUE; None where that depends on more than the value."""
    if key in WHOLE:
        return type(value) is int and 1 <= value <= WHOLE[key]
    if key in ("timeout", "handler_timeout", "grace"):
        return type(value) in (int, float) and 0.01 <= value <= 86400
    if key not in KEYS[:-1] or not isinstance(value, str) or not value or "\0" in value:
        return False
    return value in ("texts", "requests", "life") if key == "log" else None


def test_any_configuration_is_taken_or_refused_in_one_line(service: Service) -> None:
    path = service.home / "daemontest.toml"

    @settings(max_examples=20, **BOUNDED)
    @given(CONFIGURATIONS)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        done = service.run("--check")
        good = (done.returncode, done.stdout, done.stderr) == (0, "daemontest.py: configuration is good\n", "")
        why = re.fullmatch(rf"daemontest\.py: (?:bad configuration {path}: )?(.+)\n", done.stderr)
        assert good or (done.returncode == 1 and why and why[0][:-1].isprintable()), done
        try:
            verdicts = [(key, is_good(key, value)) for key, value in tomllib.loads(content.decode()).items()]
        except ValueError:
            assert why and "expected TOML" in why[1]
            return
        named = why and re.match(r"(.+): .*expected ", why[1])
        assert good or any(verdict is None or (not verdict and named and named[1] == key) for key, verdict in verdicts)
        assert not good or False not in [verdict for _, verdict in verdicts]

    check()
