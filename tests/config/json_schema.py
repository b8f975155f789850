"""The part of JSON Schema (draft 2020-12) that the schema of run files uses, so that tests need no further package."""

from __future__ import annotations

from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
ANNOTATIONS = {"title", "description", "default", "$schema", "$defs"}


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any], place: str = "") -> list[str]:
    """What in `value` breaks `schema`, each with its dotted place. Raises KeyError for a keyword that is not known here."""
    found = []
    for keyword, wanted in schema.items():
        if keyword not in ANNOTATIONS:
            found += CHECKS[keyword](value, wanted, schema, root, place)
    return found


def _is_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, TYPES[name])


def _type(value: Any, wanted: str, schema: Any, root: Any, place: str) -> list[str]:
    return [] if _is_type(value, wanted) else [f"{place}: {value!r} is no {wanted}"]


def _reference(value: Any, wanted: str, schema: Any, root: Any, place: str) -> list[str]:
    return violations(value, root["$defs"][wanted.removeprefix("#/$defs/")], root, place)


def _any_of(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> list[str]:
    tried = [violations(value, option, root, place) for option in wanted]
    return [] if any(not errors for errors in tried) else [f"{place}: none of {tried}"]


def _properties(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> list[str]:
    if not isinstance(value, dict):
        return []
    return [
        error
        for key in value.keys() & wanted.keys()
        for error in violations(value[key], wanted[key], root, f"{place}.{key}")
    ]


def _additional(value: Any, wanted: bool, schema: Any, root: Any, place: str) -> list[str]:
    if wanted is True or not isinstance(value, dict):
        return []
    return [f"{place}.{key}: unknown key" for key in value if key not in schema.get("properties", {})]


def _required(value: Any, wanted: list[str], schema: Any, root: Any, place: str) -> list[str]:
    return [f"{place}.{key}: missing" for key in wanted if isinstance(value, dict) and key not in value]


def _bound(accepts: Any) -> Any:
    def check(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> list[str]:
        is_number = isinstance(value, (int, float))
        return [f"{place}: {value} against the bound {wanted}"] if is_number and not accepts(value, wanted) else []

    return check


def _prefix_items(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> list[str]:
    if not isinstance(value, list):
        return []
    pairs = enumerate(zip(value, wanted, strict=False))
    return [error for n, (item, kind) in pairs for error in violations(item, kind, root, f"{place}.{n}")]


def _items(value: Any, wanted: Any, schema: Any, root: Any, place: str) -> list[str]:
    if not isinstance(value, list):
        return []
    first = len(schema.get("prefixItems", []))
    pairs = list(enumerate(value))[first:]
    return [error for n, item in pairs for error in violations(item, wanted, root, f"{place}.{n}")]


CHECKS: dict[str, Any] = {
    "type": _type,
    "$ref": _reference,
    "anyOf": _any_of,
    "properties": _properties,
    "additionalProperties": _additional,
    "required": _required,
    "enum": lambda value, wanted, *rest: [] if value in wanted else [f"{rest[-1]}: {value!r} is none of {wanted}"],
    "minimum": _bound(lambda value, bound: value >= bound),
    "maximum": _bound(lambda value, bound: value <= bound),
    "exclusiveMinimum": _bound(lambda value, bound: value > bound),
    "exclusiveMaximum": _bound(lambda value, bound: value < bound),
    "minLength": lambda value, n, *rest: (
        [f"{rest[-1]}: too short"] if isinstance(value, str) and len(value) < n else []
    ),
    "minItems": lambda value, n, *rest: [f"{rest[-1]}: too few"] if isinstance(value, list) and len(value) < n else [],
    "maxItems": lambda value, n, *rest: [f"{rest[-1]}: too many"] if isinstance(value, list) and len(value) > n else [],
    "prefixItems": _prefix_items,
    "items": _items,
}
