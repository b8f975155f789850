"""Everything a run description is refused for, with the words the user reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatronish import errors
from megatronish.config.deepspeed_json import OURS, load_json
from megatronish.config.run import BatchPlan, RunConfig
from megatronish.errors import ConfigError, did_you_mean, exit_on_user_error
from tests.config.raw import ABSENT, SMALLEST, changed, read


def test_the_smallest_description_is_accepted() -> None:
    """Each refusal below changes one thing of this: the refusal is for that thing."""
    run = read()
    assert (run.megatronish.train.steps, run.megatronish.model.hidden_size, run.deepspeed.dtype) == (10, 256, "fp32")


MUON = {"type": "Muon", "params": {"lr": 0.02}}
ADAM = SMALLEST["optimizer"]["params"]
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "DeepSpeed's checkpoint writers": (
        {"checkpoint": {"writer": {"type": "fast"}}},
        ['"checkpoint" has "writer"', "--train.async_save", "Remove it"],
    ),
    "misspelt key": (
        {"gradient_acumulation_steps": 2},
        ['unknown key "gradient_acumulation_steps". Did you mean "gradient_accumulation_steps"?', "Known keys here: "],
    ),
    "misspelt nested key": (
        {"zero_optimization": {"overlap_com": True}},
        ['unknown key "zero_optimization.overlap_com". Did you mean "overlap_comm"?'],
    ),
    "misspelt key two sections down": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memoy": True}}},
        ['unknown key "zero_optimization.offload_optimizer.pin_memoy". Did you mean "pin_memory"?', "nvme_path"],
    ),
    "misspelt key of ours": (
        {"megatronish": {"train": {"save_intervall": 5}}},
        [
            'unknown key "megatronish.train.save_intervall". Did you mean "save_interval"?',
            "Known keys here: steps, seed",
        ],
    ),
    "misspelt model field": (
        {"megatronish": {"model": {"num_layer": 5}}},
        ['unknown key "megatronish.model.num_layer". Did you mean "num_layers"?'],
    ),
    "misspelt section of ours": (
        {"megatronish": {"shedule": {"type": "cosine"}}},
        ['unknown key "megatronish.shedule". Did you mean "schedule"?'],
    ),
    "text for an integer": (
        {"train_micro_batch_size_per_gpu": "2"},
        ["\"train_micro_batch_size_per_gpu\" is '2': input should be a valid integer."],
    ),
    "text for our integer": (
        {"megatronish": {"train": {"steps": "10"}}},
        ["\"megatronish.train.steps\" is '10': input should be a valid integer."],
    ),
    "a boolean for an integer": (
        {"gradient_accumulation_steps": True},
        ['"gradient_accumulation_steps" is True: input should be a valid integer.'],
    ),
    "a boolean for our integer": (
        {"megatronish": {"train": {"steps": True}}},
        ['"megatronish.train.steps" is True: input should be a valid integer.'],
    ),
    "a boolean for a model's integer": (
        {"megatronish": {"model": {"num_layers": True}}},
        ['"megatronish.model.num_layers" is True: input should be a valid integer.'],
    ),
    "a boolean for the stage": (
        {"zero_optimization": {"stage": True}},
        ['"zero_optimization.stage" is True: input should be a valid integer.'],
    ),
    "an integer for a boolean": (
        {"bf16": {"enabled": 1}},
        ['"bf16.enabled" is 1: input should be a valid boolean.'],
    ),
    "text for our boolean": (
        {"megatronish": {"train": {"compile": "yes"}}},
        ["\"megatronish.train.compile\" is 'yes': input should be a valid boolean."],
    ),
    "a fraction for an integer": (
        {"zero_optimization": {"reduce_bucket_size": 5.5}},
        ['"zero_optimization.reduce_bucket_size" is 5.5: input should be a valid integer'],
    ),
    "infinity": (
        {"optimizer": {"params": {"lr": float("inf")}}},
        ['"optimizer.params.lr" is inf: input should be a finite number.'],
    ),
    "no such stage": (
        {"zero_optimization": {"stage": 4}},
        ['"zero_optimization.stage" is 4: input should be less than or equal to 3.'],
    ),
    "no such choice": (
        {"megatronish": {"schedule": {"type": "cosin"}}},
        ["\"megatronish.schedule.type\" is 'cosin': input should be 'cosine', 'linear', 'constant' or 'wsd'."],
    ),
    "a section that is no object": (
        {"zero_optimization": 2},
        ['"zero_optimization" is 2: input should be a valid dictionary'],
    ),
    "the learning rate left out": (
        {"optimizer": {"params": {"lr": ABSENT}}},
        ['"optimizer.params.lr" is missing.'],
    ),
    "three betas": (
        {"optimizer": {"params": {"betas": [0.9, 0.95, 0.99]}}},
        ['"optimizer.params.betas" is ', "at most 2 items"],
    ),
    "no steps": ({"megatronish": {"train": {"steps": ABSENT}}}, ['"megatronish.train.steps" is missing.']),
    "no megatronish block": (
        {"megatronish": ABSENT},
        ['no "megatronish" block. Add "megatronish": {"model": {"preset": "tiny"}'],
    ),
    "a section of ours outside the block": (
        {"train": {"steps": 5}},
        ['"train" is next to "megatronish"; move it inside that block.'],
    ),
    "gradient_clipping unsaid": (
        {"gradient_clipping": ABSENT},
        ['"gradient_clipping" is not set', "silently clip at 1.0", 'Write "gradient_clipping": 1.0 (or 0.0 for none)'],
    ),
    "no batch size": (
        {"train_micro_batch_size_per_gpu": ABSENT},
        ['write "train_micro_batch_size_per_gpu" (and "gradient_accumulation_steps").'],
    ),
    "bf16 and fp16": (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        ["bf16 and fp16 are both enabled; enable one"],
    ),
    "Adam": ({"optimizer": {"type": "Adam"}}, ['mixes weight decay into the gradient; write "AdamW"']),
    "no such optimizer": (
        {"optimizer": {"type": "SGD"}},
        ["\"optimizer.type\" is 'SGD': input should be 'AdamW', 'Lion' or 'Muon'."],
    ),
    "a setting of another optimizer": (
        {"optimizer": {"type": "Lion", "params": {"eps": 1e-8}}},
        ["optimizer.params.eps is not a setting of Lion; remove it."],
    ),
    "Muon with ZeRO-3": (
        {"optimizer": MUON, "gradient_clipping": 0.0, "zero_optimization": {"stage": 3}},
        ["Muon needs full matrices, ZeRO-3 shards them: use ZeRO <= 2 or AdamW."],
    ),
    "Muon with clipping": (
        {"optimizer": MUON},
        ['"gradient_clipping" is 1.0 with Muon', "Write 0.0."],
    ),
    "optimizer offload without ZeRO": (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        ["zero_optimization: offload_optimizer needs ZeRO >= 1"],
    ),
    "parameter offload below ZeRO-3": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        ['offload_param needs ZeRO-3, "stage" is 2: set it to 3 or remove the section.'],
    ),
    "NVMe without a folder": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        ['offload_optimizer to nvme needs "nvme_path", a folder on the NVMe disk.'],
    ),
    "NVMe below ZeRO-3": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}},
        ['offload_optimizer to nvme needs ZeRO-3, "stage" is 2.'],
    ),
    "a pipeline with ZeRO-2": (
        {"megatronish": {"parallel": {"pipeline": 2}}, "zero_optimization": {"stage": 2}},
        [
            "parallel.pipeline is 2 with zero_optimization.stage 2: the pipeline engine allows ZeRO <= 1.",
            "Add --zero_optimization.stage 1, or --parallel.pipeline 1.",
        ],
    ),
    "a sequence over tensor-parallel ranks": (
        {"megatronish": {"parallel": {"sequence": 2, "tensor": 2}}, "zero_optimization": {"stage": 1}},
        ["parallel.sequence 2 with tensor 2 and pipeline 1 is not part of this version"],
    ),
    "stages and samples of different lengths": (
        {
            "megatronish": {"parallel": {"pipeline": 2}, "data": {"pack": False}},
            "zero_optimization": {"stage": 1},
        },
        ["data.pack false gives micro batches of different lengths"],
    ),
    "a sequence that does not divide": (
        {"megatronish": {"parallel": {"sequence": 4}, "model": {"seq_length": 30}}},
        ["model.seq_length 30 does not divide over 4 sequence-parallel ranks"],
    ),
    "matrices divided under ZeRO-3": (
        {"megatronish": {"parallel": {"tensor": 2}}, "zero_optimization": {"stage": 3}},
        ["parallel.tensor 2 with zero_optimization.stage 3: use --zero_optimization.stage 2, or tensor 1."],
    ),
    "divided matrices with bf16 and ZeRO-0": (
        {"megatronish": {"parallel": {"tensor": 2}}, "zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
        ["parallel.tensor 2 with bf16 and zero_optimization.stage 0: DeepSpeed would clip by a wrong gradient norm."],
    ),
    "divided matrices with Muon": (
        {
            "megatronish": {"parallel": {"tensor": 2}},
            "optimizer": {"type": "Muon", "params": {"lr": 0.02}},
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 1},
        },
        ["parallel.tensor 2 with Muon, which needs full matrices"],
    ),
    "a pipeline with ZeRO-0": (
        {"megatronish": {"parallel": {"pipeline": 2}}, "zero_optimization": {"stage": 0}},
        ["parallel.pipeline 2 with zero_optimization.stage 0: DeepSpeed would clip by the gradient norm of one stage."],
    ),
    "more stages than blocks": (
        {"megatronish": {"parallel": {"pipeline": 64}}, "zero_optimization": {"stage": 1}},
        ["is smaller than --parallel.pipeline 64: a stage needs a block."],
    ),
    "heads that do not divide": (
        {"megatronish": {"parallel": {"tensor": 3}}, "zero_optimization": {"stage": 1}},
        ["model.num_attention_heads", "does not divide over 3 tensor-parallel ranks"],
    ),
    "a sequence divided by nobody": (
        {"megatronish": {"parallel": {"tensor_sequence": True}}},
        ["parallel.tensor_sequence divides the sequence over tensor-parallel ranks, and parallel.tensor is 1"],
    ),
    "unknown preset": (
        {"megatronish": {"model": {"preset": "tinny"}}},
        ['megatronish.model: unknown model preset "tinny". Did you mean "tiny"?', "s0_300m"],
    ),
    "heads not divisible": (
        {"megatronish": {"model": {"num_attention_heads": 6, "num_kv_heads": 6}}},
        ["megatronish.model: hidden_size 256 is not divisible by num_attention_heads 6: choose a divisor (4 or 8)"],
    ),
    "two mistakes at once": (
        {"train_micro_batch_size_per_gpu": 0, "wall_clock_breakdown": "no"},
        [
            '"train_micro_batch_size_per_gpu" is 0: input should be greater than or equal to 1.',
            '"wall_clock_breakdown" is',
        ],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict(changed(changes), "run.json")
    message = str(error.value)
    assert message.startswith("run.json: ")
    for expected in words:
        assert expected in message, message
    assert "pydantic" not in message


@pytest.mark.parametrize("key", OURS)
def test_what_megatronish_has_its_own_place_for(key: str) -> None:
    """DeepSpeed keys that are set elsewhere here are refused with that place, also in a file with other errors."""
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict(changed({key: {"enabled": True}, "gradient_clipping": ABSENT}), "run.json")
    assert str(error.value) == f'run.json: "{key}" is not read from here: {OURS[key]}.'


def test_integral_floats_are_integers() -> None:
    """`5e8` and `2.0` are how people write integers in these files; what is read are integers."""
    run = read(
        zero_optimization={"stage": 2.0, "reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 1e7},
        megatronish={"train": {"steps": 1e3}, "model": {"vocab_size": 8e3}},
    )
    zero = run.deepspeed.zero_optimization
    found = [zero.stage, zero.reduce_bucket_size, zero.prefetch_bucket_size, run.megatronish.train.steps]
    assert found == [2, 500_000_000, 10_000_000, 1000]
    assert all(type(value) is int for value in found)
    assert type(read(gradient_clipping=1).deepspeed.gradient_clipping) is float


def test_optimizer_names_in_any_case() -> None:
    assert read(optimizer={"type": "adamw"}).deepspeed.optimizer.type == "AdamW"


BATCHES: list[tuple[dict[str, int], int, str, int, int]] = [
    # given, data-parallel ranks, the equation, train_batch_size to set, accumulation to set
    ({"train_batch_size": 64, "micro": 4, "accumulation": 4}, 2, "(4 * 4 * dp 2 = 32)", 32, 8),
    ({"train_batch_size": 10, "micro": 4}, 2, "(10 / (train_micro_batch_size_per_gpu 4 * dp 2))", 8, 1),
    ({"train_batch_size": 10, "accumulation": 2}, 4, "(10 / (gradient_accumulation_steps 2 * dp 4))", 8, 2),
    ({"train_batch_size": 1, "micro": 4}, 2, "(1 / (train_micro_batch_size_per_gpu 4 * dp 2))", 8, 1),
    ({"train_batch_size": 2}, 4, "(2 / (gradient_accumulation_steps 1 * dp 4))", 4, 1),
]
NAMES = {"micro": "train_micro_batch_size_per_gpu", "accumulation": "gradient_accumulation_steps"}


def batch_run(given: dict[str, int]) -> RunConfig:
    """SMALLEST with these batch sizes and no others."""
    return read(**{"train_micro_batch_size_per_gpu": ABSENT, **{NAMES.get(key, key): n for key, n in given.items()}})


@pytest.mark.parametrize(("given", "ranks", "equation", "total", "accumulation"), BATCHES)
def test_impossible_batch(given: dict[str, int], ranks: int, equation: str, total: int, accumulation: int) -> None:
    """The equation with its values and two fixes, and both fixes are true."""
    with pytest.raises(ConfigError) as error:
        batch_run(given).batch_plan(ranks)
    message = str(error.value)
    assert f"train_batch_size {given['train_batch_size']} != train_micro_batch_size_per_gpu * " in message
    assert equation in message
    assert f"Either set train_batch_size to {total}, or remove it and set " in message
    assert message.endswith(f"gradient_accumulation_steps to {accumulation}.")
    assert batch_run({**given, "train_batch_size": total}).batch_plan(ranks).samples == total
    second = {key: n for key, n in given.items() if key != "train_batch_size"} | {"accumulation": accumulation}
    if "micro" not in given:
        assert "set train_micro_batch_size_per_gpu to 1 and gradient_accumulation_steps" in message
        second["micro"] = 1
    assert batch_run(second).batch_plan(ranks).accumulation == accumulation


@pytest.mark.parametrize(
    ("given", "ranks", "plan"),
    [
        ({"micro": 3}, 4, BatchPlan(3, 1, 4)),
        ({"micro": 3, "accumulation": 2}, 4, BatchPlan(3, 2, 4)),
        ({"train_batch_size": 24, "micro": 3}, 4, BatchPlan(3, 2, 4)),
        ({"train_batch_size": 24, "accumulation": 2}, 4, BatchPlan(3, 2, 4)),
        ({"train_batch_size": 24}, 4, BatchPlan(6, 1, 4)),
        ({"train_batch_size": 24, "micro": 3, "accumulation": 2}, 4, BatchPlan(3, 2, 4)),
    ],
)
def test_batch_arithmetic(given: dict[str, int], ranks: int, plan: BatchPlan) -> None:
    assert batch_run(given).batch_plan(ranks) == plan


def test_parallel_sizes_divide_the_world() -> None:
    parallel = read().megatronish.parallel.model_copy(update={"tensor": 2, "pipeline": 3})
    assert parallel.data_size(12) == 2
    with pytest.raises(ConfigError, match="tensor 2 x pipeline 3 x sequence 1 = 6 ranks do not divide the world of 8"):
        parallel.data_size(8)


BROKEN: dict[str, tuple[str, int, int, str]] = {
    "comma missing": ('{\n  "a": 1\n  "b": 2\n}', 3, 3, '  "b": 2'),
    "cut short": ('{\n  "a": 1,\n', 3, 1, ""),
    "comma too many": ('{"a": [1, 2,]}', 1, 13, '{"a": [1, 2,]}'),
    "empty": ("", 1, 1, ""),
    "single quotes": ("{'a': 1}", 1, 2, "{'a': 1}"),
    "a form feed inside a string": ('{"a": "\f",\n  b}', 1, 8, '{"a": "\f",'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json(name: str, tmp_path: Path) -> None:
    """Line and column, the line itself, and a caret below the place."""
    text, line, column, shown = BROKEN[name]
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_json(path)
    first, row, caret = str(error.value).split("\n")
    assert first.startswith(f"{path}: broken JSON at line {line}, ")
    found = int(first.split("column ")[1].split(":")[0])
    assert abs(found - column) <= 1  # Python 3.13 moved "Illegal trailing comma" by one
    assert row == f"  {shown}"
    assert caret == " " * (found + 1) + "^"


def test_a_repeated_key(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"zero_optimization": {"stage": 1, "stage": 2}}')
    with pytest.raises(ConfigError, match='run.json: the key "stage" occurs twice in one section; keep one.'):
        load_json(path)


def test_files_that_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "here.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"ther.json: no such file. There are: .*here.json"):
        load_json(tmp_path / "ther.json")
    with pytest.raises(ConfigError, match=r"x.json: no such file.$"):
        load_json(tmp_path / "none" / "x.json")
    with pytest.raises(ConfigError, match=r"here.json: holds a list, expected one JSON object."):
        load_json(tmp_path / "here.json")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load_json(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ConfigError, match=r"latin.json: cannot be read"):
        load_json(tmp_path / "latin.json")


def test_did_you_mean_keeps_quiet_when_nothing_is_near() -> None:
    assert did_you_mean("stage", ["stages", "overlap_comm"]) == ' Did you mean "stages"?'
    assert did_you_mean("xyz", ["stages", "overlap_comm"]) == ""


@pytest.mark.parametrize("is_first", [True, False])
def test_a_user_error_ends_the_program_without_a_traceback(
    is_first: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank prints at once; other ranks wait for the launcher to stop them, then print an error that only they had."""
    waits: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    with pytest.raises(SystemExit) as ended, exit_on_user_error(is_first, "rank 3 (node)"):
        raise ConfigError("the words")
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: the words\n" if is_first else "error: rank 3 (node): the words\n")
    assert waits == ([] if is_first else [errors.OTHER_RANK_DELAY_SECONDS])
    with pytest.raises(KeyError), exit_on_user_error():
        raise KeyError("a bug of ours is not dressed up as the user's error")
