"""What README shows is so: its sessions, clients, handlers and tables, as they stand there.

Skipped without unshare and the right to use it (root, or user namespaces), or nc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import CLIENT, DAEMON, DEADLINE, POEM, ROOT, Service, wait_until
from readme import TEXT, block, blocks, program

OWN = (".venv/bin/daemontest.py", ".venv/bin/testclient.py")
PID = re.compile(r"\b97\d{3}\b")  # as README has them
TIME = re.compile(r"\d{4}-\d\d-\d\dT\S+")


def files() -> dict[str, str]:
    """README's handlers and their tables.  Each is named in its first line, or by the words before it."""
    found = {}
    for text, words in blocks():
        named = re.match(r"# ([\w.]+)\n", text) or re.search(r".*`([\w]+\.(?:py|txt))`", words, re.DOTALL)
        if named and not re.search(r"^\$ ", text, re.MULTILINE):
            found[named[1]] = text
    return found


class Sandbox:
    """A shell in a clone of its own, where README's port is free and ps shows nobody else."""

    def __init__(self, service: Service) -> None:
        self.service, self.clone, self.pids = service, service.home / "daemontest", dict[str, str]()
        (self.clone / ".venv" / "bin").mkdir(parents=True)
        for name, script in zip(OWN, (DAEMON, CLIENT), strict=True):
            (self.clone / name).write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
            (self.clone / name).chmod(0o755)
        (self.clone / "tests").symlink_to(ROOT / "tests")
        for name, text in files().items():
            (self.clone / name).write_text(text)
        enter = [program("unshare"), *(["--map-root-user"] if os.geteuid() else []), "--net", "--pid", "--fork",
                 "--kill-child", "--mount-proc"]
        trial = subprocess.run([*enter, "true"], capture_output=True, text=True, timeout=DEADLINE)
        if trial.returncode:
            pytest.skip(f"unshare does not work here: {trial.stderr.strip()}")
        self.shell = subprocess.Popen([*enter, "bash"], cwd=self.clone, env=service.env, text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.do("ip link set lo up")

    def close(self) -> None:
        self.shell.kill()  # and so all in it
        self.shell.communicate()
        wait_until(lambda: not self.service.processes(), "all in it to go")

    def run(self, command: str) -> tuple[int, str]:
        """The exit status of a COMMAND, and what it says."""
        assert self.shell.stdin and self.shell.stdout
        self.shell.stdin.write(f"{{ {command}\n}} < /dev/null; status=$?; echo; echo end: $status\n")
        self.shell.stdin.flush()
        said = ""
        while not (end := re.search(r"\nend: (\d+)\n", said)):
            line = self.shell.stdout.readline()
            assert line, said
            said += line
        return int(end[1]), said[:end.start()]

    def do(self, command: str) -> str:
        """What a COMMAND says that must succeed."""
        status, said = self.run(command)
        assert status == 0, f"{command}: {said}"
        return said

    def play(self, session: str) -> None:
        """Type the commands of README's SESSION, and compare what they say.  The manager's PID is learnt."""
        for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            said = self.do(PID.sub(lambda pid: self.pids.get(pid[0], pid[0]), command))
            if started := re.match(r"daemontest\.py: (97\d+) started", shown):
                self.pids[started[1]] = (re.search(r"\d+", said) or ["?"])[0]
            pattern = re.sub(PID, lambda pid: self.pids.get(pid[0], r"\d+"), re.escape(shown.strip()))
            assert re.fullmatch(pattern, said.strip()), f"$ {command}\n{said}\ninstead of\n{shown}"
            if "kill -HUP" in command:  # nobody types the next command before this is over
                self.service.wait_for_records("Child Process Ended.", 5)

    def is_running(self) -> bool:
        return self.run(f"{OWN[0]} --status")[0] == 0


@pytest.fixture
def sandbox(service: Service) -> Iterator[Sandbox]:
    sandbox = Sandbox(service)
    yield sandbox
    sandbox.close()


SESSIONS = [text for text, _ in blocks() if re.search(rf"^\$ .*{re.escape(OWN[0][:10])}", text, re.MULTILINE)]


def test_sessions_go_as_shown(sandbox: Sandbox) -> None:
    """One after the other, as somebody who reads README would type them."""
    assert SESSIONS
    for session in SESSIONS:
        if sandbox.is_running() == (" started, " in session):
            sandbox.do(f"{OWN[0]} -t" if " started, " in session else OWN[0])
        sandbox.play(session)


def test_example_of_a_log_is_that_of_the_session(sandbox: Sandbox, service: Service) -> None:
    """But for the times, the PIDs, and who was first of those that run at the same time."""
    [session] = [session for session in SESSIONS if "poem.txt" in session and "kill -HUP" in session]
    sandbox.play(session)

    def masked(log: str) -> list[str]:
        return sorted(re.sub(r"\d+", "N", re.sub(r"daemontest [\d.]+, Python [\d.]+", "versions", line))
                      for line in TIME.sub("TIME", log).split("\n"))

    assert masked(service.log) == masked((ROOT / "logs.example").read_text())


def test_client_in_python_prints_a_reply(sandbox: Sandbox) -> None:
    sandbox.do(OWN[0])
    (sandbox.clone / "client.py").write_text(block("import socket"))
    assert re.fullmatch(r"\d+ your text size: \d+\n*", sandbox.do("python3 client.py"))


def test_client_with_netcat_prints_a_reply(sandbox: Sandbox) -> None:
    netcat = program("nc")
    if "-N" not in subprocess.run([netcat, "-h"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stderr:
        pytest.skip("nc is not OpenBSD's")
    sandbox.do(OWN[0])
    shutil.copy(POEM, sandbox.clone / "FILE")
    assert re.fullmatch(r"\d+ your text size: 32\n*", sandbox.do(block(r"nc -N localhost 36000 < FILE")))


def test_every_handler_is_a_good_one(service: Service) -> None:
    handlers = {name: text for name, text in files().items() if re.search(r"^def handle\(", text, re.MULTILINE)}
    assert handlers
    for name, text in files().items():
        (service.home / name).write_text(text)
    for name in handlers:
        done = service.run("--check", "--handler", f"{name.removesuffix('.py')}:handle")
        assert (done.returncode, done.stderr) == (0, "")


def test_table_of_settings_says_what_help_says(service: Service) -> None:
    told = service.run("--help", env={**service.env, "COLUMNS": "500"}).stdout
    rows = re.findall(r"^\| .*`(--[a-z-]+ [A-Z:]+)` \| (.*?) \|", TEXT, re.MULTILINE)
    assert {name for name, _ in rows} == set(re.findall(r"(--[a-z-]+ [A-Z:]+)\s", told))
    for name, default in rows:
        about, = re.findall(rf"{name}\s+(\S.*)$", told, re.MULTILINE)
        if default.startswith("`~/"):
            assert f"/{default.split('`')[1][2:]}" in about
        else:
            assert f"(default: {default.strip('`')})" in about


def test_example_of_a_configuration_is_a_good_one(service: Service) -> None:
    text = block("# ~/daemontest.toml")
    service.configure(re.sub(r'"/[^"]*/', f'"{service.home}/', text))
    (service.home / "rhyme.py").write_text("def handle(text):\n    return text")
    done = service.run("--check")
    assert (done.returncode, done.stdout) == (0, "daemontest.py: configuration is good\n"), done.stderr
