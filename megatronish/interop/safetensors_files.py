"""Folders of safetensors files, read and written one tensor at a time.

A file is written as its header, from shapes known in advance, and then the tensors in that order
(https://huggingface.co/docs/safetensors, "Format"); the library's own writer needs all tensors of a file at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatronish.errors import UserError
from megatronish.files import sync, write_atomic

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
)
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
_ALIGNMENT = 8  # bytes that the header is padded to


@dataclass(frozen=True)
class TensorEntry:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of a folder: `model.safetensors`, or the files that `model.safetensors.index.json` names.

    Raises UserError when files are missing, truncated, outside the folder, or pickled. Headers are read at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        self._file_of: dict[str, str] = {}
        index = self._index()
        for name in sorted(set(index.values())) if index else [SINGLE]:
            self._read_header(name, index)
        if missing := sorted(index.keys() - self.entries.keys()):
            raise UserError(f"{folder / index[missing[0]]}: has no tensor {missing[0]!r}, which {INDEX} lists.")

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU. The file is mapped anew for each tensor, which keeps resident memory small."""
        with safe_open(self.folder / self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _index(self) -> dict[str, str]:
        """Tensor name to file name; empty without an index."""
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file() or not path.is_file():
            self._check_single()
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            pairs = [(str(name), str(file)) for name, file in found.items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read ({error!r}): download it again.") from None
        for _, file in pairs:
            if Path(file).name != file or "\\" in file or file in ("", ".", ".."):
                raise UserError(f"{path}: names the file {file!r}, which is not directly in this folder.")
        return dict(pairs)

    def _check_single(self) -> None:
        if (self.folder / SINGLE).is_file():
            return
        pickled = sorted(
            path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in self.folder.glob(pattern)
        )
        if pickled:
            raise UserError(
                f"{self.folder}: its weights are pickled ({pickled[0]}), and opening a pickle can run any code in it; only "
                "safetensors are read. Take the model's safetensors revision, or, if you trust it, convert it where "
                "transformers is installed: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
            )
        raise UserError(f"{self.folder}: neither {SINGLE} nor {INDEX} is in it.")

    def _read_header(self, name: str, index: Mapping[str, str]) -> None:
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing, though {INDEX} names it: download the model again.")
        try:
            with safe_open(path, framework="pt") as file:
                for tensor in list(file.keys()):
                    if index and index.get(tensor) != name:
                        continue  # another file's, by the index
                    part = file.get_slice(tensor)
                    dtype = STORED_DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise UserError(
                            f"{path}: {tensor} is {part.get_dtype()}; {', '.join(STORED_DTYPES)} can be read. Use the model's "
                            "unquantized revision."
                        )
                    self.entries[tensor] = TensorEntry(tuple(part.get_shape()), dtype)
                    self._file_of[tensor] = name
        except SafetensorError as error:
            raise UserError(f"{path}: truncated or not a safetensors file ({error}): download it again.") from None


class SafetensorsWriter:
    """Context manager that writes one safetensors file, tensor by tensor in the order of `entries`."""

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        self.path = path
        self._left = list(entries.items())
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        for name, entry in entries.items():
            end = offset + entry.size
            header[name] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % _ALIGNMENT)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor of the header, converted to its dtype."""
        expected, entry = self._left.pop(0)
        assert name == expected and tuple(tensor.shape) == entry.shape, (name, expected, tensor.shape, entry.shape)
        flat = tensor.detach().to("cpu", entry.dtype).contiguous().view(-1)
        flat.view(torch.uint8).numpy().tofile(self._file)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None:
            assert not self._left, f"never written: {[name for name, _ in self._left]}"
            sync(self.path)


def write_shards(
    folder: Path,
    entries: Mapping[str, TensorEntry],
    tensors: Iterable[tuple[str, Tensor]],
    max_bytes: int,
    written: Callable[[int], None],
) -> list[str]:
    """Write `tensors`, in the order of `entries`, into files of at most `max_bytes` (or one tensor) each.

    A single file is `model.safetensors`; several are numbered and have an index. written: called with the number of
    bytes of each tensor. Returns the names of the files.
    """
    shards = _split(entries, max_bytes)
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    source = iter(tensors)
    for file_name, shard in zip(names, shards, strict=True):
        with SafetensorsWriter(folder / file_name, shard, {"format": "pt"}) as writer:
            for _ in shard:
                name, tensor = next(source)
                writer.write(name, tensor)
                written(shard[name].size)
    if len(shards) > 1:
        total = sum(entry.size for entry in entries.values())
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return names


def _split(entries: Mapping[str, TensorEntry], max_bytes: int) -> Sequence[dict[str, TensorEntry]]:
    shards: list[dict[str, TensorEntry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += entry.size
    return shards


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free: choose another disk."
        )
