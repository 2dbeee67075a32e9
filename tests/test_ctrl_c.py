"""Ctrl-C at any moment of a start ends it: one line at the most, and nothing is left."""

import ast
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator

from conftest import DAEMON, DEADLINE, Service, wait_until

TIMES = 24  # moments of a start, from its beginning to 300 ms, or for as long as it takes here
IN_FOREGROUND = 10
SECONDS = 25  # for the moments of one test: on a busy machine they are fewer


def first_lines() -> int:
    """Where the script has blocked the signal: after the first two statements beside what concerns the compiler."""
    body = [node for node in ast.parse(DAEMON.read_text()).body
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            and getattr(node, "module", None) != "__future__"]
    assert "SIG_BLOCK" in ast.unparse(body[1])
    return body[1].end_lineno or 0


def is_pythons_own(errors: str) -> bool:
    """Whether ERRORS are those of a Python that was interrupted before the script had blocked the signal.

    In some moments of its own beginning Python tells of it and goes on.
    """
    lines = re.findall(rf'File "{re.escape(str(DAEMON))}", line (\d+)', errors)
    return "KeyboardInterrupt" in errors and all(int(line) <= first_lines() for line in lines)


def interrupt(service: Service, after: float, *arguments: str) -> tuple[int, str, str]:
    """Start, and press Ctrl-C AFTER so many seconds; exit status and output."""
    start = service.popen("-p", str(service.port), "-w", "2", *arguments, start_new_session=True)
    time.sleep(after)  # the moment itself is the stimulus
    try:
        os.killpg(start.pid, signal.SIGINT)  # as a terminal does
    except ProcessLookupError:
        pass  # it has just ended
    try:
        out, err = start.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        os.killpg(start.pid, signal.SIGINT)  # as a user would
        out, err = start.communicate(timeout=DEADLINE)
        assert is_pythons_own(err), after
    return start.returncode, out, err


def assert_nothing_is_left(service: Service, status: int, after: float) -> None:
    if status == 1:  # its line promises that nothing is left
        assert not service.processes(), after
    wait_until(lambda: not service.processes(), f"all processes to go, interrupted after {after:.3f} s")
    assert not service.pid_file.exists(), after


def moments(service: Service, count: int, outcomes: set[str], wanted: set[str]) -> Iterator[float]:
    """COUNT moments, evenly spread over a start, or as many as there is time for.

    Then others until OUTCOMES has all that are WANTED: the machine may have become slower meanwhile, or quicker.
    """
    began = time.monotonic()
    service.start("-w", "2")
    took = max(0.25, time.monotonic() - began)
    service.stop()
    for number in sorted(range(count), key=lambda number: number % 4):  # where time ends, too, they are spread
        if time.monotonic() < began + SECONDS:
            yield number / count * 1.2 * took
    for number in range(2, 30):
        if missing := wanted - outcomes:
            yield random.random() * took if "interrupted" in missing else number * took


def test_a_start_in_the_background(service: Service) -> None:
    outcomes: set[str] = set()
    wanted = {"interrupted", "started"}
    for after in moments(service, TIMES, outcomes, wanted):
        status, out, err = interrupt(service, after)
        if status == 0:  # it was too late
            assert re.fullmatch(r"daemontest\.py: \d+ started, 2 workers on port \d+\n", out), after
            assert err == "" or is_pythons_own(err), after
            assert service.ask("x").endswith(" your text size: 1\n")
            assert service.stop().returncode == 0
            outcomes.add("started")
            continue
        assert out == "", after
        if not is_pythons_own(err):
            assert err in ("", "daemontest.py: interrupted\n"), after
            outcomes.add("interrupted")
        assert_nothing_is_left(service, status, after)
    assert outcomes == wanted


def test_a_start_in_the_foreground(service: Service) -> None:
    outcomes: set[str] = set()
    for after in moments(service, IN_FOREGROUND, outcomes, {"served"}):
        status, out, err = interrupt(service, after, "-f", "--log-file", str(service.log_file))
        assert out == "", after
        if status == 0:
            assert err == "" or is_pythons_own(err), after
            outcomes.add("served")
        elif not is_pythons_own(err):
            assert err in ("", "daemontest.py: interrupted\n", "daemontest.py: cannot start: caught SIGINT\n"), after
            outcomes.add("interrupted")
        assert_nothing_is_left(service, status, after)
    assert "served" in outcomes


def test_a_start_while_the_handler_is_imported(service: Service) -> None:
    service.write_handler("import time\nprint('importing')\ntime.sleep(30)\n")
    start = service.popen("-p", str(service.port), "--handler", "service:handle", start_new_session=True)
    wait_until(lambda: "importing\n" in service.log, "the import")
    os.killpg(start.pid, signal.SIGINT)
    assert start.communicate(timeout=50) == ("", "daemontest.py: interrupted\n")
    assert start.returncode == 1
    assert not service.processes()
    assert not service.pid_file.exists()


def test_a_start_is_not_given_up_once_it_has_been_told(service: Service) -> None:
    for _ in range(6):
        start = service.popen("-p", str(service.port), "-w", "2")
        assert start.stdout and start.stdout.readline().endswith(f"started, 2 workers on port {service.port}\n")
        start.send_signal(signal.SIGINT)
        assert start.communicate(timeout=50) == ("", "")
        assert start.returncode == 0
        assert service.stop().returncode == 0


def test_a_start_with_several_presses(service: Service) -> None:
    service.write_handler("import time\nprint('importing')\ntime.sleep(30)\n")
    start = service.popen("-p", str(service.port), "--handler", "service:handle", start_new_session=True)
    wait_until(lambda: "importing\n" in service.log, "the import")
    for _ in range(20):
        try:
            os.killpg(start.pid, signal.SIGINT)
        except ProcessLookupError:
            break
    out, err = start.communicate(timeout=50)
    assert (out, err) in (("", "daemontest.py: interrupted\n"), ("", ""))
    assert start.returncode not in (0, None)
    wait_until(lambda: not service.processes(), "all processes to go")
    assert not service.pid_file.exists()
