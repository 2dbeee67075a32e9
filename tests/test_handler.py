"""Your own service: found, imported once in the manager, and unable to do harm by what it raises, returns or prints."""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
from conftest import CONTINUATION, DEADLINE, RECORD, Service, read_all, wait_until

INDENTED = "^    "  # the lines of tracebacks
ECHO = "def handle(text):\n    return text"


def lines_under(service: Service, message: str) -> list[str]:
    """The lines, without their indentation, under each record with MESSAGE."""
    found: list[str] = []
    within = False
    for line in service.log.split("\n"):
        if match := RECORD.fullmatch(line):
            within = match["message"] == message
        elif within and line:
            found.append(line[4:])
    return found


# ---- Found --------------------------------------------------------------------------


def test_it_is_found_where_the_command_was_started(service: Service) -> None:
    directory = service.home / "elsewhere"
    directory.mkdir()
    (directory / "service.py").write_text(ECHO)
    service.start("--handler", "service:handle", cwd=directory)
    assert re.fullmatch(r"\d+ here\n", service.ask("here"))


def test_it_is_found_beside_the_configuration_file_and_not_where_the_command_was_started(service: Service) -> None:
    directory = service.home / "configured"
    directory.mkdir()
    (directory / "our.toml").write_text('handler = "service:handle"')
    (directory / "service.py").write_text("def handle(text):\n    return 'beside the configuration'")
    service.write_handler("raise RuntimeError('the wrong one')")
    service.start("-c", "configured/our.toml")
    assert re.fullmatch(r"\d+ beside the configuration\n", service.ask("x"))


def test_it_may_be_in_a_package(service: Service) -> None:
    (service.home / "ours" / "deep").mkdir(parents=True)
    (service.home / "ours" / "words.py").write_text("WORD = 'deep down'")
    (service.home / "ours" / "deep" / "service.py").write_text(
        "from ..words import WORD\ndef handle(text):\n    return WORD")
    service.start("--handler", "ours.deep.service:handle")
    assert re.fullmatch(r"\d+ deep down\n", service.ask("x"))


def test_it_may_be_any_function_that_python_finds(service: Service) -> None:
    service.start("--handler", "html:escape")
    assert re.fullmatch(r"\d+ a &lt; b\n", service.ask("a < b"))


def test_its_import_leaves_no_compiled_files_behind(service: Service) -> None:
    service.write_handler(ECHO)
    service.start("--handler", "service:handle")
    assert service.run("--check", "--handler", "service:handle").returncode == 0
    assert not (service.home / "__pycache__").exists()


# ---- Imported once, in the manager, after detaching -----------------------------------


def test_it_is_imported_once_in_the_manager_which_is_detached_by_then(service: Service) -> None:
    service.write_handler(f"""
import os
TABLE = {{"imported by": os.getpid(), "session": os.getsid(0), "directory": os.getcwd()}}
with open({str(service.home / "imports")!r}, "a") as file:
    file.write("imported\\n")

def handle(text):
    return f"{{TABLE['imported by']}} {{TABLE['session']}} {{TABLE['directory']}} {{os.getpid()}}"
""")
    manager = service.start("-w", "3", "-n", "1", "--handler", "service:handle")
    workers = set()
    for _ in range(8):
        told, importer, session, directory, worker = service.ask("x").split()
        assert int(importer) == manager
        assert int(session) == os.getsid(manager) != os.getsid(0)
        assert directory == "/"
        assert told == worker != importer
        workers.add(worker)
    assert len(workers) == 8  # each served one request, and none of them imported anything
    assert (service.home / "imports").read_text() == "imported\n"


def test_a_file_opened_at_import_stays_open_and_is_read_by_every_worker(service: Service) -> None:
    table = service.home / "table.txt"
    table.write_text("one two six ")
    service.write_handler(f"""
import os
TABLE = open({str(table)!r}, "rb")

def handle(text):
    return os.pread(TABLE.fileno(), 3, 4 * int(text)).decode()
""")
    service.start("-w", "2", "-n", "1", "--handler", "service:handle")
    table.unlink()
    assert [service.ask(str(place)).split()[1] for place in (0, 1, 2, 1, 0)] == ["one", "two", "six", "two", "one"]


def test_a_connection_opened_at_import_is_usable_by_the_workers(service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE)
        service.write_handler(f"""
import socket
connection = socket.create_connection(("127.0.0.1", {server.getsockname()[1]}))

def handle(text):
    connection.sendall(text.encode())
    return connection.recv(100).decode()
""")
        service.start("-w", "2", "-n", "1", "--handler", "service:handle")
        peer, _ = server.accept()
        with peer:
            peer.settimeout(DEADLINE)
            for word in ("first", "second", "third"):
                with service.connect() as client:
                    client.sendall(word.encode())
                    client.shutdown(socket.SHUT_WR)
                    assert peer.recv(100) == word.encode()
                    peer.sendall(word.upper().encode())
                    assert client.recv(100).split()[1] == word.upper().encode()


def test_a_large_table_is_in_memory_once_for_all_workers(service: Service) -> None:
    service.write_handler("""
TABLE = {str(number): str(-number) for number in range(300_000)}

def handle(text):
    return TABLE[text]
""")
    manager = service.start("-w", "2", "--handler", "service:handle")
    assert [service.ask(str(number)).split()[1] for number in range(1, 60)] == [str(-n) for n in range(1, 60)]
    table = psutil.Process(manager).memory_full_info().rss
    assert table > 40e6
    for worker in service.workers():
        assert psutil.Process(worker).memory_full_info().uss < table / 4


# ---- A failing import ----------------------------------------------------------------


IMPORT_FAILURES = {
    "missing module": (None, "ModuleNotFoundError: No module named 'service'"),
    "missing function": ("def other(text):\n    return text", "AttributeError: .*handle"),
    "not callable": ("handle = 'text'", "TypeError: handle is not "),
    "syntax error": ("def handle(text)\n    return text", "SyntaxError: .*service.py, line 1"),
    "many lines": ("raise ValueError('first\\nsecond\\x1b[2J')", r"ValueError: first\\nsecond\\x1b\[2J"),
    "exit": ("raise SystemExit('no more')", "SystemExit: no more"),
    "exit without a word": ("import sys; sys.exit()", "SystemExit"),
    "environment": ("import os; os.environ['NO_SUCH_THING']", "KeyError: 'NO_SUCH_THING'"),
    "failure that fails": ("class Mute(Exception):\n    def __str__(self):\n        raise RuntimeError\nraise Mute",
                           "(service[.])?Mute"),
    "failure that exits": ("class Mute(Exception):\n    def __str__(self):\n        raise SystemExit\nraise Mute",
                           "(service[.])?Mute"),
    "missing helper": ("import nohelper_", "ModuleNotFoundError: No module named 'nohelper_'"),
}


@pytest.mark.parametrize("case", IMPORT_FAILURES)
def test_a_failing_import_is_told_in_one_line_and_leaves_nothing(service: Service, case: str) -> None:
    source, why = IMPORT_FAILURES[case]
    if source is not None:
        service.write_handler(source)
    service.expected += ["Manager Failed: ", INDENTED]
    in_foreground = service.foreground("--log-file", "foreground.log", "--handler", "service:handle")
    output, errors = in_foreground.communicate(timeout=50)
    assert (in_foreground.returncode, output) == (1, "")
    started = service.run("-p", str(service.port), "--handler", "service:handle")
    assert (started.returncode, started.stdout) == (1, "")
    assert started.stderr == errors
    assert re.fullmatch(rf"daemontest\.py: cannot load handler service:handle: {why}[^\n]*\n", errors), errors
    assert not service.processes()
    assert not service.pid_file.exists()
    assert service.records("Manager Failed: cannot load handler service:handle: ")  # and its traceback


# ---- What it may do ------------------------------------------------------------------


BAD_BEHAVIOUR = {
    "raises": ("raise LookupError('the secret')", "LookupError: the secret"),
    "raises lines": ("raise LookupError('the secret\\n2026-11-23T10:00:00.123+0900 * 1 Server Terminated.')",
                     "LookupError: the secret"),
    "exits": ("raise SystemExit('the secret')", "SystemExit: the secret"),
    "is interrupted": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "stops": ("raise GeneratorExit", "GeneratorExit"),
    "recurses": ("return handle(text)", "RecursionError: .*"),
    "returns nothing": ("return None", "TypeError: handler returned NoneType, expected str"),
    "returns bytes": ("return b'the secret'", "TypeError: handler returned bytes, expected str"),
    "raises what cannot be formatted": ("raise SyntaxError('x', ('f', 1, 2, 5))", "SyntaxError, which cannot be told"),
    "raises what cannot be followed": ("raise Evil", "Evil, which cannot be told"),
    "returns a surrogate": ("return 'the secret \\udc80'", "UnicodeEncodeError: .*"),
}


EVIL = """
class Evil(Exception):
    @property
    def __cause__(self):
        raise SystemExit

"""


def test_whatever_it_raises_or_returns_the_client_is_told_the_log_says_why_and_the_worker_lives(
        service: Service) -> None:
    cases = "\n".join(f"    if text == {case!r}:\n        {body}" for case, (body, _) in BAD_BEHAVIOUR.items())
    service.write_handler(f"{EVIL}def handle(text):\n{cases}\n    return 'good'")
    service.expected += ["Handler Failed:", INDENTED]
    service.start("-w", "1", "--handler", "service:handle")
    [worker] = service.workers()
    for case, (_, why) in BAD_BEHAVIOUR.items():
        reply = service.ask(case)
        assert re.fullmatch(rf"{worker} error: [^\n]+\n", reply), case
        assert "secret" not in reply
        assert service.ask("x") == f"{worker} good\n", case
        trace = lines_under(service, "Handler Failed:")
        assert any(re.fullmatch(why, line) for line in trace), (case, trace)
    tracebacks = lines_under(service, "Handler Failed:").count("Traceback (most recent call last):")
    assert tracebacks >= len(BAD_BEHAVIOUR) - 2  # those that cannot be told
    assert not service.records("Server Terminated.")
    assert service.workers() == {worker}


def test_its_failures_count_as_requests(service: Service) -> None:
    service.write_handler("def handle(text):\n    raise ValueError")
    service.expected += ["Handler Failed:", INDENTED]
    service.start("-w", "1", "-n", "2", "--handler", "service:handle")
    [worker] = service.workers()
    told = [service.ask("x").split()[0] for _ in range(3)]
    assert told[:2] == [str(worker)] * 2
    assert told[2] != str(worker)


def test_its_reply_may_have_many_lines_or_none_and_be_long(service: Service) -> None:
    service.write_handler("def handle(text):\n    return {'many': 'one\\n\\n three あ\\n', 'none': ''}.get(text, text)")
    service.start("--handler", "service:handle")
    assert re.fullmatch(r"\d+ one\n\n three あ\n\n", service.ask("many"))
    assert re.fullmatch(r"\d+ \n", service.ask("none"))
    long = "平仄\n" * 500_000
    assert service.ask(long).partition(" ")[2] == f"{long}\n"


def test_it_knows_the_process_that_the_client_is_told_of(service: Service) -> None:
    service.write_handler("import os\ndef handle(text):\n    return str(os.getpid())")
    service.start("-w", "2", "-n", "2", "--handler", "service:handle")
    for _ in range(8):
        told, worker = service.ask("x").split()
        assert told == worker


def test_what_it_prints_goes_to_the_log_and_forges_no_record(service: Service) -> None:
    forgery = "2026-11-23T10:00:00.123+0900 * 1 Server Terminated."
    service.write_handler(f"""
import sys
print("imported")

def handle(text):
    print({forgery!r})
    print("two\\nlines\\rone\\x1b[2J", file=sys.stderr)
    print("a lone \\udc80", end="")
    return "printed"
""")
    service.start("-w", "1", "--handler", "service:handle")
    [worker] = service.workers()
    service.ask("x")
    service.stop()
    printed = lines_under(service, "Printed:")
    assert [line for line in printed if line] == ["imported", forgery, "two", r"lines\rone\x1b[2J", r"a lone \\udc80"]
    lines = service.log.split("\n")[:-1]
    assert [line for line in lines if not RECORD.fullmatch(line) and not CONTINUATION.fullmatch(line)] == []
    assert len(service.records("Server Terminated.")) == 1
    by = [int(match["pid"]) for match in service.records("Printed:")]
    assert by[0] != worker
    assert set(by[1:]) == {worker}


@pytest.mark.parametrize("how", [
    "sys.stdout.close()", "sys.stderr.close()", "sys.stdout = None", "del sys.stdout", "sys.stdout = io.StringIO()",
    "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')",
    "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8')",
])
@pytest.mark.parametrize("when", ["at import", "at each request"])
def test_whatever_it_does_to_standard_output_it_may_print_at_the_next_request(
        service: Service, how: str, when: str) -> None:
    body = f"    print('said')\n    {how}\n    return 'done'\n"
    service.write_handler(f"import io, sys\ndef handle(text):\n{body}" if when == "at each request" else
                          f"import io, sys\n{how}\ndef handle(text):\n    print('said')\n    return 'done'\n")
    service.start("-w", "1", "--handler", "service:handle")
    [worker] = service.workers()
    assert [service.ask("x") for _ in range(3)] == [f"{worker} done\n"] * 3
    assert lines_under(service, "Printed:") == ["said"] * 3


def test_it_may_read_its_standard_input_which_is_empty(service: Service) -> None:
    service.write_handler("import sys\ndef handle(text):\n    return repr(sys.stdin.read())")
    service.start("--handler", "service:handle")
    assert re.fullmatch(r"\d+ ''\n", service.ask("x"))


def test_it_may_use_the_alarm_signal(service: Service) -> None:
    service.write_handler("""
import signal, time

class Late(Exception):
    pass

def late(*_):
    raise Late

def handle(text):
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(20)
    except Late:
        return "late"
""")
    service.start("-w", "1", "--handler", "service:handle")
    [worker] = service.workers()
    assert [service.ask("x") for _ in range(2)] == [f"{worker} late\n"] * 2


def test_commands_it_runs_inherit_the_standard_descriptors_and_no_other_and_no_blocked_signal(service: Service) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here to ask")
    service.write_handler("""
import subprocess

def handle(text):
    show = "for n in $(seq 0 30); do [ -e /proc/$$/fd/$n ] && printf '%s ' $n; done; echo;"
    show += "exec grep SigBlk /proc/self/status"
    return subprocess.run(show, shell=True, stdout=subprocess.PIPE, close_fds=False, text=True, check=True).stdout
""")
    service.start("--handler", "service:handle")
    descriptors, blocked, _ = service.ask("x").split("\n", 2)
    assert descriptors.split()[1:] == ["0", "1", "2"]
    assert int(blocked.split(":")[1], 16) == 0


def test_it_may_fork_a_helper_when_it_is_imported(service: Service) -> None:
    service.write_handler("""
import os, signal

HELPER = os.fork()
if HELPER == 0:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.pause()

def handle(text):
    return str(HELPER)
""")
    manager = service.start("-w", "1", "--handler", "service:handle")  # it returns, though the helper lives on
    helper = int(service.ask("x").split()[1])
    os.kill(helper, signal.SIGKILL)
    wait_until(lambda: helper not in service.processes(), "the helper to go")
    assert service.stop().stdout == f"daemontest.py {manager} Server terminated.\n"
    assert not service.records("Child Process Died")


def test_its_module_may_wait_for_commands_that_it_runs_beside_the_workers(service: Service) -> None:
    service.write_handler(f"""
import subprocess, threading, time

def run():
    statuses = []
    for _ in range(5):
        command = subprocess.Popen(["sh", "-c", "sleep 0.02; exit 5"])
        while command.poll() is None:  # while the manager looks after its workers
            time.sleep(0.005)
        statuses.append(command.returncode)
    open({str(service.home / "statuses")!r}, "w").write(f"{{statuses}}\\n")

threading.Thread(target=run).start()

def handle(text):
    return text
""")
    service.start("-w", "2", "-n", "1", "--handler", "service:handle")
    statuses = service.home / "statuses"

    def told() -> bool:
        service.ask("x")
        return statuses.exists() and statuses.read_text().endswith("\n")

    wait_until(told, "the commands")
    assert statuses.read_text() == "[5, 5, 5, 5, 5]\n"


def test_it_may_lock_files_with_lockfile(service: Service) -> None:
    service.write_handler(f"""
import lockfile

def handle(text):
    with lockfile.LockFile({str(service.home / "locked")!r}):
        return "locked"
""")
    service.start("-w", "1", "--handler", "service:handle")
    assert [service.ask("x").split()[1] for _ in range(2)] == ["locked"] * 2


def test_a_default_timeout_that_it_sets_is_not_that_of_its_clients(service: Service) -> None:
    service.write_handler("import socket\nsocket.setdefaulttimeout(0.05)\ndef handle(text):\n    return text")
    service.start("-w", "1", "--handler", "service:handle")
    with service.connect() as client:
        client.sendall(b"neither a newline nor an end")
        assert read_all(client).endswith(b" neither a newline nor an end\n")


def test_a_thread_that_it_starts_at_import_keeps_no_command_from_ending(service: Service) -> None:
    service.write_handler("import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n" + ECHO)
    chosen = ("--handler", "service:handle")
    assert service.run("--check", *chosen).returncode == 0
    assert service.run("--check", "--handler", "service:missing").returncode == 1
    service.start(*chosen)
    assert service.run("--reload", *chosen).returncode == 0
    assert service.stop().returncode == 0
    daemon = service.foreground(*chosen, stderr=subprocess.DEVNULL)
    wait_until(lambda: service.run("--status").returncode == 0, "the start")
    assert service.stop().returncode == 0
    assert daemon.wait(DEADLINE) == 0
    daemon.communicate()


@pytest.mark.parametrize("imported", ["at import", "at each request"])
def test_it_may_use_threads_and_what_is_built_on_them(service: Service, imported: str) -> None:
    imports = "import concurrent.futures, logging, subprocess, threading"
    service.write_handler(f"""
{imports if imported == "at import" else ""}

def handle(text):
    {imports}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        doubled = "".join(pool.map(lambda character: 2 * character, text))
    logging.getLogger().warning("logged")
    told = subprocess.run(["echo", doubled], capture_output=True, text=True, check=True).stdout.strip()
    alone = threading.enumerate() == [threading.current_thread()] == [threading.main_thread()]
    return f"{{told}} {{alone}}"
""")
    service.start("-w", "1", "-n", "2", "--handler", "service:handle")
    assert [service.ask("abc").split()[1:] for _ in range(3)] == [["aabbcc", "True"]] * 3
    assert lines_under(service, "Printed:") == ["logged"] * 3


def test_what_it_does_to_signals_at_import_deafens_nobody(service: Service) -> None:
    service.write_handler("""
import signal
for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
    signal.signal(signum, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
""" + ECHO)
    service.start("-w", "1", "-n", "1", "--handler", "service:handle")
    assert len({service.ask("x").split()[0] for _ in range(5)}) == 5
    workers = wait_until(lambda: service.workers() if len(service.workers()) == 1 else None, "the sixth worker alone")
    os.kill(service.manager(), signal.SIGHUP)
    service.wait_for_new_workers(workers)
    assert service.stop().returncode == 0
    assert service.records()[-1]["message"] == "Server Terminated."
    assert not service.pid_file.exists()


def test_a_process_that_it_forks_can_be_terminated_and_delays_no_reply(service: Service) -> None:
    service.write_handler("""
import multiprocessing, os, time

context = multiprocessing.get_context("fork")

def work(begun):
    begun.set()
    time.sleep(600)

def handle(text):
    begun = context.Event()
    process = context.Process(target=work, args=(begun,))
    process.start()
    begun.wait()
    if text == "terminate":
        process.terminate()
        process.join()
        return "terminated"
    return str(process.pid)
""")
    service.start("-w", "1", "--handler", "service:handle")
    assert service.ask("terminate").endswith(" terminated\n")
    left = int(service.ask("leave").split()[1])  # it has the connection open, and yet this reply has come to its end
    assert left in service.processes()
    os.kill(left, signal.SIGKILL)


def test_what_it_prints_at_import_comes_before_the_outcome_of_a_check_and_is_logged_if_a_start_fails(
        service: Service) -> None:
    service.env.pop("PYTHONUNBUFFERED", None)
    service.expected += ["Manager Failed", "Traceback", INDENTED]
    service.write_handler("print('imported', end='')\n" + ECHO)
    checked = service.run("--check", "--handler", "service:handle")
    assert (checked.returncode, checked.stdout) == (0, "importeddaemontest.py: configuration is good\n")
    service.write_handler("print('imported', end='')\nraise RuntimeError")
    assert service.run("-p", str(service.port), "--handler", "service:handle").returncode == 1
    assert lines_under(service, "Printed:") == ["imported"]
