"""`python -m megatronish.config.schema > ds_configs/schema.json`: the JSON Schema editors complete run files with."""

from __future__ import annotations

import json
from typing import Any

from megatronish.config.deepspeed_json import DeepSpeedConfig
from megatronish.config.presets import preset_names
from megatronish.config.run import BLOCK, MegatronishConfig


def run_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a ds_configs file."""
    schema = DeepSpeedConfig.model_json_schema(by_alias=True)
    block = MegatronishConfig.model_json_schema(by_alias=True)
    definitions = {**schema.pop("$defs", {}), **block.pop("$defs", {})}
    model = definitions["ModelConfig"]
    model["required"] = []  # a preset may supply every field
    model["properties"]["preset"] = {
        "enum": list(preset_names()),
        "description": model["properties"]["preset"].get("description", ""),
    }
    schema["properties"] |= {"$schema": {"type": "string"}, BLOCK: block}
    schema["required"] = [*schema["required"], BLOCK]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "megatronish run",
        "$defs": definitions,
    }


if __name__ == "__main__":
    print(json.dumps(run_schema(), indent=2))
