"""data.path in all its forms, on the command line too; settings that contradict each other."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatronish.config.cli import help_text, parse
from megatronish.config.data import Corpus
from megatronish.config.schema import run_schema
from megatronish.errors import ConfigError
from tests.config.json_schema import violations
from tests.config.raw import SMALLEST, changed, read

A, B = Corpus(path="a"), Corpus(path="b")
FORMS: list[tuple[Any, tuple[Corpus, ...]]] = [
    ("a", (A,)),
    ("1e5", (Corpus(path="1e5"),)),
    (["a"], (A,)),
    (["a", "b"], (A, B)),
    ([0.7, "a", 3, "b"], (Corpus(path="a", weight=0.7), Corpus(path="b", weight=3.0))),
    (["30", "a", "70", "b"], (Corpus(path="a", weight=30.0), Corpus(path="b", weight=70.0))),
    (
        [{"path": "a", "weight": 2}, {"path": "b", "weight": 1}],
        (Corpus(path="a", weight=2.0), Corpus(path="b", weight=1.0)),
    ),
    ([{"path": "a"}, {"path": "b"}], (A, B)),
]


@pytest.mark.parametrize(("form", "corpora"), FORMS)
def test_every_form_of_the_path(form: Any, corpora: tuple[Corpus, ...], tmp_path: Path) -> None:
    """In a file, on the command line, and again from the resolved run; the schema accepts it."""
    changes = {"megatronish": {"data": {"path": form}}}
    run = read(**changes)
    assert run.megatronish.data.corpora == corpora
    assert not violations(changed(changes), run_schema(), run_schema())
    run.save(tmp_path / "run.json")
    again = parse(["--deepspeed_config", str(tmp_path / "run.json")], "x")
    assert again.megatronish.data == run.megatronish.data
    (tmp_path / "plain.json").write_text(json.dumps(SMALLEST))
    word = form if isinstance(form, str) else json.dumps(form)
    given = parse(["--deepspeed_config", str(tmp_path / "plain.json"), "--data.path", word], "x")
    assert given.megatronish.data.corpora == corpora


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": []}, r"\[\] names no dataset"),
        ({"path": 7}, "7 names no dataset"),
        ({"path": ""}, "path is empty"),
        ({"path": [1, "a", 2]}, "a weight before each prefix"),
        ({"path": ["a", 1]}, "a weight before each prefix"),
        ({"path": [True, "a"]}, "a weight before each prefix"),
        ({"path": [0, "a"]}, '"weight" is 0.*greater than 0'),
        ({"path": [{"path": "a", "weigth": 1}]}, 'unknown key "weigth". Did you mean "weight"'),
        ({"path": [{"path": "a", "weight": 1}, {"path": "b"}]}, "b has no weight and others have"),
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, "leave nothing to train on"),
        ({"split": "9,1", "test_fraction": 0.4}, "are both set"),
        ({"order": "megatron", "pack": False}, "packs its samples"),
        ({"pad_multiple": 0}, "data.pad_multiple"),
    ],
)
def test_contradictions_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(megatronish={"data": data})


def test_help_shows_the_forms() -> None:
    text = help_text("x")
    assert "--data.path STR|[CORPUS,...]" in text
    assert "--data.path.weight" not in text
