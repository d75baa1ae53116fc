"""Which runs must work from end to end: one entry each, launched through run_train.sh."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OverrideDefinitions:
    """One case: launches one after the other into the same dump folder, each with its arguments."""

    override_args: tuple[tuple[str, ...], ...]
    test_descr: str
    test_name: str
    ngpu: int = 1
    """Ranks on each machine."""
    nnodes: int = 1
    """Launchers that meet on this host, as they would on several machines."""


REFERENCE = OverrideDefinitions(((),), "one process", "one_process")

CASES = (
    REFERENCE,
    OverrideDefinitions(
        (("--training.local_batch_size=6",),),
        "FSDP over two ranks",
        "fsdp_2",
        ngpu=2,
    ),
    OverrideDefinitions(
        (("--training.local_batch_size=4", "--parallelism.fsdp_reshard_after_forward=never"),),
        "FSDP over three ranks, which divide no weight evenly, weights kept after forward",
        "fsdp_3",
        ngpu=3,
    ),
    OverrideDefinitions(
        (
            (
                "--training.local_batch_size=3",
                "--parallelism.data_parallel_replicate_degree=2",
                "--parallelism.data_parallel_shard_degree=2",
            ),
        ),
        "HSDP: two replicas of two shards",
        "hsdp_2x2",
        ngpu=4,
    ),
    OverrideDefinitions(
        (
            (
                "--training.local_batch_size=6",
                "--parallelism.data_parallel_replicate_degree=2",
                "--parallelism.data_parallel_shard_degree=1",
            ),
        ),
        "two replicas",
        "replicate_2",
        ngpu=2,
    ),
    OverrideDefinitions(
        (("--training.local_batch_size=2",),),
        "gradient accumulation over three microbatches, FSDP over two ranks",
        "accumulation",
        ngpu=2,
    ),
    OverrideDefinitions(
        (("--activation_checkpoint.mode=full",),),
        "full activation checkpointing",
        "ac_full",
    ),
    OverrideDefinitions(
        (
            (
                "--activation_checkpoint.mode=selective",
                "--activation_checkpoint.selective_ac_option=op",
            ),
        ),
        "activation checkpointing by operator",
        "ac_selective_op",
    ),
    OverrideDefinitions(
        (("--compile.enable", "--compile.backend=aot_eager", "--training.local_batch_size=6"),),
        "compiled blocks and loss, FSDP over two ranks",
        "compile",
        ngpu=2,
    ),
    OverrideDefinitions(
        (
            (
                "--checkpoint.enable",
                "--checkpoint.no_last_save_model_only",
                "--training.steps=2",
            ),
            ("--checkpoint.enable",),
        ),
        "stop after two steps, resume",
        "checkpoint_resume",
    ),
    OverrideDefinitions(
        (
            (
                "--validation.enable",
                "--validation.dataset=c4_test",
                "--validation.local_batch_size=2",
                "--validation.seq_len=64",
                "--validation.steps=2",
                "--validation.freq=2",
                "--training.dataloader.num_workers=2",
            ),
        ),
        "validation beside training; documents read by two worker processes",
        "validation",
    ),
    OverrideDefinitions(
        (("--training.local_batch_size=3",),),
        "two launchers of two ranks each, as on two machines",
        "two_nodes",
        ngpu=2,
        nnodes=2,
    ),
)
