#!/usr/bin/env python3
"""daemontest: a pre-forking UNIX daemon that answers each text with its length.

One manager process keeps a number of workers alive.  All of them accept clients on the one
listening socket that the manager opened; each connection brings a text and takes a reply.
To serve something else, write a function from text to text and name it with --handler;
text_length() below is the one served by default.

Signals to the manager:  TERM, INT, QUIT   stop gracefully
                         HUP               reload configuration and handler, reopen the log
Signals to a worker:     TERM              finish the request in hand, leave, be replaced

Exit status: 0 done, 1 failed (one line on standard error says why), 2 wrong usage,
3 --status and not running.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
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
import struct
import sys
import time
import tomllib
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

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
    """What the user is to be told in one line: what failed, and why."""


# ---- Settings -----------------------------------------------------------------------


SECONDS = (0.001, 86400)
ANY_NAME = r"[^\0]+"


def setting(default: Any, fits: Any, metavar: str, about: str, *short: str) -> Any:
    """One setting; FITS are the limits of a number, or the pattern of a text."""
    return dataclasses.field(default=default, metadata={
        "kind": type(default), "fits": fits, "option": short,
        "shown": {"metavar": metavar, "help": about.replace("%", f"{default:g}" if fits is SECONDS else str(default))}})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting: a long option and, with _ for -, a key of the configuration file."""

    bind: str = setting("", ANY_NAME, "ADDRESS", "where to listen (default: every address, IPv4 and IPv6)", "-b")
    port: int = setting(36000, (1, 65535), "N", "TCP port (default: %)", "-p")
    workers: int = setting(5, (1, 10000), "N", "pre-forked worker processes (default: %)", "-w")
    max_requests: int = setting(100, (1, 10**9), "N", "requests until a worker is replaced (default: %)", "-n")
    handler: str = setting("__main__:text_length", r"\w+(\.\w+)*:\w+", "MODULE:FUNCTION",
                           "the service, a function from text to text (default: the length of the text)")
    timeout: float = setting(10.0, SECONDS, "SECONDS", "for a client's text, and for its reply (default: %)")
    handler_timeout: float = setting(30.0, SECONDS, "SECONDS",
                                     "until a worker whose handler runs on is killed and replaced (default: %)")
    grace: float = setting(30.0, SECONDS, "SECONDS",
                           "for workers to finish at a stop or reload before they are killed (default: %)")
    max_text: int = setting(2**24, (1, 2**40), "BYTES", "longer texts are refused (default: %)")
    pid_file: str = setting("~/daemontest.pid", ANY_NAME, "FILE", "holds the manager's process ID (default: %)")
    log_file: str = setting("~/daemontest.log", ANY_NAME, "FILE", "the log (default: %; with -f standard error)")


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
WAIT_FOR_RESTART = ("bind", "port", "pid_file")
STANDARD_ERROR = ""  # the name of the log file with -f


def fitting(name: str, value: Any) -> Any:
    """VALUE as setting NAME wants it.  Raises ValueError, which says what that is."""
    if name not in FIELDS:
        raise ValueError(f"unknown key, expected one of {', '.join(FIELDS)}")
    about = FIELDS[name].metadata
    kind, fits = about["kind"], about["fits"]
    if kind is str:
        good = isinstance(value, str) and re.fullmatch(fits, value)
        expected = f"a string, {about['shown']['metavar']}"
    else:
        good = type(value) in (int, kind) and fits[0] <= value <= fits[1]  # a bool is no number here
        expected = f"a {'whole number' if kind is int else 'number of seconds'} from {fits[0]} to {fits[1]}"
    if not good:
        raise ValueError(f"expected {expected}")
    return kind(value)


@dataclasses.dataclass(frozen=True)
class Invocation:
    """The command line, and the directory it was given in: what a reload needs to know of the start."""

    action: Callable[[Invocation], str]
    config: str | None
    given: dict[str, Any]
    directory: str

    def settings(self, with_file: bool = True) -> Settings:
        """The command line over the configuration file over the defaults.  Raises Failure."""
        config_file = self.config_file() if with_file else None
        values = read_config(config_file) if config_file else {}
        if self.action is foreground:
            values.setdefault("log_file", STANDARD_ERROR)
        settings = Settings(**values | self.given)
        return dataclasses.replace(settings, pid_file=self.path(settings.pid_file),
                                   log_file=settings.log_file and self.path(settings.log_file))

    def config_file(self) -> str | None:
        default = os.path.expanduser("~/daemontest.toml")
        return self.path(self.config) if self.config else default if os.path.exists(default) else None

    def handler_directory(self) -> str:
        return os.path.dirname(self.config_file() or "") or self.directory

    def path(self, name: str) -> str:
        """NAME as seen from the directory of the start."""
        return os.path.join(self.directory, os.path.expanduser(name))


def read_config(path: str) -> dict[str, Any]:
    key = "expected TOML"
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
        for key in values:
            values[key] = fitting(key, values[key])
    except OSError as why:
        raise Failure(f"cannot read configuration {path}: {why.strerror}") from why
    except (ValueError, RecursionError) as why:  # TOML's own, and UTF-8's, too
        raise Failure(f"bad configuration {path}: {key}: {why}") from why
    return values


# ---- Command line -------------------------------------------------------------------


def main() -> None:
    mend_standard_streams()
    invocation = parse_command_line()
    try:
        if outcome := invocation.action(invocation):
            os.write(1, f"{outcome}\n".encode())
    except Failure as why:
        sys.exit(f"{PROGRAM}: {printable(str(why))}")
    except OSError as why:
        sys.exit(f"{PROGRAM}: cannot write to standard output: {why.strerror}")
    except KeyboardInterrupt:
        sys.exit(f"{PROGRAM}: interrupted")


def mend_standard_streams() -> None:
    """Open those of descriptors 0 to 2 that the parent left closed, before other files take their places."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def parse_command_line() -> Invocation:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, usage="%(prog)s [-f | -t | --reload | --status | --check] [-c FILE] [SETTING ...]",
        description="A pre-forking TCP service, text in, text out. Without an action it starts in the background.",
        epilog="Each setting is also a key of the configuration file (TOML), with _ for -.", allow_abbrev=False)
    actions = parser.add_mutually_exclusive_group()
    for names, action in ((("-f", "--foreground"), foreground), (("-t", "--terminate"), terminate),
                          (("--reload",), reload), (("--status",), status), (("--check",), check)):
        actions.add_argument(*names, dest="action", action="store_const", const=action, default=background,
                             help=action.__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-c", "--config", metavar="FILE",
                        help="configuration (default: ~/daemontest.toml, if it exists)")
    settings = parser.add_argument_group("settings")
    for name, field in FIELDS.items():
        settings.add_argument(*field.metadata["option"], f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
                              **field.metadata["shown"])
    given = vars(parser.parse_args())
    action, config = given.pop("action"), given.pop("config")
    for name, argument in given.items():
        with suppress(ValueError):  # what is no number is refused below
            argument = FIELDS[name].metadata["kind"](argument)
        try:
            given[name] = fitting(name, argument)
        except ValueError as why:
            parser.error(f"--{name.replace('_', '-')}: {why}")
    try:
        return Invocation(action, config, given, os.getcwd())
    except OSError:  # the directory has been removed
        return Invocation(action, config, given, "/")


def status(invocation: Invocation) -> str:
    """print the process ID of the running service, or exit with 3"""
    pid = running_service(invocation).read_pid()
    if pid is None:
        print(f"{PROGRAM}: not running", file=sys.stderr)
        sys.exit(3)
    return str(pid)


def terminate(invocation: Invocation) -> str:
    """stop the service gracefully; return when all its processes are gone"""
    return f"{PROGRAM} {running_service(invocation).signal_manager(signal.SIGTERM, wait=True)} Server terminated."


def running_service(invocation: Invocation) -> PidFile:
    """The PID file to ask.  A configuration that broke since the start must not keep the service from being stopped."""
    try:
        return PidFile(invocation.settings().pid_file)
    except Failure:
        pid_file = PidFile(invocation.settings(with_file=False).pid_file)
        if pid_file.read_pid() is None:
            raise
        return pid_file


def check(invocation: Invocation) -> str:
    """check the configuration and the handler; start nothing"""
    load_handler(invocation.settings().handler, invocation.handler_directory())
    return f"{PROGRAM}: configuration is good"


def reload(invocation: Invocation) -> str:
    """check as --check does; if all is good, have the service use it"""
    check(invocation)
    return f"{PROGRAM}: {PidFile(invocation.settings().pid_file).signal_manager(signal.SIGHUP)} reloads"


# ---- Start --------------------------------------------------------------------------

UMASK = 0o027
LOOP_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM}


def background(invocation: Invocation) -> str:
    """start detached; return when the service answers"""
    manager = Manager(invocation)
    reading, writing = os.pipe()
    try:
        child = os.fork()
    except OSError as why:
        manager.pid_file.release()
        raise Failure(f"cannot fork: {why.strerror}") from why
    if child == 0:
        os.close(reading)
        report = io.FileIO(writing, "wb")
        try:
            manager.run(report, detach=True)
        except Failure as why:
            report.write(f"{printable(str(why))}\n".encode())
        finally:
            os._exit(0)
    os.close(writing)
    # From here Ctrl-C gives up: the manager then finds the pipe broken, and ends.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LOOP_SIGNALS)
    with open(reading) as outcomes:
        outcome = outcomes.readline().rstrip("\n")
    os.waitpid(child, 0)
    if not outcome.startswith("+"):
        manager.pid_file.release()
        sys.exit(f"{PROGRAM}: {outcome or 'cannot start: the manager died'}")
    try:
        os.write(1, f"{PROGRAM}: {outcome[1:]}\n".encode())
    except OSError:
        manager.pid_file.signal_manager(signal.SIGTERM, wait=True)  # a start that failed leaves nothing behind
        raise
    return ""


def foreground(invocation: Invocation) -> str:
    """serve without detaching, until a signal such as Ctrl-C"""
    manager = Manager(invocation)
    terminal = io.FileIO(os.dup(2), "wb")
    try:
        manager.run(terminal, detach=False)
    except Failure as why:
        terminal.write(f"{PROGRAM}: {printable(str(why))}\n".encode())
        sys.exit(1)
    return ""


def open_listener(settings: Settings) -> socket.socket:
    """The one listening socket: the service manager's (sd_listen_fds(3)) or a new one.  Raises Failure."""
    handed_over, for_whom = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if handed_over and for_whom == str(os.getpid()):
        try:
            listener = socket.socket(fileno=3)
            if handed_over != "1" or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise OSError
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # refused by what is not TCP
        except OSError as why:
            raise Failure("cannot use LISTEN_FDS: expected one listening TCP socket") from why
        listener.set_inheritable(False)
        return listener
    try:
        if settings.bind:
            found = socket.getaddrinfo(settings.bind, settings.port, type=socket.SOCK_STREAM)
            family, _, _, _, address = min(found)  # IPv4, if the name has such an address
            return socket.create_server(address, family=family, backlog=socket.SOMAXCONN)
        dual = socket.has_dualstack_ipv6()
        return socket.create_server(("", settings.port), family=socket.AF_INET6 if dual else socket.AF_INET,
                                    backlog=socket.SOMAXCONN, dualstack_ipv6=dual)
    except (OSError, UnicodeError) as why:
        reason = str(getattr(why, "strerror", why)).partition(" (while")[0]  # create_server() repeats the address
        raise Failure(f"cannot listen on {settings.bind} port {settings.port}: {reason}".replace("  ", " ")) from why


def load_handler(name: str, directory: str) -> Handler:
    """Import the handler anew, with its package and all that came from DIRECTORY.  On Failure nothing has changed."""
    module_name, function_name = name.split(":")
    modules, path = dict(sys.modules), list(sys.path)
    for loaded, module in modules.items():
        file = getattr(module, "__file__", None) or "/"
        depth = loaded.count(".") + hasattr(module, "__path__") + 1
        from_directory = os.path.join(directory, *file.split("/")[-depth:]) == file
        if loaded != "__main__" and (from_directory or loaded.split(".")[0] == module_name.split(".")[0]):
            del sys.modules[loaded]
    sys.dont_write_bytecode = True  # it is found stale by whole seconds only: a quick edit would go unseen
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
        reason = type(why).__name__
        with suppress(Exception):  # an exception of the module's own may fail to say what it is
            reason += f": {why}"
        raise Failure(f"cannot load handler {name}: {reason}") from why
    return handler


# ---- PID file -----------------------------------------------------------------------


PATIENCE = 4.0  # s with a lock that neither a manager nor somebody who only asks would hold for so long


class PidFile(PIDLockFile):  # type: ignore[misc]
    """A PID file whose truth is a flock(2) that the manager holds exclusively, for life.

    That the file exists proves nothing, nor does what stands in it without that lock.  Whoever
    only asks takes the lock shared, for a moment, and so is never mistaken for a manager.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.descriptor = -1

    def claim(self) -> None:
        """Take the lock for the manager to be.  Raises AlreadyLocked, OSError."""
        patience = time.monotonic() + PATIENCE
        while self.descriptor < 0:
            if time.monotonic() > patience:
                raise OSError(errno.EAGAIN, "another program keeps it locked")
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
                    time.sleep(0.001)

    def acquire(self, timeout: float | None = None) -> None:
        """Write this process's PID under the lock, which may have been claimed before a fork."""
        self.claim()
        os.pwrite(self.descriptor, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Remove the file, or empty it.  The lock stays until the process has ended, which is what it tells."""
        if self.is_at_path(self.descriptor):
            try:
                os.unlink(self.path)
            except OSError:  # in a directory that lets nothing be removed
                os.ftruncate(self.descriptor, 0)

    def is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def is_locked(self) -> bool:
        return self.read_pid() is not None

    def read_pid(self) -> int | None:
        """PID of the living manager, or None.  Waits until one that is starting has written it.  Raises Failure."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as why:
            raise Failure(f"cannot read PID file {self.path}: {why.strerror}") from why
        try:
            patience = time.monotonic() + PATIENCE
            while not flocked(descriptor, fcntl.LOCK_SH):
                content = os.pread(descriptor, 20, 0)
                if re.fullmatch(rb"[1-9]\d*\n", content):
                    return int(content)
                if time.monotonic() > patience:
                    raise Failure(f"cannot read PID file {self.path}: another program keeps it locked")
                time.sleep(0.01)
            return None
        finally:
            os.close(descriptor)

    def signal_manager(self, signum: signal.Signals, wait: bool = False) -> int:
        """Signal the manager; return its PID, with WAIT when it is gone.  Raises Failure if there is none."""
        try:
            while (pid := self.read_pid()) is not None:
                if not hasattr(os, "pidfd_open"):  # elsewhere than on Linux
                    os.kill(pid, signum)
                    while wait and self.read_pid() == pid:
                        time.sleep(0.01)
                    return pid
                process = os.pidfd_open(pid)
                if self.read_pid() == pid:  # still the manager: the descriptor, unlike a number, can mean no other
                    signal.pidfd_send_signal(process, signum)
                    select.select([process] if wait else [], [], [], None if wait else 0)
                    return pid
                os.close(process)
        except ProcessLookupError:
            pass  # it has just ended
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


@dataclasses.dataclass
class Child:
    """What the manager knows of a worker."""

    busy_since: Any  # shared with the worker: [0] is time.monotonic() of the call of its handler, or 0
    leave_by: float = math.inf  # when it is killed, once it has been told to leave
    killed_for: str = ""

    def due(self, handler_timeout: float) -> float:
        """When it is to be killed, as far as can be told now."""
        since = self.busy_since[0]  # read once: the worker writes to it meanwhile
        return min(self.leave_by, since + handler_timeout if since else math.inf)


class Manager:
    """Keeps the workers alive.  Signals are data that its loop reads: none is lost, none comes at a bad moment."""

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
            self.log_file = open_log(self.settings.log_file)
        except Failure:
            self.pid_file.release()
            raise

    def run(self, report: io.FileIO, detach: bool) -> None:
        """Become the daemon, say so to REPORT when detached, and serve until stopped.  Raises Failure."""
        context = DaemonContext(
            detach_process=detach, umask=UMASK, working_directory="/", prevent_core=True,
            signal_map={signum: lambda *_: None for signum in LOOP_SIGNALS} | {signal.SIGPIPE: None},
            files_preserve=[self.listener, self.pid_file.descriptor, report],
            stdin=None, stdout=self.log_file, stderr=self.log_file, pidfile=self.pid_file)
        try:
            context.open()
        except Exception as why:
            self.pid_file.release()
            raise Failure(f"cannot become a daemon: {why}") from why
        os.set_inheritable(0, True)  # python-daemon opens it anew, and so not for the commands that a handler runs
        self.log_file.close()
        self.printed = sys.stdout = sys.stderr = Printed()
        try:
            self.start(report)
            if detach:
                report.write(f"+{os.getpid()} started, {self.settings.workers} workers"
                             f" on port {self.listener.getsockname()[1]}\n".encode())
            report.close()
            self.serve()
        except Exception as why:
            log(traced(f"Manager Failed: {why}", why.__cause__ or why))
            raise Failure(str(why)) from why
        finally:
            self.stop()
            self.pid_file.release()

    def start(self, report: io.FileIO) -> None:
        """Load the handler and fork the workers; return when they are up.  Raises Failure, OSError."""
        log(record("*", f"Daemon Server Started. Prefork Workers: {self.settings.workers}.")
            + record("*", f"Max Requests per Child: {self.settings.max_requests}"))
        self.load(self.settings)
        self.lifeline, alive = os.pipe()  # the manager's end alone is for writing: end-of-file means it is gone
        up, self.up = os.pipe()
        self.not_for_workers = [self.pid_file.descriptor, alive, up, report.fileno()]
        self.spawn_missing()
        os.close(self.up)
        with open(up, "rb") as came_up:
            if len(came_up.read(len(self.children))) < len(self.children):
                raise Failure("cannot start: a worker died")
        self.up = -1
        self.not_for_workers = [self.pid_file.descriptor, alive]
        self.notify(f"READY=1\nMAINPID={os.getpid()}")

    def serve(self) -> None:
        while True:
            try:
                self.spawn_missing()
            except Failure as why:
                log(record("*", f"{why}"))
                self.vacant_until.append(time.monotonic() + RESPAWN_DELAY)
            match self.next_signal():
                case signal.SIGHUP:
                    self.reload()
                case signal.SIGTERM | signal.SIGINT | signal.SIGQUIT:
                    return

    def stop(self) -> None:
        self.notify("STOPPING=1")
        self.vacant_until.clear()
        self.retire_all()
        while self.children:
            self.next_signal()
        log(record("*", "Server Terminated."))

    def next_signal(self) -> int:
        """Wait for a signal, or until a worker is overdue or a place to be filled; look after the workers."""
        now = time.monotonic()
        limit = self.settings.handler_timeout  # a handler that is not running yet is not overdue before that
        due = min([now + limit, *self.vacant_until,
                   *(child.due(limit) for child in self.children.values() if not child.killed_for)])
        signal.setitimer(signal.ITIMER_REAL, max(due - now, 0.001))
        signum = signal.sigwait(LOOP_SIGNALS)
        if signum == signal.SIGCHLD:
            self.reap()
        elif signum != signal.SIGALRM:
            log(record("*", f"Caught {signal.Signals(signum).name}"))
        self.kill_overdue()
        return signum

    def spawn_missing(self) -> None:
        """Fork workers up to their number.  Raises Failure."""
        now = time.monotonic()
        self.vacant_until = [until for until in self.vacant_until if until > now]
        staying = sum(child.leave_by == math.inf for child in self.children.values())
        missing = self.settings.workers - staying - len(self.vacant_until)
        room = 2 * self.settings.workers - len(self.children)
        for _ in range(min(missing, room)):
            self.spawn()

    def spawn(self) -> None:
        manager = os.getpid()
        try:
            busy_since = memoryview(mmap.mmap(-1, 8)).cast("d")
            pid = os.fork()
        except OSError as why:
            raise Failure(f"cannot fork a worker: {why.strerror}") from why
        if pid:
            self.children[pid] = Child(busy_since)
            return
        status = 1
        try:
            for descriptor in self.not_for_workers:
                os.close(descriptor)
            Worker(self, manager, busy_since).run()
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
            if child and status:  # the others: workers that left, and processes that the handler's module started
                code = os.waitstatus_to_exitcode(status)
                cause = next((name.name for name in signal.Signals if name == -code), f"exit status {code}")
                log(record("*", f"Child Process Died. ({': '.join(filter(None, (cause, child.killed_for)))})", pid))
                if child.leave_by == math.inf:
                    self.vacant_until.append(time.monotonic() + RESPAWN_DELAY)

    def retire_all(self) -> None:
        """Tell every worker to leave, within the grace."""
        for pid, child in self.children.items():
            if child.leave_by == math.inf:
                child.leave_by = time.monotonic() + self.settings.grace
                os.kill(pid, signal.SIGTERM)

    def kill_overdue(self) -> None:
        now, limit = time.monotonic(), self.settings.handler_timeout
        for pid, child in self.children.items():
            if child.due(limit) <= now and not child.killed_for:
                late = child.leave_by <= now
                child.killed_for = "not done within the grace" if late else f"handler ran longer than {limit:g} s"
                os.kill(pid, signal.SIGKILL)

    def load(self, settings: Settings) -> None:
        """Take SETTINGS and their handler.  On Failure nothing has changed."""
        log(record("*", f"Manager Process ID: {os.getpid()}") + record("*", "Loading configuration."))
        self.handler = load_handler(settings.handler, self.invocation.handler_directory())
        self.settings = settings
        self.listener.setblocking(False)
        if hasattr(socket, "TCP_DEFER_ACCEPT"):  # the kernel keeps silent clients for this long or longer (tcp(7))
            self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, math.ceil(settings.timeout))
        self.printed.flush()
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # a collection in a worker would touch, and so copy, all the memory it shares

    def reload(self) -> None:
        """Take the configuration and the handler anew and replace all workers; if anything is wrong, change nothing."""
        self.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        running = self.settings
        try:
            new = self.invocation.settings()
            with open_log(new.log_file) as log_file:
                self.load(dataclasses.replace(new, **{key: getattr(running, key) for key in WAIT_FOR_RESTART}))
                os.dup2(log_file.fileno(), 1)
                os.dup2(log_file.fileno(), 2)
        except Failure as why:
            log(record("*", f"Nothing Changed: {why}"))
        else:
            if waiting := [key for key in WAIT_FOR_RESTART if getattr(new, key) != getattr(running, key)]:
                log(record("*", f"Waiting for a Restart: {', '.join(waiting)}"))
            self.retire_all()
        self.notify("READY=1")

    def notify(self, state: str) -> None:
        """Tell the service manager, if there is one (sd_notify(3))."""
        if self.notify_socket:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
                try:
                    notifier.sendto(state.encode(), re.sub("^@", "\0", self.notify_socket))
                except OSError as why:
                    log(record("*", f"Cannot Notify: {why.strerror}"))


# ---- Worker -------------------------------------------------------------------------


class Worker:
    """Accepts clients one after the other, until its requests are used up or it is told to leave."""

    def __init__(self, manager: Manager, manager_pid: int, busy_since: Any) -> None:
        self.listener, self.settings, self.handler = manager.listener, manager.settings, manager.handler
        self.lifeline, self.up, self.printed = manager.lifeline, manager.up, manager.printed
        self.manager_pid = manager_pid
        self.busy_since = busy_since
        self.left = self.settings.max_requests
        self.told_to_leave = False

    def run(self) -> None:
        poller, woken = self.prepare()
        log(record("*", "Child Process Started."))
        if self.up >= 0:
            os.write(self.up, b".")
            os.close(self.up)
        # The lifeline ends the wait when the manager is gone; a busy worker, which does not wait, asks for its parent.
        while self.left and not self.told_to_leave and os.getppid() == self.manager_pid:
            try:
                connection, address = self.listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                if (woken, select.POLLIN) in poller.poll():
                    os.read(woken, 512)
                continue
            with connection:
                self.serve(connection, address[0].removeprefix("::ffff:"))
        if self.told_to_leave:
            log(record("*", "Caught SIGTERM"))
        log(record("*", f"Child Process Ended. ({self.left})"))

    def prepare(self) -> tuple[select.epoll | select.poll, int]:
        """Set up the signals, then let them in.  Returns what to wait by for a client, and what a signal writes to."""
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGALRM):
            signal.signal(signum, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "told_to_leave", True))
        signal.siginterrupt(signal.SIGTERM, False)  # for the sake of C code that handlers call
        woken, waker = os.pipe()  # so that a signal between the loop's test and its wait ends the wait
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        poller = select.epoll() if hasattr(select, "epoll") else select.poll()
        # A client wakes one of the waiting workers, not all (epoll_ctl(2)).
        poller.register(self.listener, select.POLLIN | getattr(select, "EPOLLEXCLUSIVE", 0))
        poller.register(woken, select.POLLIN)
        poller.register(self.lifeline, select.POLLIN)
        return poller, woken

    def serve(self, connection: socket.socket, client: str) -> None:
        """One request.  A client that leaves without having sent a byte is none."""
        half_closed = False
        records = record("-", "Client Query Processing Started.")
        try:
            data, half_closed = self.receive(connection)
            text = data.decode()
        except Silent:
            return
        except (Refused, UnicodeDecodeError) as why:
            reason = why if isinstance(why, Refused) else f"text is not UTF-8 at byte offset {why.start}"
            reply = f"error: {reason}"
            log(records + record("-", f"Client: {client}; Refused: {reason}."))
        except OSError as why:
            log(records + record("-", f"Client: {client}; Lost: {why.strerror}.")
                + record("-", "Client Query Processing Ended."))
            return
        else:
            records += record("-", f"Client: {client}; Received Text:") + indented(text[:LOGGED])
            if len(text) > LOGGED:
                records += record("-", f"Logged {LOGGED} of {len(text)} Characters.")
            log(records)
            reply = self.handle(text)
        self.left -= 1
        try:
            self.send(connection, f"{os.getpid()} {reply}\n".encode())
            if not half_closed:
                self.linger(connection)
            connection.close()  # first of all: until then the kernel holds the reply back
        except OSError as why:
            log(record("-", f"Client: {client}; Reply Not Taken: {why.strerror or why}."))
        log(record("-", "Client Query Processing Ended."))

    def receive(self, connection: socket.socket) -> tuple[bytearray, bool]:
        """A whole text, and whether the client half-closed.  Raises Refused, Silent, OSError."""
        text = bytearray()
        deadline = math.inf
        while len(text) <= self.settings.max_text:
            try:
                piece = connection.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
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
                if not text:
                    raise Silent from None
                if silence < deadline - now:
                    return text, False
                raise Refused(f"text not ended within {self.settings.timeout:g} s") from None
        raise Refused(f"text longer than {self.settings.max_text} bytes")

    def handle(self, text: str) -> str:
        self.busy_since[0] = time.monotonic()
        sys.stdout = sys.stderr = self.printed  # whatever an earlier call has made of them
        try:
            reply = self.handler(text)
            if not isinstance(reply, str):
                raise TypeError(f"handler returned {type(reply).__name__}, expected str")
            reply.encode()  # refuses lone surrogates
            return reply
        except BaseException as why:  # SystemExit too: no text ends a worker
            log(traced("Handler Failed:", why))
            return "error: handler failed"
        finally:
            self.busy_since[0] = 0.0
            self.printed.flush()

    def send(self, connection: socket.socket, reply: bytes) -> None:
        sent = 0
        with suppress(BlockingIOError):
            sent = connection.send(reply, socket.MSG_DONTWAIT | HOLD_BACK)  # nearly always all of it
        if sent < len(reply):
            connection.settimeout(self.settings.timeout)
            connection.sendall(memoryview(reply)[sent:])

    def linger(self, connection: socket.socket) -> None:
        """Let the reply arrive: to close with data unread resets the connection (RFC 2525, 2.17), reply and all."""
        connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + self.settings.timeout
        while readable(connection, min(1.0, deadline - time.monotonic())) and connection.recv(RECEIVE_BYTES):
            pass


RECEIVE_BYTES = 65536
HOLD_BACK = getattr(socket, "MSG_MORE", 0)  # for the end of the reply and that of the connection to share a packet
OPEN_SIDE_BYTES = 2000  # what the original read at the most, from clients that keep their sending side open


class Refused(Exception):
    """Why a client gets no answer to its text; it is told."""


class Silent(Exception):
    """A client left, or waited too long, without having sent a byte."""


def readable(connection: socket.socket, seconds: float) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(max(0.0, seconds) * 1000))


def deferred_in_vain(connection: socket.socket) -> bool:
    """Whether the kernel has already waited for first bytes and given up: only then did it repeat its SYN-ACK.

    How often it did is tcpi_total_retrans, at byte 100 of Linux's struct tcp_info.
    """
    if not hasattr(socket, "TCP_DEFER_ACCEPT"):
        return False
    return bool(struct.unpack_from("=I", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)[0])


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
    with suppress(OSError):  # a log that cannot be written costs records, never service
        os.write(2, records.encode(errors="backslashreplace"))


def record(mark: str, message: str, pid: int = 0) -> str:
    """A line of the log: MARK is * for the life of processes, - for requests."""
    second, millisecond = divmod(time.time_ns() // 1_000_000, 1000)
    moment, offset = whole_second(second)
    return f"{moment}.{millisecond:03}{offset} {mark} {pid or os.getpid()} {printable(message)}\n"


@functools.lru_cache(maxsize=1)
def whole_second(second: int) -> tuple[str, str]:
    local = time.localtime(second)
    return time.strftime("%Y-%m-%dT%H:%M:%S", local), time.strftime("%z", local)


def indented(text: str) -> str:
    """TEXT as lines that can neither be mistaken for records nor drive a terminal."""
    lines = text.removesuffix("\n").split("\n") if text else []
    return "".join([f"    {printable(line)}\n" for line in lines])


def printable(line: str) -> str:
    """LINE with all that does not show itself written as in a Python string literal."""
    if line.isprintable() and "\\" not in line:
        return line
    return "".join(c if c == "\u3000" or (c.isprintable() and c != "\\") else c.encode("unicode_escape").decode()
                   for c in line)


def traced(message: str, why: BaseException) -> str:
    return record("*", message) + indented("".join(traceback.format_exception(why)))


class Records(io.RawIOBase):
    """Where what a handler prints becomes records of the log."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, data: Any) -> int:
        log(record("-", "Printed:") + indented(bytes(data).decode()))
        return len(data)


class Printed(io.TextIOWrapper):
    """Standard output and error of handlers, line by line; not theirs to close."""

    def __init__(self) -> None:
        super().__init__(Records(), "utf-8", "backslashreplace", line_buffering=True)  # type: ignore[arg-type]

    def close(self) -> None:
        self.flush()


if __name__ == "__main__":
    main()
