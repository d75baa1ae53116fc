"""The benchmark scripts run, at their smallest, and say what they promise; traces are read rightly."""

import gzip
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.integration_tests.run_tests import REPO
from torchtitan.config.manager import load_config
from torchtitan.models.decoder import DecoderConfig
from torchtitan.models.flops import flops_per_token

BENCHMARKS = REPO / "scripts" / "benchmarks"


def run_script(name, *arguments, launcher=()):
    """Its report and its output."""
    command = [sys.executable, *launcher, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def report_of(name, folder, *arguments, launcher=()):
    out = run_script(name, *arguments, f"--json={folder / 'report.json'}", launcher=launcher)
    assert out.count("| --- |") >= 1
    report = json.loads((folder / "report.json").read_text())
    assert {"device", "torch", "time", "command"} <= set(report)
    return report


def test_training(tmp_path):
    cases = ["debug:eager:none:1", "debug_moe:eager:op:1:tp2ep2:forced", "debug:eager:none:0"]
    traces = f"--traces={tmp_path / 'traces'}"
    sizes = ["--steps=2", "--seq-len=16", traces, "--extra=--training.mixed_precision_param=float32"]
    report = report_of("training", tmp_path, *cases, *sizes)
    assert report["ceilings"]["matmul_tflops"] > 0
    [of_experts] = report["ceilings"]["experts"]
    assert (of_experts["model"], of_experts["loads"]) == ("debug_moe", "even")
    dense, experts, failed = report["cases"]
    assert (dense["num_gpus"], dense["routing"]) == (1, None)
    assert (experts["num_gpus"], experts["routing"]) == (2, "forced")
    assert "training.local_batch_size = 0" in failed["failed"]
    for case in (dense, experts):
        whole, part = case["step_ms"]["median"], case["forward_backward_ms"]["median"]
        assert 0 < part < whole and case["memory_gib"] > 0.1 and case["breakdown"]["step_ms"] > 0
        assert 7 < case["loss"] < 9
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == [
        "debug-eager-none-1.json.gz",
        "debug_moe-eager-op-1-tp2ep2-forced.json.gz",
    ]


@pytest.mark.parametrize(
    ("case", "wrong"),
    [("l8b", "a case is"), ("debug:eager:some:1", "some is none of"), ("debug:eager:none:1:xy2", "a layout")],
)
def test_wrong_cases_are_refused(monkeypatch, case, wrong):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from training import Case

    with pytest.raises(ValueError, match=f"^{case}: {wrong}"):
        Case.parse(case)


def test_experts_add_gpus_only_where_they_are_more_than_the_ranks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from training import Case

    layouts = {"ep2": 2, "tp2ep2": 2, "fsdp2tp2ep8pp2": 16, "kv2tp2": 4, "fsdp1": 1}
    assert {l: Case.parse(f"q6:compile:op:1:{l}").num_gpus for l in layouts} == layouts


@pytest.mark.parametrize(
    ("variant", "converters", "recipes", "exchange"),
    [
        ("float8_experts", ["grouped_mm"], (None, "rowwise_with_gw_hp"), False),
        ("float8_experts_exchange", ["grouped_mm"], (None, "rowwise"), True),
        ("float8_all", ["linear", "grouped_mm"], ("tensorwise", "rowwise_with_gw_hp"), False),
    ],
)
def test_variants_with_experts_in_float8(monkeypatch, variant, converters, recipes, exchange):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from training import Case

    config = load_config(Case.parse(f"q6:{variant}:op:8:ep2").options)
    assert config.model.converters == [f"quantize.{kind}.float8" for kind in converters]
    linear, experts = config.quantize.linear.float8, config.quantize.grouped_mm.float8
    assert (linear.recipe_name, experts.recipe_name) == recipes
    assert (experts.fqns, experts.exchange_in_float8) == (["experts"], exchange)
    assert config.compile.enable and not linear.filter_fqns


def test_step_floor(tmp_path):
    sizes = ["--seq-len=4", "--in-a-row=1", "--rounds=1", "--repeats=1"]
    report = report_of("step_floor", tmp_path, "debug:1", *sizes)
    speed = 1e9 * report["ceilings"]["copy_tb_per_s"]  # bytes a millisecond
    assert [(r["case"], r["joined"]) for r in report["cases"]] == [("debug:1", False), ("debug:1", True)]
    for r in report["cases"]:
        moved = sum(r["bytes"].values())  # the model has one layer
        floor = r["floor_ms"]["median"]
        assert floor == pytest.approx(r["ms"]["both"]["median"] + moved / speed)
        assert r["floor_tokens_per_second"] == pytest.approx(4e3 / floor)
    backends = {r["backend"]: "ms" in r for r in report["attention"]}
    assert backends.keys() == {"CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"}
    assert backends["FLASH_ATTENTION"]


@pytest.mark.parametrize("case", ["l1b", "l1b:0", "q6:1", "some:1"])
def test_floors_are_of_dense_models(monkeypatch, case):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from step_floor import parse

    with pytest.raises(ValueError, match=f"^{case}: a case is model:sequences, with a model of l1b, "):
        parse(case)


TINY = DecoderConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=40, vocab_size=50, seq_len=8)


@pytest.mark.parametrize("joined", [False, True])
def test_a_floors_products_are_the_models(monkeypatch, joined):
    """What is run costs 6 FLOPs a token and weight, and with attention what training reports."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step_parts

    kind = {"device": "cpu", "dtype": torch.float32}
    sizes = step_parts.linear_sizes(TINY, joined)
    linears = [[step_parts.Linear(16, *size, **kind) for size in part] for part in sizes]
    copied = []
    monkeypatch.setattr(step_parts.Passes, "copy", lambda _, size: copied.append(8 * size))
    moved = step_parts.fewest_bytes(TINY, 16, joined)
    passes = step_parts.Passes(moved, "cpu")
    attention, head = step_parts.Attention(TINY, 2, 8, **kind), step_parts.head(TINY, 16, **kind)
    works = step_parts.steps(TINY, attention, head, passes, linears)
    with FlopCounterMode(display=False) as counter:
        works["products"]()
    model = TINY.build()
    embedding = model.tok_embeddings.weight
    matrices = [w for w in model.parameters() if w.dim() == 2 and w is not embedding]
    done = step_parts.operations(TINY, 16, 8)
    assert counter.get_total_flops() == done["products"] == 6 * 16 * sum(w.numel() for w in matrices)
    assert done["both"] == done["products"] + done["attention"] == 16 * flops_per_token(TINY, 8)[1]
    assert not copied
    works["in one go"]()
    of_layers = [moved["forward"]] * 2, [moved["backward"]] * 2
    assert copied == [*of_layers[0], moved["loss"], *of_layers[1], moved["optimizer"]]
    assert not attention.outs


def test_a_floors_bytes_are_those_of_the_models_tensors(monkeypatch):
    """Counted once more, by the tensors that the model itself makes."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from step_parts import fewest_bytes

    model = TINY.build().bfloat16()
    model.fill_buffers(torch.device("cpu"))
    of = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: of.update({name: (args[0], out)}))
    logits = model(torch.zeros(2, 8, dtype=torch.long))
    first, second = "layers.0.", "layers.1."
    linears = ("attention.wq", "attention.wk", "feed_forward.w1", "feed_forward.w3")
    q, k, gate, up = (of[first + name][1] for name in linears)
    h, from_ffn = of[f"{first}feed_forward.w2"]
    x, normed = of[f"{first}attention_norm"]
    middle, normed_middle = of[f"{first}ffn_norm"]
    out, normed_out = of[f"{second}attention_norm"]
    forward = [x, of[f"{first}attention.wo"][1], middle, normed_middle, middle, from_ffn, out, normed_out]
    forward += [q, k, q, k, gate, up, h]
    # Gradients are as large as what they are of.
    backward = [normed_middle, middle, out, middle, normed, x, middle, x]
    backward += [q, k, q, k, h, gate, up, gate, up]
    inputs = [
        of[first + name][0]
        for name, module in model.layers["0"].named_modules()
        if isinstance(module, nn.Linear)
    ]
    kinds = {x.data_ptr(): x for x in inputs}.values()
    assert (len(inputs), len(kinds)) == (7, 4)
    more = sum(x.nbytes for x in inputs) - sum(x.nbytes for x in kinds)
    counted, joined = (fewest_bytes(TINY, 16, joined) for joined in (False, True))
    assert counted["forward"] == joined["forward"] == sum(x.nbytes for x in forward)
    assert counted["backward"] == joined["backward"] + more == sum(x.nbytes for x in backward) + more
    assert counted["loss"] == 2 * logits.nbytes
    # fp32 weight and moments, bf16 copy; the same before, with a gradient for the copy; that for the norm.
    assert counted["optimizer"] == sum((14 + 14 + 2) * w.numel() for w in model.parameters())


def test_moe_layer(tmp_path):
    sizes = ["--shapes=small", "--tokens=4", "--routing=natural", "--no_compile", "--warm_up=0"]
    recipe = "float8_rowwise_with_gw_hp"
    report = report_of("moe_layer", tmp_path, *sizes, "--rounds=1", "--repeats=2", "--recipes", recipe)
    variants = {result["variant"]: result for result in report["results"]}
    layers = ["ours", "ours unfused", "plain", "transformers", recipe]
    assert list(variants) == [*layers, "products", "floor", "dense", "liger"]
    assert all(variants[layer]["difference"] < 0.02 for layer in layers[:-1])
    assert 0.02 < variants[recipe]["difference"] < 0.15
    assert variants["liger"]["missing"] == "liger-kernel needs a GPU"
    assert variants["products"]["busiest_expert"] > 1
    # In bf16, 4 tokens' 8 rows: 2 x 64 + 5 x 32 numbers each; x, or its gradient, four times.
    beside = 2 * (8 * 288 + 4 * 256) / report["ceilings"]["copy_tb_per_s"] / 1e9
    floor, products = (variants[name]["ms"]["median"] for name in ("floor", "products"))
    assert floor == pytest.approx(products + beside)


def test_moe_layers_are_picked_by_name(tmp_path):
    """Balanced, and with the names behind a layer's time."""
    sizes = ["--shapes=small", "--tokens=16", "--routing=balanced", "--warm_up=0"]
    sizes += ["--rounds=1", "--repeats=2"]
    picked = ["--layers", "ours", "transformers", "products", "--kernels", "ours"]
    ours, transformers, products, _ = report_of("moe_layer", tmp_path, *sizes, *picked)["results"]
    assert [r["variant"] for r in (ours, transformers, products)] == ["ours", "transformers", "products"]
    assert max(ours["difference"], transformers["difference"]) < 0.02
    assert products["busiest_expert"] == 1
    kernels = {kernel["name"]: kernel for kernel in ours["kernels"]}
    assert kernels["aten::_grouped_mm"]["calls"] == 6 and "kernels" not in products


FLOAT8 = ["float8 experts", "float8 experts and exchange"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_dispatcher(tmp_path, num_ranks):
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    argv = ["--small", "--warm_up=0", "--rounds=1", "--repeats=2", "--routing=random"]
    launcher = ranks if num_ranks > 1 else []
    report = report_of("dispatcher", tmp_path, *argv, "--float8", launcher=launcher)
    names = ["standard", *FLOAT8] if num_ranks > 1 else ["local"]
    with_shared = ["standard", "standard, in one go", *FLOAT8] if num_ranks > 1 else names
    assert [(r["what"], r["dispatcher"]) for r in report["results"]] == [
        *(("exchange", name) for name in names), *(("layer", name) for name in names),
        *(("layer with shared", name) for name in with_shared),
    ]  # fmt: skip
    for result in report["results"]:
        rounded = FLOAT8[1:] if result["what"] == "exchange" else FLOAT8
        differs = result["dispatcher"] in rounded
        assert 0 < result["difference"] < 0.15 if differs else result["difference"] == 0
    moved = {result["dispatcher"]: result["mb_per_layer"] for result in report["results"]}
    ceilings = report["ceilings"]
    assert ceilings["matmul_tflops"] > 0 and ceilings["copy"]["gb_per_s"] > 0
    if num_ranks == 1:
        assert moved == {"local": 0} and "all_to_all" not in ceilings
    else:  # 64 numbers of 2 bytes, two of four times of 1; a score's 16 bytes two times, or three
        assert ceilings["all_to_all"]["gb_per_s"] > 0 and moved["standard"] == moved[FLOAT8[0]]
        assert moved[FLOAT8[1]] / moved["standard"] == pytest.approx(432 / 544)


def test_data_loading(tmp_path):
    sizes = ["--batches=2", "--batch-size=2", "--seq-len=64", "--documents=20", "--workers", 0, 1]
    results = report_of("data_loading", tmp_path, *sizes)["results"]
    assert [(r["source"], r.get("workers")) for r in results] == [
        ("tokenizer alone", None), ("text", 0), ("text", 1), ("tokens", 0), ("tokens", 1),
    ]  # fmt: skip


def test_cpu_throughput(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of steps this small would only wait for each other
    sizes = ["--runs=1", "--steps=12", "--batch-size=1", "--seq-len=16"]
    report = report_of("cpu_throughput", tmp_path, *sizes)
    [ours], [theirs] = report["runs"]["torchtitan"], report["runs"]["transformers"]
    for run in (ours, theirs):
        assert len(run["seconds_per_step"]) == 2 and run["tokens_per_step"] == 16 and run["memory_gib"] > 0.1
    rates = report["rates"]
    assert report["speedup"] == rates["torchtitan"]["median"] / rates["transformers"]["median"] > 0


def test_startup(tmp_path):
    small = "--model.overrides.n_layers=1 --compile.backend=aot_eager --training.seq_len=16"
    report = report_of("startup", tmp_path, "--repeats=1", f"--extra={small}")
    starts = {start["start"]: start["starts"][0] for start in report["starts"]}
    assert list(starts) == ["eager", "compiled, cold", "compiled, warm"]
    for start in starts.values():
        parts = sum(seconds for part, seconds in start.items() if part != "total")
        assert parts == pytest.approx(start["total"], abs=0.1)


def test_checkpoint(tmp_path):
    report = report_of("checkpoint", tmp_path, "--factor=16384", "--repeats=1", f"--folder={tmp_path}")
    assert set(report["results"]) == {"disabled", "async"}


def event(cat, name, start, length, tid=1, **arguments):
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length, "tid": tid, "args": arguments}


def launch(number, start, *kernel, tid=1):
    """A kernel, and what launched it."""
    yield event("cuda_runtime", "cudaLaunchKernel", start, 1, tid, correlation=number)
    yield event("kernel", *kernel, tid=7, correlation=number)


GPU_STEP = [
    event("user_annotation", "ProfilerStep#10", 0, 1000),
    event("kernel", "_update", 0, 80, tid=7, correlation=99),  # of the step before
    event("user_annotation", "FSDP::all_gather_copy_in", 0, 50),
    *launch(1, 10, "multi_tensor_apply_kernel<copy>", 100, 10),
    *launch(2, 60, "nvjet_hsh_256x128", 110, 100),
    event("cpu_op", "aten::_grouped_mm", 200, 50),
    *launch(3, 210, "cutlass::device_kernel<GroupProblemShape>", 210, 40),
    *launch(4, 300, "ncclDevKernel_AllGather", 240, 30),  # 10 of it under the grouped product
    event("user_annotation", "Optimizer.step#AdamW.step", 400, 90),
    *launch(5, 410, "multi_tensor_apply_kernel<FusedAdam>", 300, 20),
    *launch(6, 500, "triton_poi_fused_mul_silu_1", 320, 5),
    *launch(7, 600, "pytorch_flash::flash_bwd", 325, 20),
    *launch(9, 650, "triton_poi_fused__scaled_mm__to_copy_clamp_2", 345, 5),
    *launch(8, 700, "triton_red_fused__log_softmax_2", 350, 50),
    event("gpu_memset", "Memset (Device)", 390, 10, 7),
]
OF_GPU = {
    "FSDP copies and casts": 10, "dense GEMM": 100, "grouped GEMM": 40, "communication": 30,
    "clip and optimizer": 20, "attention": 20, "scales and casts to float8": 5, "loss": 50, "norms and elementwise": 15,
}  # fmt: skip
CPU_STEP = [
    event("user_annotation", "ProfilerStep#10", 0, 200),
    event("cpu_op", "aten::linear", 0, 100),
    event("cpu_op", "aten::mm", 10, 80),
    event("cpu_op", "aten::_scaled_dot_product_flash_attention_for_cpu", 120, 40),
    event("cpu_op", "aten::empty", 130, 10),
]
OF_CPU = {"dense GEMM": 80, "attention": 40, "norms and elementwise": 20}


@pytest.mark.parametrize(
    ("events", "kinds", "alone", "idle", "step"),
    [(GPU_STEP, OF_GPU, 20, 30, 300), (CPU_STEP, OF_CPU, 0, 20, 160)],
)
def test_a_trace_is_broken_down_by_kind_of_work(tmp_path, events, kinds, alone, idle, step):
    """Each kernel and operator counts once; what waits for communication and idles is told apart."""
    trace, out = tmp_path / "trace.json.gz", tmp_path / "sums.json"
    with gzip.open(trace, "wt") as file:
        json.dump({"traceEvents": [*events, {"ph": "i", "name": "an instant"}]}, file)
    assert "| ms a step |" in run_script("breakdown", trace, "--top=3", f"--json={out}")
    report = json.loads(out.read_text())
    assert {"device", "torch", "time", "command"} <= set(report)
    [sums] = report["traces"].values()
    found = {kind: 1e3 * ms for kind, ms in sums["kinds_ms"].items() if ms}
    assert found == pytest.approx(kinds)
    found = [1e3 * sums[key] for key in ("exposed_communication_ms", "idle_ms", "step_ms")]
    assert found == pytest.approx([alone, idle, step])
