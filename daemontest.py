#!/usr/bin/env python3
"""daemontest: a pre-forking UNIX daemon that answers each text with its length.

One manager process keeps a number of worker processes alive.  All of them accept
connections on the one listening socket that the manager opened; each connection
brings one text and takes one reply.  To serve something else, write a function
from text to text and name it with --handler; text_length() below is the default.

Signals to the manager:  TERM, INT, QUIT  stop gracefully
                         HUP              reload configuration, handler and log file
Signals to a worker:     TERM             finish the request in hand, leave, be replaced

Exit status: 0 done, 1 failed (one line on stderr says why), 2 wrong usage,
3 --status and not running.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import fcntl
import gc
import importlib
import io
import math
import mmap
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
import tomllib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from daemon import DaemonContext
from lockfile import AlreadyLocked
from lockfile.pidlockfile import PIDLockFile

__version__ = "1.0.0"
PROGRAM = "daemontest.py"

Handler = Callable[[str], str]


def text_length(text: str) -> str:
    """The service itself, unless --handler names another."""
    return f"your text size: {len(text)}"


class Failure(Exception):
    """Something the user is to be told in one line: what failed, and why."""


# ---- Settings -----------------------------------------------------------------------

Check = Callable[[object], Any]


def whole(low: int, high: int) -> Check:
    def check(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return value

    return check


def seconds(value: object) -> float:
    if type(value) not in (int, float) or not 0.001 <= value <= 86400:  # type: ignore[operator]
        raise ValueError("expected a number of seconds from 0.001 to 86400")
    return float(value)  # type: ignore[arg-type]


def word(expected: str, pattern_holds: Callable[[str], bool]) -> Check:
    def check(value: object) -> str:
        if not isinstance(value, str) or "\0" in value or not pattern_holds(value):
            raise ValueError(f"expected {expected}")
        return value

    return check


def is_handler(value: str) -> bool:
    module, colon, function = value.partition(":")
    return bool(colon) and function.isidentifier() and all(n.isidentifier() for n in module.split("."))


file_name = word("a file name", bool)


def setting(check: Check, default: Any, metavar: str, help: str, short: str = "") -> Any:
    return field(default=default, metadata={"check": check, "metavar": metavar, "help": help, "short": short})


@dataclass(frozen=True)
class Settings:
    """Every setting: a long option and, with _ for -, a key of the configuration file."""

    bind: str = setting(word("an address", bool), "", "ADDRESS",
                        "where to listen (default: every address, IPv4 and IPv6)", "-b")
    port: int = setting(whole(1, 65535), 36000, "N", "TCP port", "-p")
    workers: int = setting(whole(1, 10_000), 5, "N", "pre-forked worker processes", "-w")
    max_requests: int = setting(whole(1, 10**9), 100, "N", "requests after which a worker is replaced", "-n")
    handler: str = setting(word("MODULE:FUNCTION", is_handler), "__main__:text_length", "MODULE:FUNCTION",
                           "the service: a function from text to text (default: the text's length)")
    timeout: float = setting(seconds, 10.0, "SECONDS",
                             "time for a client to deliver its text, and to take its reply")
    handler_timeout: float = setting(seconds, 30.0, "SECONDS",
                                     "a worker whose handler runs longer is killed and replaced")
    grace: float = setting(seconds, 30.0, "SECONDS",
                           "time for workers to finish at a stop or reload before they are killed")
    max_text: int = setting(whole(1, 2**40), 16 * 2**20, "BYTES", "longer texts are refused")
    pid_file: str = setting(file_name, "~/daemontest.pid", "FILE", "holds the manager's process ID")
    log_file: str = setting(file_name, "~/daemontest.log", "FILE",
                            "the log (default: ~/daemontest.log; with -f standard error)")


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
FIXED_WHILE_RUNNING = ("bind", "port", "pid_file")
STANDARD_ERROR = ""  # the log file's name with -f


@dataclass(frozen=True)
class Invocation:
    """The command line, and the directory it was given in."""

    action: Callable[[Invocation], int]
    config: str | None
    given: dict[str, Any]
    directory: str

    def path(self, name: str) -> str:
        """NAME as seen from the directory where the command was started."""
        expanded = os.path.expanduser(name)
        if expanded.startswith("~"):
            raise Failure(f"cannot use {name}: no home directory is known")
        return os.path.join(self.directory, expanded)

    def config_file(self) -> str | None:
        if self.config is not None:
            return self.path(self.config)
        default = os.path.expanduser("~/daemontest.toml")
        return default if os.path.exists(default) else None

    def handler_directory(self) -> str:
        return os.path.dirname(self.config_file() or "") or self.directory

    def settings(self, use_file: bool = True) -> Settings:
        """The command line over the configuration file over the defaults.  Raises Failure."""
        config_file = self.config_file() if use_file else None
        values = (read_config(config_file) if config_file else {}) | self.given
        if self.action is foreground:
            values.setdefault("log_file", STANDARD_ERROR)
        settings = Settings(**values)
        return dataclasses.replace(
            settings, pid_file=self.path(settings.pid_file),
            log_file=settings.log_file and self.path(settings.log_file))


def read_config(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as why:
        raise Failure(f"cannot read configuration {path}: {why.strerror}") from why
    except ValueError as why:  # bad TOML, or not UTF-8
        raise Failure(f"cannot read configuration {path}: expected TOML: {why}") from why
    for key, value in values.items():
        if key not in FIELDS:
            raise Failure(f"bad configuration {path}: unknown key {key}: expected one of {', '.join(FIELDS)}")
        try:
            values[key] = FIELDS[key].metadata["check"](value)
        except ValueError as why:
            raise Failure(f"bad configuration {path}: {key}: {why}") from why
    return values


# ---- Command line -------------------------------------------------------------------


def main() -> int:
    mend_standard_streams()
    invocation = parse_command_line()
    try:
        return invocation.action(invocation)
    except Failure as why:
        print(f"{PROGRAM}: {printable(str(why))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130


def mend_standard_streams() -> None:
    """Open what the parent left closed of descriptors 0 to 2, or the next files opened would take their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def parse_command_line() -> Invocation:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, allow_abbrev=False,
        usage="%(prog)s [-f | -t | --reload | --status | --check] [-c FILE] [SETTING ...]",
        description="A pre-forking TCP service: a text in, a text out. Without an action, starts in the background.",
        epilog="Each setting is also a key of the configuration file (TOML), with _ for -.")
    actions = parser.add_argument_group("actions").add_mutually_exclusive_group()
    for names, action, what in (
            (("-f", "--foreground"), foreground, "serve without detaching; Ctrl-C stops"),
            (("-t", "--terminate"), terminate, "stop gracefully; return when all processes are gone"),
            (("--reload",), reload, "check the configuration; if it is good, make the service use it"),
            (("--status",), status, "print the manager's process ID, or exit with 3"),
            (("--check",), check, "check the configuration and the handler, start nothing")):
        actions.add_argument(*names, dest="action", action="store_const", const=action, default=background, help=what)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-c", "--config", metavar="FILE",
                        help="configuration file (default: ~/daemontest.toml if it exists)")
    options = parser.add_argument_group("settings")
    for name, described in FIELDS.items():
        about = described.metadata
        default = "" if "(default" in about["help"] else f" (default: {described.default})"
        options.add_argument(*filter(None, (about["short"], "--" + name.replace("_", "-"))),
                             type=from_command_line(described), default=argparse.SUPPRESS,
                             metavar=about["metavar"], help=about["help"] + default)
    given = vars(parser.parse_args())
    try:
        directory = os.getcwd()
    except OSError:
        directory = "/"  # the directory has been removed: only absolute names can be meant
    return Invocation(given.pop("action"), given.pop("config"), given, directory)


def from_command_line(described: dataclasses.Field[Any]) -> Callable[[str], Any]:
    def convert(argument: str) -> Any:
        value: object = argument
        if not isinstance(described.default, str):
            for number in (int, float):
                try:
                    value = number(argument)
                    break
                except ValueError:
                    continue  # the check says what is expected
        try:
            return described.metadata["check"](value)
        except ValueError as why:
            raise argparse.ArgumentTypeError(str(why)) from why

    return convert


def status(invocation: Invocation) -> int:
    pid = running_service(invocation).read_pid()
    if pid is None:
        print(f"{PROGRAM}: not running", file=sys.stderr)
        return 3
    say(f"{pid}")
    return 0


def terminate(invocation: Invocation) -> int:
    pid = running_service(invocation).signal_manager(signal.SIGTERM, wait=True)
    say(f"{PROGRAM} {pid} Server terminated.")
    return 0


def check(invocation: Invocation) -> int:
    load_handler(invocation.settings(), invocation.handler_directory())
    say(f"{PROGRAM}: configuration is good")
    return 0


def reload(invocation: Invocation) -> int:
    settings = invocation.settings()
    load_handler(settings, invocation.handler_directory())
    pid = PidFile(settings.pid_file).signal_manager(signal.SIGHUP)
    say(f"{PROGRAM}: {pid} reloading")
    return 0


def running_service(invocation: Invocation) -> PidFile:
    """The PID file to ask.  A configuration broken since the start keeps nobody from stopping the service."""
    try:
        return PidFile(invocation.settings().pid_file)
    except Failure:
        pid_file = PidFile(invocation.settings(use_file=False).pid_file)
        if pid_file.read_pid() is None:
            raise
        return pid_file


def say(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError as why:
        sys.stdout = open(os.devnull, "w")  # or the interpreter tries again at its end
        raise Failure(f"cannot write to standard output: {why.strerror}") from why


# ---- Start --------------------------------------------------------------------------

UMASK = 0o027
LOOP_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM}


def background(invocation: Invocation) -> int:
    """Start detached; return when the service answers, or raise Failure with nothing left behind."""
    manager = Manager(invocation)
    reading, report = os.pipe()
    try:
        child = os.fork()
    except OSError as why:
        manager.pid_file.release()
        raise Failure(f"cannot fork: {why.strerror}") from why
    if child == 0:
        os.close(reading)
        try:
            manager.run(True, report)
        except Failure as why:
            os.write(report, f"-{printable(str(why))}\n".encode())
        except BaseException as why:
            log(traced("Manager Failed:", why))
        finally:
            os._exit(0)
    os.close(report)
    # From here Ctrl-C gives up: the manager then finds the pipe broken, and ends.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LOOP_SIGNALS)
    with open(reading, "rb") as reports:
        outcome = reports.readline().decode().rstrip("\n")
    os.waitpid(child, 0)
    if not outcome.startswith("+"):
        manager.pid_file.release()
        raise Failure(outcome[1:] or "cannot start: the manager died")
    say(f"{PROGRAM}: {outcome[1:]}")
    return 0


def foreground(invocation: Invocation) -> int:
    """Serve without detaching, until a signal stops it."""
    manager = Manager(invocation)
    terminal = os.dup(2)
    try:
        manager.run(False, terminal)
    except Failure as why:
        os.write(terminal, f"{PROGRAM}: {printable(str(why))}\n".encode())
        return 1
    return 0


def open_listener(settings: Settings) -> socket.socket:
    """The one listening socket: the service manager's (sd_listen_fds(3)) or a new one.  Raises Failure."""
    handed_over = os.environ.pop("LISTEN_FDS", "0")
    os.environ.pop("LISTEN_FDNAMES", None)
    if os.environ.pop("LISTEN_PID", "") == str(os.getpid()) and handed_over != "0":
        return take_listener(handed_over)
    where = f"{settings.bind} port {settings.port}" if settings.bind else f"port {settings.port}"
    try:
        if settings.bind:
            found = socket.getaddrinfo(settings.bind, settings.port, type=socket.SOCK_STREAM)
            family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
            return socket.create_server(address, family=family, backlog=socket.SOMAXCONN)
        try:
            return socket.create_server(("::", settings.port), family=socket.AF_INET6,
                                        backlog=socket.SOMAXCONN, dualstack_ipv6=True)
        except OSError as why:
            if why.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            return socket.create_server(("0.0.0.0", settings.port), backlog=socket.SOMAXCONN)  # IPv6 is off
    except socket.gaierror as why:
        raise Failure(f"cannot listen on {where}: {why.strerror}") from why
    except OSError as why:  # create_server() puts the address into strerror, with brackets
        raise Failure(f"cannot listen on {where}: {os.strerror(why.errno or 0)}") from why


def take_listener(number: str) -> socket.socket:
    try:
        listener = socket.socket(fileno=3)
        good = (number == "1" and listener.type == socket.SOCK_STREAM
                and listener.family in (socket.AF_INET, socket.AF_INET6)
                and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        good = False
    if not good:
        raise Failure("cannot use what LISTEN_FDS hands over: expected one listening TCP socket")
    listener.set_inheritable(False)
    return listener


def defer_silent_clients(listener: socket.socket, timeout: float) -> None:
    """Let the kernel keep connections until their first bytes come, for TIMEOUT s or somewhat longer (tcp(7))."""
    listener.setblocking(False)
    if hasattr(socket, "TCP_DEFER_ACCEPT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, math.ceil(timeout))


def load_handler(settings: Settings, directory: str) -> Handler:
    """Import the handler, its package and what came from DIRECTORY anew.  On Failure nothing has changed."""
    module_name, function_name = settings.handler.split(":")
    modules, path = dict(sys.modules), list(sys.path)
    for name, module in modules.items():
        file = getattr(module, "__file__", None) or "/"
        depth = name.count(".") + hasattr(module, "__path__") + 1
        own = os.path.join(directory, *file.split("/")[-depth:]) == file
        if name != "__main__" and (own or name.split(".")[0] == module_name.split(".")[0]):
            del sys.modules[name]
    sys.dont_write_bytecode = True  # bytecode is compared by whole seconds: a quick edit would go unseen
    importlib.invalidate_caches()
    sys.path[:] = [directory, *(entry for entry in path if entry != directory)]
    try:
        handler: Handler = getattr(importlib.import_module(module_name), function_name)
        if not callable(handler):
            raise TypeError(f"{function_name} is not a function")
    except BaseException as why:  # SystemExit too: a module must not end the manager
        sys.modules.clear()
        sys.modules.update(modules)
        sys.path[:] = path
        raise Failure(f"cannot load handler {settings.handler}: {type(why).__name__}: {why}") from why
    return handler


# ---- PID file -----------------------------------------------------------------------


class PidFile(PIDLockFile):  # type: ignore[misc]
    """A PID file whose truth is a flock(2) that the manager holds exclusively for life.

    That the file exists proves nothing, nor does what stands in it without that lock.  Whoever
    only asks takes the lock shared, for a moment, and so is never mistaken for a manager.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.descriptor = -1

    def claim(self) -> None:
        """Take the lock for the manager to be.  Raises AlreadyLocked, OSError."""
        while self.descriptor < 0:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise OSError(errno.EINVAL, "not a regular file")
                if not flocked(descriptor, fcntl.LOCK_SH):
                    raise AlreadyLocked(self.path)
                # Emptied while no manager can be: so a leftover PID never stands beside an exclusive lock.
                os.ftruncate(descriptor, 0)
                if flocked(descriptor, fcntl.LOCK_EX) and self.is_at_path(descriptor):
                    self.descriptor = descriptor
            finally:
                if self.descriptor != descriptor:
                    os.close(descriptor)

    def acquire(self, timeout: float | None = None) -> None:
        """Write this process's PID under the lock, claimed here or before a fork."""
        self.claim()
        os.pwrite(self.descriptor, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Remove the file.  The lock lasts until the process ends, so that it tells of all of its life."""
        if self.is_at_path(self.descriptor):
            os.unlink(self.path)

    def is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def read_pid(self) -> int | None:
        """PID of the living manager, or None.  Waits for one that is starting to write it.  Raises Failure."""
        patience = time.monotonic() + 10
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as why:
            raise Failure(f"cannot read PID file {self.path}: {why.strerror}") from why
        try:
            while not flocked(descriptor, fcntl.LOCK_SH):
                if pid := os.pread(descriptor, 20, 0):
                    return int(pid)
                if time.monotonic() > patience:
                    raise Failure(f"cannot read PID file {self.path}: locked, but empty")
                time.sleep(0.01)
            return None
        finally:
            os.close(descriptor)

    def is_locked(self) -> bool:
        return self.read_pid() is not None

    def i_am_locking(self) -> bool:
        return self.read_pid() == os.getpid()

    def break_lock(self) -> NoReturn:
        raise NotImplementedError("only a living manager holds the lock, and its lock is never broken")

    def signal_manager(self, number: signal.Signals, wait: bool = False) -> int:
        """Signal the manager; return its PID, with WAIT when it is gone.  Raises Failure if there is none."""
        try:
            while (pid := self.read_pid()) is not None:
                if not hasattr(os, "pidfd_open"):
                    os.kill(pid, number)
                    while wait and self.read_pid() == pid:
                        time.sleep(0.01)
                    return pid
                process = os.pidfd_open(pid)
                if self.read_pid() == pid:  # still the manager's, so the descriptor, unlike the number, is for good
                    signal.pidfd_send_signal(process, number)
                    select.select([process] if wait else [], [], [], None if wait else 0)
                    return pid
                os.close(process)
        except ProcessLookupError:
            pass  # gone in the meantime
        except OSError as why:
            raise Failure(f"cannot signal {pid}: {why.strerror}") from why
        raise Failure("not running")


def flocked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ---- Manager ------------------------------------------------------------------------

RESPAWN_DELAY = 1.0  # s until the place of a worker that died is filled again


@dataclass
class Child:
    """What the manager knows of a worker."""

    busy_since: Any  # one double shared with the worker: time.monotonic() of its handler's call, or 0
    leave_by: float = math.inf  # when it is killed, having been told to leave
    killed_for: str = ""

    def deadline(self, handler_timeout: float) -> tuple[float, str]:
        """When it is to be killed, as far as can be told now, and what for."""
        handler_ends = self.busy_since[0] + handler_timeout if self.busy_since[0] else math.inf
        return min((handler_ends, f"handler ran longer than {handler_timeout:g} s"),
                   (self.leave_by, "not done within its grace"))


class Manager:
    """Keeps the workers alive.  Signals are data that its loop reads, so none is lost or comes at a bad moment."""

    def __init__(self, invocation: Invocation) -> None:
        """Make ready all that can fail while the terminal can still be told.  Raises Failure."""
        os.umask(UMASK)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, LOOP_SIGNALS)
        self.invocation = invocation
        self.settings = invocation.settings()
        self.notify_socket = os.environ.pop("NOTIFY_SOCKET", "")
        self.children: dict[int, Child] = {}
        self.vacant_until: list[float] = []  # for each place that is not to be filled at once
        self.pid_file = PidFile(self.settings.pid_file)
        try:
            self.pid_file.claim()
        except AlreadyLocked as why:
            raise Failure("cannot start: already running") from why
        except OSError as why:
            raise Failure(f"cannot use PID file {self.settings.pid_file}: {why.strerror}") from why
        try:
            self.listener = open_listener(self.settings)
            defer_silent_clients(self.listener, self.settings.timeout)
            self.log_file = open_log(self.settings.log_file)
        except Failure:
            self.pid_file.release()
            raise

    def run(self, detach: bool, report: int) -> None:
        """Become the daemon and serve until told to stop.

        REPORT, a descriptor, is told of a start that succeeded and then closed; one that fails raises Failure.
        """
        context = DaemonContext(
            detach_process=detach, umask=UMASK, working_directory="/", prevent_core=True,
            signal_map={number: lambda *_: None for number in LOOP_SIGNALS} | {signal.SIGPIPE: None},
            files_preserve=[self.listener, self.pid_file.descriptor, report],
            stdin=None, stdout=self.log_file, stderr=self.log_file, pidfile=self.pid_file)
        try:
            context.open()
            self.log_file.close()
            sys.stdout = sys.stderr = printed_to_log()
            self.start(report)
            if detach:
                os.write(report, f"+{os.getpid()} started, {self.settings.workers} workers"
                                 f" on port {self.listener.getsockname()[1]}\n".encode())
            os.close(report)
            self.for_manager.remove(report)
        except Exception as why:
            if context.is_open:
                log(traced("Start Failed:", why))
                self.stop()
            self.pid_file.release()
            raise why if isinstance(why, Failure) else Failure(f"cannot start: {why}") from why
        try:
            self.notify(f"READY=1\nMAINPID={os.getpid()}")
            self.serve()
        finally:
            self.stop()
            context.close()

    def start(self, report: int) -> None:
        """Load the handler and fork the workers; return when they are up.  Raises Failure, OSError."""
        log(record("*", f"Daemon Server Started. Prefork Workers: {self.settings.workers}.")
            + record("*", f"Max Requests per Child: {self.settings.max_requests}")
            + record("*", f"Manager Process ID: {os.getpid()}") + record("*", "Loading configuration."))
        self.handler = load_handler(self.settings, self.invocation.handler_directory())
        self.lifeline, alive = os.pipe()  # only the manager has the writing end: its end-of-file means it is gone
        reading, self.up = os.pipe()
        self.for_manager = [self.pid_file.descriptor, alive, report, reading]
        self.spawn_missing()
        os.close(self.up)
        self.up = -1
        with open(reading, "rb") as ups:
            if len(ups.read(self.settings.workers)) < self.settings.workers:
                raise Failure("cannot start: a worker died at once")
        self.for_manager.remove(reading)

    def serve(self) -> None:
        while True:
            try:
                self.spawn_missing()
            except OSError as why:
                log(record("*", f"Cannot Fork: {why.strerror}"))
                self.vacant_until.append(time.monotonic() + RESPAWN_DELAY)
            match self.next_signal():
                case signal.SIGHUP:
                    self.reload()
                case signal.SIGTERM | signal.SIGINT | signal.SIGQUIT:
                    return

    def stop(self) -> None:
        self.notify("STOPPING=1")
        self.retire_all()
        while self.children:
            self.next_signal()
        log(record("*", "Server Terminated."))

    def next_signal(self) -> int:
        """Wait for a signal, or until a worker is overdue or a place to be filled; see to the workers."""
        now = time.monotonic()
        limit = self.settings.handler_timeout
        # No handler called after this look is overdue before the next.
        due = min([now + limit, *self.vacant_until, *(c.deadline(limit)[0] for c in self.children.values())])
        signal.setitimer(signal.ITIMER_REAL, max(due - now, 0.001))
        number = signal.sigwait(LOOP_SIGNALS)
        if number == signal.SIGCHLD:
            self.reap()
        elif number != signal.SIGALRM:
            log(record("*", f"Caught {signal.Signals(number).name}"))
        self.kill_overdue()
        return number

    def spawn_missing(self) -> None:
        """Fork workers up to their number.  Raises OSError."""
        now = time.monotonic()
        self.vacant_until = [until for until in self.vacant_until if until > now]
        staying = sum(child.leave_by == math.inf for child in self.children.values())
        missing = self.settings.workers - staying - len(self.vacant_until)
        room = 2 * self.settings.workers - len(self.children)
        for _ in range(min(missing, room)):
            self.spawn()

    def spawn(self) -> None:
        busy_since = memoryview(mmap.mmap(-1, 8)).cast("d")
        pid = os.fork()
        if pid:
            self.children[pid] = Child(busy_since)
            return
        status = 1
        try:
            for descriptor in self.for_manager:
                os.close(descriptor)
            Worker(self.listener, self.settings, self.handler, busy_since).run(self.lifeline, self.up)
            status = 0
        except BaseException as why:
            log(traced("Child Process Failed:", why))
        finally:
            os._exit(status)

    def reap(self) -> None:
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            child = self.children.pop(pid, None)
            if child and status:  # the others are workers that left, and what the handler's module started
                cause = os.waitstatus_to_exitcode(status)
                name = f"exit status {cause}" if cause > 0 else signal.Signals(-cause).name
                log(record("*", f"Child Process Died. ({': '.join(filter(None, (name, child.killed_for)))})", pid))
                if child.leave_by == math.inf:
                    self.vacant_until.append(time.monotonic() + RESPAWN_DELAY)

    def retire_all(self) -> None:
        """Tell every worker to leave; those not done within the grace are killed."""
        for pid, child in self.children.items():
            if child.leave_by == math.inf:
                child.leave_by = time.monotonic() + self.settings.grace
                os.kill(pid, signal.SIGTERM)

    def kill_overdue(self) -> None:
        for pid, child in self.children.items():
            due, reason = child.deadline(self.settings.handler_timeout)
            if due <= time.monotonic() and not child.killed_for:
                child.killed_for = reason
                os.kill(pid, signal.SIGKILL)

    def reload(self) -> None:
        """Take the new configuration and handler, and replace all workers; if anything is wrong, change nothing."""
        log(record("*", f"Manager Process ID: {os.getpid()}") + record("*", "Loading configuration."))
        self.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            new = self.invocation.settings()
            with open_log(new.log_file) as log_file:
                self.handler = load_handler(new, self.invocation.handler_directory())
                os.dup2(log_file.fileno(), 1)
                os.dup2(log_file.fileno(), 2)
        except Failure as why:
            log(record("*", f"Nothing Changed: {why}"))
        else:
            kept = {key: getattr(self.settings, key) for key in FIXED_WHILE_RUNNING}
            self.settings = dataclasses.replace(new, **kept)
            if waiting := [key for key in kept if getattr(new, key) != kept[key]]:
                log(record("*", f"Waiting for a Restart: {', '.join(waiting)}"))
            defer_silent_clients(self.listener, new.timeout)
            self.retire_all()
        self.notify("READY=1")

    def notify(self, state: str) -> None:
        """Tell the service manager, if there is one (sd_notify(3))."""
        if self.notify_socket:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
                try:
                    notifier.sendto(state.encode(), self.notify_socket.replace("@", "\0", 1)
                                    if self.notify_socket.startswith("@") else self.notify_socket)
                except OSError as why:
                    log(record("*", f"Cannot Notify: {why.strerror}"))


# ---- Worker -------------------------------------------------------------------------


class Worker:
    """Accepts clients one after the other, until its requests are used up or it is told to leave."""

    def __init__(self, listener: socket.socket, settings: Settings, handler: Handler, busy_since: Any) -> None:
        self.listener = listener
        self.settings = settings
        self.handler = handler
        self.busy_since = busy_since
        self.left = settings.max_requests
        self.told_to_leave = False

    def run(self, lifeline: int, up: int) -> None:
        manager = os.getppid()
        poller = self.prepare(lifeline)
        log(record("*", "Child Process Started."))
        if up >= 0:
            os.write(up, b".")
            os.close(up)
        # Asking for the parent costs less than asking the lifeline, which only ends the wait.
        while self.left and not self.told_to_leave and os.getppid() == manager:
            try:
                connection, address = self.listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                for descriptor, _ in poller.poll():
                    if descriptor == self.woken:
                        os.read(self.woken, 512)
                continue
            with connection:
                self.serve(connection, address[0].removeprefix("::ffff:"))
        if self.told_to_leave:
            log(record("*", "Caught SIGTERM"))
        log(record("*", f"Child Process Ended. ({self.left})"))

    def prepare(self, lifeline: int) -> select.epoll | select.poll:
        """Set up the signals, then let them through; return what ends the wait for a client."""
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, self.on_sigterm)
        signal.siginterrupt(signal.SIGTERM, False)  # for the sake of C code in handlers
        # A signal that comes between the loop's test and its wait must still end the wait.
        self.woken, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        poller = select.epoll() if hasattr(select, "epoll") else select.poll()
        # Each client wakes one idle worker, not all (epoll_ctl(2)).
        poller.register(self.listener, select.POLLIN | getattr(select, "EPOLLEXCLUSIVE", 0))
        poller.register(self.woken, select.POLLIN)
        poller.register(lifeline, select.POLLIN)
        return poller

    def on_sigterm(self, *_: object) -> None:
        self.told_to_leave = True

    # ---- Request ----

    def serve(self, connection: socket.socket, client: str) -> None:
        ended = False
        started = record("-", "Client Query Processing Started.")
        try:
            data, ended = self.receive(connection)
            text = decoded(data)
        except Refused as why:
            log(started + record("-", f"Client: {client}; Refused: {why}."))
            reply = f"error: {why}"
        except OSError as why:
            log(started + record("-", f"Client: {client}; Lost: {why.strerror}.")
                + record("-", "Client Query Processing Ended."))
            return
        except Silent:
            return
        else:
            more = record("-", f"Logged: {LOGGED} of {len(text)} characters.") if len(text) > LOGGED else ""
            log(started + record("-", f"Client: {client}; Received Text:") + indented(text[:LOGGED]) + more)
            reply = self.handle(text)
        self.left -= 1
        try:
            self.send(connection, f"{os.getpid()} {reply}\n".encode(), ended)
        except OSError as why:
            log(record("-", f"Client: {client}; Reply Not Taken: {why.strerror or why}."))
        log(record("-", "Client Query Processing Ended."))

    def receive(self, connection: socket.socket) -> tuple[bytes, bool]:
        """A whole text, and whether the client half-closed.  Raises Refused, Silent, OSError."""
        pieces: list[bytes] = []
        size = 0
        deadline = 0.0
        while True:
            try:
                piece = connection.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                now = time.monotonic()
                deadline = deadline or now + self.settings.timeout
                patience = deadline - now
                if not size and deferred_in_vain(connection):
                    raise Silent from None
                if 0 < size <= OPEN_SIDE_BYTES:
                    patience = min(patience, 0.1 if pieces[-1].endswith(b"\n") else 1.0)
                if readable(connection, patience):
                    continue
                if not size:
                    raise Silent from None
                if size > OPEN_SIDE_BYTES or time.monotonic() >= deadline:
                    raise Refused(f"text not ended within {self.settings.timeout:g} s") from None
                return b"".join(pieces), False
            if not piece:
                return b"".join(pieces), True
            pieces.append(piece)
            size += len(piece)
            if size > self.settings.max_text:
                raise Refused(f"text longer than {self.settings.max_text} bytes")

    def handle(self, text: str) -> str:
        self.busy_since[0] = time.monotonic()
        try:
            reply = self.handler(text)
            if not isinstance(reply, str):
                raise TypeError(f"the handler returned {type(reply).__name__}, expected str")
            reply.encode()
        except BaseException as why:  # SystemExit too: only the manager decides on a worker's end
            log(traced("Handler Failed:", why))
            return "error: handler failed"
        finally:
            self.busy_since[0] = 0.0
            sys.stdout.flush()
        return reply

    def send(self, connection: socket.socket, reply: bytes, ended: bool) -> None:
        """Send all of REPLY, and see that it arrives.  Raises OSError."""
        connection.settimeout(self.settings.timeout)
        connection.sendall(reply)
        if ended:
            return
        # Closing with data unread resets the connection and may destroy the reply on its way (RFC 9293, 3.6.1;
        # RFC 2525, 2.17): half-close, and read on until the client has ended too, or is silent.
        connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + self.settings.timeout
        while readable(connection, min(1.0, deadline - time.monotonic())) and connection.recv(RECEIVE_BYTES):
            pass


RECEIVE_BYTES = 65536
OPEN_SIDE_BYTES = 2000  # what the original read at the most, from clients that do not half-close


class Refused(Exception):
    """Why a client gets no answer to its text; it is told."""


class Silent(Exception):
    """The client left, or stayed silent, without having sent a byte."""


def decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as why:
        raise Refused(f"text is not UTF-8 at byte offset {why.start}") from None


def readable(connection: socket.socket, seconds: float) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(max(0.0, seconds) * 1000))


def deferred_in_vain(connection: socket.socket) -> bool:
    """Whether the kernel gave up waiting for first bytes: only then did it send its SYN-ACK again.

    The number of those is tcpi_total_retrans, at byte 100 of Linux's struct tcp_info.
    """
    if not hasattr(socket, "TCP_DEFER_ACCEPT"):
        return False
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return len(info) == 104 and struct.unpack_from("=I", info, 100)[0] > 0


# ---- Log ----------------------------------------------------------------------------

LOGGED = 2000  # characters of a client's text


def open_log(name: str) -> io.FileIO:
    """The log file, for its owner and group only; STANDARD_ERROR stays what it is.  Raises Failure."""
    if name == STANDARD_ERROR:
        return io.FileIO(2, "wb", closefd=False)
    try:
        return io.FileIO(name, "ab", opener=lambda path, flags: os.open(path, flags, 0o640))
    except OSError as why:
        raise Failure(f"cannot open log file {name}: {why.strerror}") from why


def log(records: str) -> None:
    """Write whole records at once to standard error, which is the log."""
    try:
        os.write(2, records.encode(errors="backslashreplace"))
    except OSError:
        return  # a log that cannot be written costs records, never service


def record(mark: str, message: str, pid: int = 0) -> str:
    """A line of the log: MARK is * for the life of processes and - for requests."""
    return f"{timestamp()} {mark} {pid or os.getpid()} {printable(message)}\n"


def timestamp() -> str:
    now = time.time()
    local = time.localtime(now)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}.{int(now % 1 * 1000):03}{time.strftime('%z', local)}"


def indented(text: str) -> str:
    """TEXT as lines that can neither be mistaken for records nor drive a terminal."""
    return "".join(f"    {printable(line)}\n" for line in text.removesuffix("\n").split("\n")) if text else ""


def printable(line: str) -> str:
    """LINE with everything that does not show itself written as in a Python string literal."""
    if line.isprintable() and "\\" not in line:
        return line
    return "".join(c if c == "\u3000" or c.isprintable() and c != "\\" else c.encode("unicode_escape").decode()
                   for c in line)


def traced(message: str, why: BaseException) -> str:
    return record("*", message) + indented("".join(traceback.format_exception(why)))


class Printed(io.RawIOBase):
    """What a handler prints, as records."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, data: Any) -> int:
        log(record("-", "Printed:") + indented(bytes(data).decode()))
        return len(data)


def printed_to_log() -> io.TextIOWrapper:
    return io.TextIOWrapper(Printed(), "utf-8", "backslashreplace", line_buffering=True)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
