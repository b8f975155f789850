"""Logits, loss and every gradient equal those of `transformers`."""

import pytest
import torch

from megatronish.config.model import KernelConfig
from megatronish.model.transformer import Transformer
from tests.hf_models import MODELS, VOCAB, build, our_config, our_tensors

# fp32 rounds at 6e-8. A logit is a sum of about 1e2 terms through three blocks; 1e-5 of the largest one leaves both
# sides room for another order of summation and none for another formula.
LOGIT_TOLERANCE = 1e-5
# The sum of both sides' errors against float64, which are largest for Gemma: 1.9e-5 each (AVX2, 2026-11-30).
GRADIENT_TOLERANCE = 4e-5


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("family", MODELS)
def test_logits_loss_and_gradients(family: str, backend: str) -> None:
    theirs = build(family)
    ours = Transformer(our_config(theirs), KernelConfig(attention=backend))
    state = our_tensors(theirs, dict(theirs.named_parameters()))
    parameters = dict(ours.named_parameters())
    assert state.keys() == parameters.keys()
    ours.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, strict=False)
    ours.tie_weights()

    tokens = torch.randint(VOCAB, (2, 33), generator=torch.Generator().manual_seed(2))
    labels = torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), dim=1)
    labels[0, 5:9] = -100
    their_labels = torch.cat((tokens[:, :1], labels[:, :-1]), dim=1)
    output = theirs(tokens, labels=their_labels)
    output.loss.backward()
    loss_sum, count = ours.loss(tokens, labels)
    (loss_sum / count).backward()

    assert count.item() == 2 * 32 - 4
    assert _difference(ours(tokens), output.logits) < LOGIT_TOLERANCE
    assert (loss_sum / count).item() == pytest.approx(output.loss.item(), rel=1e-6)
    gradients = our_tensors(theirs, {name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-6, f"{name} has no gradient to compare"
        assert _difference(parameters[name].grad, gradient) < GRADIENT_TOLERANCE, name


def test_bf16_error_is_that_of_transformers() -> None:
    """In bf16 both stand off from float64 by rounding; ours (fewer roundings) by no more than 1.5 times theirs."""
    theirs = build("llama").to(torch.bfloat16)
    ours = Transformer(our_config(theirs))
    ours.load_state_dict(our_tensors(theirs, theirs.state_dict()))
    tokens = torch.randint(VOCAB, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact = ours.double()(tokens)
        error = _rms(ours.bfloat16()(tokens) - exact)
        their_error = _rms(theirs(tokens).logits - exact)
    assert their_error > 1e-3 * _rms(exact)  # it is bf16 that is being measured
    assert error < 1.5 * their_error


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()
