"""Inputs of tools/bench/data.py: text, a tokenizer for it, and data sets of random tokens."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import orjson

from megatronish.data.indexed.builder import IndexedWriter
from megatronish.data.indexed.format import HEADER, MAGIC, VERSION, bin_path
from megatronish.data.tokenizers.formats import EOD_TOKEN
from megatronish.preprocessing.corpus import default_corpus

EOD = 31_999


def documents(size: int) -> Iterator[str]:
    """About `size` bytes of text in documents of about 4 kB, split between paragraphs, repeated if there is too little.

    The text is the default corpus. Documents that contain the characters of the end-of-document token are left out:
    Megatron's tools encode them as the token, ours as text.
    """
    texts = default_corpus(lambda warning: None, enough_bytes=size)
    produced = 0
    for document in itertools.cycle(piece for _, text in texts for piece in paragraphs(text, 4000)):
        if EOD_TOKEN not in document:
            yield document
            produced += len(document.encode("utf-8"))
            if produced >= size:
                return


def growing_documents(size: int) -> Iterator[str]:
    """The same, each document followed by eight words that occur nowhere else: the set of known words never stops growing."""
    draw = random.Random(0)
    produced = 0
    texts = itertools.cycle(documents(100_000_000))
    while produced < size:
        words = draw.getrandbits(8 * 48)
        text = f"{next(texts)}{' '.join(f'{words >> 48 * i & (1 << 48) - 1:x}' for i in range(8))}\n"
        produced += len(text.encode("utf-8"))
        yield text


def write_corpus(path: Path, texts: Iterable[str]) -> int:
    """Writes JSON lines; returns the UTF-8 bytes of the texts."""
    size = 0
    with open(path, "wb") as file:
        for text in texts:
            size += len(text.encode("utf-8"))
            file.write(orjson.dumps({"text": text}) + b"\n")
    return size


def paragraphs(text: str, size: int) -> Iterator[str]:
    """Runs of full paragraphs of at least `size` characters, the last one shorter."""
    run = ""
    for paragraph in text.split("\n\n"):
        run += paragraph + "\n\n"
        if len(run) >= size:
            yield run
            run = ""
    if run.strip():
        yield run


def train_tokenizer(texts: Iterator[str], folder: Path) -> None:
    """Trains and saves the benchmark's tokenizer; its last id is the end-of-document token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=EOD, initial_alphabet=alphabet, show_progress=False))
    raw.add_special_tokens([AddedToken(EOD_TOKEN, special=True, normalized=False)])
    folder.mkdir()
    raw.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD_TOKEN}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def text_bytes(corpus: Path) -> int:
    """UTF-8 bytes of the texts of a corpus, of which all rates are."""
    with open(corpus, encoding="utf-8") as file:
        return sum(len(json.loads(text)["text"].encode("utf-8")) for text in file)


def random_tokens(prefix: Path, length: int, total: int) -> str:
    """A data set of `total` random tokens in documents of about `length`, each with its end-of-document token."""
    if not prefix.with_suffix(".idx").exists():
        draw = np.random.default_rng(0)
        writer = IndexedWriter(prefix, "<u2")
        for size in draw.integers(length // 5, 2 * length - length // 5, total // length):
            tokens = draw.integers(0, EOD, size, dtype=np.uint16)
            tokens[-1] = EOD
            writer.add_document(tokens)
        writer.finalize()
    return str(prefix)


def many_documents(prefix: Path, count: int) -> str:
    """An index of that many documents of about 100 tokens; the tokens are a hole in the .bin."""
    if not prefix.with_suffix(".idx").exists():
        lengths = np.random.default_rng(0).integers(20, 181, count).astype("<i4")
        offsets = np.zeros(count, dtype="<i8")
        np.cumsum(2 * lengths[:-1].astype(np.int64), out=offsets[1:])
        with open(bin_path(prefix), "wb") as tokens:
            tokens.truncate(2 * int(lengths.sum(dtype=np.int64)))
        with open(prefix.with_suffix(".idx"), "wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, 8, count, count + 1))
            for values in (lengths, offsets, np.arange(count + 1, dtype="<i8")):
                index.write(values.tobytes())
    return str(prefix)
