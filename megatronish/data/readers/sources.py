"""Where streamed documents come from: `hf://` datasets (some known by name), http(s) shards, local files and globs.

    hf://OWNER/NAME[@REVISION][:CONFIG[/SPLIT]]     hf://allenai/c4:en, hf://fineweb-edu:sample-10BT, hf://dolly
    hf://OWNER/NAME[@REVISION]:SPLIT                hf://c4:validation, for train, validation, test and dev
    https://host/part-{00000..00127}.jsonl.gz       {a..b} counts up, zeros kept
    corpus/**/*.jsonl.zst                           .jsonl .ndjson .json, each also .gz .zst, and .parquet

A hub dataset is a list of shard files at one commit, read over https like any other shard.
"""

from __future__ import annotations

import fnmatch
import glob
import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatronish.data.readers.remote import RemoteFile, Retry, insist
from megatronish.data.readers.shards import SHARD_SUFFIXES, Shard
from megatronish.errors import DataError

HUB = "hf://"
DEFAULT_SPLIT = "train"
SPLIT_NAMES = ("train", "validation", "valid", "val", "test", "dev")


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub that is known by name.

    files: glob patterns by split, {config} filled in. url_list: instead, a file of the dataset that lists URLs.
    keys: the fields that make a document, joined by a blank line. licence: what to mind before using it.
    """

    name: str
    repository: str
    config: str
    files: tuple[tuple[str, str], ...]
    keys: tuple[str, ...]
    licence: str
    url_list: str | None = None

    def pattern(self, split: str) -> str:
        """The pattern of a split's files. Raises DataError for a split that it does not have."""
        for name, pattern in self.files:
            if name == split:
                return pattern.replace("{config}", self.config)
        raise DataError(
            f"{HUB}{self.repository} has no split {split!r}; its splits are {[name for name, _ in self.files]}"
        )


NAMED = (
    HubSource(
        "c4",
        "allenai/c4",
        "en",
        (("train", "{config}/c4-train.*.json.gz"), ("validation", "{config}/c4-validation.*.json.gz")),
        ("text",),
        "ODC-BY 1.0, and the Common Crawl terms of use",
    ),
    HubSource(
        "openwebtext2",
        "segyges/OpenWebText2",
        "",
        (("train", "**/*.jsonl.zst"),),
        ("text",),
        "no licence stated: web pages linked from Reddit, each under its author's copyright; a mirror of EleutherAI's files",
    ),
    HubSource(
        "redpajama",
        "togethercomputer/RedPajama-Data-1T",
        "arxiv",
        (("train", "urls/{config}.txt"),),
        ("text",),
        "each subset under its source's licence (arXiv, Common Crawl, GitHub, Stack Exchange, Wikipedia): see the dataset's card",
        url_list="urls/{config}.txt",
    ),
    HubSource(
        "redpajama-sample",
        "togethercomputer/RedPajama-Data-1T-Sample",
        "",
        (("train", "*.jsonl"),),
        ("text",),
        "each subset under its source's licence: see the dataset's card",
    ),
    HubSource(
        "oscar",
        "oscar-corpus/OSCAR-2301",
        "en",
        (("train", "{config}_meta/{config}_meta_part_*.jsonl.zst"),),
        ("content",),
        "gated; CC0 1.0 for the packaging, the text under the Common Crawl terms of use",
    ),
    HubSource(
        "the-stack",
        "bigcode/the-stack-dedup",
        "python",
        (("train", "data/{config}/*.parquet"),),
        ("content",),
        "gated; every file under its repository's own licence with its attribution clauses; removal requests must be honoured",
    ),
    HubSource(
        "fineweb-edu",
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
        (("train", "{config}/*.parquet"),),
        ("text",),
        "ODC-BY 1.0, and the Common Crawl terms of use",
    ),
    HubSource(
        "dolly",
        "databricks/databricks-dolly-15k",
        "",
        (("train", "databricks-dolly-15k.jsonl"),),
        ("instruction", "context", "response"),
        "CC BY-SA 3.0",
    ),
)


@dataclass(frozen=True)
class Location:
    """What a location of `data.path` resolves to. `revision` is the commit of a hub dataset."""

    name: str
    shards: tuple[Shard, ...]
    keys: tuple[str, ...] = ("text",)
    licence: str | None = None
    revision: str | None = None


def is_stream(location: str) -> bool:
    """Whether a location is streamed text rather than the prefix of an indexed dataset."""
    return location.startswith((HUB, "http://", "https://")) or location.lower().endswith(SHARD_SUFFIXES)


def resolve(location: str, retry: Retry, endpoint: str | None = None) -> Location:
    """The shards of a location, in a fixed order. endpoint: of the hub, where it is not HF_ENDPOINT's or the public one.

    Raises DataError for a location without shards, and for a hub that cannot be reached or asks for a token.
    """
    if location.startswith(HUB):
        return _resolve_hub(location, retry, endpoint)
    if location.startswith(("http://", "https://")):
        if not location.split("?")[0].lower().endswith(SHARD_SUFFIXES):
            raise DataError(f"{location}: a shard ends in one of {', '.join(SHARD_SUFFIXES)}")
        return Location(location, tuple(Shard(url) for url in expand_counts(location)))
    paths = [location] if Path(location).is_file() else sorted(glob.glob(location, recursive=True))
    paths = [path for path in paths if path.lower().endswith(SHARD_SUFFIXES) and Path(path).is_file()]
    if not paths:
        raise DataError(f"{location}: no such shard (a path or glob of {', '.join(SHARD_SUFFIXES)})")
    return Location(location, tuple(Shard(path) for path in paths))


def expand_counts(location: str) -> list[str]:
    """`x{08..10}` as x08, x09, x10; several braces multiply. Raises DataError for a range that runs backwards."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", location)
    if found is None:
        return [location]
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise DataError(f"{location}: {found[0]} runs backwards")
    before, after = location[: found.start()], location[found.end() :]
    numbers = [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]
    return [expanded for number in numbers for expanded in expand_counts(f"{before}{number}{after}")]


def parse_hub(location: str) -> tuple[HubSource, str | None, str]:
    """The source, revision and split of an hf:// location. Raises DataError for one that cannot be parsed."""
    parts = re.fullmatch(
        r"hf://(?P<repository>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+?))?(:(?P<config>[\w.-]*)(/(?P<split>\w+))?)?",
        location,
    )
    if parts is None:
        raise DataError(f"{location}: expected hf://OWNER/NAME[@REVISION][:CONFIG[/SPLIT]], such as hf://allenai/c4:en")
    repository, config, split = parts["repository"], parts["config"], parts["split"]
    if config in SPLIT_NAMES and split is None:
        config, split = None, config
    split = split or DEFAULT_SPLIT
    for source in NAMED:
        if repository in (source.name, source.repository):
            return _chosen(source, config), parts["revision"], split
    if "/" not in repository:
        raise DataError(f"{location}: no dataset known as {repository!r}; known: {', '.join(s.name for s in NAMED)}")
    return (
        HubSource(repository, repository, config or "", (), ("text",), "unknown: see the dataset's card"),
        parts["revision"],
        split,
    )


def _chosen(source: HubSource, config: str | None) -> HubSource:
    """A named source with the configuration asked for."""
    chosen = replace(source, config=config or source.config)
    if source.name == "fineweb-edu":  # its samples and its crawls lie in different folders
        folder = (
            f"sample/{chosen.config.removeprefix('sample-')}"
            if chosen.config.startswith("sample-")
            else "data/{config}"
        )
        folder = "data/**" if chosen.config == "default" else folder
        chosen = replace(chosen, files=(("train", f"{folder}/*.parquet"),))
    return chosen


def _resolve_hub(location: str, retry: Retry, endpoint: str | None) -> Location:
    source, wanted, split = parse_hub(location)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise DataError(f"{location}: hf:// needs huggingface_hub: pip install huggingface_hub") from None
    httpx = importlib.util.find_spec(
        "httpx"
    )  # the client's own transport since huggingface_hub 1.0, before it requests
    transport_errors = (importlib.import_module("httpx").TransportError,) if httpx else (OSError,)
    token = huggingface_hub.get_token()
    client = huggingface_hub.HfApi(endpoint=endpoint, token=token)

    def look() -> huggingface_hub.DatasetInfo:
        try:
            return client.dataset_info(source.repository, revision=wanted, timeout=retry.timeout)
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status >= 500 or status in (408, 429):
                raise OSError(str(error)) from None
            raise DataError(f"{location}: {error}") from None
        except errors.OfflineModeIsEnabled as error:
            raise DataError(f"{location}: {error}; unset HF_HUB_OFFLINE, or stream local files") from None
        except transport_errors as error:
            raise OSError(f"the hub does not answer: {error}") from None

    info = insist(location, look, retry)
    revision = info.sha or wanted or "main"
    names = sorted(sibling.rfilename for sibling in info.siblings or [])

    def url(name: str) -> str:
        return huggingface_hub.hf_hub_url(
            source.repository, name, repo_type="dataset", revision=revision, endpoint=client.endpoint
        )

    if source.url_list is not None:
        listed = Shard(url(source.pattern(split)), token, pinned=True)
        shards = tuple(Shard(line) for line in _lines_of(listed, retry) if line.lower().endswith(SHARD_SUFFIXES))
    else:
        shards = tuple(Shard(url(name), token, pinned=True) for name in _select(names, source, split))
    if not shards:
        raise DataError(
            f"{location}: no shard of split {split!r} among the {len(names)} files of {source.repository} at {revision[:12]}; "
            f"shards end in {', '.join(SHARD_SUFFIXES)}"
        )
    return Location(location, shards, source.keys, source.licence, revision)


def _select(names: Sequence[str], source: HubSource, split: str) -> list[str]:
    """The files of a split; of a dataset that is not known by name, the shards in the configuration's folder that name it."""
    if source.files:
        pattern = source.pattern(split)
        loose = pattern.replace("**/", "*")
        return [name for name in names if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, loose)]
    shards = [name for name in names if name.lower().endswith(SHARD_SUFFIXES)]
    if source.config:
        shards = [name for name in shards if source.config in re.split(r"[/.]|-0", name)]
    named = [name for name in shards if split in re.split(r"[\W_]+", name)]
    return named or (shards if split == DEFAULT_SPLIT else [])


def _lines_of(shard: Shard, retry: Retry) -> list[str]:
    with RemoteFile(shard.location, retry, token=shard.token, pinned=True) as file:
        return [line.strip() for line in file.readall().decode("utf-8").splitlines() if line.strip()]
