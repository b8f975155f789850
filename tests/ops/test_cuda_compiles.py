"""The CUDA kernels without a GPU: nvcc compiles them for every architecture, and what it made is looked at."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc/cuda"
SOURCES = sorted(CSRC.glob("*.cu"))
NVCC = next(
    (
        path
        for path in (
            *(str(Path(os.environ[name], "bin/nvcc")) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)),
            shutil.which("nvcc") or "",
            "/usr/local/cuda/bin/nvcc",
        )
        if path and os.access(path, os.X_OK)
    ),
    None,
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")]
ARCHITECTURES = ["75", "80", "86", "89", "90"]
KERNELS = {"cross_entropy": 8}  # of one source; 16 or more elsewhere
# Loads and stores of single numbers that a packed kernel may have. rms_norm, rope and swiglu: rstd, positions, the factors of
# a single pair. cross_entropy: target, its logit, gradient and two statistics, and the ends of a row that vectors leave over.
# qk_norm_rope: positions and rstd; forward rstd, backward the sum over a block for a channel, are stored.
SINGLE_LOADS = {"cross_entropy": 7, "qk_norm_rope": 4}
SINGLE_STORES = {"cross_entropy": 4, "qk_norm_rope": 2}


def _nvcc(*arguments: str) -> str:
    result = subprocess.run([str(NVCC), "-O3", "-std=c++17", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@cache
def _compiled(source: Path) -> tuple[dict[str, str], str]:
    """The report of ptxas for each architecture that this nvcc knows, and the PTX; one process per core."""
    known = [arch for arch in ARCHITECTURES if f"compute_{arch}" in _nvcc("--list-gpu-arch").split()]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        ptx = Path(folder, "out.ptx")
        making = pool.submit(_nvcc, "-arch=compute_90", "-ptx", str(source), "-o", str(ptx))
        reports = pool.map(
            lambda arch: _nvcc(
                "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(Path(folder, f"{arch}.cubin"))
            ),
            known,
        )
        found = dict(zip(known, reports, strict=True))
        making.result()
        return found, ptx.read_text()


def test_there_is_one_file_an_operator() -> None:
    assert [path.stem for path in SOURCES] == ["cross_entropy", "qk_norm_rope", "rms_norm", "rope", "swiglu"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_registers_and_spills(source: Path, architecture: str) -> None:
    reports, _ = _compiled(source)
    if architecture not in reports:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    report = reports[architecture]
    kernels = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert len(kernels) >= KERNELS.get(source.stem, 16)
    for name, stack, stores, loads, registers in kernels:
        # double exists for gradcheck alone, and single elements of a head are for sizes that no vector fits: 8 bytes spilled
        # on some architecture do not matter.
        if not re.search(r"Id+[EL]|Li1ELi32E", name):
            assert (stack, stores, loads) == ("0", "0", "0"), name
        # 65536 registers a multiprocessor: with 128 a thread, 512 threads still run at a time.
        assert int(registers) <= 128, name


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_packed_kernels_move_128_bits(source: Path) -> None:
    _, ptx = _compiled(source)
    assert "local_depot" not in ptx  # nothing lives in local memory
    bodies = re.findall(r"\.entry (\S+)\((.*?)\n}\n", ptx, re.DOTALL)
    packed = 0
    for name, body in bodies:
        if "_plain" in name or "sum_partitions" in name or re.search(r"Li1E((Lb[01]E)?[jl]E|Li32ELb[01]EE)", name):
            continue  # the kernels for any width and alignment
        if re.search(r"(forward|backward|rotate)Id", name):
            continue  # float64 is for checks of gradients, not for speed
        packed += 1
        loads = re.findall(r"ld\.global\.(\S+)", body)
        wide = [kind for kind in loads if kind.startswith("v4.") or kind == "v2.f64"]
        assert len(wide) >= 1 + (source.stem != "cross_entropy"), (name, loads)
        assert len(loads) - len(wide) <= SINGLE_LOADS.get(source.stem, 4), (name, loads)
        stores = re.findall(r"st\.global\.(\S+)", body)
        narrow = [kind for kind in stores if not kind.startswith(("v4.", "v2.f64"))]
        assert stores and len(narrow) <= SINGLE_STORES.get(source.stem, 1), (name, stores)
    assert packed >= (6 if source.stem == "cross_entropy" else 8)
