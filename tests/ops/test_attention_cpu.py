"""The CPU attention kernel at every instruction-set level: error against float64, masks, shapes, extremes, refusals.

Bar: twice the error of torch's SDPA in the same dtype, against float64 of the same rounded inputs; both round probabilities
to the dtype and sum in fp32. In fp32 a floor of 4e-7 besides, a few roundings of 6e-8, where SDPA is lucky.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatronish.ops import attention_cpu
from megatronish.ops.attention import attention
from megatronish.ops.attention_mask import attention_mask
from megatronish.ops.extension import EXTENSION

pytestmark = pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem or "built")
FLOOR = {torch.float32: 4e-7, torch.bfloat16: 0.0, torch.float16: 0.0}
DTYPES = list(FLOOR)
# batch, tokens, query heads, key/value heads, head_dim: tokens around the blocks of 64, heads that share keys.
SHAPES = [(2, 64, 2, 2, 32), (1, 65, 4, 2, 64), (2, 127, 6, 2, 32), (1, 200, 3, 1, 96), (1, 257, 2, 2, 128)]


def _packed(b: int, s: int, h: int, g: int, d: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(b, s, h + 2 * g, d, generator=torch.Generator().manual_seed(s)).to(dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def _kernel(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float | None = None) -> Tensor:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    result: Tensor = attention_cpu.FusedCausalAttention.apply(q, k, v, first, scale)
    return result


def _run(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: Tensor, heads: tuple[int, int, int], grad: Tensor
) -> list[Tensor]:
    """The output and the gradients of q, k and v, which are views of one packed tensor."""
    qkv = qkv.detach().clone().requires_grad_()
    out = function(*qkv.split(heads, dim=2))
    (dqkv,) = torch.autograd.grad(out, qkv, grad.to(qkv.dtype))
    return [out.detach(), *dqkv.split(heads, dim=2)]


def _error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["causal", "window", "documents", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_within_twice_that_of_sdpa(
    level: str,
    shape: tuple[int, int, int, int, int],
    form: str,
    dtype: torch.dtype,
) -> None:
    b, s, h, g, d = shape
    window = 40 if form in ("window", "both") else None
    cu_seqlens = None
    if form in ("documents", "both"):  # short ones, an empty one, and some that span blocks
        cuts = {row * s + at for row in range(b) for at in (0, 1, 13, s // 2 + row, s - 1)}
        cu_seqlens = torch.tensor(sorted([*cuts, 13, b * s]), dtype=torch.int32)
    mask = attention_mask(b, s, s, window=window, cu_seqlens=cu_seqlens, device=torch.device("cpu"))
    first = attention_cpu.first_keys(b, s, window, cu_seqlens)
    assert (first is None) == (form == "causal")
    qkv, heads = _packed(*shape, dtype), (h, g, g)
    grad = torch.randn(b, s, h, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = _run(lambda q, k, v: _sdpa(q, k, v, mask), qkv.double(), heads, grad)
    sdpa = _run(lambda q, k, v: _sdpa(q, k, v, mask), qkv, heads, grad)
    ours = _run(lambda q, k, v: _kernel(q, k, v, first), qkv, heads, grad)
    for name, mine, theirs, right in zip(("out", "dq", "dk", "dv"), ours, sdpa, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == right.shape
        assert _error(mine, right) < max(2 * _error(theirs, right), FLOOR[dtype]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_and_non_finite_values(level: str, dtype: torch.dtype) -> None:
    q, k, v = (_packed(1, 130, 1, 0, 32, dtype) * factor for factor in (90, 90, 1))
    scores = (q[0, :, 0].double() @ k[0, :, 0].double().T * 32**-0.5).masked_fill(
        ~torch.ones(130, 130).tril().bool(), -1e9
    )
    top = scores.topk(2).values
    clear = top[:, 0] - top[:, 1] > 30  # e^-30: nothing of the second key is left
    assert clear[1:].float().mean() > 0.9
    out = _kernel(q, k, v, None)
    torch.testing.assert_close(out[0, clear, 0], v[0, scores.argmax(1)[clear], 0], rtol=1e-6, atol=0)

    v[0, 70, 0, 3] = float("nan")
    out = _kernel(q * 0, k, v, None)  # every query from 70 on reads it; in its block of 64 a weight of 0 is NaN too
    assert out[0, :64].isfinite().all() and out[0, 70:, 0, 3].isnan().all() and out[0, 70:, 0, 4].isfinite().all()
    k[0, 100, 0, 0] = float("inf")
    out = _kernel(q.abs() + 1, k, v * 0 + 1, None)
    assert out[0, :64].isfinite().all() and out[0, 100:].isnan().all()


def test_bits_do_not_depend_on_threads_or_on_the_run() -> None:
    qkv, heads = _packed(2, 150, 6, 3, 32, torch.bfloat16), (6, 3, 3)
    grad = torch.randn(1, 1, 1, 32).expand(2, 150, 6, 32)  # stride 0: as from a sum
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(_run(lambda q, k, v: _kernel(q, k, v, None), qkv, heads, grad))
    torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_nothing_to_do() -> None:
    q = torch.randn(0, 64, 2, 32)
    assert _kernel(q, q, q, None).shape == (0, 64, 2, 32)
    q = torch.randn(2, 0, 2, 32)
    assert _kernel(q, q, q, None).shape == (2, 0, 2, 32)


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="SDPA is faster on this CPU")
def test_the_public_function_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same numbers with a mask made before, which the kernel has no use for."""
    q = _packed(2, 64, 2, 0, 32, torch.float32)
    assert attention_cpu.takes(q, q, 0.0, None)
    assert not attention_cpu.takes(q[:, :63], q[:, :63], 0.0, None)  # less than a block
    assert not attention_cpu.takes(q, torch.cat((q, q), 1), 0.0, None)  # with a cache
    assert not attention_cpu.takes(q, q, 0.1, None)
    assert not attention_cpu.takes(q, q, 0.0, -1.0)
    assert not attention_cpu.takes(q[..., :20], q[..., :20], 0.0, None)
    assert not attention_cpu.takes(q.double(), q.double(), 0.0, None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert not attention_cpu.takes(q, q, 0.0, None)  # 4 pairs of a row and a head
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not attention_cpu.takes(q, q, 0.0, None)
    monkeypatch.undo()

    mask = attention_mask(2, 64, 64, window=7, device=q.device)
    found = attention(q, q, q, backend="fused_or_sdpa", window=7, mask=mask)
    assert torch.equal(found, _kernel(q, q, q, attention_cpu.first_keys(2, 64, 7, None)))
    torch.testing.assert_close(found, _sdpa(q, q, q, mask), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_as_torch_sees_them(dtype: torch.dtype) -> None:
    q, k = _packed(1, 70, 4, 0, 32, dtype), _packed(1, 70, 2, 0, 32, dtype)
    first = attention_cpu.first_keys(1, 70, 9, None)
    fwd, bwd = torch.ops.megatronish.causal_attention_fwd, torch.ops.megatronish.causal_attention_bwd
    out, log2_sum = fwd(q, k, k, first, 0.2)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments in ((fwd, (q, k, k, first, 0.2)), (bwd, (q, q, k, k, out, log2_sum, first, 0.2))):
        torch.library.opcheck(operator.default, arguments, test_utils=tests)


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="SDPA is faster on this CPU")
def test_compiled_without_a_break() -> None:
    qkv, heads = _packed(1, 80, 4, 2, 32, torch.float32), (4, 2, 2)
    grad = torch.randn(1, 80, 4, 32)
    cu_seqlens = torch.tensor([0, 30, 80], dtype=torch.int32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, backend="fused_or_sdpa", cu_seqlens=cu_seqlens)

    assert attention_cpu.takes(*qkv.split(heads, dim=2)[:2], 0.0, None)
    eager = _run(attend, qkv, heads, grad)
    compiled = _run(torch.compile(attend, fullgraph=True), qkv, heads, grad)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_refusals() -> None:
    fwd = torch.ops.megatronish.causal_attention_fwd
    q = torch.randn(1, 64, 4, 32)
    for arguments, message in (
        ((q[..., :20], q[..., :20], q[..., :20], None, 1.0), "q: expected a head_dim that is a multiple of 32, got 20"),
        ((q, q[:, :, :3], q[:, :, :3], None, 1.0), "q: expected a multiple of k's 3 heads, got 4"),
        ((q, q, q[:, :10], None, 1.0), r"v: expected \[1, 64, 4, 32\], got \[1, 10, 4, 32\]"),
        ((q, q.bfloat16(), q, None, 1.0), "k: expected the dtype and device of q, got another"),
        ((q.double(), q, q, None, 1.0), "q: expected float32, bfloat16 or float16, got float64"),
        ((q, q, q, None, 0.0), "scale: expected a positive number, got 0"),
        ((q[0], q, q, None, 1.0), r"expected \[batch, seq, heads, head_dim\], got \[64, 4, 32\]"),
        ((q, q, q, torch.zeros(1, 60, dtype=torch.int32), 1.0), r"first_key: expected contiguous int32 \[batch, seq\]"),
        (
            (q, q, q, torch.full((1, 64), 3, dtype=torch.int32), 1.0),
            "first_key: expected 0 to the query's own position",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            fwd(*arguments)
