"""Whatever your own service raises or returns, the client is told, the log says why, and the worker lives."""

import re

from conftest import RECORD, Service

INDENTED = "^    "  # the lines of tracebacks
MISBEHAVIOUR = {
    "raises": "LookupError: the secret",
    "raises lines": "LookupError: the secret",
    "exits": "SystemExit: the secret",
    "is interrupted": "KeyboardInterrupt",
    "stops": "GeneratorExit",
    "recurses": "RecursionError: .*",
    "returns nothing": "TypeError: handler returned NoneType, expected str",
    "returns bytes": "TypeError: handler returned bytes, expected str",
    "raises what cannot be formatted": "SyntaxError(, which cannot be told|: .*)",  # some releases can format it
    "raises what cannot be followed": "Evil, which cannot be told",
    "returns a surrogate": "UnicodeEncodeError: .*",
}


def lines_under(service: Service, message: str) -> list[str]:
    """The lines, without their indentation, under each record with MESSAGE."""
    found: list[str] = []
    within = False
    for line in service.log.split("\n"):
        if match := RECORD.fullmatch(line):
            within = match["message"] == message
        elif within and line:
            found.append(line[4:])
    return found


def test_whatever_it_raises_or_returns_the_client_is_told_the_log_says_why_and_the_worker_lives(
        service: Service) -> None:
    service.expected += ["Handler Failed:", INDENTED]
    service.start("-w", "1", *service.use_handler("misbehaves"))
    [worker] = service.workers()
    for case, why in MISBEHAVIOUR.items():
        reply = service.ask(case)
        assert re.fullmatch(rf"{worker} error: [^\n]+\n", reply), case
        assert "secret" not in reply
        assert service.ask("x") == f"{worker} good\n", case
        trace = lines_under(service, "Handler Failed:")
        assert any(re.fullmatch(why, line) for line in trace), (case, trace)
    tracebacks = lines_under(service, "Handler Failed:").count("Traceback (most recent call last):")
    assert tracebacks >= len(MISBEHAVIOUR) - 2  # those that cannot be told
    assert not service.records("Server Terminated.")
    assert service.workers() == {worker}


def test_its_failures_count_as_requests(service: Service) -> None:
    service.write_handler("def handle(text):\n    raise ValueError")
    service.expected += ["Handler Failed:", INDENTED]
    service.start("-w", "1", "-n", "2", "--handler", "service:handle")
    [worker] = service.workers()
    told = [service.ask("x").split()[0] for _ in range(3)]
    assert told[:2] == [str(worker)] * 2
    assert told[2] != str(worker)


def test_its_reply_may_have_many_lines_or_none_and_be_long(service: Service) -> None:
    service.write_handler("def handle(text):\n    return {'many': 'one\\n\\n three あ\\n', 'none': ''}.get(text, text)")
    service.start("--handler", "service:handle")
    assert re.fullmatch(r"\d+ one\n\n three あ\n\n", service.ask("many"))
    assert re.fullmatch(r"\d+ \n", service.ask("none"))
    long = "平仄\n" * 500_000
    assert service.ask(long).partition(" ")[2] == f"{long}\n"


def test_it_knows_the_process_that_the_client_is_told_of(service: Service) -> None:
    service.write_handler("import os\ndef handle(text):\n    return str(os.getpid())")
    service.start("-w", "2", "-n", "2", "--handler", "service:handle")
    for _ in range(8):
        told, worker = service.ask("x").split()
        assert told == worker
