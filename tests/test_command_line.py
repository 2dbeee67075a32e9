"""The command line: wrong usage is refused with a usage line, failures are one line, -f stays in the foreground."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import DAEMON, Service, alive, wait_until

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


# ---- Usage --------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    "--unknown", "argument", "-t --status", "-f --check", "--reload -t",
    "-p", "-p 0", "-p 65536", "-p -1", "-p abc", "-p 1.5", "-p ''",
    "-w 0", "-w many", "-n 0", "--max-text 0", "--max-text -1",
    "--timeout -1", "--timeout 0", "--timeout nan", "--grace inf", "--handler-timeout soon",
    "--handler nocolon", "--por 1", "--pid-file ''", "--bind ''", "--log", "--log nothing",
    "-t -w 3", "--status --log-file x", "--reload --grace 1"])
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


def test_check_prints_the_traceback_before_its_line(service: Service) -> None:
    path = service.write_handler("\n\n1 / 0\n")
    done = service.run("--check", "--handler", "service:handle")
    assert (done.returncode, done.stdout) == (1, "")
    *traceback, line = done.stderr.splitlines()
    assert traceback[0] == "Traceback (most recent call last):"
    assert f'  File "{path}", line 3, in <module>' in traceback
    assert traceback[-1] == "ZeroDivisionError: division by zero"
    assert line == (f"daemontest.py: cannot load handler service:handle: ZeroDivisionError: division by zero "
                    f"({path}, line 3)")


def test_an_entry_point_may_call_its_main(service: Service, tmp_path: Path) -> None:
    shutil.copy(DAEMON, tmp_path / "_daemontest.py")
    script = tmp_path / "daemontest.py"
    script.write_text("import sys\nfrom _daemontest import main\nsys.exit(main())\n")

    def run(*arguments: str) -> tuple[int, str, str]:
        done = service.run(*arguments, script=script)
        return done.returncode, done.stdout, done.stderr

    status, output, errors = run("-p", str(service.port), "-w", "1")
    assert (status, errors) == (0, "")
    assert output == f"daemontest.py: {service.manager()} started, 1 workers on port {service.port}\n"
    assert service.ask("x").endswith(" your text size: 1\n")
    assert run("-w", "0")[0] == 2
    assert run("--status") == (0, f"{service.manager()}\n", "")
    assert run("-t") == (0, f"daemontest.py {output.split()[1]} Server terminated.\n", "")
    assert run("--status")[0] == 3


# ---- Foreground ---------------------------------------------------------------------


def test_foreground_stays_logs_to_standard_error_and_ends_with_ctrl_c(service: Service) -> None:
    with open(service.home / "stderr", "w+") as stderr:
        # A terminal's Ctrl-C goes to the whole process group.
        running = service.foreground("-w", "2", stderr=stderr, start_new_session=True)
        service.log_file = service.home / "stderr"
        service.wait_for_records("Child Process Started.", 2)
        wait_until(lambda: service.run("--status").returncode == 0, "the start")
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
    wait_until(lambda: service.run("--status").returncode == 0, "the start")
    service.wait_for_records("Child Process Started.", 5)
    assert service.stop().returncode == 0
    assert not alive(running.pid)
    assert running.communicate(timeout=50) == ("", "")
    assert running.returncode == 0
    assert service.records("Server Terminated.")


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
