"""A worker serves exactly its number of requests, then a new one takes its place."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import groupby

from conftest import Service


def ask(service: Service) -> int:
    """Ask with an empty text; the worker's PID.

    Its end comes with the connection, so its client is never slow: a worker with a slow one in hand may go on
    after its requests, while too many others are leaving.
    """
    return int(service.ask("").split()[0])


def test_one_worker_after_the_other_serves_exactly_its_requests(service: Service) -> None:
    service.start("-w", "1", "-n", "3")
    served = [ask(service) for _ in range(12)]
    assert [len(list(replies)) for _, replies in groupby(served)] == [3, 3, 3, 3]
    ended = service.wait_for_records(r"Child Process Ended\. \(0\)$", 4)
    assert sorted(int(match["pid"]) for match in ended) == sorted(served[::3])  # the next may have served meanwhile
    # At once: without the second that the place of a worker that died stays empty.
    started = service.wait_for_records("Child Process Started", 5)
    assert [int(match["pid"]) for match in started[:4]] == served[::3]
    gaps = [datetime.fromisoformat(new["time"]) - datetime.fromisoformat(old["time"])
            for old, new in zip(ended, started[1:], strict=False)]
    assert min(gap.total_seconds() for gap in gaps) < 0.5


def test_none_of_several_workers_serves_more_or_leaves_early(service: Service) -> None:
    service.start("-w", "3", "-n", "4")
    with ThreadPoolExecutor(6) as pool:
        served = Counter(pool.map(ask, [service] * 100))
    assert served.total() == 100
    assert max(served.values()) == 4
    full = {worker for worker, count in served.items() if count == 4}
    ended = service.wait_for_records(r"Child Process Ended\. \(0\)$", len(full))
    assert {int(match["pid"]) for match in ended} == full
    assert len(served) - len(full) <= 3  # the workers of now
    assert not service.records(r"Child Process Ended\. \([^0]")


def test_workers_that_end_after_their_requests_are_replaced_at_once(service: Service) -> None:
    service.start("-w", "1", "-n", "1")
    began = time.monotonic()
    workers = {ask(service) for _ in range(30)}
    assert len(workers) == 30
    assert time.monotonic() - began < 15  # the delay after a death would make it 29 s
