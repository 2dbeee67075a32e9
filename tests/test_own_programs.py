"""A client of one's own: every program that the README shows, run as it stands there."""

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest
from conftest import POEM, Service, read_all
from readme import adapted, block, program

COUPLET = "床前明月光\n"  # what the programs send


def run(service: Service, command: Sequence[str], **options: str) -> str:
    """The output of a COMMAND that must succeed without a word of complaint."""
    done = subprocess.run(command, cwd=service.home, env=service.env, capture_output=True, text=True, timeout=50,
                          **({"input": ""} | options))  # type: ignore[call-overload]
    assert (done.returncode, done.stderr) == (0, "")
    return str(done.stdout)


def shown(service: Service, line: str) -> str:
    """The README's program that has LINE, but for the port."""
    return adapted(block(line), {"36000": str(service.port)})


def in_a_shell(service: Service, text: str) -> str:
    """What the README's line TEXT, which reads FILE, replies to the poem."""
    shutil.copy(POEM, service.home / "FILE")
    return run(service, ["sh", "-c", text])


PYTHON = "    connection.sendall(\"床前明月光\\n\".encode())"


def test_python(service: Service) -> None:
    service.start()
    source = shown(service, PYTHON) + "print(reply, end='')\n"
    assert re.fullmatch(rf"\d+ your text size: {len(COUPLET)}\n", run(service, [sys.executable, "-c", source]))


def test_python_is_five_lines() -> None:
    assert len([line for line in block(PYTHON).split("\n") if line]) == 5


def test_netcat(service: Service) -> None:
    netcat = program("nc")
    if "-N" not in subprocess.run([netcat, "-h"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stderr:
        pytest.skip("nc is not OpenBSD's")
    service.start()
    text = shown(service, "nc -N localhost 36000 < FILE")
    assert re.fullmatch(r"\d+ your text size: 32\n", in_a_shell(service, text))


SLOW = """
import os, time

def handle(text):
    time.sleep(1.5)
    for _ in range(2000):  # 20 s at the most
        if not os.path.exists("{HERE}/hold"):
            break
        time.sleep(0.01)
    return str(len(text))
"""


def test_socat_waits_for_a_slow_handler_only_if_it_is_told_to(service: Service) -> None:
    program("socat")
    service.write_handler(SLOW.replace("{HERE}", str(service.home)))
    service.start("--handler", "service:handle")
    text = shown(service, "socat -t 60 - TCP:localhost:36000 < FILE")
    assert re.fullmatch(r"\d+ 32\n", in_a_shell(service, text))
    (service.home / "hold").touch()
    assert in_a_shell(service, adapted(text, {"-t 60 ": ""})) == ""  # half a second is its own patience
    (service.home / "hold").unlink()


def test_perl(service: Service) -> None:
    perl = program("perl")
    if subprocess.run([perl, "-MIO::Socket::IP", "-e1"], capture_output=True).returncode:
        pytest.skip("this Perl lacks IO::Socket::IP")
    service.start()
    script = shown(service, "use IO::Socket::IP;")
    assert re.fullmatch(rf"\d+ your text size: {len(COUPLET)}\n", run(service, [perl], input=script))


def test_perl_says_that_nobody_listens(service: Service) -> None:
    perl = program("perl")
    script = shown(service, "use IO::Socket::IP;")
    done = subprocess.run([perl], input=script, capture_output=True, text=True, timeout=50)
    assert done.returncode != 0
    assert done.stderr == "cannot connect: Connection refused\n"


def test_javascript(service: Service) -> None:
    node = program("node")
    service.start()
    script = service.home / "client.mjs"
    script.write_text(shown(service, 'import net from "node:net";'))
    assert re.fullmatch(rf"\d+ your text size: {len(COUPLET)}\n", run(service, [node, str(script)]))


# ---- The half-close ---------------------------------------------------------------------


@pytest.mark.parametrize(("text", "silence"), [("月\n", 0.1), ("月", 1.0)])
def test_without_the_half_close_a_short_text_is_answered_after_a_silence(
        service: Service, text: str, silence: float) -> None:
    service.start()
    with service.connect() as connection:
        begun = time.monotonic()
        connection.sendall(text.encode())
        reply = read_all(connection).decode()
        assert time.monotonic() - begun >= silence
    assert reply.endswith(f" your text size: {len(text)}\n")


def test_without_the_half_close_a_longer_text_is_refused_at_the_end_of_the_timeout(service: Service) -> None:
    service.start("--timeout", "1.5")
    with service.connect() as connection:
        connection.sendall(b"x" * 2000 + b"\n")
        reply = read_all(connection).decode()
    assert refused(reply)
    with service.connect() as connection:
        connection.sendall(b"x" * 2000 + b"\n")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection).decode().endswith(" your text size: 2001\n")


# ---- A refusal --------------------------------------------------------------------------


def refused(reply: str) -> bool:
    """Whether the README's lines take REPLY for a refusal."""
    source = block('if re.match(r"\\d+ error: ", reply):')
    try:
        exec(source, {"re": re, "reply": reply})
    except ValueError as why:
        assert why.args == (reply,)
        return True
    return False


def test_a_refusal_is_told_by_its_beginning(service: Service) -> None:
    service.expected += ["Handler Failed", "Traceback", "RuntimeError"]
    service.write_handler("def handle(text):\n    if text == 'raise':\n        raise RuntimeError\n    return text")
    service.start("--handler", "service:handle", "--max-text", "100")
    for text in (b"\xff", b"raise", b"x" * 101):
        assert refused(service.ask(text))
    for text in (b"", b"x", b"an error: no"):
        assert not refused(service.ask(text))


def test_the_programs_get_a_refusal_that_comes_before_they_have_sent_all(service: Service) -> None:
    service.start("--max-text", "1000")
    source = adapted(shown(service, PYTHON), {'"床前明月光\\n"': '("月" * 5_000_000)'}) + "print(reply, end='')\n"
    assert re.fullmatch(r"\d+ error: text longer than 1000 bytes\n", run(service, [sys.executable, "-c", source]))


def test_a_lost_worker_gives_no_whole_reply(service: Service) -> None:
    service.expected.append(r"Died\. \(SIGKILL\)")
    service.write_handler("import os\ndef handle(text):\n    os.kill(os.getpid(), 9)")
    service.start("--handler", "service:handle")
    assert service.ask("x") == ""
