#!/usr/bin/env python3
"""daemontest: a pre-forking UNIX daemon that answers each text with its length.

One manager process keeps a number of workers alive.  All of them accept clients on the one
listening socket that the manager opened; each connection brings a text and takes a reply.
To serve something else, write a function from text to text and name it with --handler.

Signals to the manager:  TERM, INT, QUIT   stop gracefully
                         HUP               reload configuration and handler, reopen the log
Signals to a worker:     TERM              finish the request in hand, leave, be replaced

Exit status: 0 done, 1 failed (one line on standard error says why), 2 wrong usage,
3 --status and not running.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import gc
import importlib
import io
import math
import mmap
import os
import re
import select
import signal
import socket
import stat
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType

from daemon import DaemonContext

# lockfile imports threading for locks of a kind not used here, and what threading does in each new process would cost
# a worker a quarter of its start.  So lockfile gets a stand-in; whoever needs threading imports the real one.
sys.modules.setdefault("threading", STAND_IN := ModuleType("threading"))
vars(STAND_IN).update(current_thread=lambda: importlib.import_module("threading").current_thread(),
                      Thread=type("Thread", (), {"get_name": None}))
from lockfile.pidlockfile import PIDLockFile  # noqa: E402

if sys.modules["threading"] is STAND_IN:
    del sys.modules["threading"]

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is not needed, and takes its time
    from typing import Any

__version__ = "1.0.0"
PROGRAM = "daemontest.py"


def text_length(text: str) -> str:
    """The service itself, unless --handler names another."""
    return f"your text size: {len(text)}"


class Failure(Exception):
    """What the user is to be told in one line: what failed, and why.  Ends the program with EXIT_STATUS."""

    def __init__(self, told: str, exit_status: int = 1) -> None:
        super().__init__(told)
        self.exit_status = exit_status


@contextmanager
def failing_to(act: str) -> Iterator[None]:
    """Makes an OSError, or a name that cannot be, the Failure to ACT."""
    try:
        yield
    except (OSError, ValueError) as why:
        reason = str(getattr(why, "strerror", None) or why)
        raise Failure(f"cannot {act}: {reason.partition(' (while')[0]}") from why  # create_server() repeats the act


# ---- Settings -----------------------------------------------------------------------

SECONDS, NAME = (0.01, 86400), r"[^\0]+"
STANDARD_ERROR = ""  # the name of the log file with -f
STARTED_IN = "/"
with suppress(FileNotFoundError):  # that directory may have been removed
    STARTED_IN = os.getcwd()


def absolute(path: str) -> str:
    return os.path.join(STARTED_IN, os.path.expanduser(path))


class Setting:
    """How a setting is given, and what it may be: a number within limits, or a text that has a pattern."""

    def __init__(self, default: Any, fits: Any, metavar: str, about: str, *short: str) -> None:
        self.kind: Any = type(default)
        self.default = absolute(default) if metavar == "FILE" else default
        self.fits, self.metavar, self.short = fits, metavar, short
        self.help = about.replace("%", f"{default:g}" if fits is SECONDS else str(default))

    def fitting(self, value: Any) -> Any:
        """VALUE as it is to be.  Raises ValueError, which says what was expected."""
        if self.kind is str:
            good, expected = isinstance(value, str) and re.fullmatch(self.fits, value), f"a string, {self.metavar}"
        else:
            good = type(value) in (int, self.kind) and self.fits[0] <= value <= self.fits[1]  # a bool is no number here
            number = "whole number" if self.kind is int else "number of seconds"
            expected = f"a {number} from {self.fits[0]} to {self.fits[1]}"
        if not good:
            raise ValueError(f"expected {expected}")
        return absolute(value) if self.metavar == "FILE" else self.kind(value)


# Each is a long option and, with _ for -, a key of the configuration file.
SETTINGS = {
    "bind": Setting("", NAME, "ADDRESS", "where to listen (default: every address, IPv4 and IPv6)", "-b"),
    "port": Setting(36000, (1, 65535), "N", "TCP port (default: %)", "-p"),
    "workers": Setting(5, (1, 10000), "N", "pre-forked worker processes (default: %)", "-w"),
    "max_requests": Setting(100, (1, 10**9), "N", "requests until a worker is replaced (default: %)", "-n"),
    "handler": Setting("__main__:text_length", r"\w+(\.\w+)*:\w+", "MODULE:FUNCTION",
                       "the service, a function from text to text (default: the length of the text)"),
    "timeout": Setting(10.0, SECONDS, "SECONDS", "for a client's text, and for its reply (default: %)"),
    "handler_timeout": Setting(30.0, SECONDS, "SECONDS", "for the handler, or its worker is killed (default: %)"),
    "grace": Setting(30.0, SECONDS, "SECONDS", "for workers to finish at a stop or reload (default: %)"),
    "max_text": Setting(2**24, (1, 2**40), "BYTES", "longer texts are refused (default: %)"),
    "pid_file": Setting("~/daemontest.pid", NAME, "FILE", "holds the manager's process ID (default: %)"),
    "log_file": Setting("~/daemontest.log", NAME, "FILE", "the log (default: %; with -f standard error)"),
}
WAIT_FOR_RESTART = ("bind", "port", "pid_file")


def read_settings(options: Namespace) -> Namespace:
    """All settings: the command line over the configuration file over the defaults.  Raises Failure."""
    path = absolute("~/daemontest.toml" if options.config is None else options.config)
    values = {name: setting.default for name, setting in SETTINGS.items()}
    values["directory"] = STARTED_IN  # where the handler is searched for first
    if options.action is foreground:
        values["log_file"] = STANDARD_ERROR
    if options.config is not None or os.path.exists(path):
        import tomllib  # only when it is needed: a fork is dearer by all that has been imported

        with failing_to(f"read configuration {path}"), open(path, "rb") as file:
            content = file.read()
        fault = "expected TOML"
        try:
            for key, value in tomllib.loads(content.decode()).items():
                fault = key
                if key not in SETTINGS:
                    raise ValueError(f"unknown key, expected one of {', '.join(SETTINGS)}")
                values[key] = SETTINGS[key].fitting(value)
        except (ValueError, RecursionError) as why:  # TOML's own and UTF-8's, too
            raise Failure(f"bad configuration {path}: {fault}: {why}") from why
        values["directory"] = os.path.dirname(path)
    values |= {name: given for name, given in vars(options).items() if name in SETTINGS}
    settings = Namespace(**values)
    if settings.pid_file == settings.log_file:
        raise Failure(f"bad settings: pid_file and log_file are both {settings.pid_file}")
    return settings


# ---- Command line -------------------------------------------------------------------


def main() -> None:
    mend_standard_streams()
    options = parse_command_line()
    failure, exit_status = "", 0
    try:
        options.action(options)
    except Failure as why:
        failure, exit_status = str(why), why.exit_status
    except KeyboardInterrupt:
        failure, exit_status = "interrupted", 1
    with suppress(Exception):
        sys.stdout.flush()  # what a handler's module may have printed
    with suppress(OSError):
        os.write(2, f"{PROGRAM}: {printable(failure)}\n".encode() if failure else b"")
    os._exit(exit_status)  # at once: a thread that a handler's module started must not keep it


def mend_standard_streams() -> None:
    """Open those of descriptors 0 to 2 that the parent left closed, before other files take their places."""
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def parse_command_line() -> Namespace:
    """The action, the name of the configuration file, and those settings that are given."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, usage="%(prog)s [-f | -t | --reload | --status | --check] [-c FILE] [SETTING ...]",
        description="A pre-forking TCP service, text in, text out. Without an action it starts in the background.",
        epilog="Each setting is also a key of the configuration file (TOML), with _ for -.", allow_abbrev=False,
        # A width given keeps argparse from importing what finds out the terminal's.
        formatter_class=functools.partial(argparse.HelpFormatter, width=None if {"-h", "--help"} & {*sys.argv} else 80))
    actions = parser.add_mutually_exclusive_group()
    for names, action in ((("-f", "--foreground"), foreground), (("-t", "--terminate"), terminate),
                          (("--reload",), reload), (("--status",), status), (("--check",), check)):
        actions.add_argument(*names, dest="action", action="store_const", const=action, default=background,
                             help=action.__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-c", "--config", metavar="FILE",
                        help="configuration (default: ~/daemontest.toml, if it exists)")
    settings = parser.add_argument_group("settings")
    for name, setting in SETTINGS.items():
        settings.add_argument(*setting.short, f"--{name.replace('_', '-')}", type=setting.kind, help=setting.help,
                              default=argparse.SUPPRESS, metavar=setting.metavar)
    options = parser.parse_args()
    for name in SETTINGS.keys() & vars(options):
        try:
            setattr(options, name, SETTINGS[name].fitting(getattr(options, name)))
        except ValueError as why:
            parser.error(f"--{name.replace('_', '-')}: {why}")
    return options


def say(outcome: str) -> None:
    """Write OUTCOME as a line of standard output.  Raises Failure."""
    with failing_to("write to standard output"):
        print(outcome, file=sys.__stdout__, flush=True)


def status(options: Namespace) -> None:
    """print the process ID of the running service, or exit with 3"""
    pid = running_service(options).read_pid()
    if pid is None:
        raise Failure("not running", exit_status=3)
    say(str(pid))


def terminate(options: Namespace) -> None:
    """stop the service gracefully; return when all its processes are gone"""
    say(f"{PROGRAM} {running_service(options).signal_manager(signal.SIGTERM, wait=True)} Server terminated.")


def running_service(options: Namespace) -> PidFile:
    """The PID file to ask.  A configuration that broke since the start must not keep the service from being stopped."""
    try:
        return PidFile(read_settings(options).pid_file)
    except Failure:
        options.config = os.devnull
        pid_file = PidFile(read_settings(options).pid_file)
        if pid_file.read_pid() is None:
            raise
        return pid_file


def check(options: Namespace) -> None:
    """check the configuration and the handler; start nothing"""
    load_handler(read_settings(options))
    say(f"{PROGRAM}: configuration is good")


def reload(options: Namespace) -> None:
    """check as --check does; if all is good, have the service use it"""
    settings = read_settings(options)
    load_handler(settings)
    say(f"{PROGRAM}: {PidFile(settings.pid_file).signal_manager(signal.SIGHUP)} reloads")


# ---- Start --------------------------------------------------------------------------

UMASK = 0o027
STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
LOOKS = {signal.SIGCHLD, signal.SIGALRM}  # the manager is to look after its workers
LOOP_SIGNALS = STOPS | LOOKS | {signal.SIGHUP}
ALREADY_TOLD = ""


def background(options: Namespace) -> None:
    """start detached; return when the service answers"""
    manager = Manager(options)
    with manager.prepared():
        with failing_to("start"):
            reading, manager.report = os.pipe()
            in_launcher = os.fork()
        if not in_launcher:
            manager.run()
            return
        os.close(manager.report)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, LOOP_SIGNALS)
            report = open(reading, "rb")
            outcome = report.readline()
            if outcome.startswith(b"+"):
                say(f"{PROGRAM}: {outcome[1:-1].decode()}")
                signal.pthread_sigmask(signal.SIG_BLOCK, LOOP_SIGNALS)  # too late to give the start up
                return
        except (Failure, KeyboardInterrupt) as why:  # a start that fails leaves nothing behind
            signal.pthread_sigmask(signal.SIG_BLOCK, LOOP_SIGNALS)
            hangs = isinstance(why, KeyboardInterrupt)  # maybe in the import of a handler, which takes no other signal
            if manager.pid_file.is_at_path():  # otherwise the service there is another's
                with suppress(Failure):
                    manager.pid_file.signal_manager(signal.SIGKILL if hangs else signal.SIGTERM, wait=True)
            raise
        with suppress(OSError):
            os.write(2, outcome + report.read())  # which ends when the manager does
        raise Failure(ALREADY_TOLD if outcome else "cannot start: the manager died")


def foreground(options: Namespace) -> None:
    """serve without detaching, until a signal such as Ctrl-C"""
    manager = Manager(options)
    with manager.prepared():
        manager.run()


def hold_signals() -> None:
    """Block what the manager's loop waits for, and have none of it ignored: that could not be waited for.

    What workers do at TERM is set up here, too, so that it counts from their first moment.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, LOOP_SIGNALS)
    for signum in LOOP_SIGNALS:
        signal.signal(signum, Worker.leave if signum == signal.SIGTERM else lambda *_: None)
        signal.siginterrupt(signum, False)  # for the sake of C code that handlers call


def open_listener(settings: Namespace) -> socket.socket:
    """The one listening socket: the service manager's (sd_listen_fds(3)) or a new one.  Raises Failure."""
    handed_over, for_whom, _ = (os.environ.pop(f"LISTEN_{name}", "") for name in ("FDS", "PID", "FDNAMES"))
    if handed_over and for_whom == str(os.getpid()):
        with suppress(OSError):
            listener = socket.socket(fileno=3)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # refused by what is not TCP
            listener.set_inheritable(False)
            if handed_over == "1" and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return listener
        raise Failure("cannot use LISTEN_FDS: expected one listening TCP socket")
    with failing_to(f"listen on {settings.bind} port {settings.port}".replace("  ", " ")):
        dual = not settings.bind and socket.has_dualstack_ipv6()
        family, address = socket.AF_INET6 if dual else socket.AF_INET, (settings.bind, settings.port)
        if settings.bind:
            found: list[Any] = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
            family, _, _, _, address = min(found)  # IPv4, if the name has such an address
        return socket.create_server(address, family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=dual)


def load_handler(settings: Namespace) -> Callable[[str], str]:
    """Import the handler anew, with its package and what came from its directory.  On Failure nothing has changed."""
    module_name, function_name = settings.handler.split(":")
    modules, path = dict(sys.modules), list(sys.path)
    for name, module in modules.items():
        file, here = str(getattr(module, "__file__", None) or ""), os.path.join(settings.directory, *name.split("."))
        if name != "__main__" and (file.startswith(here) or name.split(".")[0] == module_name.split(".")[0]):
            del sys.modules[name]
    sys.dont_write_bytecode = True  # it is found stale by whole seconds only: a quick edit would go unseen
    importlib.invalidate_caches()
    sys.path[:] = [settings.directory, *(entry for entry in path if entry != settings.directory)]
    try:
        handler: Callable[[str], str] = getattr(importlib.import_module(module_name), function_name)
        if not callable(handler):
            raise TypeError(f"{function_name} is not a function")
    except BaseException as why:  # SystemExit too: a module must not end the manager
        sys.modules.clear()
        sys.modules.update(modules)
        sys.path[:] = path
        reason = type(why).__name__
        with suppress(BaseException):  # an exception of the module's own may fail to say what it is
            reason += f": {why}"
        raise Failure(f"cannot load handler {settings.handler}: {reason}") from why
    return handler


# ---- PID file -----------------------------------------------------------------------


class PidFile(PIDLockFile):  # type: ignore[misc]
    """A PID file whose truth is a flock(2) that the manager holds exclusively, for life.

    That the file exists proves nothing, nor does what stands in it without that lock.  Whoever
    only asks takes the lock shared, for a moment, and so is never mistaken for a manager.
    """

    lock: io.FileIO  # the manager's

    def attempts(self, flags: int) -> Iterator[tuple[io.FileIO, bool]]:
        """The file, open and, unless a manager has it, locked shared until the next attempt.  Raises OSError.

        Goes on for longer than a manager to be, or somebody who only asks, holds a lock.
        """
        end = time.monotonic() + 4.0
        while time.monotonic() < end:
            with open(os.open(self.path, flags | os.O_NONBLOCK, 0o644), "rb", 0) as file:
                yield file, flocked(file, fcntl.LOCK_SH)
            time.sleep(0.002)
        raise OSError("another program keeps it locked")

    def claim(self) -> None:
        """Take the lock for the manager to be.  Raises Failure."""
        with failing_to(f"use PID file {self.path}"):
            for file, free in self.attempts(os.O_RDWR | os.O_CREAT):
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError("not a regular file")
                if not free:
                    raise Failure("cannot start: already running")
                self.lock = io.FileIO(os.dup(file.fileno()), "r+")  # which outlives the attempt, lock and all
                self.lock.truncate(0)  # while no manager can be: so a leftover PID never stands beside its lock
                if flocked(self.lock, fcntl.LOCK_EX) and self.is_at_path():
                    return

    def acquire(self, timeout: float | None = None) -> None:
        """Write the PID of this process, DaemonContext's last.  The lock was claimed before its forks."""
        self.lock.write(b"%d\n" % os.getpid())

    def release(self) -> None:
        """Empty and remove the file.  The lock stays until the process has ended, which is what it tells."""
        if self.is_at_path():
            with suppress(OSError):  # in a directory that lets nothing be removed
                self.lock.truncate(0)
                os.unlink(self.path)

    def is_at_path(self) -> bool:
        """Whether the path still names the file that is locked."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.path))
        return False

    def read_pid(self) -> int | None:
        """PID of the living manager, or None.  Waits until one that is starting has written it.  Raises Failure."""
        with failing_to(f"read PID file {self.path}"), suppress(FileNotFoundError):
            for file, free in self.attempts(os.O_RDONLY):
                if free:
                    return None
                if re.fullmatch(rb"[1-9]\d{0,8}\n", content := file.read(20)):
                    return int(content)
        return None

    def signal_manager(self, signum: signal.Signals, wait: bool = False) -> int:
        """Signal the manager; return its PID, with WAIT when it is gone.  Raises Failure if there is none."""
        with failing_to("signal the manager"), suppress(ProcessLookupError):  # which means that it has just ended
            while (pid := self.read_pid()) is not None:
                if not hasattr(os, "pidfd_open"):  # elsewhere than on Linux
                    os.kill(pid, signum)
                    while wait and self.read_pid() == pid:
                        time.sleep(0.01)
                    return pid
                process = os.pidfd_open(pid)
                if self.read_pid() == pid:  # still the manager: the descriptor, unlike a number, can mean no other
                    signal.pidfd_send_signal(process, signum)
                    if wait:
                        select.select([process], [], [])
                    return pid
        raise Failure("not running")


def flocked(file: io.FileIO, kind: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    return False


# ---- Manager ------------------------------------------------------------------------

RESPAWN_DELAY = 1.0  # s until the place of a worker that died is filled again
NOT_UP, IDLE = -1.0, 0.0


class Child:
    """What the manager knows of a worker."""

    leave_by = math.inf  # when it is killed, once it has been told to leave
    killed_for = ""

    def __init__(self) -> None:
        # Shared with the worker: [0] is NOT_UP, IDLE, or when its handler was called.
        self.busy_since = memoryview(mmap.mmap(-1, 8)).cast("d")
        self.busy_since[0] = NOT_UP


class Manager:
    """Keeps the workers alive.  Signals are data that its loop reads: none is lost, none comes at a bad moment."""

    def __init__(self, options: Namespace) -> None:
        self.options, self.settings = options, read_settings(options)
        with failing_to("start"):
            self.report = os.dup(2)  # read by whoever waits for the start: the terminal's user, or the launcher
        self.pid_file = PidFile(self.settings.pid_file)
        self.notify_socket = os.environ.pop("NOTIFY_SOCKET", "")
        self.children: dict[int, Child] = {}
        self.vacant_until: list[float] = []  # when the places of workers that died may be filled
        self.starting = True  # until all workers have been up
        self.ready = False  # all workers are up, and no old ones left

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """With all that can fail while the terminal can still be told; on a Failure, of WITH's body too, undone.

        In the launcher, too: release() does nothing when the manager has done it.
        """
        os.umask(UMASK)
        signal.pthread_sigmask(signal.SIG_BLOCK, LOOP_SIGNALS)
        self.pid_file.claim()
        try:
            self.listener = open_listener(self.settings)
            self.log_file = open_log(self.settings.log_file, self.report)
            yield
        except (Failure, KeyboardInterrupt):
            self.pid_file.release()
            raise

    def run(self) -> None:
        """Become the daemon and serve until stopped.  Raises Failure, with REPORT as the standard error."""
        hold_signals()
        try:
            with failing_to("become a daemon"):
                DaemonContext(
                    detach_process=self.options.action is background, umask=UMASK, pidfile=self.pid_file,
                    stdout=self.log_file, stderr=self.log_file, signal_map={},
                    files_preserve=[self.listener, self.pid_file.lock, self.report]).open()
            os.set_inheritable(0, True)  # python-daemon opens it anew, and so not for the commands that a handler runs
            self.log_file.close()
            self.printed = sys.stdout = sys.stderr = Printed()
            self.pid = os.getpid()
            self.lifeline, alive = os.pipe()  # the manager's end alone is for writing: end-of-file means it is gone
            self.not_for_workers = [self.pid_file.lock.fileno(), alive, self.report]
            self.serve()
        finally:
            os.dup2(self.report, 2)  # where main() tells a Failure

    def serve(self) -> None:
        log(record("*", f"Daemon Server Started. Prefork Workers: {self.settings.workers}.")
            + record("*", f"Max Requests per Child: {self.settings.max_requests}"))
        try:
            self.load(self.settings)
            os.register_at_fork(after_in_child=lambda: self.worker.forked())
            signum = 0
            while signum not in STOPS:
                if signum == signal.SIGHUP:
                    self.reload()
                self.spawn_missing()
                if not self.ready and all(child.busy_since[0] != NOT_UP and child.leave_by == math.inf
                                          for child in self.children.values()):
                    self.tell_ready()
                signum = self.next_signal()
                if self.starting and self.vacant_until:
                    raise Failure("cannot start: a worker died")
        except Exception as why:
            log(traced(f"Manager Failed: {why}", why.__cause__ or why))
            raise Failure(str(why)) from why
        finally:
            self.notify("STOPPING=1")
            self.dismiss_workers()
            while self.children:
                self.next_signal()
            self.pid_file.release()
            log(record("*", "Server Terminated."))

    def tell_ready(self) -> None:
        self.ready = True
        self.notify(f"READY=1\nMAINPID={self.pid}")
        if self.starting and self.options.action is background:
            workers, port = self.settings.workers, self.listener.getsockname()[1]
            os.write(self.report, f"+{self.pid} started, {workers} workers on port {port}\n".encode())
            os.close(self.report)
            self.not_for_workers.remove(self.report)
            self.report = 0  # the null device: nobody waits any more
        self.starting = False

    def next_signal(self) -> int:
        """Kill the workers that are overdue; wait for a signal, or until something is due; bury those that ended."""
        now, limit = time.monotonic(), self.settings.handler_timeout
        soonest = min([now + limit, *self.vacant_until])  # a handler called in a moment may be due after LIMIT
        for pid, child in self.children.items():
            called = child.busy_since[0]  # read once: the worker writes to it meanwhile
            due = min(child.leave_by, called + limit if called > IDLE else math.inf)
            if due > now:
                soonest = min(soonest, due)
            elif not child.killed_for:
                late = child.leave_by <= now
                child.killed_for = ": not done within the grace" if late else f": handler ran longer than {limit:g} s"
                os.kill(pid, signal.SIGKILL)
        signal.setitimer(signal.ITIMER_REAL, max(soonest - now, 0.001))
        signum = signal.sigwait(LOOKS if self.starting else LOOP_SIGNALS)  # the others count, too, when it has started
        if signum not in LOOKS:
            log(record("*", f"Caught {signal.Signals(signum).name}"))
        for pid in list(self.children):  # and no process that a handler's module waits for
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.bury(pid, status)
        return signum

    def bury(self, pid: int, status: int) -> None:
        child = self.children.pop(pid)
        if status:
            code = os.waitstatus_to_exitcode(status)
            cause = next((name.name for name in signal.Signals if name == -code), f"exit status {code}")
            log(record("*", f"Child Process Died. ({cause}{child.killed_for})", pid))
            if child.leave_by == math.inf:
                self.vacant_until.append(time.monotonic() + RESPAWN_DELAY)

    def dismiss_workers(self) -> None:
        """Tell every worker to leave, within the grace; their successors need not wait."""
        self.vacant_until.clear()
        for pid, child in self.children.items():
            if child.leave_by == math.inf:
                child.leave_by = time.monotonic() + self.settings.grace
                os.kill(pid, signal.SIGTERM)

    def spawn_missing(self) -> None:
        """Fork workers for the empty places.  Raises Failure if that cannot be, and the service is only starting.

        Workers that leave and their successors are no more than twice the number, or one for clients to come.
        """
        if self.vacant_until:
            self.vacant_until = [until for until in self.vacant_until if until > time.monotonic()]
        while True:
            taken, free = len(self.vacant_until), 0
            for child in self.children.values():
                taken += child.leave_by == math.inf
                free += child.busy_since[0] <= IDLE
            if taken >= self.settings.workers or (free and len(self.children) >= 2 * self.settings.workers):
                return
            try:
                self.spawn()
            except OSError as why:
                if self.starting:
                    raise Failure(f"cannot fork a worker: {why.strerror}") from why
                log(record("*", f"cannot fork a worker: {why.strerror}"))
                self.vacant_until += [time.monotonic() + RESPAWN_DELAY] * (self.settings.workers - taken)

    def spawn(self) -> None:
        child = Child()
        if pid := os.fork():
            self.children[pid] = child
            return
        status = 1
        try:
            for descriptor in self.not_for_workers:
                os.close(descriptor)
            self.worker.set_up(child.busy_since)
            if not self.ready and os.getppid() == self.pid:
                os.kill(self.pid, signal.SIGALRM)  # has the manager look whether all are up
            self.worker.run()
            status = 0
        except BaseException as why:
            log(traced("Child Process Failed:", why))
        finally:
            os._exit(status)

    def load(self, settings: Namespace) -> None:
        """Take SETTINGS and their handler.  On Failure nothing has changed."""
        log(record("*", f"Manager Process ID: {self.pid}") + record("*", "Loading configuration."))
        try:
            handler = load_handler(settings)
        finally:
            hold_signals()  # whatever the handler's module has made of them
            self.printed.flush()
        self.settings = settings
        self.worker = Worker(self, handler)
        self.listener.setblocking(False)
        if hasattr(socket, "TCP_DEFER_ACCEPT"):  # the kernel keeps silent clients for this long or longer (tcp(7))
            self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, math.ceil(settings.timeout))
        if not self.starting:
            gc.unfreeze()
            gc.collect()  # the old handler
        gc.freeze()  # a collection in a worker would touch, and so copy, all the memory it shares

    def reload(self) -> None:
        """Take the configuration and the handler anew and replace all workers; if anything is wrong, change nothing."""
        self.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        running = self.settings
        try:
            new = read_settings(self.options)
            with open_log(new.log_file, self.report) as log_file:
                self.load(Namespace(**vars(new) | {key: getattr(running, key) for key in WAIT_FOR_RESTART}))
                os.dup2(log_file.fileno(), 1)
                os.dup2(log_file.fileno(), 2)
        except Failure as why:
            log(record("*", f"Nothing Changed: {printable(str(why))}"))
            if self.ready:
                self.tell_ready()
        else:
            if waiting := [key for key in WAIT_FOR_RESTART if getattr(new, key) != getattr(running, key)]:
                log(record("*", f"Waiting for a Restart: {', '.join(waiting)}"))
            self.ready = False
            self.dismiss_workers()

    def notify(self, state: str) -> None:
        """Tell the service manager, if there is one (sd_notify(3))."""
        if not self.notify_socket:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
                notifier.setblocking(False)
                notifier.sendto(state.encode(), re.sub("^@", "\0", self.notify_socket))
        except OSError as why:
            log(record("*", f"Cannot Notify: {why.strerror or why}"))


# ---- Worker -------------------------------------------------------------------------

RECEIVE_BYTES = 16384  # at once; more no longer stays in the processor's nearest cache
OPEN_SIDE_BYTES = 2000  # what the original read at the most, from clients that keep their sending side open
HOLD_BACK = getattr(socket, "MSG_MORE", 0)  # for the end of the reply and that of the connection to share a packet


class Refused(Exception):
    """Why a client gets no answer to its text; it is told."""


class Worker:
    """Accepts clients one after the other, until its requests are used up or it is told to leave."""

    told_to_leave = False  # by TERM
    connection: socket.SocketType | None = None  # the client in hand, or the last one

    @classmethod
    def leave(cls, *_: object) -> None:
        cls.told_to_leave = True

    def __init__(self, manager: Manager, handler: Callable[[str], str]) -> None:
        """In the manager: what all workers until the next reload have in common."""
        self.manager_pid, self.settings, self.handler = manager.pid, manager.settings, handler
        self.listener, self.lifeline, self.printed = manager.listener, manager.lifeline, manager.printed
        self.kind = self.listener.family, socket.SOCK_STREAM, socket.IPPROTO_TCP  # of accepted sockets
        self.max_text, self.requests_left = self.settings.max_text, self.settings.max_requests

    def set_up(self, busy_since: memoryview[float]) -> None:
        """Make ready what to wait by; let signals in."""
        self.pid, self.busy_since = os.getpid(), busy_since
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGALRM):
            signal.signal(signum, signal.SIG_IGN)
        self.woken, waker = os.pipe()  # so that a signal between the loop's test and its wait ends the wait
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.poller = select.epoll() if hasattr(select, "epoll") else select.poll()
        # A client wakes one of the waiting workers, not all (epoll_ctl(2)).
        self.poller.register(self.listener, select.POLLIN | getattr(select, "EPOLLEXCLUSIVE", 0))
        self.poller.register(self.woken, select.POLLIN)
        self.poller.register(self.lifeline, select.POLLIN)  # ends the wait when the manager is gone
        log(record("*", "Child Process Started."))
        self.busy_since[0] = IDLE

    def forked(self) -> None:
        """In a process that the handler has forked: it can be terminated, and does not keep the client waiting."""
        if self.connection:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self.connection.close()

    def run(self) -> None:
        while self.requests_left and os.getppid() == self.manager_pid:
            try:
                descriptor, address = self.listener._accept()  # type: ignore[attr-defined]  # accept() makes much of it
            except (BlockingIOError, ConnectionAbortedError):
                if self.told_to_leave:  # and only now: a client may have woken this worker, and so no other
                    break
                if (self.woken, select.POLLIN) in self.poller.poll():
                    os.read(self.woken, 512)
                continue
            self.connection = socket.SocketType(*self.kind, descriptor)
            self.serve(self.connection, address[0].removeprefix("::ffff:"))
            self.connection.close()  # which sends what was held back, in one packet with the end
            if self.told_to_leave:
                break
        if self.told_to_leave:
            log(record("*", "Caught SIGTERM"))
        log(record("*", f"Child Process Ended. ({self.requests_left})"))

    def serve(self, connection: socket.SocketType, client: str) -> None:
        """One request.  A client that leaves without having sent a byte is none."""
        connection.setblocking(False)  # whatever default the handler's module has set
        records, half_closed = record("-", "Client Query Processing Started.", self.pid), False
        try:
            try:
                data, half_closed = self.receive(connection)
                if not data and not half_closed:
                    return
                text = data.decode()
                records += record("-", f"Client: {client}; Received Text:", self.pid) + indented(text[:LOGGED])
                if len(text) > LOGGED:
                    records += record("-", f"Logged {LOGGED} of {len(text)} Characters.")
                log(records)
                records = ""
                reply = self.handle(text)
            except (Refused, UnicodeDecodeError) as why:
                reason = why if isinstance(why, Refused) else f"text is not UTF-8 at byte offset {why.start}"
                log(records + record("-", f"Client: {client}; Refused: {reason}."))
                records, reply = "", f"error: {reason}".encode()
            self.requests_left -= 1
            self.answer(connection, b"%d %b\n" % (self.pid, reply), half_closed)
        except OSError as why:
            lost = "Lost" if records else "Reply Not Taken"  # what is not logged yet tells that the text had not come
            log(records + record("-", f"Client: {client}; {lost}: {why.strerror or why}."))
        log(record("-", "Client Query Processing Ended.", self.pid))

    def receive(self, connection: socket.SocketType) -> tuple[bytearray, bool]:
        """What the client sent, and whether it half-closed.  Raises Refused, OSError."""
        text, deadline = bytearray(), math.inf
        while len(text) <= self.max_text:
            try:
                piece = connection.recv(RECEIVE_BYTES)
                if not piece:
                    return text, True
                text += piece
            except BlockingIOError:
                now = time.monotonic()
                deadline = min(deadline, now + self.settings.timeout)
                silence = deadline - now
                if 0 < len(text) <= OPEN_SIDE_BYTES:
                    silence = min(silence, 0.1 if text.endswith(b"\n") else 1.0)
                if (text or not deferred_in_vain(connection)) and readable(connection, silence):
                    continue
                if not text or silence < deadline - now:
                    return text, False
                raise Refused(f"text not ended within {self.settings.timeout:g} s") from None
        raise Refused(f"text longer than {self.max_text} bytes")

    def handle(self, text: str) -> bytes:
        """The handler's reply.  Raises Refused, whatever the handler raises."""
        self.busy_since[0] = time.monotonic()
        sys.stdout = sys.stderr = self.printed  # whatever an earlier call has made of them
        try:
            reply = self.handler(text)
            if not isinstance(reply, str):
                raise TypeError(f"handler returned {type(reply).__name__}, expected str")
            return str.encode(reply)
        except BaseException as why:  # SystemExit too: no text ends a worker
            log(traced("Handler Failed:", why))
            raise Refused("handler failed") from None
        finally:
            self.busy_since[0] = IDLE
            if self.printed.used:
                self.printed.flush()

    def answer(self, connection: socket.SocketType, reply: bytes, half_closed: bool) -> None:
        """Send REPLY, and let it arrive, within the timeout each.  Raises OSError."""
        try:
            sent = connection.send(reply, HOLD_BACK)  # nearly always all of it
        except BlockingIOError:
            sent = 0
        if sent < len(reply):
            connection.settimeout(self.settings.timeout)
            connection.sendall(memoryview(reply)[sent:])
        if not half_closed:  # to close with data unread resets the connection (RFC 2525, 2.17), reply and all
            connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + self.settings.timeout
            while readable(connection, min(1.0, deadline - time.monotonic())) and connection.recv(RECEIVE_BYTES):
                pass


def readable(connection: socket.SocketType, seconds: float) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(max(0.0, seconds) * 1000))


def deferred_in_vain(connection: socket.SocketType) -> bool:
    """Whether the kernel has already waited for first bytes, and given up: only then did it repeat its SYN-ACK.

    How often it did is tcpi_total_retrans, at byte 100 of Linux's struct tcp_info.
    """
    return hasattr(socket, "TCP_DEFER_ACCEPT") and any(
        connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100:])


# ---- Log ----------------------------------------------------------------------------

LOGGED = 2000  # characters of a client's text


def open_log(name: str, terminal: int) -> io.FileIO:
    """The log file, for its owner and group only; or TERMINAL, the standard error with -f.  Raises Failure."""
    with failing_to(f"open log file {name}"):
        if name == STANDARD_ERROR:
            return io.FileIO(os.dup(terminal), "wb")
        return io.FileIO(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o640), "ab")


def log(records: str) -> None:
    """Write whole records at once to standard error, which is the log."""
    try:
        os.write(2, records.encode(errors="backslashreplace"))
    except OSError:
        pass  # a log that cannot be written costs records, never service


def record(mark: str, message: str, pid: int = 0) -> str:
    """A line of the log: MARK is * for the life of processes, - for requests.  MESSAGE must be printable."""
    return f"{timestamp(time.time_ns() // 1_000_000)} {mark} {pid or os.getpid()} {message}\n"


@functools.lru_cache(maxsize=1)  # several records share a moment, and many a second
def timestamp(milliseconds: int) -> str:
    second, millisecond = divmod(milliseconds, 1000)
    return whole_second(second) % millisecond


@functools.lru_cache(maxsize=1)
def whole_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.%%03d%z", time.localtime(second))


def indented(text: str) -> str:
    """TEXT as lines that can neither be mistaken for records nor drive a terminal."""
    return "    " + printable(text.removesuffix("\n"), "\n\u3000").replace("\n", "\n    ") + "\n" if text else ""


def printable(text: str, kept: str = "\u3000") -> str:
    """TEXT with all that does not show itself, but for the KEPT, written as in a Python string literal."""
    if text.replace(kept[0], "").isprintable() and "\\" not in text:
        return text
    return "".join(c if c in kept or (c.isprintable() and c != "\\") else c.encode("unicode_escape").decode()
                   for c in text)


def traced(message: str, why: BaseException) -> str:
    trace = [f"{type(why).__name__}, which cannot be told"]
    with suppress(BaseException):  # an exception of the handler's own may fail to say what it is
        trace = traceback.format_exception(why)
    return record("*", printable(message)) + indented("".join(trace))


class Printed(io.TextIOWrapper):
    """Standard output and error of handlers: each line becomes a record of the log.  Not theirs to take apart."""

    used = False  # as long as there is nothing to flush

    def __init__(self) -> None:
        super().__init__(PrintedRecords(), "utf-8", "backslashreplace", line_buffering=True)  # type: ignore[arg-type]

    def write(self, text: str) -> int:
        self.used = True
        return super().write(text)

    def detach(self) -> Any:
        return self.buffer


class PrintedRecords(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, data: Any) -> int:
        log(record("-", "Printed:") + indented(bytes(data).decode(errors="backslashreplace")))
        return len(data)

    def close(self) -> None:
        pass  # the next request is to find it open, whatever wrapper around it has been closed


if __name__ == "__main__":
    main()
