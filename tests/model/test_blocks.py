"""Each form of block and each switch against its equation, written out here with plain torch in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatronish.config.model import KernelConfig, ModelConfig
from megatronish.model.transformer import Transformer
from megatronish.ops import reference

SHAPE = {
    "vocab_size": 31,
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "ffn_hidden_size": 20,
    "seq_length": 32,
    "init_std": 0.3,
}
SWITCHES = [
    {"norm_position": position, "parallel_block": parallel, "parallel_block_shared_norm": shared, **rest}
    for (position, parallel, shared), rest in itertools.product(
        [
            ("pre", False, False),
            ("post", False, False),
            ("pre", True, False),
            ("pre", True, True),
            ("post", True, False),
        ],
        [
            {"activation": "swiglu", "norm": "rmsnorm", "num_kv_heads": 1, "qk_norm": True},
            {"activation": "geglu", "norm": "layernorm", "norm_bias": False, "num_kv_heads": 2, "mlp_bias": True},
            {"activation": "gelu", "norm": "layernorm", "attention_qkv_bias": True, "attention_out_bias": True},
            {"activation": "gelu_tanh", "norm": "rmsnorm", "rope_fraction": 0.0, "mlp_bias": True, "head_dim": 8},
            {
                "activation": "relu",
                "norm": "layernorm",
                "qk_norm": True,
                "rope_fraction": 0.67,
                "rope_interleaved": True,
            },
            {"activation": "geglu_tanh", "norm_zero_centered": True, "embedding_scaled": True, "qk_norm": True},
        ],
    )
]


class Equation:
    """The same model as a function of its named weights."""

    def __init__(self, config: ModelConfig, state: dict[str, Tensor]) -> None:
        self.config, self.state = config, state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, eps = self.state[f"{name}.weight"], self.config.norm_eps
        if self.config.norm == "rmsnorm":
            weight = 1 + weight if self.config.norm_zero_centered else weight
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        return y + self.state[f"{name}.bias"] if self.config.norm_bias else y

    def rotate(self, x: Tensor) -> Tensor:
        rotary = self.config.rotary_dim
        frequencies = self.config.rope_theta ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
        turn = torch.polar(torch.ones(()).double(), torch.arange(x.shape[1]).double()[:, None] * frequencies)[:, None]
        head, rest = x[..., :rotary], x[..., rotary:]
        if self.config.rope_interleaved:
            turned = torch.view_as_real(torch.complex(head[..., 0::2], head[..., 1::2]) * turn).flatten(-2)
        else:
            spun = torch.complex(*head.chunk(2, -1)) * turn
            turned = torch.cat((spun.real, spun.imag), -1)
        return torch.cat((turned, rest), -1)

    def attention(self, name: str, x: Tensor) -> Tensor:
        c, (b, s, _) = self.config, x.shape
        heads, kv, d = c.num_attention_heads, c.resolved_kv_heads, c.resolved_head_dim
        q, k, v = self.linear(f"{name}.qkv", x).split((heads * d, kv * d, kv * d), -1)
        q, k, v = q.view(b, s, heads, d), k.view(b, s, kv, d), v.view(b, s, kv, d)
        if c.qk_norm:
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        if c.rotary_dim:
            q, k = self.rotate(q), self.rotate(k)
        outputs = []
        for head in range(heads):
            group = head // (heads // kv)
            scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / d**0.5
            hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
            outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, :, group])
        return self.linear(f"{name}.out", torch.stack(outputs, 2).flatten(2))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        x = self.linear(f"{name}.up", x)
        if self.config.is_gated:
            gate, up = x.chunk(2, -1)
            form = "tanh" if self.config.activation == "geglu_tanh" else "none"
            x = (F.silu(gate) if self.config.activation == "swiglu" else F.gelu(gate, approximate=form)) * up
        else:
            form = {"gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "relu": F.relu}
            x = form[self.config.activation](x)
        return self.linear(f"{name}.down", x)

    def block(self, name: str, x: Tensor) -> Tensor:
        c = self.config
        first, second = f"{name}.attention_norm", f"{name}.mlp_norm"
        attention = lambda y: self.attention(f"{name}.attention", y)  # noqa: E731
        mlp = lambda y: self.mlp(f"{name}.mlp", y)  # noqa: E731
        if c.parallel_block and c.norm_position == "post":
            return self.norm(first, x + attention(x) + mlp(x))
        if c.parallel_block:
            shared = first if c.parallel_block_shared_norm else second
            return x + attention(self.norm(first, x)) + mlp(self.norm(shared, x))
        if c.norm_position == "post":
            x = self.norm(first, x + attention(x))
            return self.norm(second, x + mlp(x))
        x = x + attention(self.norm(first, x))
        return x + mlp(self.norm(second, x))

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.state["embedding.weight"][tokens]
        x = x * self.config.hidden_size**0.5 if self.config.embedding_scaled else x
        for layer in range(self.config.num_layers):
            x = self.block(f"blocks.{layer}", x)
        if self.config.norm_position == "pre":
            x = self.norm("final_norm", x)
        return x @ self.state["head.weight"].T


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_model_equals_its_equation(switches: dict[str, object]) -> None:
    config = ModelConfig(**SHAPE, **switches)
    model = Transformer(config, KernelConfig(attention="sdpa")).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms and biases at their initial 1 and 0 would hide a missing one
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    tokens = torch.randint(31, (2, 13), generator=generator)
    expected = Equation(config, dict(model.state_dict())).logits(tokens)
    # The fp32 rotary tables are the only part that is not float64: 6e-8 an angle.
    tolerance = 2e-6 if config.rotary_dim else 1e-12
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("interval", [None, 2])
def test_sliding_and_full_layers_alternate(interval: int | None) -> None:
    config = ModelConfig(**SHAPE, sliding_window=4, full_attention_interval=interval)
    assert [config.layer_window(i) for i in range(4)] == ([4, 4, 4, 4] if interval is None else [4, None, 4, None])
    model = Transformer(config)
    tokens = torch.arange(1, 13)[None]
    logits = model(tokens)
    changed = model(torch.cat((tokens.new_zeros(1, 1), tokens[:, 1:]), dim=1))
    reached = ((logits - changed).abs().amax(-1)[0] > 0).nonzero()[-1].item()
    # Two sliding layers carry token 0 to 2 * (window - 1) places further; a full layer carries it to the end.
    assert reached == (6 if interval is None else 11)


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    config = ModelConfig(**SHAPE, embedding_dropout=0.1, attention_dropout=0.1, residual_dropout=0.1)
    model = Transformer(config)
    plain = Transformer(ModelConfig(**SHAPE))
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(model.eval()(tokens), plain(tokens), rtol=0, atol=0)
    model.train()
    torch.manual_seed(0)
    first = model(tokens)
    assert not torch.equal(first, model(tokens))
    torch.manual_seed(0)
    assert torch.equal(first, model(tokens))


def test_attention_dropout_keeps_the_mean_in_both_backends() -> None:
    from megatronish.ops.attention import attention

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 6, 2, 8).unbind(0)
    exact = reference.attention(q, k, v)
    for backend in ("sdpa", "reference"):
        draws = torch.stack([attention(q, k, v, backend=backend, dropout_p=0.25) for _ in range(4000)])
        spread = draws.std(0) / 4000**0.5
        # 96 numbers, each a mean of 4000 draws: beyond 5 standard errors once in 17,000 runs.
        assert ((draws.mean(0) - exact).abs() <= 5 * spread + 1e-6).all()
