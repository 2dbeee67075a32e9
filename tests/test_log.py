"""The log: records of one line, written at once, that no text can forge."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from conftest import RECORD, Gate, Service


def logged_texts(service: Service) -> list[list[str]]:
    """The lines, without their indentation, under each record of a text received."""
    texts: list[list[str]] = []
    for line in service.log_file.read_bytes().decode().split("\n"):
        if RECORD.fullmatch(line):
            receiving = line.endswith("; Received Text:")
            if receiving:
                texts.append([])
        elif line and receiving:
            assert line.startswith("    ")
            texts[-1].append(line[4:])
    return texts


def test_the_life_of_a_service_in_the_words_of_the_original(service: Service) -> None:
    manager = service.start("-w", "1", "-n", "5")
    generation, [worker] = service.generation(), service.workers()
    service.ask("how long?\n")
    service.wait_for_records("Client Query Processing Ended.")  # later than the reply, if the half-close was
    service.stop()
    assert [(match["kind"], int(match["pid"]), match["message"]) for match in service.records()] == [
        ("*", manager, "Daemon Server Started. Prefork Workers: 1."),
        ("*", manager, "Max Requests per Child: 5"),
        ("*", manager, f"Manager Process ID: {manager}"),
        ("*", generation, "Loading configuration."),
        ("*", worker, "Child Process Started."),
        ("-", worker, "Client Query Processing Started."),
        ("-", worker, "Client: 127.0.0.1; Received Text:"),
        ("-", worker, "Client Query Processing Ended."),
        ("*", manager, "Caught SIGTERM"),
        ("*", worker, "Caught SIGTERM"),
        ("*", worker, "Child Process Ended. (4)"),
        ("*", manager, "Server Terminated."),
    ]


@pytest.mark.parametrize(("zone", "offset"), [("Asia/Tokyo", timedelta(hours=9)),
                                              ("NST3:30", -timedelta(hours=3, minutes=30))])
def test_times_are_local_with_their_offset(service: Service, zone: str, offset: timedelta) -> None:
    if "/" in zone and not Path("/usr/share/zoneinfo", zone).exists():
        pytest.skip("no time zone data here")
    service.env["TZ"] = zone
    before = datetime.now().astimezone()
    service.start()
    after = datetime.now().astimezone()
    times = [datetime.fromisoformat(match["time"]) for match in service.records()]
    assert {moment.utcoffset() for moment in times} == {offset}
    assert before - timedelta(milliseconds=1) <= min(times) <= max(times) <= after  # records drop what is below 1 ms


def test_lines_of_a_text_are_indented_each(service: Service) -> None:
    service.start()
    texts = ["one\n  two\n\nthree\n", "no newline", "\n", "あいう 𝄞\n"]
    for text in texts:
        service.ask(text)
    assert logged_texts(service) == [["one", "  two", "", "three"], ["no newline"], [""], ["あいう 𝄞"]]


def test_the_first_2000_characters_of_a_text_are_logged(service: Service) -> None:
    service.start()
    service.ask("あ" * 1999 + "い")
    service.ask("あ" * 1999 + "い" + "TAIL" * 10_000)
    assert logged_texts(service) == [["あ" * 1999 + "い"]] * 2


def test_a_text_is_logged_before_the_handler_runs(service: Service) -> None:
    gate = Gate(service)
    service.start(*gate.arguments)
    with service.connect() as client:
        client.sendall(b"what was it?\n")
        [worker] = gate.wait_for()
        assert logged_texts(service) == [["what was it?"]]
        assert [match["message"] for match in service.records() if int(match["pid"]) == worker] == [
            "Child Process Started.", "Client Query Processing Started.", "Client: 127.0.0.1; Received Text:"]
        gate.open()


