"""What the README shows and recommends, as it stands there, with the real programs."""

import contextlib
import gzip
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CLIENT, DAEMON, DATA, POEM, Service, free_port, read_all, serving, wait_until
from readme import README, adapted, block, program

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
    service.write_handler(source.replace("} lines", "} verses"), "rhyme")
    reload, reloaded, stop, stopped = block("daemontest.py: 97106 reloaded").rstrip("\n").split("\n")
    assert service.run(*typed(reload)).stdout == f"{reloaded.replace('97106', str(manager))}\n"
    assert service.client(text).stdout.decode().split()[1:] == [asked.split()[1], "verses"]
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


# ---- The reference ------------------------------------------------------------------------


def test_the_table_of_settings_says_what_help_says(service: Service) -> None:
    told = service.run("--help", env={**service.env, "COLUMNS": "500"}).stdout
    rows = re.findall(r"^\| .*`(--[a-z-]+ [A-Z:]+)` \| (.*?) \|", README.read_text(), re.MULTILINE)
    assert len(rows) == 12
    for name, default in rows:
        about, = re.findall(rf"{name}\s+(\S.*)$", told, re.MULTILINE)
        if default[0].isdecimal():
            assert about.endswith(f"(default: {default})")
        elif default.startswith("`~/"):
            assert f"/{default.split('`')[1][2:]}" in about
        else:
            assert f"(default: {default})" in about


def test_the_example_of_a_configuration_is_a_good_one(service: Service) -> None:
    text = adapted(block("# ~/daemontest.toml"), {"/var/log/daemontest/log": str(service.log_file)})
    service.configure(text)
    service.start()
    assert len(service.workers()) == 8
    assert service.records("Daemon Server Started. Prefork Workers: 8.")


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
    """Also where there is no systemd."""
    (service.home / "run").mkdir()
    (service.home / "daemontest.toml").write_text(f"port = {service.port}\nworkers = 2\n")
    service.pid_file = service.home / "run" / "pid"
    unit = adapted(block("[Service]"), {"/opt/daemontest/bin/daemontest.py": f"{sys.executable} {DAEMON}",
                                        "/etc/daemontest": str(service.home),
                                        "/run/daemontest": str(service.home / "run")})
    start, reload = (re.findall(rf"^Exec{name}=(.*)$", unit, re.MULTILINE)[0].split() for name in ("Start", "Reload"))
    options = {"cwd": "/", "env": service.env, "stdin": subprocess.DEVNULL}
    with open(service.log_file, "w") as journal:
        daemon = subprocess.Popen(start, stdout=journal, stderr=journal, **options)
    service.wait_for_records("Child Process Started.", 2)
    wait_until(service.pid_file.exists, "the PID file")
    workers = service.workers()
    assert subprocess.run(reload, capture_output=True, **options).returncode == 0
    assert not {int(service.ask("x").split()[0]) for _ in range(6)} & workers
    (service.home / "daemontest.toml").write_text("workers = 0\n")
    service.expected.append("Nothing Changed: bad configuration")
    assert subprocess.run(reload, capture_output=True, **options).returncode == 1
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.wait(50) == 0
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]) > 30  # the default grace


# ---- cron -------------------------------------------------------------------------------


def test_the_line_of_the_crontab_starts_it(service: Service) -> None:
    """By sh, with the few variables that cron sets, in a clone below the home directory."""
    line = block("@reboot $HOME/daemontest/.venv/bin/daemontest.py").strip()
    commands = service.home / "daemontest" / ".venv" / "bin"
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
        "systemctl reload daemontest": f"{sys.executable} {DAEMON} --reload --pid-file {service.pid_file}"})
    (service.home / "logrotate.conf").write_text(stanza)
    service.start("-w", "2")

    def rotate() -> None:
        command = [logrotate, "--force", "--state", service.home / "state", service.home / "logrotate.conf"]
        done = subprocess.run(command, env=service.env, capture_output=True, text=True, timeout=50)
        assert (done.returncode, done.stdout, done.stderr) == (
            0, f"daemontest.py: {service.manager()} reloaded\n", "")

    for word in ("first", "second", "third"):
        workers = service.workers()
        service.ask(word)
        if word != "third":
            rotate()
            assert service.log_file.exists()
            service.wait_for_new_workers(workers)
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
    setting = block("net.ipv4.ip_local_reserved_ports = 36000")
    _, _, port = setting.strip().partition(" = ")
    assert f"default: {port})" in service.run("--help").stdout
    (service.home / "daemontest.conf").write_text(setting)
    done = subprocess.run([program("unshare"), "--net", program("sysctl"), "-p", service.home / "daemontest.conf"],
                          capture_output=True, text=True, timeout=50)  # in a network of its own
    if "Operation not permitted" in done.stderr:
        pytest.skip("no right to make a network of the test's own")
    assert (done.returncode, done.stdout, done.stderr) == (0, setting, "")


def test_a_connection_from_the_port_keeps_it_for_a_while_after_its_end(service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        with socket.create_connection(elsewhere.getsockname(), source_address=("127.0.0.1", service.port)):
            accepted, _ = elsewhere.accept()
        accepted.close()
    done = service.run("-p", str(service.port))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"daemontest.py: cannot listen on port {service.port}: Address already in use\n"


def test_two_services_run_on_one_machine_as_shown_and_not_with_a_port_alone(service: Service) -> None:
    first, second = service.start(), free_port()
    refused = service.run("-p", str(second))
    assert refused.returncode == 1
    assert re.fullmatch(r"daemontest\.py: cannot start: already running .*daemontest\.pid.*\n", refused.stderr)
    start, stop = block("daemontest.py -t --pid-file ~/second.pid").strip().split("\n")

    def run(line: str) -> str:
        command = f"{sys.executable} {DAEMON.parent}/{line.replace('36001', str(second))}"
        done = subprocess.run(["sh", "-c", command], env=service.env, cwd=service.home, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=50)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert re.fullmatch(rf"daemontest\.py: \d+ started, 5 workers on port {second}\n", run(start))
    other = Service(service.home)
    other.port, other.log_file = second, service.home / "second.log"
    for each in (service, other):
        each.ask("x")
        assert len(each.wait_for_records("Client Query Processing Ended.")) == 1
    run(stop)
    assert service.run("--status").stdout == f"{first}\n"
    assert service.ask("x").endswith(" your text size: 1\n")


def test_the_packet_filter_lets_in_whom_its_rules_name_however_often_they_are_loaded(service: Service) -> None:
    """In a network of its own."""
    nft, python = program("nft"), sys.executable
    rules = service.home / "rules"
    rules.write_text(block("table inet daemontest {"))
    sources = {"127.0.0.1": "accepted", "192.0.2.7": "accepted", "198.51.100.7": "dropped", "::1": "accepted",
               "2001:db8::7": "accepted", "2001:db8:1::7": "dropped"}
    script = "\n".join([
        "set -e", "ip link set lo up", *(f"ip address add {source} dev lo nodad || true" for source in sources),
        f"{nft} -f {rules}", f"{nft} -f {rules}", f"{nft} list table inet daemontest",
        f"exec {python} {DATA / 'tries_to_connect.py'} {' '.join(sources)}"])
    done = subprocess.run([program("unshare"), "--net", "sh", "-c", script], capture_output=True, text=True, timeout=50)
    if "Operation not permitted" in done.stderr or "Protocol not supported" in done.stderr:
        pytest.skip(f"no packet filter of the test's own here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    listed, tried = done.stdout.split("}\n}\n") if "}\n}\n" in done.stdout else done.stdout.rsplit("}\n", 1)
    assert listed.count(" drop\n") == 2  # loaded twice, there once
    assert dict(zip(sources, tried.split(), strict=True)) == sources


# ---- HAProxy ----------------------------------------------------------------------------


@contextlib.contextmanager
def haproxy(home: Path, port: int, services: list[Service]) -> Iterator[Path]:
    """HAProxy as in the README, but for its addresses and haste; its control socket."""
    control = home / "control"
    configuration = adapted(block("listen daemontest"), {
        "    maxconn 20000": f"    maxconn 1000\n    stats socket {control}",
        "bind :36000": f"bind 127.0.0.1:{port}", "192.0.2.11:36000": f"127.0.0.1:{services[0].port}",
        "192.0.2.12:36000": f"127.0.0.1:{services[1].port}",
        "inter 2s": "inter 250ms fastinter 50ms downinter 50ms"})  # the first is also for how long a check may take
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

            time.sleep(0.7)  # for some health checks more: they must leave no trace
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
            wait_until(lambda: states(control).get("one") == "UP", "HAProxy to find it up again")
            assert {int(both.ask("x").split()[0]) for _ in range(20)} & one.workers()


def test_slow_clients_through_haproxy_hold_no_worker_either(tmp_path: Path) -> None:
    program("haproxy")
    port = free_port()
    with serving(tmp_path / "one") as one, serving(tmp_path / "two") as two:
        both = Service(tmp_path)
        both.port = port
        for service in (one, two):
            service.start("-w", "2", "--timeout", "50")
        with haproxy(tmp_path, port, [one, two]), contextlib.ExitStack() as stack:
            stalled = [stack.enter_context(both.connect()) for _ in range(100)]
            for client in stalled:
                client.sendall(b"x" * 2100)
            begun = time.monotonic()
            for _ in range(20):
                assert both.ask("x").endswith(" your text size: 1\n")
            assert time.monotonic() - begun < 20  # each stalled client would keep a worker for 50 s
            for client in stalled:
                client.shutdown(socket.SHUT_WR)
            assert all(read_all(client).endswith(b" your text size: 2100\n") for client in stalled)


# ---- Once in each worker ------------------------------------------------------------------


def test_what_is_opened_once_in_each_worker_is_shared_by_none(service: Service) -> None:
    with sqlite3.connect(service.home / "poems.db") as poems:
        poems.execute("CREATE TABLE poems (title, line)")
        poems.execute("INSERT INTO poems VALUES ('靜夜思', '床前明月光')")
    poems.close()
    service.write_handler(block("@functools.cache"), "poems")
    service.start("--handler", "poems:handle", "-w", "2")

    def has_it_open(pid: int) -> int:
        count = 0
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has just been closed
                count += os.readlink(file).endswith("/poems.db")
        return count

    answered = set()
    for _ in range(20):
        worker, reply = service.ask("床前明月光\n").split()
        assert reply == "靜夜思"
        answered.add(int(worker))
    assert service.ask("no such line").endswith(" unknown\n")
    if sys.platform == "linux":
        assert {has_it_open(worker) for worker in answered} == {1}
        assert {has_it_open(generation) for generation in service.generations()} == {0}


# ---- What goes on -------------------------------------------------------------------------


def masked(text: str) -> list[str]:
    """TEXT in lines, each number an N and all space one."""
    return [re.sub(r"\d+(\.\d+)?", "N", " ".join(line.split())) for line in text.strip().split("\n")]


def test_usr1_logs_what_is_shown(service: Service) -> None:
    shown = block("$ kill -USR1 97106").strip().split("\n")[2:]
    manager = service.start("-w", "2", *service.use_handler("does_as_told"))
    with service.connect() as busy:
        busy.sendall(b"hold gate")
        busy.shutdown(socket.SHUT_WR)
        wait_until((service.home / "held-gate").exists, "a handler to run")
        os.kill(manager, signal.SIGUSR1)
        told = service.wait_for_records("(Generation|Worker)", 3)
        assert sorted(masked("\n".join(record[0] for record in told))) == sorted(
            line.replace("+", told[0]["time"][-5]) for line in masked("\n".join(shown)))
        (service.home / "gate").touch()
        assert read_all(busy).endswith(b" your text size: 9\n")


def test_the_kernel_counts_those_who_wait_as_shown(service: Service) -> None:
    program("ss")
    shown = block("$ ss -ltn 'sport = :36000'")
    service.start("-w", "1", *service.use_handler("does_as_told"))

    def gauge() -> list[str]:
        command = shown.split("\n")[0].removeprefix("$ ").replace("36000", str(service.port))
        return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=50).stdout.split("\n")

    head, line, *_ = gauge()
    assert head.split()[:3] == shown.split("\n")[1].split()[:3] == ["State", "Recv-Q", "Send-Q"]
    assert line.split()[:2] == shown.split("\n")[2].split()[:2] == ["LISTEN", "0"]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.connect()) for _ in range(4)]
        for client in clients:
            client.sendall(b"hold gate")
            client.shutdown(socket.SHUT_WR)
            wait_until((service.home / "held-gate").exists, "the handler to run")  # before the next one comes
        wait_until(lambda: gauge()[1].split()[1] == "3", "three who wait")
        (service.home / "gate").touch()
        assert all(read_all(client) for client in clients)


def test_the_processes_have_the_names_shown(service: Service) -> None:
    if sys.platform != "linux":
        pytest.skip("names are Linux's own")
    program("ps")
    shown = block("$ ps -A -o pid,ppid,comm | grep daemontest-").strip().split("\n")
    manager = service.start("-w", "2")
    ours = {str(pid) for pid in [manager, *service.generations(), *service.workers()]}
    told = subprocess.run(["sh", "-c", shown[0].removeprefix("$ ")], capture_output=True, text=True, timeout=50).stdout
    found = [line for line in told.split("\n") if line.split()[:1] and line.split()[0] in ours]
    # In no order: the numbers of processes begin anew from time to time.
    assert sorted(line.split()[2:] for line in found) == sorted(line.split()[2:] for line in shown[1:])


# ---- A single file ------------------------------------------------------------------------


@pytest.mark.parametrize("runner", ["uv", "pipx"])
def test_a_copy_of_the_one_file_runs_by_itself(service: Service, runner: str) -> None:
    program(runner)
    shutil.copy(DAEMON, service.home)
    lines = block("uv run daemontest.py").strip().split("\n")
    line = next(line for line in lines if line.startswith(f"{runner} "))
    marks = {name: value for name, value in service.env.items() if name != "VIRTUAL_ENV"}

    def run(arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", "-c", f"{line} {arguments}"], env=marks, cwd=service.home, capture_output=True,
                              stdin=subprocess.DEVNULL, text=True, timeout=50)

    started = run(f"-p {service.port}")
    if started.returncode and not service.log:
        pytest.skip(f"{runner} cannot fetch the libraries: {started.stderr[-500:]}")
    try:
        assert service.ask("x").endswith(" your text size: 1\n")
    finally:
        assert run("-t").returncode == 0
