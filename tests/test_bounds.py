"""What a worker has in hand is bounded: its clients by their descriptors, their texts and replies by their bytes."""

import re
import resource
import time
from datetime import datetime
from itertools import groupby

import psutil
from conftest import Service, wait_until
from slow_clients import Client, Crowd, SlowSender, at_rest, in_hand, not_reading, stall_after, stalled

MIB = 2**20


def start(service: Service, *arguments: str, descriptors: int | None = None) -> set[int]:
    """Start with a handler that does as told, and allowed so many DESCRIPTORS; the workers."""
    service.start(*service.use_handler("does_as_told"), "-n", "1000000", *arguments,
                  preexec_fn=lambda: descriptors and resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors,) * 2))
    return service.workers()


def assert_at_most_one_record_a_second(service: Service, reason: str) -> int:
    """In each worker's log; how many clients these records tell of.

    A worker that is not scheduled between its decision and the record dates that late, so no single pause is sure.
    """
    records = sorted(service.records(f"Client: 127.0.2.*; Dropped: {reason}"), key=lambda record: record["pid"])
    for _, of_one_worker in groupby(records, key=lambda record: record["pid"]):
        times = [datetime.fromisoformat(record["time"]) for record in of_one_worker]
        assert len(times) - 1 <= (times[-1] - times[0]).total_seconds() + 0.9, times
    return sum(1 + int((re.search(r"\(and (\d+) before\)", record["message"]) or [0, 0])[1]) for record in records)


def memory(worker: int) -> int:
    """Bytes that are the worker's own."""
    return int(psutil.Process(worker).memory_full_info().uss)


def assert_at_rest(workers: set[int]) -> None:
    wait_until(lambda: at_rest(workers), "the workers to rest")


# ---- Descriptors --------------------------------------------------------------------


def test_with_64_descriptors_500_stalled_clients_keep_nobody_waiting(service: Service) -> None:
    workers = start(service, "-w", "2", "--timeout", "60", descriptors=64)
    with Crowd(service.port, stalled, 500) as crowd:
        for _ in range(5):
            began = time.monotonic()
            assert service.ask("whole\n").endswith(" your text size: 6\n")
            assert time.monotonic() - began < 10  # the stalled ones' timeout is a minute
        wait_until(lambda: len(crowd.replies) + len(crowd.failures) >= 500 - 2 * 64, "most to be dropped")
        assert 0 < in_hand(service, *workers) < 2 * 64
        assert_at_rest(workers)
    assert service.workers() == workers
    # A worker tells of those it has dropped since its last record when the next is dropped a second later.
    service.wait_for_records("Client: 127.0.2.*; Dropped: too many clients in hand")
    assert assert_at_most_one_record_a_second(service, "too many clients in hand") > 0


def test_at_the_bound_the_client_that_has_been_in_hand_longest_is_dropped_and_counted(service: Service) -> None:
    [worker] = start(service, "-w", "1", "--timeout", "60", descriptors=40)
    first = [SlowSender(service.connect()) for _ in range(10)]
    wait_until(lambda: in_hand(service, worker) == 10, "the first in hand")
    with Crowd(service.port, stalled, 60):
        for sender in first:
            try:
                assert sender.connection.recv(100) == b"", "at the most an end without a word"
            except ConnectionResetError:
                pass
            sender.connection.close()
        wait_until(lambda: in_hand(service, worker) > 15, "the last in hand")
        time.sleep(1.1)  # until the worker may write one more record
        with Crowd(service.port, stalled, 40) as last:
            assert service.ask("whole\n") == f"{worker} your text size: 6\n"
            assert last.replies == last.failures == [] or in_hand(service, worker) < 40
    dropped = [record["message"] for record in service.records("Client: .*; Dropped: too many clients in hand")]
    assert dropped[0].startswith("Client: 127.0.0.1; Dropped: too many clients in hand")
    assert any(re.search(r"\(and \d+ before\)", message) for message in dropped[1:])
    assert service.workers() == {worker}


def test_a_handler_that_fills_the_descriptors_does_not_make_its_worker_spin(service: Service) -> None:
    [worker] = start(service, "-w", "1", descriptors=64)
    assert service.ask("fill").endswith(" your text size: 4\n")
    began = time.monotonic()
    waiting = [SlowSender(service.connect()) for _ in range(3)]
    for sender in waiting:
        assert sender.finish().endswith(" your text size: 2101\n")
    assert time.monotonic() - began < 10
    [successor] = wait_until(lambda: service.workers() - {worker}, "the full worker to be replaced")
    assert service.ask("whole\n") == f"{successor} your text size: 6\n"
    assert_at_rest(service.workers())


# ---- Bytes --------------------------------------------------------------------------


async def stalled_with_a_mebibyte(client: Client) -> bytes:
    return await stall_after(client, bytes(MIB))


def test_bytes_in_hand_are_bounded_however_many_send_large_texts(service: Service) -> None:
    [worker] = start(service, "-w", "1", "--timeout", "60", "--max-text", str(MIB + 10))
    service.ask(bytes(MIB))
    before = memory(worker)
    with Crowd(service.port, stalled_with_a_mebibyte, 100, waits=False) as crowd:
        wait_until(lambda: len(crowd.replies) + len(crowd.failures) > 80, "most of them to be dropped")
        assert memory(worker) - before < 16 * MIB
        assert_at_rest({worker})  # all have come: the last ones would drop a text that is slow to be sent
        assert in_hand(service, worker) > 0, "some are still in hand"
        assert service.ask(bytes(MIB)) == f"{worker} your text size: {MIB}\n"
        assert_at_rest({worker})
    service.wait_for_records("Client: 127.0.2.*; Dropped: too many bytes in hand")
    assert_at_most_one_record_a_second(service, "too many bytes in hand")
    assert service.workers() == {worker}


def test_bytes_of_replies_that_nobody_reads_are_bounded(service: Service) -> None:
    [worker] = start(service, "-w", "1", "--timeout", "60", "--max-text", str(4 * MIB))
    service.ask("reply 8000000")
    before = memory(worker)
    with Crowd(service.port, not_reading, 60, text=b"reply 8000000", waits=False) as crowd:
        # All: the last ones would drop a client that is slow to half-close.
        wait_until(lambda: crowd.come + len(crowd.failures) == 60, "all of them to have asked")
        assert crowd.come > 50
        assert service.ask("whole\n") == f"{worker} your text size: 6\n"
        assert memory(worker) - before < 60 * MIB, "all of them would be 240 MiB or more"
        assert in_hand(service, worker) > 0
        assert_at_rest({worker})
    service.wait_for_records("Client: 127.0.2.*; Dropped: too many bytes in hand")
    assert_at_most_one_record_a_second(service, "too many bytes in hand")
    assert service.workers() == {worker}


def test_those_who_read_their_replies_get_them_beside_those_who_do_not(service: Service) -> None:
    [worker] = start(service, "-w", "1", "--timeout", "60", "--max-text", str(4 * MIB))
    with Crowd(service.port, not_reading, 30, text=b"reply 8000000", waits=False) as crowd:
        # All: the last ones would drop a client that is slow to read.
        wait_until(lambda: crowd.come + len(crowd.failures) == 30, "all of them to have asked")
        assert crowd.come > 20
        for _ in range(3):
            assert service.ask("reply 8000000") == f"{worker} {8000000 * 'x'}\n"


def test_memory_does_not_grow_with_each_crowd_of_slow_clients(service: Service) -> None:
    [worker] = start(service, "-w", "1", "--max-text", str(64 * MIB))
    grown = []
    for _ in range(5):
        with Crowd(service.port, stalled_with_a_mebibyte, 20):
            wait_until(lambda: memory(worker) > 20 * MIB, "the worker to have read what the kernel has taken")
        wait_until(lambda: not in_hand(service, worker), "them to have gone")
        service.ask("whole\n")
        grown.append(memory(worker))
    assert grown[-1] - grown[0] < 30 * MIB, "what they sent was 100 MiB; the allocator may keep what one crowd took"


# ---- Memory -------------------------------------------------------------------------


def test_a_text_for_which_there_is_no_memory_is_refused_and_the_worker_lives(service: Service) -> None:
    [worker] = start(service, "-w", "1", "--timeout", "60", "--max-text", str(200 * MIB))
    sender = SlowSender(service.connect())
    wait_until(lambda: in_hand(service, worker) == 1, "it in hand")
    address_space = psutil.Process(worker).memory_info().vms + 40 * MIB
    resource.prlimit(worker, resource.RLIMIT_AS, (address_space, address_space))
    for size in (30, 100, 35):  # the memory ends when the text is received, or not before it is decoded
        reply = service.ask(bytes(size * MIB))
        assert re.fullmatch(rf"{worker} error: .+\n", reply)
        assert service.ask("whole\n") == f"{worker} your text size: 6\n"
    assert sender.finish() == f"{worker} your text size: 2101\n"
    assert service.workers() == {worker}
    assert not service.records("Child Process Died")
