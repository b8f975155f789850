"""Evaluation of a run on its held-out documents: a table for the terminal, and evaluation.json."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatronish.checkpoint.paths import EVALUATION_FILE, RUN_FILE
from megatronish.config.data import DataConfig
from megatronish.config.run import RunConfig
from megatronish.data.readers.inputs import is_stream
from megatronish.data.samples.dataset import IndexedDataset, check_dataset_fits, combined_fingerprint, open_dataset
from megatronish.data.training_data import split_of
from megatronish.errors import UserError
from megatronish.files import write_atomic
from megatronish.inference.evaluate import gzip_size, held_out_streams, score_streams, xz_size
from megatronish.inference.load import CheckpointInfo, Loaded


@dataclass(frozen=True)
class Evaluation:
    """The contents of evaluation.json. loss: nats per token; bits are per byte of raw text."""

    checkpoint: str
    step: int | None
    data: str
    held_out: bool  # False: all documents of a data set that the run was not trained on
    documents: int
    tokens: int
    text_bytes: int
    context: int
    stride: int
    loss: float
    perplexity: float
    bits_per_byte: float
    gzip_bits_per_byte: float
    xz_bits_per_byte: float
    exact_bytes: bool  # False: the tokenizer normalizes text, and the bytes are those of the normalized text
    seconds: float

    def save(self, run_dir: Path) -> Path:
        """Write run_dir/evaluation.json. Raises UserError if it cannot be written."""
        path = run_dir / EVALUATION_FILE
        try:
            write_atomic(path, json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        return path

    def table(self) -> str:
        """The results, and whether the model beats gzip and xz."""
        kind = "held-out documents" if self.held_out else "documents"
        rows = [("model", self.bits_per_byte), ("gzip -9", self.gzip_bits_per_byte), ("xz -9e", self.xz_bits_per_byte)]
        step = "" if self.step is None else f", step {self.step:,}"
        lines = [
            f"{self.checkpoint}{step}, on {self.documents:,} {kind} of {self.data}",
            f"{self.tokens:,} tokens, {self.text_bytes:,} bytes; context {self.context:,}, stride {self.stride:,}; "
            f"{self.seconds:.1f} s",
            f"loss {self.loss:.4f} nats per token, perplexity {self.perplexity:,.2f}",
            "",
            f"{'':10}{'bits per byte':>14}{'size':>9}",
            *(f"{name:10}{bits:>14.4f}{bits / 8:>9.1%}" for name, bits in rows),
            "",
            f"The model {_verdict(rows)}.",
        ]
        if not self.exact_bytes:
            lines.append("The tokenizer normalizes text: the bytes compared are those of the normalized text.")
        return "\n".join(lines)


def _verdict(rows: list[tuple[str, float]]) -> str:
    (_, model), *others = rows
    beaten = [name for name, bits in others if model < bits]
    unbeaten = [name for name, _ in others if name not in beaten]
    words = [f"beats {' and '.join(beaten)}"] if beaten else []
    words += [f"does not beat {' or '.join(unbeaten)}"] if unbeaten else []
    return " but ".join(words)


def evaluate_model(
    loaded: Loaded, data: str | None = None, stride: int | None = None, max_tokens: int | None = None
) -> Evaluation:
    """Evaluate a model on held-out text, with a progress bar on stderr.

    data: the prefix of a data set (default: that of run.json). The held-out documents of the run's own data are used,
    and all documents of another data set of the same tokenizer. stride: tokens scored per window (default: half the
    context). max_tokens: only the first documents, up to N tokens, at least one document. Raises UserError for a data
    set of another tokenizer, one that changed since training, and if nothing is held out.
    """
    start = time.monotonic()
    model, tokenizer, info = loaded
    run = _run_config(info, required=data is None)
    context = model.config.seq_length
    stride = max(1, context // 2) if stride is None else stride
    prefix = data or (_only_corpus(run.megatronish.data) if run else "")
    dataset = _open(prefix, run)
    check_dataset_fits(dataset.manifest, model.config.vocab_size, tokenizer.fingerprint, place=prefix)
    documents, held_out = _documents(dataset, info, run, named=data is not None)
    lengths = dataset.reader.document_lengths[documents]
    if max_tokens is not None:
        if max_tokens < 1:
            raise UserError(f"max tokens {max_tokens} must be at least 1")
        kept = max(1, int(np.searchsorted(np.cumsum(lengths), max_tokens, side="right")))
        documents, lengths = documents[:kept], lengths[:kept]
    mask = run.megatronish.data.document_mask if run else False
    # A model trained on data without end-of-document tokens has not learned that one precedes a text.
    start_id = tokenizer.eod_id if dataset.manifest.appended_eod and not mask else None
    if tokenizer.bos_id is not None:  # an imported model, whose texts start with its BOS token
        mask, start_id = True, tokenizer.bos_id
    interval = 0.2 if sys.stderr.isatty() else 10.0  # seconds
    with tqdm(desc="evaluating", total=int(lengths.sum()), unit=" tokens", mininterval=interval, leave=False) as bar:
        score = score_streams(
            model,
            held_out_streams(dataset.reader, documents, start_id, mask),
            stride,
            first_is_given=start_id is not None,
            vocab_size=tokenizer.vocab_size,
            progress=bar.update,
        )
    text = dataset.held_out_text(documents)
    if not text:
        raise UserError(f"{prefix}: the held-out documents have no text")
    return Evaluation(
        checkpoint=str(info.folder),
        step=info.step,
        data=prefix,
        held_out=held_out,
        documents=len(documents),
        tokens=score.tokens,
        text_bytes=len(text),
        context=context,
        stride=stride,
        loss=score.loss,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte(len(text)),
        gzip_bits_per_byte=8 * gzip_size(text) / len(text),
        xz_bits_per_byte=8 * xz_size(text) / len(text),
        exact_bytes=tokenizer.lossless,
        seconds=round(time.monotonic() - start, 2),
    )


def _run_config(info: CheckpointInfo, required: bool) -> RunConfig | None:
    path = info.folder / RUN_FILE
    if path.exists():
        return RunConfig.load(path)
    if required:
        raise UserError(f"{path} is missing, so the data set is not known: name it with --data PREFIX")
    return None


def _documents(
    dataset: IndexedDataset, info: CheckpointInfo, run: RunConfig | None, named: bool
) -> tuple[np.ndarray, bool]:
    """The documents to evaluate on, and whether they are a run's held-out ones."""
    reader = dataset.reader
    if run is not None and info.data_identity in (reader.identity, dataset.fingerprint, _blend_identity(dataset, run)):
        settings = run.megatronish.data
        held_out = split_of(settings, reader.num_documents).validation
        if not len(held_out):
            split = f"data.split {settings.split}" if settings.split else ""
            raise UserError(
                f"{dataset.prefix}: nothing is held out ({reader.num_documents} documents, "
                f"{split or f'data.validation_fraction {settings.validation_fraction}'}). "
                "Name another data set of the same tokenizer with --data PREFIX."
            )
        return held_out, True
    if not named:
        raise UserError(
            f"{dataset.prefix} is not the data set that this run trained on, so which documents were held out is not "
            "known: restore it, or evaluate on all of its documents with --data "
            f"{dataset.prefix} (the run may have been trained on some of them)."
        )
    return np.arange(reader.num_documents), False


def _open(prefix: str, run: RunConfig | None) -> IndexedDataset:
    """The data set, opened as in the run."""
    if run is None:
        return open_dataset(prefix)
    settings = run.megatronish.data
    return open_dataset(prefix, "sequence" if settings.order == "megatron" else "document", settings.tokenizer)


def _only_corpus(settings: DataConfig) -> str:
    """The prefix of a run's data set. Raises UserError if there are several."""
    names = [corpus.path for corpus in settings.corpora]
    if len(names) > 1:
        raise UserError(f"the run trained on {len(names)} data sets: choose one with --data: {', '.join(names)}")
    if is_stream(names[0]):
        raise UserError(
            f"the run was trained on streamed text ({names[0]}), of which nothing is held out: name an indexed data set of "
            "the same tokenizer with --data PREFIX"
        )
    return names[0]


def _blend_identity(dataset: IndexedDataset, run: RunConfig) -> str | None:
    """Fingerprint of the blend of a run's data sets, None unless this is one of several."""
    names = [corpus.path for corpus in run.megatronish.data.corpora]
    if any(map(is_stream, names)):
        return None
    if len(names) < 2 or dataset.prefix not in names:
        return None
    return combined_fingerprint([_open(name, run).fingerprint for name in names])
