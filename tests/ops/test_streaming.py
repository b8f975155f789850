"""Results that go past the caches, and offsets beyond 2^31: the same bits as results in the caches, and near the start."""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import megatronish.ops
from megatronish.ops.extension import EXTENSION

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ["scalar", "avx2", "avx512", "avx512_bf16"]
# Rows that streaming stores take (multiples of 64 bytes), rows that they do not, and one too wide to keep x + residual.
WIDTHS = [16, 34, 64, 100, 1024, 1056, 8256]
OPS = torch.ops.megatronish
needs_cpu = pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem or "built")


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(megatronish.ops.__file__).parents[1] / "_C.so"))
    library.megatronish_cpu_level.restype = ctypes.c_char_p
    library.megatronish_set_cache_bytes.restype = ctypes.c_int64
    library.megatronish_set_cache_bytes.argtypes = [ctypes.c_int64]
    return library


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The library at one level, if this machine and build have it; level and cache size are put back."""
    library = _library()
    before = library.megatronish_cpu_level()
    if library.megatronish_set_cpu_level(request.param.encode()) != 0:
        pytest.skip(f"this CPU or build has no {request.param} kernels")
    size = library.megatronish_set_cache_bytes(1 << 40)
    yield library
    library.megatronish_set_cache_bytes(size)
    assert library.megatronish_set_cpu_level(before) == 0


def _random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _all_results(width: int, dtype: torch.dtype, rows: int = 37) -> list[Tensor]:
    """Every output of every operator; 37 rows make blocks of four and some left over."""
    x, residual, dy = (_random(rows, width, dtype=dtype, seed=seed) for seed in range(3))
    weight, gate_up = _random(width, dtype=dtype, seed=3), _random(rows, 2 * width, dtype=dtype, seed=4)
    results: list[Tensor] = []
    for w in (weight, weight.float(), None):
        y, rstd = OPS.rms_norm_fwd(x, w, 1e-5, 1.0)
        results += [y, rstd, *OPS.add_rms_norm_fwd(x, residual, w, 1e-5, 0.0)]
        results += [
            *OPS.rms_norm_bwd(dy, None, x, w, rstd, 1.0, True),
            *OPS.rms_norm_bwd(dy, residual, x, w, rstd, 1.0, True),
        ]
    results += [OPS.swiglu_fwd(gate_up), *OPS.swiglu_bwd(dy, gate_up, True), *OPS.swiglu_bwd(dy, gate_up, False)]
    heads = torch.cat((gate_up, gate_up), dim=-1).view(1, rows, 4, width)
    for half in (width // 2, width // 4):
        angles = torch.outer(torch.arange(rows).double(), 0.9 ** torch.arange(half).double())
        cos, sin = angles.cos().float(), angles.sin().float()
        for interleaved in (False, True):
            results += [
                OPS.rope(part, cos, sin, None, 0, interleaved, interleaved) for part in (heads, heads[:, :, 1:3])
            ]
            packed = heads.clone()
            OPS.rope_qkv_(packed, cos, sin, None, 1, 2, 1, 1, interleaved, False)
            gradients = heads.split((2, 1, 1), dim=2)
            results += [packed, OPS.rope_qkv_bwd(*gradients, cos, sin, None, 1, interleaved)]
            if width > 1024:  # the widest head of QK-norm
                continue
            norms = (_random(width, dtype=dtype, seed=5), _random(width, dtype=dtype, seed=6))
            results += OPS.qk_norm_rope_fwd(heads, *norms, cos, sin, None, 0, [1, 2, 1, 1], 1e-6, 0.0, interleaved)
    return results


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_streamed_results_have_the_same_bits(level: ctypes.CDLL, width: int, dtype: torch.dtype) -> None:
    kept = _all_results(width, dtype)
    threads = torch.get_num_threads()
    assert level.megatronish_set_cache_bytes(0) == 1 << 40
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            streamed = _all_results(width, dtype)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(streamed, kept, strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_cpu
def test_the_size_of_the_cache_is_a_sane_one() -> None:
    library = _library()
    size = library.megatronish_set_cache_bytes(0)
    library.megatronish_set_cache_bytes(size)
    assert 128 << 10 <= size <= 4 << 30  # from a small second-level cache to the largest third-level ones sold


@needs_cpu
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="streaming stores are those of x86")
def test_the_library_has_streaming_stores() -> None:
    """Without them the test above would compare a thing with itself."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    library = Path(megatronish.ops.__file__).parents[1] / "_C.so"
    code = subprocess.run([objdump, "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "vmovntps" in code  # fp32
    assert "vmovntdq" in code  # 16 bits


FLAGS = {"scalar": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}


@pytest.mark.parametrize("level_name", FLAGS)
def test_rows_beyond_element_2_to_the_31(level_name: str, tmp_path: Path) -> None:
    """Forward and backward kernels, the latter with a fused residual and partial sums, without memory for such tensors."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if level_name != "scalar" and (not EXTENSION.cpu or _library().megatronish_cpu_level() == b"scalar"):
        pytest.skip("this CPU has no AVX2")
    program = tmp_path / "far_rows"
    sources = [ROOT / "tests/ops/far_rows.cpp", *(ROOT / f"csrc/cpu/{op}.cpp" for op in ("rms_norm", "swiglu", "rope"))]
    defines = [f"-DMEGATRONISH_LEVEL={level_name}", f"-DFAR_STREAMED={'false' if level_name == 'scalar' else 'true'}"]
    command = [compiler, "-std=c++17", "-O0", *FLAGS[level_name], *defines, f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    if result.returncode == 77:
        pytest.skip("this machine does not reserve address space for 2^31 elements")
    assert result.returncode == 0, result.stdout
