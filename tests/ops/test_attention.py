"""Every attention backend against a row-by-row softmax, forward and backward."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatronish.ops.attention import attention
from megatronish.ops.attention_mask import attention_mask, document_ids


def _row_by_row(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    """The definition, one query and head at a time, in float64."""
    b, queries, heads, d = q.shape
    keys, groups = k.shape[1], heads // k.shape[2]
    out = torch.empty_like(q, dtype=torch.float64)
    starts = [0] if cu_seqlens is None else cu_seqlens.tolist()
    for row in range(b):
        for i in range(queries):
            last = keys - queries + i
            first = 0 if window is None else max(0, last - window + 1)
            if cu_seqlens is not None:
                first = max(first, max(s for s in starts if s <= row * queries + i) - row * queries)
            for head in range(heads):
                read = slice(first, last + 1)
                scores = k[row, read, head // groups].double() @ q[row, i, head].double() / d**0.5
                out[row, i, head] = scores.softmax(0) @ v[row, read, head // groups].double()
    return out


@settings(max_examples=60, deadline=None)
@given(
    backend=st.sampled_from(["sdpa", "reference"]),
    b=st.integers(1, 3),
    keys=st.integers(1, 13),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    window=st.none() | st.integers(1, 15),
    documents=st.booleans(),
    data=st.data(),
)
def test_equals_the_definition(backend, b, keys, kv_heads, groups, window, documents, data) -> None:  # type: ignore[no-untyped-def]
    queries = keys if documents else data.draw(st.integers(1, keys), label="queries")
    cu_seqlens = None
    if documents:
        cuts = data.draw(st.sets(st.integers(1, b * keys)), label="cuts")
        cu_seqlens = torch.tensor(sorted({0, *cuts, *range(0, b * keys + 1, keys)}), dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(b, queries, kv_heads * groups, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(b, keys, kv_heads, 8, generator=generator, requires_grad=True) for _ in range(2))
    out = attention(q, k, v, backend=backend, window=window, cu_seqlens=cu_seqlens)
    expected = _row_by_row(q, k, v, window, cu_seqlens)
    # fp32 rounds at 6e-8; sums of up to 13 terms of size 1, and as many again in the backward pass.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    weight = torch.randn(out.shape, generator=generator)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-5)


def test_a_mask_made_before_is_used_as_it_is() -> None:
    q = torch.randn(1, 6, 2, 8)
    mask = attention_mask(1, 6, 6, window=2, device=q.device)
    given_mask = attention(q, q, q, backend="sdpa", window=2, mask=mask)
    assert torch.equal(given_mask, attention(q, q, q, backend="sdpa", window=2))
    assert not torch.allclose(given_mask, attention(q, q, q, backend="sdpa"))


def test_scale() -> None:
    q = torch.randn(1, 6, 2, 16)
    for backend in ("sdpa", "reference"):
        torch.testing.assert_close(
            attention(q, q, q, backend=backend, scale=0.5),
            attention(q * 2, q, q, backend=backend),  # the default is 1 / sqrt(16)
        )


def test_document_ids_allow_empty_documents() -> None:
    assert document_ids(torch.tensor([0, 2, 2, 5, 5]), 5).tolist() == [0, 0, 2, 2, 2]


def test_messages() -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 4, 8)
    with pytest.raises(ValueError, match="a multiple of k's 4 heads"):
        attention(q, k, k, backend="sdpa")
    with pytest.raises(ValueError, match="at most its 3 tokens"):
        attention(q, k[:, :3, :3], k[:, :3, :3], backend="sdpa")
    with pytest.raises(ValueError, match=r"k \(2, 4, 4, 8\) and v \(2, 4, 3, 8\)"):
        attention(q, k, k[:, :, :3], backend="sdpa")
    with pytest.raises(
        ValueError, match="takes fp16 and bf16 tensors on a GPU, got torch.float32 on cpu: train in bf16"
    ):
        attention(q, q, q, backend="flash2")
    with pytest.raises(ValueError, match="5 keys: packed documents cannot follow a key/value cache"):
        attention_mask(1, 3, 5, cu_seqlens=torch.tensor([0, 3]), device=torch.device("cpu"))


class _OnGPU(torch.Tensor):
    """A CPU tensor that claims to be on a GPU, to inspect the call into flash-attn without one."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
def test_what_flash_attn_is_called_with(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments only, as flash-attn 2 and 3 document them; tests/gpu compares results where flash-attn is."""
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def record(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append((args, kwargs))
        return args[0]

    module = types.ModuleType(name)
    module.flash_attn_func = module.flash_attn_varlen_func = record  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    q = torch.randn(2, 4, 2, 16, dtype=torch.bfloat16).as_subclass(_OnGPU)
    version, dropout = ("flash2", {"dropout_p": 0.0}) if name == "flash_attn" else ("flash3", {})

    attention(q, q, q, backend=f"{version}_or_sdpa", window=3)
    args, kwargs = calls.pop()
    assert [a.shape for a in args] == [q.shape] * 3
    assert kwargs == {"softmax_scale": 0.25, "causal": True, "window_size": (2, 0), **dropout}

    cu_seqlens = torch.tensor([0, 4, 6, 8], dtype=torch.int32)
    attention(q, q, q, backend=version, cu_seqlens=cu_seqlens, max_seqlen=4, scale=0.5)
    args, kwargs = calls.pop()
    assert [a.shape for a in args[:3]] == [(8, 2, 16)] * 3
    assert args[3] is cu_seqlens and args[4] is cu_seqlens and args[5:] == (4, 4)
    assert kwargs == {"softmax_scale": 0.5, "causal": True, "window_size": (-1, -1), **dropout}
    if name == "flash_attn_interface":
        with pytest.raises(ValueError, match="flash-attn 3 has no dropout"):
            attention(q, q, q, backend="flash3", dropout_p=0.1)
