"""generate.py and evaluate.py as a user runs them, and their messages for bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launchers import evaluate as evaluate_launcher
from launchers import generate as generate_launcher
from megatronish.checkpoint.weights import load_model
from megatronish.data.tokenizers.tokenizer import ByteTokenizer
from megatronish.errors import UserError
from megatronish.inference import chat
from megatronish.inference.batch import generate
from megatronish.inference.load import load_for_inference
from megatronish.inference.sampling import Sampling

ROOT = Path(__file__).resolve().parents[2]


def launch(script, *arguments, **options):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(ROOT / "launchers" / script), *arguments]
    return subprocess.run(command, capture_output=True, env=env, timeout=120, cwd=ROOT, **options)


def generate_status(monkeypatch, *arguments):
    """Exit status of generate.py in this process."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    monkeypatch.setattr(generate_launcher, "initialize_process", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        generate_launcher.main()
    return stopped.value.code


def test_generate(run, model):
    done = launch("generate.py", "--checkpoint", str(run.folder), "--prompt", "def ", "--prompt", "né", "--max-new-tokens",
                  "12", "--temperature", "1.1", "--top-k", "50", "--top-p", "0.9", "--seed", "3", "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    tokenizer, expected = ByteTokenizer(), ""
    for prompt in ("def ", "né"):
        ids = list(
            generate(
                model,
                [256, *prompt.encode()],
                12,
                Sampling(1.1, 50, 0.9),
                256,
                torch.Generator().manual_seed(3),
            )
        )
        expected += prompt + tokenizer.decode(ids) + "\n"
    # Compare bytes: universal newlines would hide a generated carriage return.
    assert done.stdout == expected.encode()
    assert done.stderr.decode().count("tokens; prompt of") == 2
    assert "[24 tokens in" in done.stderr.decode()


def test_a_conversation_over_a_pipe(run):
    done = launch("generate.py", "--checkpoint", str(run.folder), "--interactive", "--max-new-tokens", "4", "--greedy",
                  "--device", "cpu", input=b"/set top_k 3\nhi\n/nonsense\n/history\n/quit\nnever read\n")  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    shown = done.stderr.decode()
    assert "top_k 3" in shown and "error: no command /nonsense" in shown and "user: hi" in shown
    assert "never read" not in shown and done.stdout.endswith(b"\n")


def test_evaluate_prints_and_writes(run):
    done = launch("evaluate.py", "--checkpoint", str(run.folder), "--stride", "32", "--device", "cpu")
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads((run.folder / "evaluation.json").read_text())
    shown = done.stdout.decode()
    assert found["stride"] == 32
    for name, key in (("model", ""), ("gzip -9", "gzip_"), ("xz -9e", "xz_")):
        assert f"{name:10}{found[key + 'bits_per_byte']:>14.4f}" in shown


def test_bad_input_is_one_line_and_status_2(run):
    done = launch("generate.py", "--checkpoint", str(run.folder), "--temperature", "-1")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().splitlines() == [
        "error: temperature -1.0 must be a number of at least 0 (0 takes the best token)"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "1.5"], "top-p 1.5 must be above 0"),
        (["--top-k", "-2"], "top-k -2"),
        (["--min-p", "2"], "min-p 2.0"),
        (["--lookup", "-1"], "--lookup -1 must be at least 0"),
        (["--stop", ""], "a stop string is empty"),
        (["--max-new-tokens", "0"], "max new tokens 0 must be at least 1"),
        (["--prompt", "fits", "--prompt", "x" * 33], "the prompt has 34 tokens, but the model's context is 32"),
        (["--checkpoint", "nowhere/run"], "nowhere/run: no such folder"),
        (["--checkpoint", str(ROOT / "launchers")], "launchers: holds no complete checkpoint"),
    ],
)
def test_bad_input(run, capsys, monkeypatch, arguments, message):
    assert generate_status(monkeypatch, "--checkpoint", str(run.folder), "--device", "cpu", *arguments) == 2
    shown = capsys.readouterr()
    assert re.search(message, shown.err)
    assert shown.out == "", "all prompts are checked before the first completion"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(run, capsys, monkeypatch):
    assert generate_status(monkeypatch, "--checkpoint", str(run.folder), "--device", "cuda") == 2
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err


def test_both_need_a_checkpoint(capsys):
    for launcher in (generate_launcher, evaluate_launcher):
        with pytest.raises(SystemExit) as stopped:
            launcher.build_parser().parse_args([])
        assert stopped.value.code == 2 and "--checkpoint" in capsys.readouterr().err


class TestLoading:
    def test_best_then_latest_then_newest(self, run, tmp_path):
        folder = tmp_path / "r"
        shutil.copytree(run.folder, folder)
        assert load_for_inference(folder)[2].step == 2
        assert load_for_inference(folder / "checkpoints" / "step-00000003")[2].step == 3
        (folder / "checkpoints" / "best").unlink()
        assert load_for_inference(folder)[2].step == 3
        (folder / "checkpoints" / "latest").unlink()
        assert load_for_inference(folder / "checkpoints")[2].step == 3

    def test_weights_and_dtype(self, run, model):
        loaded, tokenizer, info = load_for_inference(run.folder, dtype=torch.bfloat16)
        state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
        assert not loaded.training and (tokenizer.kind, tokenizer.eod_id) == ("bytes", 256)
        assert torch.equal(load_model(info.folder).embedding.weight, model.embedding.weight)

    def test_files_that_do_not_belong_together(self, run, tmp_path):
        folder = tmp_path / "c"
        shutil.copytree(run.folder / "checkpoints" / "step-00000002", folder)
        for name in ("manifest.json", "state.json"):  # as exported: a checkpoint's own files are checked before
            (folder / name).unlink()
        record = folder / "tokenizer_record.json"
        content = json.loads(record.read_text())

        def refused(message):
            with pytest.raises(UserError, match=message):
                load_for_inference(folder)

        record.write_text(json.dumps({**content, "sha256": "0" * 64}))
        refused("is not the one the model was trained with")
        record.write_text("{")
        refused("tokenizer_record.json: cannot be read, not JSON")
        record.write_text("[]")
        refused("not a JSON object")
        record.write_text("{}")
        refused("no 'kind' in it")
        record.unlink()
        refused(r"tokenizer_record.json: cannot be read \(No such file or directory\)")
        record.write_text(json.dumps(content))
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        refused("torn or not a safetensors file")


def test_ctrl_c_ends_an_answer_not_the_conversation(run, monkeypatch):
    """Ctrl-C ends the launcher, except in a conversation, where it is an exception."""
    handlers = []
    monkeypatch.setattr(chat, "Chat", lambda *_, **__: handlers.append(signal.getsignal(signal.SIGINT)) or sys.exit(0))
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        generate_status(monkeypatch, "--checkpoint", str(run.folder), "--interactive", "--device", "cpu")
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [signal.default_int_handler]
