"""What differs between systems: stopping a program as a user does, and what cannot be tested on Windows or on Wine."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest

WINDOWS = os.name == "nt"
ON_WINE = WINDOWS and hasattr(ctypes.windll.ntdll, "wine_get_version")
needs_terminals = pytest.mark.skipif(WINDOWS, reason="Windows has no pseudo-terminals that Python can open")
wine_passes_no_break = pytest.mark.skipif(
    ON_WINE, reason="Wine, unlike Windows, does not pass Ctrl-Break on to programs that handle it")
STOPS = [*(pytest.param(name, marks=wine_passes_no_break if "BREAK" in name else ()) for name in (
    ["CTRL_C_EVENT", "CTRL_BREAK_EVENT"] if WINDOWS else ["SIGINT", "SIGTERM", "SIGHUP"]))]
# Windows sends Ctrl-C to all programs of a console at once: this one runs the program in a console of its own.
CONSOLE = """
import os, signal, subprocess, sys
for number in (signal.SIGINT, signal.SIGBREAK):
    signal.signal(number, signal.SIG_IGN)
process = subprocess.Popen(sys.argv[1:])
os.kill(0, int(sys.stdin.readline()))
sys.exit(process.wait())
"""


def start_to_be_stopped(command):
    """The running program, for `stop`."""
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    if not WINDOWS:
        return subprocess.Popen(command, **pipes, text=True)
    return subprocess.Popen([sys.executable, "-c", CONSOLE, *command], **pipes, stdin=subprocess.PIPE, text=True,
                            creationflags=subprocess.CREATE_NO_WINDOW)


def stop(process, what):
    """Stop the program by the signal or event named `what`; returns what it wrote."""
    number = getattr(signal, what)
    if WINDOWS:
        return process.communicate(input=f"{int(number)}\n", timeout=120)
    process.send_signal(number)
    return process.communicate(timeout=120)


def made(folder):
    """The new folder; the test is skipped where its name cannot be stored."""
    try:
        folder.mkdir()
    except FileNotFoundError:
        pytest.skip("Wine without a UTF-8 locale, unlike Windows, stores only ASCII names")
    return folder


def wait_for(condition):
    """Return once `condition()` holds; the test fails after two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
