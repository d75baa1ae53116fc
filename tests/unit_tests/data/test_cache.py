"""Copies of data: where they lie, and what is said and left where they cannot be written."""

import errno
import gzip

import pytest

from torchtitan.config.faults import ConfigError
from torchtitan.data.cache import cached
from torchtitan.data.indexed import open_files


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    return path


def touch(target):
    target.write_text("copy")


@pytest.mark.parametrize(
    "xdg, folder",
    [(None, "home/.cache"), ("", "home/.cache"), ("not/absolute", "home/.cache"), ("xdg", "xdg")],
)
def test_copies_lie_in_the_cache_folder_of_the_user(tmp_path, monkeypatch, packed, xdg, folder):
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / xdg) if xdg == "xdg" else xdg)
    copy = cached(packed, ".jsonl", touch)
    assert copy.parent == tmp_path / folder / "torchtitan" / "data"
    assert copy.read_text() == "copy"


def test_a_cache_that_is_no_folder_is_named_with_the_way_out(tmp_path, monkeypatch, packed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as error:
        open_files(str(packed), "text", "training.dataset_path")
    (fault,) = error.value.faults
    folder = tmp_path / "file" / "torchtitan" / "data"
    assert fault.reason == f"its copy or index cannot be written to {folder}: Not a directory."
    assert "XDG_CACHE_HOME" in fault.remedy


@pytest.mark.parametrize(
    "error, named",
    [(OSError(errno.ENOSPC, "No space left on device"), True), (ValueError("bad row"), False)],
)
def test_a_copy_that_fails_leaves_no_part_of_it(tmp_path, packed, error, named):
    def write(target):
        target.write_text("half")
        raise error

    with pytest.raises(type(error)) as raised:
        cached(packed, ".jsonl", write)
    folder = tmp_path / "home" / ".cache" / "torchtitan" / "data"
    assert (f"{folder}: No space left on device" in str(raised.value)) == named
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
