"""What the oracle trains on: the config's own documents where they can be read, and synthetic ones."""

from dataclasses import replace

import numpy as np
import torch

from torchtitan.build import build_data
from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.schema import JobConfig
from torchtitan.config.schema_training import DataLoader
from torchtitan.data.batch import Batch
from torchtitan.data.datasets import parse_dataset
from torchtitan.data.tokenizer import build_tokenizer
from torchtitan.ops.cross_entropy import IGNORE_INDEX


def global_batches(config: JobConfig, vocab_size: int, notes: list[str]) -> tuple[Batch, ...]:
    """The global batch of each step: the first of the config's own data, the second synthetic.

    A shrunk sequence seldom holds more than one document of real text; synthetic ones are short. Where
    the data is not at hand, both are. What was read is noted.
    """
    synthetic = [synthetic_batch(config, vocab_size, step) for step in range(2)]
    try:
        own, what = _own_batch(config, vocab_size)
    except ConfigError as error:
        reason = " ".join(str(fault) for fault in error.faults)
        notes.append(f"packed synthetic documents in place of the data: {reason}")
        return tuple(synthetic)
    notes.append(f"step 1 trains on {what}, step 2 on packed synthetic documents")
    return own, synthetic[1]


def synthetic_batch(config: JobConfig, vocab_size: int, step: int) -> Batch:
    """Random tokens in documents of some ten tokens; ragged, with unequal valid labels."""
    draw = np.random.default_rng([config.debug.seed, step])
    shape = (config.training.global_batch_size, config.training.seq_len)
    stream = draw.integers(vocab_size, size=(shape[0], shape[1] + 1))
    tokens, labels = stream[:, :-1].copy(), stream[:, 1:].copy()
    lengths = []
    for row in range(shape[0]):
        cuts = np.flatnonzero(draw.random(shape[1] - 1) < 0.1) + 1
        lengths.append(np.diff([0, *cuts, shape[1]]).tolist())
        labels[row, cuts - 1] = IGNORE_INDEX  # a document's last token predicts nothing
    labels[0] = IGNORE_INDEX  # as a slot whose data has ended
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        lengths,
        num_valid_tokens=int((labels != IGNORE_INDEX).sum()),
        exhausted=False,
    )


def _own_batch(config: JobConfig, vocab_size: int) -> tuple[Batch, str]:
    """The first batch a run would read, packed as it would be, and a name for it.

    Ids are folded into the vocabulary of a shrunk model. Raises ConfigError where there is nothing to
    read on this machine.
    """
    training = replace(config.training, dataloader=DataLoader())
    specs = parse_dataset(training.dataset, training.dataset_path)
    if any(spec.path is None for spec in specs):
        raise ConfigError([Fault("training.dataset", "is streamed.", value=training.dataset)])
    tokenizer = build_tokenizer(config.model.hf_assets_path)
    num_slots = training.global_batch_size
    batch = next(build_data(training, tokenizer, num_slots, range(num_slots), config.debug.seed))
    if not batch.num_valid_tokens:
        raise ConfigError([Fault("training.dataset", "holds no text.", value=training.dataset)])
    what = f"training.dataset = {training.dataset!r}"
    if tokenizer.vocab_size > vocab_size:
        folded = torch.where(batch.labels == IGNORE_INDEX, IGNORE_INDEX, batch.labels % vocab_size)
        batch = replace(batch, tokens=batch.tokens % vocab_size, labels=folded)
        what += f" (token ids modulo {vocab_size})"
    return batch, what
