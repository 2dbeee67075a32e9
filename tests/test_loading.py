"""What a handler must be, and what its module may do: the start, --check and a reload say in one line why not."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import Service, alive, wait_until
from modules import HANDLER, HARMFUL, HASTE, LOAD, HeldImport, saying

TROUBLE = ["(Start|Reload) Failed: ", "Handler Not Loaded:", "^    ", "^Fatal", r"Died\. \(exit status 7\)"]


# ---- What cannot be a handler --------------------------------------------------------------

HERE = r"/.*/service\.py"
REFUSED = {  # service.py, and a pattern for why not
    "async": ("async def handle(text):\n    return text", LOAD + ".*async.*"),
    "generator": ("def handle(text):\n    yield text", LOAD + ".*generator.*"),
    "class": ("class handle(str):\n    pass", LOAD + ".*(class|function).*"),
    "no argument": ("def handle():\n    return ''", LOAD + ".*(argument|one text).*"),
    "two arguments": ("def handle(text, more):\n    return text", LOAD + ".*(argument|one text).*"),
    "misspelt": ("def hadle(text):\n    return text", LOAD + r".*did you mean:? 'hadle'.*"),
    "no module": (None, LOAD + ".*service.*HOME.*"),
    "no helper": ("import os\nimport nohelper_", LOAD + rf".*No module named 'nohelper_' \({HERE}, line 2\)"),
    "no Python": ("\n\ndef handle(text)\n", LOAD + r"SyntaxError: .*\(.*service\.py, line 3\)"),
    "failing in a library": ("import json\n\n\njson.loads('{')", LOAD + rf".*JSONDecodeError: .*\({HERE}, line 4\)"),
    "failing in lines": ("raise ValueError('first\\nsecond\\x1b[2J')",
                         LOAD + rf"ValueError: first\\nsecond\\x1b\[2J \({HERE}, line 1\)"),
}


def fails(service: Service, *command: str) -> str:
    """The last line of a COMMAND that must fail; a check prints the traceback before it."""
    done = service.run(*command)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.removesuffix("\n").rpartition("\n")[2]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_handler_is_refused_by_check_and_start_alike(service: Service, case: str) -> None:
    service.expected += TROUBLE
    source, why = REFUSED[case]
    if source is not None:
        service.write_handler(source)
    told = fails(service, "-p", str(service.port), *HANDLER)
    assert re.fullmatch(f"daemontest\\.py: {why.replace('HOME', re.escape(str(service.home)))}", told), told
    assert fails(service, "--check", *HANDLER) == told
    service.assert_nothing_left()
    [failed] = service.records("Start Failed: ")
    assert failed["message"] == f"Start Failed: {told.removeprefix('daemontest.py: ')}"


@pytest.mark.parametrize(("handler", "why"), [
    ("service.py:handle", r"cannot load handler service\.py:handle: .*\.py.*'?service'?.*"),
    ("daemon:handle", "cannot load handler daemon:handle: .*name.*taken.*")])
def test_a_wrong_name_for_a_module_is_refused(service: Service, handler: str, why: str) -> None:
    for name in ("service", "daemon"):
        service.write_handler(saying("never"), name)
    told = fails(service, "--check", "--handler", handler)
    assert re.fullmatch(f"daemontest\\.py: {why}", told), told


def test_the_log_has_the_traceback_of_a_failed_start_and_reload(service: Service) -> None:
    service.expected += TROUBLE
    bad = "def look_up():\n    return {}['no such word']\nlook_up()"
    service.write_handler(bad)
    fails(service, "-p", str(service.port), *HANDLER)
    service.write_handler(saying("old"))
    service.start("-w", "1", *HANDLER)
    service.write_handler(bad)
    assert fails(service, "--reload").endswith(f"KeyError: 'no such word' ({service.home / 'service.py'}, line 2)")
    traceback = (r"Handler Not Loaded:\n    Traceback .*\n(?:    .*\n)*    .*service\.py\", line 3, in <module>\n"
                 r"(?:    .*\n)+    KeyError: 'no such word'\n")
    assert len(re.findall(traceback, service.log)) == 2


ACCEPTED = {
    "a default": "def handle(text, more=''):\n    return 'served'",
    "a partial function": "import functools\nhandle = functools.partial(lambda word, text: word, 'served')",
    "a callable object": "class Server:\n    def __call__(self, text):\n        return 'served'\nhandle = Server()",
    "a function in C": "handle = {'x': 'served'}.get",
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_else_can_be_called_with_one_text_is_a_handler(service: Service, case: str) -> None:
    service.write_handler(ACCEPTED[case])
    assert service.run("--check", *HANDLER).stdout == "daemontest.py: configuration is good\n"
    service.start("-w", "1", *HANDLER)
    assert service.ask("x").endswith(" served\n")


# ---- Where it is found ---------------------------------------------------------------------

def test_it_is_found_where_the_command_was_started(service: Service) -> None:
    package = service.home / "elsewhere" / "ours" / "deep"
    package.mkdir(parents=True)
    (package.parent / "words.py").write_text("WORD = 'deep down'")
    (package / "main.py").write_text("from ..words import WORD\ndef handle(text):\n    return WORD")
    service.start("--handler", "ours.deep.main:handle", cwd=service.home / "elsewhere")
    assert service.ask("x").endswith(" deep down\n")


def test_it_is_found_beside_the_configuration_file_before_all_other_places(service: Service) -> None:
    (service.home / "configured").mkdir()
    (service.home / "configured" / "our.toml").write_text('handler = "this:handle"')  # Python has a "this" of its own
    (service.home / "configured" / "this.py").write_text(saying("beside the configuration"))
    service.write_handler("raise RuntimeError('where the command was started')", "this")
    service.start("-c", "configured/our.toml")
    assert service.ask("x").endswith(" beside the configuration\n")


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
    service.expected += TROUBLE
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
    service.expected += TROUBLE
    source, why = HARMFUL[case]
    service.write_handler("", "helper")
    service.write_handler(source)
    done = service.run("-p", str(service.port), *HANDLER)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: {why}\n", done.stderr), done.stderr
    service.assert_nothing_left()
    [failed] = service.records("Start Failed: ")
    assert f"daemontest.py: {failed['message'].removeprefix('Start Failed: ')}\n" == done.stderr


@pytest.mark.parametrize("harm", ["signal.signal(each, signal.SIG_IGN)", "signal.signal(each, lambda *_: 1 / 0)",
                                  "signal.pthread_sigmask(signal.SIG_BLOCK, {each})"])
def test_whatever_a_module_does_to_signals_everybody_hears_them(service: Service, harm: str) -> None:
    service.expected.append(r"Child Process Died\. \(SIGKILL\)")
    service.write_handler("import signal\nfor each in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:\n"
                          f"    {harm}\n{saying('served')}")
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
    service.assert_nothing_left()


# ---- An import that takes its time, at a start -----------------------------------------------

def start(service: Service, how: str) -> tuple[HeldImport, subprocess.Popen[str], int]:
    """Start, and hold up the import; returns when it has begun, with its process."""
    handler = HeldImport(service)
    handler.hold(how)
    launcher = service.popen("-p", str(service.port), "-w", "2", *HANDLER)
    return handler, launcher, handler.wait_for(1)


@pytest.mark.parametrize("how", ["sleep", "deaf"])
def test_a_stop_ends_the_start_at_once(service: Service, how: str) -> None:
    service.expected.append("Start Failed: ")
    _, launcher, _ = start(service, how)
    manager = service.manager()
    assert service.stop().stdout == f"daemontest.py {manager} Server terminated.\n"
    output, errors = launcher.communicate(timeout=HASTE)
    assert (launcher.returncode, output) == (1, "")
    assert re.fullmatch(r"daemontest\.py: [^\n]+\n", errors), errors
    service.assert_nothing_left()


@pytest.mark.parametrize("how", ["sleep", "deaf"])
def test_a_hup_starts_the_import_afresh(service: Service, how: str) -> None:
    handler, launcher, given_up = start(service, how)
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
