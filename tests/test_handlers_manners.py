"""A handler that does not tidy up after itself harms no later client."""

import os
import resource
import socket
import time

import pytest
from conftest import Load, Service, read_all, wait_until

LIMIT = 64  # descriptors, where a handler leaves them open


# ---- It leaves in its own way ---------------------------------------------------------


def test_an_exit_of_the_handlers_own_is_logged_as_a_death_and_delays_the_replacement(service: Service) -> None:
    service.expected.append("Child Process Died")
    service.start("-w", "2", *service.use_handler("bad_manners"))
    began = time.monotonic()
    with Load(service, 4, b"exit") as load:
        service.wait_for_records("Child Process Died", 6)  # each place filled, left and filled again twice
        assert time.monotonic() - began > 1.5
        starts = len(service.records("Child Process Started."))
        assert starts <= 2 * (time.monotonic() - began + 2)
        assert service.stop().returncode == 0
    assert {match["message"] for match in service.records("Child Process Died")} == {
        "Child Process Died. (exit status 0)"}
    assert load.replies == []


def test_the_log_names_the_worker_that_exited_and_another_takes_its_place(service: Service) -> None:
    service.expected.append("Child Process Died")
    service.start("-w", "2", *service.use_handler("bad_manners"))
    before = service.workers()
    try:
        assert service.ask("exit") == ""
    except ConnectionResetError:
        pass
    [died] = service.wait_for_records("Child Process Died")
    assert died["message"] == "Child Process Died. (exit status 0)"
    assert int(died["pid"]) in before
    assert service.ask("x").endswith(" x\n")
    new = wait_until(lambda: service.workers() if len(service.workers()) == 2 else None, "a new worker")
    assert before - new == {int(died["pid"])}


def test_the_end_of_a_process_that_it_forks_is_no_workers(service: Service) -> None:
    service.start("-w", "1", *service.use_handler("bad_manners"))
    [worker] = service.workers()
    assert service.ask("exit in a fork") == f"{worker} exit in a fork\n"
    assert service.ask("x") == f"{worker} x\n"
    assert not service.records("Child Process Died")


# ---- It leaves something behind -------------------------------------------------------


@pytest.mark.parametrize("alarm", ["alarm", "alarm that raises", "alarms without end"])
def test_an_alarm_that_it_leaves_pending_harms_no_later_client(service: Service, alarm: str) -> None:
    service.start("-w", "1", "--timeout", "60", *service.use_handler("bad_manners"))
    [worker] = service.workers()
    with service.connect() as slow:
        slow.sendall(b"x" * 3000)
        wait_until(lambda: service.has_client(worker), "the worker to accept")
        assert service.ask(alarm) == f"{worker} {alarm}\n"
        assert service.ask("sleep") == f"{worker} sleep\n"  # for longer than the alarm
        assert service.ask(alarm) == f"{worker} {alarm}\n"
        time.sleep(0.6)  # the alarm would find the worker idle
        assert service.ask("x") == f"{worker} x\n"
        slow.shutdown(socket.SHUT_WR)
        assert read_all(slow) == f"{worker} {'x' * 3000}\n".encode()
    assert service.workers() == {worker}


def limit_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))


def test_descriptors_that_it_leaves_open_one_by_one_harm_no_later_client(service: Service) -> None:
    service.start("-w", "2", "-n", "100000", *service.use_handler("bad_manners"), preexec_fn=limit_descriptors)
    workers = service.workers()
    replies = [service.ask("leave one open") for _ in range(4 * LIMIT)]
    assert {reply.partition(" ")[2] for reply in replies} == {"leave one open\n"}
    assert int(replies[-1].split()[0]) not in workers  # who has been filled has left
    assert not service.records("Child Process Died")
    wait_until(lambda: len(service.workers()) == 2, "two workers")


def test_descriptors_that_it_leaves_open_all_at_once_harm_no_later_client(service: Service) -> None:
    service.start("-w", "1", "-n", "100000", *service.use_handler("bad_manners"), preexec_fn=limit_descriptors)
    for _ in range(3):
        filled, why = service.ask("leave all open").split()
        assert why == "EMFILE"
        later, reply = service.ask("open").split()
        assert reply == "opened"
        assert later != filled
    assert not service.records("Child Process Died")


def test_a_directory_that_it_changes_harms_no_later_client(service: Service) -> None:
    service.start("-w", "1", *service.use_handler("bad_manners"))
    [worker] = service.workers()
    for going in ("go elsewhere", "go nowhere"):
        assert service.ask("directory") == f"{worker} /\n"
        assert service.ask(going) == f"{worker} {going}\n"
    assert service.ask("directory") == f"{worker} /\n"
    assert os.readlink(f"/proc/{worker}/cwd") == "/"
