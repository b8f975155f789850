"""The base class of all configuration models, and the message of a validation error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from megatronish.errors import ConfigError, did_you_mean


class Frozen(BaseModel):
    """An immutable model that refuses unknown fields; strings, booleans, inf and nan are not accepted as numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _integral_floats_are_integers(cls, raw: Any) -> Any:
        """`5e8` is how DeepSpeed files write bucket sizes; JSON reads it as a float."""
        if not isinstance(raw, dict):
            return raw
        return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in raw.items()}


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `Sub` or `Sub | None`, or None; a list of models is not a section."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, tuple):
        return None
    return next((m for arg in get_args(annotation) if (m := nested_model(arg))), None)


def explain(error: ValidationError, model: type[BaseModel], where: str, prefix: str = "") -> ConfigError:
    """Turn a pydantic error into one message that names each field by its dotted path, its value and the fix.

    where: the file or command line the values came from; prefix: dotted path of `model` inside that file.
    """
    lines = []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        dotted = ".".join([prefix, *path] if prefix else path)
        if item["type"] == "extra_forbidden":
            siblings = _fields_at(model, path[:-1])
            line = f'unknown key "{dotted}".{did_you_mean(path[-1], siblings)} Known keys here: {", ".join(siblings)}.'
        elif item["type"] == "missing":
            line = f'"{dotted}" is missing.'
        elif item["type"] == "value_error":
            line = f"{dotted}: {item['ctx']['error']}" if dotted else str(item["ctx"]["error"])
        else:
            line = f'"{dotted}" is {item["input"]!r}: {item["msg"][0].lower()}{item["msg"][1:]}.'
        lines.append(line)
    return ConfigError(f"{where}: " + ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines))


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for name in path:
        field = model.model_fields.get(name)
        inner = nested_model(field.annotation) if field else None
        if inner is None:
            return []
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` updated with `over`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
