"""What a run takes over from a checkpoint: of its own all, of another's what it asks for."""

import pytest

from torchtitan.checkpoint import storage
from torchtitan.checkpoint.fit import progress_taken_over, resumed_batch_size, takes_optimizer
from torchtitan.config.faults import ConfigError
from torchtitan.config.schema import Checkpoint, Training

PROGRESS = {"step": 3, "model_only": False, "n_tokens_seen": 96, "slots": {"0": {}}, "global_batch_size": 1}


def saved(folder, **changes):
    temporary = storage.temporary_path(folder, 3)
    storage.new_folder(temporary)
    return storage.publish(temporary, {"progress": PROGRESS | changes, "origin": {}, "files": {}})


@pytest.mark.parametrize(
    ("own", "model_only", "settings", "expected"),
    [
        (True, False, {}, True),
        (True, True, {}, False),
        (True, False, {"exclude_from_loading": ["optimizer"]}, False),
        (False, False, {}, False),
        (False, False, {"initial_load_model_only": False}, True),
    ],
)
def test_the_optimizers_state(tmp_path, own, model_only, settings, expected):
    checkpoint = saved(tmp_path, model_only=model_only)
    assert takes_optimizer(checkpoint, Checkpoint(**settings), own) is expected


@pytest.mark.parametrize(
    ("own", "changes", "settings", "keys"),
    [
        (True, {}, {}, set(PROGRESS)),
        (True, {}, {"exclude_from_loading": ["train_state"]}, set(PROGRESS) - {"step", "n_tokens_seen"}),
        (True, {}, {"exclude_from_loading": ["dataloader"]}, {"step", "model_only", "n_tokens_seen"}),
        (True, {"step": 0}, {}, set()),
        (False, {}, {}, set()),
        (False, {}, {"initial_load_model_only": False}, set(PROGRESS)),
    ],
)
def test_progress(tmp_path, own, changes, settings, keys):
    checkpoint = saved(tmp_path, **changes)
    assert set(progress_taken_over(checkpoint, Checkpoint(**settings), own, num_steps=9)) == keys


@pytest.mark.parametrize("own", [True, False])
def test_weights_alone_end_a_run_or_begin_one(tmp_path, own):
    checkpoint, config = saved(tmp_path, model_only=True), Checkpoint(initial_load_model_only=False)
    assert progress_taken_over(checkpoint, config, own, num_steps=3)["step"] == 3
    with pytest.raises(ConfigError, match="holds only the weights"):
        progress_taken_over(checkpoint, config, own, num_steps=4)


def test_a_resumed_run_keeps_its_batch_size():
    assert resumed_batch_size(Training(local_batch_size=2), 2, {}) == 4
    for asked in (-1, 8):
        config = Training(local_batch_size=2, global_batch_size=asked)
        assert resumed_batch_size(config, 2, {"global_batch_size": 8}) == 8
    with pytest.raises(ConfigError, match="batches of 8 sequences"):
        resumed_batch_size(Training(local_batch_size=2, global_batch_size=4), 2, {"global_batch_size": 8})
