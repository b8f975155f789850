"""The keys of our DeepSpeed half are those of the installed deepspeed: names, types and the defaults we write out."""

from __future__ import annotations

import types
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from megatronish.config.base import nested_model
from megatronish.config.deepspeed_json import (
    OURS,
    Bf16Config,
    DeepSpeedConfig,
    Fp16Config,
    OffloadOptimizer,
    OffloadParam,
    ZeroConfig,
)
from tests.config.raw import read

# Our default, DeepSpeed's default: where they differ on purpose.
DELIBERATE = {
    # generation and export read full weights, which ZeRO-3 only gathers when this is on
    "stage3_gather_16bit_weights_on_model_save": (True, False),
}
# DeepSpeed types these as int and as Path; any number, and text, do the same for the user.
WIDER = {"min_loss_scale": (float, int), "nvme_path": (str, Path)}


def sections() -> list[tuple[type[BaseModel], type[BaseModel]]]:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    return [
        (ZeroConfig, DeepSpeedZeroConfig),
        (OffloadOptimizer, DeepSpeedZeroOffloadOptimizerConfig),
        (OffloadParam, DeepSpeedZeroOffloadParamConfig),
        (Bf16Config, DeepSpeedBF16Config),
        (Fp16Config, DeepSpeedFP16Config),
    ]


def written_names(model: type[BaseModel]) -> dict[str, Any]:
    """Key in the file -> field."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows, None left out; text choices and enums of text count as str."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return set().union(*(kinds(part) for part in get_args(annotation)))
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return {type(member.value) for member in annotation}
    return set() if annotation is type(None) else {annotation}


@pytest.mark.parametrize("index", range(5), ids=["zero", "offload_optimizer", "offload_param", "bf16", "fp16"])
def test_every_key_is_deepspeeds(index: int) -> None:
    """Under the name that is written to the file, which for ZeRO-3's keys is an alias, and with its type."""
    ours, theirs = (written_names(model) for model in sections()[index])
    assert set(ours) - set(theirs) == set()
    for name, field in ours.items():
        if nested_model(field.annotation):
            assert nested_model(theirs[name].annotation), name
            continue
        expected = ({WIDER[name][0]}, {WIDER[name][1]}) if name in WIDER else (kinds(field.annotation),) * 2
        assert (kinds(field.annotation), kinds(theirs[name].annotation)) == expected, name


@pytest.mark.parametrize("index", range(5), ids=["zero", "offload_optimizer", "offload_param", "bf16", "fp16"])
def test_every_default_that_is_written_is_deepspeeds(index: int) -> None:
    """The engine is given our defaults in full (None is left out), so they must be the ones DeepSpeed would take."""
    ours, theirs = (written_names(model) for model in sections()[index])
    for name, field in ours.items():
        if field.is_required() or field.default is None:
            continue
        assert (field.default, theirs[name].default) == DELIBERATE.get(name, (theirs[name].default,) * 2), name


class Recorded(dict[str, Any]):
    """A dict that remembers which keys it was asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def test_what_is_accepted_at_the_top_is_read_by_deepspeed() -> None:
    """DeepSpeed asks for every top-level key that we accept; what it never asks for would be silently without effect."""
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    raw = Recorded({"train_batch_size": 1, "aio": {}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}})
    Theirs(raw)
    assert set(written_names(DeepSpeedConfig)) - raw.asked == {"flops_profiler"}  # looked for in .keys()
    assert Theirs({**raw, "flops_profiler": {"enabled": True}}).flops_profiler_config.enabled
    assert "train_batch_sise" not in raw.asked


@pytest.mark.parametrize(
    ("key", "attribute"),
    [
        ("prescale_gradients", "prescale_gradients"),
        ("gradient_predivide_factor", "gradient_predivide_factor"),
        ("wall_clock_breakdown", "wall_clock_breakdown"),
        ("memory_breakdown", "memory_breakdown"),
        ("dump_state", "dump_state"),
    ],
)
def test_top_level_defaults_are_deepspeeds(key: str, attribute: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    theirs = Theirs({"train_batch_size": 1, "gradient_clipping": 1.0})
    assert getattr(theirs, attribute) == DeepSpeedConfig.model_fields[key].default
    assert Theirs({"train_batch_size": 1}).gradient_clipping == 1.0, "DeepSpeed still clips when nothing is said"


def test_deepspeed_reads_a_full_description_as_we_do() -> None:
    """What the engine hands over is taken by DeepSpeed without a change of any value."""
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    from megatronish.training.engine import engine_keys

    run = read(
        gradient_accumulation_steps=2,
        gradient_clipping=0.0,
        bf16={"enabled": True},
        zero_optimization={
            "stage": 3,
            "reduce_bucket_size": 5e7,
            "stage3_prefetch_bucket_size": 1e6,
            "overlap_comm": True,
        },
    )
    keys = engine_keys(run, run.batch_plan(1))
    theirs = Theirs(keys)
    assert (theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps) == (
        4,
        2,
        2,
    )
    assert theirs.gradient_clipping == 0.0
    assert theirs.bfloat16_config.enabled and not theirs.float16_config.enabled
    zero = theirs.zero_config
    assert (int(zero.stage), zero.reduce_bucket_size, zero.prefetch_bucket_size) == (3, 50_000_000, 1_000_000)
    assert zero.overlap_comm is True
    assert not OURS.keys() & keys.keys(), "a job that megatronish does is not handed to DeepSpeed as well"
    assert not {"optimizer", "megatronish"} & keys.keys()
