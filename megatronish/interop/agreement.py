"""Compares logits and token ids with those of transformers for the same weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megatronish.checkpoint.paths import TOKENIZER_RECORD_FILE
from megatronish.checkpoint.weights import load_model
from megatronish.data.tokenizers.tokenizer import load_tokenizer
from megatronish.errors import UserError
from megatronish.interop.tokenizer_files import TOKENIZER_FILES

PROBE_TOKENS = 128
PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # two blanks, then a comment\n\n\tif x:\r\n",
    "naïve café, Ελληνικά, 中文字符, 한국어, \U0001f600\U0001f468‍\U0001f469‍\U0001f467, a  b   c",
    "  leading and trailing  ",
    "1234567890 3.14159 1,000,000 <|endoftext|> </s>",
)


@dataclass(frozen=True)
class Agreement:
    """difference: largest absolute difference of logits, relative to the largest logit. tokens: number of rows of logits;
    same_best: how many have the same argmax. texts: how many of PROBE_TEXTS have the same ids; None: no tokenizer."""

    difference: float
    tokens: int
    same_best: int
    texts: int | None

    def lines(self) -> list[str]:
        """A report for the terminal."""
        lines = [
            f"logits agree with transformers to {self.difference:.1e} of the largest (fp32, {self.tokens} tokens, the same "
            f"best token at {self.same_best})"
        ]
        if self.texts is not None:
            lines.append(f"token ids agree with AutoTokenizer on {self.texts} of {len(PROBE_TEXTS)} probe texts")
        return lines


def why_not(parameters: int) -> str | None:
    """Why the models cannot be compared on this machine, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    needed, free = 2 * 4 * parameters, psutil.virtual_memory().available
    if needed > 0.8 * free:
        return f"two fp32 copies of the model need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
    return None


@torch.inference_mode()
def compare(ours: Path, theirs: Path) -> Agreement:
    """Load the model of both folders in fp32 on the CPU; compare logits of random tokens, and token ids of texts.

    Raises UserError if transformers cannot open the folder.
    """
    from transformers import AutoModelForCausalLM

    model = load_model(ours, dtype=torch.float32)
    length = min(PROBE_TOKENS // 2, model.config.seq_length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    mine = model(tokens)
    del model
    try:
        reference = AutoModelForCausalLM.from_pretrained(
            theirs, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{theirs}: transformers cannot open it: {error}") from None
    other = reference(tokens, use_cache=False).logits
    difference = ((mine - other).abs().max() / other.abs().max()).item()
    same = int((mine.argmax(-1) == other.argmax(-1)).sum())
    return Agreement(difference, tokens.numel(), same, _same_texts(ours, theirs))


def _same_texts(ours: Path, theirs: Path) -> int | None:
    if not (ours / TOKENIZER_RECORD_FILE).is_file() or not any((theirs / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    own = load_tokenizer(ours if any((ours / name).is_file() for name in TOKENIZER_FILES) else "bytes")
    try:
        other = AutoTokenizer.from_pretrained(theirs, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"{theirs}: transformers cannot open its tokenizer: {error}") from None
    encode = {"add_special_tokens": False, "split_special_tokens": True}
    return sum(own.encode(text).tolist() == other(text, **encode)["input_ids"] for text in PROBE_TEXTS)
