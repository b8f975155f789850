"""Build entry point. All metadata is in pyproject.toml; this file builds csrc/.

Three libraries without any Python in them: `megatronish/_C.so` (operators: schemas, CPU kernels of every instruction-set
level), `megatronish/_C_cuda.so` and `megatronish/_data.so` (batches from mapped tokens). The operators use torch's stable
ABI only, so one build serves torch 2.10 and later; the last needs no torch. Build without isolation
(`pip install --no-build-isolation -e .`): an isolated build would fetch a second PyTorch. After a change in csrc/,
`python setup.py build_ext --inplace` compiles what changed.

Settings (environment): CXX, the C++ compiler. MEGATRONISH_CUDA=auto|on|off: CUDA kernels when nvcc is found and torch has
CUDA (auto), in any case or else fail (on), never (off). MEGATRONISH_CUDA_ARCHS, such as "80;90". CUDA_HOME, CUDA_PATH.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
OPERATORS = ("rms_norm", "swiglu", "rope", "qk_norm_rope", "cross_entropy")  # csrc/cpu/X.cpp and csrc/cuda/X.cu
CPU_OPERATORS = ("attention", "linear_rows", "cached_attention")  # csrc/cpu/X.cpp alone
CUDA_ARCHS = "75;80;86;89;90"
# No contraction of a * b + c except where the source asks for it: all builds of a kernel must give the same bits.
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-DNDEBUG"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# Instruction-set level -> flags of its units; all but the first need an x86 compiler that knows them.
LEVELS = {"scalar": [], "avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}


class NotBuilt(Exception):
    """A library cannot be built here; the message is the reason."""


class Step(NamedTuple):
    """One compiler call: `command` makes `target` from files of csrc/ or objects."""

    command: list[str]
    target: Path
    inputs: list[Path]

    def run(self) -> None:
        """Run unless the target is newer than its inputs and was made by the same command."""
        record, text = self.target.with_suffix(self.target.suffix + ".cmd"), shlex.join(self.command)
        newest = max(path.stat().st_mtime for path in self.inputs)
        if (
            self.target.exists()
            and self.target.stat().st_mtime > newest
            and record.exists()
            and record.read_text() == text
        ):
            return
        self.target.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        result = subprocess.run(self.command, capture_output=True, text=True)
        if result.returncode != 0:
            output = (result.stdout + result.stderr).strip().splitlines()
            raise NotBuilt("\n".join([f"`{text}` failed:", *output[:40]]))
        record.write_text(text)


def run_steps(steps: list[Step]) -> None:
    """All of them, as many at a time as there are CPUs."""
    with ThreadPoolExecutor(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ) as pool:
        list(pool.map(Step.run, steps))


def sources() -> list[Path]:
    """Every file of csrc/: a change of any header compiles all again, which takes less than a minute."""
    return sorted(path for path in CSRC.rglob("*") if path.is_file())


def torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotBuilt("torch is not installed where the build runs: install it, and build with --no-build-isolation")
    folder = Path(spec.origin).parent
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise NotBuilt(f"the torch in {folder} has no stable ABI headers: it must be 2.10 or later")
    return folder


def find_cxx() -> list[str]:
    """The C++ compiler: CXX, or the first of the usual names that is on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    for candidate in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(candidate[0]):
            return candidate
    raise NotBuilt(
        "no C++ compiler was found (install g++, or set CXX)" if not named else f"CXX={named[0]} is not there"
    )


def find_nvcc() -> str:
    """nvcc of CUDA_HOME, of CUDA_PATH, on PATH, or in /usr/local/cuda; its path with links resolved."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise NotBuilt("nvcc was not found (looked in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)")


def cuda_home(nvcc: str) -> Path:
    """The toolkit that an nvcc belongs to, as reported by itself: the nvcc on PATH may be a script that calls another."""
    result = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    for line in result.stderr.splitlines():
        name, _, value = line.removeprefix("#$ ").partition("=")
        if name == "TOP":
            return Path(value).resolve()
    return Path(nvcc).resolve().parents[1]


def gencode(nvcc: str) -> list[str]:
    """Machine code for every architecture asked for that this nvcc knows, and PTX of the newest for later GPUs."""
    asked = os.environ.get("MEGATRONISH_CUDA_ARCHS", CUDA_ARCHS).replace(",", ";").split(";")
    result = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = [arch for arch in asked if f"compute_{arch}" in result.stdout.split()]
    if not known:
        raise NotBuilt(f"{nvcc} knows none of the architectures {';'.join(asked)} (MEGATRONISH_CUDA_ARCHS)")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def accepts(cxx: list[str], flags: list[str]) -> bool:
    """Whether the compiler takes these flags for this machine."""
    command = [*cxx, *flags, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def link(cxx: list[str], objects: list[Path], target: Path, torch: Path, *libraries: str) -> Step:
    """The step that makes a shared library. libtorch brings libtorch_cuda along, where there is one."""
    lookup = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--no-as-needed"]
    flags = ["-shared", *lookup, f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", *libraries]
    return Step([*cxx, *map(str, objects), *flags, "-o", str(target)], target, objects)


class BuildOperators(build_ext):
    """Compiles csrc/. Without a compiler, or without CUDA, the package works on plain torch: nothing here is fatal."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: there is no Python in the library."""
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        """Build the libraries and print the outcome in one line (which tools/install.py parses)."""
        self.outcomes: list[str] = []
        start = time.monotonic()
        super().run()
        print(f"megatronish: {'; '.join(self.outcomes)} ({time.monotonic() - start:.0f} s)", flush=True)

    def build_extension(self, ext: Extension) -> None:
        """One of the libraries."""
        target = Path(self.get_ext_fullpath(ext.name))
        if ext.name.endswith("_data"):
            return self.build_data(target)
        cuda = ext.name.endswith("_cuda")
        name = "CUDA kernels" if cuda else "CPU kernels"
        try:
            build = self.build_cuda if cuda else self.build_cpu
            self.outcomes.append(f"{name} for {build(target)}")
        except NotBuilt as reason:
            if cuda and os.environ.get("MEGATRONISH_CUDA") == "on":
                raise SystemExit(f"megatronish: {name}: MEGATRONISH_CUDA=on, but {reason}") from reason
            first, *details = str(reason).splitlines()
            print(*details, sep="\n", end="\n" if details else "", file=sys.stderr, flush=True)
            without = "" if cuda else " -- WARNING: RMSNorm, SwiGLU and RoPE run as plain torch, several times slower"
            self.outcomes.append(f"no {name}: {first}{without}")

    def build_data(self, target: Path) -> None:
        """Build `_data.so`. Without it the loader makes its batches with numpy, which hardly any training notices."""
        with contextlib.suppress(NotBuilt):
            source = CSRC / "data/packed_batch.cpp"
            target.parent.mkdir(parents=True, exist_ok=True)
            Step([*find_cxx(), *CXX_FLAGS, "-shared", str(source), "-o", str(target)], target, [source]).run()

    def build_cpu(self, target: Path) -> str:
        """Build `_C.so`; returns the names of the levels."""
        torch, cxx, objects = torch_folder(), find_cxx(), Path(self.build_temp) / "cpu"
        x86 = platform.machine() in ("x86_64", "AMD64")
        levels = {level: flags for level, flags in LEVELS.items() if not flags or (x86 and accepts(cxx, flags))}
        has = [f"-DMEGATRONISH_HAS_{level}" for level in levels]
        steps = []

        def compile_one(source: Path, stem: str, *flags: str) -> None:
            output = objects / f"{stem}.o"
            steps.append(Step([*cxx, *CXX_FLAGS, *flags, "-c", str(source), "-o", str(output)], output, sources()))

        compile_one(CSRC / "bindings.cpp", "bindings", STABLE_ABI, f"-I{torch / 'include'}")
        for bindings in ("attention_bindings", "decode_bindings"):
            compile_one(CSRC / f"cpu/{bindings}.cpp", bindings, STABLE_ABI, f"-I{torch / 'include'}")
        compile_one(CSRC / "cpu/levels.cpp", "levels", *has)
        for level, flags in levels.items():
            for operator in (*OPERATORS, *CPU_OPERATORS):
                named = f"-DMEGATRONISH_LEVEL={level}"
                compile_one(CSRC / f"cpu/{operator}.cpp", f"{operator}.{level}", named, *flags)
        run_steps(steps)
        link(cxx, [step.target for step in steps], target, torch).run()
        return ", ".join(levels)

    def build_cuda(self, target: Path) -> str:
        """Build `_C_cuda.so`; returns its architectures and nvcc."""
        wish = os.environ.get("MEGATRONISH_CUDA", "auto")
        if wish not in ("auto", "on", "off"):
            raise SystemExit(f"megatronish: MEGATRONISH_CUDA={wish}: choose auto, on or off")
        if wish == "off":
            raise NotBuilt("MEGATRONISH_CUDA=off")
        torch, cxx, nvcc = torch_folder(), find_cxx(), find_nvcc()
        if wish == "auto" and not list((torch / "lib").glob("*torch_cuda.*")):
            raise NotBuilt("this torch has no CUDA (MEGATRONISH_CUDA=on builds them all the same)")
        home, architectures, objects = cuda_home(nvcc), gencode(nvcc), Path(self.build_temp) / "cuda"
        bindings = objects / "bindings.o"
        flags = [STABLE_ABI, "-DMEGATRONISH_CUDA", f"-I{torch / 'include'}"]
        command = [*cxx, *CXX_FLAGS, *flags, "-c", str(CSRC / "bindings.cpp"), "-o", str(bindings)]
        steps = [Step(command, bindings, sources())]
        for operator in OPERATORS:
            output = objects / f"{operator}.o"
            flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", *architectures]
            command = [nvcc, *flags, "-c", str(CSRC / f"cuda/{operator}.cu"), "-o", str(output)]
            steps.append(Step(command, output, sources()))
        run_steps(steps)
        folders = [f"-L{folder}" for folder in (home / "lib64", home / "lib") if folder.is_dir()]
        libraries = [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        link(cxx, [step.target for step in steps], target, torch, *libraries).run()
        return f"{', '.join(flag.rpartition('=')[2] for flag in architectures)} by {nvcc}"


def extension(name: str) -> Extension:
    """Optional: a library that was not built is left out of the package instead of stopping the installation."""
    return Extension(name, [str(CSRC / "bindings.cpp")], depends=[str(path) for path in sources()], optional=True)


# Extensions and the build_ext command that compiles them.
EXTENSIONS = [extension(f"megatronish.{name}") for name in ("_C", "_C_cuda", "_data")]
COMMANDS: dict[str, type[Command]] = {"build_ext": BuildOperators}

if __name__ == "__main__":
    setup(ext_modules=EXTENSIONS, cmdclass=COMMANDS)
