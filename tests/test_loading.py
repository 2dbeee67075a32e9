"""What a handler must be, and what its module may do: the start, --check and a reload say in one line why not."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import Service, alive, wait_until
from modules import HARMFUL, LOAD, HeldImport, saying

HASTE = 15.0  # s; what is done at once may take as long on a loaded machine, and a held import takes a minute
HANDLER = ("--handler", "service:handle")


def assert_nothing_is_left(service: Service) -> None:
    wait_until(lambda: not service.processes(), "all processes to go")
    assert not service.pid_file.exists()


# ---- What cannot be a handler --------------------------------------------------------------

HERE = r"/.*/service\.py"
REFUSED = {  # service.py, and a pattern for why not
    "async": ("async def handle(text):\n    return text", LOAD + ".*async.*"),
    "async generator": ("async def handle(text):\n    yield text", LOAD + ".*(async|generator).*"),
    "generator": ("def handle(text):\n    yield text", LOAD + ".*generator.*"),
    "class": ("class handle(str):\n    pass", LOAD + ".*(class|function).*"),
    "no argument": ("def handle():\n    return ''", LOAD + ".*(argument|one text).*"),
    "two arguments": ("def handle(text, more):\n    return text", LOAD + ".*(argument|one text).*"),
    "a keyword": ("def handle(text, *, more):\n    return text", LOAD + ".*(argument|one text).*"),
    "a text": ("handle = 'text'", LOAD + ".*handle.*"),
    "misspelt": ("def hadle(text):\n    return text", LOAD + r".*did you mean:? 'hadle'.*"),
    "no function": ("", LOAD + ".*handle.*"),
    "no module": (None, LOAD + ".*service.*HOME.*"),
    "no helper": ("import os\nimport nohelper_", LOAD + rf".*No module named 'nohelper_' \({HERE}, line 2\)"),
    "no Python": ("\n\ndef handle(text)\n", LOAD + rf"SyntaxError: .*\({HERE}, line 3\)"),
    "failing": ("\n1 / 0", LOAD + rf"ZeroDivisionError: division by zero \({HERE}, line 2\)"),
    "failing in a library": ("import json\n\n\njson.loads('{')", LOAD + rf".*JSONDecodeError: .*\({HERE}, line 4\)"),
    "failing in lines": ("raise ValueError('first\\nsecond\\x1b[2J')",
                         LOAD + rf"ValueError: first\\nsecond\\x1b\[2J \({HERE}, line 1\)"),
    "exiting": ("raise SystemExit(0)", LOAD + rf"SystemExit: 0 \({HERE}, line 1\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_handler_is_refused_by_check_and_start_in_the_same_line(service: Service, case: str) -> None:
    service.expected += ["Start Failed: ", "Handler Not Loaded:", "^    "]
    source, why = REFUSED[case]
    if source is not None:
        service.write_handler(source)
    checked = service.run("--check", *HANDLER)
    assert (checked.returncode, checked.stdout) == (1, "")
    *traceback, told = checked.stderr.removesuffix("\n").split("\n")
    pattern = f"daemontest\\.py: {why.replace('HOME', re.escape(str(service.home)))}"
    assert re.fullmatch(pattern, told), told
    started = service.run("-p", str(service.port), *HANDLER)
    assert (started.returncode, started.stdout, started.stderr) == (1, "", f"{told}\n")
    assert_nothing_is_left(service)
    [failed] = service.records("Start Failed: ")
    assert failed["message"] == f"Start Failed: {told.removeprefix('daemontest.py: ')}"
    if "service" in pattern and "line" in pattern:  # an exception in the module's own code
        assert "Traceback (most recent call last):" in traceback
        assert service.records("Handler Not Loaded:")
        assert "\n    Traceback (most recent call last):\n" in service.log
        assert str(service.home / "service.py") in service.log


@pytest.mark.parametrize(("handler", "why"), [
    ("service.py:handle", r"cannot load handler service\.py:handle: .*\.py.*'?service'?.*"),
    ("daemon:handle", "cannot load handler daemon:handle: .*name.*taken.*"),
    ("token:handle", "cannot load handler token:handle: .*name.*taken.*")])
def test_a_module_named_wrongly_is_told_so(service: Service, handler: str, why: str) -> None:
    service.expected += ["Start Failed: ", "Handler Not Loaded:", "^    "]
    for name in ("service", "daemon", "token"):
        service.write_handler(saying("never"), name)
    for command in (("--check",), ("-p", str(service.port))):
        done = service.run(*command, "--handler", handler)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(f"daemontest\\.py: {why}", done.stderr.rstrip("\n").split("\n")[-1]), done.stderr
    assert_nothing_is_left(service)


def test_a_failed_reload_too_leaves_its_traceback_in_the_log(service: Service) -> None:
    service.expected += ["Reload Failed: ", "Handler Not Loaded:", "^    "]
    service.write_handler(saying("old"))
    service.start("-w", "1", *HANDLER)
    service.write_handler("def look_up():\n    return {}['no such word']\nlook_up()")
    assert service.run("--reload").stderr.endswith("KeyError: 'no such word' "
                                                   f"({service.home / 'service.py'}, line 2)\n")
    assert re.search(r"Handler Not Loaded:\n    Traceback \(most recent call last\):\n(    .*\n)*    .*service\.py\", "
                     r"line 3, in <module>\n(    .*\n)+    KeyError: 'no such word'\n", service.log)


ACCEPTED = {
    "a default": "def handle(text, more=''):\n    return 'served'",
    "any arguments": "def handle(*words, **more):\n    return 'served'",
    "a decorated function": "import functools\n@functools.cache\ndef handle(text):\n    return 'served'",
    "a partial function": "import functools\nhandle = functools.partial(lambda word, text: word, 'served')",
    "a method": "class Server:\n    def serve(self, text):\n        return 'served'\nhandle = Server().serve",
    "a callable object": "class Server:\n    def __call__(self, text):\n        return 'served'\nhandle = Server()",
    "a function in C": "handle = {'x': 'served'}.get",
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_whatever_else_can_be_called_with_one_text_is_a_handler(service: Service, case: str) -> None:
    service.write_handler(ACCEPTED[case])
    assert service.run("--check", *HANDLER).stdout == "daemontest.py: configuration is good\n"
    service.start("-w", "1", *HANDLER)
    assert service.ask("x").endswith(" served\n")


# ---- Where it is found ---------------------------------------------------------------------


def test_it_is_found_where_the_command_was_started_also_in_a_package(service: Service) -> None:
    package = service.home / "elsewhere" / "ours" / "deep"
    package.mkdir(parents=True)
    (package.parent / "words.py").write_text("WORD = 'deep down'")
    (package / "main.py").write_text("from ..words import WORD\ndef handle(text):\n    return WORD")
    service.start("--handler", "ours.deep.main:handle", cwd=service.home / "elsewhere")
    assert service.ask("x").endswith(" deep down\n")
    assert not list(service.home.glob("**/__pycache__")), "no compiled files are left behind"


def test_it_is_found_beside_the_configuration_file_before_all_other_places(service: Service) -> None:
    (service.home / "configured").mkdir()
    (service.home / "configured" / "our.toml").write_text('handler = "this:handle"')  # as one of Python's own modules
    (service.home / "configured" / "this.py").write_text(saying("beside the configuration"))
    service.write_handler("raise RuntimeError('where the command was started')", "this")
    service.start("-c", "configured/our.toml")
    assert service.ask("x").endswith(" beside the configuration\n")


def test_modules_beside_it_are_not_taken_for_pythons_own_by_the_manager(service: Service) -> None:
    for name in ("tomllib", "traceback", "resource", "threading", "datetime", "selectors", "faulthandler"):
        service.write_handler(f"open({str(service.home / 'taken')!r}, 'a').write('{name} ')\nraise ImportError", name)
    service.write_handler(saying("served"))
    service.configure("workers = 2\nhandler = 'service:handle'")
    service.start()
    assert service.run("--reload").returncode == 0
    assert service.ask("x").endswith(" served\n")
    assert not (service.home / "taken").exists()


# ---- Imported once in a generation, detached, for all workers ---------------------------------


def test_it_is_imported_once_in_each_generation_which_is_detached_by_then(service: Service) -> None:
    service.write_handler(f"""
import os
IMPORTED = f"{{os.getpid()}} {{os.getppid()}} {{os.getsid(0)}} {{os.getcwd()}}"
with open({str(service.home / "imports")!r}, "a") as file:
    file.write("imported\\n")

def handle(text):
    return f"{{IMPORTED}} {{os.getppid()}}"
""")
    manager = service.start("-w", "2", "-n", "1", *HANDLER)
    for count in (1, 2):
        [generation] = service.generations()
        answers = [service.ask("x").split() for _ in range(6)]
        assert {tuple(rest) for _, *rest in answers} == {
            (str(generation), str(manager), str(os.getsid(manager)), "/", str(generation))}
        assert len({worker for worker, *_ in answers}) > 2, "workers are recycled without an import"
        assert (service.home / "imports").read_text() == "imported\n" * count
        assert service.run("--reload").returncode == 0
    assert os.getsid(manager) != os.getsid(0)


def test_a_generation_finds_nothing_of_what_the_last_ones_did(service: Service) -> None:
    service.expected += ["Reload Failed: ", "Handler Not Loaded:", "^    "]
    traces = "import os, sys, helper\nos.environ['TRACE'] = sys.trace = 'left'\nos.chdir('/tmp')\nos.umask(0)\n"
    service.write_handler("", "helper")
    service.write_handler(traces + saying("traces"))
    service.start("-w", "1", *HANDLER)
    service.write_handler(traces + "raise RuntimeError('no good')")
    assert service.run("--reload").returncode == 1
    service.write_handler("""
import os, sys
FOUND = [os.environ.get("TRACE"), getattr(sys, "trace", None), "helper" in sys.modules, os.getcwd(), os.umask(0o27)]

def handle(text):
    return f"{FOUND}"
""")
    assert service.run("--reload").returncode == 0
    assert service.ask("x").endswith(f" {[None, None, False, '/', 0o27]}\n")


# ---- Harmful modules -----------------------------------------------------------------------


@pytest.mark.parametrize("case", HARMFUL)
def test_a_harmful_module_fails_the_start_and_leaves_nothing(service: Service, case: str) -> None:
    service.expected += ["Start Failed: ", "Handler Not Loaded:", "^    ", "^Fatal",
                         r"Child Process Died\. \(exit status 7\)"]
    source, why = HARMFUL[case]
    service.write_handler("", "helper")
    service.write_handler(source)
    done = service.run("-p", str(service.port), *HANDLER)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: {why}\n", done.stderr), done.stderr
    assert_nothing_is_left(service)
    [failed] = service.records("Start Failed: ")
    assert f"daemontest.py: {failed['message'].removeprefix('Start Failed: ')}\n" == done.stderr


HARMLESS = {
    "ignores the end of children": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "ignores every signal": "for each in ALL:\n    signal.signal(each, signal.SIG_IGN)",
    "raises at every signal": "def fail(*_):\n    1 / 0\nfor each in ALL:\n    signal.signal(each, fail)",
    "blocks every signal": "signal.pthread_sigmask(signal.SIG_SETMASK, ALL)",
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_a_module_does_to_signals_makes_nobody_deaf_or_blind(service: Service, case: str) -> None:
    service.expected += [r"Generation Died\. \(SIGKILL\)", r"Child Process Died\. \(SIGKILL\)"]
    service.write_handler("import signal\nALL = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}\n"
                          f"{HARMLESS[case]}\n{saying('served')}")
    service.start("-w", "2", "-n", "2", *HANDLER)
    for signum in (signal.SIGTERM, signal.SIGKILL):
        old = min(service.workers())
        os.kill(old, signum)
        wait_until(lambda: len(service.workers() - {old}) == 2, f"a worker after {signum.name}")  # noqa: B023
    assert {service.ask("x").split()[1] for _ in range(9)} == {"served"}, "workers are recycled"
    assert service.run("--reload").returncode == 0
    began = time.monotonic()
    assert service.stop().returncode == 0
    assert time.monotonic() - began < HASTE
    assert_nothing_is_left(service)


# ---- An import that takes its time, at a start -----------------------------------------------


def start(service: Service, how: str) -> "tuple[HeldImport, subprocess.Popen[str]]":
    """Start, and hold up the import; returns when it has begun."""
    handler = HeldImport(service, how=how)
    launcher = service.popen("-p", str(service.port), "-w", "2", *handler.arguments)
    handler.wait_for(1)
    return handler, launcher


@pytest.mark.parametrize("how", ["sleep", "compute"])
@pytest.mark.parametrize("by_command", [False, True])
def test_a_start_is_stopped_at_once(service: Service, how: str, by_command: bool) -> None:
    service.expected.append("Start Failed: ")
    _, launcher = start(service, how)
    manager = service.manager()
    if by_command:
        stopped = service.stop()
        assert (stopped.returncode, stopped.stdout) == (0, f"daemontest.py {manager} Server terminated.\n")
        assert service.processes() <= {launcher.pid}, "which may be about to end"
    else:
        os.kill(manager, signal.SIGTERM)
    output, errors = launcher.communicate(timeout=HASTE)
    assert (launcher.returncode, output) == (1, "")
    assert re.fullmatch(r"daemontest\.py: [^\n]+\n", errors), errors
    assert_nothing_is_left(service)
    assert [match["message"] for match in service.records() if int(match["pid"]) == manager][-1] == "Server Terminated."


@pytest.mark.parametrize("how", ["sleep", "compute"])
def test_a_hup_starts_it_afresh_with_what_is_on_the_disk_by_then(service: Service, how: str) -> None:
    handler, launcher = start(service, how)
    [given_up] = handler.processes()
    manager = service.manager()
    handler.hold()
    handler.say("new")
    os.kill(manager, signal.SIGHUP)
    handler.wait_for(2)
    handler.release()
    assert launcher.communicate(timeout=50) == (
        f"daemontest.py: {manager} started, 2 workers on port {service.port}\n", "")
    assert {service.ask("x").split()[1] for _ in range(5)} == {"new"}
    wait_until(lambda: not alive(given_up), "the import that is given up to end")
    assert len(handler.processes()) == 2


STEPS = {"PID file": lambda service: service.pid_file.exists(), "log": lambda service: "Daemon Server" in service.log,
         "import": lambda service: "Loading configuration" in service.log,
         "workers": lambda service: service.log.count("Child Process Started") == 2}
