#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["python-daemon>=2.3", "lockfile>=0.12.2"]
# ///
"""daemontest: a pre-forking UNIX daemon that answers each text with its length.

    manager ---+---> keeper                      keeps the clients that would make a worker wait
               +---> generation ---> N workers   all accepting on one listening socket

The manager owns the PID file, the listening socket and the log, and never runs the handler's code.  A generation is
one reading of the configuration and one import of the handler; a reload is the next generation.  A worker serves one
client at a time; one that would make it wait goes to the keeper, which passes whole texts to idle workers.

Signals to the manager:  TERM, INT, QUIT   stop gracefully
                         HUP               reload configuration and handler, reopen the log
                         USR1              log the status
Signals to a worker:     TERM              finish the request in hand, exit, be replaced

Exit status: 0 done, 1 failed (one line on standard error says why), 2 wrong usage, 3 --status and not running.
"""

from __future__ import annotations

import argparse
import array
import atexit
import errno
import faulthandler
import fcntl
import functools
import gc
import glob
import importlib
import inspect
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
import struct
import sys
import time
import tomllib
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import Field, dataclass, field, fields, replace
from enum import Enum
from typing import Any, NoReturn

PROGRAM = "daemontest.py"
__version__ = "3.0.0"

try:
    from daemon import DaemonContext
    from lockfile.pidlockfile import PIDLockFile
except ImportError as why:
    sys.exit(f"{PROGRAM}: cannot import a library: {why}; pip install python-daemon lockfile")


def text_length(text: str) -> str:
    """Return the length of TEXT: the service itself, unless --handler names another."""
    return f"your text size: {len(text)}"


class Failure(Exception):
    """An error to print on one line; the program exits with EXIT_STATUS."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@contextmanager
def failing_to(act: str) -> Iterator[None]:
    """Turn an OSError, or the ValueError of an impossible file name, into a Failure: "cannot ACT: WHY"."""
    try:
        yield
    except (OSError, ValueError) as why:
        raise Failure(f"cannot {act}: {getattr(why, 'strerror', None) or why}") from why


# ---- Log ----------------------------------------------------------------------------

LOGGED, TRACED = 2000, 4000  # characters of a client's text, and of a traceback


def open_log(name: str, stderr: int = 2) -> int:
    """Open the log, or copy STDERR if it has no NAME; only its owner and group can read it.  Raise Failure."""
    with failing_to(f"open log file {name}"):
        return os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o640) if name else os.dup(stderr)


def log_to(file: int) -> None:
    """Make FILE the log: standard output and standard error, whoever writes to them."""
    os.dup2(file, 1)
    os.dup2(file, 2)


def log(mark: str, *messages: str, pid: int = 0, text: str = "") -> None:
    """Write a record for each of MESSAGES, all printable, and TEXT below.  MARK is * for processes, - for requests."""
    second, millisecond = divmod(time.time_ns() // 1_000_000, 1000)
    begin = f"{timestamp(second) % millisecond} {mark} {pid or os.getpid()} "
    write_lines(begin + f"\n{begin}".join(messages) + "\n" + indented(text))


@functools.lru_cache(maxsize=1)  # many records share a second; %03d is left for the milliseconds
def timestamp(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.%%03d%z", time.localtime(second))


def indented(text: str) -> str:
    """Return TEXT as lines that can neither be mistaken for records nor drive a terminal."""
    return "    " + printable(text.removesuffix("\n"), "\n\u3000").replace("\n", "\n    ") + "\n" if text else ""


def printable(text: str, kept: str = "\u3000") -> str:  # CJK's space: not isprintable()
    """Return TEXT with non-printing characters, except those KEPT, and \\ escaped as in a Python string literal."""
    if text.replace(kept[0], "").isprintable() and "\\" not in text:  # the usual case
        return text
    return "".join(c if c in kept or (c.isprintable() and c != "\\") else c.encode("unicode_escape").decode()
                   for c in text)


def log_traceback(message: str, why: BaseException) -> None:
    """Log the traceback of WHY, cut in the middle if it is long, as a client's text makes it."""
    text = f"{type(why).__name__}, which cannot be printed"
    with suppress(BaseException):  # the handler's own exception may fail to say what it is
        text = "".join(traceback.format_exception(why))
    if len(text) > TRACED:
        text = f"{text[:TRACED // 2]}\n...\n{text[-TRACED // 2:]}"
    log("*", printable(message), text=text)


def write_lines(data: str) -> None:
    """Write DATA, cut in the middle to PIPE_BUF bytes, which even a pipe keeps whole (pipe(7))."""
    while len(written := data.encode(errors="backslashreplace")) > select.PIPE_BUF:
        part = len(data) * 3 // 8
        data = f"{data[:part].rstrip()}\n    ...\n    {data[-part:].lstrip()}"
    try:
        os.write(2, written)
    except OSError:
        pass  # a full disk costs records, never service


class Printed(io.FileIO):
    """What a handler prints, until end_line(): whole lines go to the log as they are.  Writing never fails."""

    def __init__(self) -> None:
        super().__init__(2, "w", closefd=False)
        self.rest = b""  # of a line that is not whole
        # A new stream for each text, whatever the handler has done to the last one.
        self.stream = sys.stdout = sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(self), "utf-8", "backslashreplace", line_buffering=True)

    def write(self, data: Any) -> int:
        lines, newline, self.rest = (self.rest + bytes(data)).rpartition(b"\n")
        with suppress(OSError):
            os.write(2, lines + newline)
        return len(data)

    def end_line(self) -> None:
        with suppress(ValueError):  # the handler has closed or detached the stream
            self.stream.flush()
        if self.rest:
            self.write(b"\n")


# ---- PID file -----------------------------------------------------------------------

class PidFile(PIDLockFile):  # type: ignore[misc]
    """A PID file.  While the service runs, the manager holds its flock(2) exclusively; others try a shared one."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.lock = self.reloads_file = -1  # the manager's descriptors: of the file, and of the line PATH.reloads
        self.reloads, self.reload_pending = 0, False  # how many have begun; whether the last one has not ended

    def claim(self) -> None:
        """Take the lock for the manager that is about to be forked.  Raise Failure."""
        with failing_to(f"use PID file {self.path}"):
            for _ in retries():
                file = self.open_for(os.O_RDWR | os.O_CREAT)
                if not take_lock(file, fcntl.LOCK_SH):
                    raise Failure(f"cannot start: already running (PID file {self.path})")
                if not re.fullmatch(rb"\s*\S{0,32}\s*", os.pread(file, 2**20, 0)):
                    raise OSError("not a PID file, since it holds more than a number")
                if take_lock(file, fcntl.LOCK_EX) and self.is_at_path(file):
                    if os.fstat(file).st_uid == os.geteuid():
                        os.truncate(file, 0)
                        os.fchmod(file, 0o644)
                        self.lock = file
                        return
                    os.unlink(self.path)  # left over by another user: only root comes here
                os.close(file)

    def acquire(self, timeout: float | None = None) -> None:
        """Write the PID of this process.  DaemonContext calls this after its last fork; claim() took the lock."""
        with suppress(FileNotFoundError):
            os.unlink(f"{self.path}.reloads")
        self.reloads_file = self.open_for(os.O_RDWR | os.O_CREAT | os.O_EXCL, f"{self.path}.reloads")
        os.write(self.lock, b"%d\n" % os.getpid())

    def tell_reload(self, outcome: str = "") -> None:
        """Tell those who wait that one more reload has begun; or its OUTCOME, "ok" or why it failed."""
        self.reload_pending = not outcome
        self.reloads += self.reload_pending
        line = f"{self.reloads} {printable(outcome)[:2000]}\n".encode(errors="backslashreplace")
        with suppress(OSError):  # a full disk must not end the manager
            os.pwrite(self.reloads_file, line, 0)
            os.truncate(self.reloads_file, len(line))

    def release(self) -> None:
        """Empty and remove the file.  The lock is held until the process exits."""
        if self.is_at_path(self.lock):
            with suppress(OSError):  # in a directory that lets nothing be removed
                os.truncate(self.lock, 0)
                for path in filter(os.path.exists, (f"{self.path}.reloads", self.path)):  # in this order: see claim()
                    os.unlink(path)

    def ask_for_reload(self) -> int:
        """Have the manager reload, and wait until that is over; return its PID.  Raise Failure."""
        pid, process = self.find_manager()
        with failing_to(f"read {self.path}.reloads"):
            file = self.open_for(os.O_RDONLY, f"{self.path}.reloads")
            begun = int(os.pread(file, 8192, 0).partition(b" ")[0] or 0)
        self.signal_manager(signal.SIGHUP)  # only now, since what has begun before is not ours
        while not readable(0.01, process):
            found = re.match(rb"(\d+) ([^\n]+)\n", os.pread(file, 8192, 0))
            if found and int(found[1]) > begun:
                if found[2] == b"ok":
                    return pid
                raise Failure(f"nothing changed: {found[2].decode(errors='replace')}")
        raise Failure("nothing changed: the service has stopped")

    def signal_manager(self, signum: int) -> tuple[int, int]:
        """Signal the manager; return its PID and a pidfd.  Raise Failure."""
        pid, process = self.find_manager()
        with failing_to("signal the manager"), suppress(ProcessLookupError):  # it has just ended
            signal.pidfd_send_signal(process, signum)
        return pid, process

    def find_manager(self, exit_status: int = 1) -> tuple[int, int]:
        """Return the PID of the living manager and a pidfd; wait for one that is starting.  Raise Failure."""
        with failing_to(f"read PID file {self.path}"), suppress(FileNotFoundError):
            for _ in retries():
                with open(self.open_for(os.O_RDONLY), "rb", buffering=0) as file:
                    if take_lock(file.fileno(), fcntl.LOCK_SH):
                        break
                    content = file.read(20)
                    if not re.fullmatch(rb"[1-9]\d{0,8}\n", content):
                        continue
                    with suppress(ProcessLookupError):  # it has just ended
                        pid, owner = int(content), os.fstat(file.fileno()).st_uid
                        process = os.pidfd_open(pid)
                        # A stranger may have locked a leftover file.  What /proc hides, we cannot signal.
                        with suppress(FileNotFoundError):
                            if os.stat(f"/proc/{pid}").st_uid != owner:
                                raise OSError(f"process {pid} does not belong to the file's owner")
                        if not take_lock(file.fileno(), fcntl.LOCK_SH) and os.pread(file.fileno(), 20, 0) == content:
                            return pid, process  # otherwise the number may mean another process by now
        raise Failure(f"not running (PID file {self.path})", exit_status)

    def open_for(self, flags: int, path: str = "") -> int:
        """Open the file, which must be a regular file and no symbolic link; return a descriptor.  Raise OSError."""
        if os.path.islink(path or self.path):
            raise OSError("is a symbolic link")
        file = os.open(path or self.path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError("not a regular file")
        return file

    def is_at_path(self, file: int) -> bool:
        """Return whether the path still names FILE."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        return False


def retries() -> Iterator[None]:
    """Yield every 2 ms for 4 s, longer than a start or a command's lock lasts; then raise OSError."""
    end = time.monotonic() + 4.0
    while time.monotonic() < end:
        yield
        time.sleep(0.002)
    raise OSError("another program keeps it locked")


def take_lock(file: int, kind: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    return False


# ---- Signals, processes, messages ---------------------------------------------------

# What the manager's loop reads; what it ignores; what the others ignore (but a worker handles TERM, and ALRM kills it).
MANAGER_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD}
MEANINGLESS = {signal.SIGPIPE, signal.SIGUSR2, signal.SIGALRM}
MEANINGLESS_TO_OTHERS = (MANAGER_SIGNALS | MEANINGLESS) - {signal.SIGCHLD, signal.SIGALRM}
RECEIVE_BYTES = 16384  # at once; more does not stay in the processor's nearest cache
RECEIVE_SPACE = socket.CMSG_SPACE(8 * 4)  # for at most eight descriptors with a message
PATIENCE = struct.pack("qq", 1, 0)  # (s, µs) to wait for a keeper that takes no clients: it is suspended, or has died

Handler = Callable[[str], str]
Life = Callable[[], Any]  # what a process does next; it returns what comes after that, or None


def do_nothing(*_: object) -> None:
    """Do nothing.  Unlike SIG_IGN, it is not inherited by the commands that a handler runs (execve(2))."""


class Signals:
    """The self-pipe trick: each signal becomes a byte in a pipe that a loop polls, so none interrupts or is lost."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)

    def wait(self, seconds: float | None, *files: int) -> list[int]:
        """Wait for a signal, or for something to read from FILES, at most SECONDS; return the signals, in order."""
        readable(seconds, self.reading, *files)
        return self.take()

    def take(self) -> list[int]:
        with suppress(BlockingIOError):
            return list(os.read(self.reading, 65536))
        return []


def set_signals(action: Any, signals: set[signal.Signals]) -> None:
    for signum in signals:
        signal.signal(signum, action)
        if callable(action):
            signal.siginterrupt(signum, False)  # for the sake of C code that the service's handler calls


def reset_signals() -> None:
    """Set what signals mean in all processes but the manager."""
    signal.set_wakeup_fd(-1)
    set_signals(do_nothing, MEANINGLESS_TO_OTHERS)
    set_signals(signal.SIG_DFL, {signal.SIGCHLD, signal.SIGALRM})
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def name_process(name: str) -> None:
    """Have ps(1) show NAME: at most 15 bytes (proc(5)); no spaces, as CPython parses /proc/self/stat by spaces."""
    with suppress(OSError), open("/proc/self/comm", "wb", buffering=0) as comm:
        comm.write(name.encode())


def begin_process(name: str, *files: int) -> None:
    """Set up a process that the manager has just forked; of the manager's descriptors it keeps only FILES."""
    os.setpgid(0, 0)
    name_process(name)
    for file in {*map(int, os.listdir("/proc/self/fd"))} - {0, 1, 2, *files}:
        with suppress(OSError):  # that of the list itself
            os.close(file)
    reset_signals()


def kill_group(pid: int) -> None:
    """Kill the group of process PID, which has exited, or cannot be relied on to."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def cause_of_death(status: int) -> str:
    """Return what a process died of: the name of the signal, or the exit status (waitpid(2))."""
    code = os.waitstatus_to_exitcode(status)
    with suppress(ValueError):
        return f"exit status {code}" if code >= 0 else signal.Signals(-code).name
    return f"signal {-code}"


def readable(seconds: float | None, *files: int) -> bool:
    """Wait for something to read from any of FILES, or its end; return whether that came within SECONDS."""
    poller = select.poll()  # select(2) takes no descriptor above 1023
    for file in files:
        poller.register(file, select.POLLIN)
    return bool(poller.poll(None if seconds is None else math.ceil(seconds * 1000)))


def seqpacket_pair() -> tuple[int, int]:
    """Return the ends of a connection that keeps messages apart; each message goes to exactly one reader."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
        # So small that fewer than 256 descriptors are in flight: above RLIMIT_NOFILE, sending fails (unix(7)).
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, PATIENCE)  # of the worker's end, which is made blocking
    return ends[0].detach(), ends[1].detach()


def send_message(end: int, message: str, files: Sequence[int] = ()) -> None:
    """Send MESSAGE, and copies of the descriptors FILES, to another process, which may be gone."""
    with suppress(OSError), socket.socket(fileno=os.dup(end)) as channel:
        socket.send_fds(channel, [message.encode(errors="backslashreplace")], files)


def read_message(end: int) -> tuple[str, list[int]]:
    """Return the next message and its descriptors; nothing if none has come, or none can come any more."""
    with suppress(BlockingIOError, ConnectionResetError), socket.socket(fileno=os.dup(end)) as channel:
        message, files = receive_message(channel)
        return message.decode(errors="replace"), files
    return "", []


def receive_message(channel: socket.socket) -> tuple[bytes, list[int]]:
    """Return the next message and its descriptors, b"" at the end.  Raise OSError; BlockingIOError if none is there."""
    message, ancillary, flags, _ = channel.recvmsg(RECEIVE_BYTES, RECEIVE_SPACE, socket.MSG_CMSG_CLOEXEC)
    files = array.array("i", ancillary[0][2]).tolist() if ancillary else []
    if flags & socket.MSG_CTRUNC:
        for file in files:
            os.close(file)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return message, files


# ---- Settings -----------------------------------------------------------------------

SECONDS = (0.01, 86400)
NAME = r"[^\0]+"
STARTED_IN = "/"
with suppress(FileNotFoundError):  # that directory may have been removed
    STARTED_IN = os.getcwd()


def absolute(path: str, directory: str = STARTED_IN) -> str:
    return os.path.join(directory, os.path.expanduser(path))


def option(default: Any, fits: Any, metavar: str, about: str, *short: str) -> Any:
    """Declare a setting.  FITS is (least, most) for a number, a regular expression for a string."""
    shown = f"{default:g}" if fits is SECONDS else str(default)
    return field(default=absolute(default) if metavar == "FILE" else default,
                 metadata={"fits": fits, "metavar": metavar, "help": about.replace("%", shown), "short": short})


@dataclass(frozen=True)
class Settings:
    """All settings.  Each is a long option and, with _ for -, a key of the configuration file."""

    bind: str = option("", NAME, "ADDRESS", "where to listen (default: every address, IPv4 and IPv6)", "-b")
    port: int = option(36000, (1, 65535), "N", "TCP port (default: %)", "-p")
    workers: int = option(5, (1, 10000), "N", "pre-forked worker processes (default: %)", "-w")
    max_requests: int = option(100, (1, 10**9), "N", "texts until a worker is replaced (default: %)", "-n")
    handler: str = option("", r"\w+(\.\w+)*:\w+", "MODULE:FUNCTION",
                          "the service, a function from text to text (default: the length of the text)")
    timeout: float = option(10.0, SECONDS, "SECONDS", "for a client's text, and for its reply (default: %)")
    handler_timeout: float = option(30.0, SECONDS, "SECONDS", "for the handler, or its worker is killed (default: %)")
    grace: float = option(30.0, SECONDS, "SECONDS", "for workers to finish at a stop or reload (default: %)")
    max_text: int = option(2**24, (1, 2**30), "BYTES", "longer texts are refused (default: %)")
    pid_file: str = option("~/daemontest.pid", NAME, "FILE", "holds the manager's process ID (default: %)")
    log_file: str = option("~/daemontest.log", NAME, "FILE", "the log (default: %; with -f standard error)")
    log: str = option("texts", "texts|requests|life", "WHAT",
                      "texts: everything; requests: no texts; life: processes and faults alone (default: %)")
    directory: str = STARTED_IN  # where the handler is searched for first; no option


OPTIONS: dict[str, Field[Any]] = {each.name: each for each in fields(Settings) if each.metadata}
FIXED = ("bind", "port", "pid_file")  # while the service runs
Read = Callable[..., Settings]  # read_settings(), with what the command line says


def fitting(name: str, value: Any, directory: str = STARTED_IN) -> Any:
    """Return VALUE, checked and converted for setting NAME.  Raise ValueError saying what was expected."""
    default: Any = OPTIONS[name].default
    facts, kind = OPTIONS[name].metadata, type(default)
    if kind is str:
        good = isinstance(value, str) and re.fullmatch(facts["fits"], value)
        expected = f"a string, {facts['fits'] if facts['metavar'] == 'WHAT' else facts['metavar']}"
    else:
        least, most = facts["fits"]
        good = type(value) in (int, kind) and least <= value <= most  # a bool is no number here
        expected = f"a {'whole number' if kind is int else 'number of seconds'} from {least} to {most}"
    if not good:
        raise ValueError(f"expected {expected}")
    return absolute(value, directory) if facts["metavar"] == "FILE" else kind(value)


def read_settings(file: str | None, options: dict[str, Any], **defaults: Any) -> Settings:
    """Merge the settings: the command line's OPTIONS over FILE over DEFAULTS over the built-in ones.  Raise Failure."""
    path = absolute("~/daemontest.toml" if file is None else file)
    values = defaults
    if file is not None or os.path.exists(path):
        values["directory"] = os.path.dirname(path)
        with failing_to(f"read configuration {path}"), open(path, "rb") as opened:
            content = opened.read()
        fault = "expected TOML"
        try:
            for key, value in tomllib.loads(content.decode()).items():
                fault = key
                if key not in OPTIONS:
                    raise ValueError(f"unknown key, expected one of {', '.join(OPTIONS)}")
                values[key] = fitting(key, value, values["directory"])
        except (ValueError, RecursionError) as why:  # TOML's own and UTF-8's, too
            raise Failure(f"bad configuration {path}: {fault}: {why}") from why
    return Settings(**values | options)


# ---- Command line -------------------------------------------------------------------

def main() -> None:
    """Do what the command line says.  A forked child returns its life through its callers; it begins here."""
    try:
        # Open descriptors 0 to 2, if the parent left them closed, before other files take these numbers.
        while os.open(os.devnull, os.O_RDWR) < 2:
            pass
        for number, name in enumerate(("stdin", "stdout", "stderr")):  # which DaemonContext expects to be there
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, "w" if number else "r", closefd=False))
        life: Life | None = parse_command_line()
        atexit.register(os._exit, 0)  # called last: the interpreter exits as usual, but takes no modules apart
        while life:
            life = life()
    except (Failure, KeyboardInterrupt) as why:
        write_lines(f"{PROGRAM}: {printable(str(why) or 'interrupted')[:1000]}\n")  # so short that it stays one line
        os._exit(why.exit_status if isinstance(why, Failure) else 1)
    except Exception as why:  # a fault of this program
        log_traceback("Process Failed:", why)
        os._exit(1)


def parse_command_line() -> Life:
    """Return what the command line asks for."""
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
    parser.add_argument("-c", "--config", metavar="FILE", help="configuration (default: ~/daemontest.toml, if there)")
    group = parser.add_argument_group("settings")
    for name, each in OPTIONS.items():
        group.add_argument(*each.metadata["short"], f"--{name.replace('_', '-')}", type=type(each.default),
                           help=each.metadata["help"], default=argparse.SUPPRESS, metavar=each.metadata["metavar"])
    options = vars(parser.parse_args())
    action, file = options.pop("action"), options.pop("config")
    for name, value in options.items():
        try:
            options[name] = fitting(name, value)
        except ValueError as why:
            parser.error(f"--{name.replace('_', '-')}: {why}")
    if action in (terminate, reload, status):
        if unheard := options.keys() - {"pid_file"}:
            parser.error(f"--{min(unheard).replace('_', '-')} does not reach the running service: configure it")
        file = os.devnull if options else file  # a configuration that has broken since the start is not in the way
    return functools.partial(action, functools.partial(read_settings, file=file, options=options))


def say(outcome: str) -> None:
    """Write OUTCOME as a line of standard output.  Raise Failure."""
    with failing_to("write to standard output"):
        print(outcome, flush=True)


def status(read: Read) -> None:
    """print the process ID of the running service, or exit with 3"""
    say(str(PidFile(read().pid_file).find_manager(exit_status=3)[0]))


def terminate(read: Read) -> None:
    """stop the service gracefully; return when all its processes are gone"""
    pid, process = PidFile(read().pid_file).signal_manager(signal.SIGTERM)
    readable(None, process)
    say(f"{PROGRAM} {pid} Server terminated.")


def reload(read: Read) -> None:
    """have the service reload; return when only the new code runs"""
    say(f"{PROGRAM}: {PidFile(read().pid_file).ask_for_reload()} reloaded")


def check(read: Read) -> None:
    """check the configuration and the handler; start nothing"""
    settings = read()
    os.chdir("/")  # as in the service
    try:
        load_handler(settings)
    except Failure as why:
        sys.stdout.flush()
        if why.__cause__:
            traceback.print_exception(why.__cause__)
        raise
    say(f"{PROGRAM}: configuration is good")
    os._exit(0)  # whatever the module has left running


# ---- Start --------------------------------------------------------------------------

def background(read: Read) -> Life | None:
    """start detached; return when the service answers"""
    return start(read, detach=True)


def foreground(read: Read) -> Life | None:
    """serve without detaching, until a signal such as Ctrl-C"""
    return start(functools.partial(read, log_file=""), detach=False)


def start(read: Read, detach: bool) -> Life | None:
    """Check, claim, listen, detach; return the life of the manager, or launcher.  Raise Failure, and leave nothing."""
    settings = read()
    os.umask(umask := 0o027)
    signal.pthread_sigmask(signal.SIG_BLOCK, MANAGER_SIGNALS)  # until the manager is ready for them
    pid_file = PidFile(settings.pid_file)
    pid_file.claim()
    terminal = os.dup(2)  # where the outcome of the start goes: standard error, or, detached, the launcher's socket
    try:
        channels = Channels(*open_listener(settings))
        log_file = open_log(settings.log_file)
        if detach:
            with failing_to("start"):
                launchers_end, managers_end = socket.socketpair()
                if os.fork():
                    managers_end.close()
                    channels.close()
                    os.close(pid_file.lock)
                    return functools.partial(await_start, launchers_end)
            launchers_end.close()
            os.dup2(managers_end.fileno(), terminal, inheritable=False)
            managers_end.close()
        with failing_to("become a daemon"):
            context = DaemonContext(detach_process=detach, umask=umask, pidfile=pid_file, signal_map={},
                                    files_preserve=[terminal, log_file, pid_file.lock, *channels.all])
            context.open()
        atexit.unregister(context.close)  # which would remove the PID file at the end of any child
        os.set_inheritable(0, True)  # python-daemon reopens it as non-inheritable; a handler's commands need it
        log_to(log_file)
        os.close(log_file)
    except BaseException:
        pid_file.release()
        os.dup2(terminal, 2)
        raise
    return Manager(read, settings, pid_file, channels, terminal, detach).run


def await_start(manager: socket.socket) -> None:
    """Read the manager's line, which "ready" follows on success; print it, or write the error and exit with 1."""
    signal.signal(signal.SIGINT, lambda *_: manager.shutdown(socket.SHUT_WR))  # at which the manager stops
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MANAGER_SIGNALS)
    told = manager.recv(65536)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line, _, ready = told.decode(errors="replace").partition("\n")
    if ready != "ready":
        manager.recv(1)  # ends when the manager has exited
        write_lines(told.decode(errors="replace") or f"{PROGRAM}: cannot start: the manager died\n")
        os._exit(1)
    say(f"{PROGRAM}: {line}")


def open_listener(settings: Settings) -> tuple[socket.socket, bool]:
    """Return the listening socket, and whether it is ours, not systemd's (sd_listen_fds(3)).  Raise Failure."""
    handed_over, for_whom, *_ = (os.environ.pop(f"LISTEN_{each}", "") for each in ("FDS", "PID", "FDNAMES", "PIDFDID"))
    if handed_over and for_whom == str(os.getpid()):
        with failing_to("use LISTEN_FDS"):
            listener = socket.socket(fileno=3)
            if handed_over != "1":
                raise OSError(f"expected one socket, not {handed_over}; use one ListenStream=")
            if (listener.family not in (socket.AF_INET, socket.AF_INET6)
                    or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
                raise OSError("expected a listening TCP socket")
            listener.set_inheritable(False)
            return listener, False
    act = f"listen on {settings.bind} port {settings.port}".replace("  ", " ")
    with failing_to(act):
        dual = not settings.bind and socket.has_dualstack_ipv6()
        found: list[Any] = sorted(socket.getaddrinfo(settings.bind or None, settings.port, type=socket.SOCK_STREAM,
                                                     flags=socket.AI_PASSIVE))
        family, _, _, _, address = found[-1 if dual else 0]  # [0] is IPv4, if the name has such
    try:
        return socket.create_server(address, family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=dual), True
    except OSError as why:
        reason = os.strerror(why.errno or 0)
        tables = "".join(open(name).read() for name in glob.glob("/proc/self/net/tcp*"))
        if why.errno == errno.EADDRINUSE and not re.search(rf": \w+:{settings.port:04X} \w+:0000 0A ", tables):
            reason += " by an outgoing connection, nobody listens: try again in a minute, or reserve the port" \
                      " (net.ipv4.ip_local_reserved_ports)"
        raise Failure(f"cannot {act}: {reason}") from why


class Channels:
    """The descriptors that manager, keeper and workers share.  The manager holds all, so they outlive any child."""

    def __init__(self, listener: socket.socket, listener_is_ours: bool) -> None:
        listener.setblocking(False)
        if listener_is_ours:
            # Connections inherit it (tcp(7)): the end of a reply and FIN share a packet, which is worth 6 per cent.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        self.listener, self.listener_is_ours = listener.detach(), listener_is_ours
        # Slow clients go from workers to keeper, those with whole texts go back.  An _in is where they are read.
        slow_in, slow_out = seqpacket_pair()
        whole_in, whole_out = seqpacket_pair()
        stopping_in, stopping_out = os.pipe()  # which nobody writes to: it ends when the manager stops, or is killed
        self.of_keeper = self.listener, slow_in, whole_out
        self.of_workers = self.listener, slow_out, whole_in, stopping_in
        self.all = {*self.of_keeper, *self.of_workers, stopping_out}

    def close(self) -> None:
        for end in self.all:
            os.close(end)

    def stop_listening(self) -> None:
        """Listen no more, even if processes that a handler has forked still hold the socket open."""
        if self.listener_is_ours:
            with suppress(OSError), socket.socket(fileno=os.dup(self.listener)) as listener:
                listener.shutdown(socket.SHUT_RDWR)


# ---- Manager ------------------------------------------------------------------------

RESPAWN_DELAY = 1.0  # s until a process that died is replaced; for the keeper, since its last fork
TICK = 0.05  # s between two checks for what is due, while anything is pending
MARGIN = 2.0  # s; at a stop clients end at 0.9 grace, workers at grace, then, MARGIN apart, generations and keeper

Phase = Enum("Phase", "STARTING SERVING CHANGING STOPPING")  # CHANGING: a generation is missing, loads, or drains
State = Enum("State", "LOADING SERVING LEAVING")  # what the manager has made of a generation

# What a slot of the scoreboard says of a worker: CALLED is when the handler was called (time.monotonic()), or 0; at
# END_BY it is killed.  A slot of SLOT numbers fills one cache line, so that no two processes write to the same.
STATE, PID, CALLED, SERVED, END_BY = range(5)
SLOT = 8
VACANT, FORKED, ACCEPTING, ENDING = range(4)  # its STATE: while ENDING it finishes its handler, and exit functions


class Child:
    """What the manager knows of the keeper, or of a generation."""

    def __init__(self, numbers: int) -> None:
        with failing_to("fork a process"):
            self.numbers = memoryview(mmap.mmap(-1, 8 * numbers)).cast("d")  # in memory that it shares with the child
        self.pid, self.channel, self.childs_end = 0, -1, -1
        self.forked_at, self.kill_at = -math.inf, math.inf
        self.files: list[int] = []  # the manager's, both ends; closing them tells the child to stop

    def fork(self) -> bool:
        """Fork it; return whether this is the child.  Raise Failure."""
        self.forked_at, pid = time.monotonic(), -1
        signal.pthread_sigmask(signal.SIG_BLOCK, MANAGER_SIGNALS)  # until the child is ready for them
        try:
            with failing_to("fork a process"):
                self.channel, self.childs_end = seqpacket_pair()
                self.files += self.channel, self.childs_end
                pid = os.fork()
        finally:
            if pid:
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
            if pid < 0:
                self.close()
        self.pid = pid
        if pid:
            with suppress(OSError):  # it has died meanwhile
                os.setpgid(pid, pid)
        return not pid

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files.clear()


class Generation(Child):
    def __init__(self, number: int, settings: Settings, terminal: int) -> None:
        super().__init__(SLOT * 2 * settings.workers)  # for those that serve and those that end
        self.board = [self.numbers[start:start + SLOT] for start in range(0, len(self.numbers), SLOT)]
        self.number, self.settings = number, settings
        self.log_file = open_log(settings.log_file, terminal)  # anew, so that logrotate works
        self.files.append(self.log_file)
        self.state = State.LOADING
        self.since = 0.0  # when its workers were up (time.time())

    def slots(self, *states: int) -> list[memoryview[float]]:
        return [slot for slot in self.board if slot[STATE] in states]


#   What becomes of a generation
#
#               it is up         it fails, exits     HUP                stop       grace is over
#     LOADING   SERVING; the     the first: a stop;  killed; the next   killed     -
#               old one drains   else no change      one begins
#     SERVING   -                the next one        the next one       LEAVING    -
#                                begins after 1 s    begins
#     LEAVING   -                forgotten           the next one       goes on    killed
#                                                    waits for its end


class Manager:
    """Keeps a keeper and a generation alive.  It runs nobody else's code, and so can always recover."""

    def __init__(self, read: Read, settings: Settings, pid_file: PidFile, channels: Channels,
                 terminal: int, has_launcher: bool) -> None:
        self.read, self.settings, self.pid_file, self.channels = read, settings, pid_file, channels
        self.terminal = terminal  # where an error goes: the launcher, or standard error with -f
        self.has_launcher = has_launcher  # which waits for the outcome of the start
        self.notify_socket = os.environ.pop("NOTIFY_SOCKET", "")
        self.signals = Signals()
        self.keeper = Child(2)
        self.generations: list[Generation] = []  # two at the most
        self.phase, self.reload_wanted, self.born = Phase.STARTING, False, 0  # generations so far
        self.not_before = 0.0  # when a generation may be forked in the place of one that died
        self.failure = ""  # why the service could not start

    def run(self) -> Life | None:
        """Serve until stopped; return None then, or, in a process just forked, that one's life.  Raise Failure."""
        name_process("daemontest-mngr")
        log("*", f"Daemon Server Started. Prefork Workers: {self.settings.workers}.",
            f"Max Requests per Child: {self.settings.max_requests}",
            f"daemontest {__version__}, Python {sys.version.split()[0]}")
        set_signals(signal.SIG_IGN, MEANINGLESS)
        set_signals(do_nothing, MANAGER_SIGNALS)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        gc.freeze()  # a collection would touch, and so copy, memory that all processes share
        while self.phase is not Phase.STOPPING or self.generations or self.keeper.pid:
            self.announce()
            if life := self.fork_missing():
                return life
            signals = self.signals.wait(None if self.phase is Phase.SERVING and self.keeper.pid else TICK,
                                        *(generation.channel for generation in self.in_state(State.LOADING)),
                                        *([self.terminal] if self.has_launcher else []))
            self.read_messages()
            self.reap()
            for child in (self.keeper, *self.generations):
                if child.pid and time.monotonic() >= child.kill_at:
                    kill_group(child.pid)
            for signum in signals:
                match signum:
                    case signal.SIGTERM | signal.SIGINT | signal.SIGQUIT:
                        name = signal.Signals(signum).name
                        log("*", f"Caught {name}")
                        self.stop(f"cannot start: caught {name}" if self.has_launcher else "")
                    case signal.SIGHUP:
                        log("*", "Caught SIGHUP")
                        self.reload_wanted = True
                        self.kill_loading()  # it begins afresh
                    case signal.SIGUSR1:
                        self.log_status()
        self.pid_file.release()  # now that nobody listens any more
        log("*", "Server Terminated.")
        os.dup2(self.terminal, 2)
        if self.failure:
            raise Failure(self.failure)
        return None

    def announce(self) -> None:
        """Tell all who wait when one generation serves, and no other is left."""
        if (self.phase not in (Phase.STARTING, Phase.CHANGING)
                or [generation.state for generation in self.generations] != [State.SERVING]):
            return
        serving, workers = self.generations[0], self.settings.workers
        since = time.strftime("since %T", time.localtime(serving.since))
        self.notify(f"{workers} workers, generation {serving.number} {since}", f"READY=1\nMAINPID={os.getpid()}\n")
        if self.pid_file.reload_pending and not self.reload_wanted:
            self.pid_file.tell_reload("ok")
        if self.has_launcher:
            self.has_launcher = False
            told = f"{os.getpid()} started, {workers} workers on port {self.settings.port}\nready"
            with suppress(OSError):  # the launcher has just gone; the service serves
                os.write(self.terminal, told.encode())
            os.dup2(0, self.terminal, inheritable=False)  # /dev/null
        self.phase = Phase.SERVING

    def fork_missing(self) -> Life | None:
        """Fork the keeper or the generation if it is missing or wanted; return the child's life, in the child."""
        now = time.monotonic()
        if self.phase is Phase.STOPPING:
            return None
        if not self.keeper.pid and now >= self.keeper.forked_at + RESPAWN_DELAY:
            try:
                if self.keeper.fork():
                    return lambda: Keeper(self.channels, self.keeper, self.settings).run()
            except Failure as why:
                log("*", f"Keeper Failed: {why}")
        try:
            if self.in_state(State.LOADING) or len(self.generations) == 2:
                return None
            if self.reload_wanted or (not self.in_state(State.SERVING) and now >= self.not_before):
                settings = self.begin_reload() if self.reload_wanted else self.settings
                log("*", f"Manager Process ID: {os.getpid()}")
                self.born += 1
                generation = Generation(self.born, settings, self.terminal)
                if generation.fork():
                    return lambda: load_generation(generation)
                self.generations.append(generation)
        except Failure as why:
            self.loading_failed(str(why))
        return None

    def begin_reload(self) -> Settings:
        """Return the settings of the next generation.  Raise Failure."""
        self.reload_wanted = False
        if self.phase is Phase.SERVING:
            self.phase = Phase.CHANGING
        self.pid_file.tell_reload()
        self.notify(f"loading generation {self.born + 1}",
                    f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\n")
        new, running = self.read(), self.settings
        fixed = {key: getattr(running, key) for key in FIXED if getattr(new, key) != getattr(running, key)}
        if fixed:
            log("*", f"Needs a Restart: {', '.join(fixed)}")
        return replace(new, **fixed)

    def read_messages(self) -> None:
        if self.has_launcher and readable(0, self.terminal):
            self.stop("interrupted")
        for generation in self.in_state(State.LOADING):
            message, _, why = read_message(generation.channel)[0].partition(" ")
            match message:
                case "imported":
                    send_message(generation.channel, "begin", self.channels.of_workers)
                case "up":
                    self.take_over(generation)
                case "failed":
                    self.kill_loading()
                    self.loading_failed(why)

    def take_over(self, generation: Generation) -> None:
        """Let GENERATION, which is up, be the one that serves."""
        for previous in self.in_state(State.SERVING):
            previous.state = State.LEAVING
            previous.kill_at = time.monotonic() + previous.settings.grace + MARGIN
            send_message(previous.channel, "drain")
        generation.state, generation.since = State.SERVING, time.time()
        self.settings = settings = generation.settings
        log_to(generation.log_file)
        if self.keeper.pid:
            send_message(self.keeper.channel, f"{settings.timeout} {settings.max_text} {settings.grace}", [2])
        with socket.socket(fileno=os.dup(self.channels.listener)) as listener:  # TCP keeps silent clients (tcp(7))
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, math.ceil(settings.timeout))

    def loading_failed(self, why: str) -> None:
        """Report WHY the newest generation did not come up."""
        shown = printable(why)
        if self.phase is Phase.STARTING:
            log("*", f"Start Failed: {shown}")
            self.stop(why)
        elif self.pid_file.reload_pending:
            log("*", f"Reload Failed: {shown} (nothing changed)")
            self.pid_file.tell_reload(why)
        else:
            log("*", f"Generation Failed: {shown}")
        if self.phase is not Phase.STOPPING and not self.in_state(State.SERVING):
            self.notify(f"generation {self.born} failed: {shown}")
            self.not_before = time.monotonic() + RESPAWN_DELAY

    def reap(self) -> None:
        """Reap keeper, generations, and whatever else has become a child of this process: it may be PID 1."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.keeper.pid:
                    self.reap_keeper(ended[1])
                for generation in [each for each in self.generations if each.pid == ended[0]]:
                    self.reap_generation(generation, ended[1])

    def reap_keeper(self, status: int) -> None:
        keeper, late = self.keeper, time.monotonic() >= self.keeper.kill_at
        if status or self.phase is not Phase.STOPPING:
            end = "Killed. (still running after the grace" if late else f"Died. ({cause_of_death(status)}"
            log("*", f"Keeper Process {end}; {keeper.numbers[Keeper.CLIENTS]:.0f} clients lost)", pid=keeper.pid)
        keeper.close()
        keeper.pid = keeper.numbers[Keeper.CLIENTS] = keeper.numbers[Keeper.BYTES] = 0

    def reap_generation(self, generation: Generation, status: int) -> None:
        self.read_messages()  # its last words
        self.generations.remove(generation)
        generation.close()
        if status:
            kill_group(generation.pid)  # what its module has started
        cause = cause_of_death(status)
        if generation.state is State.LOADING:
            self.loading_failed(not_loaded(generation.settings, f"the process died ({cause})"))
        elif generation.state is State.SERVING:
            log("*", f"Generation Died. ({cause})", pid=generation.pid)
            self.notify(f"generation {generation.number} died: {cause}")
            self.not_before = time.monotonic() + RESPAWN_DELAY
            if self.phase is Phase.SERVING:
                self.phase = Phase.CHANGING
        elif time.monotonic() >= generation.kill_at:
            log("*", "Generation Killed. (still running after the grace)", pid=generation.pid)

    def stop(self, failure: str = "") -> None:
        """Stop gracefully, mostly by closing the manager's copies of channels, as its death would."""
        if self.phase is Phase.STOPPING:
            return
        self.phase, self.failure, self.has_launcher = Phase.STOPPING, failure, False
        self.notify("stopping", "STOPPING=1\n")
        self.channels.stop_listening()
        self.channels.close()
        end = time.monotonic() + MARGIN + max([self.settings.grace, *(old.settings.grace for old in self.generations)])
        self.kill_loading()
        for generation in self.generations:
            generation.state, generation.kill_at = State.LEAVING, min(generation.kill_at, end)
            generation.close()
        self.keeper.kill_at = end + MARGIN
        self.keeper.close()

    def kill_loading(self) -> None:
        """Kill the generation that is loading, with all that its module has started: there is nothing in it to save."""
        for generation in self.in_state(State.LOADING):
            generation.state = State.LEAVING
            kill_group(generation.pid)

    def log_status(self) -> None:
        if self.keeper.pid:
            clients, held = self.keeper.numbers
            log("*", f"Status: keeper with {clients:.0f} clients, {held:.0f} bytes", pid=self.keeper.pid)
        for generation in self.generations:
            since = time.strftime(" since %FT%T", time.localtime(generation.since)) if generation.since else ""
            log("*", f"Status: generation {generation.number}, {generation.state.name.lower()}{since}, "
                     f"{generation.settings.workers} workers", pid=generation.pid)
            for state, pid, called, served, *_ in generation.board:
                if state != VACANT and pid:
                    handler = f"handler running for {time.monotonic() - called:.1f} s" if called else "handler idle"
                    ending = ", ending" if state >= ENDING else ""
                    log("*", f"Status: worker with {served:.0f} texts served, {handler}{ending}", pid=int(pid))

    def notify(self, status: str, state: str = "") -> None:
        """Tell the service manager, if there is one (sd_notify(3))."""
        if not self.notify_socket:
            return
        state += f"STATUS=daemontest {__version__}: {status}"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notifier:
                notifier.sendto(state.encode(errors="replace"), re.sub("^@", "\0", self.notify_socket))
        except OSError as why:
            log("*", f"Cannot Notify: {why.strerror or why}")

    def in_state(self, state: State) -> list[Generation]:
        return [generation for generation in self.generations if generation.state is state]


# ---- Clients ------------------------------------------------------------------------

IN, OUT = select.EPOLLIN, select.EPOLLOUT
INLINE_BYTES = 2048  # of a client's data in a message; more goes into a memfd
OPEN_SIDE_BYTES = 2000  # what the Perl original read at the most, from clients that keep their side open
HEADER = struct.Struct("??46s")  # is the data a reply; has the client half-closed; its address (inet_ntop(3))


class Client:
    """A client, wherever it is: its connection, and what it has sent so far or has not yet taken of its reply."""

    def __init__(self, connection: int, name: str, half_closed: bool = False, is_reply: bool = False,
                 data: Any = b"", memfd: int = -1) -> None:
        self.connection, self.name, self.half_closed, self.is_reply = connection, name, half_closed, is_reply
        self.data, self.memfd = data, memfd
        self.descriptors = 2 if is_reply and memfd != -1 else 1  # in the keeper, where a long reply stays in its memfd
        # In the keeper only: its conversation; what that waits for (see Wait); until when it counts as reading a reply.
        self.conversation: Iterator[Wait] | None = None
        self.events, self.until, self.held, self.reads_until = 0, math.inf, 0, 0.0

    def send(self, channel: socket.socket) -> None:
        """Send this client through CHANNEL to another process.  Raise BlockingIOError if it is full, or OSError."""
        if len(self.data) > INLINE_BYTES:
            with open(os.memfd_create("daemontest"), "wb", closefd=False) as file:
                self.memfd = file.fileno()
                file.write(self.data)
            self.data = b""
        socket.send_fds(channel, [HEADER.pack(self.is_reply, self.half_closed, self.name.encode()) + self.data],
                        [self.connection, self.memfd][:1 if self.memfd == -1 else 2])

    @staticmethod
    def from_channel(channel: socket.socket) -> Client | None:
        """Receive a client from CHANNEL; None at its end.  Raise BlockingIOError if none has come, or OSError."""
        message, files = receive_message(channel)
        if not message:
            return None
        is_reply, half_closed, name = HEADER.unpack_from(message)
        return Client(files[0], name.rstrip(b"\0").decode(), half_closed, is_reply, message[HEADER.size:], *files[1:])

    def take_data(self) -> bytes:
        """Return the data, and close the memfd.  Raise MemoryError."""
        if self.memfd == -1:
            return bytes(self.data)
        memfd, self.memfd = self.memfd, -1
        with open(memfd, "rb") as file:
            file.seek(0)
            return file.read()

    def close(self) -> None:
        files, self.connection, self.memfd = (self.connection, self.memfd), -1, -1  # first, lest a fork close it again
        for file in files:
            if file != -1:
                os.close(file)


def receive_some(connection: int) -> bytes | None:
    """Return what has come: b"" at the end, None if nothing has come yet.  Raise OSError."""
    try:
        return os.read(connection, RECEIVE_BYTES)
    except BlockingIOError:
        return None


def refuse(client: Client, reason: str) -> None:
    """Give CLIENT an error as its reply, and log it."""
    log("-", f"Client: {client.name}; Refused: {reason}.")
    client.data, client.is_reply = b"%d error: %b\n" % (os.getpid(), reason.encode()), True


# ---- Keeper -------------------------------------------------------------------------

TEXTS_HELD = 16  # times --max-text: the bytes that the keeper may hold
IDLE = 1.0  # s until a reply counts as not being read, and until a silent client that has its reply is cut off
LAST_CALL = 0.1  # s in which workers, at a stop, pass on what they have accepted

Wait = tuple[int, float, int]  # what a conversation waits for (IN, OUT, or 0: a worker), until when, and the bytes held


class Keeper:
    """The process that keeps every client which would make a worker wait, and passes whole texts to the workers.

    A conversation is a generator that yields what it waits for.  At a stop, once no text can become whole any more, the
    keeper shuts down to_workers, so the workers leave; with the last one, from_workers ends: no more replies.
    """

    CLIENTS, BYTES = range(2)  # numbers that it shares with the manager

    def __init__(self, channels: Channels, child: Child, settings: Settings) -> None:
        begin_process("daemontest-keep", child.childs_end, *channels.of_keeper)
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        self.descriptors, self.most_descriptors = 0, max(limit - 32, limit // 2)  # clients'; 32 to spare
        self.channels, self.settings = channels, settings
        self.orders, self.numbers = child.childs_end, child.numbers
        self.from_workers, self.to_workers = (socket.socket(fileno=end) for end in channels.of_keeper[1:])
        self.poller = select.epoll()
        self.clients: dict[int, Client] = {}  # by descriptor, those held longest first
        self.texts: deque[Client] = deque()  # whole ones that wait for a worker
        self.next_look = self.stopped_at = math.inf  # when some client may be late; when the stop began
        self.end_by = math.inf  # when a stop cuts clients off, early enough for workers to leave unkilled
        self.connected = True  # until from_workers ends

    def run(self) -> None:
        log("*", "Keeper Process Started.")
        self.poller.register(self.from_workers, IN)
        self.poller.register(self.orders, IN)
        self.poller.register(self.to_workers, select.EPOLLONESHOT)  # for nothing yet; for OUT when it is full
        while not self.finish():
            look_in = max(0.0, self.next_look - time.monotonic()) if self.stopped_at == math.inf else TICK
            for file, _ in self.poller.poll(None if look_in == math.inf else look_in):
                client = self.clients.get(file)
                if client and client.events:  # otherwise it has gone on meanwhile, and waits for a worker
                    self.advance(client)
                elif file == self.orders:
                    self.read_orders()
                elif file == self.from_workers.fileno():
                    self.take_clients()
            self.advance_late()
            self.pass_texts_on()
        log("*", "Keeper Process Ended.")

    def take_clients(self) -> None:
        """Take every client that workers have passed on by now."""
        while self.connected:
            try:
                client = Client.from_channel(self.from_workers)
            except BlockingIOError:
                return
            except OSError as why:  # no descriptor is left for it, or for its memfd
                log("-", f"Client Lost: {why.strerror}.")
                continue
            if client:
                self.clients[client.connection] = client
                self.numbers[self.CLIENTS] = len(self.clients)
                client.conversation = self.deliver(client) if client.is_reply else self.receive_rest(client)
                self.descriptors += client.descriptors
                self.advance(client)
            else:
                self.poller.unregister(self.from_workers)
                self.connected = False

    def advance(self, client: Client) -> None:
        """Let the client's conversation go on until it waits again, or ends."""
        if not client.conversation:
            return  # it has been dropped meanwhile
        try:
            wait = next(client.conversation, None)
        except Exception as why:  # a fault of this program is not the other clients' fault
            log_traceback("Conversation Failed:", why)
            wait = None
        if not wait:
            self.close(client)
            return
        events, client.until, held = wait
        if events != client.events:
            if client.events:  # closing it later is not enough: a message in flight may hold a copy
                self.poller.unregister(client.connection)
            if events:
                self.poller.register(client.connection, events)
            client.events = events
        self.next_look = min(self.next_look, client.until)
        self.numbers[self.BYTES] += held - client.held
        client.held = held
        self.drop_oldest()

    def receive_rest(self, client: Client) -> Iterator[Wait]:
        """Receive the rest of a text, and have it wait for a worker; or refuse it."""
        silent_since = time.monotonic()
        until = silent_since + self.settings.timeout
        try:
            client.data = bytearray(client.take_data())
            while True:
                before, quiet_at = len(client.data), math.inf
                if 0 < before <= OPEN_SIDE_BYTES:
                    quiet_at = silent_since + (0.1 if client.data.endswith(b"\n") else 1.0)
                yield IN, min(until, self.end_by, quiet_at if before else self.stopped_at), before
                while piece := receive_some(client.connection):
                    client.data += piece
                    if len(client.data) > self.settings.max_text:
                        raise Failure(f"text longer than {self.settings.max_text} bytes")
                now = time.monotonic()
                if len(client.data) > before:
                    silent_since, quiet_at = now, math.inf  # not silent now; the next round sets it anew
                client.half_closed = piece == b""
                if client.half_closed or now >= quiet_at:
                    break
                if not client.data and now >= min(until, self.stopped_at):
                    return
                if now >= until:
                    raise Failure(f"text not ended within {self.settings.timeout:g} s")
                if now >= self.end_by:
                    raise Failure("the service stops")
        except (Failure, MemoryError) as why:
            refuse(client, str(why) or "not enough memory")
            yield from self.deliver(client)
            return
        except OSError as why:
            if client.data:
                log("-", f"Client: {client.name}; Lost: {why.strerror or why}.")
            return
        self.texts.append(client)
        yield 0, math.inf, len(client.data)

    def deliver(self, client: Client) -> Iterator[Wait]:
        """Send a reply, as fast as the client reads it.  Then, if it has not half-closed, wait until it does."""
        until, sent = time.monotonic() + self.settings.timeout, 0
        size = len(client.data) if client.memfd == -1 else os.fstat(client.memfd).st_size
        try:
            while sent < size:
                client.reads_until = time.monotonic() + IDLE
                yield OUT, min(until, self.end_by), size - sent
                try:
                    sent += (os.write(client.connection, client.data[sent:]) if client.memfd == -1 else
                             os.sendfile(client.connection, client.memfd, sent, size - sent))
                except BlockingIOError:
                    if time.monotonic() >= min(until, self.end_by):
                        raise TimeoutError("timed out") from None
            if client.half_closed:
                return
            # To close with data unread resets the connection (RFC 2525, 2.17), and can destroy the reply in flight.
            with socket.socket(fileno=os.dup(client.connection)) as connection:
                connection.shutdown(socket.SHUT_WR)
            quiet_at = time.monotonic() + IDLE
            while time.monotonic() < min(until, self.end_by, quiet_at):
                yield IN, min(until, self.end_by, quiet_at), 0
                if piece := receive_some(client.connection):
                    quiet_at = time.monotonic() + IDLE
                elif piece is not None:
                    return
        except OSError as why:
            log("-", f"Client: {client.name}; Reply Not Delivered: {why.strerror or why}.")

    def advance_late(self) -> None:
        """Advance the clients whose time is up, at most every 10 ms, since each look goes through all of them."""
        now = time.monotonic()
        if now >= self.next_look:
            for client in [client for client in self.clients.values() if client.until <= now]:
                self.advance(client)
            self.next_look = max(now + 0.01, min((client.until for client in self.clients.values()), default=math.inf))
            self.drop_oldest()

    def drop_oldest(self) -> None:
        """Drop the oldest clients while there are too many, or too many bytes of those that do not read a reply."""
        now, most = time.monotonic(), TEXTS_HELD * self.settings.max_text
        if self.descriptors <= self.most_descriptors and self.numbers[self.BYTES] <= most:
            return
        self.next_look = min(self.next_look, now + IDLE)
        most += sum(client.held for client in self.clients.values() if now <= client.reads_until)
        for client in list(self.clients.values())[:-1]:
            if self.descriptors > self.most_descriptors:
                self.close(client, dropped_for="too many clients")
            elif self.numbers[self.BYTES] <= most:
                break
            elif client.held and now > client.reads_until:
                self.close(client, dropped_for="too many bytes")

    def pass_texts_on(self) -> None:
        """Send whole texts to the workers, as many as the channel takes."""
        while self.texts:
            client = self.texts[0]
            try:
                if client.conversation:  # it has not been dropped meanwhile
                    client.send(self.to_workers)
                    self.close(client)
            except BlockingIOError:
                self.poller.modify(self.to_workers, OUT | select.EPOLLONESHOT)
                return
            except OSError as why:
                self.close(client, dropped_for=why.strerror or str(why))
            self.texts.popleft()

    def close(self, client: Client, dropped_for: str = "") -> None:
        if dropped_for:
            log("-", f"Client: {client.name}; Dropped: {dropped_for}.")
        if client.events:
            self.poller.unregister(client.connection)
        del self.clients[client.connection]
        self.numbers[self.CLIENTS] = len(self.clients)
        self.numbers[self.BYTES] -= client.held
        self.descriptors -= client.descriptors
        client.conversation, client.data = None, b""  # it may be in self.texts still
        client.close()

    def read_orders(self) -> None:
        """Take settings and log of the generation that now serves; the end of the orders is the order to stop."""
        message, files = read_message(self.orders)
        if message:
            timeout, max_text, grace = message.split()
            self.settings = replace(self.settings, timeout=float(timeout), max_text=int(max_text), grace=float(grace))
            log_to(files[0])
            os.close(files[0])
            return
        self.poller.unregister(self.orders)
        self.stopped_at = time.monotonic()
        self.end_by = self.stopped_at + 0.9 * self.settings.grace
        self.channels.stop_listening()
        for client in list(self.clients.values()):
            if client.events:  # its deadline was set before the stop
                self.advance(client)

    def finish(self) -> bool:
        """Return whether the service stops and no client is left; tell the workers when no more texts come."""
        if self.stopped_at == math.inf:
            return False
        if time.monotonic() >= self.stopped_at + LAST_CALL and all(client.is_reply for client in self.clients.values()):
            with suppress(OSError):  # the workers are gone
                self.to_workers.shutdown(socket.SHUT_WR)
        return not self.connected and not self.clients


# ---- Generation ---------------------------------------------------------------------

def load_generation(generation: Generation) -> Life | None:
    """Import the handler, in a process that the manager has just forked; then be the supervisor of its workers."""
    begin_process("daemontest-gen", generation.childs_end, generation.log_file)
    log("*", "Loading configuration.")
    printed = Printed()
    atexit.register(write_files)
    try:
        handler = load_handler(generation.settings)
    except Failure as why:
        printed.end_line()
        log_traceback("Handler Not Loaded:", why.__cause__ or why)
        send_message(generation.childs_end, f"failed {why}")
        os._exit(1)
    # Undo what the handler's module may have done to this process.
    signal.setitimer(signal.ITIMER_REAL, 0)
    reset_signals()
    set_signals(do_nothing, {signal.SIGCHLD})
    printed.end_line()
    send_message(generation.childs_end, "imported")  # the descriptors come now, so no process of the module's has them
    readable(None, generation.childs_end)
    _, files = read_message(generation.childs_end)
    if not files:
        os._exit(0)  # the manager is gone
    log_to(generation.log_file)
    write_files(at_end=False)  # now, and not once more by every worker
    supervisor = Supervisor(generation, handler, files)
    # Having freed a block of 4 MiB, malloc keeps the memory of a long text for the next, instead of giving it back and
    # having it filled with zeros anew (mallopt(3)): texts of 1 MiB take 0.6 of the processor time.
    bytes(2**22)
    gc.freeze()  # a collection in a worker would touch, and so copy, all the memory it shares
    return supervisor.run()


def load_handler(settings: Settings) -> Handler:
    """Import the handler and check what it is.  Raise Failure, whatever its module raises."""
    if not settings.handler:
        return text_length
    module_name, function_name = settings.handler.split(":")
    if (top := module_name.partition(".")[0]) in sys.modules:
        raise Failure(not_loaded(settings, f"the name {top} is taken by a module that is imported already"))
    sys.dont_write_bytecode = True  # .pyc files are checked to the second: a quick edit would be missed
    sys.path.insert(0, settings.directory)
    try:
        module = importlib.import_module(module_name)
        handler: Any = getattr(module, function_name, None)
    except BaseException as why:  # SystemExit, too
        reason = type(why).__name__
        with suppress(BaseException):  # an exception of the module's own may fail to say what it is
            reason += f": {why}"[:400] if str(why) else ""
        places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(why.__traceback__)]
        own = [each for each in places if each[0].startswith(settings.directory) and "/site-packages/" not in each[0]]
        reason += " ({}, line {})".format(*own[-1]) if own and own[-1][0] != __file__ else ""
        if isinstance(why, ModuleNotFoundError) and why.name and f"{module_name}.".startswith(f"{why.name}."):
            reason = f"no module {why.name} in {settings.directory}, nor where Python looks"
            if why.name == f"{top}.py":
                reason = f"a module is named without .py: {top}:{function_name}"
        raise Failure(not_loaded(settings, reason)) from why
    if fault := fault_of(handler):
        import difflib
        close = difflib.get_close_matches(function_name, vars(module), 1) if handler is None else []
        fault += f"; did you mean '{close[0]}'?" if close else ""
        raise Failure(not_loaded(settings, f"{function_name} {fault}"))
    return handler  # type: ignore[no-any-return]


def not_loaded(settings: Settings, why: str) -> str:
    return f"cannot load handler {settings.handler}: {why}"


def fault_of(handler: Any) -> str:
    """Return why HANDLER is no function from text to text, as far as that can be told without calling it."""
    if handler is None:
        return "is not there"
    if isinstance(handler, type) or not callable(handler):
        return "is not a function"
    if any(is_kind(handler) for is_kind in (inspect.iscoroutinefunction, inspect.isasyncgenfunction,
                                            inspect.isgeneratorfunction)):
        return "is async, or a generator"
    with suppress(ValueError):  # some built-in functions do not tell
        try:
            inspect.signature(handler).bind("")
        except TypeError:
            return "cannot be called with one text"
    return ""


WRITABLE: list[Any] = []  # files; gc.freeze() hides those of the import from gc.get_objects()


def write_files(at_end: bool = True) -> None:
    """Flush open files, outer layers first; at the end, close those that closing makes whole, such as gzip's."""
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, (io.TextIOBase, io.BufferedIOBase))}
    for file in [each for each in objects if type(each) in kinds]:
        with suppress(Exception):  # it is closed, detached, or a class of the handler's own
            if file.writable():  # else let it be: a thread that did not survive the fork may hold its lock
                WRITABLE.append(file)
    WRITABLE.sort(key=lambda file: (not isinstance(file, io.TextIOBase), type(file).__module__ == "_io"))
    for file in WRITABLE:
        try:
            if not file.closed:
                file.close() if at_end and type(file).__module__ != "_io" else file.flush()
        except Exception as why:
            log_traceback("Not Written:", why)


def disown() -> None:
    """Keep a worker from cleaning up what the import created, such as temporary directories (no public API)."""
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"]._children.clear()  # as multiprocessing does in its own children
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        finalizer.atexit = False


class Supervisor:
    """A generation's own process, which keeps the number of its workers."""

    def __init__(self, generation: Generation, handler: Handler, files: list[int]) -> None:
        self.generation, self.channel = generation, generation.childs_end
        self.handler, self.stopping = handler, files.pop()
        self.sockets = [socket.socket(fileno=file) for file in files]  # listener, to keeper, from it: for all workers
        for end, blocking in zip(self.sockets, (False, True, False), strict=True):
            end.setblocking(blocking)  # whatever default the handler's module has set
        self.lifeline = os.pidfd_open(os.getpid())  # by which the workers see that this process has died
        self.children: dict[int, memoryview[float]] = {}  # the slots of workers by their PIDs
        self.vacant_until: list[float] = []  # when those that died may be replaced
        self.up = False  # whether all workers wanted have begun to accept clients
        self.drain_by = math.inf  # when workers that remain are killed; once it is set, none is replaced
        self.signals = Signals()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for workers, until they are ready for it

    def run(self) -> Life | None:
        """Keep workers until told to drain or to stop; in a worker just forked, return its life."""
        while self.children or self.drain_by == math.inf:
            if child := self.spawn_missing():
                return child
            if not self.up and len(self.generation.slots(ACCEPTING, ENDING)) >= self.generation.settings.workers:
                self.up = True
                send_message(self.channel, "up")
            steady = self.up and self.drain_by == math.inf and not (self.vacant_until or self.generation.slots(ENDING))
            self.signals.wait(None if steady else TICK, *([self.channel] if self.channel != -1 else []))
            self.reap()
            self.read_orders()
            for pid, slot in self.children.items():
                if time.monotonic() >= min(slot[END_BY], self.drain_by):
                    os.kill(pid, signal.SIGKILL)
        signal.setitimer(signal.ITIMER_REAL, 1.0)  # the module's threads and exit functions have 1 s
        return None

    def spawn_missing(self) -> Life | None:
        """Fork workers for those that are missing, as far as there is room for them."""
        now = time.monotonic()
        self.vacant_until = [until for until in self.vacant_until if until > now]
        there = len(self.vacant_until) + len(self.generation.slots(FORKED, ACCEPTING))
        missing = self.generation.settings.workers - there if self.drain_by == math.inf else 0
        for slot in self.generation.slots(VACANT)[:max(0, missing)]:
            slot[STATE], slot[PID], slot[CALLED], slot[SERVED], slot[END_BY] = FORKED, 0, 0, 0, math.inf
            try:
                pid = os.fork()
            except OSError as why:
                slot[STATE] = VACANT
                self.vacant_until += [now + RESPAWN_DELAY] * missing
                log("*", f"Cannot Fork: {why.strerror}")
                send_message(self.channel, f"failed cannot fork a process: {why.strerror}")
                break
            if not pid:
                return lambda: Worker(self, slot).run()
            self.children[pid] = slot
        return None

    def read_orders(self) -> None:
        """Drain when the next generation serves.  The end of the channel is the stop, which workers see themselves."""
        if self.channel == -1 or not readable(0, self.channel):
            return
        self.drain_by = min(self.drain_by, time.monotonic() + self.generation.settings.grace)
        if read_message(self.channel)[0] == "drain":
            for pid in self.children:
                os.kill(pid, signal.SIGTERM)
            return
        for end in self.sockets:  # now only workers hold copies; from_workers ends with theirs
            end.close()
        os.close(self.channel)
        self.channel = -1

    def reap(self) -> None:
        """Reap exited workers only, no children of the handler's module."""
        for pid, slot in list(self.children.items()):
            ended, status = pid, -1
            with suppress(ChildProcessError):  # the module has reaped it
                ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.children[pid]
                self.reap_worker(pid, slot, status)

    def reap_worker(self, pid: int, slot: memoryview[float], status: int) -> None:
        state, called, slot[STATE] = slot[STATE], slot[CALLED], VACANT
        if state == ENDING and not status:
            return
        kill_group(pid)  # else what its handler has forked outlives it: a pool's processes for ever
        cause = "unknown" if status == -1 else cause_of_death(status)
        end = f"Died. ({cause})"
        if cause == "SIGALRM" and called:
            end = f"Killed. (handler ran longer than {self.generation.settings.handler_timeout:g} s)"
        elif cause in ("SIGALRM", "SIGKILL") and time.monotonic() >= min(slot[END_BY], self.drain_by):
            end = "Killed. (still running after the grace)"
        log("*", f"Child Process {end}", pid=pid)
        if state in (FORKED, ACCEPTING):
            self.vacant_until.append(time.monotonic() + RESPAWN_DELAY)
        if not self.up:
            send_message(self.channel, f"failed cannot keep workers: one died while it started ({cause})")


# ---- Worker -------------------------------------------------------------------------

GREED = 0.005  # s in which new clients are accepted without asking what else is ready
A_MOMENT = 0.001  # s that a worker waits for the half-close, which nearly always comes by then
IMPATIENCE = 0.005  # s without such a wait after one that was in vain
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Worker:
    """The process that calls the handler, for one client at a time, and waits no longer than a moment for any."""

    def __init__(self, supervisor: Supervisor, slot: memoryview[float]) -> None:
        os.setpgid(0, 0)
        name_process("daemontest-work")
        self.supervisor, self.settings, self.handler = supervisor, supervisor.generation.settings, supervisor.handler
        self.slot, self.pid = slot, os.getpid()
        self.listener, self.to_keeper, self.from_keeper = supervisor.sockets
        self.signals = Signals()
        self.requests_left, self.impatient_until = self.settings.max_requests, 0.0
        self.leaving = self.caught = False  # it is to exit; because it has caught SIGTERM
        self.client: Client | None = None  # being served
        if self.handler is not text_length:
            # With CHAIN, SIGALRM ends the worker after the report on where the handler hangs.
            faulthandler.register(signal.SIGALRM, file=2, chain=True)
            disown()
            os.register_at_fork(after_in_child=self.let_fork_go)
        set_signals(self.catch, {signal.SIGTERM})
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def run(self) -> None:
        log("*", "Child Process Started.")
        self.slot[PID], self.slot[STATE] = self.pid, ACCEPTING
        if not self.supervisor.up:
            self.wake_supervisor()
        poller, listener, from_keeper = select.epoll(), self.listener.fileno(), self.from_keeper.fileno()
        # A client wakes one waiting worker (epoll_ctl(2)).  With a handler, a text from the keeper wakes all, since one
        # alone might serve a client first.
        poller.register(listener, IN | select.EPOLLEXCLUSIVE)
        poller.register(from_keeper, IN | select.EPOLLEXCLUSIVE if self.handler is text_length else IN)
        for file in (self.signals.reading, self.supervisor.stopping, self.supervisor.lifeline):
            poller.register(file, IN)
        # Past max_requests, it serves on while too many are ENDING, and at a stop until no more texts come.
        stopping = self.supervisor.stopping
        while not self.leaving and (self.requests_left > 0 or readable(0, stopping)
                                    or len(self.supervisor.generation.slots(ENDING)) >= self.settings.workers):
            # Serve all that woke this worker before deciding to leave, a new client first: perhaps it woke nobody else.
            ready = dict(poller.poll(None if self.requests_left > 0 else TICK))
            if stopping in ready:  # even before: what waits on a socket of systemd's is for the next service
                poller.unregister(stopping)
                poller.unregister(listener)
                self.listener.close()
            elif listener in ready:
                self.accept_clients()
            if from_keeper in ready:
                self.take_text()
            if self.signals.reading in ready:
                self.signals.take()  # what woke it; catch() has noted what matters
            if self.supervisor.lifeline in ready:
                self.leaving = True
        if self.caught:
            log("*", "Caught SIGTERM")
        self.slot[STATE] = ENDING
        log("*", f"Child Process Ended. ({max(0, self.requests_left)})")
        if self.handler is text_length:
            os._exit(0)  # nothing is to be finished
        self.limit_end()  # for exit functions, and the handler's threads
        self.wake_supervisor()

    def accept_clients(self) -> None:
        """Serve new clients, for a moment without asking epoll in between, which is worth 5 per cent."""
        end = time.monotonic() + GREED
        while True:
            try:  # worth a tenth: accept() converts two enumerations, and asks the kernel for the address once more
                connection, address = self.listener._accept()  # type: ignore[attr-defined]
                os.set_blocking(connection, False)
            except OSError as why:
                if why.errno in OUT_OF_RESOURCES:
                    self.give_up(f"Cannot Accept: {why.strerror}")
                return  # nobody waits, that connection has failed (accept(2), "Error handling"), or nobody listens
            self.serve(Client(connection, address[0].removeprefix("::ffff:")), self.receive_text)
            if self.leaving or self.requests_left <= 0 or time.monotonic() > end:
                return

    def take_text(self) -> None:
        """Take a client whose text is whole from the keeper, and answer it."""
        try:
            client = Client.from_channel(self.from_keeper)
        except BlockingIOError:
            return
        except OSError as why:  # no descriptor is left for it
            self.give_up(f"Client Lost: {why.strerror}.")
        if client:
            self.serve(client, Client.take_data)
        else:  # the service stops, and no more texts come
            self.leaving = True

    def serve(self, client: Client, get_text: Callable[[Client], bytes | None]) -> None:
        """Get the client's text, answer it and close; or pass the client on to the keeper."""
        self.client, logged = client, False
        try:
            try:
                if (text := get_text(client)) is None:
                    client.send(self.to_keeper)
                    return
                self.requests_left -= 1
                whole = text.decode()
                text = client.data = b""  # it may be large
                self.log_text(client, whole)
                logged = self.settings.log != "life"
                client.data, client.is_reply = self.handle(whole), True
            except UnicodeDecodeError as why:
                refuse(client, f"text is not UTF-8 at byte offset {why.start}")
            except (Failure, MemoryError) as why:
                refuse(client, str(why) or "not enough memory")
            self.slot[SERVED] += 1
            self.deliver(client)
        except OSError as why:
            if client.is_reply or client.data or client.memfd != -1:
                lost = "Reply Not Delivered" if client.is_reply else "Lost"
                log("-", f"Client: {client.name}; {lost}: {why.strerror or why}.")
            if why.errno in OUT_OF_RESOURCES:
                self.give_up(f"Cannot Pass On: {why.strerror}")
        finally:
            client.close()  # sends what was held back, in one packet with the FIN
            if logged:
                log("-", "Client Query Processing Ended.")

    def receive_text(self, client: Client) -> bytes | None:
        """Return a whole text; or None, and the keeper is to see to the rest."""
        pieces: list[bytes] = []
        size, waited, piece = 0, False, None
        try:
            while (piece := receive_some(client.connection)) != b"":
                if piece:
                    pieces.append(piece)
                    size += len(piece)
                    if size > self.settings.max_text:
                        raise Failure(f"text longer than {self.settings.max_text} bytes")
                elif pieces and not waited and time.monotonic() >= self.impatient_until:
                    waited = True
                    if not readable(A_MOMENT, client.connection):
                        self.impatient_until = time.monotonic() + IMPATIENCE
                else:
                    break
        finally:
            client.data = b"".join(pieces)
        client.half_closed = piece == b""
        return client.data if client.half_closed else None

    def log_text(self, client: Client, text: str) -> None:
        """Log the client's text, or as much of it as one write takes."""
        wanted = self.settings.log
        if wanted != "life":
            shown = text[:LOGGED] if wanted == "texts" else ""
            log("-", "Client Query Processing Started.",
                f"Client: {client.name}; Received Text{':' if wanted == 'texts' else '.'}", text=shown)
            if len(text) > LOGGED and shown:
                log("-", f"Logged at Most {LOGGED} of {len(text)} Characters.")

    def handle(self, text: str) -> bytes:
        """Return the handler's reply, as it is sent.  Raise Failure, whatever the handler raises."""
        if self.handler is text_length:  # which cannot hang, print or fork
            return f"{self.pid} {text_length(text)}\n".encode()
        printed = Printed()
        try:
            self.slot[CALLED] = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, self.settings.handler_timeout)
            reply = self.handler(text)
            if not isinstance(reply, str):
                raise TypeError(f"handler returned {type(reply).__name__}, expected str")
            return b"%d %b\n" % (self.pid, str.encode(reply))
        except BaseException as why:  # SystemExit too: no text ends a worker
            if isinstance(why, SystemExit) and os.getpid() != self.pid:
                os._exit(why.code if isinstance(why.code, int) else why.code is not None)
            log_traceback("Handler Failed:", why)
            raise Failure("handler failed") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            printed.end_line()
            if os.getpid() != self.pid:
                os._exit(0)  # a fork of the handler's, which is not to serve
            self.slot[CALLED] = 0
            signal.set_wakeup_fd(self.signals.writing, warn_on_full_buffer=False)  # a library may have taken it

    def deliver(self, client: Client) -> None:
        """Send the reply.  A client that makes us wait, or has not half-closed, goes to the keeper.  Raise OSError."""
        try:
            sent = os.write(client.connection, client.data)
        except BlockingIOError:
            sent = 0
        if sent < len(client.data) or not client.half_closed:
            client.data = memoryview(client.data)[sent:]
            client.send(self.to_keeper)

    def give_up(self, why: str) -> NoReturn:
        """Exit for want of resources; but not as ENDING, so the next worker comes after a delay."""
        log("*", why)
        self.limit_end()
        sys.exit()

    def limit_end(self) -> None:
        """Have the supervisor kill this process after the grace, and the kernel, if the supervisor is dead."""
        self.slot[END_BY] = time.monotonic() + self.settings.grace
        signal.setitimer(signal.ITIMER_REAL, self.settings.grace)

    def catch(self, *_: object) -> None:
        """Note SIGTERM, also while the handler runs, or a library has taken the wake-up descriptor."""
        self.leaving = self.caught = True
        self.slot[STATE] = ENDING
        self.wake_supervisor()

    def wake_supervisor(self) -> None:
        with suppress(OSError):  # it is awake already
            os.write(self.supervisor.signals.writing, b"\0")

    def let_fork_go(self) -> None:
        """In a process that the handler has forked: it must not hold clients or the port, and dies of SIGTERM."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for end in (self.listener, self.to_keeper, self.from_keeper, self.client):
            if end:
                end.close()


if __name__ == "__main__":
    main()
