"""What your own service prints goes to the log as it is, line by line, and a print never fails."""

import pytest
from conftest import CONTINUATION, RECORD, Service

FORGERY = "2026-11-23T10:00:00.123+0900 * 1 Server Terminated."
PRINTED = {
    "lines": ["two", "lines\rone\x1b[2J"], "surrogate": [r"a lone \udc80"], "no newline": ["no newline"],
    "pieces": ["pieces", "and a half"], "both": ["out", "err"], "descriptor": ["by the descriptor"],
    "flush": ["flushed"], "long": ["long " * 100_000], "many": [f"line {number}" for number in range(1000)],
    "nothing": [],
}


def log_lines(service: Service) -> list[str]:
    """The lines of the log, in which only a newline ends one."""
    text = service.log_file.read_bytes().decode()
    assert text.endswith("\n")
    return text.split("\n")[:-1]


def printed(service: Service) -> list[str]:
    """The lines that are neither records nor belong to one."""
    return [line for line in log_lines(service) if not RECORD.fullmatch(line) and not CONTINUATION.fullmatch(line)]


def test_it_is_in_the_log_as_it_is_line_by_line(service: Service) -> None:
    service.start("-w", "1", *service.use_handler("prints"))
    assert printed(service) == ["imported", "without a newline at import"]
    expected = printed(service)
    for text, lines in PRINTED.items():
        assert service.ask(text).endswith(f" {text}\n")
        expected += lines
    service.stop()
    assert printed(service) == expected


def test_a_line_is_there_before_the_request_ends(service: Service) -> None:
    service.start("-w", "1", *service.use_handler("prints"))
    service.ask("no newline")
    service.stop()
    lines = log_lines(service)
    place = lines.index("no newline")
    assert lines[place - 1] == "    no newline"  # the client's text
    assert lines[place + 1].endswith(" Client Query Processing Ended.")


def test_no_guard_is_put_around_it(service: Service) -> None:
    service.start("-w", "1", *service.use_handler("prints"))
    service.ask("forgery")
    service.stop()
    assert FORGERY in log_lines(service)


def test_a_print_never_fails_on_a_full_disk_neither(service: Service) -> None:
    service.start("-w", "1", "--log-file", "/dev/full", *service.use_handler("prints"))
    [worker] = service.workers()
    for text in ["forgery", *PRINTED, *PRINTED]:
        if text != "descriptor":  # which is no print
            assert service.ask(text) == f"{worker} {text}\n"


SPOILT = ["sys.stdout.close()", "sys.stderr.close()", "sys.stdout = None", "del sys.stdout",
          "sys.stdout = io.StringIO()", "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')",
          "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8')", "sys.stdout.buffer.close()"]


def test_whatever_it_does_to_standard_output_it_may_print_at_the_next_request(service: Service) -> None:
    service.start("-w", "1", *service.use_handler("spoils_stdout"))
    [worker] = service.workers()
    for how in SPOILT:
        assert [service.ask(how) for _ in range(3)] == [f"{worker} done\n"] * 3, how
    service.stop()
    assert printed(service) == ["said"] * 3 * len(SPOILT)


@pytest.mark.parametrize("how", SPOILT)
def test_whatever_its_module_does_to_standard_output_it_may_print_at_a_request(service: Service, how: str) -> None:
    service.write_handler(f"import io, sys\n{how}\ndef handle(text):\n    print('said')\n    return 'done'\n")
    service.start("-w", "1", "--handler", "service:handle")
    [worker] = service.workers()
    assert [service.ask("x") for _ in range(3)] == [f"{worker} done\n"] * 3
    service.stop()
    assert printed(service) == ["said"] * 3


def test_what_it_prints_at_import_comes_before_the_outcome_of_a_check_and_is_logged_if_a_start_fails(
        service: Service) -> None:
    service.env.pop("PYTHONUNBUFFERED", None)
    service.expected += ["Manager Failed", "Handler Not Loaded", "Traceback", "^    "]
    service.write_handler("print('imported', end='')\ndef handle(text):\n    return text")
    checked = service.run("--check", "--handler", "service:handle")
    assert (checked.returncode, checked.stdout) == (0, "importeddaemontest.py: configuration is good\n")
    service.write_handler("print('imported', end='')\nraise RuntimeError")
    assert service.run("-p", str(service.port), "--handler", "service:handle").returncode == 1
    assert printed(service) == ["imported"]
