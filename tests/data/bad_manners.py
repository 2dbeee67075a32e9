"""A handler that does not tidy up after itself."""

import errno
import os
import resource
import signal
import time

LEFT_OPEN = []


class Late(Exception):
    pass


def raise_late(*_):
    raise Late


def handle(text):
    match text:
        case "alarm":
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
        case "alarm that raises":
            signal.signal(signal.SIGALRM, raise_late)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
        case "alarms without end":
            signal.signal(signal.SIGALRM, raise_late)
            signal.setitimer(signal.ITIMER_REAL, 0.5, 0.02)
        case "sleep":
            time.sleep(0.8)
        case "leave one open":
            LEFT_OPEN.append(os.open("/dev/null", os.O_RDONLY))
        case "leave all open":
            try:
                for _ in range(resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
                    LEFT_OPEN.append(os.open("/dev/null", os.O_RDONLY))
            except OSError as why:
                return errno.errorcode[why.errno]
        case "open":
            with open("/dev/null"), open("/dev/null"):
                return "opened"
        case "directory":
            return os.getcwd()
        case "go elsewhere":
            os.chdir(os.path.dirname(__file__))
        case "go nowhere":
            path = f"{os.path.dirname(__file__)}/gone-{os.getpid()}"
            os.mkdir(path)
            os.chdir(path)
            os.rmdir(path)
        case "exit":
            os._exit(0)
        case "exit in a fork":
            if os.fork() == 0:
                os._exit(0)
            os.wait()
    return text
