"""Names of data sets of the Hugging Face hub: `hf://OWNER/NAME[@REVISION][:CONFIG[/SPLIT]]`, and those known by a short name.

hf://allenai/c4:en    hf://fineweb-edu:sample-10BT    hf://dolly    hf://c4:validation (train, validation, test and dev)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megatronish.data.readers.inputs import HUB
from megatronish.errors import DataError

DEFAULT_SPLIT = "train"
SPLIT_NAMES = ("train", "validation", "valid", "val", "test", "dev")


@dataclass(frozen=True)
class HubName:
    """A data set of the hub, as asked for.

    files: a glob pattern of the split "train", {config} filled in, where the repository has no configurations that `datasets`
    resolves. url_list: instead, a file of the repository that lists URLs. keys: the fields of a document, joined by a blank
    line. licence: in short.
    """

    name: str
    repository: str
    config: str = ""
    files: str | None = None
    keys: tuple[str, ...] = ("text",)
    licence: str | None = None
    url_list: str | None = None
    revision: str | None = None
    split: str = DEFAULT_SPLIT

    def data_files(self) -> dict[str, str] | None:
        """`data_files` of `datasets.load_dataset_builder`: None lets it resolve the configuration. Raises DataError."""
        if self.files is None:
            return None
        if self.split != DEFAULT_SPLIT:
            raise DataError(f"{HUB}{self.repository} has no split {self.split!r}; its only split is {DEFAULT_SPLIT!r}")
        return {self.split: self.files.replace("{config}", self.config)}


NAMED = (
    HubName("c4", "allenai/c4", "en", licence="ODC-BY 1.0, and the Common Crawl terms of use"),
    HubName(
        "openwebtext2",
        "segyges/OpenWebText2",
        files="**/*.jsonl.zst",
        licence="not stated: web pages linked from Reddit, each under its author's copyright; a mirror of EleutherAI's files",
    ),
    HubName(
        "redpajama",
        "togethercomputer/RedPajama-Data-1T",
        "arxiv",
        licence="each subset under its source's licence (arXiv, Common Crawl, GitHub, Stack Exchange, Wikipedia): see the "
        "dataset's card",
        url_list="urls/{config}.txt",
    ),
    HubName(
        "redpajama-sample",
        "togethercomputer/RedPajama-Data-1T-Sample",
        files="*.jsonl",
        licence="each subset under its source's licence: see the dataset's card",
    ),
    HubName(
        "oscar",
        "oscar-corpus/OSCAR-2301",
        "en",
        files="{config}_meta/{config}_meta_part_*.jsonl.zst",
        keys=("content",),
        licence="gated; CC0 1.0 for the packaging, the text under the Common Crawl terms of use",
    ),
    HubName(
        "the-stack",
        "bigcode/the-stack-dedup",
        "python",
        files="data/{config}/*.parquet",
        keys=("content",),
        licence="gated; every file under its repository's own licence with its attribution clauses; removal requests must be "
        "honoured",
    ),
    HubName(
        "fineweb-edu",
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
        licence="ODC-BY 1.0, and the Common Crawl terms of use",
    ),
    HubName(
        "dolly",
        "databricks/databricks-dolly-15k",
        keys=("instruction", "context", "response"),
        licence="CC BY-SA 3.0",
    ),
)


def parse_hub(location: str) -> HubName:
    """The data set that an hf:// location names. Raises DataError for one that cannot be parsed."""
    parts = re.fullmatch(
        r"hf://(?P<repository>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+?))?(:(?P<config>[\w.-]*)(/(?P<split>\w+))?)?",
        location,
    )
    if parts is None:
        raise DataError(f"{location}: expected hf://OWNER/NAME[@REVISION][:CONFIG[/SPLIT]], such as hf://allenai/c4:en")
    repository, config, split = parts["repository"], parts["config"], parts["split"]
    if config in SPLIT_NAMES and split is None:
        config, split = None, config
    known = next((preset for preset in NAMED if repository in (preset.name, preset.repository)), None)
    if known is None and "/" not in repository:
        raise DataError(f"{location}: no dataset known as {repository!r}; known: {', '.join(s.name for s in NAMED)}")
    wanted = known or HubName(repository, repository, licence="unknown: see the dataset's card")
    return replace(wanted, config=config or wanted.config, revision=parts["revision"], split=split or DEFAULT_SPLIT)
