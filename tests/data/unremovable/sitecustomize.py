"""On the path of Python, it keeps PID files from being removed, as a directory of somebody else's does."""

import os

unlink = os.unlink


def unlink_others(path: str) -> None:
    if str(path).endswith(".pid"):
        raise PermissionError(13, "Permission denied", path)
    unlink(path)


os.unlink = unlink_others
