"""The CPU kernels of decoding against float64: every instruction-set level, every format, any number of rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatronish.ops import reference
from megatronish.ops.cached_attention import cached_attention_
from megatronish.ops.extension import EXTENSION
from megatronish.ops.linear import FEW_ROWS, linear

pytestmark = pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem)
# A rounding of the result, and sums of up to 200 products in fp32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 192, 33), (2, 7, 5), (3, 64, 1), (7, 100, 66), (16, 48, 515), (64, 96, 130)]
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear_rows(level: str, dtype: torch.dtype, m: int, k: int, n: int, bias: bool) -> None:
    x, w = _draw(m, k, dtype=dtype), _draw(n, k, seed=1, dtype=dtype)
    b = _draw(n, seed=2, dtype=dtype) if bias else None
    y = torch.ops.megatronish.linear_rows(x, w, b)
    _close(y, F.linear(x.double(), w.double(), None if b is None else b.double()), dtype)
    for row in range(m):
        assert torch.equal(torch.ops.megatronish.linear_rows(x[row : row + 1], w, b)[0], y[row]), "rows do not mix"


def test_rows_do_not_mix_at_the_ends_of_bf16(level: str) -> None:
    """Results too small for a normal number, infinite, or none at all have the same bits in a tile of four rows and alone."""
    x, w = _draw(8, 64, dtype=torch.bfloat16), _draw(12, 64, seed=1, dtype=torch.bfloat16)
    bias = torch.zeros(12, dtype=torch.bfloat16)
    x[0], x[0, 0], w[:4, 0], bias[:4] = 0.0, 2.0**-60, 1.5 * 2.0**-66, -1.25 * 2.0**-126
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    y = torch.ops.megatronish.linear_rows(x, w, bias)
    assert (y[0, :4] == 2.0**-128).all() and y[1].isinf().any() and y[2].isnan().all()
    for row in range(8):
        alone = torch.ops.megatronish.linear_rows(x[row : row + 1], w, bias)[0]
        assert torch.equal(alone.view(torch.int16), y[row].view(torch.int16))


def test_linear_takes_the_kernel_only_where_it_may() -> None:
    w = _draw(40, 32, dtype=torch.bfloat16)
    x = _draw(2, 8, 32, seed=1, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(linear(x, w), torch.ops.megatronish.linear_rows(x.view(16, 32), w, None).view(2, 8, 40))
        _close(linear(x[:, ::2], w), F.linear(x[:, ::2].double(), w.double()), torch.bfloat16)
        more = _draw(FEW_ROWS + 1, 32)
        assert torch.equal(linear(more, w.float()), F.linear(more, w.float()))
        assert torch.equal(linear(x.double(), w.double()), F.linear(x.double(), w.double()))
    assert linear(x.requires_grad_(), w).requires_grad


@pytest.mark.parametrize(("m", "k", "n"), [(1, 130, 9), (4, 64, 33), (7, 31, 4)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear_rows_int8(level: str, dtype: torch.dtype, m: int, k: int, n: int) -> None:
    x, b = _draw(m, k, dtype=dtype), _draw(n, seed=2, dtype=dtype)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    scales = _draw(n, seed=3).abs() / 100
    y = torch.ops.megatronish.linear_rows_int8(x, w, scales, b)
    _close(y, F.linear(x.double(), w.double() * scales.double()[:, None], b.double()), dtype)
    assert torch.equal(torch.ops.megatronish.linear_rows_int8(x[-1:], w, scales, b)[0], y[-1])


@pytest.mark.parametrize(("m", "groups", "group", "n"), [(1, 3, 32, 9), (5, 2, 64, 6), (2, 1, 128, 4)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear_rows_int4(level: str, dtype: torch.dtype, m: int, groups: int, group: int, n: int) -> None:
    k = groups * group
    x = _draw(m, k, dtype=dtype)
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(1))
    blocks = codes.view(n, k // 32, 2, 16)
    packed = (blocks[:, :, 0] | blocks[:, :, 1] << 4).to(torch.uint8).view(n, k // 2)
    ranges = _draw(n, groups, 2, seed=3, dtype=torch.bfloat16)
    y = torch.ops.megatronish.linear_rows_int4(x, packed, ranges, None)
    wide = ranges.double().repeat_interleave(group, 1)
    _close(y, F.linear(x.double(), codes.double() * wide[..., 0] + wide[..., 1]), dtype)
    assert torch.equal(torch.ops.megatronish.linear_rows_int4(x[-1:], packed, ranges, None)[0], y[-1])


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cached_attention(level: str, dtype: torch.dtype, new: int, window: int | None) -> None:
    """Rows of lengths 0, 9 and 22 in a cache that rolls where there is a window, in another order than the batch's."""
    heads, kv_heads, d, lengths, rows = 6, 2, 48, [0, 9, 22], [3, 0, 2]
    capacity = 30 if window is None else window + new - 1
    keys, values = (torch.full((4, capacity, kv_heads, d), 1e4, dtype=dtype) for _ in range(2))
    past_k, past_v = (_draw(3, 22 + new, kv_heads, d, seed=seed, dtype=dtype) for seed in (1, 2))
    qkv = _draw(3, new, heads + 2 * kv_heads, d, seed=3, dtype=dtype)  # q, k and v are views of one projection
    q = qkv[:, :, :heads]
    for i, length in enumerate(lengths):
        for position in range(length):
            keys[rows[i], position % capacity] = past_k[i, position]
            values[rows[i], position % capacity] = past_v[i, position]
        past_k[i, length : length + new] = qkv[i, :, heads : heads + kv_heads]
        past_v[i, length : length + new] = qkv[i, :, heads + kv_heads :]
    positions = (torch.tensor(lengths)[:, None] + torch.arange(new)).int()
    k, v = qkv[:, :, heads : heads + kv_heads], qkv[:, :, heads + kv_heads :]
    out = cached_attention_(q, k, v, keys, values, torch.tensor(rows, dtype=torch.int32), positions, window)
    for i, length in enumerate(lengths):
        end = length + new
        exact = reference.attention(
            q[i : i + 1].double(), past_k[i : i + 1, :end].double(), past_v[i : i + 1, :end].double(), window=window
        )
        _close(out[i : i + 1], exact, dtype)
        assert torch.equal(keys[rows[i], (end - 1) % capacity], past_k[i, end - 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.tensor([[3]], dtype=torch.int32)}, "room for the positions"),
        ({"positions": torch.tensor([[-1]], dtype=torch.int32)}, "count up from 0"),
        ({"rows": torch.tensor([2], dtype=torch.int32)}, "rows of the cache"),
        ({"rows": torch.tensor([0])}, "int32 rows"),
        ({"q": torch.zeros(1, 1, 2, 8)}, "multiple of 16"),
        ({"k": torch.zeros(1, 2, 1, 16)}, "as many keys and values"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    fitting = {
        "q": torch.zeros(1, 1, 2, 16),
        "k": torch.zeros(1, 1, 1, 16),
        "v": torch.zeros(1, 1, 1, 16),
        "keys": torch.zeros(2, 3, 1, 16),
        "values": torch.zeros(2, 3, 1, 16),
        "rows": torch.tensor([1], dtype=torch.int32),
        "positions": torch.tensor([[2]], dtype=torch.int32),
    }
    cached_attention_(**fitting)
    with pytest.raises(RuntimeError, match=message):
        cached_attention_(**{**fitting, **change})
    with pytest.raises(RuntimeError, match="as many columns"):
        torch.ops.megatronish.linear_rows(torch.zeros(1, 4), torch.zeros(3, 5), None)
