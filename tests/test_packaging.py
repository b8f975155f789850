"""The files that install and check megatronish agree with each other, and the installer decides and remembers rightly."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INIT_MODULES = sorted(
    ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "megatronish").rglob("__init__.py")
)
LIGHT_MODULES = [name for name in INIT_MODULES if name.split(".")[:2] != ["megatronish", "ops"]]


@pytest.fixture(scope="module")
def installer() -> ModuleType:
    """tools/install.py as a module; it is a script outside the package."""
    spec = importlib.util.spec_from_file_location("megatronish_install", ROOT / "tools/install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pins(installer: ModuleType) -> dict[str, str]:
    return {canonicalize_name(name): pin for name, pin in installer.read_pins(ROOT / ".ci/constraints.txt").items()}


def test_every_dependency_is_pinned_inside_its_range(pins: dict[str, str]) -> None:
    extras = PROJECT["optional-dependencies"]
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    # flash-attn (extra "gpu") is built against the user's CUDA, so no one version can be pinned for all.
    requirements += [Requirement(text) for extra in extras if extra != "gpu" for text in extras[extra]]
    for requirement in requirements:
        if requirement.name != "megatronish":
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_deepspeed_is_pinned_to_the_one_release_that_is_installed(pins: dict[str, str]) -> None:
    (deepspeed,) = [text for text in PROJECT["dependencies"] if text.startswith("deepspeed")]
    assert deepspeed == f"deepspeed=={pins['deepspeed']}"
    assert importlib.metadata.version("deepspeed") == pins["deepspeed"]


def test_constraints_are_closed_under_dependency(pins: dict[str, str]) -> None:
    """Whatever the pinned packages need here is pinned too, else two installations could differ."""
    for name in pins:
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                # A CUDA build of torch pins its nvidia-* packages and triton exactly by itself.
                assert canonicalize_name(need.name) in pins or name == "torch", f"{name} needs {need}"


def test_torch_minimum_of_the_installer_is_that_of_the_package(installer: ModuleType) -> None:
    assert "torch>={}.{}".format(*installer.TORCH_MINIMUM) in PROJECT["dependencies"]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_a_package_is_light(module: str) -> None:
    """No package but ops drags heavy libraries in by its mere name: tools that only read a config must start at once."""
    code = f"import sys, {module}; print(sorted({{'torch', 'deepspeed', 'transformers', 'numpy'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_importing_ops_registers_the_operators() -> None:
    """`import megatronish.ops` and nothing else: the operators of csrc/ where they are built, else the reason why not."""
    code = """
import torch, megatronish.ops
built = megatronish.ops.extension.EXTENSION
print(hasattr(torch.ops.megatronish, "rms_norm_fwd"), built.cpu, bool(built.cpu_problem), "deepspeed" in __import__("sys").modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.split() in (["True", "True", "False", "False"], ["False", "False", "True", "False"]), (
        result.stdout + result.stderr
    )


@pytest.mark.parametrize(
    ("index", "gpu", "base_torch", "default_needs_cuda", "expected"),
    [
        ("https://mirror", True, "2.12.0+cu130", True, (False, "https://mirror")),  # the user's word goes first
        ("", True, "2.12.0+cu130", True, (True, "")),  # a working CUDA torch is taken as it is
        ("", True, "", True, (False, "")),  # a GPU: the default wheel, with CUDA
        ("", False, "", True, (False, "https://download.pytorch.org/whl/cpu")),
        ("", False, "", False, (False, "")),  # macOS, or an index that serves CPU builds
    ],
)
def test_torch_choice(installer, index, gpu, base_torch, default_needs_cuda, expected) -> None:  # type: ignore[no-untyped-def]
    choice = installer.choose_torch(index=index, gpu=gpu, base_torch=base_torch, default_needs_cuda=default_needs_cuda)
    assert (choice.system, choice.index_url) == expected


@pytest.mark.parametrize(
    ("version", "accepted"),
    [("2.10.0", True), ("2.10.0+cu128", True), ("3.0", True), ("2.9.1", False), ("2.10.0a0+1f2e", False)]
    + [("2.11.0a0+1f2e", True), ("2.10.0.dev20260101", False), ("unknown", False)],
)
def test_torch_version_order(installer: ModuleType, version: str, accepted: bool) -> None:
    assert installer.new_enough(version, (2, 10)) is accepted


def test_the_installer_reports_the_outcome_of_the_build(installer: ModuleType) -> None:
    log = """
  building 'megatronish._C' extension
  megatronish: no CPU kernels: CXX=c++ is not there -- WARNING: slower; no CUDA kernels: MEGATRONISH_CUDA=off (0 s)
  Created wheel for megatronish: filename=megatronish-0.1.0-0.editable-cp311-cp311-linux_x86_64.whl size=12832
  Building again: megatronish: CUDA kernels
  megatronish: CPU kernels for scalar, avx2; no CUDA kernels: nvcc was not found (looked in PATH) (41 s)
Successfully installed megatronish-0.1.0
"""
    expected = "CPU kernels for scalar, avx2; no CUDA kernels: nvcc was not found (looked in PATH) (41 s)"
    assert installer.build_outcome(log) == expected
    assert installer.build_outcome("Successfully installed megatronish-0.1.0") == ""


@pytest.fixture
def installed_copy(tmp_path: Path, installer: ModuleType) -> Path:
    """The files that the stamp covers, and a `.venv` that claims to be installed from them."""
    for name in ("pyproject.toml", "setup.py", ".ci/constraints.txt", "tools/install.py", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / "csrc").mkdir()
    stamp = {"inputs": installer.inputs_hash(tmp_path), "root": str(tmp_path), "torch_index": "", "compiler": "c++"}
    (tmp_path / ".venv" / installer.STAMP).write_text(json.dumps(stamp))
    return tmp_path


def test_a_second_install_does_nothing(installed_copy: Path) -> None:
    before = sorted(installed_copy.rglob("*"))
    result = subprocess.run(
        [sys.executable, "tools/install.py"], capture_output=True, text=True, cwd=installed_copy, timeout=20
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert sorted(installed_copy.rglob("*")) == before


def test_what_changes_the_environment_makes_it_stale(installed_copy: Path, installer: ModuleType) -> None:
    stamp = installer.read_stamp(installed_copy)
    assert installer.is_current(installed_copy, stamp, "")
    assert not installer.is_current(installed_copy, stamp, "https://other-index")
    moved = installed_copy.with_name("moved")
    installed_copy.rename(moved)
    assert not installer.is_current(moved, stamp, "")
    moved.rename(installed_copy)
    assert installer.is_current(installed_copy, stamp, "")
    for changed in ("csrc/kernel.cpp", "setup.py", ".ci/constraints.txt"):
        stamp = {**stamp, "inputs": installer.inputs_hash(installed_copy)}
        with (installed_copy / changed).open("a") as file:
            file.write("# changed\n")
        assert not installer.is_current(installed_copy, stamp, ""), changed
    (installed_copy / ".venv" / installer.STAMP).write_text('{"inputs": ')  # torn by a full disk
    assert installer.read_stamp(installed_copy) == {}


def test_make_clean_keeps_data_and_runs(installed_copy: Path) -> None:
    kept = [
        installed_copy / name for name in ("data/corpus.bin", "runs/demo/loss.png", "megatronish/data/samples/blend.py")
    ]
    removed = [installed_copy / name for name in ("build/x.o", "megatronish/__pycache__/x.pyc", ".mypy_cache/x")]
    for path in kept + removed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    result = subprocess.run(["make", "clean"], capture_output=True, text=True, cwd=installed_copy)
    assert result.returncode == 0, result.stderr
    assert "data/ and runs/" in result.stdout
    assert [path.exists() for path in kept] == [True] * len(kept)
    assert [path.exists() for path in removed] == [False] * len(removed)
    assert (installed_copy / ".venv/bin/python").is_symlink()
