"""Runs in the environment with megatron-core: executes the jobs of a JSON file and writes their results as .npz files.

    python megatron_jobs.py JOBS.json

A job is {"do": name of a function below, "out": FILE.npz, ...its arguments}. Imports nothing of this project.
"""

import json
import sys

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


class Tokenizer:
    """The attributes of a tokenizer that GPTDataset reads."""

    eod, pad, vocab_size, unique_identifiers = 256, -1, 257, {}


def write(prefix, dtype, documents):
    """documents: lists of sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for sequences in documents:
        tokens = [token for sequence in sequences for token in sequence]
        if tokens:
            builder.add_document(torch.tensor(tokens), [len(sequence) for sequence in sequences])
        else:
            builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return {}


def read(prefix):
    """All contents of a data set."""
    data = IndexedDataset(prefix, mmap=False)  # it cannot map a .bin of only empty documents
    sequences = [data[i] for i in range(len(data))]
    tokens = np.concatenate(sequences) if sequences else np.empty(0)
    return {
        "lengths": data.sequence_lengths.copy(),  # the data set takes its map along
        "boundaries": data.document_indices.copy(),
        "tokens": tokens,
        "dtype": str(data.index.dtype),
    }


def merge(prefix, inputs):
    """inputs: prefixes, all of the first one's dtype."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=IndexedDataset(inputs[0]).index.dtype)
    for name in inputs:
        builder.add_index(name)
    builder.finalize(f"{prefix}.idx")
    return {}


def order(prefixes, weights, split, seed, seq_length, samples):
    """The first `samples` training samples as token rows [n, s + 1], and their data sets and indices in a blend."""
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(prefixes, weights),
        split=split,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    others = None if weights is None else 4
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [samples, others, others], lambda: True, config).build()[0]
    rows = []
    for n in range(min(len(dataset), samples + 50)):
        item = dataset[n]
        rows.append(np.append(item["tokens"].numpy(), int(item["labels"][-1])))
    result = {"rows": np.array(rows), "size": len(dataset)}
    if hasattr(dataset, "dataset_index"):
        result |= {"source_of": dataset.dataset_index, "number_of": dataset.dataset_sample_index}
    return result


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        out = job.pop("out")
        np.savez(out, **globals()[job.pop("do")](**job))
