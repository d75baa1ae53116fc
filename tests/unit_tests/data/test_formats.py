"""Every format gives the same batches as plain JSON lines; what cannot be used is named and counted."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tests.unit_tests.data.helpers import TOKENIZER, loaders, run, texts, write_lines
from torchtitan.config.faults import ConfigError
from torchtitan.data.files import JsonLines, write_tokens
from torchtitan.data.loader import DataConfig
from torchtitan.data.source import BadDocument
from torchtitan.logging import logger

TEXTS = texts(30)
LINES = "".join(json.dumps({"text": text, "more": 1}) + "\n" for text in TEXTS)


def write_text_files(folder):
    for number, text in enumerate(TEXTS):
        deeper = folder / f"{number // 10}"
        deeper.mkdir(exist_ok=True)
        (deeper / f"{number:03}.txt").write_text(text)


def write_two_files(folder):
    lines = LINES.splitlines(keepends=True)
    (folder / "1.jsonl").write_text("".join(lines[:7]))
    (folder / "2.json.gz").write_bytes(gzip.compress("".join(lines[7:]).encode()))
    (folder / "README.md").write_text("not data")


def write_parquet(folder):
    table = pyarrow.table({"id": list(range(30)), "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)


def write_token_file(folder):
    write_tokens(folder / "a.bin", map(TOKENIZER.encode, TEXTS), TOKENIZER.vocab_size)


FORMATS = {
    "a.jsonl": lambda folder: (folder / "a.jsonl").write_text(LINES),
    "a.json": lambda folder: (folder / "a.json").write_text(LINES.rstrip("\n")),
    "a.jsonl.gz": lambda folder: (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode())),
    "a.jsonl.zst": lambda folder: (folder / "a.jsonl.zst").write_bytes(
        zstandard.compress(LINES.encode())
    ),
    "a.parquet": write_parquet,
    "a.bin": write_token_file,
    "**/*.txt": write_text_files,
    "": write_two_files,  # the folder
}


@pytest.mark.parametrize("pattern", FORMATS)
def test_formats_give_the_same_batches(tmp_path, pattern):
    folder = tmp_path / "data"
    folder.mkdir()
    FORMATS[pattern](folder)
    expected = run(
        DataConfig(str(write_lines(tmp_path / "x.jsonl", TEXTS)), num_slots=2, seq_len=32, seed=0),
        12,
    )
    config = DataConfig(str(folder / pattern), num_slots=2, seq_len=32, seed=0)
    assert run(config, 12) == expected
    assert run(config, 12, num_workers=2) == expected  # and from the copies made the first time


def test_other_key_and_blank_lines(tmp_path):
    lines = [json.dumps({"body": text}) for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(("\n\n" + "\r\n\n\r\n".join(lines)).encode())
    source = {"path": str(tmp_path / "*.jsonl"), "text_key": "body"}
    expected = run(
        DataConfig(str(write_lines(tmp_path / "x.json", TEXTS)), num_slots=2, seq_len=32, seed=0),
        12,
    )
    assert run(DataConfig(source, num_slots=2, seq_len=32, seed=0), 12) == expected


BAD_LINES = {
    '{"text": "cut': "Unterminated string",
    "[1, 2]": "a JSON object was expected, this is list",
    '{"txt": "a"}': "no key 'text', only 'txt'",
    '{"text": 7}': "'text' holds int, not text",
    '{"text": null}': "'text' holds NoneType, not text",
    '{"text": "\\ud800"}': "surrogates not allowed",
    "[" * 100_000: "recursion",
    '{"text": "\xff"}': "can't decode",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=BAD_LINES.values())
def test_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line.encode("latin-1") + b'\n{"text": "good"}\n')
    file = JsonLines(path, "text")
    assert (file[0], file[2], len(file)) == ("good", "good", 3)
    with pytest.raises(BadDocument, match=rf"a\.jsonl:3: .*{BAD_LINES[line]}"):
        file[1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_lines_are_reported_counted_and_skipped(
    tmp_path, monkeypatch, caplog, packed, num_workers
):
    monkeypatch.setattr(logger, "propagate", True)
    lines = LINES.splitlines(keepends=True)
    lines[4:4] = ["oops\n"]
    lines[20:20] = ['{"text": 1}\n']
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress("".join(lines).encode()) if packed else "".join(lines).encode())
    (loader,) = loaders(
        DataConfig(str(path), num_slots=2, seq_len=32, seed=0, repeat=False),
        num_workers=num_workers,
    )
    for batch in loader:
        if batch.exhausted:
            break
    assert loader.num_skipped_documents == 2
    if num_workers == 0:  # a worker writes to its own stderr
        messages = sorted(
            record.getMessage() for record in caplog.records if "skipped" in record.msg
        )
        assert [f"{path}:21: " in messages[0], f"{path}:5: " in messages[1]] == [True, True]


def test_bad_documents_of_a_source_are_told_once_whatever_the_number_of_slots(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(logger, "propagate", True)
    good = '{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_text(good + "oops\n" * 130)
    (tmp_path / "b.jsonl").write_text(good * 50 + "oops\n" * 3)
    sources = [{"path": str(tmp_path / name), "text_key": "text"} for name in ("a.jsonl", "b.jsonl")]
    (loader,) = loaders(DataConfig(sources, num_slots=20, seq_len=8, seed=0, repeat=False))
    while not next(loader).exhausted:
        pass
    loader.restart()  # as validation does again and again
    next(loader)
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert told.count(f"document skipped: {tmp_path}/a.jsonl:") == 10
    assert {f"{tmp_path}/b.jsonl:{line}:" in told for line in (51, 52, 53)} == {True}
    assert told.count(f"a.jsonl: 100 documents skipped so far; the last: {tmp_path}/a.jsonl:") == 1


def test_null_in_a_parquet_column_is_named_by_its_row(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    (loader,) = loaders(DataConfig(str(tmp_path), num_slots=1, seq_len=4, seed=0, repeat=False))
    next(loader), next(loader)
    assert loader.num_skipped_documents == 1


def refused(tmp_path, message, dataset=None):
    with pytest.raises(ConfigError, match=message) as error:
        loaders(DataConfig(dataset or {"path": str(tmp_path)}, num_slots=1, seq_len=8, seed=0))
    assert error.value.faults[0].setting.startswith("training.dataset")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.bin"])
def test_corrupt_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is not what the name says" * 10)
    refused(tmp_path, name)


def test_truncated_gzip_is_refused_every_time(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-20])
    refused(tmp_path, "ended before")
    refused(tmp_path, "ended before")  # no half-written copy is taken for the whole


@pytest.mark.parametrize("content", ["", "\n\n\n"])
def test_empty_files_are_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    refused(tmp_path, "holds no document")


def test_files_without_any_usable_document_are_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    refused(tmp_path, "no key 'body', only 'text'", {"path": str(tmp_path), "text_key": "body"})


def test_missing_files_are_refused(tmp_path):
    refused(tmp_path, "no file of a known format")


def test_missing_column_and_wrong_column_type_are_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"txt": ["a"]}), tmp_path / "a.parquet")
    refused(tmp_path, "no column 'text', only 'txt'")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "a.parquet")
    refused(tmp_path, "holds int64, not text")


def test_changed_file_is_unpacked_again(tmp_path):
    config = DataConfig(str(tmp_path / "a.jsonl.gz"), num_slots=1, seq_len=8, seed=0)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    before = run(config, 3)
    other = "".join(json.dumps({"text": text}) + "\n" for text in reversed(TEXTS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(other.encode()))
    os.utime(tmp_path / "a.jsonl.gz", ns=(1, 1))
    assert run(config, 3) != before


def test_sample_text_and_tokenizer_train_without_a_network():
    (loader,) = loaders(DataConfig("c4_test", num_slots=4, seq_len=256, seed=0))
    assert next(loader).num_valid_tokens > 900
    (loader,) = loaders(DataConfig("c4_test_validation", 4, seq_len=256, seed=0, repeat=False))
    assert next(loader).num_valid_tokens > 900
