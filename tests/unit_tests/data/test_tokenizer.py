"""Tokenizer files: what is added to a document, and every way in which the files can be wrong."""

import json
import shutil
import subprocess
import sys

import pytest
import tokenizers

from tests.unit_tests.data.helpers import ASSETS, TOKENIZER
from torchtitan.config.faults import ConfigError
from torchtitan.data.tokenizer import build_tokenizer, check_tokenizer


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(ASSETS / "tokenizer", tmp_path / "tokenizer")


def set_config(folder, **entries):
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))


def test_shipped_tokenizer_has_2048_tokens_and_loses_nothing():
    assert TOKENIZER.vocab_size == 2048
    text = "Ünïcode, 数字 12345\n\ttabs and  spaces \U0001f600"
    ids = TOKENIZER.encode(text)
    assert (ids[0], ids[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
    assert TOKENIZER.decode(ids[1:-1]) == text


def test_training_one_replaces_none_unasked(tmp_path):
    script = [sys.executable, str(ASSETS.parents[1] / "scripts" / "train_tokenizer.py")]
    unasked = subprocess.run([*script, "--vocab-size=300"], capture_output=True, text=True)
    assert unasked.returncode == 2 and "--output" in unasked.stderr
    subprocess.run([*script, f"--output={tmp_path}"], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (ASSETS / "tokenizer" / name).read_bytes()


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_bos_and_eos_on_demand(add_bos, add_eos):
    plain = TOKENIZER.backend.encode("some words").ids
    expected = [TOKENIZER.bos_id] * add_bos + plain + [TOKENIZER.eos_id] * add_eos
    assert TOKENIZER.encode("some words", add_bos, add_eos) == expected


def test_bos_of_the_post_processor_is_not_added_again(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, eos = TOKENIZER.backend.id_to_token(0), TOKENIZER.backend.id_to_token(1)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    assert build_tokenizer(folder).encode("words") == TOKENIZER.encode("words")
    set_config(folder, bos_token=eos, eos_token=bos)  # now the template's token is EOS, in front
    assert build_tokenizer(folder).encode("words")[-1] == 0


def test_token_that_both_begins_and_ends_documents(folder):
    token = TOKENIZER.backend.id_to_token(0)
    set_config(folder, bos_token=token, eos_token={"content": token, "lstrip": False})
    ids = build_tokenizer(folder).encode("words")
    assert ids[0] == ids[-1] == 0 and ids.count(0) == 2


def test_without_a_config_nothing_is_added(folder):
    (folder / "tokenizer_config.json").unlink()
    tokenizer = build_tokenizer(folder)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("words") == TOKENIZER.encode("words")[1:-1]


def damage_json(folder):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:5000])


def damage_config(folder):
    (folder / "tokenizer_config.json").write_text("{")


DAMAGES = {
    "no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "no such folder": shutil.rmtree,
    "tokenizer.json cannot be read": damage_json,
    "tokenizer_config.json cannot be read": damage_config,
    "holds list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "'<s>', which is not in the vocabulary": lambda folder: set_config(folder, bos_token="<s>"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_files_are_refused_by_name(folder, message):
    DAMAGES[message](folder)
    with pytest.raises(ConfigError, match=message) as error:
        build_tokenizer(folder)
    assert error.value.faults[0].setting == "model.hf_assets_path"
    assert str(folder) in str(error.value)


def test_sentencepiece_files_are_refused():
    with pytest.raises(ConfigError, match="SentencePiece and tiktoken files are not supported"):
        build_tokenizer("assets/tokenizer/original/tokenizer.model")


@pytest.mark.parametrize("size, num_faults", [(2047, 1), (2048, 0), (2049, 0), (1, 2), (0, 3)])
def test_vocabulary_must_fit_the_embedding(size, num_faults):
    faults = check_tokenizer(TOKENIZER, size)
    assert len(faults) == num_faults
    if faults:
        assert f"embeds only {size}" in str(faults[0]) and "2048 or more" in faults[0].remedy
