"""The operators of csrc/ as torch sees them: schemas, fake kernels, autograd, torch.compile, refusals, and what is built."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.model.transformer import Transformer
from megatronish.ops import dispatch, extension
from megatronish.ops.extension import EXTENSION, Extension
from megatronish.ops.qk_norm_rope import qk_norm_rope
from megatronish.ops.rms_norm import add_rms_norm, rms_norm
from megatronish.ops.rope import rope, rope_qkv_
from megatronish.ops.swiglu import swiglu

ROOT = Path(__file__).resolve().parents[2]
needs_cpu = pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem or "built")
COS, SIN = (f(torch.outer(torch.arange(40.0), 0.7 ** torch.arange(4.0))) for f in (torch.cos, torch.sin))
POSITIONS = torch.tensor([[3, 0, 1, 2, 39], [0, 1, 0, 1, 0]], dtype=torch.int32)


def _x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _samples(dtype: torch.dtype) -> list[tuple[str, tuple[object, ...]]]:
    x, w, gate_up = _x(3, 5, 12, dtype=dtype), _x(12, dtype=dtype, seed=1), _x(3, 5, 12, dtype=dtype, seed=2)
    rstd = x.new_ones(3, 5, 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    heads = _x(2, 5, 4, 10, dtype=dtype)
    norms, parts = (_x(10, dtype=dtype), _x(10, dtype=dtype, seed=1)), heads.split((2, 1, 1), dim=2)
    sizes = rstd.new_ones(2, 5, 3)
    logits, labels = _x(5, 30, dtype=dtype), torch.tensor([0, 29, 3, -100, 7])
    statistics = (rstd.new_ones(5), logits.amax(dim=1).to(rstd.dtype), rstd.new_full((5,), 9.0))
    return [
        ("rms_norm_fwd", (x, w, 1e-5, 0.0)),
        ("rms_norm_fwd", (x, None, 1e-5, 1.0)),
        ("rms_norm_fwd", (x.transpose(0, 1), w.float() if dtype != torch.float64 else w, 1e-5, 0.0)),
        ("add_rms_norm_fwd", (x, gate_up, w, 1e-5, 0.0)),
        ("rms_norm_bwd", (gate_up, None, x, w, rstd, 0.0, True)),
        ("rms_norm_bwd", (gate_up, x, x.transpose(0, 1).contiguous().transpose(0, 1), w, rstd, 1.0, False)),
        ("rms_norm_bwd", (gate_up, x, x, None, rstd, 0.0, True)),
        ("swiglu_fwd", (gate_up,)),
        ("swiglu_bwd", (x[..., :6], gate_up, True)),
        ("swiglu_bwd", (x[..., :6], gate_up, False)),
        ("rope", (heads, COS, SIN, POSITIONS, 0, False, False)),
        ("rope", (heads[:, :, 1:3], COS, SIN, None, 4, True, True)),
        ("rope_qkv_", (heads, COS, SIN, POSITIONS, 1, 2, 1, 1, False, False)),
        ("rope_qkv_", (heads, COS, SIN, None, 2, 1, 1, 0, True, True)),
        ("rope_qkv_bwd", (*parts, COS, SIN, POSITIONS, 1, False)),
        ("rope_qkv_bwd", (parts[0].transpose(1, 2).contiguous().transpose(1, 2), *parts[1:], COS, SIN, None, 1, True)),
        ("qk_norm_rope_fwd", (heads, *norms, COS, SIN, POSITIONS, 0, [1, 2, 1, 1], 1e-6, 0.0, False)),
        ("qk_norm_rope_fwd", (heads, *norms, COS, SIN, None, 4, [2, 1, 0, 1], 1e-6, 1.0, True)),
        ("qk_norm_rope_bwd", (*parts, heads, *norms, COS, SIN, None, sizes, 3, [1, 2, 1, 1], 0.0, False, True)),
        ("qk_norm_rope_bwd", (*parts, heads, *norms, COS, SIN, POSITIONS, sizes, 0, [1, 2, 1, 1], 1.0, True, False)),
        ("cross_entropy_fwd", (logits, labels, 0, 30, -100)),
        ("cross_entropy_fwd", (logits.t().contiguous().t(), labels, 15, 45, -100)),
        ("cross_entropy_bwd_", (logits, labels, *statistics, 0, -100)),
        ("cross_entropy_bwd_", (logits[:, 1:], labels, statistics[0][:1].expand(5), *statistics[1:], 7, -100)),
    ]


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("number", range(len(_samples(torch.float32))))
def test_opcheck(number: int, dtype: torch.dtype) -> None:
    name, arguments = _samples(dtype)[number]
    # Autograd is not the operators' part: autograd functions call them.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.megatronish, name).default, arguments, test_utils=tests)


def _public(backend: str) -> dict[str, tuple[Callable[..., object], list[Tensor]]]:
    """Every public function of the fused operators, with inputs to differentiate by."""
    x, y, w, heads = _x(3, 5, 12), _x(3, 5, 12, seed=1), _x(12, seed=2), _x(2, 5, 4, 10)
    weights = [_x(10, seed=3) + 1, _x(10, seed=4) + 1]
    return {
        "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5, backend=backend), [x, w]),
        "add_rms_norm": (lambda x, y, w: add_rms_norm(x, y, w, 1e-5, backend=backend), [x, y, w]),
        "swiglu": (lambda x: swiglu(x, backend=backend), [x]),
        "rope": (lambda x: rope(x, COS, SIN, POSITIONS, backend=backend), [heads]),
        "rope_pairs": (lambda x: rope(x, COS, SIN, offset=3, interleaved=True, backend=backend), [heads]),
        "qk_norm_rope": (
            lambda x, w, v: qk_norm_rope(
                x * 1, w, v, COS, SIN, POSITIONS, heads=(1, 2, 1, 1), eps=1e-6, backend=backend
            ),
            [heads, *weights],
        ),
        "qk_norm_rope_pairs": (
            lambda x, w, v: qk_norm_rope(
                x * 1, w, v, COS, SIN, heads=(1, 2, 1, 1), eps=1e-6, offset=2, interleaved=True, backend=backend
            ),
            [heads, *weights],
        ),
        "rms_norm_of_a_sum": (lambda x, w: add_rms_norm(x * 1, None, w, 1e-5, backend=backend), [x, w]),
        "rope_qkv_": (lambda x: rope_qkv_(x * 1, 1, COS, SIN, POSITIONS, backend=backend), [heads]),
        "rope_qkv_pairs": (
            lambda x: rope_qkv_(x * 1, 1, COS, SIN, offset=2, interleaved=True, backend=backend),
            [heads],
        ),
    }


def _outputs(result: object) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@needs_cpu
@pytest.mark.parametrize("name", _public("fused"))
def test_gradcheck(name: str) -> None:
    function, inputs = _public("fused")[name]
    assert torch.autograd.gradcheck(function, [x.double().requires_grad_() for x in inputs])


@needs_cpu
@pytest.mark.parametrize("name", _public("fused"))
def test_backends_agree(name: str) -> None:
    results = []
    for which in ("reference", "fused"):
        function, inputs = _public(which)[name]
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = _outputs(function(*leaves))
        grads = torch.autograd.grad(outputs, leaves, [_x(*y.shape, seed=9) for y in outputs])
        results.append([*outputs, *grads])
    for ours, theirs in zip(results[1], results[0], strict=True):
        # fp32 sums of 12 numbers in another order, and exp of another library.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * max(1.0, theirs.abs().max().item()))


@needs_cpu
@pytest.mark.parametrize("name", _public("fused"))
def test_full_graph_compiles_to_the_same_bits(name: str) -> None:
    function, inputs = _public("fused")[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = _outputs(call(*leaves))
        grads = torch.autograd.grad(
            outputs, leaves, [torch.ones_like(y).expand_as(y) for y in outputs], materialize_grads=True
        )
        results.append([*outputs, *grads])
    assert all(torch.equal(eager, other) for eager, other in zip(*results, strict=True))


@needs_cpu
@pytest.mark.parametrize("name", _public("fused"))
def test_second_derivatives_are_refused(name: str) -> None:
    function, inputs = _public("fused")[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    total = sum(y.square().sum() for y in _outputs(function(*leaves)))
    (first, *_) = torch.autograd.grad(total, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@needs_cpu
def test_a_kept_projection_is_not_rotated_unnoticed() -> None:
    leaf = _x(2, 5, 4, 10).requires_grad_()
    packed = leaf.exp()  # keeps its output for the backward pass
    q, _, _ = rope_qkv_(packed, 1, COS, SIN, backend="fused")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


X, W = _x(2, 5, 4, 10), torch.ones(10)
LOGITS, LABELS = _x(3, 8), torch.zeros(3).long()
REFUSED = [
    (lambda: rms_norm(X.int(), torch.ones(10), 1e-5), "rms_norm: x is torch.int32, expected float32, bfloat16"),
    (lambda: rms_norm(X, torch.ones(9), 1e-5), r"rms_norm: weight has shape \(9,\), expected \(10,\)"),
    (
        lambda: rms_norm(X, torch.ones(10).half(), 1e-5),
        "weight is torch.float16, expected torch.float32, the dtype of x",
    ),
    (lambda: rms_norm(X, torch.ones(10, device="meta"), 1e-5), "weight is on meta, expected cpu, the device of x"),
    (
        lambda: add_rms_norm(X, X[:1], torch.ones(10), 1e-5),
        r"residual is torch.float32 of shape \(1, 5, 4, 10\), expected",
    ),
    (lambda: add_rms_norm(X, X.half(), torch.ones(10), 1e-5), "residual is torch.float16 of shape"),
    (lambda: swiglu(X[..., :7]), "swiglu: .* must be even; got 7"),
    (lambda: swiglu(X.bool()), "swiglu: gate_up is torch.bool, expected float32"),
    (lambda: rope(X[0], COS, SIN), r"rope: x has shape \(5, 4, 10\), expected \[batch, seq, heads, head_dim\]"),
    (lambda: rope(X[..., :6], COS, SIN), "rope: .* rotary at most head_dim 6"),
    (lambda: rope(X, COS.bfloat16(), SIN), "rope: cos is torch.bfloat16 and sin torch.float32, expected torch.float32"),
    (lambda: rope(X, COS, SIN, offset=-1), "rope: positions -1 to 3 do not fit tables of 40"),
    (
        lambda: qk_norm_rope(X, W, W, COS, SIN, heads=(1, 2, 2, 2), eps=1e-6),
        r"qk_norm_rope: qkv has 4 heads, expected groups \* \(q \+ k \+ v\) of heads \(1, 2, 2, 2\)",
    ),
    (
        lambda: qk_norm_rope(X, W, W[:9], COS, SIN, heads=(1, 2, 1, 1), eps=1e-6),
        r"k_weight is torch.float32 of shape \(9,\), expected torch.float32 or torch.float32 of shape \(10,\)",
    ),
    (
        lambda: qk_norm_rope(X.half(), W, W.half(), COS, SIN, heads=(1, 2, 1, 1), eps=1e-6),
        "k_weight is torch.float16, expected torch.float32, as q_weight",
    ),
    (
        lambda: qk_norm_rope(X, W, W, COS, SIN, heads=(1, 2, 1, 1), eps=1e-6, offset=36),
        "qk_norm_rope: positions 36 to 40 do not fit tables of 40",
    ),
    (lambda: rope_qkv_(X, 3, COS, SIN), "rope_qkv_: qkv has 4 heads, expected at least twice the 3 kv_heads"),
    (lambda: rope_qkv_(X.clone().requires_grad_(), 1, COS, SIN), "rope_qkv_: qkv is a leaf that requires a gradient"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_functions_refuse(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


OP_REFUSED = [
    ("rms_norm_fwd", (X.int(), None, 1e-5, 0.0), "rms_norm_fwd: x: expected float32, bfloat16.* got int32"),
    ("rms_norm_fwd", (X.sum(), None, 1e-5, 0.0), "rms_norm_fwd: x: expected at least one dim, got a scalar"),
    ("rms_norm_fwd", (X, torch.ones(9), 1e-5, 0.0), r"rms_norm_fwd: w: expected shape \[10\], got \[9\]"),
    (
        "rms_norm_fwd",
        (X, torch.ones(10).half(), 1e-5, 0.0),
        "w: expected float32 or the dtype of x, float32, got float16",
    ),
    ("add_rms_norm_fwd", (X, X[:1], None, 1e-5, 0.0), r"residual: expected shape \[2, 5, 4, 10\], got \[1, 5, 4, 10\]"),
    ("rms_norm_bwd", (X, None, X, None, X, 0.0, False), r"rstd: expected shape \[2, 5, 4, 1\], got \[2, 5, 4, 10\]"),
    ("rms_norm_bwd", (X.half(), None, X, None, X, 0.0, False), "rms_norm_bwd: dy: expected float32, got float16"),
    ("swiglu_fwd", (X[..., :7],), "swiglu_fwd: gate_up: expected an even last dim, gate and up, got 7"),
    ("swiglu_bwd", (X, X, False), r"swiglu_bwd: dy: expected shape \[2, 5, 4, 5\], got \[2, 5, 4, 10\]"),
    ("rope", (X, COS, SIN[:9], None, 0, False, False), r"rope: sin: expected shape \[40, 4\], got \[9, 4\]"),
    ("rope", (X, COS, SIN, None, 36, False, False), "rope: offset: expected .* the tables' 40 rows, got 36"),
    ("rope", (X, COS, SIN, POSITIONS.long(), 0, False, False), "rope: positions: expected int32, got int64"),
    ("rope", (X, COS, SIN, POSITIONS + 1, 0, False, False), "positions: expected numbers from 0 to 39, got 40"),
    ("rope", (X, COS, SIN, POSITIONS - 1, 0, False, False), "positions: expected numbers from 0 to 39, got -1"),
    ("rope", (X, COS.half(), SIN.half(), None, 0, False, False), "rope: cos: expected float32, got float16"),
    ("rope_qkv_", (X, COS, SIN, None, 1, 2, 1, 2, False, False), "qkv: expected groups .* = 5 heads, got 4"),
    (
        "qk_norm_rope_fwd",
        (X, W, W, COS, SIN, None, 0, [1, 2, 1, 2], 1e-6, 0.0, False),
        r"qk_norm_rope_fwd: qkv: expected groups \* \(q \+ k \+ v heads\) = 5 heads, got 4",
    ),
    (
        "qk_norm_rope_fwd",
        (X, W, W[:9], COS, SIN, None, 0, [1, 2, 1, 1], 1e-6, 0.0, False),
        r"k_weight: expected shape \[10\]",
    ),
    (
        "qk_norm_rope_bwd",
        (X[:, :, :2], X[:, :, :1], X, X, W, W, COS, SIN, None, X, 0, [1, 2, 1, 1], 0.0, False, True),
        r"qk_norm_rope_bwd: dv: expected shape \[2, 5, 1, 10\], got \[2, 5, 4, 10\]",
    ),
    ("cross_entropy_fwd", (LOGITS, LABELS.int(), 0, 8, -100), "cross_entropy_fwd: target: expected int64, got int32"),
    (
        "cross_entropy_fwd",
        (LOGITS, LABELS + 8, 0, 8, -100),
        "target: expected tokens from 0 to 7, or -100, got 8 in row 0",
    ),
    (
        "cross_entropy_fwd",
        (LOGITS, LABELS, 1, 8, -100),
        "vocab_start: expected a shard of 8 columns within .* 8, got 1",
    ),
    ("cross_entropy_bwd_", (LOGITS.t(), LABELS[:1].expand(8), *[LOGITS[0]] * 3, 0, -100), "logits: expected strides"),
    (
        "cross_entropy_bwd_",
        (LOGITS, LABELS, *[LOGITS[:, 0].double()] * 3, 0, -100),
        "grad: expected float32, got float64",
    ),
    (
        "rope_qkv_bwd",
        (X, X[:, 1:], X, COS, SIN, None, 1, False),
        r"dk: expected shape \[2, 5, 4, 10\], got \[2, 4, 4, 10\]",
    ),
    (
        "rope_qkv_bwd",
        (X, X, X[:, :, :3], COS, SIN, None, 2, False),
        "groups: expected a divisor of the q, k and v heads",
    ),
    ("rope_qkv_bwd", (X, X, X.double(), COS, SIN, None, 1, False), "dv: expected"),
    ("rope_qkv_", (X.mT, COS[:, :2], SIN[:, :2], None, 1, 8, 1, 1, False, False), r"rope_qkv_: qkv: expected strides"),
]


@needs_cpu
@pytest.mark.parametrize(("name", "arguments", "message"), OP_REFUSED)
def test_operators_refuse(name: str, arguments: tuple[object, ...], message: str) -> None:
    before = X.clone()
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.megatronish, name)(*arguments)
    assert torch.equal(X, before)


def _free_gib() -> float:
    return psutil.virtual_memory().available / 2**30


@needs_cpu
@pytest.mark.slow
@pytest.mark.skipif(_free_gib() < 6, reason="needs 6 GiB of free memory")
def test_offsets_beyond_32_bits() -> None:
    """Rows that begin after element 2^31: of tensors whose other pages are never touched, or are read as zeros."""
    far = torch.zeros(2**31 + 64, dtype=torch.bfloat16)
    heads = torch.as_strided(far, (2, 1, 1, 64), (2**31, 64, 64, 1))
    heads.copy_(_x(2, 1, 1, 64))
    near = heads.contiguous()
    assert torch.equal(rope(heads, COS, SIN, backend="fused"), rope(near, COS, SIN, backend="fused"))
    torch.ops.megatronish.rope_qkv_(heads, COS, SIN, POSITIONS[:, :1], 1, 1, 0, 0, False, False)
    torch.ops.megatronish.rope_qkv_(near, COS, SIN, POSITIONS[:, :1], 1, 1, 0, 0, False, False)
    assert torch.equal(heads, near)
    rows = far[64:].view(-1, 4096)
    rows[-1] = _x(4096)
    y, rstd = torch.ops.megatronish.rms_norm_fwd(rows, None, 1e-5, 0.0)
    assert torch.equal(y[-1], rms_norm(rows[-1], torch.ones(4096), 1e-5, backend="fused"))
    assert rstd.shape == (2**19, 1) and not y[:-1].any()
    del y
    y = swiglu(rows, backend="fused")
    assert torch.equal(y[-1], swiglu(rows[-1], backend="fused"))


SMALL = ModelConfig(
    vocab_size=31, num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16, seq_length=8
)


def test_what_a_request_becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "EXTENSION", Extension(True, False, "", "this torch has no CUDA"))
    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: False)
    assert dispatch.resolve_ops("auto") == dispatch.resolve_ops("fused") == "fused"
    assert dispatch.resolve_ops("reference") == "reference"
    with pytest.raises(ValueError, match="unknown ops backend 'fast': choose auto, fused, reference,"):
        dispatch.resolve_ops("fast")
    monkeypatch.setattr(extension, "EXTENSION", Extension(False, False, "no compiler", "no compiler"))
    with pytest.warns(RuntimeWarning, match="run as plain torch operations, several times slower: no compiler"):
        assert dispatch.resolve_ops("auto") == "reference"


def test_on_a_gpu_auto_does_not_select_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have not run on one yet: see `resolve_ops`."""
    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "EXTENSION", Extension(True, True, "", ""))
    assert dispatch.resolve_ops("auto") == "reference"
    assert dispatch.resolve_ops("fused") == "fused"
    monkeypatch.setattr(extension, "EXTENSION", Extension(True, False, "", "this torch has no CUDA"))
    with pytest.raises(ValueError, match="'fused' was asked for, but this torch has no CUDA"):
        dispatch.resolve_ops("fused")


def test_without_a_build_the_model_runs_and_warns_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = extension._load_library(Path("/nowhere/_C.so"))
    assert "_C.so is not built: run `python setup.py build_ext --inplace`" in problem
    monkeypatch.setattr(extension, "EXTENSION", Extension(False, False, problem, problem))
    with pytest.warns(RuntimeWarning, match="plain torch operations, several times slower: _C.so is not built"):
        model = Transformer(SMALL)
    assert model.backends.ops == "reference"
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(model(tokens), Transformer(SMALL, KernelConfig(ops="reference"))(tokens))
    with pytest.raises(
        ValueError, match="'fused' was asked for, but _C.so is not built: run `python setup.py build_ext"
    ):
        Transformer(SMALL, KernelConfig(ops="fused"))


def test_a_torn_library_is_reported(tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"\x7fELF torn")
    assert "_C.so does not load (" in extension._load_library(tmp_path / "_C.so")


def _build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` on a copy of the sources."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "megatronish").mkdir()
    shutil.copy(ROOT / "megatronish/__init__.py", tmp_path / "megatronish")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **environment})


def test_a_build_without_a_compiler_is_no_failure(tmp_path: Path) -> None:
    result = _build(tmp_path, CXX="/nowhere/c++", MEGATRONISH_CUDA="off")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("megatronish: ")]
    assert line.startswith(
        "megatronish: no CPU kernels: CXX=/nowhere/c++ is not there -- WARNING: RMSNorm, SwiGLU and RoPE run as plain torch, "
        "several times slower; no CUDA kernels: MEGATRONISH_CUDA=off ("
    )
    assert not list((tmp_path / "megatronish").glob("*.so"))


def test_a_build_that_must_have_cuda_fails_without_it(tmp_path: Path) -> None:
    result = _build(tmp_path, CXX="/nowhere/c++", MEGATRONISH_CUDA="on")
    assert result.returncode != 0
    assert "megatronish: CUDA kernels: MEGATRONISH_CUDA=on, but CXX=/nowhere/c++ is not there" in result.stderr
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": "/nowhere/c++", "MEGATRONISH_CUDA": "yes"},
    )
    assert result.returncode != 0 and "MEGATRONISH_CUDA=yes: choose auto, on or off" in result.stderr


@needs_cpu
def test_the_library_uses_the_stable_abi_only() -> None:
    """A symbol of libtorch in C++ would tie the binary to one version of torch; the C functions are the promise."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    library = Path(extension.__file__).resolve().parents[1] / "_C.so"
    undefined = subprocess.run([nm, "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    names = [line.split()[-1].split("@")[0] for line in undefined.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if "c10" in name or "N2at" in name or "NK2at" in name or "N5torch" in name]
