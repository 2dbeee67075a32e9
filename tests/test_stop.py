"""A stop is graceful, however it comes, and over when it says so; a killed manager takes all others with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest
from conftest import DAEMON, DEADLINE, Held, Load, Service, alive, read_all, wait_until

SLOW_START = b"x" * 2100  # of a text: so much that only a half-close ends it


def begin(service: Service, stack: ExitStack) -> socket.socket:
    """A client in the middle of a text."""
    client = stack.enter_context(service.connect())
    client.sendall(SLOW_START)
    return client


def finish(client: socket.socket) -> bytes:
    """The reply, without the PID, to the text that is finished now."""
    client.sendall(b"x")
    client.shutdown(socket.SHUT_WR)
    return read_all(client).partition(b" ")[2]


WHOLE = b"your text size: 2101\n"


def wait_for_clients(service: Service, count: int) -> None:
    """Wait until the keeper has COUNT clients."""
    def told() -> bool:
        os.kill(service.manager(), signal.SIGUSR1)
        return bool(service.records(rf"Status: keeper with {count} clients?\b"))

    wait_until(told, f"the keeper to have {count} clients")


def refuses(service: Service) -> bool:
    """Whether nobody listens any more."""
    try:
        service.connect().close()
    except ConnectionRefusedError:
        return True
    return False


# ---- What a stop waits for ----------------------------------------------------------


@pytest.mark.parametrize("how", ["-t", "SIGTERM", "SIGINT", "SIGQUIT"])
def test_a_stop_waits_for_the_request_in_hand(service: Service, how: str) -> None:
    held = Held(service)
    manager = service.start("-w", "3", *held.arguments)
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = held.wait_for()
        stop = service.popen("-t") if how == "-t" else os.kill(manager, signal.Signals[how])
        wait_until(lambda: refuses(service), "nobody to accept any more")
        assert stop is None or stop.poll() is None
        assert alive(manager)
        held.release()
        assert read_all(client) == b"%d let through\n" % busy
    if stop:
        assert stop.communicate(timeout=50) == (f"daemontest.py {manager} Server terminated.\n", "")
        assert stop.returncode == 0
        assert not service.processes()
    wait_until(lambda: not service.processes(), "the stop")
    assert not service.pid_file.exists()
    caught = "SIGTERM" if how == "-t" else how
    assert str(manager) in [record["pid"] for record in service.records(f"Caught {caught}$")]
    assert len(service.records(r"Child Process Ended\. \(\d+\)$")) == 3
    assert service.records()[-1]["message"] == "Server Terminated."


@pytest.mark.parametrize("how", ["Ctrl-C", "pkill"])
def test_a_stop_sent_to_all_processes_at_once_is_a_stop(service: Service, how: str) -> None:
    """As a terminal sends it to those in its foreground, or `pkill -f daemontest.py`."""
    held = Held(service)
    daemon = service.foreground("-w", "3", *held.arguments, "--log-file", service.log_file, start_new_session=True)
    service.wait_for_records("Child Process Started.", 3)
    with service.connect() as client:
        client.sendall(b"x\n")
        [busy] = held.wait_for()
        if how == "Ctrl-C":
            os.killpg(daemon.pid, signal.SIGINT)
        else:
            for pid in service.processes():
                with suppress(ProcessLookupError):  # it has gone already, told by another
                    os.kill(pid, signal.SIGTERM)
        wait_until(lambda: refuses(service), "nobody to accept any more")
        held.release()
        assert read_all(client) == b"%d let through\n" % busy
    assert (daemon.wait(DEADLINE), daemon.communicate()) == (0, ("", ""))
    assert not service.processes()
    assert not service.pid_file.exists()
    assert service.records()[-1]["message"] == "Server Terminated."


def test_a_stop_waits_for_texts_that_have_begun_and_lets_the_silent_go_at_once(service: Service) -> None:
    service.start("-w", "2", "--timeout", "30")
    with ExitStack() as stack:
        urgent = [stack.enter_context(service.connect()) for _ in range(5)]
        for client in urgent:
            client.send(b"!", socket.MSG_OOB)  # wakes whoever waits for data, but is none
        slow = begin(service, stack)
        wait_for_clients(service, 6)
        stop = service.popen("-t")
        assert [read_all(client) for client in urgent] == [b""] * 5  # of the 30 s that they might take
        assert stop.poll() is None
        assert finish(slow) == WHOLE
        assert stop.wait(DEADLINE) == 0
        assert not service.processes()


@pytest.mark.parametrize("text", [b"x\n", SLOW_START], ids=["in the handler", "still coming"])
def test_a_stop_waits_no_longer_than_the_grace(service: Service, text: bytes) -> None:
    service.expected.append(r"Child Process Killed\. \(still running after the grace\)")
    held = Held(service)
    service.start("-w", "1", "--timeout", "40", "--handler-timeout", "40", "--grace", "1", *held.arguments)
    with service.connect() as client:
        client.sendall(text)
        if text == SLOW_START:
            wait_for_clients(service, 1)
        else:
            held.wait_for()
        began = time.monotonic()
        assert service.stop().returncode == 0
        assert 0.9 < time.monotonic() - began < 15
        assert not service.processes()
    assert len(service.records("Child Process Killed")) == (text != SLOW_START)


def test_a_stop_ends_at_once_a_reload_whose_import_does_not_end(service: Service) -> None:
    manager = service.start("-w", "1")
    service.write_handler("print('importing', flush=True)\nsum(range(10**12))\n")  # in C, deaf to signals
    service.configure("handler = 'service:handle'")
    os.kill(manager, signal.SIGHUP)
    wait_until(lambda: "\nimporting\n" in service.log, "the import")
    began = time.monotonic()
    assert service.stop().returncode == 0
    assert time.monotonic() - began < 10  # of the grace of 30 s
    assert not service.processes()


# ---- What a stop says ---------------------------------------------------------------


def test_nobody_listens_after_a_stop_nor_when_the_pid_file_has_gone(service: Service) -> None:
    for _ in range(5):
        manager = service.start("-w", "2")
        os.kill(manager, signal.SIGTERM)
        while service.pid_file.exists():  # without a pause, not to miss the moment; the test's timeout ends it
            pass
        for host in ("127.0.0.1", "::1"):
            with pytest.raises(ConnectionRefusedError):
                service.connect(host)
        wait_until(lambda: not service.processes(), "all to go")


def test_what_does_not_run_is_told_with_its_pid_file(service: Service) -> None:
    manager = service.start("-w", "1")
    asked = service.run("--status")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, f"{manager}\n", "")
    service.stop()
    other = service.home / "other.pid"
    for arguments, path in ([], service.pid_file), (["--pid-file", "other.pid"], other):
        for action, status in ("-t", 1), ("--status", 3):
            done = service.run(action, *arguments)
            assert (done.returncode, done.stdout) == (status, "")
            assert done.stderr == f"daemontest.py: not running (PID file {path})\n"
            assert not path.exists()


@pytest.mark.parametrize("setting", [("-w", "3"), ("-p", "12345"), ("--log-file", "log"), ("--handler", "a:b"),
                                     ("--grace", "1"), ("--log", "life")], ids=" ".join)
@pytest.mark.parametrize("action", ["-t", "--status", "--reload"])
def test_actions_on_a_service_refuse_settings_that_cannot_reach_it(service: Service, action: str,
                                                                  setting: tuple[str, str]) -> None:
    done = service.run(action, *setting)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")
    assert setting[0] in done.stderr.splitlines()[-1]


def test_actions_on_a_service_find_it_by_a_configuration_with_other_settings(service: Service) -> None:
    config = ("-c", service.configure(f"port = {service.port}\nworkers = 2\npid_file = 'my.pid'\n"))
    service.run(*config)
    manager = (service.home / "my.pid").read_text().strip()
    assert [service.run(action, *config).stdout for action in ("--status", "--reload", "-t")] == [
        f"{manager}\n", f"daemontest.py: {manager} reloaded\n", f"daemontest.py {manager} Server terminated.\n"]


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_the_exit_status_tells_even_if_the_words_cannot_be_written(service: Service, redirection: str) -> None:
    done = subprocess.run(["sh", "-c", f'exec "$0" "$1" --status {redirection}', sys.executable, str(DAEMON)],
                          env=service.env, stdout=subprocess.PIPE, timeout=50)
    assert (done.returncode, done.stdout) == (3, b"")


def test_a_stop_does_not_wait_for_a_service_that_is_started_just_then(service: Service) -> None:
    held = Held(service)
    stopped = service.start("-w", "1", *held.arguments)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(service.ask, "x")
        held.wait_for()
        stop = service.popen("-t")
        service.wait_for_records("Caught SIGTERM")
        stop.send_signal(signal.SIGSTOP)  # as if it were not scheduled
        held.release()
        assert asked.result().endswith(" let through\n")
    wait_until(lambda: not alive(stopped), "the service to stop")
    manager = wait_until(lambda: service.run("-p", str(service.port)).returncode == 0 and service.manager(), "a start")
    stop.send_signal(signal.SIGCONT)
    assert stop.communicate(timeout=DEADLINE) == (f"daemontest.py {stopped} Server terminated.\n", "")
    assert service.run("--status").stdout == f"{manager}\n"


# ---- A killed manager ---------------------------------------------------------------


def kill(manager: int) -> None:
    os.kill(manager, signal.SIGKILL)
    wait_until(lambda: not alive(manager), "the manager to die")


def assert_not_running(service: Service) -> None:
    assert [service.run(action).returncode for action in ("--status", "-t", "--reload")] == [3, 1, 1]


def test_after_a_killed_manager_all_go_within_a_second_and_the_next_start_finds_the_port_free(service: Service) -> None:
    took = []
    for _ in range(4):
        manager = service.start("-w", "3")
        kill(manager)
        began = time.monotonic()
        wait_until(lambda: not service.processes(), "all to go", 10)
        took.append(time.monotonic() - began)
        assert service.pid_file.read_text() == f"{manager}\n"
        assert_not_running(service)
    assert min(took) < 1.0, "on a loaded machine, some may take longer"


def test_after_a_killed_manager_requests_in_hand_and_texts_that_have_begun_are_answered(service: Service) -> None:
    held = Held(service)
    manager = service.start("-w", "3", "--timeout", "30", *held.arguments)
    workers = service.workers()
    with ExitStack() as stack:
        client = stack.enter_context(service.connect())
        client.sendall(b"x\n")
        [busy] = held.wait_for()
        slow = [begin(service, stack) for _ in range(4)]
        wait_for_clients(service, 4)
        kill(manager)
        assert_not_running(service)
        wait_until(lambda: refuses(service), "nobody to accept any more", 10)
        assert workers & service.processes()
        held.release()
        assert read_all(client) == b"%d let through\n" % busy
        assert [finish(client) for client in slow] == [b"let through\n"] * 4
    wait_until(lambda: not service.processes(), "all to go", 10)
    service.start("-w", "1")


def test_after_a_killed_manager_under_load_every_text_that_was_begun_is_logged_to_its_end(service: Service) -> None:
    for _ in range(3):
        manager = service.start("-w", "3", "-n", "20")
        with Load(service) as load:
            load.wait_for(50)
            kill(manager)
            wait_until(lambda: not service.processes() and refuses(service), "all to go", 10)
        assert {reply.partition(b" ")[2] for reply in load.replies} == {b"your text size: 1\n"}
        begun, ended = (service.records(f"Client Query Processing {word}") for word in ("Started", "Ended"))
        assert len(begun) == len(ended)


HANGS = """
import os

def handle(text):
    if text == "hang":
        with open("{HOME}/hung", "w") as file:
            file.write(str(os.getpid()))
        sum(range(10**12))  # in C, where no signal is looked after
    return text
"""


@pytest.mark.parametrize("with_generation", [False, True], ids=["manager", "manager and generation"])
def test_a_hung_worker_ends_at_its_handlers_time_also_when_others_are_killed(service: Service,
                                                                            with_generation: bool) -> None:
    service.expected += [r"Child Process Killed\. \(handler ran longer", "Generation Died"]
    service.write_handler(HANGS.replace("{HOME}", str(service.home)))
    arguments = ("-w", "3", "--handler", "service:handle", "--handler-timeout", "3")
    manager = service.start(*arguments)
    generation, idle = service.generation(), service.workers()
    with service.connect() as client:
        asked = time.monotonic()
        client.sendall(b"hang")
        client.shutdown(socket.SHUT_WR)
        file = service.home / "hung"
        hung = int(wait_until(lambda: file.exists() and file.read_text(), "the handler to hang"))
        kill(manager)
        if with_generation:
            with suppress(ProcessLookupError):
                os.kill(generation, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, idle - {hung})), "the idle workers to go")
        assert alive(hung)
        wait_until(lambda: not service.processes(), "the hung worker to end", 10)
        assert time.monotonic() - asked > 2.9
    assert " in handle\n" in service.log  # the line at which it hung
    service.start(*arguments)
    assert service.ask("x").endswith(" x\n")


def test_after_a_manager_killed_during_a_reload_both_generations_finish_and_go(service: Service) -> None:
    held = Held(service)
    manager = service.start("-w", "2", *held.arguments)
    old = service.workers(manager)
    with service.connect() as client, service.connect() as another:
        client.sendall(b"x\n")
        [busy] = held.wait_for()
        os.kill(manager, signal.SIGHUP)
        wait_until(lambda: service.workers() & old == {busy} and len(service.workers() - old) == 2, "the reload")
        another.sendall(b"x\n")
        [_, busy_too] = held.wait_for(2)
        kill(manager)
        wait_until(lambda: refuses(service), "nobody to accept any more", 10)
        held.release()
        assert read_all(client) == b"%d let through\n" % busy
        assert read_all(another) == b"%d let through\n" % busy_too
    wait_until(lambda: not service.processes(), "all to go", 10)
    service.start("-w", "1")


@pytest.mark.parametrize("clients", [0, 3])
def test_a_start_soon_after_a_killed_manager_succeeds(service: Service, clients: int) -> None:
    with Load(service, clients) as load:
        for _ in range(3):
            manager = service.start("-w", "3", "-n", "20")
            load.wait_for(10 * bool(clients))
            os.kill(manager, signal.SIGKILL)
            # Within a moment it may have to be repeated.
            wait_until(lambda: service.run("-p", str(service.port)).returncode == 0, "a start", 5)
            assert service.ask("x").endswith(" your text size: 1\n")
            service.stop()
