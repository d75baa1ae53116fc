"""What a pipeline is made of, and what is refused with which remedy."""

from dataclasses import replace

import pytest

from torchtitan.config.pipeline import PipelinePlan
from torchtitan.config.pipeline_faults import pipeline_faults
from torchtitan.config.schema import (
    ActivationCheckpoint,
    Compile,
    JobConfig,
    Parallelism,
    Training,
)

KEY = "parallelism.pipeline_parallel_"


@pytest.fixture(autouse=True)
def torch_that_splits_backward(monkeypatch):
    """Whatever is installed: what is refused for its sake comes on top of the faults looked for here."""
    monkeypatch.setattr("torchtitan.config.pipeline_faults.version", lambda name: "2.13.0")


def config(ranks=2, local=8, **options):
    known = {k if hasattr(Parallelism, k) else f"pipeline_parallel_{k}": v for k, v in options.items()}
    parallelism = Parallelism(pipeline_parallel_degree=ranks, **known)
    return JobConfig(parallelism=parallelism, training=Training(local_batch_size=local))


def layers(*numbers):
    return tuple(f"layers.{i}" for i in numbers)


FIRST, LAST = "tok_embeddings", ("norm", "output")
CUTS = [
    # layers, what is asked for, modules by stage, ranks by stage
    (6, {}, ((FIRST, *layers(0, 1, 2)), (*layers(3, 4, 5), *LAST)), (0, 1)),
    (
        8,
        {"first_stage_less_layers": 0, "last_stage_less_layers": 2},
        ((FIRST, *layers(0, 1, 2, 3, 4)), (*layers(5, 6, 7), *LAST)),
        (0, 1),
    ),
    (
        7,
        {"schedule": "interleaved1f1b"},
        ((FIRST, *layers(0, 1)), layers(2, 3), layers(4, 5), (*layers(6), *LAST)),
        (0, 1, 0, 1),
    ),
    (
        2,
        {"schedule": "ZBVZeroBubble"},
        ((FIRST,), layers(0), layers(1), LAST),
        (0, 1, 1, 0),
    ),
    (
        4,
        {"schedule": "LoopedBFS", "layers_per_stage": 1},
        ((FIRST,), layers(0), layers(1), layers(2), layers(3), LAST),
        (0, 1, 0, 1, 0, 1),
    ),
    (
        2,
        {"module_fqns_per_model_part": [["layers.0", "tok_embeddings"], ["layers.1", "norm", "output"]]},
        ((FIRST, *layers(0)), (*layers(1), *LAST)),
        (0, 1),
    ),
]


@pytest.mark.parametrize(("n_layers", "options", "modules", "ranks"), CUTS)
def test_layers_are_cut_into_stages(n_layers, options, modules, ranks):
    assert not list(pipeline_faults(config(**options), n_layers))
    plan = PipelinePlan(config(**options), n_layers)
    assert plan.modules == modules and plan.ranks == ranks
    assert [plan.stages_of(0), plan.stages_of(1)] == [
        [stage for stage, rank in enumerate(ranks) if rank == r] for r in (0, 1)
    ]


REFUSED = [
    ({"schedule": "1F2B"}, "schedule", 'Did you mean "1F1B"?'),
    ({"schedule": "PipelineScheduleMulti"}, "schedule", "schedule_csv"),
    ({"ranks": 4, "local": 3}, "training.local_batch_size", "Use 4."),
    ({"ranks": 4, "local": 6, "microbatch_size": 2}, "training.local_batch_size", "Use 8."),
    ({"schedule": "Interleaved1F1B", "local": 5}, "training.local_batch_size", "Use 4 or 6."),
    ({"schedule": "DualPipeV", "local": 2}, "training.local_batch_size", "Use 4."),
    ({"ranks": 16, "local": 16}, "degree", "Use at most 8 ranks."),
    ({"layers_per_stage": 2}, "layers_per_stage", "Use 4 or 5."),
    ({"schedule": "ZBVZeroBubble", "layers_per_stage": 1}, "layers_per_stage", "Use 2."),
    ({"first_stage_less_layers": 5, "last_stage_less_layers": 0}, "", ""),
    ({"first_stage_less_layers": 9}, "first_stage_less_layers", "Use 0 to 8."),
    (
        {"module_fqns_per_model_part": [["tok_embeddings", "layers.0"], ["layers.1", "output"]]},
        "parallelism.module_fqns_per_model_part",
        "layers.2 is in no stage",
    ),
    (
        {
            "module_fqns_per_model_part": [[FIRST, *layers(0, 1, 2)], [*layers(3, 4, 5), *LAST]],
            "layers_per_stage": 4,
        },
        "layers_per_stage",
        "module_fqns_per_model_part says which stages there are. Leave it unset.",
    ),
    ({"schedule_csv": "/no/such.csv"}, "schedule_csv", "No such file"),
    (
        {"schedule": "DualPipeV", "expert_parallel_degree": 2},
        "expert_parallel_overlap",
        "Use false.",
    ),
    (
        {"schedule": "ZBVZeroBubble", "fsdp_reshard_after_forward": "always"},
        "parallelism.fsdp_reshard_after_forward",
        "Use 'never'.",
    ),
]


@pytest.mark.parametrize(("options", "key", "remedy"), REFUSED)
def test_what_cannot_run_is_refused_with_what_can(options, key, remedy):
    faults = list(pipeline_faults(config(**options), n_layers=6))
    if not key:
        assert faults == []
        return
    [fault] = faults
    assert fault.setting == (key if "." in key else KEY + key)
    assert remedy in f"{fault.reason} {fault.remedy}"


@pytest.mark.parametrize(
    ("section", "value", "key"),
    [
        ("compile", Compile(enable=True), "compile.enable"),
        (
            "activation_checkpoint",
            ActivationCheckpoint(mode="selective", selective_ac_option="op"),
            "activation_checkpoint.selective_ac_option",
        ),
    ],
)
def test_what_a_split_backward_cannot_do(section, value, key):
    whole, split = config(schedule="Interleaved1F1B"), config(schedule="InterleavedZeroBubble")
    assert not list(pipeline_faults(replace(whole, **{section: value}), 6))
    assert [f.setting for f in pipeline_faults(replace(split, **{section: value}), 6)] == [key]


FILES = {
    "0F0,0B0\n": "has actions for 1 ranks, and there are 2",
    "0F0,0B0\n1X0\n": "'1X0' is no action",
    "0F0,0B0\n1F0\n": "1B0 happens 0 times",
    "0F0,0F0,0B0\n1F0,1B0\n": "0F0 happens 2 times",
    "0F0,0B0,1F1\n1F0,1B0\n": "stage 1 is on 2 ranks",
    "0F0,0W0,0I0\n1F0,1B0\n": "rank 0 at 0W0",
    "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n": "rank 0 at 0B0, rank 1 at 1F1",
}


@pytest.mark.parametrize("content", FILES)
def test_schedule_files_that_cannot_run_are_refused(content, tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text(content)
    [fault] = pipeline_faults(config(schedule_csv=str(path)), n_layers=6)
    assert fault.setting == f"{KEY}schedule_csv" and FILES[content] in fault.reason


def test_a_schedule_file_says_how_many_microbatches(tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text("0F0,(0F1;0B0)OVERLAP_F_B,,0I1,0W1\n1F0,1B0,1F1,1B1\n")
    assert not list(pipeline_faults(config(schedule_csv=str(path), local=2), 6))
    [fault] = pipeline_faults(config(schedule_csv=str(path), local=3), 6)
    assert (fault.setting, fault.remedy) == ("training.local_batch_size", "Use 2.")


def test_older_versions_of_torch_do_not_split_backward(monkeypatch):
    monkeypatch.setattr("torchtitan.config.pipeline_faults.version", lambda name: "2.11.0+cu130")
    assert not list(pipeline_faults(config(schedule="Interleaved1F1B"), 6))
    [fault] = pipeline_faults(config(schedule="InterleavedZeroBubble"), 6)
    assert "torch 2.11" in fault.reason and "2.13 can" in fault.reason
