#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["python-daemon>=2.3", "lockfile>=0.12.2"]
# ///
"""daemontest: a pre-forking UNIX daemon that answers each text with its length.

    manager ---> generation ---> N workers, all accepting on one listening socket

The manager owns the PID file, the listener and the log, and never runs the handler's code.  A
generation is one reading of the configuration and one import of the handler; a reload is the next
generation.  A worker converses with many clients at a time and calls the handler for one text at a time.
To serve something else, write a function from text to text and name it with --handler.

Signals to the manager:  TERM, INT, QUIT   stop gracefully
                         HUP               reload configuration and handler, reopen the log
                         USR1              log what goes on
Signals to a worker:     TERM              finish the requests in hand, leave, be replaced

Exit status: 0 done, 1 failed (one line on standard error says why), 2 wrong usage,
3 --status and not running.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the core of signal, which itself takes a while to import

_signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGINT})  # until main() can tell of it in one line

import argparse
import atexit
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
import resource
import select
import signal
import socket
import stat
import sys
import time
import tomllib
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import Field, dataclass, field, fields, replace
from enum import Enum
from typing import Any

PROGRAM = "daemontest.py"
__version__ = "2.0.0"

try:
    from daemon import DaemonContext
    from lockfile.pidlockfile import PIDLockFile
except ImportError as why:
    sys.exit(f"{PROGRAM}: cannot import a library: {why}; pip install python-daemon lockfile")


def text_length(text: str) -> str:
    """Answer TEXT with its length: the service itself, unless --handler names another."""
    return f"your text size: {len(text)}"


class Failure(Exception):
    """What the user is to be told in one line: what failed, and why.  Ends the program with EXIT_STATUS."""

    def __init__(self, told: str, exit_status: int = 1) -> None:
        super().__init__(told)
        self.exit_status = exit_status


@contextmanager
def failing_to(act: str) -> Iterator[None]:
    """Turn an OSError, or the ValueError of an impossible file name, into a Failure: "cannot ACT: WHY"."""
    try:
        yield
    except (OSError, ValueError) as why:
        reason = str(getattr(why, "strerror", None) or why)
        raise Failure(f"cannot {act}: {reason.partition(' (while')[0]}") from why  # create_server() repeats the act


# ---- Settings -----------------------------------------------------------------------

SECONDS = (0.01, 86400)
NAME = r"[^\0]+"
STANDARD_ERROR = ""  # the name of the log file with -f
STARTED_IN = "/"
with suppress(FileNotFoundError):  # that directory may have been removed
    STARTED_IN = os.getcwd()


def absolute(path: str) -> str:
    return os.path.join(STARTED_IN, os.path.expanduser(path))


def option(default: Any, fits: Any, metavar: str, about: str, *short: str) -> Any:
    """A setting with all that is to be said of it: FITS holds a number's limits, or a string's pattern."""
    shown = f"{default:g}" if fits is SECONDS else str(default)
    return field(default=absolute(default) if metavar == "FILE" else default,
                 metadata={"fits": fits, "metavar": metavar, "help": about.replace("%", shown), "short": short})


@dataclass(frozen=True)
class Settings:
    """All settings.  Each is a long option and, with _ for -, a key of the configuration file."""

    bind: str = option("", NAME, "ADDRESS", "where to listen (default: every address, IPv4 and IPv6)", "-b")
    port: int = option(36000, (1, 65535), "N", "TCP port (default: %)", "-p")
    workers: int = option(5, (1, 10000), "N", "pre-forked worker processes (default: %)", "-w")
    max_requests: int = option(100, (1, 10**9), "N", "requests until a worker is replaced (default: %)", "-n")
    handler: str = option("__main__:text_length", r"\w+(\.\w+)*:\w+", "MODULE:FUNCTION",
                          "the service, a function from text to text (default: the length of the text)")
    timeout: float = option(10.0, SECONDS, "SECONDS", "for a client's text, and for its reply (default: %)")
    handler_timeout: float = option(30.0, SECONDS, "SECONDS", "for the handler, or its worker is killed (default: %)")
    grace: float = option(30.0, SECONDS, "SECONDS", "for workers to finish at a stop or reload (default: %)")
    max_text: int = option(2**24, (1, 2**40), "BYTES", "longer texts are refused (default: %)")
    pid_file: str = option("~/daemontest.pid", NAME, "FILE", "holds the manager's process ID (default: %)")
    log_file: str = option("~/daemontest.log", NAME, "FILE", "the log (default: %; with -f standard error)")
    directory: str = STARTED_IN  # where the handler is searched for first; no option


OPTIONS: dict[str, Field[Any]] = {each.name: each for each in fields(Settings) if each.metadata}
WAIT_FOR_RESTART = ("bind", "port", "pid_file")


def fitting(name: str, value: Any) -> Any:
    """VALUE as the setting NAME is to have it.  Raises ValueError, which says what was expected."""
    default: Any = OPTIONS[name].default
    facts, kind = OPTIONS[name].metadata, type(default)
    if kind is str:
        good, expected = isinstance(value, str) and re.fullmatch(facts["fits"], value), f"a string, {facts['metavar']}"
    else:
        least, most = facts["fits"]
        good = type(value) in (int, kind) and least <= value <= most  # a bool is no number here
        expected = f"a {'whole number' if kind is int else 'number of seconds'} from {least} to {most}"
    if not good:
        raise ValueError(f"expected {expected}")
    return absolute(value) if facts["metavar"] == "FILE" else kind(value)


def read_settings(file: str | None, given: dict[str, Any], **defaults: Any) -> Settings:
    """The settings GIVEN on the command line, over those in FILE, over DEFAULTS, over those above.

    Raises Failure, which names the file, the key and what is expected.
    """
    path = absolute("~/daemontest.toml" if file is None else file)
    values = defaults
    if file is not None or os.path.exists(path):
        with failing_to(f"read configuration {path}"), open(path, "rb") as opened:
            content = opened.read()
        fault = "expected TOML"
        try:
            for key, value in tomllib.loads(content.decode()).items():
                fault = key
                if key not in OPTIONS:
                    raise ValueError(f"unknown key, expected one of {', '.join(OPTIONS)}")
                values[key] = fitting(key, value)
        except (ValueError, RecursionError) as why:  # TOML's own and UTF-8's, too
            raise Failure(f"bad configuration {path}: {fault}: {why}") from why
        values["directory"] = os.path.dirname(path)
    settings = Settings(**values | given)
    files = settings.pid_file, settings.log_file
    with suppress(OSError, ValueError):  # of names that cannot be, or are not there yet
        if os.path.realpath(files[0]) == os.path.realpath(files[1]) or os.path.samefile(*files):
            raise Failure(f"bad settings: pid_file and log_file are both {settings.pid_file}")
    return settings


# ---- Command line -------------------------------------------------------------------


def main() -> None:
    mend_standard_streams()
    action, file, given = parse_command_line()
    told, exit_status = "", 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        action(file, given)
    except Failure as why:
        told, exit_status = str(why), why.exit_status
    except KeyboardInterrupt:
        told, exit_status = "interrupted", 1
    with suppress(OSError):
        os.write(2, f"{PROGRAM}: {printable(told)}\n".encode() if told else b"")
    os._exit(exit_status)


def mend_standard_streams() -> None:
    """Open those of descriptors 0 to 2 that the parent left closed, before other files take their places."""
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


Action = Callable[[str | None, dict[str, Any]], None]


def parse_command_line() -> tuple[Action, str | None, dict[str, Any]]:
    """The action, the name of the configuration file, and those settings that are given."""
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
    group = parser.add_argument_group("settings")
    for name, each in OPTIONS.items():
        group.add_argument(*each.metadata["short"], f"--{name.replace('_', '-')}", type=type(each.default),
                           help=each.metadata["help"], default=argparse.SUPPRESS, metavar=each.metadata["metavar"])
    found = vars(parser.parse_args())
    action, file = found.pop("action"), found.pop("config")
    given: dict[str, Any] = {}
    for name, value in found.items():
        try:
            given[name] = fitting(name, value)
        except ValueError as why:
            parser.error(f"--{name.replace('_', '-')}: {why}")
    if action is reload and (unheard := given.keys() - {"pid_file"}):
        parser.error(f"--reload does not reach the service with --{min(unheard).replace('_', '-')}: configure it")
    return action, file, given


def say(outcome: str) -> None:
    """Write OUTCOME as a line of standard output.  Raises Failure."""
    with failing_to("write to standard output"):
        print(outcome, flush=True)


def status(file: str | None, given: dict[str, Any]) -> None:
    """print the process ID of the running service, or exit with 3"""
    pid = pid_file_to_ask(file, given).read_pid()
    if pid is None:
        raise Failure("not running", exit_status=3)
    say(str(pid))


def terminate(file: str | None, given: dict[str, Any]) -> None:
    """stop the service gracefully; return when all its processes are gone"""
    say(f"{PROGRAM} {pid_file_to_ask(file, given).signal_manager(signal.SIGTERM, wait=True)} Server terminated.")


def reload(file: str | None, given: dict[str, Any]) -> None:
    """have the service reload; return when the new workers serve"""
    verdict, _, why = pid_file_to_ask(file, given).ask_for_reload().partition(" ")
    if not verdict.isdigit():
        raise Failure(f"nothing changed: {why}")
    say(f"{PROGRAM}: {verdict} reloaded")


def pid_file_to_ask(file: str | None, given: dict[str, Any]) -> PidFile:
    """The running service's PID file.  A configuration that broke since the start must not keep it from being found."""
    try:
        return PidFile(read_settings(file, given).pid_file)
    except Failure:
        pid_file = PidFile(read_settings(os.devnull, given).pid_file)
        if pid_file.read_pid() is None:
            raise
        return pid_file


def check(file: str | None, given: dict[str, Any]) -> None:
    """check the configuration and the handler; start nothing"""
    settings = read_settings(file, given)
    news, telling = os.pipe()

    def trial() -> None:  # in a process of its own, whose end a module cannot turn into a good outcome
        outcome = "good"
        try:
            load_handler(settings)
        except Failure as why:
            outcome = str(why)
        os.write(telling, word(outcome))
        sys.stdout.flush()
        os._exit(0)

    pid = forked(trial)
    try:
        _, ended = os.waitpid(pid, 0)
    finally:
        kill_group(pid)
    os.set_blocking(news, False)
    outcome = heard(news)
    if outcome != "good":
        raise Failure(outcome or not_loaded(settings, f"the process died ({cause_of_death(ended)})"))
    say(f"{PROGRAM}: configuration is good")


# ---- Start --------------------------------------------------------------------------

UMASK = 0o027
STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
NOTED = STOPS | {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD}  # by the manager; blocked before it can


def background(file: str | None, given: dict[str, Any]) -> None:
    """start detached; return when the service answers"""
    start(functools.partial(read_settings, file, given), detach=True)


def foreground(file: str | None, given: dict[str, Any]) -> None:
    """serve without detaching, until a signal such as Ctrl-C"""
    start(functools.partial(read_settings, file, given, log_file=STANDARD_ERROR), detach=False)


def start(read: Callable[[], Settings], detach: bool) -> None:
    """Check, claim, listen, detach, serve.  Raises Failure, and leaves nothing behind then."""
    # Check.
    settings = read()

    # Claim.
    os.umask(UMASK)
    signal.pthread_sigmask(signal.SIG_BLOCK, NOTED)
    terminal = os.dup(2)
    launcher: socket.socket | None = None
    pid_file = PidFile(settings.pid_file)
    pid_file.claim()
    try:
        # Listen.
        listener, ours = open_listener(settings, 2.0 if pid_file.was_left_over else 0.0)
        log_file = open_log(settings.log_file, terminal)

        # Detach.
        if detach:
            with failing_to("start"):
                manager_end, launcher_end = socket.socketpair()
                in_launcher = os.fork()
            if in_launcher:
                launcher_end.close()
                await_outcome(manager_end)
                return
            manager_end.close()
            launcher = launcher_end
        with failing_to("become a daemon"):
            context = DaemonContext(
                detach_process=detach, umask=UMASK, pidfile=pid_file, stdout=log_file, stderr=log_file, signal_map={},
                files_preserve=[listener, pid_file.lock, launcher or terminal])
            context.open()
        atexit.unregister(context.close)  # which would remove the PID file at the end of any child
        os.set_inheritable(0, True)  # python-daemon opens it anew, and so not for the commands that a handler runs
        LOG.take(log_file)

        # Serve.
        Manager(read, settings, pid_file, listener, ours, [] if launcher else [terminal], launcher).run()
    except BaseException as why:
        pid_file.release()  # nothing if the manager has done it
        if launcher:
            with suppress(OSError):
                launcher.sendall(word(f"failed {os.getpid()} {why}"))
            os._exit(1)
        os.dup2(terminal, 2)
        raise


def await_outcome(manager: socket.socket) -> None:
    """The launcher's part of a start: wait for the manager's word and pass it on.  Raises Failure.

    The manager gives the start up if the launcher's end of the connection ends before the launcher
    has passed the word on: at Ctrl-C, if standard output cannot be written, or if the launcher is killed.
    """
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTED)
        outcome, pid, told = outcome_of(manager)
        if outcome == "started":
            with failing_to("write to standard output"):
                os.write(1, b"")  # fails if it is open for reading alone, for which poll(2) would wait in vain
            wait_for(select.POLLOUT, 1)
            signal.pthread_sigmask(signal.SIG_BLOCK, NOTED)  # too late to give the start up
            say(f"{PROGRAM}: {pid} started, {told}")
            with suppress(OSError):  # the manager may have ended since
                manager.sendall(word("told"))
            return
    except (Failure, KeyboardInterrupt):
        signal.pthread_sigmask(signal.SIG_BLOCK, NOTED)
        manager.shutdown(socket.SHUT_WR)
        _, pid, _ = outcome_of(manager)
        await_end(pid, manager)
        raise
    await_end(pid, manager)
    raise Failure(told)


def outcome_of(manager: socket.socket) -> tuple[str, int, str]:
    """The manager's word on a start: "started" or "failed", its PID (0 if it died without a word), and what to tell."""
    said = heard(manager.fileno()) or "failed 0 cannot start: the manager died"
    last = said.rstrip("\0").rpartition("\0")[2]  # a stop may have followed a start
    outcome, pid, told = last.split(" ", 2)
    return outcome, int(pid), told


def open_listener(settings: Settings, seconds: float) -> tuple[socket.socket, bool]:
    """The one listening socket, and whether it is ours or the service manager's (sd_listen_fds(3)).  Raises Failure.

    Waits some SECONDS for a port that is taken: by the workers of a manager that has just been killed.
    """
    names = ("FDS", "PID", "FDNAMES", "PIDFDID")  # none of which is for the handler
    handed_over, for_whom, *_ = (os.environ.pop(f"LISTEN_{name}", "") for name in names)
    if handed_over and for_whom == str(os.getpid()):
        with suppress(OSError):
            listener = socket.socket(fileno=3)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # refused by what is not TCP
            listener.set_inheritable(False)
            if handed_over == "1" and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return listener, False
        raise Failure("cannot use LISTEN_FDS: expected one listening TCP socket")
    with failing_to(f"listen on {settings.bind} port {settings.port}".replace("  ", " ")):
        dual = not settings.bind and socket.has_dualstack_ipv6()
        family, address = socket.AF_INET6 if dual else socket.AF_INET, (settings.bind, settings.port)
        if settings.bind:
            found: list[Any] = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
            family, _, _, _, address = min(found)  # IPv4, if the name has such an address
        end = time.monotonic() + seconds
        while True:
            try:
                return socket.create_server(address, family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=dual), True
            except OSError as why:
                if why.errno != errno.EADDRINUSE or time.monotonic() >= end:
                    raise
            time.sleep(0.02)


def close_listener(listener: socket.socket, for_everybody: bool) -> None:
    """Close LISTENER; with FOR_EVERYBODY also for processes that a handler has forked, which may hold it open."""
    if for_everybody:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
    listener.close()


# ---- PID file -----------------------------------------------------------------------


class PidFile(PIDLockFile):  # type: ignore[misc]
    """A PID file whose truth is a flock(2) that the manager holds exclusively, for life.

    Invariant: a PID stands in the file only beside the exclusive lock of the process that it names.  So neither the
    file's existence nor what stands in it without that lock proves anything, and a leftover file is never in the way.
    Whoever only asks takes the lock shared, for a moment, and so is never mistaken for a manager.
    """

    lock: io.FileIO  # the manager's
    was_left_over = False  # when it was claimed

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.questions: set[str] = set()  # the FIFOs of those who wait for the reload that is under way

    def opened(self, flags: int) -> io.FileIO:
        """The file, which must not be a symbolic link, nor anything but a regular file.  Raises OSError."""
        try:
            descriptor = os.open(self.path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
        except OSError as why:
            if os.path.islink(self.path):
                raise OSError("is a symbolic link") from why
            raise
        file = io.FileIO(descriptor, "r+" if flags & os.O_RDWR else "r")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        return file

    def claim(self) -> None:
        """Take the lock for the manager to be.  Raises Failure."""
        killed_by = time.monotonic() + 0.25  # a manager that has just been killed may need a moment to end
        with failing_to(f"use PID file {self.path}"):
            for _ in retries():
                file = self.opened(os.O_RDWR | os.O_CREAT)
                if not flocked(file, fcntl.LOCK_SH):
                    if time.monotonic() < killed_by:
                        continue
                    raise Failure(f"cannot start: already running (PID file {self.path})")
                content = file.read(2000)
                self.was_left_over = bool(content)
                if not re.fullmatch(rb"\s*(\d*|\S{0,32})\s*", content) or file.read(1):
                    raise OSError("not a PID file, since more stands in it than a number")
                if os.fstat(file.fileno()).st_uid != os.geteuid():
                    os.unlink(self.path)  # left over by another user: only root comes here
                elif flocked(file, fcntl.LOCK_EX) and self.is_at_path(file):
                    file.truncate(0)
                    file.seek(0)
                    self.lock = file
                    return
                file.close()

    def acquire(self, timeout: float | None = None) -> None:
        """Write the PID of this process, DaemonContext's last.  The lock was claimed before its forks."""
        self.lock.write(b"%d\n" % os.getpid())

    def release(self) -> None:
        """Empty and remove the file.  The lock stays until the process has ended, which is what it tells."""
        if self.is_at_path(self.lock):
            with suppress(OSError):  # in a directory that lets nothing be removed
                self.lock.truncate(0)
                os.unlink(self.path)

    def is_at_path(self, file: io.FileIO) -> bool:
        """Whether the path still names FILE."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        return False

    def read_pid(self) -> int | None:
        """PID of the living manager, or None.  Waits until one that is starting has written it.  Raises Failure."""
        with failing_to(f"read PID file {self.path}"), suppress(FileNotFoundError):
            for _ in retries():
                with self.opened(os.O_RDONLY) as file:
                    if flocked(file, fcntl.LOCK_SH):
                        return None
                    if re.fullmatch(rb"[1-9]\d{0,8}\n", content := file.read(20)):
                        return int(content)
        return None

    def signal_manager(self, signum: signal.Signals, wait: bool = False) -> int:
        """Signal the manager; return its PID, with WAIT when it is gone.  Raises Failure if there is none."""
        with failing_to("signal the manager"), suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
            while (pid := self.read_pid()) is not None:
                process = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
                with self.opened(os.O_RDONLY) as file:
                    if self.read_pid() != pid:
                        continue  # the descriptors, unlike a number, can mean no other process from now on
                    if not self.belongs_to_owner(pid):
                        raise OSError(f"process {pid} does not belong to the owner of {self.path}")
                    if process is None:
                        os.kill(pid, signum)
                    else:
                        signal.pidfd_send_signal(process, signum)
                    # The lock is the manager's until it has ended; then it may be the next one's.
                    while wait and not flocked(file, fcntl.LOCK_SH) and self.read_pid() in (None, pid):
                        time.sleep(0.005)
                if wait and process is not None:
                    wait_for(select.POLLIN, process)
                return pid
        raise Failure("not running")

    def belongs_to_owner(self, pid: int) -> bool:
        """Whether PID runs as the file's owner.  Only root could signal it otherwise (kill(2))."""
        if os.geteuid() != 0:
            return True
        try:
            owner = str(os.stat(f"/proc/{pid}").st_uid)
        except FileNotFoundError:  # elsewhere than on Linux
            owner = os.popen(f"ps -o uid= -p {pid}").read().strip()
        return owner == str(os.stat(self.path).st_uid)

    def ask_for_reload(self) -> str:
        """Have the manager reload; its verdict.  Raises Failure.

        The question is a FIFO beside the PID file.  It gets its name, by which the manager finds it, when it is open
        for the answer and before the signal: the manager answers those that it finds when it begins to reload.
        """
        if self.read_pid() is None:
            raise Failure("not running")
        draft, question = (f"{self.path}.{stage}-{os.getpid()}-{time.monotonic_ns()}" for stage in ("asks", "reload"))
        try:
            with failing_to(f"ask with {question}"):
                os.mkfifo(draft, 0o600)
                with io.FileIO(os.open(draft, os.O_RDONLY | os.O_NONBLOCK)) as file:
                    if os.geteuid() == 0:
                        os.fchown(file.fileno(), os.stat(self.path).st_uid, -1)
                    os.rename(draft, question)
                    pid = self.signal_manager(signal.SIGHUP)
                    while True:
                        alive = self.read_pid() == pid
                        if verdict := heard(file.fileno()):
                            return verdict
                        if not alive:
                            raise Failure("the service stopped meanwhile")
                        time.sleep(0.01)
        finally:
            for name in (draft, question):
                with suppress(FileNotFoundError):  # the manager removes those that it has answered
                    os.unlink(name)

    def collect_questions(self) -> None:
        """Note all who wait for a reload: the one that begins now is theirs."""
        directory, name = os.path.split(self.path)
        with suppress(OSError):
            self.questions |= {file.path for file in os.scandir(directory) if file.name.startswith(f"{name}.reload-")
                               and stat.S_ISFIFO(file.stat(follow_symlinks=False).st_mode)}

    def answer(self, verdict: str) -> None:
        """Tell those whose reload is over how it went."""
        while self.questions:
            question = self.questions.pop()
            with suppress(OSError):  # ENXIO, open(2): nobody waits for the answer any more
                file = os.open(question, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                os.write(file, word(verdict))
                os.close(file)
            with suppress(OSError):
                os.unlink(question)


def word(text: str) -> bytes:
    """TEXT as processes tell it each other: not longer than what a pipe takes, and gives, at once (pipe(7))."""
    return text.encode(errors="backslashreplace")[:select.PIPE_BUF]


def heard(file: int) -> str | None:
    """The word that has come through FILE; "" at the end of file, None if nothing has come."""
    try:
        return os.read(file, select.PIPE_BUF).decode(errors="replace")
    except BlockingIOError:
        return None
    except ConnectionResetError:  # the other side has gone without having read all
        return ""


def await_end(pid: int, connection: socket.socket) -> None:
    """Wait until process PID, which is ending, has ended.

    It holds the CONNECTION open until its very last moment; that, too, is over when a descriptor says so
    (pidfd_open(2)), where there are such.
    """
    while heard(connection.fileno()):
        pass
    if pid and hasattr(os, "pidfd_open"):
        with suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
            wait_for(select.POLLIN, process)
            os.close(process)


def retries() -> Iterator[None]:
    """Yield every 2 ms for 4 s, longer than a starting manager or an inquirer holds the lock; then raise OSError."""
    end = time.monotonic() + 4.0
    while time.monotonic() < end:
        yield
        time.sleep(0.002)
    raise OSError("another program keeps it locked")


def flocked(file: io.FileIO, kind: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    return False


# ---- Processes ----------------------------------------------------------------------


def forked(life: Callable[[], None]) -> int:
    """Fork a process that leads a group of its own, lives LIFE and ends; its PID.  Raises OSError.

    LIFE must end the process itself; returning is a failure.
    """
    if pid := os.fork():
        return pid
    try:
        os.setpgid(0, 0)
        life()
    except BaseException as why:
        log(traced("Process Failed:", why))
    finally:
        os._exit(1)


def kill_group(pid: int) -> None:
    """Kill what is left of the group of process PID, which has ended, or is not to be trusted with ending."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def is_zombie(pid: int) -> bool:
    """Whether process PID has ended and nobody has reaped it, where the system can tell.  Raises ProcessLookupError."""
    if not hasattr(os, "pidfd_open"):
        return False
    process = os.pidfd_open(pid)
    try:
        return readable(process, 0)
    finally:
        os.close(process)


def cause_of_death(status: int) -> str:
    """What a process died of: the name of the signal, or the exit status (waitpid(2))."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit status {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"SIGRTMIN+{-code - signal.SIGRTMIN}"


def name_process(name: str) -> None:
    """Have ps(1) and top(1) show NAME, where a process can set it so: at most 15 bytes (proc(5)).

    NAME has no blanks: Python looks for the number of threads in a line that begins with it.
    """
    with suppress(OSError):
        comm = os.open("/proc/self/comm", os.O_WRONLY)
        os.write(comm, name.encode())
        os.close(comm)


class Signals:
    """Signals as data: each that comes is a byte of a pipe, for which a loop can wait beside other things.

    So none interrupts, and two in a row both count.
    """

    def __init__(self, handlers: dict[int, Any]) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        os.set_blocking(self.writing, False)
        signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
            if callable(handler):
                signal.siginterrupt(signum, False)  # for the sake of C code that handlers call

    def wait(self, seconds: float | None, *files: int) -> list[int]:
        """Wait for a signal, or until FILES have something to read or end, at most SECONDS; the signals, in order."""
        poller = select.poll()
        for file in (self.reading, *files):
            poller.register(file, select.POLLIN)
        poller.poll(None if seconds is None else math.ceil(seconds * 1000))
        return self.take()

    def take(self) -> list[int]:
        try:
            return list(os.read(self.reading, 65536))
        except BlockingIOError:
            return []


class Clock:
    """Seconds that stand still while this process, or the machine, is suspended: nobody is late for our own delay."""

    def __init__(self) -> None:
        self.seconds, self.before = 0.0, time.monotonic()

    def go_on(self, most: float, besides: float = 0.0) -> None:
        """Advance by the time since the last call, less BESIDES.

        What exceeds MOST by more than 0.1 s means that we were suspended, and does not count.
        """
        now = time.monotonic()
        self.seconds += max(0.0, min(now - self.before - besides, most + 0.1))
        self.before = now


class Board:
    """Numbers in memory that a generation, its workers and the manager share; one process writes each at a time."""

    # In the head:
    LIMIT, STOPPING, IMPORTED = range(3)
    # In the place of a worker; CALLED is when its handler was called (time.monotonic()), or 0:
    STATE, PID, CALLED, SERVED, IN_HAND = range(5)
    # The STATE of a worker, whose place is VACANT before and after.  One that has been TOLD to leave may yet accept the
    # client that woke it; one that is LEAVING accepts no more; only its own decision makes it ENDED.
    VACANT, STARTING, SERVING, TOLD, LEAVING, ENDED = range(6)

    def __init__(self, workers: int) -> None:
        self.workers = workers
        line = 8  # numbers, a line of the processor's cache, so that no two processes write to the same
        numbers = memoryview(mmap.mmap(-1, 8 * line * (2 * workers + 1))).cast("d")
        self.head, *self.places = (numbers[start:start + line] for start in range(0, len(numbers), line))
        self.allow(2)

    def allow(self, times: int) -> None:
        """Let there be TIMES the number of workers: 2, as many that leave as others; 1, if the next generation needs
        the room; 0, when all are to leave."""
        self.head[self.LIMIT] = times * self.workers

    def take_place(self) -> memoryview[float]:
        """A vacant place, taken for a worker that starts."""
        place = next(place for place in self.places if place[self.STATE] == self.VACANT)
        place[self.STATE], place[self.PID], place[self.CALLED] = self.STARTING, 0, 0
        place[self.SERVED], place[self.IN_HAND] = 0, 0
        return place

    def count(self, *states: int) -> int:
        return sum(place[self.STATE] in states for place in self.places)

    def living(self) -> int:
        return len(self.places) - self.count(self.VACANT)

    def accepting(self) -> bool:
        """Whether any worker may yet accept a client, all being told to leave.  One that runs its handler will not."""
        return any(self.STARTING <= place[self.STATE] <= self.TOLD and not place[self.CALLED]
                   for place in self.places)


# ---- Manager ------------------------------------------------------------------------

RESPAWN_DELAY = 1.0  # s until what died is forked again
GIVE_UP_AFTER = 0.5  # s that an abandoned generation may take to exit
TICK = 0.02  # s between two looks while something is under way
DEADLY = {signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT,
          signal.SIGTRAP, signal.SIGSYS}  # not to be ignored, or of our own making
JOB_CONTROL = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT}
MEANINGLESS = signal.valid_signals() - DEADLY - JOB_CONTROL - NOTED


class Manager:
    """Keeps a generation serving.  It runs nobody else's code, and so can always recover."""

    def __init__(self, read: Callable[[], Settings], settings: Settings, pid_file: PidFile, listener: socket.socket,
                 listener_is_ours: bool, terminal: list[int], launcher: socket.socket | None) -> None:
        self.read, self.settings, self.pid_file = read, settings, pid_file
        self.listener, self.listener_is_ours = listener, listener_is_ours
        self.terminal, self.launcher = terminal, launcher
        self.pid = os.getpid()
        self.clock = Clock()
        self.notify_socket = os.environ.pop("NOTIFY_SOCKET", "")
        self.generations: list[Generation] = []  # two at the most
        self.born = 0  # generations so far
        self.starting = True  # until the launcher has reported the start; without one, until the service is ready
        self.ready = False  # one generation serves, and no other accepts clients
        self.reload_wanted = False
        self.reloading = False  # somebody has asked for what is being loaded, and is told if it fails
        self.not_before = 0.0  # on the clock: when a generation may be forked in the place of one that died
        self.stopping = False
        self.failure = ""  # why the service cannot run
        self.last_failure = ""  # of a generation, since the last one that went well

    def run(self) -> None:
        """Serve until stopped.  Raises Failure."""
        name_process("daemontest-mngr")
        log(record("*", f"Daemon Server Started. Prefork Workers: {self.settings.workers}.")
            + record("*", f"Max Requests per Child: {self.settings.max_requests}"))
        self.signals = Signals(dict.fromkeys(MEANINGLESS, signal.SIG_IGN) | dict.fromkeys(NOTED, lambda *_: None))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        gc.freeze()  # a collection would touch, and so copy, memory that all processes share
        try:
            self.loop()
        except Exception as why:  # a fault of this program; generations whose manager is gone stop by themselves
            log(traced("Manager Failed:", why))
            self.failure = f"the manager failed: {type(why).__name__}: {why}"

        # However the service ends, this is where the PID file goes: when nobody listens any more.
        close_listener(self.listener, self.listener_is_ours)
        self.pid_file.release()
        log(record("*", "Server Terminated."))
        if self.failure:
            raise Failure(self.failure)

    def loop(self) -> None:
        while self.generations or not self.stopping:
            self.fork_missing_generation()
            self.tell_when_ready()
            seconds = self.time_to_wait()

            signals = self.signals.wait(seconds, *self.talking())

            self.clock.go_on(seconds or 0.0)
            self.hear_launcher()
            self.hear_generations()
            self.bury_the_dead()
            self.kill_the_overdue()
            for signum in signals:
                match signum:
                    case signal.SIGTERM | signal.SIGINT | signal.SIGQUIT:
                        self.stop(signum)
                    case signal.SIGHUP:
                        self.reload()
                    case signal.SIGUSR1:
                        self.log_what_goes_on()

    def in_state(self, *states: State) -> list[Generation]:
        return [generation for generation in self.generations if generation.state in states]

    # -- what is missing --

    def fork_missing_generation(self) -> None:
        """Fork the next generation, if one is wanted or missing, and there is room for it."""
        if self.stopping or self.in_state(State.LOADING) or len(self.generations) == 2:
            return
        try:
            if self.reload_wanted:
                self.reload_wanted, self.reloading, self.ready = False, True, False
                self.pid_file.collect_questions()
                self.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\n"
                            f"STATUS=loading generation {self.born + 1}")
                new, running = self.read(), self.settings
                waiting = {key: getattr(running, key) for key in WAIT_FOR_RESTART
                           if getattr(new, key) != getattr(running, key)}
                self.fork_generation(replace(new, **waiting), open_log(new.log_file, *self.terminal))
                if waiting:
                    log(record("*", f"Waiting for a Restart: {', '.join(waiting)}"))
            elif not self.in_state(State.SERVING) and self.clock.seconds >= self.not_before:
                self.fork_generation(self.settings)
        except Failure as why:
            self.loading_failed(self.born + 1, str(why))

    def fork_generation(self, settings: Settings, log_file: io.FileIO | None = None) -> None:
        log(record("*", f"Manager Process ID: {self.pid}"))
        for serving in self.in_state(State.SERVING):
            serving.board.allow(2)
        with failing_to("fork a generation"):
            generation = Generation(self.born + 1, settings, log_file)
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, NOTED)  # until the child, too, has somebody to take them
                generation.pid = forked(functools.partial(generation.live, self))
            except OSError:
                generation.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                os.close(generation.to_manager)
        self.born += 1
        self.generations.append(generation)
        log(record("*", "Loading configuration.", generation.pid))
        with suppress(BrokenPipeError):  # it has been killed already
            # Only now that its PID is known here, and its beginning recorded.
            os.write(generation.to_generation, b"begin\n")

    # -- what the loop waits for --

    def time_to_wait(self) -> float | None:
        """Without end while one generation serves; otherwise something is under way, to be looked after."""
        steady = self.ready and not self.starting and not self.stopping and len(self.generations) == 1
        return None if steady else TICK

    def talking(self) -> list[int]:
        """The descriptors of those that may have something to say."""
        files = [generation.to_generation for generation in self.in_state(State.LOADING) if not generation.silent]
        return [*files, self.launcher.fileno()] if self.launcher and not self.stopping else files

    def hear_launcher(self) -> None:
        """Take the launcher's word that the start has been told; its end without that word gives the start up."""
        if not self.launcher or self.stopping or not readable(self.launcher, 0):
            return
        if heard(self.launcher.fileno()):
            self.starting = False
            self.launcher.close()
            self.launcher = None
        else:
            self.failure = "cannot start: given up"
            self.stop()

    def hear_generations(self) -> None:
        for generation in self.in_state(State.LOADING):
            outcome = heard(generation.to_generation)
            if outcome == "up":
                self.take_over(generation)
            elif outcome:
                generation.state, generation.kill_at = State.GIVEN_UP, self.clock.seconds + GIVE_UP_AFTER
                self.loading_failed(generation.number, outcome)
            generation.silent = outcome == ""

    def take_over(self, generation: Generation) -> None:
        """Let GENERATION, which is up, be the one that serves."""
        for last in self.in_state(State.SERVING):
            self.dismiss(last)
        generation.state, generation.since = State.SERVING, time.time()
        self.settings, self.reloading, self.last_failure = generation.settings, False, ""
        if generation.log_file:
            LOG.take(generation.log_file)
            generation.log_file = None
        if hasattr(socket, "TCP_DEFER_ACCEPT"):  # the kernel keeps silent clients for this long or longer (tcp(7))
            seconds = math.ceil(self.settings.timeout)
            self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, seconds)

    def loading_failed(self, number: int, why: str) -> None:
        """Tell whoever is concerned WHY generation NUMBER did not come up."""
        self.last_failure = f"; generation {number} failed: {printable(why)}"
        serving = self.in_state(State.SERVING)
        for generation in serving:
            generation.board.allow(2)
        if self.starting and not serving:
            log(record("*", f"Manager Failed: {printable(why)}"))
            self.failure = why
            self.stop()
        elif self.reloading:
            log(record("*", f"Nothing Changed: {printable(why)}"))
            self.reloading = False
            self.pid_file.answer(f"failed {why}")
        else:
            log(record("*", f"Generation Failed: {printable(why)}"))
            self.notify(f"STATUS=generation {number} failed: {printable(why)}")
            self.not_before = self.clock.seconds + RESPAWN_DELAY

    def tell_when_ready(self) -> None:
        """Tell whoever waits when a generation serves and no other accepts clients any more."""
        serving = self.in_state(State.SERVING)
        if self.ready or self.stopping or not serving or self.in_state(State.LOADING):
            return
        if self.reload_wanted and self.in_state(State.GIVEN_UP):
            return  # the reload that superseded this one has not begun: there is nothing to tell yet
        if any(other.board.accepting() for other in self.generations if other is not serving[0]):
            return
        self.ready = True
        workers, since = self.settings.workers, time.localtime(serving[0].since)
        self.notify(f"READY=1\nMAINPID={self.pid}\nSTATUS={workers} workers, generation {serving[0].number} since "
                    f"{time.strftime('%H:%M:%S', since)}{self.last_failure}")
        self.pid_file.answer(str(self.pid))
        if self.launcher:
            port = self.listener.getsockname()[1]
            with suppress(OSError):  # its end is noticed by hear_launcher()
                self.launcher.sendall(word(f"started {self.pid} {workers} workers on port {port}\0"))
        else:
            self.starting = False

    # -- what ends --

    def bury_the_dead(self) -> None:
        """Reap generations, and whatever else has become a child of this process: it may be PID 1."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                for generation in self.generations:
                    if generation.pid == ended[0]:
                        self.bury(generation, ended[1])
        for generation in list(self.generations):
            if generation.state is State.DEAD and not generation.orphans():
                self.generations.remove(generation)
                generation.close()

    def bury(self, generation: Generation, status: int) -> None:
        self.hear_generations()  # its last words
        was, generation.state = generation.state, State.DEAD
        generation.board.allow(0)
        most = math.inf if was is State.GIVEN_UP else generation.kill_at
        generation.kill_at = min(most, self.clock.seconds + generation.settings.grace)  # for its workers
        if status:
            kill_group(generation.pid)  # what its module has started
        cause = cause_of_death(status)
        if was is State.LOADING:
            self.loading_failed(generation.number, not_loaded(generation.settings, f"the process died ({cause})"))
        elif was is State.SERVING:
            log(record("*", f"Generation Died. ({cause})", generation.pid))
            self.notify(f"STATUS=generation {generation.number} died: {cause}")
            self.not_before = self.clock.seconds + RESPAWN_DELAY
            self.ready = False
        elif was is State.LEAVING and status:
            log(record("*", f"Generation Ended. ({cause}: not done within its time)", generation.pid))

    def kill_the_overdue(self) -> None:
        for generation in self.generations:
            if self.clock.seconds < generation.kill_at:
                continue
            if generation.state is State.GIVEN_UP and generation.board.head[Board.IMPORTED]:
                self.dismiss(generation)  # it came so far that it can leave in good order
            elif generation.state is not State.DEAD:
                kill_group(generation.pid)
            else:
                for pid, place in generation.orphans().items():
                    log(record("*", "Child Process Died. (SIGKILL: not done within the grace)", pid))
                    kill_group(pid)
                    place[Board.STATE] = Board.VACANT

    # -- what signals mean --

    def stop(self, signum: int = 0) -> None:
        """Stop gracefully."""
        if signum:
            log(record("*", f"Caught {signal.Signals(signum).name}"))
            loaded = any(generation.board.head[Board.IMPORTED] for generation in self.generations)
            if self.starting and not self.ready and (self.launcher or not loaded):
                self.failure = f"cannot start: caught {signal.Signals(signum).name}"
        self.stopping = True
        self.notify("STOPPING=1\nSTATUS=stopping")
        self.pid_file.answer("failed the service stops")
        for generation in self.generations:
            self.dismiss(generation)

    def reload(self) -> None:
        """Have the next generation begin; one that is still being loaded begins afresh."""
        log(record("*", "Caught SIGHUP"))
        self.reload_wanted = True
        for generation in self.in_state(State.LOADING):
            self.dismiss(generation)

    def dismiss(self, generation: Generation) -> None:
        """Tell a generation to leave: within the grace, which it sees to itself unless something keeps it; or, while
        it is being loaded, at once, whatever its module does."""
        if generation.state is State.LOADING:
            generation.state, generation.kill_at = State.GIVEN_UP, self.clock.seconds + GIVE_UP_AFTER
        elif generation.state is State.SERVING or (
                generation.state is State.GIVEN_UP and generation.board.head[Board.IMPORTED]):
            generation.state = State.LEAVING
            generation.kill_at = self.clock.seconds + generation.settings.grace + 2.0
        generation.board.head[Board.STOPPING] = self.stopping
        for pid in generation.orphans() if generation.state is State.DEAD else [generation.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def log_what_goes_on(self) -> None:
        for generation in self.generations:
            since = f" since {time.strftime('%FT%T', time.localtime(generation.since))}," if generation.since else ""
            board, now = generation.board, time.monotonic()
            lines = record("*", f"Generation {generation.number}:{since} {board.workers} workers, "
                                f"{generation.state.name.lower().replace('_', ' ')}", generation.pid)
            for place in board.places:
                if place[Board.STATE] != Board.VACANT and place[Board.PID]:
                    called = place[Board.CALLED]
                    lines += record("*", f"Worker: {place[Board.SERVED]:.0f} texts served, "
                                         f"{place[Board.IN_HAND]:.0f} clients in hand, handler "
                                         + (f"running for {now - called:.1f} s" if called else "idle")
                                         + (", leaving" if place[Board.STATE] > Board.SERVING else ""),
                                    int(place[Board.PID]))
            log(lines)

    def notify(self, state: str) -> None:
        """Tell the service manager, if there is one (sd_notify(3))."""
        if not self.notify_socket:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
                notifier.setblocking(False)
                notifier.sendto(state.encode(errors="replace"), re.sub("^@", "\0", self.notify_socket))
        except OSError as why:
            log(record("*", f"Cannot Notify: {why.strerror or why}"))


# ---- Generation ---------------------------------------------------------------------

IGNORED = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGALRM,
           signal.SIGTTOU}
WAKE = signal.SIGCHLD  # a worker sends it to have its generation look after its workers at once


def load_handler(settings: Settings) -> Callable[[str], str]:
    """Import the handler.  Raises Failure, whatever its module raises."""
    module_name, function_name = settings.handler.split(":")
    sys.dont_write_bytecode = True  # it is found stale by whole seconds only: a quick edit would go unseen
    sys.path.insert(0, settings.directory)
    try:
        handler: Callable[[str], str] = getattr(importlib.import_module(module_name), function_name)
        if not callable(handler):
            raise TypeError(f"{function_name} is not a function")
    except BaseException as why:  # SystemExit, too
        reason = type(why).__name__
        with suppress(BaseException):  # an exception of the module's own may fail to say what it is
            reason += f": {why}" if str(why) else ""
        raise Failure(not_loaded(settings, reason)) from why
    return handler


def not_loaded(settings: Settings, why: str) -> str:
    return f"cannot load handler {settings.handler}: {why[:2000]}"


class Child:
    """What a generation knows of one of its workers."""

    called = 0.0  # as it stood on the board at the last look
    kill_at = math.inf  # its handler's deadline, on the generation's clock
    end_by = math.inf  # the deadline of its exit
    killed_for = ""

    def __init__(self, place: memoryview[float]) -> None:
        self.place = place


class State(Enum):
    """What the manager has made of a generation."""

    LOADING = "imports its module, starts its first workers"
    SERVING = "all its workers are up"
    GIVEN_UP = "is not wanted any more, before it was up"
    LEAVING = "has been told to leave; its workers finish"
    DEAD = "has ended; workers that are left finish without it"


class Generation:
    """One reading of the configuration, one import of the handler, and their workers.

    The manager's part, what it knows of a generation, comes first; then the part of the generation's own process,
    which imports the handler, forks the workers and keeps their number.
    """

    state = State.LOADING
    pid = 0
    since = 0.0  # when its workers were up (time.time())
    kill_at = math.inf  # on the manager's clock
    silent = False  # it can say no more

    def __init__(self, number: int, settings: Settings, log_file: io.FileIO | None) -> None:
        self.number, self.settings = number, settings
        self.log_file = log_file  # of a reload: the log, opened anew
        self.board = Board(settings.workers)
        # Its word on how it went comes this way; end-of-file means that the other process is gone.
        self.to_generation, self.to_manager = (end.detach() for end in socket.socketpair())
        os.set_blocking(self.to_generation, False)

    def orphans(self) -> dict[int, memoryview[float]]:
        """The workers that outlive it, with their places.  They lead groups in our session, as no recycled PID does."""
        found = {}
        for place in self.board.places:
            if place[Board.STATE] != Board.VACANT:
                pid = int(place[Board.PID])
                with suppress(ProcessLookupError):
                    if os.getpgid(pid) == pid and os.getsid(pid) == os.getsid(0) and not is_zombie(pid):
                        found[pid] = place
                        continue
            place[Board.STATE] = Board.VACANT
        return found

    def close(self) -> None:
        os.close(self.to_generation)
        if self.log_file:
            self.log_file.close()

    # -- its own process --

    def live(self, manager: Manager) -> None:
        self.leave_behind(manager)
        self.previous = [other.board for other in manager.generations]
        self.listener, self.listener_is_ours = manager.listener, manager.listener_is_ours
        self.children: dict[int, Child] = {}
        self.vacant_until: list[float] = []  # on the clock: when the places of workers that died may be filled
        self.up = False  # True once all workers have served
        self.manager_is_gone = False
        self.leaving = False
        self.leave_by = math.inf  # on the clock
        name_process("daemontest-gen")
        for signum in (signal.SIGINT, signal.SIGQUIT):
            signal.signal(signum, signal.SIG_IGN)  # discards the terminal's, sent before this was a group of its own
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # with -f, a terminal may stop other groups that write to it
        for signum in (NOTED | MEANINGLESS) - {signal.SIGPIPE, signal.SIGXFSZ}:  # which Python itself ignores
            signal.signal(signum, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.read(self.to_manager, 100)  # until the manager has noted this process
        # SIGIO ends this process, and what its module has forked, when the manager is killed while the module, or its C
        # code, goes on (fcntl(2)).
        fcntl.fcntl(self.to_manager, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(self.to_manager, fcntl.F_SETFL, os.O_ASYNC)
        if readable(self.to_manager, 0):
            os._exit(1)  # the manager had gone before SIGIO was armed
        self.printed = Printed()
        sys.stdout = sys.stderr = self.printed.stream()
        try:
            handler = load_handler(self.settings)
        except Failure as why:
            self.printed.end_line()
            if manager.starting:
                log(traced("Handler Not Loaded:", why.__cause__ or why))
            self.tell(str(why))
            os._exit(1)
        self.settle(handler)
        self.supervise()
        self.listener.close()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 1.0)  # no longer should what the module has left behind keep it
        end_as_python_does([], threads=False)
        os._exit(0)

    def leave_behind(self, manager: Manager) -> None:
        """Close what is the manager's: no process that a handler forks may keep the lock, or pass for the manager."""
        manager.pid_file.lock.close()
        if manager.launcher:
            manager.launcher.close()
        for descriptor in (*manager.terminal, manager.signals.reading, manager.signals.writing):
            os.close(descriptor)
        for generation in (*manager.generations, self):
            os.close(generation.to_generation)

    def settle(self, handler: Callable[[str], str]) -> None:
        """Undo what the handler's module may have done to this process, and prepare for the workers."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        fcntl.fcntl(self.to_manager, fcntl.F_SETFL, 0)
        self.lifeline, self.alive = os.pipe()  # end-of-file tells the workers that this process is gone
        self.worker = Worker(self, handler)
        self.signals = Signals(dict.fromkeys(JOB_CONTROL, signal.SIG_DFL) | dict.fromkeys(IGNORED, signal.SIG_IGN)
                               | {WAKE: lambda *_: None, signal.SIGTERM: self.worker.catch})
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.board.head[Board.IMPORTED] = True  # from now on it can be told to leave
        self.printed.end_line()
        if self.log_file:
            LOG.take(self.log_file)
        self.clock = Clock()
        self.listener.setblocking(False)
        for board in self.previous:
            board.allow(1)
        gc.freeze()  # a collection in a worker would touch, and so copy, all the memory it shares

    def tell(self, outcome: str) -> None:
        """Tell the manager how it went; it may be gone."""
        with suppress(OSError):
            os.write(self.to_manager, word(outcome))

    def supervise(self) -> None:
        while self.children or not self.leaving:
            self.spawn_missing()
            self.tell_when_up()
            seconds = self.time_to_wait()

            self.signals.wait(seconds, *([] if self.manager_is_gone else [self.to_manager]))

            self.clock.go_on(seconds)
            self.bury_the_dead()
            self.kill_the_overdue()
            # A worker that has just been forked still writes to this process's pipe, so the bytes prove nothing.
            if self.worker.caught:
                self.worker.caught = False
                self.leave()
            if not self.manager_is_gone and readable(self.to_manager, 0):
                self.manager_is_gone = True
                self.board.head[Board.STOPPING] = True
                self.leave()
                close_listener(self.listener, self.listener_is_ours)  # for the next start, also beside a hung worker

    def spawn_missing(self) -> None:
        """Fork workers for those that are missing, as far as there is room for them."""
        self.vacant_until = [until for until in self.vacant_until if until > self.clock.seconds]
        missing = self.settings.workers - len(self.vacant_until) - self.board.count(Board.STARTING, Board.SERVING)
        while missing > 0 and self.there_is_room() and not self.leaving:
            missing -= 1
            place = self.board.take_place()
            try:
                # Python drops, in the child, a signal that comes before os.fork() has returned there.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                pid = forked(functools.partial(self.worker.live, place))
            except OSError as why:
                place[Board.STATE] = Board.VACANT
                self.vacant_until += [self.clock.seconds + RESPAWN_DELAY] * (missing + 1)
                self.fail_or_log(f"cannot fork a worker: {why.strerror}")
                return
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            self.children[pid] = Child(place)

    def there_is_room(self) -> bool:
        """Whether one more worker keeps to the limit: in all generations there are never more than twice the number."""
        others = sum(max(board.living(), board.head[Board.LIMIT]) for board in self.previous)
        most = 2 * max(board.workers for board in (self.board, *self.previous))
        return len(self.children) < self.board.head[Board.LIMIT] and len(self.children) + others < most

    def tell_when_up(self) -> None:
        if not self.up and self.board.count(Board.SERVING, Board.TOLD, Board.LEAVING) >= self.settings.workers:
            self.up = True
            self.tell("up")

    def fail_or_log(self, why: str) -> None:
        if self.up:
            log(record("*", why))
        elif not self.leaving:
            self.tell(why)
            self.leave()

    def time_to_wait(self) -> float:
        """Until something is due, but never so long that a suspension could pass for a handler's time."""
        if self.vacant_until or self.leaving or not self.up:
            return TICK
        soonest = min((min(child.kill_at, child.end_by) for child in self.children.values()), default=math.inf)
        return max(0.0, min(soonest - self.clock.seconds, self.settings.handler_timeout / 8, 5.0))

    def kill_the_overdue(self) -> None:
        limit = self.settings.handler_timeout
        for pid, child in self.children.items():
            called = child.place[Board.CALLED]  # read once: the worker writes to it meanwhile
            if called != child.called:
                child.called = called
                before = min(time.monotonic() - called, limit / 8)  # that long may it have run unseen
                child.kill_at = self.clock.seconds + limit - before if called else math.inf
            if child.place[Board.STATE] == Board.ENDED:
                child.end_by = min(child.end_by, self.clock.seconds + self.settings.grace)
            end_by = min(child.end_by, self.leave_by)
            if not child.killed_for and self.clock.seconds >= min(child.kill_at, end_by):
                late = self.clock.seconds >= end_by
                child.killed_for = ": not done within the grace" if late else f": handler ran longer than {limit:g} s"
                os.kill(pid, signal.SIGKILL)

    def bury_the_dead(self) -> None:
        """Reap the workers that have ended, and no process that the handler's module waits for."""
        for pid, child in list(self.children.items()):
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # the module has reaped it
                ended, status = pid, None
            if ended:
                del self.children[pid]
                self.bury(pid, child, status)

    def bury(self, pid: int, child: Child, status: int | None) -> None:
        state, child.place[Board.STATE] = child.place[Board.STATE], Board.VACANT
        if state == Board.ENDED and not status:
            return
        kill_group(pid)  # what its handler has forked would keep clients waiting, and pools wait for ever
        cause = ("unknown" if status is None else cause_of_death(status)) + child.killed_for
        log(record("*", f"Child Process Died. ({cause})", pid))
        if state in (Board.STARTING, Board.SERVING):
            self.vacant_until.append(self.clock.seconds + RESPAWN_DELAY)
        if not self.up:
            self.fail_or_log(f"cannot start: a worker died ({cause})")

    def leave(self) -> None:
        """Have every worker leave within the grace; at a stop also those that have been told before."""
        self.leaving = True
        self.board.allow(0)
        self.leave_by = min(self.leave_by, self.clock.seconds + self.settings.grace)
        for pid in self.children:
            os.kill(pid, signal.SIGTERM)


# ---- Worker -------------------------------------------------------------------------

RECEIVE_BYTES = 16384  # at once; more no longer stays in the processor's nearest cache
BREATH = 2**20  # bytes of one text after which the others are looked after
TEXTS_IN_HAND = 4  # a worker holds at most this many times --max-text
A_MOMENT = 0.001  # s in which the half-close nearly always follows the text; nobody else is in hand then
LOOK_APART = 0.005  # least s between two looks for clients past their deadline
GIVE_WAY_TIMES = 10  # how often in a row a worker with clients in hand leaves a new client to an idle one
REQUEUE = 0.1  # s after which a worker that has clients in hand queues behind those that have none
HOLD_BACK = getattr(socket, "MSG_MORE", 0)  # for the end of the reply and that of the connection to share a packet
IN, OUT = select.POLLIN, select.POLLOUT
EXCLUSIVE = getattr(select, "EPOLLEXCLUSIVE", 0)  # a new client wakes one of the workers that wait (epoll_ctl(2))
FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

Wish = tuple[int, float, int]  # what a conversation waits for (IN, OUT), until when (clock), and the bytes it holds


class Client:
    """A client, its conversation, and what that waits for."""

    __slots__ = ("connection", "conversation", "descriptor", "events", "held", "name", "until")

    conversation: Iterator[Wish]
    events: int  # of these last three only a client in hand has need
    held: int
    until: float

    def __init__(self, connection: socket.SocketType, descriptor: int, name: str) -> None:
        self.connection, self.descriptor, self.name = connection, descriptor, name


class Worker:
    """Converses with many clients at a time, and calls the handler for one whole text at a time.

    Discussion.  A conversation is a generator (converse()) that reads from top to bottom; where it would block, it
    yields what it waits for.  Nearly always the text came with the connection, and the conversation runs through
    without ever waiting.  Otherwise its client is in hand, until it is ready or late; then the conversation goes on.

    New clients should go to workers that have none in hand, since a handler delays all clients of its worker.  The
    kernel wakes those who wait in the order in which they have registered the listener, so a worker that has clients
    in hand registers it anew, behind the others, and takes new clients only when the kernel names the listener.
    """

    serving = True  # accepts clients
    told_to_leave = False
    caught = False  # SIGTERM
    stopping = False  # the service stops, so clients that have not sent a byte are let go
    in_fork = False  # this is a process that the handler has forked
    place: memoryview[float] = memoryview(b"").cast("d")  # on the board; empty, and so false, in the generation
    connection: socket.SocketType | None = None  # the one whose conversation goes on
    held = 0  # bytes, by all clients in hand
    most_clients = sys.maxsize  # in hand
    look_at = math.inf  # on the clock: when somebody in hand may be late
    handled = 0.0  # s that the handler has taken since the clock was last read
    gave_way = 0  # times in a row
    latest, latest_until = -1, 0.0  # the client taken in hand last, and until when the rest of its text is expected
    queued_at = 0.0  # on the clock: when the listener was registered
    parted_at, parted = -math.inf, 0  # when a client parted with was last recorded, and how many have been since

    def __init__(self, generation: Generation, handler: Callable[[str], str]) -> None:
        """In the generation: what all its workers have in common."""
        self.generation, self.generation_pid = generation, os.getpid()
        self.settings, self.board, self.handler = generation.settings, generation.board, handler
        self.lifeline, self.printed = generation.lifeline, generation.printed
        self.listener = generation.listener
        self.kind = self.listener.family, socket.SOCK_STREAM, socket.IPPROTO_TCP  # of accepted sockets
        self.requests_left = self.settings.max_requests
        self.foreign = handler is not text_length  # so it may fork, print, change directory, keep files open ...
        self.files = buffered_files() if self.foreign else []
        self.home = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))

    def live(self, place: memoryview[float]) -> None:
        self.signals = Signals({})  # what they mean stands already
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        its = self.generation
        for descriptor in (its.to_manager, its.alive, its.signals.reading, its.signals.writing):
            os.close(descriptor)
        name_process("daemontest-work")
        self.place, self.pid = place, os.getpid()
        place[Board.PID] = self.pid
        if self.foreign:
            disown()
            os.register_at_fork(after_in_child=self.let_fork_go)
        self.clock = Clock()
        self.in_hand: dict[int, Client] = {}  # by descriptor, those longest in hand first
        if hasattr(select, "epoll"):
            poller: Any = select.epoll()
            self.poll = poller.poll
        else:
            poller = select.poll()
            self.poll = lambda seconds: poller.poll(None if seconds is None else seconds * 1000)
        self.poller = poller
        poller.register(self.listener, IN | EXCLUSIVE)
        poller.register(self.signals.reading, IN)
        poller.register(self.lifeline, IN)  # ends the wait when the generation is gone
        self.own_descriptors = self.lowest_free_descriptor()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit != resource.RLIM_INFINITY:
            reserve = max(8, min(32, limit // 4))  # for the handler
            self.most_clients = max(1, limit - reserve - self.own_descriptors)
        log(record("*", "Child Process Started."))
        place[Board.STATE] = Board.SERVING
        if not self.generation.up:
            self.call_generation()

        self.run()
        log((record("*", "Caught SIGTERM") if self.caught else "")
            + record("*", f"Child Process Ended. ({max(0, self.requests_left)})"))
        place[Board.STATE] = Board.ENDED
        if self.foreign:
            self.call_generation()  # which sees to it that this is done within the grace
            end_as_python_does(self.files)
            self.printed.end_line()
        os._exit(0)

    def catch(self, *_: object) -> None:
        """Note SIGTERM; in the generation, too, from which a worker has this at once."""
        self.told_to_leave = self.caught = True
        if self.place and self.place[Board.STATE] == Board.SERVING:
            self.place[Board.STATE] = Board.TOLD  # so its successor need not wait until the handler returns
            self.call_generation()

    def let_fork_go(self) -> None:
        """In a process that the handler has forked: it keeps neither clients waiting nor the port, and ends at TERM."""
        self.in_fork = True
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for connection in (self.listener, self.connection, *(client.connection for client in self.in_hand.values())):
            if connection:
                connection.close()

    def call_generation(self) -> None:
        if os.getppid() == self.generation_pid:
            os.kill(self.generation_pid, WAKE)

    # -- the loop --

    def run(self) -> None:
        ready: dict[int, int] = {}
        listener = self.listener.fileno()
        while self.serving or self.in_hand:
            # Accept, before all else what this worker was woken for.  Without clients in hand ask at once.
            accepted = False
            if self.serving and (not self.in_hand or (listener in ready and not self.gives_way())):
                accepted = self.accept()
                ready.pop(listener, None)
            if accepted and self.requests_left <= 0:
                self.leave()
            if accepted and not self.in_hand and not self.told_to_leave:
                continue

            # Go on with those that are ready, and with those that are late.
            for descriptor in (*ready, *self.late()):
                if client := self.in_hand.get(descriptor):
                    self.go_on(client)

            if self.serving and self.told_to_leave:
                if listener in ready:
                    continue  # to accept what this worker was woken for: nobody else may have been
                self.leave()

            # Wait.
            if self.serving or self.in_hand:
                ready = self.wait()

    def wait(self) -> dict[int, int]:
        """Wait until something is ready or somebody late; let the clock go on."""
        seconds = max(0.0, min(REQUEUE, self.look_at - self.clock.seconds)) if self.in_hand else None
        ready: dict[int, int] = dict(self.poll(seconds))
        if seconds is not None:
            self.clock.go_on(seconds, self.handled)
            self.handled = 0.0
            if self.clock.seconds > self.queued_at + REQUEUE:
                self.queue_behind()
        if self.signals.reading in ready:
            self.signals.take()
        if self.lifeline in ready:
            self.told_to_leave = True
        if self.told_to_leave and self.board.head[Board.STOPPING] and not self.stopping:
            self.stopping = True  # clients that have not sent a byte notice it
            ready |= dict.fromkeys(self.in_hand, 0)
        return ready

    def accept(self) -> bool:
        """Accept a client and converse with it as far as it goes.  Whether there was one."""
        try:
            descriptor, address = self.listener._accept()  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError):
            return False
        except OSError as why:
            if why.errno in FULL and self.in_hand:
                self.part_with(next(iter(self.in_hand.values())), "too many clients in hand")
            elif why.errno in FULL:
                log(record("*", f"Cannot Accept: {why.strerror}"))
                time.sleep(0.5)
            return False  # otherwise it is a fault of that connection (accept(2), "Error handling")
        # _accept() and SocketType are worth a tenth: accept() converts two enumerations, and asks the kernel for the
        # address a second time.
        connection = socket.SocketType(*self.kind, descriptor)
        connection.setblocking(False)  # whatever default the handler's module has set
        self.requests_left -= 1
        client = Client(connection, descriptor, address[0].removeprefix("::ffff:"))
        client.conversation = self.converse(client)
        self.go_on(client)
        return True

    def gives_way(self) -> bool:
        """Whether to leave a new client, for a moment, to another worker, since a handler would delay those in hand.

        To one that has nobody in hand: it has been woken, but not scheduled yet.  And to any that runs no handler while
        the text of this worker's latest client is still coming, as its half-close nearly always does at once.
        """
        if not self.foreign or self.told_to_leave:
            return False
        others = [place for place in self.board.places
                  if place is not self.place and place[Board.STATE] == Board.SERVING and not place[Board.CALLED]]
        idle = any(not place[Board.IN_HAND] for place in others)
        expecting = bool(others) and self.clock.seconds < self.latest_until and self.latest in self.in_hand
        if self.gave_way == GIVE_WAY_TIMES or not (idle or expecting):
            self.gave_way = 0
            return False
        self.gave_way += 1
        if expecting:
            readable(self.latest, A_MOMENT)
        else:
            time.sleep(A_MOMENT)
        return True

    def leave(self) -> None:
        """Accept no more; have the generation replace this worker, which ends when those in hand are served.

        A worker that leaves for its requests goes on accepting while too many others are leaving.
        """
        self.place[Board.STATE] = Board.LEAVING
        if self.in_hand:
            allowed = self.board.head[Board.LIMIT] - self.board.workers
            if not self.told_to_leave and self.board.count(Board.TOLD, Board.LEAVING, Board.ENDED) > allowed:
                self.place[Board.STATE] = Board.SERVING
                return
            self.call_generation()
        self.serving = False
        self.poller.unregister(self.listener)  # closing it is not enough while others hold it open
        self.poller.unregister(self.lifeline)
        self.listener.close()

    # -- clients in hand --

    def go_on(self, client: Client) -> None:
        """Let the client's conversation go on until it waits, with its client in hand, or ends."""
        self.connection = client.connection
        try:
            wish = next(client.conversation, None)
        except Exception as why:  # a fault of this program, or an alarm of the handler's: not the other clients' fault
            log(traced("Conversation Failed:", why))
            wish = None
        if not wish:
            self.let_go(client)
            return
        events, client.until, held = wish
        if client.descriptor not in self.in_hand:
            self.take_in_hand(client, events)
        elif events != client.events:
            self.poller.modify(client.descriptor, events)
        self.look_at = min(self.look_at, client.until)
        self.held += held - client.held
        client.events, client.held = events, held
        while self.held > TEXTS_IN_HAND * self.settings.max_text + BREATH:
            self.part_with(next(each for each in self.in_hand.values() if each.held), "too many bytes in hand")
        if len(self.in_hand) > self.most_clients:
            self.part_with(next(iter(self.in_hand.values())), "too many clients in hand")

    def take_in_hand(self, client: Client, events: int) -> None:
        if not self.in_hand:
            self.clock.before, self.handled = time.monotonic(), 0.0  # nobody has been waiting until now
        self.in_hand[client.descriptor] = client
        self.place[Board.IN_HAND] = len(self.in_hand)
        client.events, client.held = events, 0
        self.latest, self.latest_until = client.descriptor, self.clock.seconds + 2 * A_MOMENT
        self.poller.register(client.descriptor, events)
        self.queue_behind()

    def let_go(self, client: Client) -> None:
        if client.descriptor in self.in_hand:
            del self.in_hand[client.descriptor]
            self.place[Board.IN_HAND] = len(self.in_hand)
            self.held -= client.held
            self.poller.unregister(client.descriptor)  # closing it is not enough if the handler has forked
            client.conversation = iter(())  # which knows its client, and so would keep it, and what it holds
        client.connection.close()  # which sends what was held back, in one packet with the end

    def late(self) -> list[int]:
        """Those whose time is over, several at once: a look takes as long as there are clients in hand."""
        now = self.clock.seconds
        if now < self.look_at:
            return []
        soonest = min((client.until for client in self.in_hand.values() if client.until > now), default=math.inf)
        self.look_at = max(soonest, now + LOOK_APART)
        return [client.descriptor for client in self.in_hand.values() if client.until <= now]

    def part_with(self, client: Client, why: str) -> None:
        """Let a client go without a reply, and say so in the log, not more than once a second."""
        self.parted += 1
        if (now := time.monotonic()) >= self.parted_at + 1.0:
            before = f" (and {self.parted - 1} before)" if self.parted > 1 else ""
            log(record("-", f"Client: {client.name}; Dropped: {why}{before}."))
            self.parted_at, self.parted = now, 0
        self.let_go(client)

    def queue_behind(self) -> None:
        """Register the listener anew, behind the workers that have no clients in hand."""
        self.queued_at = self.clock.seconds
        if self.serving and EXCLUSIVE:
            self.poller.unregister(self.listener)
            self.poller.register(self.listener, IN | EXCLUSIVE)

    # ---- Conversation ---------------------------------------------------------------

    def converse(self, client: Client) -> Iterator[Wish]:
        """One request, from its first byte to the end of its reply.  A client that sends nothing is none."""
        connection = client.connection
        records = record("-", "Client Query Processing Started.", self.pid)
        text, half_closed, until, quiet, breath = bytearray(), False, 0.0, 0.0, BREATH
        try:
            # Receive, until the client half-closes or, if the text is short, falls silent.
            while True:
                piece = receive(connection)
                if piece:
                    text += piece
                    quiet = 0.0
                    if len(text) > self.settings.max_text:
                        raise Refused(f"text longer than {self.settings.max_text} bytes")
                    if len(text) < breath:
                        continue
                    breath += BREATH
                elif piece is not None:
                    half_closed = True
                    break
                elif text and not until and not self.in_hand:
                    until = self.clock.seconds + self.settings.timeout
                    readable(connection, A_MOMENT)
                    continue
                now = self.clock.seconds
                until = until or now + self.settings.timeout
                quiet = quiet or now + patience_after(text)
                if now >= min(until, quiet) or (self.stopping and not text):
                    break
                yield IN, min(until, quiet), len(text)
            if not text and not half_closed:
                self.requests_left += 1
                return
            if not half_closed and quiet > until:
                raise Refused(f"text not ended within {self.settings.timeout:g} s")

            # Handle.
            whole = text.decode()
            text = bytearray()
            records += record("-", f"Client: {client.name}; Received Text:", self.pid) + indented(whole[:LOGGED])
            if len(whole) > LOGGED:
                records += record("-", f"Logged {LOGGED} of {len(whole)} Characters.")
            log(records)
            records = ""
            reply = self.handle(whole)
            whole = ""
        except (Refused, UnicodeDecodeError, MemoryError) as why:
            text, whole = bytearray(), ""  # which may be large
            reason = (f"text is not UTF-8 at byte offset {why.start}" if isinstance(why, UnicodeDecodeError) else
                      "not enough memory" if isinstance(why, MemoryError) else str(why))
            log(records + record("-", f"Client: {client.name}; Refused: {reason}."))
            records, reply = "", b"%d error: %b\n" % (self.pid, reason.encode())
        except OSError as why:
            if text:
                log(records + record("-", f"Client: {client.name}; Lost: {why.strerror or why}.")
                    + record("-", "Client Query Processing Ended.", self.pid))
            else:
                self.requests_left += 1
            return
        self.place[Board.SERVED] += 1

        # Answer.
        try:
            sent = send(connection, reply)  # nearly always all of it
            if sent < len(reply):
                until, rest = self.clock.seconds + self.settings.timeout, memoryview(reply)[sent:]
                while rest:
                    if self.clock.seconds >= until:
                        raise TimeoutError("timed out")
                    yield OUT, until, len(reply)
                    rest = rest[send(connection, rest):]
            if not half_closed:  # to close with data unread resets the connection (RFC 2525, 2.17), reply and all
                connection.shutdown(socket.SHUT_WR)
                reply, rest = b"", memoryview(b"")  # which may be large
                until, quiet = self.clock.seconds + self.settings.timeout, self.clock.seconds + 1.0
                while self.clock.seconds < min(until, quiet):
                    yield IN, min(until, quiet), 0
                    piece = receive(connection)
                    if piece:
                        quiet = self.clock.seconds + 1.0
                    elif piece is not None:
                        break
        except OSError as why:
            log(record("-", f"Client: {client.name}; Reply Not Taken: {why.strerror or why}."))
        log(record("-", "Client Query Processing Ended.", self.pid))

    def handle(self, text: str) -> bytes:
        """The handler's reply, as it is sent.  Raises Refused, whatever the handler raises."""
        self.place[Board.CALLED] = called = time.monotonic()
        if self.foreign:
            sys.stdout = sys.stderr = self.printed.stream()
        try:
            reply = self.handler(text)
            if not isinstance(reply, str):
                raise TypeError(f"handler returned {type(reply).__name__}, expected str")
            return b"%d %b\n" % (self.pid, str.encode(reply))
        except BaseException as why:  # SystemExit too: no text ends a worker
            log(traced("Handler Failed:", why))
            raise Refused("handler failed") from None
        finally:
            if self.foreign:
                self.tidy_up()
            self.place[Board.CALLED] = 0
            if self.in_hand:
                self.handled += time.monotonic() - called

    def tidy_up(self) -> None:
        """Take back what the handler may have done to this process."""
        if self.in_fork:
            os._exit(0)  # it is not to serve
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.fchdir(self.home)
        self.printed.end_line()
        kept_open = self.lowest_free_descriptor() - self.own_descriptors - len(self.in_hand)
        if 2 * kept_open > self.most_clients and not self.told_to_leave:
            log(record("*", "Handler Keeps Descriptors Open."))
            self.told_to_leave = True  # before it takes another client, which the handler would fail

    def lowest_free_descriptor(self) -> int:
        try:
            descriptor = os.dup(self.home)
            os.close(descriptor)
            return descriptor
        except OSError:
            return sys.maxsize


class Refused(Exception):
    """Why a client gets no answer to its text; it is told."""


def receive(connection: socket.SocketType) -> bytes | None:
    """What has come, nothing at the end, None if nothing has come yet.  Raises OSError."""
    try:
        return connection.recv(RECEIVE_BYTES)
    except BlockingIOError:
        return None


def send(connection: socket.SocketType, data: bytes | memoryview) -> int:
    """How much of DATA was sent.  Raises OSError."""
    try:
        return connection.send(data, HOLD_BACK)
    except BlockingIOError:
        return 0


OPEN_SIDE_BYTES = 2000  # what the original read at the most, from clients that keep their sending side open


def patience_after(text: bytearray) -> float:
    """Seconds of silence after which TEXT is taken to be whole."""
    if not 0 < len(text) <= OPEN_SIDE_BYTES:
        return math.inf
    return 0.1 if text.endswith(b"\n") else 1.0


def readable(file: int | socket.SocketType, seconds: float) -> bool:
    """Whether FILE has something to read, or ends, within SECONDS."""
    return wait_for(select.POLLIN, file, seconds)


def wait_for(event: int, file: int | socket.SocketType, seconds: float | None = None) -> bool:
    """Wait for an EVENT of poll(2), or the end, of FILE; whether it comes within SECONDS.  FILE may be above 1023."""
    poller = select.poll()
    poller.register(file, event)
    return bool(poller.poll(None if seconds is None else math.ceil(seconds * 1000)))


# ---- The end of a process that has run a handler ------------------------------------


def buffered_files() -> list[weakref.ref[Any]]:
    """The files that may have to be written yet: those with buffers of any kind.

    gc.freeze() hides from gc.get_objects() what existed before, so those of the import are collected in time.
    """
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, (io.TextIOBase, io.BufferedIOBase))}
    return [weakref.ref(each) for each in objects if type(each) in kinds]


def disown() -> None:
    """Forget what the module started at import: the generation, not each worker, ends it."""
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"]._children.clear()  # as multiprocessing does in its own children
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]  # temporary directories, for instance
        finalizer.atexit = False


def end_as_python_does(files: list[weakref.ref[Any]], threads: bool = True) -> None:
    """Join THREADS and shut down pools, call what is registered with atexit, write and close FILES and newer ones.

    That is what the interpreter does at its end, but for tearing down every module, which would copy every page that
    this process shares.  multiprocessing ends its processes by the same two private functions.
    """
    if threads and "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    left = [file for found in (*files, *buffered_files()) if (file := found()) is not None]
    # The outer layers before the inner: text, then what is compressed and the like, then bytes.
    for file in sorted(left, key=lambda file: (not isinstance(file, io.TextIOBase), type(file).__module__ == "_io")):
        try:
            file.close()
        except Exception as why:
            log(traced("Not Written:", why))


# ---- Log ----------------------------------------------------------------------------

LOGGED = 2000  # characters of a client's text
TRACED = 4000  # characters of a traceback


def open_log(name: str, terminal: int = 2) -> io.FileIO:
    """The log file, for its owner and group only; or TERMINAL, the standard error with -f.  Raises Failure."""
    with failing_to(f"open log file {name}"):
        if name == STANDARD_ERROR:
            return io.FileIO(os.dup(terminal), "wb")
        return io.FileIO(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o640), "ab")


class Log:
    """The log, which is descriptor 2: whole lines, whoever writes, whatever happens."""

    def __init__(self) -> None:
        self.is_regular = True
        self.cut_short = mmap.mmap(-1, 1)  # whether the last write was; all processes share it

    def take(self, file: io.FileIO) -> None:
        """Let FILE be the log from now on; it is closed."""
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        self.is_regular = stat.S_ISREG(os.fstat(2).st_mode)
        file.close()

    def write(self, lines: bytes) -> None:
        """Write LINES at once.  A log that cannot be written costs records, never service."""
        for piece in [lines] if self.is_regular else pieces(lines):
            if self.cut_short[0]:
                piece = b"\n" + piece
            try:
                written = os.write(2, piece)
            except OSError:
                return
            if written < len(piece) or self.cut_short[0]:
                self.cut_short[0] = not piece[:written].endswith(b"\n")


LOG = Log()


def pieces(lines: bytes) -> Iterator[bytes]:
    """LINES in pieces of whole lines that a pipe takes in one (PIPE_BUF, pipe(7)).  A longer line becomes several."""
    most, piece = select.PIPE_BUF - 1, b""
    for line in lines.splitlines(keepends=True):
        while len(line) > most:
            end = most - 1
            while line[end] & 0xC0 == 0x80:  # within a character
                end -= 1
            yield from filter(None, (piece, line[:end] + b"\n"))
            piece, line = b"", b"    " + line[end:]
        if len(piece) + len(line) > most:
            yield piece
            piece = b""
        piece += line
    yield piece


def log(records: str) -> None:
    LOG.write(records.encode(errors="backslashreplace"))


def record(mark: str, message: str, pid: int = 0) -> str:
    """A line of the log: MARK is * for the life of processes, - for requests.  MESSAGE must be printable."""
    second, millisecond = divmod(time.time_ns() // 1_000_000, 1000)
    return f"{timestamp(second) % millisecond} {mark} {pid or os.getpid()} {message}\n"


@functools.lru_cache(maxsize=1)  # a second has many records
def timestamp(second: int) -> str:
    """The time of a record, whose milliseconds are left to be filled in."""
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
    """A record with the traceback of WHY, whose text may be a client's: long ones are cut in the middle."""
    trace = [f"{type(why).__name__}, which cannot be told"]
    with suppress(BaseException):  # an exception of the handler's own may fail to say what it is
        trace = traceback.format_exception(why)
    text = "".join(part[:TRACED // 2] for part in trace)
    if len(text) > TRACED:
        text = f"{text[:TRACED // 2]}\n...\n{text[5 - TRACED // 2:]}"
    return record("*", printable(message)) + indented(text)


class Printed(io.RawIOBase):
    """What handlers print, which goes to the log as it is, line by line.  It never fails, and cannot be closed."""

    rest = b""  # of a line that is not complete

    def stream(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(self, "utf-8", "backslashreplace", write_through=True)  # type: ignore[arg-type]

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, data: Any) -> int:
        lines, newline, self.rest = (self.rest + bytes(data)).rpartition(b"\n")
        if newline:
            LOG.write(lines + newline)
        return len(data)

    def end_line(self) -> None:
        if self.rest:
            self.write(b"\n")

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main()
