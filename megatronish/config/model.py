"""The model: its shape, its switches, and the kernels that compute it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megatronish.config.base import Frozen

PositiveInt = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Activation = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"]
GATED_ACTIVATIONS: frozenset[str] = frozenset({"swiglu", "geglu", "geglu_tanh"})


class RopeScaling(Frozen):
    """How rotary frequencies are scaled to extend the context beyond the trained length."""

    type: Literal["linear", "ntk", "yarn", "llama3"] = Field(
        description="linear: positions divided by factor; ntk: larger base (NTK-aware); yarn: YaRN; llama3: Llama 3.1"
    )
    factor: float = Field(ge=1.0, description="how many times longer the context becomes")
    original_seq_length: PositiveInt | None = Field(
        default=None, description="context length before extension (needed by yarn and llama3)"
    )
    low_freq_factor: float = Field(default=1.0, gt=0, description="llama3: wavelengths above original/low are divided")
    high_freq_factor: float = Field(default=4.0, gt=0, description="llama3: wavelengths below original/high are kept")
    beta_fast: float = Field(default=32.0, gt=0, description="yarn: rotations above which a frequency is kept")
    beta_slow: float = Field(default=1.0, gt=0, description="yarn: rotations below which a frequency is divided")
    attention_factor: float | None = Field(
        default=None, gt=0, description="yarn: factor on cos and sin (none: 0.1 ln(factor) + 1)"
    )

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.type in ("yarn", "llama3") and self.original_seq_length is None:
            raise ValueError(
                f"rope_scaling type {self.type!r} needs original_seq_length: give the context length that the "
                "model was trained with before extension"
            )
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling high_freq_factor {self.high_freq_factor} must be larger than low_freq_factor "
                f"{self.low_freq_factor} (Llama 3.1 uses 4 and 1)"
            )
        if self.type == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"rope_scaling beta_fast {self.beta_fast} must be larger than beta_slow {self.beta_slow} "
                "(YaRN uses 32 and 1)"
            )
        return self


class ModelConfig(Frozen):
    """A decoder-only transformer. All switches can be combined, except where a check below raises."""

    preset: str | None = Field(default=None, description="name of the preset that the fields were taken from")
    from_hf: str | None = Field(
        default=None,
        description="folder of a Hugging Face model: the fields are its config.json's, and training starts from its weights",
    )

    vocab_size: PositiveInt = Field(description="number of token ids")
    num_layers: PositiveInt = Field(description="number of transformer blocks")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    num_attention_heads: PositiveInt = Field(description="number of query heads")
    num_kv_heads: PositiveInt | None = Field(
        default=None, description="number of key/value heads, a divisor of the query heads (none: as many; 1: MQA)"
    )
    head_dim: PositiveInt | None = Field(
        default=None, description="width of one head (none: hidden_size / num_attention_heads)"
    )
    ffn_hidden_size: PositiveInt = Field(description="width of one branch of the feed-forward layer")
    seq_length: PositiveInt = Field(description="training context in tokens")

    activation: Activation = Field(
        default="swiglu",
        description="swiglu, geglu and geglu_tanh are gated (two input branches); gelu is the erf form",
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(default="rmsnorm", description="kind of normalisation")
    norm_eps: float = Field(default=1e-5, gt=0, description="added to the variance in every norm")
    norm_zero_centered: bool = Field(
        default=False, description="rmsnorm multiplies by 1 + weight, and weights start at 0 (Gemma)"
    )
    norm_position: Literal["pre", "post"] = Field(
        default="pre", description="pre: x + f(norm(x)), with a final norm; post: norm(x + f(x)), without one"
    )
    parallel_block: bool = Field(
        default=False, description="attention and feed-forward both read the block's input and are added together"
    )
    parallel_block_shared_norm: bool = Field(
        default=False, description="one norm feeds both branches of a pre-norm parallel block (GPT-J; NeoX has two)"
    )
    attention_qkv_bias: bool = Field(default=False, description="bias of the query, key and value projections")
    attention_out_bias: bool = Field(default=False, description="bias of the attention output projection")
    mlp_bias: bool = Field(default=False, description="biases of the feed-forward layer")
    norm_bias: bool = Field(default=True, description="bias of the norms (LayerNorm only)")
    qk_norm: bool = Field(default=False, description="normalise each query and key head before rotation (Qwen3)")

    rope_theta: float = Field(default=10000.0, gt=0, description="base of the rotary frequencies")
    rope_fraction: float = Field(
        default=1.0, ge=0.0, le=1.0, description="part of each head that is rotated (0: no position encoding)"
    )
    rope_interleaved: bool = Field(
        default=False, description="rotate neighbouring pairs (GPT-J) instead of the two halves (Llama, NeoX)"
    )
    rope_scaling: RopeScaling | None = Field(default=None, description="context extension (none: as trained)")

    sliding_window: PositiveInt | None = Field(
        default=None, description="a token attends to itself and to window - 1 earlier ones (none: to all earlier)"
    )
    full_attention_interval: PositiveInt | None = Field(
        default=None, description="with a sliding window, every k-th layer attends to all (none: every layer slides)"
    )

    embedding_scaled: bool = Field(
        default=False, description="token embeddings are multiplied by sqrt(hidden_size) (Gemma; Vaswani et al. 2017)"
    )
    embedding_dropout: Probability = Field(default=0.0, description="dropout after the token embedding")
    attention_dropout: Probability = Field(default=0.0, description="dropout on attention probabilities")
    residual_dropout: Probability = Field(default=0.0, description="dropout on the output of each branch")

    tie_embeddings: bool = Field(default=False, description="input embedding and output head share one weight")
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of initial weights")
    init_scale_residual: bool = Field(
        default=True, description="initial output projections are divided by sqrt(2 * num_layers)"
    )

    @property
    def resolved_kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_attention_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def resolved_head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Number of leading channels of each head that are rotated."""
        return int(self.resolved_head_dim * self.rope_fraction)

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer has a gate branch."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def has_mlp_norm(self) -> bool:
        """Whether a block has a second norm (one that a parallel block shares, or a post-norm one merges, does not)."""
        return not self.parallel_block or (self.norm_position == "pre" and not self.parallel_block_shared_norm)

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm precedes the head (a post-norm block already ends in one)."""
        return self.norm_position == "pre"

    def layer_window(self, layer: int) -> int | None:
        """Sliding window of block `layer` (from 0); None means attention to all earlier tokens."""
        interval = self.full_attention_interval
        if interval is not None and (layer + 1) % interval == 0:
            return None
        return self.sliding_window

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        heads, kv_heads = self.num_attention_heads, self.resolved_kv_heads
        if self.head_dim is None and self.hidden_size % heads != 0:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {heads}: choose a divisor "
                f"({_nearby_divisors(self.hidden_size, heads)}) or set head_dim"
            )
        if heads % kv_heads != 0:
            raise ValueError(
                f"num_attention_heads {heads} is not divisible by num_kv_heads {kv_heads}: choose a divisor of {heads} "
                f"({_nearby_divisors(heads, kv_heads)})"
            )
        if self.rotary_dim % 2 != 0 or (self.rope_fraction > 0 and self.rotary_dim == 0):
            raise ValueError(
                f"head_dim {self.resolved_head_dim} * rope_fraction {self.rope_fraction} rotates {self.rotary_dim} "
                "channels, which must be an even number of at least 2: change rope_fraction (0 turns rotation off), "
                "head_dim or num_attention_heads"
            )
        return self

    @model_validator(mode="after")
    def _check_switches(self) -> ModelConfig:
        if self.full_attention_interval is not None and self.sliding_window is None:
            raise ValueError(
                f"full_attention_interval {self.full_attention_interval} without sliding_window has no effect: set "
                "sliding_window, or leave full_attention_interval out"
            )
        if self.parallel_block_shared_norm and not (self.parallel_block and self.norm_position == "pre"):
            raise ValueError(
                f"parallel_block_shared_norm needs parallel_block true and norm_position 'pre' (they are "
                f"{self.parallel_block} and {self.norm_position!r}): set them, or leave parallel_block_shared_norm out"
            )
        if self.norm_zero_centered and self.norm != "rmsnorm":
            raise ValueError(
                f"norm_zero_centered needs norm 'rmsnorm' (it is {self.norm!r}): change norm, or leave norm_zero_centered out"
            )
        if self.rope_scaling is not None and self.rotary_dim == 0:
            raise ValueError(
                "rope_scaling has no effect with rope_fraction 0: raise rope_fraction, or leave rope_scaling out"
            )
        if self.rope_scaling is not None and self.rope_scaling.type == "ntk" and self.rotary_dim == 2:
            raise ValueError(
                "rope_scaling 'ntk' needs more than 2 rotated channels (rotary_dim is 2): raise rope_fraction or head_dim"
            )
        return self


class KernelConfig(Frozen):
    """Which implementation computes each operator."""

    attention: Literal["auto", "sdpa", "flash", "reference"] = Field(
        default="auto",
        description="auto: flash-attn on GPUs where installed and our kernel on CPUs, for what they take, else torch's SDPA; "
        "a forced one that is missing fails",
    )
    ops: Literal["auto", "fused", "reference", "liger", "apex"] = Field(
        default="auto",
        description="RMSNorm, SwiGLU and RoPE: fused: our kernels; reference: plain torch "
        "operations; liger, apex: the kernels of liger-kernel or NVIDIA Apex where they have one; auto: fused on CPUs "
        "where built, else reference",
    )
    cross_entropy: Literal["auto", "fused", "reference", "linear"] = Field(
        default="auto",
        description="auto: as ops; fused: our kernels, the gradient written over the logits; "
        "reference: plain torch operations; linear: DeepSpeed's loss by chunks of the head, which never holds the logits "
        "and takes longer",
    )

    @field_validator("ops", "cross_entropy", mode="before")
    @classmethod
    def _refuse_compiled(cls, value: object) -> object:
        if value == "compiled":
            raise ValueError(
                "'compiled' was removed: set train.compile true, which compiles the blocks, and this to 'auto' or 'reference'"
            )
        return value


def _nearby_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` next to `wanted`, for a message."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d <= wanted]
    above = [d for d in divisors if d > wanted]
    return " or ".join(str(d) for d in (below[-1:] + above[:1]))
