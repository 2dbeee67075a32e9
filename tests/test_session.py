"""The session that the README shows."""

import os
import re
import signal

from conftest import CLIENT, POEM, Service, wait_until


def test_the_session_of_the_readme(service: Service) -> None:
    manager = service.start()
    workers = service.workers()
    assert len(workers) == 5
    with POEM.open() as poem:
        asked = service.run("-s", "localhost", "-p", str(service.port), script=CLIENT, stdin=poem)
    match = re.fullmatch(r"(\d+) your text size: 33\n", asked.stdout)
    assert asked.returncode == 0
    assert match
    assert int(match[1]) in workers
    os.kill(manager, signal.SIGHUP)
    wait_until(lambda: len(service.workers()) == 5 and not service.workers() & workers, "new workers")
    os.kill(manager, signal.SIGPIPE)
    assert service.ask("x").endswith(" your text size: 1\n")
    stopped = service.stop()
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert stopped.stdout == f"daemontest.py {manager} Server terminated.\n"
    assert not service.processes()
    assert not service.pid_file.exists()
