"""Which data a run reads, and in which order."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, ValidationError, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from megatronish.config.base import Frozen, explain
from megatronish.errors import ConfigError


class Corpus(Frozen):
    """One of several data sets."""

    path: str = Field(..., min_length=1, description="prefix of an indexed dataset, or streamed text")
    weight: float | None = Field(
        None, gt=0.0, description="share of the samples, relative to the others; of none given, in proportion to tokens"
    )


class DataConfig(Frozen):
    """Indexed datasets, split by document into training and held-out parts, and how samples are made of them."""

    path: str | tuple[Corpus, ...] = Field(
        "data/default_text_document",
        description="prefix of an indexed dataset (PREFIX.bin, .idx, .manifest.json) from tools/preprocess_data.py; text that is "
        "streamed and tokenised during training (hf://allenai/c4:en, https://host/part-{000..127}.jsonl.gz, corpus/*.parquet); or "
        'several: ["a", "b"] in proportion to their tokens, [{"path": "a", "weight": 0.7}, ...], or Megatron\'s '
        '[0.7, "a", 0.3, "b"]',
    )
    tokenizer: str | None = Field(
        None,
        description="tokenizer.json, its folder, a SentencePiece .model or `bytes`, for data without a manifest: streamed text "
        "and indexed datasets that Megatron's own tools made; streamed text blended with a dataset that has a manifest uses its tokenizer",
    )
    order: Literal["shuffled", "megatron"] = Field(
        "shuffled",
        description="megatron: the samples of megatron-core's GPTDataset in its order, which depends on train.steps; "
        "shuffled: one that never changes with the run's length",
    )
    split: str | None = Field(
        None,
        description='Megatron\'s split: "969,30,1" gives the first 96.9 % of the documents to training, the next to '
        "validation, the last to testing; instead of the fractions",
    )
    validation_fraction: float = Field(
        0.01, ge=0.0, lt=1.0, description="share of the documents held out for validation; 0 trains on everything"
    )
    test_fraction: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of the documents that neither training nor validation reads"
    )
    pack: bool = Field(
        True,
        description="fill samples of seq_length tokens with documents; false: one document (or a part of seq_length "
        "tokens) per sample, samples of similar length batched together and padded",
    )
    pad_multiple: int = Field(
        64, ge=1, description="with pack false: micro batches are padded to a multiple of N tokens"
    )
    document_mask: bool = Field(
        False, description="attention never crosses a document boundary and positions restart at each document"
    )
    stream_buffer: int = Field(
        10_000, ge=1, description="with streamed text: documents that are shuffled together, in each loader process"
    )
    text_key: str | None = Field(
        None,
        min_length=1,
        description="with streamed text: the field to take, where it is not the source's own or `text`",
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="with streamed text, at a document without text: stop the run, or warn and skip it"
    )
    num_workers: int = Field(1, ge=0, le=64, description="loader processes per rank; 0 reads in the training process")

    @field_validator("path", mode="before")
    @classmethod
    def _corpora(cls, raw: Any) -> Any:
        """The short forms of a list of datasets, as objects."""
        if isinstance(raw, str):
            return raw
        items = list(raw) if isinstance(raw, list | tuple) else []
        if not items:
            raise ConfigError(f'{raw!r} names no dataset; give a prefix, or a list of prefixes such as ["a", "b"]')
        if all(isinstance(item, str) and not _is_number(item) for item in items):
            return tuple(Corpus(path=item) for item in items)
        if any(isinstance(item, str | int | float) for item in items):
            pairs = list(zip(items[::2], items[1::2], strict=False))
            if len(items) % 2 or not all(_is_number(w) and isinstance(p, str) and not _is_number(p) for w, p in pairs):
                raise ConfigError(
                    f'{items}: write prefixes only, or a weight before each prefix, such as [0.7, "a", 0.3, "b"], or '
                    'objects {"path": "a", "weight": 0.7}'
                )
            items = [{"path": path, "weight": float(weight)} for weight, path in pairs]
        try:
            return tuple(Corpus.model_validate(item) for item in items)
        except ValidationError as error:
            raise explain(error, Corpus, "of the datasets listed") from None

    @model_validator(mode="after")
    def _agree(self) -> DataConfig:
        if isinstance(self.path, str) and not self.path:
            raise ConfigError("path is empty; give the prefix of a dataset")
        weighted = [corpus for corpus in self.corpora if corpus.weight is not None]
        if weighted and len(weighted) < len(self.corpora):
            missing = next(corpus.path for corpus in self.corpora if corpus.weight is None)
            raise ConfigError(f"path: {missing} has no weight and others have; give a weight to all or to none")
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ConfigError(
                f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} leave nothing to train on"
            )
        if self.split is not None and "test_fraction" in self.model_fields_set and self.test_fraction:
            raise ConfigError(f'split "{self.split}" and test_fraction {self.test_fraction} are both set; keep one')
        if self.order == "megatron" and not self.pack:
            raise ConfigError('order "megatron" packs its samples; set pack to true, or order to "shuffled"')
        return self

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """The datasets, one or several."""
        return (Corpus(path=self.path),) if isinstance(self.path, str) else self.path

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The short forms of `path` are no error in an editor."""
        schema = handler(core)
        listed = handler.resolve_ref_schema(schema)["properties"]["path"]["anyOf"][1]
        listed["items"] = {"anyOf": [listed["items"], {"type": "string"}, {"type": "number"}]}
        return schema


def _is_number(item: Any) -> bool:
    try:
        float(item)
    except (TypeError, ValueError):
        return False
    return not isinstance(item, bool)
