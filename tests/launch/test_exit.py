"""A program exits with its status, whatever threads it leaves running."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatronish.launch.exit import EXIT_STOPPED

BEFORE = """
import atexit, os, sys, threading, time
from megatronish.launch import exit as exit_module
def main():
    print("working")
"""


def end_of(body: str, before: str = "") -> subprocess.CompletedProcess[str]:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    program = f"{BEFORE}{lines}{before}\nexit_module.run_program(main)"
    env = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("return 0", 0, ""),
        ("return 3", 3, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit()", 0, ""),
        ("raise KeyError('lost')", 1, "KeyError: 'lost'"),
        ("threading.Thread(target=time.sleep, args=(1000,)).start(); return 0", 0, ""),
        ("exit_module.exit_now(exit_module.EXIT_STOPPED)", EXIT_STOPPED, ""),
        ("exit_module.exit_within(0.1, 5); time.sleep(1000)", 5, ""),
        ("atexit.register(print, 'a library prints goodbye'); return 0", 0, ""),
    ],
)
def test_status_and_output(body: str, status: int, error: str) -> None:
    """Printed output is written, although the stream is a pipe and was not flushed."""
    done = end_of(body)
    assert (done.returncode, done.stderr[-len(error) - 1 :].strip()) == (status, error)
    assert done.stdout == "working\n" + ("a library prints goodbye\n" if "goodbye" in body else "")


def test_an_exit_function_that_hangs() -> None:
    done = end_of("atexit.register(time.sleep, 1000); return 4", "exit_module.SHUTDOWN_SECONDS = 0.5")
    assert (done.returncode, done.stdout) == (4, "working\n")


def test_a_thread_that_hangs_while_it_prints() -> None:
    """It holds the lock of stdout, for which a flush waits forever."""
    body = """
read, write = os.pipe()
sys.stdout = os.fdopen(write, "w", 1)
threading.Thread(target=print, args=("x" * 1_000_000,), daemon=True).start()
time.sleep(0.2)
exit_module.exit_now(6)
"""
    assert end_of(body).returncode == 6
