"""One round of a contestant of tools/bench/data.py: `data_rounds.py ROLE JSON_ARGUMENTS` prints what it measured as JSON.

The set-up (imports, opening, tokenizers) is never in a round's time. A role imports what it needs and nothing else, so that
a peer's role runs in a Python without megatronish's dependencies.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

BATCH_BYTES = 2_000_000


def encode_hf(corpus: str, tokenizer: str) -> dict[str, float]:
    """`encode_batch_fast` of Hugging Face tokenizers alone, on texts in memory."""
    from tokenizers import Tokenizer

    def fresh() -> Callable[[list[str]], object]:
        raw = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
        return lambda texts: raw.encode_batch_fast(texts, add_special_tokens=False)

    return _encode(corpus, fresh)


def encode_gigatoken(corpus: str, tokenizer: str) -> dict[str, float]:
    """gigatoken's `encode_batch` alone, on texts in memory."""
    gigatoken = importlib.import_module("gigatoken")

    def fresh() -> Callable[[list[str]], object]:
        raw = gigatoken.Tokenizer(f"{tokenizer}/tokenizer.json")
        return lambda texts: raw.encode_batch(texts, parallel=True)

    return _encode(corpus, fresh)


def _encode(corpus: str, fresh: Callable[[], Callable[[list[str]], object]]) -> dict[str, float]:
    """Seconds of a `fresh` tokenizer on the corpus in batches of BATCH_BYTES: tokenizers remember the words they have seen."""
    batches: list[list[str]] = [[]]
    size = 0
    with open(corpus, encoding="utf-8") as file:
        for line in file:
            batches[-1].append(json.loads(line)["text"])
            size += len(batches[-1][-1])
            if size >= BATCH_BYTES:
                batches.append([])
                size = 0
    fresh()(batches[0])  # starts the threads
    encode = fresh()
    start, used = time.perf_counter(), time.process_time()
    for batch in batches:
        encode(batch)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}


def reads_ours(prefix: str, seq_length: int, mask: bool, samples: int, batch: int, **_: Any) -> dict[str, float]:
    """Packed samples as the tensors that training takes; with `mask` positions and cu_seqlens too."""
    import numpy as np

    from megatronish.data.indexed.format import IndexedReader
    from megatronish.data.loader import to_tensors
    from megatronish.data.samples.packing import PackedDataset

    reader = IndexedReader(prefix)
    dataset = PackedDataset(reader, np.arange(reader.num_documents), seq_length, seed=1)
    return _reads(lambda numbers: to_tensors(dataset.batch(np.array(numbers), mask)), samples, batch)


def reads_megatron(samples: int, batch: int, **arguments: Any) -> dict[str, float]:
    """`GPTDataset.__getitem__`; with `mask` positions and loss mask are reset at document ends."""
    from torch.utils.data import default_collate

    dataset = _gpt_dataset(**arguments)

    def read(numbers: list[int]) -> object:
        found = [dataset[number % len(dataset)] for number in numbers]
        return default_collate(found) if len(found) > 1 else found[0]

    return _reads(read, samples, batch)


def _reads(read: Callable[[list[int]], object], samples: int, batch: int) -> dict[str, float]:
    """Samples per second of processor time: one thread that waits for nothing, so on an idle machine the same by the clock."""
    read([0])

    def rate(size: int) -> float:
        start = time.process_time()
        for number in range(0, samples, size):
            read(list(range(number, number + size)))
        return samples / (time.process_time() - start)

    return {"alone": rate(1), "batch": rate(batch)}


def index_ours(prefix: str, seq_length: int, **_: Any) -> dict[str, float]:
    """From the path to the first sample, then random samples of the epoch and the first of another epoch."""
    import numpy as np

    from megatronish.data.indexed.format import IndexedReader
    from megatronish.data.samples.packing import PackedDataset

    start = time.perf_counter()
    reader = IndexedReader(prefix)
    dataset = PackedDataset(reader, np.arange(reader.num_documents), seq_length, seed=1)

    def seek(number: int) -> float:
        before = time.perf_counter()
        dataset.batch(np.array([number]), False)
        return time.perf_counter() - before

    seek(0)
    built = time.perf_counter() - start
    state = json.dumps({"consumed_samples": 2**62, "seed": 2**62, "data_identity": reader.identity})
    numbers = random.Random(0).sample(range(dataset.samples_per_epoch), 200)
    worst, other = max(map(seek, numbers)), seek(7 * dataset.samples_per_epoch)
    return {
        "seconds": built,
        "worst_seek_ms": 1e3 * worst,
        "other_epoch_ms": 1e3 * other,
        "state_bytes": len(state),
    }


def _gpt_dataset(cache: str, prefix: str, seq_length: int, eod: int, mask: bool = False) -> Any:
    """One epoch of megatron-core's GPTDataset over all documents of an indexed data set."""
    import numpy as np

    gpt = importlib.import_module("megatron.core.datasets.gpt_dataset")
    utils = importlib.import_module("megatron.core.datasets.utils")
    config = gpt.GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        split="100,0,0",
        path_to_cache=cache,
        tokenizer=SimpleNamespace(vocab_size=eod + 1, eod=eod, pad=-1, unique_identifiers={}),
        reset_position_ids=mask,
        reset_attention_mask=mask,
        eod_mask_loss=mask,
        create_attention_mask=False,
    )
    low_level = gpt.GPTDataset.build_low_level_dataset(prefix, config)
    documents = np.arange(len(low_level.sequence_lengths), dtype=np.int32)
    return gpt.GPTDataset(low_level, prefix, documents, None, utils.Split.train, config)


def datasets_map(corpus: str, tokenizer: str, folder: str) -> dict[str, float]:
    """`datasets.map` with the same tokenizer to an Arrow data set on the disk, with an empty cache."""
    from datasets import load_dataset
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    eod = raw.get_vocab_size() - 1

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encodings = raw.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [[*encoding.ids, eod] for encoding in encodings]}

    with tempfile.TemporaryDirectory(dir=folder) as place:
        data = load_dataset("json", data_files=corpus, split="train", cache_dir=f"{place}/cache")
        data.map(encode, batched=True, remove_columns=data.column_names).save_to_disk(f"{place}/tokens")
    return {}


ROLES: dict[str, Callable[..., dict[str, float]]] = {
    role.__name__: role for role in (encode_hf, encode_gigatoken, reads_ours, reads_megatron, index_ours, datasets_map)
}

if __name__ == "__main__":
    print("\n" + json.dumps(ROLES[sys.argv[1]](**json.loads(sys.argv[2]))))
