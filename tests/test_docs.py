"""What README.md and docs/ name exists: links, anchors, pictures, files, tests, modules, commands with their options, fields."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
FOLDERS = ("csrc", "docs", "ds_configs", "launchers", "megatronish", "tests", "tools")
PACKAGES = tuple(sorted(path.parent.name for path in (ROOT / "megatronish").glob("*/__init__.py")))
# `megatronish/a/b.py`, `a/b.py` for short, `test_c.py`; not `data/mine.jsonl` or a path in another repository.
FILE = re.compile(rf"(?<![\w./-])((?:{'|'.join((*FOLDERS, *PACKAGES))})/[\w/]+\.(?:py|cpp|h|cu|sh|json|sbatch))\b")
TEST = re.compile(r"(?:([\w/]+\.py))?::((?:Test\w+::)?(?:test_|Test)\w+)|\b(test_\w+\.py)\b")
COMMAND = re.compile(r"\b((?:launchers|tools)/[\w/]+\.py)\b([^`\n#]*)")


def text_of(page: str) -> str:
    """The page, with continued lines of commands joined."""
    return (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")


@cache
def sources() -> dict[str, str]:
    """Every Python file of the checkout by its path."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in ("launchers", "megatronish", "tests", "tools")
        for path in (ROOT / folder).rglob("*.py")
    }


@cache
def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.relative_to(ROOT).as_posix())):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_exist(page: str) -> None:
    text = text_of(page)
    missing = [name for name in FILE.findall(text) if not any((ROOT / f / name).exists() for f in ("", "megatronish"))]
    for module in re.findall(r"\bmegatronish\.([a-z_]+(?:\.[a-z_]+)*)", text):
        path = ROOT / "megatronish" / module.replace(".", "/")
        if not path.is_dir() and not path.with_suffix(".py").exists():
            missing.append(module)
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_tests_exist(page: str) -> None:
    tests = {name: text for name, text in sources().items() if name.startswith("tests/")}
    missing = []
    for file, test, alone in TEST.findall(text_of(page)):
        inside = [text for name, text in tests.items() if f"/{name}".endswith(f"/{file or alone}")]
        names = [name for name in test.split("::") if name]
        if not any(
            all(re.search(rf"(def|class) {name}\b", text) for name in names)
            for text in (inside if file or alone else tests.values())
        ):
            missing.append(alone or f"{file}::{test}")
    assert not missing


@cache
def schema() -> dict[str, Any]:
    """ds_configs/schema.json."""
    found: dict[str, Any] = json.loads((ROOT / "ds_configs/schema.json").read_text(encoding="utf-8"))
    return found


def is_field(name: str) -> bool:
    """Whether a run has a field of that dotted name; below a free-form field every name is allowed."""
    fields, definitions = schema()["properties"], schema()["$defs"]
    node = schema() if name.split(".")[0] in fields else fields["megatronish"]
    for part in name.split("."):
        choices = [node, *node.get("anyOf", [])]
        choices = [definitions[choice["$ref"].rpartition("/")[2]] if "$ref" in choice else choice for choice in choices]
        known = {key: value for choice in choices for key, value in choice.get("properties", {}).items()}
        if not known:
            return True
        if part not in known:
            return False
        node = known[part]
    return True


@pytest.mark.parametrize("page", PAGES)
def test_options_of_commands_exist(page: str) -> None:
    missing = []
    for program, rest in COMMAND.findall(text_of(page)):
        for option in re.findall(r"(?<!\S)--([a-z][\w.-]*)", rest):
            parsers = [text for name, text in sources().items() if name == program or name.startswith("megatronish/")]
            if not any(f'"--{option.removeprefix("no-")}"' in text for text in parsers) and not is_field(option):
                missing.append(f"{program} --{option}")
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_fields_exist(page: str) -> None:
    """`train.steps`, `--model.num_layers 4`; `model.safetensors` without dashes is a file."""
    sections = [name for name in schema()["properties"]["megatronish"]["properties"] if name != "model"]
    names = re.findall(rf"(?:`|--)((?:{'|'.join(sections)}|(?<=--)model)\.[a-z_]+)", text_of(page))
    assert not [name for name in names if not is_field(name)]
