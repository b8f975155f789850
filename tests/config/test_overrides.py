"""The command line: every field by its dotted name, --help, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatronish.config.cli import fields, help_text, known_names, parse, type_name
from megatronish.config.deepspeed_json import DeepSpeedConfig
from megatronish.config.run import MegatronishConfig, RunConfig
from megatronish.errors import ConfigError
from tests.config.raw import SMALLEST


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"$schema": "./schema.json", **SMALLEST}))
    return path


def run_with(file: Path, *words: str) -> RunConfig:
    return parse(["--deepspeed_config", str(file), *words], "pretrain.py")


def value_at(run: RunConfig, dotted: str) -> Any:
    """The value that `--dotted` sets."""
    first = dotted.split(".")[0]
    found: Any = run.megatronish if first in MegatronishConfig.model_fields else run.deepspeed
    for part in dotted.split("."):
        found = getattr(found, part.removeprefix("stage3_"))
    return found


OVERRIDES: list[tuple[list[str], str, Any]] = [
    (["--train.steps", "20"], "train.steps", 20),
    (["--train.steps=20"], "train.steps", 20),
    (["--megatronish.train.steps", "20"], "train.steps", 20),
    (["--train.steps", "20", "--train.steps", "30"], "train.steps", 30),
    (["--train.compile", "true"], "train.compile", True),
    (["--train.compile", "True"], "train.compile", True),
    (["--train.save_dir", "runs/new"], "train.save_dir", "runs/new"),
    (["--train.save_dir=a=b"], "train.save_dir", "a=b"),
    (["--train.save_dir", "2026"], "train.save_dir", "2026"),
    (["--train.save_dir", "true"], "train.save_dir", "true"),
    (["--train.save_dir", '"2026"'], "train.save_dir", "2026"),
    (["--data.path", "1e5"], "data.path", "1e5"),
    (["--train.eval_tokens", "null"], "train.eval_tokens", None),
    (["--train.eval_tokens", "None"], "train.eval_tokens", None),
    (["--model.rope_scaling", '{"type": "linear", "factor": 2}'], "model.rope_scaling.factor", 2.0),
    (["--optimizer.params.betas", "[0.8, 0.9]"], "optimizer.params.betas", (0.8, 0.9)),
    (["--optimizer.params.lr", "2e-4"], "optimizer.params.lr", 2e-4),
    (["--train_micro_batch_size_per_gpu", "7"], "train_micro_batch_size_per_gpu", 7),
    (["--zero_optimization.stage", "0"], "zero_optimization.stage", 0),
    (["--zero_optimization.reduce_bucket_size", "5e7"], "zero_optimization.reduce_bucket_size", 50_000_000),
    (["--zero_optimization.stage3_prefetch_bucket_size", "9"], "zero_optimization.stage3_prefetch_bucket_size", 9),
    (["--zero_optimization.offload_optimizer.device", "cpu"], "zero_optimization.offload_optimizer.device", "cpu"),
    (["--zero_optimization", '{"stage": 2}'], "zero_optimization.stage", 2),
    (["--train", '{"steps": 3}'], "train.steps", 3),
    (["--local_rank=1", "--train.steps", "5"], "train.steps", 5),
    (["--local_rank", "0", "--deepspeed", "--train.steps", "5"], "train.steps", 5),
]


@pytest.mark.parametrize(
    ("words", "dotted", "value"), OVERRIDES, ids=lambda value: "_".join(value) if isinstance(value, list) else ""
)
def test_override(words: list[str], dotted: str, value: Any, file: Path) -> None:
    assert value_at(run_with(file), dotted.split(".")[0]) is not None
    found = value_at(run_with(file, *words), dotted)
    assert (found, type(found)) == (value, type(value))


def test_an_override_leaves_the_rest_alone(file: Path) -> None:
    """Only the named field differs from the file, also if an entire section is given."""
    plain, changed = run_with(file).to_json(), run_with(file, "--train", '{"steps": 3}').to_json()
    assert changed["megatronish"]["train"].pop("steps") == 3
    assert plain["megatronish"]["train"].pop("steps") == 10
    assert changed == plain


def test_a_section_can_be_taken_out(file: Path) -> None:
    raw = json.loads(file.read_text())
    raw["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    file.write_text(json.dumps(raw))
    assert run_with(file).deepspeed.zero_optimization.offloads_optimizer
    assert not run_with(
        file, "--zero_optimization.offload_optimizer", "null"
    ).deepspeed.zero_optimization.offloads_optimizer


def test_a_preset_replaces_the_model_of_the_file(file: Path) -> None:
    """Fields that the file changed belong to its own preset; fields next to the override stay."""
    raw = json.loads(file.read_text())
    raw["megatronish"]["model"] = {"preset": "s0_300m", "num_layers": 3, "vocab_size": 999}
    file.write_text(json.dumps(raw))
    assert (run_with(file).megatronish.model.hidden_size, run_with(file).megatronish.model.num_layers) == (1024, 3)
    for words in (["--model.preset", "tiny"], ["--model", '{"preset": "tiny"}']):
        model = run_with(file, *words, "--model.num_layers", "2").megatronish.model
        assert (model.preset, model.num_layers, model.hidden_size, model.vocab_size) == ("tiny", 2, 256, 4096)
    model = run_with(file, "--model.num_layers", "5").megatronish.model
    assert (model.preset, model.num_layers, model.vocab_size) == ("s0_300m", 5, 999)


REFUSED: list[tuple[list[str], str]] = [
    (["--train.stepz", "5"], 'unknown option --train.stepz. Did you mean "train.steps"? See --help'),
    (["--steps", "5"], "unknown option --steps."),
    (["--megatronish", "{}"], "unknown option --megatronish."),
    (["--train.steps"], "--train.steps needs a value, e.g. --train.steps 1."),
    (["--train.steps", "--train.seed", "1"], "--train.steps needs a value"),
    (["20"], '"20" follows no option. Options look like --train.steps 100.'),
    (["-v"], '"-v" follows no option.'),
    (["--train.steps", "ten"], "\"megatronish.train.steps\" is 'ten': input should be a valid integer"),
    (["--train.steps", "0"], '"megatronish.train.steps" is 0: input should be greater than or equal to 1.'),
    (["--train.steps", '"5"'], "\"megatronish.train.steps\" is '5': input should be a valid integer"),
    (["--train.seed", "-1"], '"megatronish.train.seed" is -1: input should be greater than or equal to 0.'),
    (["--model", "null"], '"megatronish.model" is None: input should be a valid dictionary'),
    (["--model", "5"], '"megatronish.model" is 5: input should be a valid dictionary'),
    (["--train.save_dir", "null"], '"megatronish.train.save_dir" is None: input should be a valid string.'),
    (["--kernels.ops", "compiled"], "'compiled' was removed: set train.compile true, which compiles the blocks"),
    (["--model.preset", "tinny"], 'unknown model preset "tinny". Did you mean "tiny"?'),
]


@pytest.mark.parametrize(
    ("words", "message"), REFUSED, ids=lambda value: "_".join(value) if isinstance(value, list) else ""
)
def test_refused_override(words: list[str], message: str, file: Path) -> None:
    with pytest.raises(ConfigError) as error:
        run_with(file, *words)
    assert message in str(error.value)


def test_overrides_are_named_as_the_place(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.json with the command line's overrides: "):
        run_with(file, "--train.steps", "0")


def test_no_file(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"which run\? Add --deepspeed_config ds_configs/FILE.json"):
        parse(["--train.steps", "5"], "pretrain.py")
    assert parse([], "pretrain.py", default_config=str(file)).megatronish.train.steps == 10
    assert parse([f"--deepspeed-config={file}"], "pretrain.py").megatronish.train.steps == 10


@pytest.mark.parametrize("model", [DeepSpeedConfig, MegatronishConfig])
def test_help_lists_every_field_with_its_meaning(model: Any) -> None:
    lines = help_text("launchers/pretrain.py").splitlines()
    listed = list(fields(model))
    assert len(listed) > 40
    for name, field in listed:
        place = [number for number, line in enumerate(lines) if line.startswith(f"  --{name} ")]
        assert len(place) == 1, name
        assert field.description, f"{name} has no description"
        assert lines[place[0] + 1] == " " * 8 + field.description
        assert type_name(field.annotation) in lines[place[0]]


def test_help_shows_types_and_defaults() -> None:
    text = help_text("launchers/pretrain.py")
    for line in (
        "  --train.steps INT (needed)",
        "  --train.keep_last INT (default 2)",
        "  --train.eval_tokens INT|null (default null)",
        '  --schedule.type cosine|linear|constant|wsd (default "cosine")',
        "  --gradient_clipping FLOAT (needed)",
        "  --optimizer.params.betas [FLOAT,FLOAT]|null (default null)",
        "  --zero_optimization.stage3_prefetch_bucket_size INT (default 50000000)",
    ):
        assert line in text.splitlines()


def test_help_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--no-such-option", "1", "--help"][2:], "launchers/pretrain.py")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: deepspeed launchers/pretrain.py --deepspeed_config")


def test_no_two_fields_share_a_name() -> None:
    """Ours are written without "megatronish": none of them may hide a DeepSpeed key."""
    assert not set(MegatronishConfig.model_fields) & set(DeepSpeedConfig.model_fields)
    names = known_names()
    assert names["train.steps"] == ("megatronish", "train", "steps")
    assert names["zero_optimization.offload_param.device"] == ("zero_optimization", "offload_param", "device")
    assert names["zero_optimization"] == ("zero_optimization",)
