"""A handler may do what a Python program may: raise, print, hang, fork, keep things for later. No client suffers."""

import gzip
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
from conftest import CONTINUATION, RECORD, Service, alive, read_all, wait_until

FAILED = ["Handler Failed:", "^    "]  # and the lines of tracebacks
KILLED = r"Child Process Killed\. \(still running after the grace\)"

# A handler that runs its text as Python; what the text calls `reply` is the reply.
RUNS = """
import asyncio, atexit, functools, gzip, io, multiprocessing, os, re, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FORK = multiprocessing.get_context("fork")
kept = []

@functools.cache
def pool():
    return ProcessPoolExecutor(2, mp_context=FORK)

def note(line, file="noted"):
    with open(HERE / file, "a") as noted:
        noted.write(line + "\\n")

def live_on():
    note(f"{os.getpid()} {os.getppid()}", "forks")
    time.sleep(60)
    os._exit(0)

def handle(text):
    scope = {**globals(), "reply": "done"}
    exec(text, scope)
    return scope["reply"]
"""
HANDLER = ("--handler", "service:handle")


def start(service: Service, *arguments: str, module: str = "") -> int:
    """Start with the handler above and MODULE's code, which is run at its import; the PID of a worker."""
    service.write_handler(RUNS + module)
    service.start(*HANDLER, *arguments)
    return min(service.workers())


def start_one(service: Service, *arguments: str, module: str = "") -> int:
    return start(service, "-w", "1", *arguments, module=module)


def noted(service: Service, file: str = "noted") -> list[str]:
    path = service.home / file
    return path.read_text().split("\n")[:-1] if path.exists() else []


# ---- What it raises or returns --------------------------------------------------------

FAILURES = {
    "raise LookupError('the\\n2026-11-23T10:00:00.123+0900 * 1 secret')": "LookupError: the",
    "raise SystemExit('the secret')": "SystemExit: the secret",
    "raise GeneratorExit": "GeneratorExit",
    "def f(): f()\nf()": "RecursionError: .*",
    "reply = None": "TypeError: .*NoneType.*",
    "reply = 'the secret \\udc80'": "UnicodeEncodeError: .*",
    "class Evil(Exception):\n    __cause__ = property(lambda self: sys.exit())\nraise Evil": ".*Evil.*",
}


def test_a_failure_is_told_to_the_client_and_logged_and_the_worker_lives(service: Service) -> None:
    service.expected += FAILED
    worker = start_one(service)
    for text, why in FAILURES.items():
        assert service.ask(text) == f"{worker} error: handler failed\n", text
        traceback = re.findall(r"Handler Failed:\n((?:    .*\n)+)", service.log)[-1]
        assert re.search(f"^    {why}$", traceback, re.MULTILINE), traceback
    assert service.ask("") == f"{worker} done\n"
    assert len(service.records("Handler Failed:")) == len(FAILURES)


def test_a_reply_may_be_any_text(service: Service) -> None:
    worker = start_one(service)
    for reply in ("one\n\n three あ\n", "", "2 error: only quoted", "平仄\n" * 100_000):
        assert service.ask(f"reply = {reply!r}") == f"{worker} {reply}\n"


# ---- What it shares -------------------------------------------------------------------

def test_workers_share_what_the_module_has_made(service: Service) -> None:
    (service.home / "table").write_text("one two six")
    start(service, "-w", "2", "-n", "2", module="TABLE = open(HERE / 'table', 'rb')\nnote(f'{os.getpid()}')\n")
    text = "reply = os.pread(TABLE.fileno(), 3, 4).decode()"
    seen = {worker for worker, word in (service.ask(text).split() for _ in range(8)) if word == "two"}
    assert len(seen) > 2
    assert noted(service) == [f"{service.generation()}"]


def test_a_table_is_in_memory_once_for_all_workers(service: Service) -> None:
    start(service, "-w", "4", module="TABLE = bytes(range(250)) * 400_000\n")
    for worker in service.workers():
        assert psutil.Process(worker).memory_full_info().uss < 25_000_000  # of 100 MB


# ---- What it prints -------------------------------------------------------------------

PRINTS = {
    "print('two\\nlines\\rone\\x1b[2J', file=sys.stderr)": ["two", "lines\rone\x1b[2J"],
    "print('a lone \\udc80')": [r"a lone \udc80"],
    "print('no newline', end='')": ["no newline"],
    "for piece in ('p', 'ie', 'ces\\nand ', 'a', ' half'): sys.stdout.write(piece)": ["pieces", "and a half"],
    "print('out', flush=True); print('err', file=sys.stderr)": ["out", "err"],
    "os.write(1, b'by the descriptor\\n')": ["by the descriptor"],
    "print('long ' * 100_000)": ["long " * 100_000],
    "for number in range(1000): print(f'line {number}')": [f"line {number}" for number in range(1000)],
    "for _ in range(80_000): print('.', end='')": ["." * 80_000],  # quickly
}


def printed(service: Service) -> list[str]:
    """The lines that are neither records nor belong to one."""
    lines = service.log_file.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    return [line for line in lines if not RECORD.fullmatch(line) and not CONTINUATION.fullmatch(line)]


def test_prints_are_in_the_log_line_by_line(service: Service) -> None:
    start(service, "-w", "1", module="print('imported')\nprint('without a newline', end='')\n")
    expected = ["imported", "without a newline"]
    assert printed(service) == expected
    for text, lines in PRINTS.items():
        assert service.ask(text).endswith(" done\n")
        expected += lines
    service.stop()
    assert printed(service) == expected


SPOILT = ["sys.stdout.close()", "sys.stdout = None", "del sys.stdout", "sys.stdout = io.StringIO()",
          "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8')"]


def test_the_next_request_may_print_whatever_one_did_to_standard_output(service: Service) -> None:
    worker = start_one(service)
    for how in SPOILT:
        assert [service.ask(f"print('said')\n{how}") for _ in range(2)] == [f"{worker} done\n"] * 2, how
    service.stop()
    assert printed(service) == ["said"] * 2 * len(SPOILT)


# ---- It hangs -------------------------------------------------------------------------

HANGS = {
    "sleeps": "time.sleep(100)",
    "searches": "re.match('(a+)+$', 40 * 'a' + 'b')",
    "swallows": "while True:\n    try:\n        time.sleep(100)\n    except BaseException:\n        pass",
}


def test_a_hung_handler_is_killed_at_its_time_and_the_log_shows_where_it_hung(service: Service) -> None:
    service.expected.append("Child Process Killed")
    start_one(service, "--handler-timeout", "0.5")
    line = (service.home / "service.py").read_text().split("\n").index("    exec(text, scope)") + 1
    for code in HANGS.values():  # one after another, so that their stacks do not mix
        began = time.monotonic()
        assert service.ask(code) == "", code
        assert 0.4 < time.monotonic() - began < 10
    assert service.ask("").endswith(" done\n")
    killed = service.records("Child Process Killed")
    assert {match["message"] for match in killed} == {"Child Process Killed. (handler ran longer than 0.5 s)"}
    asked = [match["pid"] for match in service.records("Client: .* Received Text:")]
    assert [match["pid"] for match in killed] == asked[:-1]
    assert len(re.findall(r"\(most recent call first\):\n(?:  File .*\n)*"
                          rf'  File "{service.home}/service\.py", line {line} in handle\n', service.log)) == 3


# ---- It uses what a program may use ---------------------------------------------------

def test_standard_input_is_empty_and_commands_find_what_a_shell_gives(service: Service) -> None:
    start(service)
    show = "for n in $(seq 0 30); do [ -e /proc/$$/fd/$n ] && echo -n $n,; done; grep Sig[BI] /proc/self/status"
    reply = service.ask(f"shown = subprocess.run({show!r}, shell=True, stdout=-1, close_fds=False, text=True).stdout\n"
                        "reply = repr(sys.stdin.read()) + ' ' + shown")
    _, read, descriptors, blocked, _, ignored = reply.split()  # echo -n leaves SigBlk: on its line
    assert (read, descriptors, blocked) == ("''", "0,1,2,SigBlk:", 16 * "0")
    assert int(ignored, 16) & ~(3 << 31) == 0  # 32 and 33 are glibc's own


def test_it_may_use_threads_and_logging(service: Service) -> None:
    start_one(service)
    text = ("with ThreadPoolExecutor(2) as threads: reply = ''.join(threads.map(lambda c: 2 * c, 'abc'))\n"
            "import logging; logging.getLogger().warning('logged')")
    assert [service.ask(text).split()[1] for _ in range(3)] == ["aabbcc"] * 3
    assert printed(service) == ["logged"] * 3


@pytest.mark.parametrize("text", [
    "asyncio.run(add())\nraise ValueError", "signal.set_wakeup_fd(-1)"], ids=["asyncio", "wake-up descriptor"])
def test_a_worker_hears_term_whatever_the_handler_did_to_signals(service: Service, text: str) -> None:
    service.expected += FAILED
    module = "async def add():\n    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print)\n"
    worker = start_one(service, module=module)
    assert service.ask(text).startswith(f"{worker} ")
    os.kill(worker, signal.SIGTERM)
    service.wait_for_records("Child Process Ended")
    assert service.ask("").endswith(" done\n")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_worker_that_gives_up_root_ends_in_good_order(service: Service) -> None:
    worker = start_one(service, "-n", "2")
    assert service.ask("os.setgroups([]); os.setgid(65534); os.setuid(65534)") == f"{worker} done\n"
    assert service.ask("reply = str(os.getuid())") == f"{worker} 65534\n"
    assert service.ask("reply = str(os.getuid())").endswith(" 0\n")
    [ended] = service.wait_for_records("Child Process (Ended|Died|Killed)")
    assert (ended["message"], int(ended["pid"])) == ("Child Process Ended. (0)", worker)


@pytest.mark.parametrize(("limit", "record"), [("3", "Cannot Accept"), ("os.dup(0)", "Cannot Pass On")])
def test_worker_out_of_descriptors_says_so_and_is_replaced(service: Service, limit: str, record: str) -> None:
    service.expected += [record, r"Died\. \(exit status 0\)"]
    worker = start_one(service)
    service.ask(f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, 99))")
    with service.connect() as client:
        client.sendall(b"#" * 4000)  # which takes a descriptor more
        service.wait_for_records(f"{record}: Too many open files")
        service.wait_for_new_workers({worker})
    assert service.ask("").endswith(" done\n")


# ---- It forks -------------------------------------------------------------------------

FORKS = {
    "os.setsid": "os.fork() or (os.setsid(), live_on())",  # no signal to the worker's process group reaches it
    "multiprocessing": "FORK.Process(target=live_on).start()",
    "concurrent.futures": "pool().submit(live_on)",
}


def made(service: Service) -> dict[int, int]:
    """The PIDs of the forks that the handler has made, and of their parents."""
    return {int(fork): int(parent) for fork, parent in map(str.split, noted(service, "forks"))}


def wait_for_forks(service: Service, count: int) -> dict[int, int]:
    wait_until(lambda: len(made(service)) >= count, f"{count} forks")
    return made(service)


@pytest.fixture
def forks(service: Service) -> Iterator[None]:
    """Forks of the handler's that live on, and end with the test."""
    yield
    for fork in made(service).keys() & service.processes():
        os.kill(fork, signal.SIGKILL)


@pytest.mark.parametrize("half_close", [True, False], ids=["half-close", "open side"])
def test_a_fork_keeps_no_client_of_an_answered_text_waiting(service: Service, forks: None, half_close: bool) -> None:
    service.expected.append(KILLED)
    worker = start_one(service, "--timeout", "60", "--grace", "1")
    for number, code in enumerate(FORKS.values(), 1):
        with service.begin(f"{code}\n".encode(), half_close) as client:
            assert read_all(client) == f"{worker} done\n".encode()
        wait_for_forks(service, number)
    assert all(map(alive, made(service)))


def test_a_fork_keeps_no_client_of_a_killed_worker_waiting(service: Service, forks: None) -> None:
    service.expected.append("Child Process Died")
    start(service, "-w", "3")
    clients = [service.begin(f"{code}\ntime.sleep(60)".encode()) for code in FORKS.values()]
    workers = wait_for_forks(service, 3).values()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    for client in clients:
        with client, suppress(ConnectionResetError):
            assert read_all(client) == b""
    assert any(map(alive, made(service)))
    died = service.wait_for_records("Child Process Died", 3)
    assert {int(match["pid"]) for match in died} == {*workers}
    assert service.ask("").endswith(" done\n")


@pytest.mark.parametrize("end", ["stop", "kill -9"])
@pytest.mark.parametrize("where", ["handler", "module"])
def test_a_fork_holds_neither_port_nor_lock(service: Service, forks: None, end: str, where: str) -> None:
    service.expected.append(KILLED)
    module = "if not os.fork():\n    os.setsid()\n    live_on()\n" if where == "module" else ""
    start(service, "-w", "2", "--grace", "0.5", module=module)
    for number, code in enumerate([""] if module else FORKS.values(), 1):
        assert service.ask(code).endswith(" done\n")
        wait_for_forks(service, number)
    served = service.generations() | service.workers() | {service.keeper()}
    if end == "stop":
        assert service.stop().returncode == 0
    else:
        os.kill(service.manager(), signal.SIGKILL)
        wait_until(lambda: not any(map(alive, served - made(service).keys())), "the service to go")
    assert any(map(alive, made(service)))
    assert service.run("--status").returncode == 3
    service.start("-w", "1")
    assert service.ask("x").endswith(" your text size: 1\n")


@pytest.mark.parametrize(("leave", "status"), [("reply = 'not sent'", 0), ("raise LookupError", 0), ("sys.exit(3)", 3)])
def test_a_fork_that_leaves_the_handler_ends_there(service: Service, forks: None, leave: str, status: int) -> None:
    service.expected += FAILED if "raise" in leave else []
    worker = start_one(service, "-n", "3")
    text = (f"if not (fork := os.fork()):\n    note(f'{{os.getpid()}} 0', 'forks')\n    {leave}\n"
            "else:\n    reply = f'{os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])}'")
    for _ in range(2):
        assert service.ask(text) == f"{worker} {status}\n"
    assert len(made(service)) == 2
    assert service.ask("") == f"{worker} done\n"
    assert service.ask("").endswith(" done\n")
    wait_until(lambda: not alive(worker), "the worker to end")
    assert [int(match["pid"]) for match in service.records("Child Process Ended")] == [worker]


# ---- It keeps things for later --------------------------------------------------------

MODULE = """
FILE = open(HERE / "noted", "a")

def note_later(line):
    time.sleep(0.5)
    note(line)

atexit.register(lambda: (note(f"{os.getpid()} exit"), print(f"exit of {os.getpid()}")))
"""
KEEPS = {
    "file opened at import": "FILE.write(line + '\\n')",
    "file": "kept.append(open(HERE / 'noted', 'a')); kept[0].write(line + '\\n')",
    "compressed file": "kept.append(gzip.open(HERE / 'compressed', 'wt')); kept[-1].write(line)",
    "atexit": "atexit.register(note, line)",
    "thread": "threading.Thread(target=note_later, args=[line]).start()",
    "pool": "pool().submit(note_later, line)",
}
ENDLESS = {
    "thread": "threading.Thread(target=time.sleep, args=[100]).start()",
    "atexit": "atexit.register(lambda: (signal.signal(signal.SIGALRM, signal.SIG_IGN), time.sleep(100)))",
    "pool": "pool().submit(time.sleep, 100)",
}


def leave(service: Service, worker: int, how: str) -> None:
    """Have WORKER end."""
    if how in ("--reload", "-t"):
        assert service.run(how).returncode == 0
        assert not alive(worker)  # who waits for the command may read what was kept
    elif how == "recycle":  # it has had its requests
        assert service.ask("").endswith(" done\n")
    else:
        os.kill(*((worker, signal.SIGTERM) if how == "TERM" else (service.manager(), signal.SIGKILL)))
    wait_until(lambda: not alive(worker), "the worker to end")


@pytest.mark.parametrize("how", ["recycle", "--reload", "-t", "TERM", "kill -9"])
def test_a_worker_ends_as_a_program_does(service: Service, how: str) -> None:
    worker = start_one(service, "-n", str(len(KEEPS)) if how == "recycle" else "100", module=MODULE)
    for what, code in KEEPS.items():
        assert service.ask(f"line = f'{{os.getpid()}} {what}'\n{code}") == f"{worker} done\n"
    leave(service, worker, how)
    ours = [line for line in noted(service) if line.startswith(f"{worker} ")]
    with gzip.open(service.home / "compressed", "rt") as file:
        ours.append(file.read())
    assert sorted(ours) == sorted(f"{worker} {what}" for what in [*KEEPS, "exit"])
    assert f"\nexit of {worker}\n" in service.log  # what is printed then is not lost either
    if how == "-t":
        assert not service.processes()  # of pools neither
    elif how == "kill -9":
        wait_until(lambda: not service.processes(), "all processes to go")


def test_exit_functions_run_in_idle_workers_and_the_generation_alone(service: Service) -> None:
    start(service, "-w", "3", module=MODULE)
    expected = {f"{pid} exit" for pid in {service.generation(), *service.workers()}}
    service.stop()
    assert sorted(noted(service)) == sorted(expected)


@pytest.mark.parametrize("what, how", [("pool", "-t"), ("thread", "--reload"), ("atexit", "-t"), ("atexit", "TERM")])
def test_an_endless_end_is_killed_after_the_grace(service: Service, what: str, how: str) -> None:
    service.expected.append(KILLED)
    worker = start_one(service, "--grace", "0.6")
    assert service.ask(ENDLESS[what]) == f"{worker} done\n"
    began = time.monotonic()
    leave(service, worker, how)
    assert 0.5 < time.monotonic() - began < 15  # half of the default grace
    [record] = service.wait_for_records("Child Process Killed")
    assert (record["message"], int(record["pid"])) == (KILLED.replace("\\", ""), worker)


def test_a_modules_helpers_outlive_workers_and_end_with_the_generation(service: Service) -> None:
    module = ("import tempfile\nDIRECTORY = tempfile.TemporaryDirectory(dir=HERE)\n"
              "HELPER = FORK.Process(target=time.sleep, args=[100], daemon=True)\nHELPER.start()\n")
    start(service, "-w", "1", "-n", "1", module=module)
    worker, helper, directory = service.ask("reply = f'{HELPER.pid} {DIRECTORY.name}'").split()
    assert service.ask("").endswith(" done\n")
    wait_until(lambda: not alive(int(worker)), "the worker to end")
    assert alive(int(helper))
    assert os.path.isdir(directory)
    assert service.stop().returncode == 0
    assert not os.path.exists(directory)


def test_a_modules_thread_that_reads_does_not_hold_up_the_end_of_a_worker(service: Service) -> None:
    """At the fork it holds the lock of the file it reads, and no worker has the thread that would release it."""
    module = ("PIPE = subprocess.Popen(['cat'], stdin=-1, stdout=-1, text=True).stdout\n"
              "threading.Thread(target=lambda: [*PIPE], daemon=True).start()\ntime.sleep(0.2)\n")
    worker = start_one(service, "--grace", "25", module=module)
    began = time.monotonic()
    leave(service, worker, "-t")
    assert time.monotonic() - began < 10


def test_a_modules_endless_thread_keeps_no_command_from_ending(service: Service) -> None:
    module = "threading.Thread(target=time.sleep, args=[600]).start()\n"
    began = time.monotonic()
    worker = start_one(service, module=module)
    assert service.run("--check", *HANDLER).returncode == 0
    assert service.run("--check", "--handler", "service:missing").returncode == 1
    leave(service, worker, "--reload")
    assert service.stop().returncode == 0
    assert time.monotonic() - began < 20  # of the grace of 30 s
