"""No client holds a worker, no handler holds a client: who is slow costs a descriptor and its bytes, nothing more."""

import os
import re
import resource
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from statistics import median

import psutil
import pytest
import slow_clients as slow
from conftest import Held, Load, Service, alive, read_all, seconds_between, wait_until
from slow_clients import BEGINNING, Crowd, Kind

MIB = 2**20
FINISHED = "your text size: 2101\n"  # of the reply to a text that was begun and finished, after the PID
FOR_EVER = ("-n", "1000000")  # no worker is to end after its requests
HANDLER = """
import held

def handle(text):
    match text.split():
        case ["hold"]:
            return held.handle(text)
        case ["reply", count]:
            return "x" * int(count)
    return f"your text size: {len(text)}"
"""


@pytest.fixture
def held(service: Service) -> Held:
    service.write_handler(HANDLER)
    service.configure('handler = "service:handle"\n')
    return Held(service)


def start(service: Service, *arguments: str, descriptors: tuple[int, int] | None = None) -> int:
    """Start with a soft and a hard limit of DESCRIPTORS; the manager's PID."""
    return service.start(*arguments, preexec_fn=lambda: descriptors and resource.setrlimit(
        resource.RLIMIT_NOFILE, descriptors))


def begin_slowly(service: Service, count: int = 1) -> list[socket.socket]:
    """COUNT clients that have sent the beginning of a text, and are in the keeper's hand."""
    before = service.kept()[0]
    clients = [service.connect(timeout=40) for _ in range(count)]
    for client in clients:
        client.sendall(BEGINNING)
    wait_until(lambda: service.kept()[0] >= before + count, f"{count} clients to be kept")
    return clients


def finish(client: socket.socket) -> str:
    """Send the rest of the text; the reply."""
    with client:
        client.sendall(b"x")
        client.shutdown(socket.SHUT_WR)
        return read_all(client).decode()


def assert_prompt(service: Service, times: int = 10) -> None:
    """The next whole texts are answered as if nobody else were there."""
    took = []
    for _ in range(times):
        began = time.monotonic()
        assert service.ask("whole\n").endswith(" your text size: 6\n")
        took.append(time.monotonic() - began)
    assert median(took) < 1, took  # a slow client that held the worker would hold it for 40 s


def assert_at_rest(service: Service) -> None:
    """No process of the service takes processor time any more."""
    def used() -> float:
        """By the processes' own clocks (clock_getcpuclockid(3)), since /proc counts in steps of 10 ms."""
        seconds = 0.0
        for pid in service.processes():
            with suppress(OSError):  # it has gone
                seconds += time.clock_gettime(~pid << 3 | 2)
        return seconds

    def used_in_a_moment() -> float:
        before = used()
        time.sleep(0.5)
        return used() - before

    wait_until(lambda: used_in_a_moment() < 0.01, "the service to take no processor time")


def sizes(crowd: Crowd) -> set[bytes]:
    """What the crowd's replies say, without the PID."""
    return {reply.partition(b" ")[2] for reply in crowd.replies}


# ---- Beside slow clients --------------------------------------------------------------

@pytest.mark.parametrize(("kind", "count", "max_text", "text"), [
    pytest.param(slow.silent, 800, 5000, b"", id="silent"),
    pytest.param(slow.urgent, 200, 5000, b"", id="urgent"),
    pytest.param(slow.stalled, 300, MIB, b"", id="stalled"),
    pytest.param(slow.trickling, 200, MIB, b"", id="trickling"),
    pytest.param(slow.staying, 200, 5000, b"", id="staying"),
    pytest.param(slow.sending_on, 100, 5000, b"x" * 5001, id="sending-on"),
    pytest.param(slow.not_reading, 20, 100 * MIB, b"reply 6000000", id="not-reading"),
])
def test_next_text_is_answered_at_once_beside(
        service: Service, held: Held, kind: Kind, count: int, max_text: int, text: bytes) -> None:
    start(service, "-w", "1", "--timeout", "40", "--max-text", str(max_text), *FOR_EVER)
    workers = service.workers()
    with Crowd(service.port, kind, count, text=text) as crowd:
        crowd.wait_until_in_place()
        assert_prompt(service)
        assert (crowd.replies, crowd.failures) == ([], []), "they are to be there still"
    assert_prompt(service, 1)
    assert service.workers() == workers
    wait_until(lambda: service.kept() == (0, 0), "the keeper to have let them go")
    assert_at_rest(service)


# ---- The slow clients themselves --------------------------------------------------------

@pytest.mark.parametrize(("kind", "count", "reply"), [
    pytest.param(slow.slow_line, 50, b"your text size: 229376\n", id="slow-lines"),  # one by one: 70 s
    pytest.param(slow.original, 250, b"your text size: 31\n", id="original"),  # 25 s
    pytest.param(slow.two_parts, 1250, b"your text size: 34\n", id="two-parts"),  # 25 s
])
def test_slow_clients_are_served_at_the_same_time(
        service: Service, held: Held, kind: Kind, count: int, reply: bytes) -> None:
    start(service, "-w", "1", "--timeout", "50")
    began = time.monotonic()
    with Crowd(service.port, kind, count) as crowd:
        crowd.wait_until_served()
    assert time.monotonic() - began < 15
    assert (len(crowd.replies), crowd.failures, sizes(crowd)) == (count, [], {reply})


def test_each_client_has_its_own_timeout_for_its_text_and_its_reply(service: Service, held: Held) -> None:
    start(service, "-w", "1", "--timeout", "1.5")
    with Crowd(service.port, slow.not_reading, 5, text=b"reply 6000000"), \
            Crowd(service.port, slow.stalled, 50) as stalled:
        stalled.wait_until_in_place()
        in_place = time.monotonic()
        stalled.wait_until_served()
        assert time.monotonic() - in_place < 20  # one by one, it would be 75 s
        service.wait_for_records("Client: 127.0.2.*; Reply Not Delivered: ", 5)
    assert (stalled.failures, sizes(stalled)) == ([], {b"error: text not ended within 1.5 s\n"})
    assert len(service.wait_for_records("Client: 127.0.2.*; Refused: text not ended within 1.5 s.", 50)) == 50
    assert_at_rest(service)


def test_text_that_came_while_the_service_was_suspended_is_answered(service: Service, held: Held) -> None:
    start(service, "--timeout", "1.5")
    clients, processes = begin_slowly(service, 3), service.processes()
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor() as pool:
        replies = list(map(pool.submit, [finish] * 3, clients))
        time.sleep(2)  # beyond the timeout
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
        assert all(reply.result().endswith(FINISHED) for reply in replies)


# ---- Beside handlers --------------------------------------------------------------------

def test_whole_text_never_waits_while_a_worker_is_idle(service: Service, held: Held) -> None:
    start(service, "-w", "5", "--timeout", "40", *FOR_EVER)
    clients = begin_slowly(service, 20)
    with ThreadPoolExecutor() as pool:
        try:
            busy = [pool.submit(service.ask, "hold", timeout=50) for _ in range(4)]
            [idle] = service.workers() - set(held.wait_for(4))
            assert {finish(client) for client in clients} == {f"{idle} {FINISHED}"}
            for kind in (slow.two_parts, slow.original):
                with Crowd(service.port, kind, 20) as crowd:
                    crowd.wait_until_served()
                assert (crowd.failures, {reply.split()[0] for reply in crowd.replies}) == ([], {b"%d" % idle})
                assert max(crowd.waits) < 1
        finally:
            held.release()
        assert all(reply.result().endswith(" let through\n") for reply in busy)


def test_whole_texts_wait_for_a_busy_worker_beyond_the_timeout(service: Service, held: Held) -> None:
    start(service, "-w", "1", "--timeout", "2", *FOR_EVER)
    clients = begin_slowly(service, 300)  # more than those whose texts are on their way to the worker
    with service.begin(b"hold") as busy:
        held.wait_for()
        for client in clients:
            client.sendall(b"x")
            client.shutdown(socket.SHUT_WR)
        clients.append(service.begin(BEGINNING + b"x"))
        sent = time.monotonic()
        wait_until(lambda: time.monotonic() > sent + 2.2, "them to wait longer than the timeout")
        held.release()
        assert read_all(busy).endswith(b" let through\n")
    for client in clients:
        with client:
            assert read_all(client).decode().endswith(FINISHED)


# ---- Bounds -------------------------------------------------------------------------------

def test_keeper_raises_its_own_limit_of_descriptors(service: Service, held: Held) -> None:
    start(service, "-w", "2", "--timeout", "40", descriptors=(64, 600))
    with Crowd(service.port, slow.stalled, 400) as crowd:
        crowd.wait_until_in_place()
        wait_until(lambda: service.kept()[0] == 400, "all of them to be kept")
        assert_prompt(service)
        assert (crowd.replies, crowd.failures) == ([], [])


def test_at_the_bound_of_clients_the_oldest_are_dropped_and_the_newest_served(service: Service, held: Held) -> None:
    start(service, "-w", "2", "--timeout", "40", *FOR_EVER, descriptors=(128, 128))
    workers = service.workers()
    oldest = begin_slowly(service, 10)
    with Crowd(service.port, slow.stalled, 300) as crowd:
        for client in oldest:
            with client, suppress(ConnectionError):
                assert client.recv(100) == b"", "at the most an end without a word"
        wait_until(lambda: len(crowd.replies) + len(crowd.failures) + service.kept()[0] >= 300, "all to have come")
        assert_prompt(service)
        newest = service.connect()
        newest.sendall(BEGINNING)
        assert_prompt(service, 1)
        assert finish(newest).endswith(FINISHED)
        assert 10 < service.kept()[0] < 128
        assert_at_rest(service)  # nobody spins while there are no descriptors
    assert service.workers() == workers
    assert service.records("Client: .*; Dropped: ")[0]["message"].startswith("Client: 127.0.0.1; ")
    assert len(service.records("Client: .*; Dropped: too many clients.")) > 100
    assert not service.records("Client Lost")


@pytest.mark.parametrize(("kind", "text"), [(slow.stalled, bytes(4 * MIB)), (slow.not_reading, b"reply 8000000")],
                         ids=["texts", "replies"])
def test_at_the_bound_of_bytes_the_oldest_are_dropped(service: Service, held: Held, kind: Kind, text: bytes) -> None:
    start(service, "-w", "1", "--timeout", "40", "--max-text", str(4 * MIB), *FOR_EVER)
    processes = service.processes()
    service.ask(bytes(4 * MIB))
    service.ask("reply 8000000")
    before = sum(map(memory, processes))
    with Crowd(service.port, kind, 100, text=text) as crowd:
        wait_until(lambda: crowd.in_place + len(crowd.failures) >= 100, "all of them to have come")
        service.wait_for_records("Client: .*; Dropped: too many bytes.", 20)
        wait_until(lambda: service.kept()[1] < 80 * MIB, "all but 16 texts and the newest to be dropped")
        assert_prompt(service)
        assert service.ask(bytes(4 * MIB)).endswith(f" your text size: {4 * MIB}\n")
        assert service.kept()[0] > 0, "the newest are there still"
        assert sum(map(memory, processes)) - before < 200 * MIB, "together they sent, or asked for, 800 MiB"
        assert_at_rest(service)
    assert service.processes() == processes


def test_replies_that_are_read_do_not_count_as_held(service: Service, held: Held) -> None:
    start(service, "-w", "1", "--timeout", "40", "--max-text", "4000")  # so at most 64,000 bytes may be held
    with ThreadPoolExecutor() as pool, service.begin(b"reply 100000000") as reader:
        reading = pool.submit(lambda: [time.sleep(0.01) for _ in range(1000) if reader.recv(100_000)])
        for client in begin_slowly(service, 3):
            assert finish(client).endswith(FINISHED)
        assert not reading.done()
        reader.shutdown(socket.SHUT_RDWR)


def memory(pid: int) -> int:
    """Bytes that are the process's own."""
    return int(psutil.Process(pid).memory_full_info().uss)


def test_without_memory_for_a_text_it_is_refused_and_nobody_ends(service: Service, held: Held) -> None:
    start(service, "-w", "1", "--timeout", "40", "--max-text", str(200 * MIB))
    [client], [worker], keeper = begin_slowly(service), service.workers(), service.keeper()
    for pid in (worker, keeper):
        space = psutil.Process(pid).memory_info().vms + 40 * MIB
        resource.prlimit(pid, resource.RLIMIT_AS, (space, space))
    for size in (30, 35, 100):  # the memory ends when the text is decoded, or while it is received
        assert re.fullmatch(r"\d+ error: .+\n", service.ask(bytes(size * MIB)))
        assert service.ask("whole\n") == f"{worker} your text size: 6\n"
    assert finish(client) == f"{worker} {FINISHED}"
    assert (service.workers(), service.keeper()) == ({worker}, keeper)


# ---- The keeper's end ---------------------------------------------------------------------

def test_killed_keeper_loses_the_clients_in_its_hand_alone(service: Service, held: Held) -> None:
    service.expected.append(r"Keeper Process Died\. \(SIGKILL")
    start(service, "-w", "2", "--timeout", "40", *FOR_EVER)
    workers = service.workers()
    with ThreadPoolExecutor() as pool:
        busy = pool.submit(service.ask, "hold")
        held.wait_for()
        clients, keeper, began = begin_slowly(service, 3), service.keeper(), time.monotonic()
        wait_until(lambda: time.monotonic() > began + 1, "it to have lived for a second")
        os.kill(keeper, signal.SIGKILL)
        for client in clients:
            with client, suppress(ConnectionError):
                assert client.recv(100) == b""
        [died] = service.wait_for_records(r"Keeper Process Died\. \(SIGKILL; [123] clients? lost\)")
        following = service.wait_for_records("Keeper Process Started.", 2)[1]
        held.release()
        assert int(died["pid"]) == keeper
        assert seconds_between(died, following) < 0.8, "the next is there at once"
        assert_prompt(service, 2)
        assert busy.result().endswith(" let through\n")
    assert service.workers() == workers
    [client] = begin_slowly(service)
    assert finish(client).endswith(FINISHED)


def test_suspended_keeper_blocks_no_worker_nor_a_stop_beyond_the_grace(service: Service, held: Held) -> None:
    service.expected.append("Killed|Died")
    start(service, "-w", "20", "--timeout", "20", "--grace", "1", *FOR_EVER)
    keeper = service.keeper()
    os.kill(keeper, signal.SIGSTOP)
    with Crowd(service.port, slow.stalled, 60):
        service.wait_for_records("Client: .*; Lost: ")  # since no more can be passed on
        # One whose half-close comes too late is passed on, too, and lost.
        wait_until(lambda: service.client("whole").stdout.endswith(b" your text size: 6\n"), "a whole text's reply")
    began = time.monotonic()
    assert service.stop().returncode == 0
    assert time.monotonic() - began < 10
    assert not service.processes()


def test_slow_clients_live_through_reloads_and_the_new_code_answers(service: Service, held: Held) -> None:
    start(service, "-w", "2")
    clients = begin_slowly(service, 6)
    for word in ("second", "third"):
        service.write_handler(f"def handle(text):\n    return '{word}'")
        assert service.run("--reload").returncode == 0
        new = {f"{worker} {word}\n" for worker in service.workers()}
        for _ in range(3):
            assert finish(clients.pop()) in new
    wait_until(lambda: service.kept()[0] == 0, "nobody to be left")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["stop", "kill"])
def test_slow_clients_finish_after_the_managers_end(service: Service, held: Held, signum: int) -> None:
    manager = start(service, "-w", "2", "--timeout", "30", "--max-text", str(100 * MIB))
    processes, clients, reader = service.processes(), begin_slowly(service, 3), service.begin(b"reply 9000000")
    wait_until(lambda: service.kept()[0] == 4, "a reply to be kept")
    os.kill(manager, signum)
    wait_until(service.refuses, "nobody to listen")
    assert all(finish(client).endswith(FINISHED) for client in clients)
    with reader:
        assert len(read_all(reader)) > 9_000_000
    wait_until(lambda: not any(map(alive, processes)), "all to end")


def test_a_stop_during_a_workers_last_text_loses_none_that_is_kept(service: Service, held: Held) -> None:
    start(service, "-w", "1", "-n", "1", "--timeout", "30")
    (client,), busy = begin_slowly(service), service.begin(b"hold")
    held.wait_for()
    stop = service.popen("-t")
    wait_until(service.refuses, "nobody to listen")
    held.release()
    with busy:
        assert read_all(busy).endswith(b" let through\n")
    assert finish(client).endswith(FINISHED)
    assert stop.wait(40) == 0


# ---- Everything at a time -----------------------------------------------------------------

@pytest.mark.parametrize("event", ["reload", "keeper", "generation", "worker"])
def test_under_mixed_load_as_many_are_lost_as_the_log_tells(service: Service, held: Held, event: str) -> None:
    service.expected.append(r"(Keeper Process|Generation|Child Process) Died\. \(SIGKILL")
    start(service, "-w", "3", "-n", "20")
    victims = {"keeper": service.keeper, "generation": service.generation,
               "worker": lambda: min(wait_until(service.workers, "workers"))}
    with ExitStack() as stack:
        load = stack.enter_context(Load(service, 3, pause=0.005))
        crowds = [stack.enter_context(Crowd(service.port, kind, 10, again=True))
                  for kind in (slow.two_parts, slow.original)]
        for _ in range(3):
            load.wait_for(40)
            if event == "reload":
                assert service.run("--reload").returncode == 0
            else:
                os.kill(victims[event](), signal.SIGKILL)
        load.wait_for(40)
        for crowd in crowds:
            crowd.wait_until_served()
    failed = len(load.failures) + sum(len(crowd.failures) + crowd.replies.count(b"") for crowd in crowds)
    lost = sum(int(number) for number in re.findall(r"Keeper Process Died.*; (\d+) client", service.log))
    # Each of the three killed keepers may have lost two more, which the kernel had at that moment.
    assert failed <= {"keeper": lost + 6, "worker": 3}.get(event, 0)
    assert all(len(crowd.replies) >= 10 for crowd in crowds)
