"""Check names and sentences: standard terms only, and one public class per name. `make check` runs it.

    python tools/check_names.py [PATH ...]      some files or folders; default: the repository

Words of BANNED are not used in identifiers, docstrings, comments or messages of the package, launchers, tools and csrc, in
identifiers, docstrings and comments of tests, and in docs. Exit status 1 if any is found.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

# What the field says instead. A boundary is anything but a letter, or a change of case inside an identifier.
BANNED = {
    r"told|tells?|telling|hears?|heard|says?|said|saying": "sends, receives, reports, prints, states",
    r"(go|goes|going|went|gone) on": "resumes, continues",
    r"pass(ed|es|ing) over": "skipped",
    r"lies?": "is stored, is at",
    r"beside|behind": "next to, alongside, after, following",
    r"wholes?": "full, entire, complete",
    r"alike": "equal, the same, equally",
    r"so many": "N, that many",
    r"no numbers?": "non-finite, not a number",
    r"relief|relieves?|relieved|relieving": "out-of-memory fallback",
    r"standings?": "rank status",
    r"meetings?": "rendezvous",
    r"mends?|mended|mending": "fix",
    r"speaks?|spoken": "reports",
    r"(bytes|[KMGT]i?B|tokens|seconds|times|nats|bits|FLOPs?|ms|us|samples|numbers|once|twice|one|steps|rows) an? "
    r"(step|rank|parameter|token|sample|GPU|device|machine|node|epoch|second|checkpoint|value|element|layer|block|run|batch|"
    r"document|byte|core|row|file|sequence|weight)": "per step, per rank, per parameter",
}
PATTERNS = [
    (re.compile(rf"(?<![A-Za-z])(?:{words})(?![A-Za-z])", re.IGNORECASE), instead) for words, instead in BANNED.items()
]
ONCE = {"memory.py", "report.py", "guard.py", "resume.py"}  # file names that need a qualifier when there are two
CODE, PROSE = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"}, {".md"}
SELF = Path(__file__).resolve()


def pieces(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of all that is checked in a file: of Python its identifiers, comments and strings, else every line."""
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(first.lineno)
    skipped = path.parts[0] == "tests"
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING and skipped and token.start[0] not in docstrings:
            continue
        if token.string == "tell":  # the method of files
            continue
        if token.type in (tokenize.NAME, tokenize.COMMENT, tokenize.STRING) or token.type == getattr(
            tokenize, "FSTRING_MIDDLE", -1
        ):
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def words_of(text: str) -> str:
    """The text with identifiers taken apart: `relieve_all`, `RelieveAll` -> words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text.replace("_", " "))


def check_words(root: Path, path: Path) -> list[str]:
    """One line for each banned word of a file."""
    found = []
    for number, text in pieces(path, (root / path).read_text(encoding="utf-8")):
        words = words_of(text)
        for pattern, instead in PATTERNS:
            found += [f"{path}:{number}: {match[0]!r}: {instead}" for match in pattern.finditer(words)]
    return list(dict.fromkeys(found))


def check_classes(root: Path) -> list[str]:
    """One line for each public class name, and each file name of ONCE, that the package has twice."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted((root / "megatronish").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if path.name in ONCE:
            places[path.name].append(name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[f"class {node.name}"].append(name)
    return [f"{what} twice: {', '.join(found)}" for what, found in places.items() if len(found) > 1]


def main(arguments: list[str]) -> int:
    root = SELF.parents[1]
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "--", *arguments], cwd=root, check=True,
                            capture_output=True, text=True).stdout.split()  # fmt: skip
    paths = [Path(name) for name in listed if Path(name).suffix in CODE | PROSE and (root / name).is_file()]
    found = check_classes(root) + [line for path in paths if root / path != SELF for line in check_words(root, path)]
    print("\n".join([*found, f"{len(found)} found"] if found else [f"{len(paths)} files: standard terms"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
