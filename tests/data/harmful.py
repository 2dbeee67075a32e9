"""A handler whose module does at its import what the file "harm" beside it names."""

import os
import signal
import sys

HERE = os.path.dirname(__file__)


# ---- What ends the import ------------------------------------------------------------


def raises() -> None:
    raise RuntimeError("no good")


def exits() -> None:
    sys.exit(3)


def leaves_with_0() -> None:
    os._exit(0)


def leaves_with_3() -> None:
    os._exit(3)


def segfaults() -> None:
    import ctypes

    ctypes.string_at(0)


def aborts() -> None:
    os.abort()


def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sends_itself_a_real_time_signal() -> None:
    os.kill(os.getpid(), signal.SIGRTMIN + 1)


def allocates_a_tebibyte() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, -1))  # spares a machine that promises memory it does not have
    bytearray(1 << 40)


def waits_for_a_child() -> None:
    os.wait()


def spoils_a_builtin() -> None:
    import builtins

    builtins.len = builtins.str = None
    raise RuntimeError("no good")


def spoils_every_builtin() -> None:
    import builtins

    names = [name for name in vars(builtins) if not name.startswith("__")]
    vars(builtins).update(dict.fromkeys(names))


def closes_every_descriptor() -> None:
    os.closerange(0, 1000)


# ---- What does not -------------------------------------------------------------------


def nothing() -> None:
    pass


def ignores_the_end_of_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def ignores_every_signal() -> None:
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(signum, signal.SIG_IGN)


def raises_at_every_signal() -> None:
    def complain(signum: int, _: object) -> None:
        raise RuntimeError(f"signal {signum}")

    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(signum, complain)


def blocks_every_signal() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())


def lets_every_signal_in() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def shares_memory() -> None:
    """Python's resource tracker, started on the way, unblocks SIGINT and SIGTERM."""
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(create=True, size=1)
    memory.close()
    memory.unlink()


def leaves_an_alarm() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # however long the rest of the import takes
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)


def waits_for_every_child() -> None:
    """Takes the end of each child away from whoever waits for it, for a minute."""
    import threading
    import time

    def wait() -> None:
        for _ in range(6000):
            try:
                os.wait()
            except ChildProcessError:
                time.sleep(0.01)

    threading.Thread(target=wait, daemon=True).start()


def leaves_later() -> None:
    """By a thread, as soon as there is a file "now" beside this one, within a minute."""
    import threading
    import time

    def leave() -> None:
        for _ in range(6000):
            if os.path.exists(f"{HERE}/now"):
                os._exit(0)
            time.sleep(0.01)

    threading.Thread(target=leave, daemon=True).start()


def forks() -> None:
    """A child that lives for a minute in the same process group."""
    reading, writing = os.pipe()
    if not os.fork():
        sleep_on(writing)
    os.read(reading, 1)


def forks_a_daemon() -> None:
    """A child that lives for a minute in a session of its own."""
    reading, writing = os.pipe()
    if not os.fork():
        os.setsid()
        sleep_on(writing)
    os.read(reading, 1)


def starts_a_process() -> None:
    import multiprocessing

    reading, writing = os.pipe()
    multiprocessing.get_context("fork").Process(target=sleep_on, args=(writing,)).start()
    os.read(reading, 1)


def sleep_on(begun: int) -> None:
    """Tell by a byte to BEGUN that it has begun, and by a line of the file "helpers" who does it."""
    import time

    with open(f"{HERE}/helpers", "a") as file:
        file.write(f"{os.getpid()}\n")
    os.write(begun, b".")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    time.sleep(60)
    os._exit(0)


with open(f"{HERE}/harm") as file:
    HARM = file.read()
globals()[HARM]()


def handle(text: str) -> str:
    return f"it {HARM}"
