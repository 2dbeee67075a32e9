"""What the README shows and recommends, as it stands there, with the real programs."""

import contextlib
import gzip
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CLIENT, DAEMON, POEM, ROOT, Service, free_port, serving, wait_until

README = ROOT / "README.md"


def block(*lines: str) -> str:
    """The README's one indented block that has each of LINES, without its indentation."""
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", README.read_text(), re.MULTILINE)
    found = [text for text in map(textwrap.dedent, blocks) if set(lines) <= set(text.split("\n"))]
    assert len(found) == 1, f"{len(found)} blocks with {lines} in the README"
    return found[0].strip("\n") + "\n"


def adapted(text: str, changes: dict[str, str]) -> str:
    """TEXT for the test's own paths and ports; each of CHANGES must find its place."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def program(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if not path:
        pytest.skip(f"{name} is not installed")
    return path


# ---- A session and your own service -------------------------------------------------------------------


def test_the_session_goes_as_shown(service: Service) -> None:
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


def typed(line: str) -> list[str]:
    """The arguments of the command of the session's LINE."""
    return line.removeprefix("$ .venv/bin/").split()[1:]


def test_the_first_service_of_ones_own_does_what_its_session_shows(service: Service) -> None:
    source = block("def handle(text: str) -> str:", '    return f"{len(text.splitlines())} lines"')
    service.write_handler(source, "rhyme")
    start, started, ask, asked = block("$ .venv/bin/daemontest.py --handler rhyme:handle").rstrip("\n").split("\n")
    manager = service.start(*typed(start))
    assert re.fullmatch(r"daemontest\.py: \d+ started, 5 workers on port 36000", started)
    text = ask.removeprefix("$ printf '").partition("'")[0].replace("\\n", "\n")
    assert service.client(text).stdout.decode().split()[1:] == asked.split()[1:]
    workers = service.workers()
    reload, reloads, stop, stopped = block("daemontest.py: 97106 reloads").rstrip("\n").split("\n")
    assert service.run(*typed(reload)).stdout == f"{reloads.replace('97106', str(manager))}\n"
    service.wait_for_new_workers(workers)
    assert service.run(*typed(stop)).stdout == f"{stopped.replace('97106', str(manager))}\n"


def test_the_larger_service_does_what_its_session_shows(service: Service) -> None:
    source = block("def alternates(tones: str) -> bool:")
    table = block("● 月漢萬里未但使將在不馬度")
    start, started, _, *reply = block("$ .venv/bin/daemontest.py --handler tones:handle").rstrip("\n").split("\n")
    service.write_handler(source, "tones")
    (service.home / "tones.txt").write_text(table)
    manager = service.start(*typed(start))
    assert re.fullmatch(r"daemontest\.py: \d+ started, 5 workers on port 36000", started)
    asked = service.client(POEM.read_text())
    assert (asked.returncode, asked.stderr) == (0, b"")
    worker, _, told = asked.stdout.decode().partition(" ")
    assert int(worker) in service.workers(manager)
    assert told.rstrip("\n") == "\n".join(reply).partition(" ")[2]
    assert service.ask("月月月月 關x月").partition(" ")[2] == "2 lines\n月月月月 ●●●● irregular\n關x月 ○?● regular\n"


# ---- systemd ----------------------------------------------------------------------------


def test_systemd_finds_no_fault_with_the_units(service: Service) -> None:
    analyze = program("systemd-analyze")
    command = service.home / "daemontest.py"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    (service.home / "daemontest.service").write_text(adapted(
        block("[Service]"), {"/opt/daemontest/bin/daemontest.py": str(command)}))
    (service.home / "daemontest.socket").write_text(block("[Socket]"))
    units = [str(service.home / name) for name in ("daemontest.service", "daemontest.socket")]
    done = subprocess.run([analyze, "verify", "--man=no", *units], capture_output=True, text=True, timeout=50)
    if re.search("Failed to (initialize manager|get D-Bus|create)", done.stderr):
        pytest.skip(f"systemd-analyze does not work here: {done.stderr}")
    told = [line for line in done.stderr.split("\n") if "daemontest" in line]
    assert (done.returncode, told) == (0, [])


def test_the_command_of_the_unit_serves_and_reloads_and_stops(service: Service) -> None:
    unit = block("[Service]")
    command = next(line for line in unit.split("\n") if line.startswith("ExecStart=")).removeprefix("ExecStart=")
    (service.home / "run").mkdir()
    (service.home / "daemontest.toml").write_text(f"port = {service.port}\nworkers = 2\n")
    service.pid_file = service.home / "run" / "pid"
    arguments = adapted(command, {
        "/opt/daemontest/bin/daemontest.py": str(DAEMON), "/etc/daemontest": str(service.home),
        "/run/daemontest": str(service.home / "run")}).split()
    assert "ExecReload=/bin/kill -HUP $MAINPID" in unit
    with open(service.log_file, "w") as journal:
        daemon = subprocess.Popen([sys.executable, *arguments], cwd="/", env=service.env, stdin=subprocess.DEVNULL,
                                  stdout=journal, stderr=journal)
    service.wait_for_records("Child Process Started.", 2)
    workers = service.workers()
    subprocess.run(["/bin/kill", "-HUP", str(daemon.pid)], check=True)
    service.wait_for_new_workers(workers)
    assert service.ask("x").endswith(" your text size: 1\n")
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.wait(50) == 0
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]) > 30  # the default grace


# ---- cron -------------------------------------------------------------------------------


def test_the_line_of_the_crontab_starts_it(service: Service) -> None:
    """By sh, with the few variables that cron sets."""
    line = block("@reboot $HOME/.venv/bin/daemontest.py").strip()
    commands = service.home / ".venv" / "bin"
    commands.mkdir(parents=True)
    launcher = commands / "daemontest.py"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} {DAEMON} "$@"\n')
    launcher.chmod(0o755)
    service.configure(f"port = {service.port}")
    marks = {name: value for name, value in service.env.items() if name.startswith("DAEMONTEST_")}
    environment = {"HOME": str(service.home), "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin", "LOGNAME": "root", **marks}
    done = subprocess.run(["/bin/sh", "-c", line.removeprefix("@reboot ")], env=environment, cwd=service.home,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
    assert service.ask("あ").endswith(" your text size: 1\n")


# ---- logrotate --------------------------------------------------------------------------


def test_logrotate_rotates_the_log_and_no_record_is_lost(service: Service) -> None:
    logrotate = program("logrotate")
    user = f"{service.home.owner()} {service.home.group()}"
    stanza = adapted(block("    postrotate"), {
        "/var/log/daemontest/log": str(service.log_file), "su daemontest daemontest": f"su {user}",
        "su -s /bin/sh daemontest -c": "sh -c", "/opt/daemontest/bin/daemontest.py": f"{sys.executable} {DAEMON}",
        "/run/daemontest/pid": str(service.pid_file)})
    (service.home / "logrotate.conf").write_text(stanza)
    service.start("-w", "2")

    def rotate() -> None:
        command = [logrotate, "--force", "--state", service.home / "state", service.home / "logrotate.conf"]
        done = subprocess.run(command, env=service.env, capture_output=True, text=True, timeout=50)
        assert (done.returncode, done.stdout.replace(f"daemontest.py: {service.manager()} reloads\n", ""),
                done.stderr) == (0, "", "")

    for word in ("first", "second", "third"):
        workers = service.workers()
        service.ask(word)
        if word != "third":
            rotate()
            service.wait_for_new_workers(workers)
            wait_until(service.log_file.exists, "the new log")
    service.stop()
    older = gzip.decompress((service.home / "daemontest.log.2.gz").read_bytes()).decode()
    logs = [older, (service.home / "daemontest.log.1").read_text(), service.log]
    for word, log in zip(("first", "second", "third"), logs, strict=True):
        assert [text for text in ("first", "second", "third") if f"    {text}\n" in log] == [word]
    assert "".join(logs).count("Child Process Started.") == "".join(logs).count("Child Process Ended.") == 6
    assert service.log_file.stat().st_mode & 0o777 == 0o640


# ---- The distribution's packages ----------------------------------------------------------


def test_it_runs_from_the_packages_of_the_distribution(service: Service) -> None:
    python = "/usr/bin/python3"
    trial = "import sys, daemon, lockfile; sys.exit(sys.version_info < (3, 11))"
    if not Path(python).exists() or subprocess.run([python, "-c", trial], capture_output=True, timeout=50).returncode:
        pytest.skip("no python3-daemon and python3-lockfile for a Python of 3.11 or later here")

    def run(script: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, str(script), *arguments], input=text, capture_output=True, text=True,
                              env=service.env, cwd=service.home, timeout=50)

    started = run(DAEMON, "-p", str(service.port))
    assert (started.returncode, started.stderr) == (0, "")
    manager = service.manager()
    asked = run(CLIENT, "-p", str(service.port), text="十一月")
    assert re.fullmatch(r"\d+ your text size: 4\n", asked.stdout)
    workers = service.workers()
    assert run(DAEMON, "--reload").returncode == 0
    service.wait_for_new_workers(workers)
    stopped = run(DAEMON, "-t")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert stopped.stdout == f"daemontest.py {manager} Server terminated.\n"


# ---- The port, and who may connect ----------------------------------------------------------


def test_the_reserved_port_is_the_default_one(service: Service) -> None:
    name, _, port = block("net.ipv4.ip_local_reserved_ports = 36000").strip().partition(" = ")
    assert f"default: {port})" in service.run("--help").stdout
    if sys.platform == "linux":
        assert Path("/proc/sys", *name.split(".")).exists()


def test_the_packet_filter_understands_its_rules(service: Service) -> None:
    nft = program("nft")
    rules = service.home / "rules"
    rules.write_text(block("table inet daemontest {"))
    done = subprocess.run([nft, "--check", "--file", rules], capture_output=True, text=True, timeout=50)
    if "Operation not permitted" in done.stderr:
        pytest.skip("no right to check the packet filter's rules here")
    assert (done.returncode, done.stderr) == (0, "")


# ---- HAProxy ----------------------------------------------------------------------------


@contextlib.contextmanager
def haproxy(home: Path, port: int, services: list[Service]) -> Iterator[Path]:
    """HAProxy as in the README, but for its addresses and haste; its control socket."""
    control = home / "control"
    configuration = f"global\n    stats socket {control}\n" + adapted(block("listen daemontest"), {
        "bind :36000": f"bind 127.0.0.1:{port}", "192.0.2.11:36000": f"127.0.0.1:{services[0].port}",
        "192.0.2.12:36000": f"127.0.0.1:{services[1].port}", "inter 2s": "inter 50ms"})
    (home / "haproxy.cfg").write_text(configuration)
    with open(home / "haproxy.log", "w") as log:
        running = subprocess.Popen([program("haproxy"), "-f", home / "haproxy.cfg", "-db"], stdout=log, stderr=log)
    try:
        wait_until(lambda: states(control) == {"one": "UP", "two": "UP"}, "HAProxy to find both servers")
        yield control
    finally:
        running.kill()
        running.wait(50)


def states(control: Path) -> dict[str, str]:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(control))
        except OSError:
            return {}
        connection.sendall(b"show stat\n")
        with connection.makefile() as answer:
            header, *rows = (line.split(",") for line in answer if line.strip())
    found = (dict(zip(header, row, strict=False)) for row in rows)
    return {row["svname"]: row["status"] for row in found if row["svname"] in ("one", "two")}


def test_haproxy_shares_out_the_clients_and_leaves_out_a_daemon_that_was_killed(tmp_path: Path) -> None:
    program("haproxy")
    port = free_port()
    with serving(tmp_path / "one") as one, serving(tmp_path / "two") as two:
        both = Service(tmp_path)  # no daemon, but its clients
        both.port = port
        for service in (one, two):
            service.start("-w", "2")
        with haproxy(tmp_path, port, [one, two]) as control:
            workers = [one.workers(), two.workers()]
            answered = [int(both.ask("x").split()[0]) for _ in range(20)]
            assert set(answered) <= workers[0] | workers[1]
            assert set(answered) & workers[0]
            assert set(answered) & workers[1]
            long = "平仄" * 500_000
            assert both.ask(long).endswith(f" your text size: {len(long)}\n")

            time.sleep(0.5)  # for some twenty health checks: they must leave no trace
            requests = [len(service.records("Client Query Processing Started.")) for service in (one, two)]
            assert sum(requests) == 21
            assert not any(service.records("Client: .*(Lost|Refused|Not Taken)") for service in (one, two))
            assert [one.workers(), two.workers()] == workers

            os.kill(one.manager(), signal.SIGKILL)
            wait_until(lambda: not one.processes(), "the killed daemon's workers to leave")
            assert {int(both.ask("x").split()[0]) for _ in range(20)} <= two.workers()  # found out or not
            wait_until(lambda: states(control) == {"one": "DOWN", "two": "UP"}, "HAProxy to find one server down")
            assert {int(both.ask("x").split()[0]) for _ in range(20)} <= two.workers()

            one.start("-w", "2")
            wait_until(lambda: states(control)["one"] == "UP", "HAProxy to find it up again")
            assert {int(both.ask("x").split()[0]) for _ in range(20)} & one.workers()
