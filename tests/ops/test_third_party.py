"""Liger and Apex as backends: what is refused, what is called with which arguments, what falls back to plain torch.

The packages here are stand-ins on disk with the signatures of liger-kernel 0.8.5 and NVIDIA Apex, for neither runs without a
GPU: they note how they are called and compute the same function in plain torch, in place where the real ones do.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatronish.config.model import KernelConfig
from megatronish.config.presets import resolve_model
from megatronish.model.transformer import Transformer
from megatronish.ops import dispatch, reference, third_party
from megatronish.ops.rms_norm import add_rms_norm, rms_norm
from megatronish.ops.rope import rope, rope_qkv_
from megatronish.ops.swiglu import swiglu

LIGER = {
    "liger_kernel/__init__.py": "",
    "liger_kernel/ops/__init__.py": "calls = []\n",
    "liger_kernel/ops/rms_norm.py": """
from liger_kernel.ops import calls
from megatronish.ops import reference
class LigerRMSNormFunction:
    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        calls.append(("rms_norm", eps, offset, casting_mode, in_place))
        return reference.rms_norm(X, W, eps)
""",
    "liger_kernel/ops/fused_add_rms_norm.py": """
from liger_kernel.ops import calls
from megatronish.ops import reference
class LigerFusedAddRMSNormFunction:
    @staticmethod
    def apply(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
        calls.append(("add_rms_norm", eps, offset, casting_mode, in_place))
        return reference.rms_norm(X + R, W, eps), X + R
""",
    "liger_kernel/ops/swiglu.py": """
from liger_kernel.ops import calls
from megatronish.ops import reference
class LigerFusedGateUpSiLUMulFunction:
    @staticmethod
    def apply(y, in_place=False):
        assert y.ndim == 2  # the real one returns a gradient of two dims
        calls.append(("swiglu", in_place))
        return reference.swiglu(y)
""",
    "liger_kernel/ops/rope.py": """
import torch
from liger_kernel.ops import calls
def turn(x, cos, sin, rotary_dim):  # in place where the memory is contiguous, as the Triton kernel
    x = x.transpose(1, 2).contiguous()
    half = rotary_dim // 2
    assert cos.shape == sin.shape and cos.shape[0] in (1, x.shape[0]) and cos.shape[1:] == (x.shape[1], half)
    a, b = x[..., :half].clone(), x[..., half:rotary_dim].clone()
    c, s = cos[:, :, None], sin[:, :, None]
    x[..., :half], x[..., half:rotary_dim] = a * c - b * s, b * c + a * s
    return x.transpose(1, 2)
def rope_forward(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    calls.append(("rope", tuple(q.shape), tuple(k.shape)))
    return turn(q, cos, sin, rotary_dim), turn(k, cos, sin, rotary_dim), cos, sin
def rope_backward(dq, dk, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    return turn(dq, cos, -sin, rotary_dim), turn(dk, cos, -sin, rotary_dim)
""",
}
APEX = {
    "apex/__init__.py": "calls = []\n",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": """
from apex import calls
from megatronish.ops import reference
def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    calls.append(("rms_norm", tuple(normalized_shape), eps, memory_efficient))
    return reference.rms_norm(input, weight, eps)
""",
    "fused_layer_norm_cuda.py": "",
}
APEX_ROPE = {
    "apex/transformer/__init__.py": "",
    "apex/transformer/functional/__init__.py": "",
    "apex/transformer/functional/fused_rope.py": """
import torch
from apex import calls
def fused_apply_rotary_pos_emb_cached(t, cos_, sin_, transpose_output_memory=False):
    s, b, h, d = t.shape
    rotary = cos_.shape[-1]
    assert cos_.shape == sin_.shape == (s, 1, 1, rotary) and cos_.dtype == torch.float32
    calls.append(("rope", tuple(t.shape), transpose_output_memory))
    x, rest = t[..., :rotary], t[..., rotary:]
    first, second = x.chunk(2, -1)
    return torch.cat((x * cos_ + torch.cat((-second, first), -1) * sin_, rest), -1)
""",
    "fused_rotary_positional_embedding.py": "",
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A function that puts packages on the path of a machine that has a GPU, as far as the code asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(third_party, "_on_gpu", lambda x: True)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("liger_kernel", "apex", "fused_layer_norm_cuda", "fused_rotary_positional_embedding")

    def forget() -> None:
        for name in [m for m in sys.modules if m.split(".")[0] in names]:
            del sys.modules[name]

    def put(*packages: dict[str, str]) -> None:
        forget()
        for name, text in {k: v for package in packages for k, v in package.items()}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        importlib.invalidate_caches()

    yield put
    forget()


def _calls(module: str) -> list[tuple[object, ...]]:
    found: ModuleType = sys.modules[module]
    calls = list(found.calls)  # type: ignore[attr-defined]
    found.calls.clear()  # type: ignore[attr-defined]
    return calls


def _tables(positions: int = 20, half: int = 4) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(float(positions)), 0.5 ** torch.arange(half))
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("backend", ["liger", "apex"])
def test_without_a_gpu_both_are_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=f"ops backend '{backend}' was asked for, but there is no CUDA GPU; or set ops"
    ):
        Transformer(resolve_model({"preset": "tiny"}), KernelConfig(ops=backend), seed=None)


def test_a_missing_package_is_reported_with_its_fix(install, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    install()
    monkeypatch.setattr(third_party.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="liger-kernel is not installed: `pip install -U liger-kernel`; or set ops"):
        dispatch.resolve_ops("liger")
    with pytest.raises(ValueError, match="NVIDIA Apex is not installed: build it from https://github.com/NVIDIA/apex"):
        dispatch.resolve_ops("apex")
    with pytest.raises(ValueError, match="choose auto, fused, reference, liger or apex"):
        dispatch.resolve_ops("lgier")


def test_an_older_liger_is_refused(install) -> None:  # type: ignore[no-untyped-def]
    install({**LIGER, "liger_kernel/ops/swiglu.py": "class LigerSiLUMulFunction: pass\n"})
    with pytest.raises(ValueError, match=r"liger-kernel .* is too old \(ops.swiglu lacks"):
        dispatch.resolve_ops("liger")
    install({**LIGER, "liger_kernel/ops/rope.py": "def rope_forward(q, k, cos, sin): pass\n"})
    with pytest.raises(ValueError, match=r"is too old \(ops.rope lacks"):
        dispatch.resolve_ops("liger")
    install({**LIGER, "liger_kernel/ops/rms_norm.py": "import no_such_triton\n"})
    with pytest.raises(ValueError, match="does not load .*no_such_triton.*pip install -U"):
        dispatch.resolve_ops("liger")


def test_the_apex_of_the_package_index_is_recognised_unimported(install) -> None:  # type: ignore[no-untyped-def]
    install({"apex/__init__.py": "raise SystemExit('a web stack starts')\n", "apex/lib/__init__.py": ""})
    with pytest.raises(ValueError, match="the installed `apex` is not NVIDIA's.*`pip uninstall apex`"):
        dispatch.resolve_ops("apex")


def test_apex_without_its_extensions_is_refused_or_used_without_rope(install, caplog) -> None:  # type: ignore[no-untyped-def]
    install({k: v for k, v in APEX.items() if k != "fused_layer_norm_cuda.py"})
    with pytest.raises(ValueError, match="without a working fused_layer_norm_cuda .*with its CUDA extensions"):
        dispatch.resolve_ops("apex")
    install(APEX)
    with caplog.at_level(logging.INFO):
        assert dispatch.resolve_ops("apex") == "apex_rms_norm"
    assert (
        "NVIDIA Apex for RMSNorm; plain torch for SwiGLU, GeGLU, RoPE (NVIDIA Apex is installed without" in caplog.text
    )
    install(APEX, APEX_ROPE)
    with caplog.at_level(logging.INFO):
        assert dispatch.resolve_ops("apex") == "apex"
    assert "RMSNorm and half-rotated RoPE without explicit positions; plain torch for" in caplog.text


def test_liger_is_called_so_that_nothing_of_the_caller_is_overwritten(install) -> None:  # type: ignore[no-untyped-def]
    install(LIGER)
    assert dispatch.resolve_ops("liger") == "liger"
    x, weight, gate_up = torch.randn(2, 3, 8), torch.randn(8), torch.randn(2, 3, 12, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, backend="liger"), reference.rms_norm(x, weight, 1e-5))
    y, total = add_rms_norm(x, x, weight, 1e-6, backend="liger")
    assert torch.equal(total, x + x)
    torch.testing.assert_close(y, reference.rms_norm(x + x, weight, 1e-6))
    torch.testing.assert_close(swiglu(gate_up, backend="liger"), reference.swiglu(gate_up))
    assert _calls("liger_kernel.ops") == [
        ("rms_norm", 1e-5, 0.0, "gemma", False),
        ("add_rms_norm", 1e-6, 0.0, "gemma", False),
        ("swiglu", False),
    ]


@pytest.mark.parametrize("where", [{"offset": 3}, {"positions": torch.tensor([[5, 0, 7], [1, 2, 19]])}], ids=str)
def test_liger_rope(install, where) -> None:  # type: ignore[no-untyped-def]
    install(LIGER)
    dispatch.resolve_ops("liger")
    cos, sin = _tables()
    x = torch.randn(2, 3, 6, 12, requires_grad=True)  # 8 of 12 channels are rotated
    before = x.detach().clone()
    y, exact = rope(x, cos, sin, **where, backend="liger"), reference.rope(x, cos, sin, **where)
    torch.testing.assert_close(y, exact)
    grad = torch.randn_like(y)
    kept = grad.clone()
    (dx,), (exact_dx,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(exact, x, kept)
    torch.testing.assert_close(dx, exact_dx)
    assert torch.equal(grad, kept) and torch.equal(x, before)
    q, k, v = rope_qkv_(x.clone(), 1, cos, sin, **where, backend="liger")
    torch.testing.assert_close(torch.cat((q, k), dim=2), exact[:, :, :5])
    assert torch.equal(v, x[:, :, 5:])
    # The pair of q and k goes into one call of the kernel; a single tensor has an empty partner of one head.
    assert _calls("liger_kernel.ops") == [
        ("rope", (2, 6, 3, 12), (2, 1, 3, 12)),
        ("rope", (2, 4, 3, 12), (2, 1, 3, 12)),
    ]


def test_apex_is_called_as_it_wants(install) -> None:  # type: ignore[no-untyped-def]
    install(APEX, APEX_ROPE)
    assert dispatch.resolve_ops("apex") == "apex"
    x, weight, (cos, sin) = torch.randn(2, 3, 8), torch.randn(8), _tables()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, backend="apex"), reference.rms_norm(x, weight, 1e-5))
    y, _ = add_rms_norm(x, x, weight, 1e-5, backend="apex_rms_norm")
    torch.testing.assert_close(y, reference.rms_norm(x + x, weight, 1e-5))
    heads = torch.randn(2, 3, 6, 12)
    torch.testing.assert_close(
        rope(heads, cos, sin, offset=3, backend="apex"), reference.rope(heads, cos, sin, offset=3)
    )
    assert _calls("apex") == [("rms_norm", (8,), 1e-5, False)] * 2 + [("rope", (3, 2, 6, 12), True)]


def test_what_they_do_not_take_is_computed_by_plain_torch(install, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    install(LIGER, APEX, APEX_ROPE)
    dispatch.resolve_ops("liger"), dispatch.resolve_ops("apex")
    cos, sin = _tables()
    heads, wide = torch.randn(2, 3, 6, 12), torch.randn(2, 3, 8, dtype=torch.float64)
    positions = torch.zeros(2, 3, dtype=torch.int32)
    for backend in ("liger", "apex"):
        y = rope(heads, cos, sin, interleaved=True, backend=backend)
        torch.testing.assert_close(y, reference.rope(heads, cos, sin, interleaved=True))
        assert rms_norm(wide, wide[0, 0], 1e-5, backend=backend).dtype == torch.float64
    rope(heads, cos, sin, positions, backend="apex")
    rope(heads, cos, sin, backend="apex_rms_norm")
    swiglu(heads, backend="apex")
    rms_norm(heads.bfloat16(), torch.ones(12), 1e-5, backend="apex")  # Apex would return fp32
    monkeypatch.undo()  # from here on tensors are on the CPU, as they are
    rms_norm(heads, torch.ones(12), 1e-5, backend="liger")
    assert _calls("liger_kernel.ops") == _calls("apex") == []
