"""Temporary environments with other programs, for tests that compare with them.

MEGATRONISH_INTEROP=require fails the test where no package index answers, instead of skipping it; off skips at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

CONSTRAINTS = Path(__file__).resolve().parents[1] / ".ci" / "constraints.txt"


def make_environment(folder: Path, *packages: str) -> Path:
    """Make an environment with `packages`, without their dependencies, and through a .pth file the packages of the running
    one; returns its Python. Versions are those of the pinned set, where it names them."""
    if os.environ.get("MEGATRONISH_INTEROP") == "off":
        pytest.skip("MEGATRONISH_INTEROP=off")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    inside = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(inside.stdout.strip()) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    options = ["-c", str(CONSTRAINTS), "--no-compile", "--retries", "1", "--timeout", "10"]
    found = subprocess.run([*pip, *options, *packages], capture_output=True, text=True)
    if found.returncode:
        reason = f"{packages[0]} cannot be installed: {(found.stderr.strip() or 'pip failed').splitlines()[-1]}"
        if os.environ.get("MEGATRONISH_INTEROP") == "require":
            pytest.fail(reason)
        pytest.skip(reason)
    return python
