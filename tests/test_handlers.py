"""A handler may do what a Python program may: raise, print, hang, fork, keep things for later. No client suffers."""

import gzip
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from conftest import CONTINUATION, DEADLINE, RECORD, Service, alive, read_all, wait_until

INDENTED = "^    "  # the lines of texts and tracebacks
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


def start(service: Service, *arguments: str, module: str = "", **options: object) -> int:
    """Start with the handler above and MODULE's code, which is run at its import; the manager's PID."""
    service.write_handler(RUNS + module)
    return service.start(*HANDLER, *arguments, **options)


def start_one(service: Service, *arguments: str, module: str = "", **options: object) -> int:
    """The same with one worker; its PID."""
    start(service, "-w", "1", *arguments, module=module, **options)
    [worker] = service.workers()
    return worker


def noted(service: Service, file: str = "noted") -> list[str]:
    path = service.home / file
    return path.read_text().split("\n")[:-1] if path.exists() else []


def everything(service: Service) -> set[int]:
    """Every living process that comes of this service, whatever it runs by now."""
    found = set()
    for process in psutil.process_iter():
        try:
            if service.env.items() <= process.environ().items() and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


# ---- What it raises or returns --------------------------------------------------------

FAILURES = {
    "raise LookupError('the secret')": "LookupError: the secret",
    "raise LookupError('the\\n2026-11-23T10:00:00.123+0900 * 1 secret')": "LookupError: the",
    "raise SystemExit('the secret')": "SystemExit: the secret",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "raise GeneratorExit": "GeneratorExit",
    "def f(): f()\nf()": "RecursionError: .*",
    "reply = None": "TypeError: .*NoneType.*",
    "reply = b'the secret'": "TypeError: .*bytes.*",
    "reply = 'the secret \\udc80'": "UnicodeEncodeError: .*",
    "raise SyntaxError('x', ('f', 1, 2, 5))": ".*SyntaxError.*",  # some releases of Python cannot format it
    "class Evil(Exception):\n    __cause__ = property(lambda self: sys.exit())\nraise Evil": ".*Evil.*",
}


def tracebacks(service: Service) -> list[list[str]]:
    """The lines, without their indentation, under each record of a handler that failed."""
    found: list[list[str]] = []
    within = False
    for line in service.log.split("\n"):
        if match := RECORD.fullmatch(line):
            within = match["message"] == "Handler Failed:"
            if within:
                found.append([])
        elif within and line:
            found[-1].append(line[4:])
    return found


def test_a_failure_is_told_to_the_client_and_logged_and_the_worker_lives(service: Service) -> None:
    service.expected += ["Handler Failed:", INDENTED]
    worker = start_one(service)
    for number, (text, why) in enumerate(FAILURES.items(), 1):
        assert service.ask(text) == f"{worker} error: handler failed\n", text
        assert service.ask("") == f"{worker} done\n", text
        assert len(tracebacks(service)) == number
        assert any(re.fullmatch(why, line) for line in tracebacks(service)[-1]), (text, tracebacks(service)[-1])
    assert not [match for match in service.records() if match["pid"] == "1"]
    assert service.workers() == {worker}


def test_a_reply_may_be_any_text(service: Service) -> None:
    worker = start_one(service)
    for reply in ("one\n\n three あ\n", "", "2 error: only quoted", "平仄\n" * 100_000):
        assert service.ask(f"reply = {reply!r}") == f"{worker} {reply}\n"


def test_a_handler_refuses_a_text_by_returning_an_error(service: Service) -> None:
    worker = start_one(service)
    done = service.client("reply = 'error: no poem'")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == f"testclient.py: refused: {worker} error: no poem\n"
    assert not service.records("Handler Failed")


# ---- What it shares -------------------------------------------------------------------


def test_workers_share_what_the_module_has_made(service: Service) -> None:
    (service.home / "table").write_text("one two six")
    module = "IMPORTER = os.getpid()\nTABLE = open(HERE / 'table', 'rb')\nnote('imported')\n" \
             "OURS, THEIRS = socket.socketpair()\n"
    start(service, "-w", "2", "-n", "2", module=module)
    seen = set()
    for _ in range(8):
        worker, told, importer, word, echo = service.ask(
            "OURS.send(b'echo')\nreply = ' '.join(map(str, ["
            "os.getpid(), IMPORTER, os.pread(TABLE.fileno(), 3, 4).decode(), THEIRS.recv(9).decode()]))").split()
        assert (told, int(importer), word, echo) == (worker, service.generation(), "two", "echo")
        seen.add(worker)
    assert len(seen) > 2
    assert noted(service) == ["imported"]


def test_a_table_is_in_memory_once_for_all_workers(service: Service) -> None:
    size = 100_000_000
    start(service, "-w", "4", module=f"TABLE = bytes(range(250)) * {size // 250}\n")
    for worker in service.workers():
        unique = psutil.Process(worker).memory_full_info().uss
        assert unique < size / 4, unique


# ---- What it prints -------------------------------------------------------------------

FORGED = "2026-11-23T10:00:00.123+0900 * 1 Server Terminated."
PRINTS = {
    "print('two\\nlines\\rone\\x1b[2J', file=sys.stderr)": ["two", "lines\rone\x1b[2J"],
    "print('a lone \\udc80')": [r"a lone \udc80"],
    "print('no newline', end='')": ["no newline"],
    "for piece in ('p', 'ie', 'ces\\nand ', 'a', ' half'): sys.stdout.write(piece)": ["pieces", "and a half"],
    "print('out'); print('err', file=sys.stderr)": ["out", "err"],
    "print('flushed', flush=True); sys.stdout.flush(); sys.stderr.flush()": ["flushed"],
    "os.write(1, b'by the descriptor\\n')": ["by the descriptor"],
    "print('long ' * 100_000)": ["long " * 100_000],
    "for number in range(1000): print(f'line {number}')": [f"line {number}" for number in range(1000)],
    "print(end='')": [],
}


def log_lines(service: Service) -> list[str]:
    """The lines of the log, in which only a newline ends one."""
    text = service.log_file.read_bytes().decode()
    assert text.endswith("\n")
    return text.split("\n")[:-1]


def printed(service: Service) -> list[str]:
    """The lines that are neither records nor belong to one."""
    return [line for line in log_lines(service) if not RECORD.fullmatch(line) and not CONTINUATION.fullmatch(line)]


def test_prints_are_in_the_log_line_by_line(service: Service) -> None:
    start(service, "-w", "1", module="print('imported')\nprint('without a newline', end='')\n")
    expected = ["imported", "without a newline"]
    assert printed(service) == expected
    for text, lines in PRINTS.items():
        assert service.ask(text).endswith(" done\n")
        expected += lines
    service.ask(f"print('{FORGED}')")  # no guard is put around it
    service.stop()
    assert printed(service) == expected
    assert FORGED in log_lines(service)


def test_80000_dots_are_printed_quickly(service: Service) -> None:
    start(service, "-w", "1")
    reply = service.ask("began = time.process_time()\nfor _ in range(80_000): print('.', end='')\n"
                        "reply = str(time.process_time() - began)", timeout=50)
    assert float(reply.split()[1]) < 3  # s; 0.2 in plain Python, 28 where each looks at all before it
    service.stop()
    assert printed(service) == ["." * 80_000]


def test_a_print_never_fails_on_a_full_disk(service: Service) -> None:
    start(service, "-w", "1", "--log-file", "/dev/full")
    for text in [*PRINTS, *PRINTS]:
        if "os.write" not in text:  # which is no print
            assert service.ask(text).endswith(" done\n"), text


SPOILT = ["sys.stdout.close()", "sys.stderr.close()", "sys.stdout = None", "del sys.stdout",
          "sys.stdout = io.StringIO()",
          "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8')", "sys.stdout.buffer.close()"]


def test_the_next_request_may_print_whatever_one_did_to_standard_output(service: Service) -> None:
    worker = start_one(service)
    for how in SPOILT:
        assert [service.ask(f"print('said')\n{how}") for _ in range(2)] == [f"{worker} done\n"] * 2, how
    service.stop()
    assert printed(service) == ["said"] * 2 * len(SPOILT)


def test_prints_at_import_come_before_the_outcome(service: Service) -> None:
    service.expected += ["Failed", "Handler Not Loaded", "Traceback", INDENTED]
    service.env.pop("PYTHONUNBUFFERED", None)
    service.write_handler("print('imported', end='')\ndef handle(text):\n    return text")
    checked = service.run("--check", *HANDLER)
    assert (checked.returncode, checked.stdout) == (0, "importeddaemontest.py: configuration is good\n")
    service.write_handler("print('imported', end='')\nraise RuntimeError")
    assert service.run("-p", str(service.port), *HANDLER).returncode == 1
    assert printed(service) == ["imported"]


# ---- It hangs -------------------------------------------------------------------------

HANGS = {
    "sleeps": "time.sleep(100)",
    "loops": "while True: pass",
    "searches": "re.match('(a+)+$', 40 * 'a' + 'b')",
    "swallows": "while True:\n    try:\n        time.sleep(100)\n    except BaseException:\n        pass",
}


@pytest.mark.parametrize("how", HANGS)
def test_a_hung_handler_is_killed_at_its_time_and_the_log_shows_where_it_hung(service: Service, how: str) -> None:
    service.expected.append("Child Process Killed")
    worker = start_one(service, "--handler-timeout", "1.5")
    line = (service.home / "service.py").read_text().split("\n").index("    exec(text, scope)") + 1
    began = time.monotonic()
    assert service.ask(HANGS[how]) == ""
    assert 1 < time.monotonic() - began < 10
    assert service.ask("").endswith(" done\n")
    [record] = service.records("Child Process Killed")
    assert record["message"] == "Child Process Killed. (handler ran longer than 1.5 s)"
    assert int(record["pid"]) == worker
    assert re.search(r"\(most recent call first\):\n(  File .*\n)*"
                     rf'  File "{service.home}/service\.py", line {line} in handle\n', service.log)


# ---- It uses what a program may use ---------------------------------------------------


def test_standard_input_is_empty(service: Service) -> None:
    assert start_one(service)
    assert service.ask("reply = repr(sys.stdin.read())").endswith(" ''\n")


def test_commands_find_descriptors_and_signals_as_from_a_shell(service: Service) -> None:
    start(service)
    show = "for n in $(seq 0 30); do [ -e /proc/$$/fd/$n ] && echo -n $n,; done; grep Sig[BI] /proc/self/status"
    reply = service.ask(f"reply = subprocess.run({show!r}, shell=True, stdout=-1, close_fds=False, text=True).stdout")
    _, descriptors, blocked, _, ignored = reply.split()
    assert (descriptors, blocked) == ("0,1,2,SigBlk:", 16 * "0")
    assert int(ignored, 16) & ~(3 << 31) == 0  # 32 and 33 are glibc's own


def test_it_may_use_threads_and_logging(service: Service) -> None:
    start(service, "-w", "1", "-n", "2")
    text = ("with ThreadPoolExecutor(2) as threads: doubled = ''.join(threads.map(lambda c: 2 * c, 'abc'))\n"
            "import logging; logging.getLogger().warning('logged')\n"
            "reply = f'{doubled} {threading.enumerate() == [threading.main_thread()]}'")
    assert [service.ask(text).split()[1:] for _ in range(3)] == [["aabbcc", "True"]] * 3
    assert printed(service) == ["logged"] * 3


@pytest.mark.parametrize("text", [
    "asyncio.run(add())", "asyncio.run(add())\nraise ValueError", "signal.set_wakeup_fd(-1)"],
    ids=["asyncio", "asyncio, fails", "wake-up descriptor"])
def test_a_worker_hears_term_whatever_the_handler_did_to_signals(service: Service, text: str) -> None:
    service.expected += ["Handler Failed", INDENTED]
    module = "async def add():\n    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print)\n"
    worker = start_one(service, module=module)
    assert service.ask(text).startswith(f"{worker} ")
    os.kill(worker, signal.SIGTERM)
    wait_until(lambda: not alive(worker), "the worker to end")
    assert service.ask("").endswith(" done\n")
    assert service.records("Child Process Ended")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_worker_that_gives_up_root_ends_in_good_order(service: Service) -> None:
    worker = start_one(service, "-n", "2")
    assert service.ask("os.setgroups([]); os.setgid(65534); os.setuid(65534)") == f"{worker} done\n"
    assert service.ask("reply = str(os.getuid())") == f"{worker} 65534\n"
    assert service.ask("reply = str(os.getuid())").endswith(" 0\n")
    ended = service.wait_for_records("Child Process (Ended|Died|Killed)")
    assert [(match["message"], int(match["pid"])) for match in ended] == [("Child Process Ended. (0)", worker)]
    wait_until(lambda: not alive(worker), "the worker to end")


# ---- It forks -------------------------------------------------------------------------

FORKS = {
    "os.fork": "os.fork() or live_on()",
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


def assert_free(service: Service) -> None:
    """Neither the port nor the lock is held: another service starts."""
    with socket.create_server(("::", service.port), family=socket.AF_INET6, dualstack_ipv6=True):
        pass
    assert service.run("--status").returncode == 3
    service.start("-w", "1")
    assert service.ask("x").endswith(" your text size: 1\n")


@pytest.mark.parametrize("half_close", [True, False], ids=["half-close", "open side"])
def test_a_fork_keeps_no_client_of_an_answered_text_waiting(service: Service, forks: None, half_close: bool) -> None:
    service.expected.append(KILLED)
    worker = start_one(service, "--timeout", "60", "--grace", "1")
    for number, code in enumerate(FORKS.values(), 1):
        with service.connect() as client:
            client.sendall(f"{code}\n".encode())
            if half_close:
                client.shutdown(socket.SHUT_WR)
            assert read_all(client) == f"{worker} done\n".encode()
        wait_for_forks(service, number)
    assert all(map(alive, made(service)))


@pytest.mark.parametrize("death", ["handler timeout", "SIGKILL"])
def test_a_fork_keeps_no_client_of_a_dead_worker_waiting(service: Service, forks: None, death: str) -> None:
    service.expected.append(r"Child Process (Died|Killed)")
    start(service, "-w", "4", "--handler-timeout", "2" if death == "handler timeout" else "50")

    def ask(code: str) -> bytes:
        with service.connect() as client:
            client.sendall(f"{code}\ntime.sleep(60)".encode())
            client.shutdown(socket.SHUT_WR)
            try:
                return read_all(client)
            except ConnectionResetError:
                return b""

    with ThreadPoolExecutor() as threads:
        replies = [threads.submit(ask, code) for code in FORKS.values()]
        workers = wait_for_forks(service, 4).values()
        if death == "SIGKILL":
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        assert [reply.result() for reply in replies] == [b""] * 4
    assert any(map(alive, made(service)))
    died = service.wait_for_records("Child Process (Died|Killed)", 4)
    assert {int(match["pid"]) for match in died} == {*workers}
    assert service.ask("").endswith(" done\n")


@pytest.mark.parametrize("end", ["stop", "kill -9"])
@pytest.mark.parametrize("where", ["handler", "module"])
def test_a_fork_holds_neither_port_nor_lock(service: Service, forks: None, end: str, where: str) -> None:
    service.expected.append(KILLED)
    module = "if not os.fork():\n    os.setsid()\n    live_on()\n" if where == "module" else ""
    manager = start(service, "-w", "2", "--grace", "0.5", module=module)
    for number, code in enumerate([""] if module else FORKS.values(), 1):
        assert service.ask(code).endswith(" done\n")
        wait_for_forks(service, number)
    served = service.generations() | service.workers() | {service.keeper()}
    if end == "stop":
        assert service.stop().returncode == 0
    else:
        os.kill(manager, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, served - made(service).keys())), "the service to go")
    assert any(map(alive, made(service)))
    assert_free(service)


@pytest.mark.parametrize("leave", ["reply = 'not sent'", "raise RuntimeError", "sys.exit()"])
def test_a_fork_that_leaves_the_handler_ends_there(service: Service, forks: None, leave: str) -> None:
    service.expected += ["Handler Failed", INDENTED]
    worker = start_one(service, "-n", "3")
    text = f"if not os.fork():\n    note(f'{{os.getpid()}} 0', 'forks')\n    {leave}"
    for number in (1, 2):
        assert service.ask(text) == f"{worker} done\n"
        wait_for_forks(service, number)
        wait_until(lambda: not any(map(alive, made(service))), "the fork to end")
    assert service.ask("") == f"{worker} done\n"
    assert service.ask("").endswith(" done\n")
    wait_until(lambda: not alive(worker), "the worker to end")
    assert [int(match["pid"]) for match in service.records("Client Query Processing Ended")][:3] == [worker] * 3
    assert [int(match["pid"]) for match in service.records("Child Process Ended")] == [worker]
    assert service.run("--status").stdout == f"{service.manager()}\n"


# ---- It keeps things for later --------------------------------------------------------

MODULE = """
FILE, BINARY = open(HERE / "noted", "a"), open(HERE / "noted", "ab")  # nothing is in them before they are flushed

def note_later(line):
    time.sleep(1)
    note(line)

atexit.register(lambda: (note(f"{os.getpid()} exit"), print(f"exit of {os.getpid()}")))
"""
KEEPS = {
    "file opened at import": "FILE.write(line + '\\n')",
    "binary file opened at import": "BINARY.write(line.encode() + b'\\n')",
    "file": "kept.append(open(HERE / 'noted', 'a')); kept[0].write(line + '\\n')",
    "atexit": "atexit.register(note, line)",
    "thread": "threading.Thread(target=note_later, args=[line]).start()",
    "pool": "pool().submit(note_later, line)",
}
ENDLESS = {
    "thread": "threading.Thread(target=time.sleep, args=[100]).start()",
    "atexit": "atexit.register(time.sleep, 100)",
    "atexit without alarm": "atexit.register(lambda: (signal.signal(signal.SIGALRM, signal.SIG_IGN), time.sleep(100)))",
    "pool": "pool().submit(time.sleep, 100)",
}


def keep(service: Service, what: str, code: str) -> int:
    """Have a worker keep WHAT; its PID."""
    return int(service.ask(f"line = f'{{os.getpid()}} {what}'\n{code}").split()[0])


def leave(service: Service, worker: int, how: str) -> None:
    """Have WORKER end."""
    match how:
        case "reload":
            assert service.run("--reload").returncode == 0
        case "stop":
            assert service.stop().returncode == 0
        case "TERM":
            os.kill(worker, signal.SIGTERM)
        case "kill -9":
            os.kill(service.manager(), signal.SIGKILL)
        case "recycle":  # it has had its requests
            assert service.ask("").endswith(" done\n")


@pytest.mark.parametrize("how", ["recycle", "reload", "stop", "TERM", "kill -9"])
def test_a_worker_ends_as_a_program_does(service: Service, how: str) -> None:
    """Files are written, exit functions run, threads and pools finish."""
    worker = start_one(service, "-n", str(len(KEEPS)) if how == "recycle" else "100", module=MODULE)
    for what, code in KEEPS.items():
        assert keep(service, what, code) == worker
    leave(service, worker, how)
    if how in ("stop", "reload"):
        assert not alive(worker)  # who waits for the command may read what was kept
    wait_until(lambda: not alive(worker), "the worker to end")
    ours = [line for line in noted(service) if line.startswith(f"{worker} ")]
    assert sorted(ours) == sorted(f"{worker} {what}" for what in [*KEEPS, "exit"])
    assert f"\nexit of {worker}\n" in service.log  # what is printed then is not lost either
    if how == "kill -9":
        wait_until(lambda: not everything(service), "all processes to go")


def test_exit_functions_run_in_idle_workers_but_not_in_the_manager(service: Service) -> None:
    manager = start(service, "-w", "3", module=MODULE)
    generation, workers = service.generation(), service.workers()
    service.stop()
    assert sorted(noted(service)) == sorted(f"{pid} exit" for pid in {*workers, generation})
    assert manager not in {int(line.split()[0]) for line in noted(service)}


def test_a_compressed_file_is_whole(service: Service) -> None:
    start(service, "-w", "1")
    service.ask("kept.append(gzip.open(HERE / 'compressed', 'wt')); kept[0].write('a poem')")
    service.stop()
    with gzip.open(service.home / "compressed", "rt") as file:
        assert file.read() == "a poem"


def test_a_pool_leaves_no_process_behind(service: Service) -> None:
    start(service, "-w", "3")
    for _ in range(10):
        service.ask("pool().submit(os.getpid).result()")
    before = everything(service)
    assert len(before) > 6  # manager, keeper, generation and workers
    assert service.run("--reload").returncode == 0
    stay = {service.manager(), service.keeper()}
    wait_until(lambda: everything(service) & before <= stay, "the old workers and pools to go")
    service.ask("pool().submit(os.getpid).result()")
    assert service.stop().returncode == 0
    assert not everything(service)


@pytest.mark.parametrize(("what", "how"), [*((what, "stop") for what in ENDLESS), ("thread", "reload"),
                                           ("atexit without alarm", "TERM")])
def test_an_endless_end_is_killed_after_the_grace(service: Service, what: str, how: str) -> None:
    service.expected.append(KILLED)
    worker = start_one(service, "-n", "1" if how == "recycle" else "100", "--grace", "1.5", module=MODULE)
    assert keep(service, "", ENDLESS[what]) == worker
    began = time.monotonic()
    leave(service, worker, how)
    if how != "stop":
        assert service.ask("").endswith(" done\n")
    wait_until(lambda: not alive(worker), "the worker to be killed")
    assert 1 < time.monotonic() - began < 15  # half of the grace that there is without being told
    [record] = service.wait_for_records("Child Process Killed")
    assert re.fullmatch(KILLED, record["message"])
    assert int(record["pid"]) == worker
    if how == "stop":
        wait_until(lambda: not everything(service), "what was killed to go")
        assert service.records()[-1]["message"] == "Server Terminated."


# ---- What its module begins -----------------------------------------------------------


def test_a_modules_helpers_outlive_workers_and_end_with_the_generation(service: Service) -> None:
    module = ("import tempfile\nDIRECTORY = tempfile.TemporaryDirectory(dir=HERE)\n"
              "HELPER = FORK.Process(target=time.sleep, args=[100], daemon=True)\nHELPER.start()\n")
    start(service, "-w", "1", "-n", "1", module=module)
    gone = set()
    for _ in range(3):
        worker, helper, directory = service.ask("reply = f'{HELPER.pid} {DIRECTORY.name}'").split()
        gone.add(int(worker))
    wait_until(lambda: service.ask("") and not any(map(alive, gone)), "the workers to end")
    assert alive(int(helper))
    assert os.path.isdir(directory)
    assert service.stop().returncode == 0
    assert not everything(service)
    assert not os.path.exists(directory)


def test_a_modules_thread_may_wait_for_commands(service: Service) -> None:
    module = """
def run():
    for _ in range(5):
        command = subprocess.Popen(["sh", "-c", "sleep 0.02; exit 5"])
        while command.poll() is None:  # while the generation reaps its workers
            time.sleep(0.005)
        note(f"{command.returncode}")

threading.Thread(target=run).start()
"""
    start(service, "-w", "2", "-n", "1", module=module)
    wait_until(lambda: service.ask("") and len(noted(service)) == 5, "the commands")
    assert noted(service) == ["5"] * 5


@pytest.mark.parametrize("reads", ["pipe", "file"])
def test_a_modules_thread_that_reads_does_not_hold_up_the_end_of_a_worker(service: Service, reads: str) -> None:
    """At the fork it holds the lock of the file it reads, and no worker has the thread that would release it."""
    files = {"pipe": "subprocess.Popen(['cat'], stdin=-1, stdout=-1, text=True).stdout",
             "file": "open(os.open(HERE / 'fifo', os.O_RDWR))"}
    os.mkfifo(service.home / "fifo")
    module = f"FILE = {files[reads]}\nthreading.Thread(target=lambda: [*FILE], daemon=True).start()\ntime.sleep(0.2)\n"
    start(service, "-w", "1", "-n", "1", "--grace", "25", module=module)
    began = time.monotonic()
    worker = int(service.ask("").split()[0])
    assert service.ask("").endswith(" done\n")
    wait_until(lambda: not alive(worker), "the worker to end", 10)
    assert service.stop().returncode == 0
    assert time.monotonic() - began < 20


def test_a_modules_endless_thread_keeps_no_command_from_ending(service: Service) -> None:
    service.write_handler(f"{RUNS}\nthreading.Thread(target=time.sleep, args=[600]).start()\n")
    assert service.run("--check", *HANDLER).returncode == 0
    assert service.run("--check", "--handler", "service:missing").returncode == 1
    daemon = service.foreground("-w", "1", *HANDLER, "--log-file", service.log_file, stderr=subprocess.DEVNULL)
    wait_until(lambda: service.run("--status").returncode == 0, "the start")
    assert service.run("--reload").returncode == 0
    began = time.monotonic()
    assert service.stop().returncode == 0
    assert time.monotonic() - began < 20  # of the grace of 30 s
    assert daemon.wait(DEADLINE) == 0
