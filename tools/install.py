"""Make `.venv`: PyTorch for this machine, megatronish with its development tools, and DeepSpeed's CPU operators.

Run by `make install` with any Python >= 3.11; uses the standard library only. A stamp in `.venv` records what was
installed, so that a second run returns at once. `TORCH_INDEX=URL` takes PyTorch from that index instead of choosing.
Exit status 1 with one message when the environment cannot be made; the output of pip is in `.venv/install.log`.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

if sys.version_info < (3, 11):  # noqa: UP036 -- this file is run by whatever Python the user has
    sys.exit("megatronish needs Python 3.11 or newer, and this is %s.%s: " % sys.version_info[:2]  # noqa: UP031
             + "name another one, for example `make install PYTHON=python3.12`")  # fmt: skip

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD_TOOLS = ["pip", "setuptools", "wheel", "ninja", "packaging", "numpy"]
STAMP = "megatronish-install.json"
TORCH_MINIMUM = (2, 10)  # as in pyproject.toml
HEARTBEAT_S = 20.0
# Prints on one line: version, CUDA version of the build ("" for CPU builds), whether a CUDA device can be used.
TORCH_PROBE = "import torch; print(torch.__version__, torch.version.cuda or '-', torch.cuda.is_available())"
# Prints whether the PyTorch wheel in a pip report depends on CUDA libraries on this platform.
CUDA_PROBE = """
import json, sys
from packaging.requirements import Requirement
wheel = json.load(open(sys.argv[1]))["install"][0]["metadata"]
needs = [Requirement(text) for text in wheel.get("requires_dist", [])]
needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
print(any(need.name.startswith(("nvidia-", "cuda-")) for need in needs))
"""


class InstallError(Exception):
    """The environment cannot be made; the message gives the reason and the remedy."""


class TorchChoice(NamedTuple):
    """Where PyTorch comes from: the base Python's own (`system`), an index URL, or pip's default index (neither)."""

    reason: str
    system: bool = False
    index_url: str = ""


def choose_torch(*, index: str, gpu: bool, base_torch: str, default_needs_cuda: bool) -> TorchChoice:
    """Decide by the user's index, the GPU, the base Python's usable CUDA torch ("" if none) and pip's default wheel."""
    if index:
        return TorchChoice(f"from {index}: set by TORCH_INDEX", index_url=index)
    if gpu and base_torch:
        return TorchChoice(f"{base_torch} of the base Python: it has CUDA and sees this machine's GPU", system=True)
    if gpu:
        return TorchChoice("from the default package index: this machine has a GPU")
    if default_needs_cuda:
        return TorchChoice(f"from {CPU_INDEX}: no GPU here, and the default wheel brings CUDA", index_url=CPU_INDEX)
    return TorchChoice("from the default package index: no GPU here, and its wheel needs no CUDA")


def inputs_hash(root: Path) -> str:
    """SHA-256 over the files that determine what is installed: those named below and csrc/, names and contents."""
    files = [root / name for name in ("pyproject.toml", "setup.py", ".ci/constraints.txt", "tools/install.py")]
    files += sorted(path for path in (root / "csrc").rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def compiler() -> str:
    """Path of the C++ compiler that PyTorch's extension builder would call, "" if there is none."""
    return shutil.which((os.environ.get("CXX") or "c++").split()[0]) or ""


def has_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listing.returncode == 0 and listing.stdout.startswith("GPU ")


def base_python() -> str:
    """The interpreter that virtual environments are made from, also when a virtual one runs this file."""
    return getattr(sys, "_base_executable", "") or sys.executable


def read_stamp(root: Path) -> dict[str, str]:
    """The record of the last finished installation; empty if there is none or it cannot be read."""
    try:
        stamp = json.loads((root / ".venv" / STAMP).read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def is_current(root: Path, stamp: dict[str, str], index: str) -> bool:
    """True when `.venv` was made here, by these files, from this index (an unset TORCH_INDEX accepts any)."""
    return (
        stamp.get("inputs") == inputs_hash(root)
        and stamp.get("root") == str(root)
        and (not index or stamp.get("torch_index") == index)
        and (root / ".venv/bin/python").exists()
    )


def read_pins(constraints: Path) -> dict[str, str]:
    """Package name -> exact version, of a constraints file that holds `name==version` lines and comments only."""
    lines = (line.split("#")[0].strip() for line in constraints.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def new_enough(version: str, minimum: tuple[int, int]) -> bool:
    """Whether a torch version satisfies `>=minimum` by PEP 440: 2.10.0a0 comes before 2.10, local labels do not count."""
    match = re.match(r"(\d+)\.(\d+)(?:\.\d+)*(a|b|rc|\.dev)?", version)
    if match is None:
        return False
    release = (int(match[1]), int(match[2]))
    return release > minimum or (release == minimum and match[3] is None)


def build_outcome(log: str) -> str:
    """The last line of setup.py in a log: which kernels were built, and why others were not; "" if there is none."""
    lines = re.findall(r"^\s*megatronish: (.*kernels.*)$", log, re.MULTILINE)
    return lines[-1].strip() if lines else ""


class Installer:
    """One installation: writes a log, and prints each step with the seconds since the start."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.venv = root / ".venv"
        self.python = self.venv / "bin" / "python"
        self.log = self.venv / "install.log"
        self.constraints = root / ".ci" / "constraints.txt"
        self.start = time.monotonic()
        self.env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "DS_BUILD_OPS": "0"}
        # GPU containers set PIP_CONSTRAINT to pins of their own, which would contradict ours.
        self.env.pop("PIP_CONSTRAINT", None)
        self.env["PATH"] = f"{self.venv / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"

    def report(self, message: str) -> None:
        print(f"[install {time.monotonic() - self.start:4.0f} s] {message}", flush=True)

    def log_tail(self, lines: int) -> str:
        """The last lines that the latest command printed."""
        output = self.log.read_text(errors="replace").rpartition("\n$ ")[2].partition("\n")[2]
        return "\n".join(output.splitlines()[-lines:])

    def run(self, command: list[str]) -> bool:
        """Run with output to the log, and print its last line every HEARTBEAT_S seconds. True on exit status 0."""
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=self.root, env=self.env
            )
            while True:
                try:
                    return process.wait(timeout=HEARTBEAT_S) == 0
                except subprocess.TimeoutExpired:
                    self.report("  ... " + self.log_tail(1).strip()[:90])

    def probe(self, python: str, code: str, *arguments: str) -> str:
        """What a Python prints for `code`, "" if it fails."""
        result = subprocess.run(
            [python, "-c", code, *arguments], capture_output=True, text=True, cwd=self.venv.parent, env=self.env
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    def pip(self, *arguments: str) -> None:
        """`pip install ...`; raises InstallError with the last lines of pip's output."""
        if self.run([str(self.python), "-m", "pip", "install", *arguments]):
            return
        tail = self.log_tail(12)
        offline = re.search(r"name resolution|NewConnectionError|ConnectTimeout|ProxyError|Max retries|SSLError", tail)
        cause = (
            "pip cannot reach its package index: check the network or proxy, or point PIP_INDEX_URL at a mirror"
            if offline
            else "pip could not install what is pinned in .ci/constraints.txt"
        )
        raise InstallError(f"{cause}\n{tail}\nThe full log is {self.log}; `make install` resumes where it stopped")

    def venv_is_usable(self, stamp: dict[str, str]) -> bool:
        """False if `.venv` is missing, broken, or was moved here: its scripts hold absolute paths."""
        moved = stamp.get("root", str(self.root)) != str(self.root)
        return self.python.exists() and not moved and self.probe(str(self.python), "import pip; print(1)") == "1"

    def make_venv(self, system: bool) -> None:
        """Create `.venv` anew; with `system` it sees the packages of the base Python."""
        if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
            raise InstallError(
                f"{sys.executable} cannot make virtual environments: install its venv module "
                f"(on Debian and Ubuntu: apt install python3.{sys.version_info[1]}-venv) or name another PYTHON"
            )
        flags = ["--system-site-packages"] if system else []
        made = subprocess.run(
            [base_python(), "-m", "venv", "--clear", *flags, str(self.venv)], capture_output=True, text=True
        )
        if made.returncode != 0:
            raise InstallError(f"cannot make {self.venv}:\n{(made.stdout + made.stderr).strip()}")

    def base_cuda_torch(self) -> str:
        """Version of a CUDA build of torch that the base Python has, can use here and we accept; else ""."""
        version, cuda, usable = (self.probe(base_python(), TORCH_PROBE) or "- - False").split()
        return version if cuda != "-" and usable == "True" and new_enough(version, TORCH_MINIMUM) else ""

    def default_wheel_needs_cuda(self, pin: str) -> bool:
        """Ask pip, without installing, whether its default wheel of torch depends on CUDA packages on this platform."""
        report = self.venv / "torch-report.json"
        self.pip("--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", str(report), f"torch=={pin}")
        return self.probe(str(self.python), CUDA_PROBE, str(report)) == "True"

    def install_torch(self, choice: TorchChoice, pin: str) -> None:
        """Put the chosen torch in place; the CPU index out of reach is not fatal, as the default wheel runs on CPUs too."""
        pinned = ["-c", str(self.constraints), f"torch=={pin}"]
        if choice.index_url:
            try:
                # Dependencies come from the default index: a torch index carries other versions of them.
                few_tries = ["--retries", "1"] if choice.index_url == CPU_INDEX else []
                self.pip("--force-reinstall", "--no-deps", "--index-url", choice.index_url, *few_tries, f"torch=={pin}")
            except InstallError:
                if choice.index_url != CPU_INDEX:
                    raise
                self.report(
                    f"torch: {CPU_INDEX} has none; the default wheel is used, with GBs of CUDA (see {self.log})"
                )
        self.pip(*pinned)

    def torch(self, gpu: bool, system_torch: str) -> str:
        """Install torch where `.venv` lacks it; `system_torch` is what a fresh `.venv` sees of the base Python's."""
        pin = read_pins(self.constraints)["torch"]
        index = os.environ.get("TORCH_INDEX", "")
        present = (self.probe(str(self.python), TORCH_PROBE) or "-").split()[0]
        shared = "include-system-site-packages = true" in (self.venv / "pyvenv.cfg").read_text()
        if not index and not system_torch and (present.split("+")[0] == pin or (shared and present != "-")):
            self.report(f"torch: {present} is in .venv already (`make distclean` to choose anew)")
            return present
        needs_cuda = not index and not gpu and self.default_wheel_needs_cuda(pin)
        choice = choose_torch(index=index, gpu=gpu, base_torch=system_torch, default_needs_cuda=needs_cuda)
        self.report(f"torch: {choice.reason}")
        if not choice.system:
            self.install_torch(choice, pin)
        version, cuda, usable = (self.probe(str(self.python), TORCH_PROBE) or "- - False").split()
        if version == "-":
            raise InstallError(f"torch is installed but cannot be imported: run {self.python} -c 'import torch'")
        if gpu and usable != "True":
            self.report(
                f"WARNING: torch {version} (CUDA {cuda}) cannot use this GPU: update its driver, or take a build for an "
                "older CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cu126 make install"
            )
        return version

    def package(self, torch_version: str) -> None:
        """Install megatronish (editable) and its development tools, with torch kept at its installed version."""
        held = self.venv / "constraints.txt"
        pins = {**read_pins(self.constraints), "torch": torch_version}
        held.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        # pip shows the output of a build with -v only.
        self.pip("-v", "--no-build-isolation", "-c", str(held), "-e", ".[dev]")
        outcome = build_outcome(self.log.read_text(errors="replace"))
        self.report(f"operators: {outcome}" if outcome else f"operators: the build printed nothing to {self.log}")

    def install(self) -> None:
        """All steps, then the stamp."""
        index = os.environ.get("TORCH_INDEX", "")
        stamp = read_stamp(self.root)
        if is_current(self.root, stamp, index) and (stamp.get("compiler") or not compiler()):
            return
        gpu = has_gpu()
        system_torch = ""
        if not self.venv_is_usable(stamp):
            system_torch = self.base_cuda_torch() if gpu and not index else ""
            self.report(f"making .venv with Python {sys.version.split()[0]} of {sys.base_prefix}")
            self.make_venv(system=bool(system_torch))
            stamp = {}
        (self.venv / STAMP).unlink(missing_ok=True)
        self.log.write_text("")
        self.report("build tools: " + " ".join(BUILD_TOOLS))
        self.pip("-c", str(self.constraints), *BUILD_TOOLS)
        torch_version = self.torch(gpu, system_torch)
        self.report(f"packages: megatronish[dev] with torch {torch_version}")
        self.package(torch_version)
        record = {
            "inputs": inputs_hash(self.root),
            "root": str(self.root),
            "torch_index": index or stamp.get("torch_index", ""),
            "compiler": compiler(),
        }
        (self.venv / STAMP).write_text(json.dumps(record, indent=2) + "\n")
        self.report("done")


def main() -> int:
    try:
        Installer(Path(__file__).resolve().parents[1]).install()
    except InstallError as error:
        print(f"make install failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
