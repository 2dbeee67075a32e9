"""The command line: wrong usage is refused with a usage line, failures are one line, -f stays in the foreground."""

import os
import re
import signal

import pytest
from conftest import Service, wait_until

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
    "--log WHAT": "texts",
}


@pytest.mark.parametrize("arguments", [
    "--unknown", "argument", "-t --status", "-p", "-p 65536", "-p abc", "-w 0", "--max-text -1", "--timeout nan",
    "--grace inf", "--handler nocolon", "--por 1", "--pid-file=", "--log nothing"])
def test_wrong_usage(service: Service, arguments: str) -> None:
    done = service.run(*arguments.split())
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


def test_version(service: Service) -> None:
    done = service.run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"daemontest\.py \d+(\.\d+)+\n", done.stdout)


@pytest.mark.parametrize("log", ["stderr", "named"])
def test_foreground_serves_until_ctrl_c(service: Service, log: str) -> None:
    service.log_file = service.home / log
    arguments = ("--log-file", "named") if log == "named" else ()
    with open(service.home / "stderr", "w+") as stderr:
        running = service.foreground(*arguments, stderr=stderr, start_new_session=True)
        wait_until(lambda: service.run("--status").returncode == 0, "the start")
        assert service.ask("x").endswith(" your text size: 1\n")
        assert service.manager() == running.pid == os.getsid(running.pid)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        output, _ = running.communicate(timeout=50)
    assert (running.returncode, output) == (0, "")
    assert service.records()[-1]["message"] == "Server Terminated."
    assert {file.name for file in service.home.iterdir()} == {"stderr", log}  # no PID file
    assert log == "stderr" or (service.home / "stderr").read_text() == ""


@pytest.mark.parametrize(("arguments", "why"), [
    ("--bind 192.0.2.1", "cannot listen on 192.0.2.1"),
    ("--pid-file missing/file", "No such file"),
    ("--log-file missing/file", "No such file"),
    ("--handler missing:handle --log-file named.log", "missing:handle")])
def test_failure_in_the_foreground_is_one_line(service: Service, arguments: str, why: str) -> None:
    running = service.foreground(*arguments.split())
    output, errors = running.communicate(timeout=50)
    assert (running.returncode, output) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: [^\n]*{re.escape(why)}[^\n]*\n", errors), errors
    assert not service.pid_file.exists()
