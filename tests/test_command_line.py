"""The command line: what is wrong is refused with a usage line, what is asked is told, -f stays in the foreground."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import POEM, ROOT, Service, alive, wait_until

DEFAULTS = {
    "-c, --config FILE": "~/daemontest.toml",
    "-b, --bind ADDRESS": "every address",
    "-p, --port N": "36000",
    "-w, --workers N": "5",
    "-n, --max-requests N": "100",
    "--handler MODULE:FUNCTION": "length",
    "--timeout SECONDS": "10",
    "--handler-timeout SECONDS": "30",
    "--grace SECONDS": "30",
    "--max-text BYTES": "16777216",
    "--pid-file FILE": "~/daemontest.pid",
    "--log-file FILE": "~/daemontest.log",
}


# ---- Usage --------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    "--unknown", "argument", "-t --status", "-f --check", "--reload -t",
    "-p", "-p 0", "-p 65536", "-p -1", "-p abc", "-p 1.5", "-p ''",
    "-w 0", "-w many", "-n 0", "--max-text 0", "--max-text -1",
    "--timeout -1", "--timeout 0", "--timeout nan", "--grace inf", "--handler-timeout soon",
    "--handler nocolon", "--por 1", "--pid-file ''", "--bind ''"])
def test_wrong_usage_is_refused_with_a_usage_line(service: Service, arguments: str) -> None:
    done = service.run(*(argument.strip("'") for argument in arguments.split()))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"usage: daemontest\.py .*\ndaemontest\.py: error: .+\n", done.stderr), done.stderr
    assert list(service.home.iterdir()) == []


def test_help_names_every_option_with_its_default(service: Service) -> None:
    done = service.run("--help", env={**service.env, "COLUMNS": "200"})
    assert (done.returncode, done.stderr) == (0, "")
    for option, default in DEFAULTS.items():
        if option[1] != "-":  # -p, --port N: argparse of before 3.13 writes -p N, --port N
            short, long, value = option.replace(",", "").split()
            option = f"{short}( {value})?, {long} {value}"
        assert re.search(rf"^  {option}\s.*\bdefault: (the )?{re.escape(default)}\b", done.stdout, re.MULTILINE), option
    for action in ("-f, --foreground", "-t, --terminate", "--reload", "--status", "--check", "-h, --help", "--version"):
        assert re.search(rf"^  {action}\s+\w", done.stdout, re.MULTILINE), action


def test_version_is_told(service: Service) -> None:
    done = service.run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"daemontest\.py \d+(\.\d+)+\n", done.stdout)


def test_check_says_what_is_wrong(service: Service) -> None:
    done = service.run("--check", "--handler", "missing:handle")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"daemontest\.py: [^\n]*missing:handle: [^\n]+\n", done.stderr)


def test_an_outcome_that_cannot_be_told_is_an_error(service: Service) -> None:
    service.start()
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / "daemontest.py"), "--status"], env=service.env,
                              stdout=full, stderr=subprocess.PIPE, text=True, timeout=50)
    assert done.returncode == 1
    assert re.fullmatch(r"daemontest\.py: [^\n]*: No space left on device\n", done.stderr)


# ---- Foreground ---------------------------------------------------------------------


def test_foreground_stays_logs_to_standard_error_and_ends_with_ctrl_c(service: Service) -> None:
    with open(service.home / "stderr", "w+") as stderr:
        # A terminal's Ctrl-C goes to the whole process group.
        running = service.foreground("-w", "2", stderr=stderr, start_new_session=True)
        service.log_file = service.home / "stderr"
        service.wait_for_records("Child Process Started.", 2)
        service.serving_generation()
        assert service.ask("x").endswith(" your text size: 1\n")
        assert service.manager() == running.pid == os.getsid(running.pid)
        os.killpg(running.pid, signal.SIGINT)
        output, _ = running.communicate(timeout=50)
    assert (running.returncode, output) == (0, "")
    assert service.records("")[-1]["message"] == "Server Terminated."
    assert sorted(file.name for file in service.home.iterdir()) == ["stderr"]  # neither log nor PID file


def test_foreground_logs_to_a_file_that_is_named(service: Service) -> None:
    running = service.foreground("--log-file", "named.log")
    service.log_file = service.home / "named.log"
    service.wait_for_records("Child Process Started.", 5)
    service.serving_generation()
    assert service.stop().returncode == 0
    assert running.communicate(timeout=50) == ("", "")
    assert running.returncode == 0
    assert service.records("Server Terminated.")


def test_a_terminate_of_a_foreground_service_waits_for_its_end(service: Service) -> None:
    running = service.foreground(stderr=subprocess.DEVNULL)
    wait_until(lambda: service.run("--status").returncode == 0, "the start")
    service.stop()
    assert not alive(running.pid)
    assert running.communicate(timeout=50) == ("", None)


@pytest.mark.parametrize(("arguments", "why"), [
    (("--bind", "192.0.2.1"), "cannot listen on 192.0.2.1"),
    (("--pid-file", "missing/file"), "No such file"),
    (("--log-file", "missing/file"), "No such file"),
    (("--log-file", "named.log", "--handler", "missing:handle"), "missing:handle"),
])
def test_a_failure_in_the_foreground_is_one_line(service: Service, arguments: tuple[str, ...], why: str) -> None:
    running = service.foreground(*arguments)
    output, errors = running.communicate(timeout=50)
    assert (running.returncode, output) == (1, "")
    assert re.fullmatch(r"daemontest\.py: [^\n]+\n", errors), errors
    assert why in errors
    assert not service.pid_file.exists()


# ---- Installed ----------------------------------------------------------------------


@pytest.mark.timeout(400)  # pip may have to fetch and build
def test_the_installed_commands_do_the_whole_job(tmp_path: Path, service: Service) -> None:
    checkout, environment = tmp_path / "checkout", tmp_path / "venv"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests"))
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=120)
    subprocess.run([environment / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "-q", checkout],
                   check=True, timeout=240)

    def run(*command: str, stdin: Any = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
        path = f"{environment}/bin:{os.environ['PATH']}"
        return subprocess.run(command, env={**service.env, "PATH": path}, cwd=service.home, stdin=stdin,
                              executable=environment / "bin" / command[0], capture_output=True, text=True, timeout=50)

    started = run("daemontest.py", "-p", str(service.port))
    assert (started.returncode, started.stderr) == (0, "")
    manager = service.manager()
    with POEM.open() as poem:
        asked = run("testclient.py", "-p", str(service.port), stdin=poem)
    assert re.fullmatch(r"\d+ your text size: 33\n", asked.stdout)
    stopped = run("daemontest.py", "-t")
    assert stopped.stdout == f"daemontest.py {manager} Server terminated.\n"
    assert not alive(manager)
    shutil.rmtree(environment)  # too big to be kept


def test_foreground_goes_back_to_standard_error_when_the_log_file_is_named_no_more(service: Service) -> None:
    service.configure("workers = 1\nlog_file = 'daemontest.log'")
    with open(service.home / "stderr", "w") as errors:
        daemon = service.foreground(stderr=errors)
        service.wait_for_records("Child Process Started.", 1)
        service.serving_generation()
        service.configure("workers = 1")
        assert service.run("--reload").returncode == 0  # returns when the manager, too, writes to the new log
        service.log_file = service.home / "stderr"
        assert service.records("Child Process Started.")
        assert service.stop().returncode == 0
        daemon.communicate(timeout=50)
    assert service.records()[-1]["message"] == "Server Terminated."
