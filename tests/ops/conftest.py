"""What tests of the CPU kernels share."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatronish.ops
from megatronish.ops.extension import EXTENSION


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512_bf16"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the kernels of one instruction-set level, if this machine and build have them."""
    if not EXTENSION.cpu:
        pytest.skip(EXTENSION.cpu_problem)
    library = ctypes.CDLL(str(Path(megatronish.ops.__file__).parents[1] / "_C.so"))
    library.megatronish_cpu_level.restype = ctypes.c_char_p
    before = library.megatronish_cpu_level()
    if library.megatronish_set_cpu_level(request.param.encode()) != 0:
        pytest.skip(f"this CPU or build has no {request.param} kernels")
    yield request.param
    assert library.megatronish_set_cpu_level(before) == 0
