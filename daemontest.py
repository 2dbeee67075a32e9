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
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from daemon import DaemonContext
from lockfile.pidlockfile import PIDLockFile

__version__ = "1.0.0"
PROGRAM = "daemontest.py"
Handler = Callable[[str], str]


def text_length(text: str) -> str:
    """The service itself, unless --handler names another."""
    return f"your text size: {len(text)}"


class Failure(Exception):
    """What the user is to be told in one line: what failed, and why.  Ends the program with STATUS."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def failing_to(act: str) -> Iterator[None]:
    """Makes an OSError, or a name that cannot be, the Failure to ACT."""
    try:
        yield
    except (OSError, ValueError) as why:
        raise Failure(f"cannot {act}: {getattr(why, 'strerror', None) or why}") from why


# ---- Settings -----------------------------------------------------------------------

SECONDS = (0.01, 86400)
ANY_NAME = r"[^\0]+"
STANDARD_ERROR = ""  # the name of the log file with -f
STARTED_IN = "/"  # if that directory has been removed
with suppress(FileNotFoundError):
    STARTED_IN = os.getcwd()


def setting(default: Any, fits: Any, metavar: str, about: str, *short: str) -> Any:
    """One setting; FITS are the limits of a number, or the pattern of a text."""
    shown = f"{default:g}" if fits is SECONDS else str(default)
    return dataclasses.field(default=default, metadata={
        "fits": fits, "short": short, "metavar": metavar, "help": about.replace("%", shown)})


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
    directory: str = STARTED_IN  # where the handler is searched for first; not a setting of the user's


FIELDS = {field.name: field for field in dataclasses.fields(Settings) if field.metadata}
WAIT_FOR_RESTART = ("bind", "port", "pid_file")


def fitting(name: str, value: Any) -> Any:
    """VALUE as setting NAME wants it.  Raises ValueError, which says what that is."""
    if name not in FIELDS:
        raise ValueError(f"unknown key, expected one of {', '.join(FIELDS)}")
    kind: Any = type(FIELDS[name].default)
    fits = FIELDS[name].metadata["fits"]
    if kind is str:
        good = isinstance(value, str) and re.fullmatch(fits, value)
        expected = f"a string, {FIELDS[name].metadata['metavar']}"
    else:
        good = type(value) in (int, kind) and fits[0] <= value <= fits[1]  # a bool is no number here
        expected = f"a {'whole number' if kind is int else 'number of seconds'} from {fits[0]} to {fits[1]}"
    if not good:
        raise ValueError(f"expected {expected}")
    return kind(value)


def absolute(path: str) -> str:
    return os.path.join(STARTED_IN, os.path.expanduser(path))


def read_config(path: str) -> dict[str, Any]:
    import tomllib  # only when it is needed: each worker's fork is dearer by what has been imported

    with failing_to(f"read configuration {path}"), open(path, "rb") as file:
        content = file.read()
    key = "expected TOML"
    try:
        values = tomllib.loads(content.decode())
        for key in values:
            values[key] = fitting(key, values[key])
    except (ValueError, RecursionError) as why:  # TOML's own and UTF-8's, too
        raise Failure(f"bad configuration {path}: {key}: {why}") from why
    return values


@dataclasses.dataclass(frozen=True)
class Invocation:
    """The command line, which a reload needs again."""

    action: Callable[[Invocation], None]
    config: str | None
    given: dict[str, Any]

    def settings(self) -> Settings:
        """The command line over the configuration file over the defaults.  Raises Failure."""
        config = absolute("~/daemontest.toml" if self.config is None else self.config)
        values: dict[str, Any] = {"log_file": STANDARD_ERROR} if self.action is foreground else {}
        if self.config is not None or os.path.exists(config):
            values |= read_config(config) | {"directory": os.path.dirname(config)}
        settings = Settings(**values | self.given)
        pid_file, log_file = absolute(settings.pid_file), settings.log_file and absolute(settings.log_file)
        if pid_file == log_file:
            raise Failure(f"bad settings: pid_file and log_file are both {pid_file}")
        return dataclasses.replace(settings, pid_file=pid_file, log_file=log_file)


# ---- Command line -------------------------------------------------------------------


def main() -> None:
    mend_standard_streams()
    invocation = parse_command_line()
    failure, exit_status = "", 0
    try:
        invocation.action(invocation)
    except Failure as why:
        failure, exit_status = str(why), why.status
    except KeyboardInterrupt:
        failure, exit_status = "interrupted", 1
    with suppress(Exception):
        sys.stdout.flush()  # what a handler's module may have printed
    with suppress(OSError):
        os.write(2, f"{PROGRAM}: {printable(failure)}\n".encode() if failure else b"")
    os._exit(exit_status)  # at once: a thread that a handler's module started must not keep it


def say(outcome: str) -> None:
    """Write OUTCOME as a line of standard output.  Raises Failure."""
    with failing_to("write to standard output"):
        print(outcome, file=sys.__stdout__, flush=True)


def mend_standard_streams() -> None:
    """Open those of descriptors 0 to 2 that the parent left closed, before other files take their places."""
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def parse_command_line() -> Invocation:
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
    for name, field in FIELDS.items():
        about = field.metadata
        settings.add_argument(*about["short"], f"--{name.replace('_', '-')}", type=type(field.default),
                              default=argparse.SUPPRESS, metavar=about["metavar"], help=about["help"])
    given = vars(parser.parse_args())
    action, config = given.pop("action"), given.pop("config")
    for name, value in given.items():
        try:
            given[name] = fitting(name, value)
        except ValueError as why:
            parser.error(f"--{name.replace('_', '-')}: {why}")
    return Invocation(action, config, given)


def status(invocation: Invocation) -> None:
    """print the process ID of the running service, or exit with 3"""
    pid = running_service(invocation).read_pid()
    if pid is None:
        raise Failure("not running", 3)
    say(str(pid))


def terminate(invocation: Invocation) -> None:
    """stop the service gracefully; return when all its processes are gone"""
    say(f"{PROGRAM} {running_service(invocation).signal_manager(signal.SIGTERM, wait=True)} Server terminated.")


def running_service(invocation: Invocation) -> PidFile:
    """The PID file to ask.  A configuration that broke since the start must not keep the service from being stopped."""
    try:
        return PidFile(invocation.settings().pid_file)
    except Failure:
        pid_file = PidFile(dataclasses.replace(invocation, config=os.devnull).settings().pid_file)
        if pid_file.read_pid() is None:
            raise
        return pid_file


def check(invocation: Invocation) -> None:
    """check the configuration and the handler; start nothing"""
    load_handler(invocation.settings())
    say(f"{PROGRAM}: configuration is good")


def reload(invocation: Invocation) -> None:
    """check as --check does; if all is good, have the service use it"""
    settings = invocation.settings()
    load_handler(settings)
    say(f"{PROGRAM}: {PidFile(settings.pid_file).signal_manager(signal.SIGHUP)} reloads")


# ---- Start --------------------------------------------------------------------------

UMASK = 0o027
LOOP_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM}


def background(invocation: Invocation) -> None:
    """start detached; return when the service answers"""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with failing_to("start"):
        reading, writing = os.pipe()
    manager = Manager(invocation, io.FileIO(writing, "w"))
    with manager.prepared():
        with failing_to("fork"):
            child = os.fork()
        if child == 0:
            os.close(reading)
            return manager.run()
        manager.report.close()
        manager.listener.close()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, LOOP_SIGNALS)
            with open(reading, "rb") as report:
                outcome = report.readline()
                os.waitpid(child, 0)
                if not outcome:
                    raise Failure("cannot start: the manager died")
                if not outcome.startswith(b"+"):
                    with suppress(OSError):
                        os.write(2, outcome + report.read())  # which ends when the manager does
                    raise Failure("")
        except KeyboardInterrupt:  # the import of a handler may hang, and then takes no other signal
            with suppress(Failure):
                manager.pid_file.signal_manager(signal.SIGKILL, wait=True)
            raise
    try:
        say(f"{PROGRAM}: {outcome[1:-1].decode()}")
    except Failure:
        manager.pid_file.signal_manager(signal.SIGTERM, wait=True)  # a start that fails leaves nothing behind
        raise


def foreground(invocation: Invocation) -> None:
    """serve without detaching, until a signal such as Ctrl-C"""
    manager = Manager(invocation, io.FileIO(os.dup(2), "w"))
    with manager.prepared():
        manager.run()


class Listener(socket.socket):
    """A listening socket whose accept() does not work out anew for each client what its own constructor takes."""

    family: Any = None
    type: Any = socket.SOCK_STREAM
    proto: Any = socket.IPPROTO_TCP

    def __init__(self, opened: socket.socket) -> None:
        Listener.family = opened.family
        super().__init__(self.family, self.type, self.proto, opened.detach())


def open_listener(settings: Settings) -> socket.socket:
    """The one listening socket: the service manager's (sd_listen_fds(3)) or a new one.  Raises Failure."""
    handed_over, for_whom, _ = (os.environ.pop(f"LISTEN_{name}", "") for name in ("FDS", "PID", "FDNAMES"))
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
        dual = not settings.bind and socket.has_dualstack_ipv6()
        family, address = socket.AF_INET6 if dual else socket.AF_INET, (settings.bind, settings.port)
        if settings.bind:
            found: list[Any] = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
            family, _, _, _, address = min(found)  # IPv4, if the name has such an address
        return socket.create_server(address, family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=dual)
    except (OSError, UnicodeError) as why:
        reason = str(getattr(why, "strerror", why)).partition(" (while")[0]  # create_server() repeats the address
        raise Failure(f"cannot listen on {settings.bind} port {settings.port}: {reason}".replace("  ", " ")) from why


def load_handler(settings: Settings) -> Handler:
    """Import the handler anew, with its package and what came from its directory.  On Failure nothing has changed."""
    module_name, function_name = settings.handler.split(":")
    modules, path = dict(sys.modules), list(sys.path)
    for name, module in modules.items():
        file, here = getattr(module, "__file__", None) or "", os.path.join(settings.directory, *name.split("."))
        if name != "__main__" and (file.startswith(here) or name.split(".")[0] == module_name.split(".")[0]):
            del sys.modules[name]
    sys.dont_write_bytecode = True  # it is found stale by whole seconds only: a quick edit would go unseen
    importlib.invalidate_caches()
    sys.path[:] = [settings.directory, *(entry for entry in path if entry != settings.directory)]
    try:
        handler: Handler = getattr(importlib.import_module(module_name), function_name)
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

    def claim(self) -> None:
        """Take the lock for the manager to be.  Raises Failure."""
        with failing_to(f"use PID file {self.path}"):
            for _ in patiently(0.001):
                with open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644), "r+b", 0) as file:
                    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                        raise OSError(errno.EINVAL, "not a regular file")
                    if not flocked(file, fcntl.LOCK_SH):  # which only an exclusive lock, a manager's, prevents
                        raise Failure("cannot start: already running")
                    file.truncate(0)  # while no manager can be: so a leftover PID never stands beside its lock
                    if flocked(file, fcntl.LOCK_EX) and self.is_at_path(file):
                        self.lock = io.FileIO(os.dup(file.fileno()), "r+")
                        return

    def acquire(self, timeout: float | None = None) -> None:
        """Write this process's PID under the lock, which was claimed before the forks."""
        self.lock.write(b"%d\n" % os.getpid())

    def release(self) -> None:
        """Remove the file, or empty it.  The lock stays until the process has ended, which is what it tells."""
        if self.is_at_path(self.lock):
            try:
                os.unlink(self.path)
            except OSError:  # in a directory that lets nothing be removed
                self.lock.truncate(0)

    def is_at_path(self, file: io.FileIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except OSError:
            return False

    def read_pid(self) -> int | None:
        """PID of the living manager, or None.  Waits until one that is starting has written it.  Raises Failure."""
        with (failing_to(f"read PID file {self.path}"), suppress(FileNotFoundError),
              open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb", 0) as file):
            for _ in patiently(0.01):
                if flocked(file, fcntl.LOCK_SH):
                    return None
                if re.fullmatch(rb"[1-9]\d{0,8}\n", content := os.pread(file.fileno(), 20, 0)):
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
                    select.select([process] if wait else [], [], [], None if wait else 0)
                    return pid
                os.close(process)
        raise Failure("not running")


def flocked(file: io.FileIO, kind: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    return False


def patiently(pause: float) -> Iterator[None]:
    """Time after time, for longer than a manager to be, or somebody who only asks, holds a lock.  Raises OSError."""
    end = time.monotonic() + 4.0
    while time.monotonic() < end:
        yield
        time.sleep(pause)
    raise OSError(errno.EAGAIN, "another program keeps it locked")


# ---- Manager ------------------------------------------------------------------------

RESPAWN_DELAY = 1.0  # s until the place of a worker that died is filled again


@dataclasses.dataclass(eq=False)
class Place:
    """The place of one worker, and what the manager knows of the worker in it."""

    busy_since: Any  # shared with the worker: [0] is time.monotonic() of the call of its handler, or 0
    pid: int = 0  # 0 while the place is empty
    empty_until: float = 0.0
    leave_by: float = math.inf  # when the worker is killed, once it has been told to leave
    killed_for: str = ""

    @property
    def leaving(self) -> bool:
        return self.leave_by < math.inf

    def due(self, now: float, handler_timeout: float) -> float:
        """When its worker is to be killed, or one may be forked, as far as can be told NOW."""
        if not self.pid or self.killed_for:
            return self.empty_until if self.empty_until > now else math.inf
        since = self.busy_since[0]  # read once: the worker writes to it meanwhile
        return min(self.leave_by, since + handler_timeout if since else math.inf)


class Manager:
    """Keeps the workers alive.  Signals are data that its loop reads: none is lost, none comes at a bad moment."""

    def __init__(self, invocation: Invocation, report: io.FileIO) -> None:
        """REPORT is read by who starts it: the launcher, or the terminal's user.  Raises Failure."""
        self.invocation, self.report, self.detached = invocation, report, invocation.action is background
        self.settings = invocation.settings()
        self.pid_file = PidFile(self.settings.pid_file)
        self.notify_socket = os.environ.pop("NOTIFY_SOCKET", "")
        self.places: list[Place] = []
        self.reloading = False

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """With all that can fail while the terminal can still be told; on a Failure, of WITH's body too, undone."""
        os.umask(UMASK)
        signal.pthread_sigmask(signal.SIG_BLOCK, LOOP_SIGNALS)
        self.pid_file.claim()
        try:
            self.listener = Listener(open_listener(self.settings))
            self.log_file = open_log(self.settings.log_file, self.report)
            yield
        except (Failure, KeyboardInterrupt):
            self.pid_file.release()
            raise

    def run(self) -> None:
        """Become the daemon and serve until stopped.  Raises Failure, with REPORT as the standard error."""
        hold_signals()
        context = DaemonContext(
            detach_process=self.detached, umask=UMASK, pidfile=self.pid_file, stdout=self.log_file,
            stderr=self.log_file, signal_map={}, files_preserve=[self.listener, self.pid_file.lock, self.report])
        try:
            with failing_to("become a daemon"):
                context.open()
            os.set_inheritable(0, True)  # python-daemon opens it anew, and so not for the commands that a handler runs
            self.log_file.close()
            self.printed = sys.stdout = sys.stderr = Printed()
            self.pid = os.getpid()
            self.live()
        finally:
            os.dup2(0 if self.report.closed else self.report.fileno(), 2)

    def live(self) -> None:
        try:
            self.start()
            self.serve()
        except Exception as why:
            log(traced(f"Manager Failed: {why}", why.__cause__ or why))
            raise Failure(str(why)) from why
        finally:
            self.stop()
            self.pid_file.release()

    def start(self) -> None:
        """Load the handler and fork the workers; when they are up, say so.  Raises Failure, OSError."""
        log(record("*", f"Daemon Server Started. Prefork Workers: {self.settings.workers}.")
            + record("*", f"Max Requests per Child: {self.settings.max_requests}"))
        self.load(self.settings)
        self.lifeline, alive = os.pipe()  # the manager's end alone is for writing: end-of-file means it is gone
        reading, writing = os.pipe()
        came_up, self.up = open(reading, "rb"), io.FileIO(writing, "w")
        self.not_for_workers = [self.pid_file.lock, io.FileIO(alive, "w"), self.report, came_up]
        self.renew(self.settings.workers)
        with failing_to("fork a worker"):
            self.spawn_missing()
        self.up.close()
        with came_up:
            if len(came_up.read(len(self.places))) < len(self.places):
                raise Failure("cannot start: a worker died")
        self.notify(f"READY=1\nMAINPID={self.pid}")
        if self.detached:
            self.report.write(f"+{self.pid} started, {self.settings.workers} workers"
                              f" on port {self.listener.getsockname()[1]}\n".encode())
            self.report.close()

    def serve(self) -> None:
        while True:
            try:
                self.spawn_missing()
            except OSError as why:
                log(record("*", f"cannot fork a worker: {why.strerror}"))
                for place in self.places:
                    place.empty_until = time.monotonic() + RESPAWN_DELAY
            if self.reloading and not any(place.leaving for place in self.places):
                self.reloading = False
                self.notify("READY=1")
            match self.next_signal():
                case signal.SIGHUP:
                    self.reload()
                case signal.SIGTERM | signal.SIGINT | signal.SIGQUIT:
                    return

    def stop(self) -> None:
        self.notify("STOPPING=1")
        self.renew(0)
        while self.places:
            self.next_signal()
        log(record("*", "Server Terminated."))

    def next_signal(self) -> int:
        """Wait for a signal, or until a worker is overdue or may be forked; look after the workers."""
        now, limit = time.monotonic(), self.settings.handler_timeout
        due = now + limit  # when a handler that is called in a moment may be overdue
        for place in self.places:
            due = min(due, place.due(now, limit))
        signal.setitimer(signal.ITIMER_REAL, max(due - now, 0.001))
        signum = signal.sigwait(LOOP_SIGNALS)
        if signum not in (signal.SIGCHLD, signal.SIGALRM):
            log(record("*", f"Caught {signal.Signals(signum).name}"))
        for place in list(self.places):
            if place.pid:
                self.look_after(place)
        return signum

    def look_after(self, place: Place) -> None:
        """Notice that the worker has ended; kill it if it is overdue."""
        pid, status = os.waitpid(place.pid, os.WNOHANG)
        now, limit = time.monotonic(), self.settings.handler_timeout
        if pid:
            place.pid = 0
            if status:
                code = os.waitstatus_to_exitcode(status)
                cause = next((name.name for name in signal.Signals if name == -code), f"exit status {code}")
                log(record("*", f"Child Process Died. ({cause}{place.killed_for})", pid))
                place.empty_until = now + RESPAWN_DELAY
            if place.leaving:
                self.places.remove(place)
        elif place.due(now, limit) <= now:
            late = place.leave_by <= now
            place.killed_for = ": not done within the grace" if late else f": handler ran longer than {limit:g} s"
            os.kill(place.pid, signal.SIGKILL)

    def renew(self, places: int) -> None:
        """Tell every worker to leave, within the grace; there are to be so many PLACES for their successors."""
        old = [place for place in self.places if place.pid]
        self.places = old + [Place(memoryview(mmap.mmap(-1, 8)).cast("d")) for _ in range(places)]
        for place in old:
            if not place.leaving:
                place.leave_by = time.monotonic() + self.settings.grace
                os.kill(place.pid, signal.SIGTERM)

    def spawn_missing(self) -> None:
        """Fork workers for the empty places.  Raises OSError."""
        for place in self.places:
            if not place.pid and place.empty_until <= time.monotonic() and self.has_room():
                self.spawn(place)

    def has_room(self) -> bool:
        """Workers that leave and their successors are no more than twice the number, or one for clients to come."""
        workers = [place for place in self.places if place.pid]
        return len(workers) < 2 * self.settings.workers or all(worker.busy_since[0] for worker in workers)

    def spawn(self, place: Place) -> None:
        place.busy_since[0], place.killed_for = 0.0, ""
        place.pid = os.fork()
        if place.pid:
            return
        status = 1
        try:
            for file in self.not_for_workers:
                file.close()
            Worker(self, place.busy_since).run()
            status = 0
        except BaseException as why:
            log(traced("Child Process Failed:", why))
        finally:
            os._exit(status)

    def load(self, settings: Settings) -> None:
        """Take SETTINGS and their handler.  On Failure nothing has changed."""
        log(record("*", f"Manager Process ID: {self.pid}") + record("*", "Loading configuration."))
        try:
            self.handler = load_handler(settings)
        finally:
            hold_signals()  # whatever the handler's module has made of them
            self.printed.flush()
        self.settings = settings
        self.listener.setblocking(False)
        if hasattr(socket, "TCP_DEFER_ACCEPT"):  # the kernel keeps silent clients for this long or longer (tcp(7))
            self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, math.ceil(settings.timeout))
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # a collection in a worker would touch, and so copy, all the memory it shares

    def reload(self) -> None:
        """Take the configuration and the handler anew and replace all workers; if anything is wrong, change nothing."""
        self.reloading = True
        self.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        running = self.settings
        try:
            new = self.invocation.settings()
            with open_log(new.log_file, self.report) as log_file:
                self.load(dataclasses.replace(new, **{key: getattr(running, key) for key in WAIT_FOR_RESTART}))
                os.dup2(log_file.fileno(), 1)
                os.dup2(log_file.fileno(), 2)
        except Failure as why:
            log(record("*", f"Nothing Changed: {why}"))
        else:
            if waiting := [key for key in WAIT_FOR_RESTART if getattr(new, key) != getattr(running, key)]:
                log(record("*", f"Waiting for a Restart: {', '.join(waiting)}"))
            self.renew(self.settings.workers)

    def notify(self, state: str) -> None:
        """Tell the service manager, if there is one (sd_notify(3))."""
        if self.notify_socket:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
                notifier.setblocking(False)
                try:
                    notifier.sendto(state.encode(), re.sub("^@", "\0", self.notify_socket))
                except OSError as why:
                    log(record("*", f"Cannot Notify: {why.strerror or why}"))


def hold_signals() -> None:
    """Block what the manager's loop waits for, and have none of it ignored: that could not be waited for.

    What workers do at TERM is set up here, too, so that it counts from their first moment.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, LOOP_SIGNALS)
    for signum in LOOP_SIGNALS:
        acts = {signal.SIGTERM: Worker.leave, signal.SIGCHLD: lambda *_: None}
        signal.signal(signum, acts.get(signum, signal.SIG_DFL))
        signal.siginterrupt(signum, False)  # for the sake of C code that handlers call


# ---- Worker -------------------------------------------------------------------------

RECEIVE_BYTES = 65536
OPEN_SIDE_BYTES = 2000  # what the original read at the most, from clients that keep their sending side open
HOLD_BACK = getattr(socket, "MSG_MORE", 0)  # for the end of the reply and that of the connection to share a packet


class Refused(Exception):
    """Why a client gets no answer to its text; it is told."""


class Worker:
    """Accepts clients one after the other, until its requests are used up or it is told to leave."""

    told_to_leave = False  # by TERM

    @classmethod
    def leave(cls, *_: object) -> None:
        cls.told_to_leave = True

    def __init__(self, manager: Manager, busy_since: Any) -> None:
        """Make ready what to wait by; let signals in."""
        self.manager, self.busy_since = manager, busy_since
        self.listener, self.settings, self.handler = manager.listener, manager.settings, manager.handler
        self.left, self.pid = self.settings.max_requests, os.getpid()
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGALRM):
            signal.signal(signum, signal.SIG_IGN)
        os.register_at_fork(after_in_child=self.forked)
        self.woken, waker = os.pipe()  # so that a signal between the loop's test and its wait ends the wait
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.poller = select.epoll() if hasattr(select, "epoll") else select.poll()
        # A client wakes one of the waiting workers, not all (epoll_ctl(2)).
        self.poller.register(self.listener, select.POLLIN | getattr(select, "EPOLLEXCLUSIVE", 0))
        self.poller.register(self.woken, select.POLLIN)
        self.poller.register(manager.lifeline, select.POLLIN)  # ends the wait when the manager is gone

    def forked(self) -> None:
        """In a process that the handler has forked: it can be terminated, and does not keep the client waiting."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.connection.close()

    def run(self) -> None:
        log(record("*", "Child Process Started.", self.pid))
        if not self.manager.up.closed:
            self.manager.up.write(b".")
            self.manager.up.close()
        while self.left and os.getppid() == self.manager.pid:
            try:
                self.connection, address = self.listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                if self.told_to_leave:  # and only now: a client may have woken this worker, and so no other
                    break
                if (self.woken, select.POLLIN) in self.poller.poll():
                    os.read(self.woken, 512)
                continue
            self.serve(self.connection, address[0].removeprefix("::ffff:"))
            self.connection.close()  # which sends what was held back, in one packet with the end
            if self.told_to_leave:
                break
        if self.told_to_leave:
            log(record("*", "Caught SIGTERM", self.pid))
        log(record("*", f"Child Process Ended. ({self.left})", self.pid))

    def serve(self, connection: socket.socket, client: str) -> None:
        """One request.  A client that leaves without having sent a byte is none."""
        connection.setblocking(False)  # whatever default the handler's module has set
        half_closed = False
        records = record("-", "Client Query Processing Started.", self.pid)
        try:
            data, half_closed = self.receive(connection)
            if not data and not half_closed:
                return
            text = data.decode()
        except (Refused, UnicodeDecodeError) as why:
            reason = why if isinstance(why, Refused) else f"text is not UTF-8 at byte offset {why.start}"
            reply = f"error: {reason}".encode()
            log(records + record("-", f"Client: {client}; Refused: {reason}.", self.pid))
        except OSError as why:
            log(records + record("-", f"Client: {client}; Lost: {why.strerror}.", self.pid)
                + record("-", "Client Query Processing Ended.", self.pid))
            return
        else:
            records += record("-", f"Client: {client}; Received Text:", self.pid) + indented(text[:LOGGED])
            if len(text) > LOGGED:
                records += record("-", f"Logged {LOGGED} of {len(text)} Characters.", self.pid)
            log(records)
            reply = self.handle(text)
        self.left -= 1
        try:
            self.send(connection, b"%d %b\n" % (self.pid, reply))
            if not half_closed:
                self.linger(connection)
        except OSError as why:
            log(record("-", f"Client: {client}; Reply Not Taken: {why.strerror or why}.", self.pid))
        log(record("-", "Client Query Processing Ended.", self.pid))

    def receive(self, connection: socket.socket) -> tuple[bytearray, bool]:
        """What the client sent, and whether it half-closed.  Raises Refused, OSError."""
        text, deadline = bytearray(), math.inf
        while len(text) <= self.settings.max_text:
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
        raise Refused(f"text longer than {self.settings.max_text} bytes")

    def handle(self, text: str) -> bytes:
        self.busy_since[0] = time.monotonic()
        sys.stdout = sys.stderr = self.manager.printed  # whatever an earlier call has made of them
        try:
            reply = self.handler(text)
            if not isinstance(reply, str):
                raise TypeError(f"handler returned {type(reply).__name__}, expected str")
            return str.encode(reply)
        except BaseException as why:  # SystemExit too: no text ends a worker
            log(traced("Handler Failed:", why))
            return b"error: handler failed"
        finally:
            self.busy_since[0] = 0.0
            self.manager.printed.flush()

    def send(self, connection: socket.socket, reply: bytes) -> None:
        try:
            sent = connection.send(reply, HOLD_BACK)  # nearly always all of it
        except BlockingIOError:
            sent = 0
        if sent < len(reply):
            connection.settimeout(self.settings.timeout)
            connection.sendall(memoryview(reply)[sent:])

    def linger(self, connection: socket.socket) -> None:
        """Let the reply arrive: to close with data unread resets the connection (RFC 2525, 2.17), reply and all."""
        connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + self.settings.timeout
        while readable(connection, min(1.0, deadline - time.monotonic())) and connection.recv(RECEIVE_BYTES):
            pass


def readable(connection: socket.socket, seconds: float) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(max(0.0, seconds) * 1000))


def deferred_in_vain(connection: socket.socket) -> bool:
    """Whether the kernel has already waited for first bytes and given up: only then did it repeat its SYN-ACK.

    How often it did is tcpi_total_retrans, at byte 100 of Linux's struct tcp_info.
    """
    return hasattr(socket, "TCP_DEFER_ACCEPT") and any(
        connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100:])


# ---- Log ----------------------------------------------------------------------------

LOGGED = 2000  # characters of a client's text


def open_log(name: str, terminal: io.FileIO) -> io.FileIO:
    """The log file, for its owner and group only; or TERMINAL, the standard error with -f.  Raises Failure."""
    with failing_to(f"open log file {name}"):
        if name == STANDARD_ERROR:
            return io.FileIO(os.dup(terminal.fileno()), "wb")
        return io.FileIO(name, "ab", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK, 0o640))


def log(records: str) -> None:
    """Write whole records at once to standard error, which is the log."""
    try:
        os.write(2, records.encode(errors="backslashreplace"))
    except OSError:
        pass  # a log that cannot be written costs records, never service


def record(mark: str, message: str, pid: int = 0) -> str:
    """A line of the log: MARK is * for the life of processes, - for requests."""
    second, millisecond = divmod(time.time_ns() // 1_000_000, 1000)
    return f"{whole_second(second) % millisecond} {mark} {pid or os.getpid()} {printable(message)}\n"


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
    return record("*", message) + indented("".join(trace))


class Printed(io.TextIOWrapper):
    """Standard output and error of handlers: each line becomes a record of the log.  Not theirs to take apart."""

    def __init__(self) -> None:
        super().__init__(PrintedRecords(), "utf-8", "backslashreplace", line_buffering=True)  # type: ignore[arg-type]

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
