"""Hugging Face folders on several ranks: read into any layout, and what a run starts from and ends in."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed_tests.test_data_parallel import build, job, whole
from tests.distributed_tests.test_training import PP2, run
from tests.unit_tests.checkpoint.hf_models import LLAMA3_ROPE, reference
from tests.unit_tests.checkpoint.test_hf import ASSETS, assert_equal, contents
from torchtitan.checkpoint import hf_export
from torchtitan.checkpoint.hf import load_pretrained
from torchtitan.checkpoint.hf_convert import from_hf
from torchtitan.checkpoint.hf_export import save_pretrained
from torchtitan.checkpoint.hf_run import HuggingFace
from torchtitan.distributed.launch import run_ranks

FAMILIES = {
    "llama3, tied": "llama3",
    "qwen3_moe": "qwen3",
    "deepseek_v3, latent queries": "deepseek_v3",
    "gpt_oss": "gpt_oss",
    "llama4, dense layers": "llama4",
}
TP2 = {"tensor_parallel_degree": 2}
EP2 = {"expert_parallel_degree": 2}
LAYOUTS = {
    "fsdp2": (2, job()),
    "fsdp3, uneven": (3, job()),
    "hsdp2x2": (4, job(2)),
    "tp2": (2, job(tp=TP2)),
    "fsdp2 x tp2": (4, job(tp=TP2)),
    "ep2": (2, job(tp=EP2)),
    "ep2 x tp2": (4, job(tp=TP2 | EP2)),
    "ep2 x tp2, etp 2": (4, job(tp=TP2 | EP2 | {"expert_tensor_parallel_degree": 2})),
    "offload": (2, job(training={"enable_cpu_offload": True})),
}
CASES = [
    *(("llama3, tied", layout) for layout in LAYOUTS if "ep2" not in layout),
    *(("qwen3_moe", layout) for layout in LAYOUTS),
    *(("deepseek_v3, latent queries", layout) for layout in ("fsdp3, uneven", "ep2 x tp2, etp 2")),
    ("gpt_oss", "ep2 x tp2, etp 2"),
    ("llama4, dense layers", "ep2 x tp2, etp 2"),
]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """(a folder by transformers, our model of it, its family)."""
    path = tmp_path_factory.mktemp("theirs")
    theirs = reference(request.param)
    theirs.save_pretrained(path, max_shard_size="20kB")  # layers are split over files
    return path, load_pretrained(path), FAMILIES[request.param]


def load_and_save(folder, config, family, job_config, into):
    """The whole tensors of a model that was read into this layout, and written from it."""
    _, model = build(config, job_config)
    hf = HuggingFace(family, config, Path(ASSETS))
    hf.load(folder, model.state_dict(), quantized=False)
    hf_export.MAX_FILE_BYTES = 10_000  # more files than ranks
    save_pretrained(model, into, assets=ASSETS)
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("folder", "layout"), CASES, indirect=["folder"])
def test_every_layout_reads_and_writes_the_same(folder, layout, tmp_path):
    path, expected, family = folder
    world_size, job_config = LAYOUTS[layout]
    ours = tmp_path / "ours"
    config = replace(expected.config, seq_len=8)
    ranks = run_ranks(load_and_save, world_size, path, config, family, job_config, ours)
    for state in ranks:
        assert_equal(state, expected.state_dict())
    assert len(list(ours.glob("*.safetensors"))) > world_size
    assert not list(ours.glob("parts*"))
    assert contents(ours) == contents(path)
    assert_equal(load_pretrained(ours).state_dict(), expected.state_dict())


@pytest.mark.parametrize("layout", [{}, PP2], ids=["fsdp2", "pp2"])
def test_a_run_starts_and_ends_in_hugging_face_folders(layout, tmp_path):
    # The debug model in the sizes of COMMON.
    rope = LLAMA3_ROPE | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
    sizes = {"vocab_size": 2048, "num_attention_heads": 2, "max_position_embeddings": 131072}
    theirs = reference("llama3", **sizes, rope_parameters=rope, rms_norm_eps=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    settings = {
        "training.steps": 2,
        "checkpoint.enable": True,
        "checkpoint.initial_load_in_hf": True,
        "checkpoint.initial_load_path": tmp_path / "theirs",
        "checkpoint.last_save_in_hf": True,
        "checkpoint.export_dtype": "bfloat16",
    }
    _, initial, final, _ = run(tmp_path / "run", world_size=2, **settings | layout)
    assert_equal(initial, weights(tmp_path / "theirs", torch.float32))
    last = tmp_path / "run" / "checkpoint" / "step-2"
    trained = AutoModelForCausalLM.from_pretrained(last)
    assert trained.dtype == torch.bfloat16
    assert trained.generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(last).encode("a") != []
    assert_equal({n: w.bfloat16() for n, w in final.items()}, weights(last, torch.bfloat16))
    # It is the run's newest checkpoint, too.
    _, again, _, _ = run(tmp_path / "run", **settings)
    assert_equal(again, weights(last, torch.float32))
    # A checkpoint of the folder starts a run the same way.
    config = load_pretrained(tmp_path / "theirs").config
    from_hf(tmp_path / "theirs", tmp_path / "step-0", config, "llama3", None)
    start = {"checkpoint.enable": True, "checkpoint.initial_load_path": tmp_path / "step-0"}
    _, converted, _, _ = run(tmp_path / "another", **start | {"training.steps": 1})
    assert_equal(converted, initial)


def weights(folder, dtype):
    return dict(load_pretrained(folder, seq_len=8, dtype=dtype).named_parameters())
