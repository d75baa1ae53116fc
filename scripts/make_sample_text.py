"""How the sample text in tests/assets/c4_test was made: CPython's own prose, cut into documents.

    python scripts/make_sample_text.py

Reads what every CPython installation holds (the documentation topics behind `help()`, docstrings and
comment blocks of the standard library) and writes train and validation documents as JSON lines. The
shipped files came from CPython 3.11.7; another version gives other text.
"""

import ast
import inspect
import io
import json
import random
import re
import shutil
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

ASSETS = Path(__file__).resolve().parents[1] / "tests" / "assets"
VALIDATION_DOCUMENTS = 120
SHORTEST = 160  # characters; below are stubs such as "See help(type(self))."
SKIPPED_FOLDERS = (
    "site-packages",
    "test",
    "tests",
    "lib2to3",
    "idlelib",
    "ensurepip",
    "turtledemo",
    "pydoc_data",
)
# Some modules came with terms of their own; the sample keeps to text under the PSF licence alone.
OTHER_TERMS = re.compile(
    r"permission to use, copy|permission is hereby granted|redistributions? (and use|of source)",
    re.I,
)
LEGAL = re.compile(r"copyright|licen[sc]e|all rights reserved|-\*-|^#!", re.I)


def main() -> None:
    documents = list(dict.fromkeys([*topic_sections(), *library_prose()]))  # each text once
    random.Random(0).shuffle(documents)
    write(ASSETS / "c4_test_validation", documents[:VALIDATION_DOCUMENTS])
    write(ASSETS / "c4_test", documents[VALIDATION_DOCUMENTS:])
    shutil.copy(
        Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", ASSETS / "c4_test" / "LICENSE.txt"
    )


def topic_sections() -> Iterator[str]:
    """The language reference as `help("TOPIC")` shows it, one document a section."""
    heading = re.compile(r"^(?=\S.*\n(?:\*{4,}|={4,}|-{4,})\n)", re.M)
    for topic in topics.values():
        for section in heading.split(topic):
            yield from worth_reading(section)


def library_prose() -> Iterator[str]:
    """Docstrings and comment blocks of the standard library, in the order of its files."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if any(part in SKIPPED_FOLDERS for part in path.relative_to(library).parts[:-1]):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if OTHER_TERMS.search(source):
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue  # deliberately broken sample files
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from worth_reading(ast.get_docstring(node) or "")
        yield from comment_blocks(source)


def comment_blocks(source: str) -> Iterator[str]:
    """Runs of adjacent whole-line comments, without their hashes."""
    block, last = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            if token.start[0] != last + 1:
                yield from worth_reading(inspect.cleandoc("\n".join(block)))
                block = []
            block.append(token.string.lstrip("#"))
            last = token.start[0]
    yield from worth_reading(inspect.cleandoc("\n".join(block)))


def worth_reading(text: str) -> Iterator[str]:
    """The text, if it is long enough, mostly words, and not a legal notice."""
    text = text.strip()
    letters = sum(character.isalpha() or character == " " for character in text)
    if len(text) >= SHORTEST and letters > 0.7 * len(text) and not LEGAL.search(text):
        yield text


def write(folder: Path, documents: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    size = sum(map(len, documents))
    print(
        f"{folder}: {len(documents)} documents, {size:,} characters, CPython {sys.version.split()[0]}"
    )


if __name__ == "__main__":
    main()
