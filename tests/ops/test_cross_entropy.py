"""Cross-entropy of every backend against float64; that bf16 logits are never widened all at once; the fused one at every
instruction-set level; and shards of the vocabulary on two ranks against one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatronish.ops import cross_entropy as module
from megatronish.ops import reference
from megatronish.ops.cross_entropy import cross_entropy, resolve_cross_entropy, token_losses
from megatronish.ops.extension import EXTENSION
from tests.distributed import run_ranks

# Relative error of one number of the gradient before it is rounded: a few fp32 roundings (6e-8 each) and an exponential good
# to 2 units; where 16 bits are stored, one with a relative error of 3e-6. The exponent's own roundings come on top. In
# float64 the yardstick, torch's sum of thousands in that type, is no better than what it measures.
BEFORE_ROUNDING = {torch.float64: 6e-15, torch.float32: 6e-7, torch.bfloat16: 4e-6, torch.float16: 4e-6}
needs_kernels = pytest.mark.skipif(not EXTENSION.cpu, reason=EXTENSION.cpu_problem or "built")
BACKENDS = ["reference", pytest.param("fused", marks=needs_kernels)]


def _problem(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits [..., V] and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels.view(-1)[2::7] = -100
    return logits, labels


def _exact(logits: Tensor, labels: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.detach().double().requires_grad_()
    losses = reference.token_losses(wide, labels)
    return losses.detach(), torch.autograd.grad(losses, wide, grad.double())[0]


def _gradient_error(ours: Tensor, exact: Tensor, logits: Tensor, labels: Tensor, grad: Tensor) -> float:
    """The largest error of a number, as a fraction of what its roundings allow."""
    exponent = (logits.amax(dim=-1, keepdim=True) - logits).double()
    relative = BEFORE_ROUNDING[ours.dtype] + 2 * torch.finfo(grad.dtype).eps * exponent
    info = torch.finfo(ours.dtype)
    half_unit = 0.5 * info.eps if ours.dtype in (torch.bfloat16, torch.float16) else 0.0
    allowed = exact.abs() * (half_unit + relative) + info.smallest_normal * info.eps
    # A label's number is the difference of its probability and 1, times the gradient.
    of_label = F.one_hot(labels.clamp(min=0), ours.shape[-1]) * grad.abs().double().unsqueeze(-1)
    allowed += 4 * torch.finfo(grad.dtype).eps * of_label
    return ((ours.double() - exact).abs() / allowed).max().item()


def _check(logits: Tensor, labels: Tensor, backend: str) -> None:
    """Losses and gradient of this backend, from a gradient a token and from that of the sum."""
    leaf = logits.detach().requires_grad_()
    before = logits.clone()
    for summed in (False, True):
        losses = token_losses(leaf * 1, labels, backend=backend)
        grad = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1)).to(losses.dtype)
        if summed:
            grad = torch.full_like(grad, 0.37)
        exact, exact_grad = _exact(logits, labels, grad)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        assert losses.dtype == wide and losses.shape == labels.shape
        # fp32 sums, whatever the logits are: half a unit in the last place of the larger of loss and logits, a few times.
        size = exact.abs().clamp(min=before.abs().max().item())
        assert ((losses - exact).abs() <= 6 * torch.finfo(wide).eps * size).all()
        total = (losses * grad).sum() if not summed else 0.37 * losses.sum()
        (ours,) = torch.autograd.grad(total, leaf)
        assert ours.dtype == logits.dtype
        assert _gradient_error(ours, exact_grad, before, labels, grad) < 1
        assert not ours[labels == -100].any()
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("dtype", BEFORE_ROUNDING, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_gradients(backend: str, dtype: torch.dtype) -> None:
    _check(*_problem(3, 47, 31, dtype=dtype), backend)


@pytest.mark.parametrize("elements", [1, 100, 1 << 20], ids=["row_by_row", "slabs", "full"])
def test_slabs_of_plain_torch(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLAB_ELEMENTS_CPU", elements)
    _check(*_problem(3, 47, 31, dtype=torch.bfloat16), "reference")


@pytest.mark.parametrize("dtype", BEFORE_ROUNDING, ids=str)
@pytest.mark.parametrize("vocabulary", [2, 3, 63, 100, 2047, 2049, 4097, 6144])
def test_the_fused_kernel(level: str, vocabulary: int, dtype: torch.dtype) -> None:
    """Widths of less than a vector, of odd numbers (rows then begin off any boundary), and of several blocks."""
    _check(*_problem(150, vocabulary, dtype=dtype), "fused")


def test_one_token_in_the_vocabulary(level: str) -> None:
    logits, labels = _problem(9, 1)
    losses = token_losses(logits.requires_grad_(), labels, backend="fused")
    assert not losses.any()
    assert not torch.autograd.grad(losses.sum(), logits)[0].any()


def test_no_rows_and_one(level: str) -> None:
    for rows in (0, 1):
        logits, labels = _problem(rows, 40)
        leaf = logits.requires_grad_()
        losses = token_losses(leaf, labels, backend="fused")
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        exact, exact_grad = _exact(logits, labels, torch.ones(rows))
        torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-7)


def test_strides_and_alignment_change_nothing(level: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, labels = _problem(20, 2100, dtype=dtype)
        buffer = torch.empty(logits.numel() + 1, dtype=dtype)
        others = [
            torch.stack((logits, -logits), dim=-1)[..., 0],
            logits.t().contiguous().t(),
            buffer[1:].view(logits.shape).copy_(logits),
            torch.cat((logits, logits), dim=1)[:, :2100],
        ]
        results = []
        for other in (logits, *others):
            leaf = other.detach().requires_grad_()
            losses = token_losses(leaf, labels, backend="fused")
            results.append((losses, torch.autograd.grad(losses.sum(), leaf)[0]))
        for losses, grad in results[1:]:
            assert torch.equal(losses, results[0][0]) and torch.equal(grad, results[0][1])


def test_the_same_bits_at_any_number_of_threads(level: str) -> None:
    logits, labels = _problem(300, 500, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            leaf = logits.detach().requires_grad_()
            losses = token_losses(leaf, labels, backend="fused")
            results.append((losses, torch.autograd.grad(losses.sum(), leaf)[0]))
    finally:
        torch.set_num_threads(threads)
    for losses, grad in results[1:]:
        assert torch.equal(losses, results[0][0]) and torch.equal(grad, results[0][1])


INFINITY = float("inf")
EXTREMES = [
    [1e30, -1e30, 0.0],
    [-1e30, -1e30, 3.0],
    [1e30, 1e30, 1e30],
    [100.0, -100.0, 0.0],
    [-INFINITY, 1.0, 2.0],
    [INFINITY, 1.0, 2.0],
    [-INFINITY] * 3,
    [float("nan"), 1.0, 2.0],
    [0.0, float("nan"), -INFINITY],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [3, 4100])
def test_extreme_logits_go_the_way_of_the_reference(level: str, width: int, dtype: torch.dtype) -> None:
    """Alone, before, and after blocks of ordinary ones."""
    ordinary = _problem(len(EXTREMES), width)[0][:, 3:]
    extremes, labels = torch.tensor(EXTREMES), torch.tensor([0, 1, 2] * 3)
    for logits in (torch.cat((extremes, ordinary), dim=1), torch.cat((ordinary, extremes), dim=1)):
        leaf = logits.to(dtype).requires_grad_()
        exact = leaf.detach().clone().requires_grad_()
        losses, theirs = token_losses(leaf, labels, backend="fused"), reference.token_losses(exact, labels)
        torch.testing.assert_close(losses, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y, x in ((losses, leaf), (theirs, exact))]
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(*grads, rtol=max(tolerance, 1e-6), atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend: str) -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, 3e4, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 0]), backend=backend)
    assert loss.item() == 6e4
    loss.backward()
    assert torch.equal(logits.grad, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_labelled(backend: str) -> None:
    logits = torch.randn(2, 5)
    logits[0] = float("nan")  # not even this reaches an ignored row's gradient, where nothing multiplies it
    if backend != "fused":
        logits[0] = 0.0
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, torch.full((2,), -100), backend=backend)
    loss.backward()
    assert loss.item() == 0.0 and not leaf.grad.any()


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=needs_kernels)])
def test_finite_differences(backend: str) -> None:
    """By hand: torch's gradcheck runs several backward passes after one forward pass, which the fused one refuses."""
    logits = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, grad = torch.tensor([0, 8, -100, 3, 3]), torch.linspace(-1, 1, 5).double()
    leaf = logits.clone().requires_grad_()
    (ours,) = torch.autograd.grad(token_losses(leaf, labels, backend=backend), leaf, grad)
    step = 1e-6 * torch.eye(45, dtype=torch.float64).view(45, 5, 9)
    up, down = (
        torch.stack([token_losses(logits + sign * s, labels, backend=backend) @ grad for s in step]) for sign in (1, -1)
    )
    # Central differences are off by step^2 / 6 times a third derivative below 1, and by 1e-16 / step of rounding.
    torch.testing.assert_close(ours.flatten(), (up - down) / 2e-6, rtol=0, atol=1e-8)


class _Watch(TorchDispatchMode):
    """Most elements of a new fp32 tensor, and of any new tensor, that an operator makes."""

    wide = new = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor) and not any(tensor is a or _shares(tensor, a) for a in args):
                self.new = max(self.new, tensor.numel())
                if tensor.dtype == torch.float32:
                    self.wide = max(self.wide, tensor.numel())
        return out


def _shares(a: Tensor, b: object) -> bool:
    return isinstance(b, Tensor) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_bf16_logits_are_never_widened_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLAB_ELEMENTS_CPU", 1000)
    logits = torch.randn(64, 100, dtype=torch.bfloat16, requires_grad=True)
    with _Watch() as watch:
        cross_entropy(logits, torch.zeros(64, dtype=torch.long)).backward()
    assert 0 < watch.wide <= 1000


@needs_kernels
def test_the_fused_gradient_overwrites_the_logits() -> None:
    leaf = torch.randn(64, 100, dtype=torch.bfloat16, requires_grad=True)
    logits = leaf * 1
    kept: list[Tensor] = []
    logits.register_hook(kept.append)
    with _Watch() as watch:
        loss = cross_entropy(logits, torch.zeros(64, dtype=torch.long), backend="fused")
        torch.autograd.grad(loss, logits)
    assert 0 < watch.new <= 4 * 64  # no tensor of the size of the logits
    assert kept[0].data_ptr() == logits.data_ptr()


@needs_kernels
def test_a_second_backward_pass_is_refused() -> None:
    leaf = torch.randn(4, 9, requires_grad=True)
    loss = cross_entropy(leaf * 1, torch.zeros(4, dtype=torch.long), backend="fused")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cross_entropy: the logits are no longer those of the forward pass"):
        loss.backward()
    kept = leaf.exp()  # keeps its output for its own backward pass, which comes after the loss's
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(kept, torch.zeros(4, dtype=torch.long), backend="fused").backward()


@needs_kernels
def test_a_leaf_is_left_alone() -> None:
    leaf = torch.randn(4, 9, requires_grad=True)
    before = leaf.detach().clone()
    cross_entropy(leaf, torch.zeros(4, dtype=torch.long), backend="fused").backward()
    assert torch.equal(leaf, before) and leaf.grad.any()


@needs_kernels
@pytest.mark.parametrize("intermediate", [True, False])
def test_full_graph_compiles_to_the_same_bits(intermediate: bool) -> None:
    logits, labels = _problem(30, 70)

    def function(x: Tensor) -> Tensor:
        return token_losses(x * 1 if intermediate else x, labels, backend="fused")

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        losses = call(leaf)
        results.append((losses, torch.autograd.grad(losses.sum(), leaf)[0]))
        assert torch.equal(leaf, logits)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_a_request_becomes() -> None:
    assert [resolve_cross_entropy("auto", ops) for ops in ("fused", "reference", "liger")] == [
        "fused",
        "reference",
        "reference",
    ]
    assert resolve_cross_entropy("reference", "fused") == "reference"
    assert resolve_cross_entropy("linear", "fused") == "reference"  # where the head makes logits all the same


REFUSED = [
    ({"labels": torch.zeros(2, 4).long()}, ValueError, r"labels have shape \(2, 4\), expected \(2, 5\)"),
    ({"labels": torch.zeros(2, 5).int()}, ValueError, "labels are torch.int32, expected torch.int64"),
    ({"logits": torch.zeros(2, 5, 3).long()}, ValueError, "logits is torch.int64, expected float32, bfloat16"),
    ({"vocab_start": 1}, ValueError, "columns 1 to 3, expected all of the 4 tokens"),
    ({"vocab_size": 4}, ValueError, "columns 0 to 2, expected all of the 4 tokens"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_messages(change: dict[str, object], error: type[Exception], message: str, backend: str) -> None:
    arguments = {"logits": torch.randn(2, 5, 3), "labels": torch.zeros(2, 5).long(), "backend": backend, **change}
    with pytest.raises(error, match=f"cross_entropy: {message}" if "columns" not in message else message):
        token_losses(**arguments)


@pytest.mark.parametrize("wrong", [3, -1, 1 << 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_outside_the_vocabulary(backend: str, wrong: int) -> None:
    labels = torch.tensor([[0, 1], [wrong, -100]])
    message = f"cross_entropy.*: expected tokens from 0 to 2, or -100, got {wrong} in row 2"
    with pytest.raises((ValueError, RuntimeError), match=message):
        token_losses(torch.randn(2, 2, 3), labels, backend=backend)


# ---- Two ranks.


def _sharded(rank: int, split: int, fused: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, str]:
    """Losses, this rank's part of the gradient, and what a label outside the vocabulary gives."""
    logits, labels = _problem(40, 37, dtype=dtype)
    logits[:, :split][3] = -INFINITY  # nothing but this in the first shard
    logits[4] = 1e4
    columns = slice(0, split) if rank == 0 else slice(split, 37)
    leaf = logits[:, columns].contiguous().requires_grad_()
    options = {
        "backend": "fused" if fused else "reference",
        "group": dist.group.WORLD,
        "vocab_start": columns.start,
        "vocab_size": 37,
    }
    losses = token_losses(leaf * 1, labels, **options)
    grad = torch.randn(40, generator=torch.Generator().manual_seed(1)).to(losses.dtype)
    (ours,) = torch.autograd.grad(losses, leaf, grad)
    labels[0] = 37
    try:
        token_losses(leaf, labels, **options)
        message = "nothing"
    except (ValueError, RuntimeError) as error:
        message = str(error)
    return losses.detach(), ours, message


@pytest.mark.distributed
@pytest.mark.parametrize(("fused", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)])
@pytest.mark.parametrize("split", [16, 30])
def test_two_shards_equal_one_process(split: int, fused: bool, dtype: torch.dtype) -> None:
    if fused and not EXTENSION.cpu:
        pytest.skip(EXTENSION.cpu_problem)
    logits, labels = _problem(40, 37, dtype=dtype)
    logits[:, :split][3] = -INFINITY
    logits[4] = 1e4
    labels[3] = 36
    full = logits.clone().requires_grad_()
    losses = token_losses(full, _problem(40, 37)[1], backend="fused" if fused else "reference")
    grad = torch.randn(40, generator=torch.Generator().manual_seed(1)).to(losses.dtype)
    (expected,) = torch.autograd.grad(losses, full, grad)
    shards = run_ranks(2, _sharded, split, fused, dtype)
    assert torch.equal(shards[0][0], shards[1][0])
    # Sums in another order: a few roundings of fp32.
    torch.testing.assert_close(shards[0][0], losses, rtol=1e-6, atol=2e-6)
    ours = torch.cat([shard[1] for shard in shards], dim=1)
    # Where a number is rounded the other way: one unit of the 16-bit ones.
    torch.testing.assert_close(ours, expected, rtol=max(1e-6, torch.finfo(dtype).eps), atol=2e-7)
    assert all("expected tokens from 0 to 36, or -100, got 37 in row 0" in shard[2] for shard in shards)


def test_reference_is_torch_s() -> None:
    logits, labels = _problem(3, 7, 31)
    exact = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert reference.cross_entropy(logits, labels).item() == pytest.approx(exact.item(), rel=1e-6)
