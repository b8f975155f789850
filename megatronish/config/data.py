"""Which data a run reads."""

from __future__ import annotations

from pydantic import Field

from megatronish.config.base import Frozen


class DataConfig(Frozen):
    """One indexed dataset, split by document into training and held-out parts."""

    path: str = Field(
        "data/default_text_document",
        min_length=1,
        description="prefix of an indexed dataset (PREFIX.bin, .idx, .manifest.json) from tools/preprocess_data.py",
    )
    validation_fraction: float = Field(
        0.01, ge=0.0, lt=1.0, description="share of the documents held out for validation; 0 trains on everything"
    )
    document_mask: bool = Field(
        False, description="attention never crosses a document boundary and positions restart at each document"
    )
    num_workers: int = Field(1, ge=0, le=64, description="loader processes a rank; 0 reads in the training process")
