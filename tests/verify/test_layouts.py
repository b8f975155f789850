"""tools/verify_parallel.py accepts correct layouts and reports faulty ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatronish.checkpoint.optimizer_shards import SavedOptimizerShards
from megatronish.errors import ConfigError
from megatronish.parallel import layers
from megatronish.verify.layout_report import Distance, LayoutVerdict, Verification, first_deviation, measure
from megatronish.verify.layouts import DEFAULT_LAYOUTS, layout_run, parse_layout
from megatronish.verify.runs import Trace, make_batch, plain_trace
from tools import verify_parallel


def test_layout_names() -> None:
    layout = parse_layout("tp2sdp2z2")
    assert layout.parallel.tensor == 2 and layout.parallel.tensor_sequence
    assert (layout.data, layout.stage, layout.ranks) == (2, 2, 4)
    assert parse_layout("pp2dp2").stage == 1
    sequence = parse_layout("tp2sp2").parallel
    assert sequence.sequence == 2 and not sequence.tensor_sequence
    for name in DEFAULT_LAYOUTS:
        assert parse_layout(name).ranks <= 4
    for name in ("", "tp", "tp2tp2", "dp2s", "tp2x", "2tp", "tp2 dp2", "tp0"):
        with pytest.raises(ConfigError, match="layout"):
            parse_layout(name)


def verdicts(
    *names: str, moves: tuple[str, ...] = (), tied: bool = True, dtype: str = "fp32", layers: int = 1
) -> list[LayoutVerdict]:
    small = {"megatronish": {"model": {"num_layers": layers, "hidden_size": 32, "num_attention_heads": 4}}}
    layouts, ends = ([parse_layout(name) for name in some] for some in (names, moves))
    return list(Verification(layouts, ends, dtype, 3, [tied], small, lambda what: None).verdicts())


@pytest.mark.distributed
def test_correct_layouts_agree_with_one_process() -> None:
    for verdict in [*verdicts("tp2s"), *verdicts("tp2dp2z2", dtype="bf16", tied=False)]:
        assert verdict.problem == "" and verdict.line().endswith("ok")
        assert verdict.distance is not None and verdict.distance.weight > 0  # another order of sums
        assert verdict.held is not None and verdict.formula is not None
        assert verdict.held.weights == verdict.formula.weights


@pytest.mark.distributed
def test_the_gradient_norm_exposes_unmarked_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the marks, DeepSpeed's ZeRO counts the tensor-parallel part of one rank only, without an error."""
    monkeypatch.setattr(layers, "_DEEPSPEED_MARK", "another_mark")
    (verdict,) = verdicts("tp2")
    assert verdict.problem.startswith("gradient norm of step 1 is")
    assert "FAILED" in verdict.line()


@pytest.mark.distributed
def test_moved_checkpoints_agree_with_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 2 and 3 after a move in both directions; a moment that is lost shows in the first step that depends on it."""
    there, back = verdicts(moves=("tp2", "pp2"), layers=2)
    assert (there.layout, back.layout) == ("tp2 > pp2", "pp2 > tp2")
    assert there.problem == back.problem == "" and there.distance is not None and there.distance.weight > 0
    read = SavedOptimizerShards.read
    monkeypatch.setattr(
        SavedOptimizerShards, "read", lambda self, kind, wanted: read(self, kind, wanted) * (kind != "exp_avg_sq")
    )
    there, back = verdicts(moves=("tp2", "pp2"), layers=2)
    assert "of step 3 is" in there.problem and "of step 3 is" in back.problem


@pytest.mark.distributed
def test_a_gradient_without_its_all_reduce_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under sequence parallelism the norms of each rank see a part of the sequence."""
    monkeypatch.setattr("megatronish.model.norm.all_reduce_gradient", lambda parameter, tp: None)
    (verdict,) = verdicts("tp2s")
    assert verdict.problem


@pytest.mark.distributed
def test_a_rank_that_fails_is_reported_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such wire")

    monkeypatch.setattr(layers, "start_all_reduce", broken)
    (verdict,) = verdicts("tp2")
    assert verdict.distance is None and "RuntimeError: no such wire" in verdict.problem
    assert "FAILED: rank" in verdict.line()


def test_the_first_deviation_is_named() -> None:
    bound = Distance(1e-5, 1e-5, 1e-5)
    weights = {"a": torch.zeros(2), "b": torch.ones(2)}
    expected = Trace([1.0, 2.0], [3.0, 4.0], weights)
    assert first_deviation(expected, expected, bound) == ""
    assert measure(expected, expected) == Distance(0.0, 0.0, 0.0)
    late = Trace([1.0, 2.1], [3.0, 4.0], weights)
    assert first_deviation(late, expected, bound).startswith("loss of step 2 is 2.1")
    norm = Trace([1.0, 2.0], [float("nan"), 4.0], weights)
    assert first_deviation(norm, expected, bound).startswith("gradient norm of step 1 is nan")
    weight = Trace([1.0, 2.0], [3.0, 4.0], {"a": torch.zeros(2), "b": torch.tensor([1.0, 1.1])})
    assert first_deviation(weight, expected, bound).startswith("b is off by 1.0e-01")
    assert measure(weight, expected).weight == pytest.approx(0.1)


def test_another_order_of_sums_is_the_same_arithmetic() -> None:
    config = layout_run(parse_layout("tp2"), "fp32", 3, True, {})
    plain, other = plain_trace(config), plain_trace(config, parts=2)
    apart = measure(other, plain)
    assert 0 < apart.loss < 1e-6 and 0 < apart.weight < 1e-5
    assert max(plain.norms) > config.deepspeed.gradient_clipping  # clipping takes effect


def test_batches_are_uneven_and_depend_on_step_and_sample_alone() -> None:
    config = layout_run(parse_layout("tp2"), "fp32", 3, True, {})
    four, two = make_batch(config, 1, range(4)), make_batch(config, 1, range(2, 4))
    assert torch.equal(four["tokens"][2:], two["tokens"]) and torch.equal(four["labels"][2:], two["labels"])
    counts = (four["labels"] != -100).sum(1)
    assert len(set(counts.tolist())) > 1
    assert not torch.equal(four["tokens"], make_batch(config, 2, range(4))["tokens"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layouts", "tp8"], "layout tp8 takes 8 ranks: add --ranks 8"),
        (["--layouts", "tp3", "--ranks", "8"], "tp3: model.num_attention_heads 8 does not divide over 3"),
        (["--layouts", "tp2z3"], "parallel.tensor 2 with zero_optimization.stage 3"),
        (["--layouts", "tp2z0", "--dtype", "bf16"], "DeepSpeed would clip by a wrong gradient norm"),
        (["--layouts", "xx"], 'layout "xx" cannot be read'),
        (["--layouts", "dp3"], "do not divide over 3 ranks"),
        (["--steps", "1"], "--steps must be at least 2, for moves halve it, and --ranks at least 1"),
        (["--model.layers", "3"], "unknown option --model.layers"),
        (["--deepspeed_config", "x.json"], "takes no --deepspeed_config"),
    ],
)
def test_bad_input(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["verify_parallel.py", *words])
    monkeypatch.setattr(verify_parallel, "initialize_process", lambda: None)
    with pytest.raises(SystemExit) as ended:
        verify_parallel.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.distributed
def test_the_output_and_exit_status_of_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--layouts", "tp2", "--steps", "2", "--ties", "tied", "--json", str(tmp_path / "table.json")]
    monkeypatch.setattr("sys.argv", ["verify_parallel.py", *words, "--model.num_layers", "1"])
    monkeypatch.setattr(verify_parallel, "initialize_process", lambda: None)
    assert verify_parallel.main() == 0
    printed = capsys.readouterr()
    assert "1 of 1 runs agree with one process" in printed.out and "1/1 tp2 on 2 ranks" in printed.err
    (line,) = json.loads((tmp_path / "table.json").read_text())
    assert line["layout"] == "tp2" and line["problem"] == "" and line["distance"]["loss"] < 1e-5
    monkeypatch.setattr(layers, "_DEEPSPEED_MARK", "another_mark")
    assert verify_parallel.main() == 1
