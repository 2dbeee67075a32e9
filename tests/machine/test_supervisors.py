"""supervisord and runit start the service, reload it, stop it and start it anew, by README's lines and as its user.

On a machine of its own, so skipped where nobody may make one (see test_systemd.py), and without the programs.
"""

import re
from collections.abc import Iterator

import pytest
from machine import Machine, booted
from readme import block, blocks, program

PID_FILE = "/var/lib/daemontest/pid"
COMMANDS = {
    "supervisord": {"begin": "supervisord -c /etc/supervisor/supervisord.conf",
                    "hup": "supervisorctl signal HUP daemontest",
                    "stop": "supervisorctl stop daemontest | grep stopped",
                    "end": "supervisorctl shutdown && while pgrep -x supervisord; do sleep 0.1; done"},
    "runit": {"begin": "mkdir -p /tmp/service && ln -sfn /etc/sv/daemontest /tmp/service/ && "
                       "(runsvdir /tmp/service > /dev/null 2>&1 &) && "
                       "until sv status /etc/sv/daemontest; do sleep 0.1; done",
              "hup": "sv hup /etc/sv/daemontest",
              "stop": "sv -w 45 stop /etc/sv/daemontest | grep '^ok: down:'",
              "end": "pkill -x runsvdir; sv exit /etc/sv/daemontest"},
}


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    for name in ("supervisord", "supervisorctl", "runsvdir", "sv", "chpst"):
        program(name)
    with booted() as machine:
        directory = [text for text, _ in blocks() if re.search("^install -d .*/var/lib/daemontest", text, re.MULTILINE)]
        machine.do(directory[0] if directory else "install -d -o daemontest /var/lib/daemontest")
        machine.write("/etc/supervisor/conf.d/daemontest.conf", block(r"\[program:daemontest\]"))
        machine.do("mkdir -p /etc/sv/daemontest")
        machine.write("/etc/sv/daemontest/run", block("exec chpst .*"), 0o755)
        yield machine


@pytest.fixture(params=COMMANDS)
def supervisor(request: pytest.FixtureRequest, machine: Machine) -> Iterator[dict[str, str]]:
    commands = COMMANDS[request.param]
    machine.do(commands["begin"])
    yield commands
    machine.do(commands["end"])
    machine.wait_until(lambda: machine.run("pgrep -u daemontest").stdout == "", "the service to end")
    machine.do(f"rm -f {PID_FILE}*")


def manager(machine: Machine) -> str:
    """The PID of the manager, once it serves with all its workers; whatever lives, runs as its user."""
    machine.wait_until(lambda: machine.run("pgrep -c -u daemontest daemontest-work").stdout == "5\n", "5 workers")
    return machine.do(f"/opt/daemontest/bin/daemontest.py --status --pid-file {PID_FILE}").strip()


def test_it_is_reloaded_and_started_anew_when_killed_and_stopped(supervisor: dict[str, str], machine: Machine) -> None:
    first = manager(machine)
    old = machine.do("pgrep -u daemontest daemontest-gen")
    told = machine.do(f"/opt/daemontest/bin/daemontest.py --reload --pid-file {PID_FILE}")  # as root
    assert told == f"daemontest.py: {first} reloaded\n"
    new = machine.do("pgrep -u daemontest daemontest-gen")
    assert new != old
    machine.do(supervisor["hup"])
    machine.wait_until(lambda: new not in machine.run("pgrep -u daemontest daemontest-gen").stdout, "the reload")
    assert manager(machine) == first
    machine.do(f"kill -KILL {first}")
    machine.wait_until(lambda: machine.run(f"cat {PID_FILE}").stdout not in ("", f"{first}\n"), "the next manager")
    assert manager(machine) != first
    machine.do(supervisor["stop"])
    assert machine.run(f"pgrep -u daemontest; ls {PID_FILE}*").stdout == ""
