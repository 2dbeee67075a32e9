"""Whatever a handler's module does when it is imported, it ends no more than the generation that imports it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import DATA, Service, alive, wait_until

FATAL = {
    "raises": "RuntimeError: no good",
    "exits": "SystemExit: 3",
    "leaves_with_0": "the process died (exit status 0)",
    "leaves_with_3": "the process died (exit status 3)",
    "segfaults": "the process died (SIGSEGV)",
    "aborts": "the process died (SIGABRT)",
    "kills_itself": "the process died (SIGKILL)",
    "sends_itself_a_real_time_signal": "the process died (SIGRTMIN+1)",
    "allocates_a_tebibyte": "MemoryError",
    "waits_for_a_child": "ChildProcessError: [Errno 10] No child processes",  # no worker is taken for its child
    "spoils_a_builtin": "",  # how it ends depends on what Python itself needs
    "spoils_every_builtin": "",
    "closes_every_descriptor": "",
}
HARMLESS = ["ignores_the_end_of_children", "ignores_every_signal", "raises_at_every_signal", "blocks_every_signal",
            "lets_every_signal_in", "shares_memory", "leaves_an_alarm", "waits_for_every_child"]
HELPERS = ["forks", "forks_a_daemon", "starts_a_process"]
HANDLER = ("--handler", "harmful:handle")


def choose(service: Service, harm: str) -> None:
    """Have the module do HARM when it is imported next."""
    shutil.copy(DATA / "harmful.py", service.home)
    (service.home / "harm").write_text(harm)


def told(harm: str) -> str:
    """A pattern for what is told of a module that does HARM."""
    return r"cannot load handler harmful:handle: " + (re.escape(FATAL[harm]) or "[^\n]+")


def workers(service: Service) -> set[int]:
    """The living workers, and not what the module has started beside them."""
    return service.workers() & {int(match["pid"]) for match in service.records("Child Process Started.")}


def wait_for_workers(service: Service, number: int, old: set[int] = frozenset()) -> set[int]:  # type: ignore[assignment]
    """Wait until there are NUMBER workers, and none of the OLD; they."""
    wait_until(lambda: len(workers(service)) == number and not workers(service) & old, f"{number} workers")
    return workers(service)


def wait_for_reply(service: Service, reply: str) -> None:
    wait_until(lambda: service.ask("x").partition(" ")[2] == f"{reply}\n", f"the reply {reply!r}")


# ---- What ends the import -------------------------------------------------------------


@pytest.mark.parametrize("harm", FATAL)
def test_a_start_says_what_ended_the_import_and_leaves_nothing(service: Service, harm: str) -> None:
    service.expected += ["Manager Failed: cannot load handler", "^    ", "^Traceback|^[a-zA-Z]*Error|^ "]
    choose(service, harm)
    done = service.run("-p", str(service.port), *HANDLER)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: {told(harm)}\n", done.stderr), done.stderr
    assert not service.processes()
    assert not service.pid_file.exists()
    [failed] = service.records("Manager Failed: ")
    assert f"daemontest.py: {failed['message'].removeprefix('Manager Failed: ')}\n" == done.stderr


@pytest.mark.parametrize("harm", ["segfaults", "leaves_with_0"])
def test_a_check_says_the_same(service: Service, harm: str) -> None:
    choose(service, harm)
    done = service.run("--check", *HANDLER)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"daemontest\.py: {told(harm)}\n", done.stderr), done.stderr


def test_no_reload_ends_or_changes_a_service_that_serves(service: Service) -> None:
    service.expected += ["Nothing Changed: cannot load handler", "^Traceback|^[a-zA-Z]*Error|^ "]
    choose(service, "nothing")
    manager = service.start("-w", "2", *HANDLER)
    generation, serving, opened = service.generations(), workers(service), psutil.Process(manager).num_fds()
    for count, harm in enumerate(FATAL, 1):
        choose(service, harm)
        os.kill(manager, signal.SIGHUP)
        failed = service.wait_for_records("Nothing Changed: ", count)[-1]
        assert re.fullmatch(f"Nothing Changed: {told(harm)}", failed["message"]), failed["message"]
        assert int(failed["pid"]) == manager
        assert service.ask("x").endswith(" it nothing\n")
    wait_until(lambda: service.processes() == {manager, *generation, *serving}, "the failed to go")
    wait_until(lambda: psutil.Process(manager).num_fds() <= opened, f"no more than {opened} descriptors")
    wait_until(lambda: len(psutil.Process(manager).children()) == 1, "the failed to be reaped")
    choose(service, "shares_memory")
    os.kill(manager, signal.SIGHUP)
    wait_for_workers(service, 2, serving)
    assert service.ask("x").endswith(" it shares_memory\n")


def test_nor_does_it_harm_a_service_that_has_to_start_a_generation_anew(service: Service) -> None:
    service.expected += [r"Generation Died\. \(SIGKILL\)", "Generation Failed: ", "^Traceback|^[a-zA-Z]*Error|^ "]
    choose(service, "nothing")
    manager = service.start("-w", "1", *HANDLER)
    generation = service.generation()
    harms = ["segfaults", "leaves_with_0", "spoils_every_builtin", "closes_every_descriptor"]
    choose(service, harms[0])
    os.kill(generation, signal.SIGKILL)
    for harm, following in zip(harms, [*harms[1:], "nothing"], strict=True):
        service.wait_for_records(f"Generation Failed: {told(harm)}$" if FATAL[harm] else "Generation Failed: ",
                                 harms.index(harm) + 1 if not FATAL[harm] else 1)
        choose(service, following)
    assert service.ask("x").endswith(" it nothing\n")
    assert service.manager() == manager
    assert service.stop().returncode == 0


# ---- What does not ---------------------------------------------------------------------


@pytest.mark.parametrize("harm", HARMLESS)
def test_nobody_is_deaf_or_blind_afterwards(service: Service, harm: str) -> None:
    """Started, reloaded and started anew after its death, the generation keeps its workers and leaves when told."""
    service.expected += [r"Generation Died\. \(SIGKILL\)", r"Child Process Died\. \("]
    choose(service, harm)
    manager = service.start("-w", "2", *HANDLER)
    began = time.monotonic()
    assert_keeps_workers(service, harm, signal.SIGTERM, signal.SIGKILL)
    old = workers(service)
    os.kill(manager, signal.SIGHUP)
    wait_for_workers(service, 2, old)
    generation = service.generation()
    assert_keeps_workers(service, harm, signal.SIGTERM)
    os.kill(generation, signal.SIGKILL)
    wait_until(lambda: service.generations() - {generation} and len(workers(service)) == 2, "a new generation")
    assert_keeps_workers(service, harm, signal.SIGTERM)
    forked, seconds = len(service.records("Child Process Started.")), time.monotonic() - began
    assert forked <= 10 + 2 * seconds  # those above, and whoever dies, at the rate of the dying
    stopping = time.monotonic()
    assert service.stop().returncode == 0
    assert time.monotonic() - stopping < 10
    assert not service.processes()


def assert_keeps_workers(service: Service, harm: str, *signals: signal.Signals) -> None:
    """A worker that leaves is replaced at once, one that is killed within moments."""
    for signum in signals:
        ended = min(wait_for_workers(service, 2))
        os.kill(ended, signum)
        wait_for_workers(service, 2, {ended})
        assert service.ask("x").endswith(f" it {harm}\n")


def test_a_thread_that_it_starts_ends_no_more_than_the_generation(service: Service) -> None:
    service.expected.append(r"Generation Died\. \(exit status 0\)")
    choose(service, "leaves_later")
    manager = service.start("-w", "2", *HANDLER)
    generation, old = service.generations(), workers(service)
    choose(service, "nothing")
    (service.home / "now").touch()
    [died] = service.wait_for_records("Generation Died")
    assert {int(died["pid"])} == generation
    wait_for_reply(service, "it nothing")
    wait_until(lambda: not any(map(alive, old)), "the old workers to leave")
    assert service.manager() == manager


# ---- What it starts ----------------------------------------------------------------------


@contextmanager
def helpers_killed(service: Service) -> Iterator[None]:
    """Whatever helpers the module has started are gone afterwards."""
    try:
        yield
    finally:
        for helper in helpers(service):
            if alive(helper) and helper in service.processes():
                os.kill(helper, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, helpers(service))), "the helpers to go")


def helpers(service: Service) -> list[int]:
    file = service.home / "helpers"
    return [int(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def wait_for_helpers(service: Service, count: int) -> list[int]:
    wait_until(lambda: len(helpers(service)) == count, f"{count} helpers")
    return helpers(service)


@pytest.mark.parametrize("harm", HELPERS)
def test_what_it_starts_keeps_neither_a_start_nor_a_reload_nor_a_stop_nor_the_port(service: Service, harm: str) -> None:
    choose(service, harm)
    with helpers_killed(service):
        for count in (1, 3):
            service.start("-w", "1", *HANDLER)
            wait_for_helpers(service, count)
            old = workers(service)
            os.kill(service.manager(), signal.SIGHUP)
            wait_for_workers(service, 1, old)
            wait_for_helpers(service, count + 1)
            service.generation()
            assert service.ask("x").endswith(f" it {harm}\n")
            assert service.stop().returncode == 0
            with pytest.raises(ConnectionRefusedError):
                service.connect()
    assert not service.records("Child Process Died")


@pytest.mark.parametrize("harm", HELPERS)
def test_what_it_starts_keeps_neither_the_lock_nor_the_port_of_a_killed_manager(service: Service, harm: str) -> None:
    choose(service, harm)
    with helpers_killed(service):
        for count in (1, 2):
            manager = service.start("-w", "1", *HANDLER)
            wait_for_helpers(service, count)
            serving = workers(service)
            os.kill(manager, signal.SIGKILL)
            wait_until(lambda: not alive(manager), "the manager to die")  # noqa: B023
            assert service.run("--status").returncode == 3
            wait_until(lambda: not any(map(psutil.pid_exists, serving)), "the workers to go")  # noqa: B023


def test_what_it_starts_keeps_no_failed_start_waiting(service: Service) -> None:
    service.expected += ["Manager Failed: cannot load handler", "^    "]
    choose(service, "forks_a_daemon")
    with open(service.home / "harmful.py", "a") as file:
        file.write("raise RuntimeError('no good')\n")
    with helpers_killed(service):
        done = service.run("-p", str(service.port), *HANDLER)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "daemontest.py: cannot load handler harmful:handle: RuntimeError: no good\n"
        assert not service.pid_file.exists()
        wait_for_helpers(service, 1)
        choose(service, "nothing")
        service.start("-w", "1", *HANDLER)


# ---- The manager is pristine ---------------------------------------------------------------


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extension that cannot be loaded twice in one process."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    headers = sysconfig.get_path("include")
    if not compiler or not Path(headers, "Python.h").exists():
        pytest.skip("needs a C compiler and Python's headers")
    built = tmp_path_factory.mktemp("once") / f"once{sysconfig.get_config_var('EXT_SUFFIX')}"
    options = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    subprocess.run([compiler, *options, "-fPIC", f"-I{headers}", "-o", built, DATA / "once.c"], check=True, timeout=50)
    return built


def test_an_extension_that_can_be_loaded_once_in_a_process_is_loaded_by_every_generation(
        service: Service, once: Path) -> None:
    service.expected.append("Nothing Changed: cannot load handler service:handle: RuntimeError: no good")
    shutil.copy(once, service.home)
    again = "import sys, once\ndel sys.modules['once']\nimport once\ndef handle(text):\n    return 'never'"
    service.write_handler(again)
    refused = service.run("--check", "--handler", "service:handle")
    assert "ImportError: cannot load module more than once per process" in refused.stderr  # so it is what it should be
    service.write_handler("import once\ndef handle(text):\n    return 'first'")
    manager = service.start("-w", "1", "--handler", "service:handle")
    service.write_handler("import once\nraise RuntimeError('no good')")
    os.kill(manager, signal.SIGHUP)
    service.wait_for_records("Nothing Changed: ")
    service.write_handler("import once\ndef handle(text):\n    return 'second'")
    os.kill(manager, signal.SIGHUP)
    wait_for_reply(service, "second")
    [worker] = wait_for_workers(service, 1)
    maps = Path(f"/proc/{worker}/maps")
    if maps.exists():
        assert once.name in maps.read_text()
        assert once.name not in Path(f"/proc/{manager}/maps").read_text()


def test_a_generation_finds_nothing_of_what_the_last_one_did(service: Service) -> None:
    service.expected.append("Nothing Changed: ")
    leaving_traces = "import os, sys, helper\nos.environ['TRACE'] = sys.trace = 'left'\nos.chdir('/tmp')\nos.umask(0)\n"
    handler = """
import os, sys
FOUND = [os.environ.get("TRACE"), getattr(sys, "trace", None), "helper" in sys.modules, os.getcwd(), os.umask(0o27)]

def handle(text):
    return f"{FOUND}"
"""
    service.write_handler("", "helper")
    service.write_handler(leaving_traces + "def handle(text):\n    return 'traces'")
    manager = service.start("-w", "1", "--handler", "service:handle")
    service.write_handler(leaving_traces + "raise RuntimeError('no good')")
    os.kill(manager, signal.SIGHUP)
    service.wait_for_records("Nothing Changed: ")
    service.write_handler(handler)
    os.kill(manager, signal.SIGHUP)
    wait_for_reply(service, f"{[None, None, False, '/', 0o27]}")


def test_failed_reloads_of_a_large_module_leave_no_memory_behind(service: Service) -> None:
    service.expected.append("Nothing Changed: ")
    service.write_handler("def handle(text):\n    return 'small'")
    manager = service.start("-w", "1", "--handler", "service:handle")
    before = psutil.Process(manager).memory_full_info().uss
    service.write_handler("TABLE = bytes(range(256)) * 2**17\nraise RuntimeError('no good')")  # 32 MiB
    for count in range(1, 11):
        os.kill(manager, signal.SIGHUP)
        service.wait_for_records("Nothing Changed: ", count)
    assert psutil.Process(manager).memory_full_info().uss < before + 8e6


SHADOW = """
import os
with open("{HOME}/shadowed", "a") as file:
    file.write(f"{os.getpid()}\\n")
raise ImportError("not the real one")
"""


def test_a_module_beside_the_handler_that_is_named_like_one_of_pythons_is_not_imported_by_the_manager(
        service: Service) -> None:
    for name in ("tomllib", "traceback", "resource", "threading", "tempfile", "dataclasses", "datetime", "selectors"):
        service.write_handler(SHADOW.replace("{HOME}", str(service.home)), name)
    service.write_handler("def handle(text):\n    return 'served'")
    service.configure("workers = 1\nhandler = 'service:handle'")
    manager = service.start()
    for number in (2, 3):
        old = workers(service)
        service.configure(f"workers = {number}\nhandler = 'service:handle'")
        os.kill(manager, signal.SIGHUP)
        wait_for_workers(service, number, old)
    assert service.ask("x").endswith(" served\n")
    assert service.run("--reload").returncode == 0
    assert not (service.home / "shadowed").exists()


SHOW_DESCRIPTORS = """
import os

FOUND = []
for name in os.listdir("/proc/self/fd"):
    try:
        FOUND.append(os.readlink(f"/proc/self/fd/{name}") + " " + open(f"/proc/self/fdinfo/{name}").read().split()[3])
    except FileNotFoundError:  # the listing's own
        pass

def handle(text):
    return " ".join(FOUND)
"""


def descriptors(pid: int) -> set[tuple[str, str]]:
    """What the process has open, each with its flags."""
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has just been closed
            found.add((os.readlink(file), Path(f"/proc/{pid}/fdinfo/{file.name}").read_text().split()[3]))
    return found


@pytest.mark.skipif(not Path("/proc/self/fdinfo").exists(), reason="looks at descriptors through Linux's /proc")
def test_the_module_finds_neither_the_lock_nor_the_managers_ends_of_pipes_open(service: Service) -> None:
    service.write_handler(SHOW_DESCRIPTORS)
    manager = service.start("-w", "1", "--handler", "service:handle")
    for reloads in range(2):
        words = service.ask("x").split()[1:]
        found = set(zip(words[::2], words[1::2], strict=True))
        managers = descriptors(manager)
        assert str(service.pid_file) in {name for name, _ in managers}
        assert str(service.pid_file) not in {name for name, _ in found}
        shared = {(name, flags) for name, flags in found & managers if name.startswith("pipe:")}
        assert not shared, shared
        if not reloads:
            old = workers(service)
            os.kill(manager, signal.SIGHUP)
            wait_for_workers(service, 1, old)
