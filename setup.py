"""Build entry point. All metadata is in pyproject.toml; this file holds what only code can say: how to build extensions.

Build without isolation (`pip install --no-build-isolation -e .`): an isolated build would fetch a second PyTorch.
"""

from __future__ import annotations

from setuptools import Command, Extension, setup

# Extensions and the build_ext command that compiles them. A build command is listed here together with its sources.
EXTENSIONS: list[Extension] = []
COMMANDS: dict[str, type[Command]] = {}

if __name__ == "__main__":
    setup(ext_modules=EXTENSIONS, cmdclass=COMMANDS)
