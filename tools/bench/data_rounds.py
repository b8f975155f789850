"""One contestant of tools/bench/data.py in a process of its own: sets up, then runs a round for every line on stdin.

Usage: data_rounds.py ROLE JSON_ARGUMENTS. Prints {"ready": ...} after the set-up and one JSON object a round, each
on a line of its own; the set-up (imports, opening, tokenizers) is never in a round's time. It imports what its role needs
and nothing else, so that a peer's role runs in a Python without megatronish's dependencies.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BATCH_BYTES = 2_000_000
Round = Callable[[], dict[str, Any]]


def batches_of(corpus: str) -> tuple[list[list[str]], int]:
    """The texts of a JSON-lines file in batches of about BATCH_BYTES characters, and their size in UTF-8 bytes."""
    batches: list[list[str]] = [[]]
    size = total = 0
    with open(corpus, encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            total += len(text.encode("utf-8"))
            batches[-1].append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                batches.append([])
                size = 0
    return [batch for batch in batches if batch], total


def encode_hf(arguments: dict[str, Any]) -> Round:
    """`encode_batch_fast` of Hugging Face tokenizers alone, on texts that lie in memory."""
    from tokenizers import Tokenizer

    def fresh() -> Callable[[list[str]], object]:
        tokenizer = Tokenizer.from_file(f"{arguments['tokenizer']}/tokenizer.json")
        return lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    return _encoder(arguments["corpus"], fresh)


def encode_gigatoken(arguments: dict[str, Any]) -> Round:
    """gigatoken's `encode_batch` alone, on texts that lie in memory."""
    gigatoken = importlib.import_module("gigatoken")

    def fresh() -> Callable[[list[str]], object]:
        tokenizer = gigatoken.Tokenizer(f"{arguments['tokenizer']}/tokenizer.json")
        return lambda texts: tokenizer.encode_batch(texts, parallel=True)

    return _encoder(arguments["corpus"], fresh)


def _encoder(corpus: str, fresh: Callable[[], Callable[[list[str]], object]]) -> Round:
    """A round takes a tokenizer that is `fresh`: tokenizers remember words, and no run meets its corpus twice."""
    batches, size = batches_of(corpus)
    fresh()(batches[0])  # starts the threads

    def go() -> dict[str, Any]:
        encode = fresh()
        start, used = time.perf_counter(), time.process_time()
        for batch in batches:
            encode(batch)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "cpu_seconds": time.process_time() - used, "bytes": size}

    return go


def reads_ours(arguments: dict[str, Any]) -> Round:
    """Packed samples as the tensors that training takes; with `mask` positions and cu_seqlens too."""
    import numpy as np

    from megatronish.data.indexed.format import IndexedReader
    from megatronish.data.loader import to_tensors
    from megatronish.data.samples.batches import batch_of
    from megatronish.data.samples.packing import PackedDataset

    reader = IndexedReader(arguments["prefix"])
    dataset = PackedDataset(reader, np.arange(reader.num_documents), arguments["seq_length"], seed=1)
    mask = arguments["mask"]

    def read(numbers: list[int]) -> object:
        return to_tensors(batch_of(dataset.rows(np.array(numbers)), mask))

    return _reader(read, dataset.samples_per_epoch, arguments)


def reads_megatron(arguments: dict[str, Any]) -> Round:
    """`GPTDataset.__getitem__`; with `mask` positions and loss mask are reset at document ends."""
    from torch.utils.data import default_collate

    dataset = _gpt_dataset(arguments)

    def read(numbers: list[int]) -> object:
        samples = [dataset[number] for number in numbers]
        return default_collate(samples) if len(samples) > 1 else samples[0]

    return _reader(read, len(dataset), arguments)


def _reader(read: Callable[[list[int]], object], samples: int, arguments: dict[str, Any]) -> Round:
    """Samples a second of processor time: one thread that waits for nothing, so on an idle machine a second by the clock."""
    state = {"next": 0}
    read([0])

    def rate(batch: int) -> float:
        first, count = state["next"], arguments["samples"]
        state["next"] += count
        start = time.process_time()
        for number in range(first, first + count, batch):
            read([n % samples for n in range(number, number + batch)])
        return count / (time.process_time() - start)

    return lambda: {"alone": rate(1), "batch": rate(arguments["batch"])}


def index_ours(arguments: dict[str, Any]) -> Round:
    """From the path to the first sample, then random samples of the epoch and the first of another epoch."""
    import numpy as np

    from megatronish.data.indexed.format import IndexedReader
    from megatronish.data.samples.packing import PackedDataset

    def go() -> dict[str, Any]:
        start = time.perf_counter()
        reader = IndexedReader(arguments["prefix"])
        opened = time.perf_counter()
        dataset = PackedDataset(reader, np.arange(reader.num_documents), arguments["seq_length"], seed=1)
        dataset.rows(np.zeros(1, dtype=np.int64))
        built = time.perf_counter()
        state = json.dumps({"consumed_samples": 2**62, "seed": 2**62, "data_identity": reader.identity})
        seeks = []
        for number in random.Random(0).sample(range(dataset.samples_per_epoch), 200):
            before = time.perf_counter()
            dataset.rows(np.array([number]))
            seeks.append(time.perf_counter() - before)
        before = time.perf_counter()
        dataset.rows(np.array([7 * dataset.samples_per_epoch]))
        other_epoch = time.perf_counter() - before
        return {
            "seconds": built - start,
            "open_seconds": opened - start,
            "worst_seek_seconds": max(seeks),
            "other_epoch_seconds": other_epoch,
            "state_bytes": len(state),
        }

    return go


def index_megatron(arguments: dict[str, Any]) -> Round:
    """From the path to the first sample of GPTDataset with an empty cache folder, whose size is told too."""

    def go() -> dict[str, Any]:
        cache = Path(arguments["cache"])
        shutil.rmtree(cache, ignore_errors=True)
        start = time.perf_counter()
        _gpt_dataset(arguments)[0]
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        return {"seconds": seconds, "cache_bytes": size}

    _gpt_dataset(arguments)  # the modules that it imports on first use are set-up
    return go


def _gpt_dataset(arguments: dict[str, Any]) -> Any:
    """One epoch of megatron-core's GPTDataset over a whole indexed data set."""
    import numpy as np

    gpt = importlib.import_module("megatron.core.datasets.gpt_dataset")
    utils = importlib.import_module("megatron.core.datasets.utils")
    mask = arguments.get("mask", False)

    vocabulary = SimpleNamespace(vocab_size=arguments["eod"] + 1, eod=arguments["eod"], pad=-1, unique_identifiers={})
    config = gpt.GPTDatasetConfig(
        random_seed=1,
        sequence_length=arguments["seq_length"],
        split="100,0,0",
        path_to_cache=arguments["cache"],
        tokenizer=vocabulary,
        reset_position_ids=mask,
        reset_attention_mask=mask,
        eod_mask_loss=mask,
        create_attention_mask=False,
    )
    low_level = gpt.GPTDataset.build_low_level_dataset(arguments["prefix"], config)
    documents = np.arange(len(low_level.sequence_lengths), dtype=np.int32)
    return gpt.GPTDataset(low_level, arguments["prefix"], documents, None, utils.Split.train, config)


def hf_map(arguments: dict[str, Any]) -> Round:
    """`datasets.map` with the same tokenizer to an Arrow data set on the disk: one round is the whole job."""
    from datasets import load_dataset
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{arguments['tokenizer']}/tokenizer.json")
    eod = tokenizer.get_vocab_size() - 1

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [[*encoding.ids, eod] for encoding in encodings]}

    def go() -> dict[str, Any]:
        start = time.perf_counter()
        data = load_dataset("json", data_files=arguments["corpus"], split="train", cache_dir=arguments["cache"])
        data.map(encode, batched=True, remove_columns=data.column_names).save_to_disk(arguments["output"])
        return {"seconds": time.perf_counter() - start}

    return go


def stream_ours(arguments: dict[str, Any]) -> Round:
    """Packed samples straight from JSON lines by data/streams/streaming.py; every round goes on where the last one ended."""
    from megatronish.data.streams.streaming import StreamOptions, open_stream

    tokenizer = f"{arguments['tokenizer']}/tokenizer.json"
    options = StreamOptions(tokenizer=tokenizer, seq_length=arguments["seq_length"], seed=1)
    reader = open_stream(arguments["corpus"], options).open(0, 1)
    return _stream(lambda: reader.next_sample()[0], arguments)


def stream_datasets(arguments: dict[str, Any]) -> Round:
    """The same work by `datasets`: streamed JSON, its shuffle buffer of as many documents, batched tokenising, packing."""
    import numpy as np
    from datasets import load_dataset
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{arguments['tokenizer']}/tokenizer.json")
    eod, length = tokenizer.get_vocab_size() - 1, arguments["seq_length"]

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [[*encoding.ids, eod] for encoding in encodings]}

    def samples() -> Iterator[Any]:
        left: list[int] = []
        while True:
            data = load_dataset("json", data_files=arguments["corpus"], split="train", streaming=True)
            data = data.shuffle(seed=1, buffer_size=10_000).map(
                encode, batched=True, batch_size=32, remove_columns="text"
            )
            for row in data:
                left += row["ids"]
                while len(left) > length:
                    yield np.array(left[: length + 1], dtype=np.int64)
                    del left[:length]

    return _stream(samples().__next__, arguments)


def _stream(read: Callable[[], Any], arguments: dict[str, Any]) -> Round:
    start = time.perf_counter()
    read()
    first = time.perf_counter() - start

    def go() -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(arguments["samples"]):
            read()
        return {"samples_per_second": arguments["samples"] / (time.perf_counter() - start), "first_seconds": first}

    return go


ROLES: dict[str, Callable[[dict[str, Any]], Round]] = {
    "encode_hf": encode_hf,
    "encode_gigatoken": encode_gigatoken,
    "reads_ours": reads_ours,
    "reads_megatron": reads_megatron,
    "index_ours": index_ours,
    "index_megatron": index_megatron,
    "hf_map": hf_map,
    "stream_ours": stream_ours,
    "stream_datasets": stream_datasets,
}


@contextlib.contextmanager
def answers_only() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one JSON line to the real stdout; what libraries print goes to stderr."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        channel.write(json.dumps(content) + "\n")
        channel.flush()

    with channel:
        yield answer


def main() -> int:
    """Sets up the role and serves rounds until stdin ends."""
    with answers_only() as answer:
        go = ROLES[sys.argv[1]](json.loads(sys.argv[2]))
        answer({"ready": sys.argv[1]})
        for _ in sys.stdin:
            answer(go())
    return 0


if __name__ == "__main__":
    sys.exit(main())
