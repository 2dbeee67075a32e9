"""The handler that uses threads, with all that it needs imported with its module."""

import concurrent.futures  # noqa: F401
import logging  # noqa: F401
import subprocess  # noqa: F401
import threading  # noqa: F401

from uses_threads import handle  # noqa: F401
