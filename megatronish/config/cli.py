"""The command line of every launcher: --deepspeed_config FILE and dotted overrides of any field of the run."""

from __future__ import annotations

import json
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from megatronish.config.base import merge, nested_model
from megatronish.config.deepspeed_json import DeepSpeedConfig
from megatronish.config.run import BLOCK, MegatronishConfig, RunConfig
from megatronish.errors import ConfigError, did_you_mean

LAUNCHER_FLAGS = {
    "--local_rank",
    "--local-rank",
}  # added by `deepspeed` and older `torchrun`; environment variables hold the same


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a model as (dotted name, FieldInfo); of a section its fields, and the section itself if it may be null."""
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        inner = nested_model(field.annotation)
        if inner is None or field.default is None:
            yield dotted, field
        if inner is not None:
            yield from fields(inner, dotted + ".")


def known_names() -> dict[str, tuple[str, ...]]:
    """Dotted command-line name -> path in the file, for fields and sections.

    Names under "megatronish" are written without it.
    """
    paths = [tuple(name.split(".")) for name, _ in fields(DeepSpeedConfig)]
    paths += [(BLOCK, *name.split(".")) for name, _ in fields(MegatronishConfig)]
    sections = {path[:length] for path in paths for length in range(1, len(path))} - {(BLOCK,)}
    return {".".join(path).removeprefix(BLOCK + "."): path for path in [*paths, *sorted(sections)]}


def text_names() -> set[str]:
    """Dotted command-line names of the fields that hold text: `--train.save_dir 7` means the folder "7"."""
    found = [*fields(DeepSpeedConfig), *fields(MegatronishConfig)]
    return {name for name, field in found if str in (field.annotation, *get_args(field.annotation))}


def list_names() -> set[str]:
    """Dotted command-line names of the fields that hold text or a list: `--data.path '["a", "b"]'` is a list."""
    found = {name: get_args(field.annotation) for name, field in fields(MegatronishConfig)}
    return {name for name, kinds in found.items() if str in kinds and any(get_origin(kind) is tuple for kind in kinds)}


def parse_value(text: str, is_text: bool = False) -> Any:
    """A command-line value: JSON where it is JSON (numbers, true, null, lists, objects), else the text itself.

    is_text: the field holds text, so only a quoted string and null are read as JSON.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = {"True": True, "False": False, "None": None}.get(text, text)
    return text if is_text and value is not None and not isinstance(value, str) else value


def parse(argv: Sequence[str], program: str, default_config: str | None = None) -> RunConfig:
    """Read `--deepspeed_config FILE` and `--dotted.name value` overrides into a checked RunConfig.

    Prints help and exits on --help. Raises ConfigError on an unknown name, a missing value or a bad run.
    """
    path, overrides = parse_options(argv, program)
    path = path or default_config
    if path is None:
        raise ConfigError(f"{program}: which run? Add --deepspeed_config ds_configs/FILE.json.")
    return RunConfig.load(path, overrides)


def parse_options(argv: Sequence[str], program: str) -> tuple[str | None, dict[str, Any]]:
    """The file that --deepspeed_config names, if any, and the overrides as a nested dict shaped like the file.

    Prints help and exits on --help. Raises ConfigError on an unknown name or a missing value.
    """
    names, texts, lists, words = known_names(), text_names(), list_names(), list(argv)
    overrides: dict[str, Any] = {}
    path = None
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
            print(help_text(program))
            sys.exit(0)
        if word == "--deepspeed":
            continue
        if not word.startswith("--"):
            raise ConfigError(f'{program}: "{word}" follows no option. Options look like --train.steps 100.')
        name, has_value, value = word.partition("=")
        if not has_value:
            if not words or (words[0].startswith("--") and not words[0][2:3].isdigit()):
                raise ConfigError(f"{program}: {name} needs a value, e.g. {name} 1.")
            value = words.pop(0)
        if name in LAUNCHER_FLAGS:
            continue
        if name in ("--deepspeed_config", "--deepspeed-config"):
            path = value
            continue
        dotted = name[2:].removeprefix(BLOCK + ".")
        if dotted not in names:
            raise ConfigError(f"{program}: unknown option {name}.{did_you_mean(dotted, names)} See --help for all.")
        is_list = dotted in lists and value.lstrip().startswith("[")
        nested = parse_value(value, dotted in texts and not is_list)
        for part in reversed(names[dotted]):
            nested = {part: nested}
        overrides = merge(overrides, nested)
    return path, overrides


def help_text(program: str) -> str:
    """Every option with its type, default and meaning."""
    lines = [
        f"usage: deepspeed {program} --deepspeed_config ds_configs/FILE.json [--section.field value ...]",
        f"       (also: torchrun, mpirun -np N python, srun, or plain python {program} ...)",
        "",
        "Any field of the file can be set here by its dotted name; values are JSON, or plain text.",
        "launchers/pretrain.py --print-config prints the resolved configuration as JSON and exits.",
    ]
    for title, model in (
        ('fields of the "megatronish" block', MegatronishConfig),
        ("DeepSpeed's keys", DeepSpeedConfig),
    ):
        lines += ["", f"{title}:"]
        for name, field in fields(model):
            if field.default is PydanticUndefined:
                default = "" if name.startswith("model.") else " (needed)"
            else:
                default = f" (default {json.dumps(field.default)})"
            lines.append(f"  --{name} {type_name(field.annotation)}{default}\n        {field.description or ''}")
    return "\n".join(lines)


def type_name(annotation: Any) -> str:
    """A short word for a field's type: INT, a|b|c, [FLOAT,FLOAT]."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_name(get_args(annotation)[0])
    if origin is Literal:
        return "|".join(str(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return "|".join("null" if arg is type(None) else type_name(arg) for arg in get_args(annotation))
    if origin is tuple and get_args(annotation)[-1] is ...:
        return f"[{type_name(get_args(annotation)[0])},...]"
    if origin is tuple:
        return "[" + ",".join(type_name(arg) for arg in get_args(annotation)) + "]"
    if origin is dict:
        return "OBJECT"
    return getattr(annotation, "__name__", str(annotation)).upper()
