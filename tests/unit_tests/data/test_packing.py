"""Sequences, labels and lengths of pieces against a plain reading of the documents."""

import pytest
import torch

from tests.unit_tests.data.helpers import (
    TOKENIZER,
    loaders,
    run,
    texts,
    until_exhausted,
    write_lines,
    write_numbered,
)
from torchtitan.data.batch import IGNORE_INDEX
from torchtitan.data.files import write_tokens
from torchtitan.data.loader import DataConfig
from torchtitan.data.permutation import mix, permute
from torchtitan.data.source import DataError


@pytest.mark.parametrize("seq_len", [1, 7, 16, 1000])
def test_batches_are_what_the_slot_scheme_says(tmp_path, seq_len):
    documents = [TOKENIZER.encode(text) for text in texts(50)]
    write_lines(tmp_path / "a.jsonl", texts(50))
    config = DataConfig(str(tmp_path / "a.jsonl"), num_slots=4, seq_len=seq_len, seed=9)
    (loader,) = loaders(config)
    batches = [next(loader) for _ in range(3)]
    for slot in range(4):
        stream = []  # (token, label) of the first epochs, document after document
        for epoch in range(seq_len // 50 + 2):
            for place in range(slot, 50, 4):
                tokens = documents[permute(place, 50, mix(9, 0, epoch))]
                stream += zip(tokens, [*tokens[1:], IGNORE_INDEX])
        for step, batch in enumerate(batches):
            window = stream[step * seq_len : (step + 1) * seq_len]
            assert list(zip(batch.tokens[slot].tolist(), batch.labels[slot].tolist())) == window


@pytest.mark.parametrize("seq_len", [1, 5, 8, 64])
def test_every_token_is_a_label_once_except_the_first_of_each_document(tmp_path, seq_len):
    documents = write_numbered(tmp_path / "a.bin", [1, 2, 30, 8, 8, 0, 64, 3, 5, 100, 1, 17])
    config = DataConfig(str(tmp_path / "a.bin"), num_slots=3, seq_len=seq_len, seed=1, repeat=False)
    seen, learned = [], []
    for batch in until_exhausted(loaders(config)[0]):
        valid = batch.labels != IGNORE_INDEX
        assert batch.num_valid_tokens == valid.sum()
        assert (
            batch.labels[valid] == batch.tokens[valid] + 1
        ).all()  # numbers count up in a document
        seen += batch.tokens[batch.tokens != 0].tolist()  # 0 is padding here
        learned += batch.labels[valid].tolist()
    assert sorted(seen) == [token for document in documents for token in document]
    assert sorted(learned) == [token for document in documents for token in document[1:]]


def test_pieces_are_the_documents_parts(tmp_path):
    write_numbered(tmp_path / "a.bin", [1, 2, 30, 8, 8, 64, 3, 5, 100, 1, 17])
    config = DataConfig(str(tmp_path / "a.bin"), num_slots=2, seq_len=16, seed=1, repeat=False)
    for batch in until_exhausted(loaders(config)[0]):
        for tokens, labels, lengths in zip(batch.tokens, batch.labels, batch.document_lengths):
            assert sum(lengths) == 16 and min(lengths) > 0
            for piece, following in zip(tokens.split(lengths), labels.split(lengths)):
                if piece[0]:  # not padding
                    assert (piece.diff() == 1).all() and (following[:-1] == piece[1:]).all()


def test_what_tokens_are_called_moves_no_boundary(tmp_path):
    """Ends of text inside documents, also where they are the padding, and an id 0 that is content."""
    lengths = [7, 1, 12, 5, 30, 9]
    plain = write_numbered(tmp_path / "plain.bin", lengths)
    special = (0, TOKENIZER.eos_id, TOKENIZER.bos_id)
    odd = [[special[token % 3] for token in document] for document in plain]
    write_tokens(tmp_path / "odd.bin", odd, TOKENIZER.vocab_size)
    ours, theirs = (
        until_exhausted(
            loaders(DataConfig(str(tmp_path / name), num_slots=2, seq_len=16, seed=3, repeat=False))[0]
        )
        for name in ("odd.bin", "plain.bin")
    )
    for batch, expected in zip(ours, theirs, strict=True):
        assert batch.document_lengths == expected.document_lengths
        assert batch.num_valid_tokens == expected.num_valid_tokens
        assert torch.equal(batch.labels == IGNORE_INDEX, expected.labels == IGNORE_INDEX)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_slots_run_dry_one_by_one(tmp_path, num_workers):
    write_numbered(tmp_path / "a.bin", [10, 25, 1])
    config = DataConfig(
        str(tmp_path / "a.bin"), num_slots=4, seq_len=10, seed=0, repeat=False, shuffle=False
    )
    ranks = loaders(config, num_ranks=2, num_workers=num_workers)
    steps = [[next(loader) for loader in ranks] for _ in range(4)]
    lengths = [[rank.document_lengths for rank in step] for step in steps]
    assert lengths[0] == [[[10], [10]], [[1, 9], [10]]]  # slot 3 has no document at all
    assert lengths[2] == [[[10], [5, 5]], [[10], [10]]]
    valid = [[rank.num_valid_tokens for rank in step] for step in steps]
    assert valid == [[9 + 10, 0], [10, 0], [4, 0], [0, 0]]
    exhausted = [[rank.exhausted for rank in step] for step in steps]
    assert exhausted == [[False, False], [False, True], [False, True], [True, True]]


def test_fewer_documents_than_slots(tmp_path):
    documents = write_numbered(tmp_path / "a.bin", [30, 40])
    config = DataConfig(str(tmp_path / "a.bin"), num_slots=5, seq_len=20, seed=0)
    for batch in [next(loader) for loader in loaders(config) for _ in range(20)]:
        assert all(tokens.diff().ne(0).any() for tokens in batch.tokens)  # no slot is empty
        assert not batch.exhausted
    once = DataConfig(str(tmp_path / "a.bin"), num_slots=5, seq_len=20, seed=0, repeat=False)
    batches = until_exhausted(loaders(once)[0])
    assert sum(batch.num_valid_tokens for batch in batches) == sum(len(d) - 1 for d in documents)


def test_documents_without_tokens_do_not_loop_forever(tmp_path):
    write_numbered(tmp_path / "a.bin", [0, 9])
    config = DataConfig(str(tmp_path / "a.bin"), num_slots=2, seq_len=8, seed=0, shuffle=False)
    with pytest.raises(DataError, match="no text for slot 0"):
        next(loaders(config)[0])


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    write_numbered(tmp_path / "a.bin", [8], first=TOKENIZER.vocab_size - 4)
    config = DataConfig(str(tmp_path / "a.bin"), num_slots=1, seq_len=8, seed=0)
    for num_workers in (0, 1):
        with pytest.raises(DataError, match="token 2051 in a pre-tokenized document"):
            next(loaders(config, num_workers=num_workers)[0])


def test_resuming_on_other_data_is_noticed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["many words " * 50])
    config = DataConfig(str(path), num_slots=1, seq_len=64, seed=0)
    _, states = run(config, steps=1)
    write_lines(path, ["few words"])
    with pytest.raises(DataError, match="not the one the checkpoint was made with"):
        run(config, steps=1, states=states)


def test_batch_tensors_are_what_the_model_takes():
    (loader,) = loaders(DataConfig("c4_test", num_slots=2, seq_len=32, seed=0))
    batch = next(loader)
    assert batch.tokens.shape == batch.labels.shape == (2, 32)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
