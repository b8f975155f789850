"""Which documents a sample of a run was made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatronish.data.samples.blend import Blend
from megatronish.data.samples.bucketing import Bucketed, DocumentSamples
from megatronish.data.samples.megatron_order import MegatronSamples
from megatronish.data.samples.packing import PackedDataset
from megatronish.data.samples.sample import SampleSource


def documents_of(source: SampleSource | Blend, number: int) -> dict[str, Any]:
    """`{"data": name, "documents": numbers in it}` of sample `number`; documents None for a stream, which numbers none."""
    if isinstance(source, Bucketed):
        return documents_of(source.source, int(source.places(np.array([number]))[0]))
    if isinstance(source, Blend):
        place, there = (int(found[0]) for found in source.places(np.array([number], dtype=np.int64)))
        inner = source.sources[place]
        if isinstance(inner, SampleSource):
            return documents_of(inner, there)
        return {"data": inner.name, "documents": None}
    assert isinstance(source, PackedDataset | MegatronSamples | DocumentSamples)
    return {"data": source.name, "documents": source.documents(number)}
