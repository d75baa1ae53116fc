"""How fast does training run on a CPU? torchtitan beside a plain loop over transformers' Llama.

    python scripts/benchmarks/cpu_throughput.py --json cpu_throughput.json

Both train the llama3 debug model's shape in fp32: the same batch, AdamW (fused) and clipping, no
recomputation. Ours is the whole program (data, metrics, checks); the other side gets a loop with
tokens made beforehand. Runs are processes of their own and take turns, each side going first in
every other round, so that a change of the machine's load meets both. Warm-up is not counted.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, Spread, table, train, write_report

import torch
import torch.nn.functional as F

from torchtitan.models.llama3 import FLAVORS

WARM_UP = 10
"""Steps that are not counted, on both sides."""


def main() -> None:
    args = _arguments()
    if args.only == "transformers":
        print(json.dumps(train_transformers(args)))
        return
    sides = {"torchtitan": run_torchtitan, "transformers": run_transformers}
    figures = {side: [] for side in sides}
    for index in range(args.runs):
        for side in sorted(sides, reverse=index % 2 == 1):
            figures[side].append(sides[side](args))
            print(f"run {index + 1} {side}: {_tokens_per_second(figures[side][-1]):,.0f} tokens/s")
    rates = {side: Spread.of(map(_tokens_per_second, runs)) for side, runs in figures.items()}
    memory = {side: statistics.median(run["memory_gib"] for run in runs) for side, runs in figures.items()}
    rows = [[side, format(rates[side], ",.0f"), f"{memory[side]:.2f}"] for side in sides]
    print(table(("", "tokens/s", "memory, GiB"), rows))
    speedup = rates["torchtitan"].median / rates["transformers"].median
    print(f"torchtitan / transformers, medians of {args.runs} runs: {speedup:.3f}")
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()}
    write_report(args.json, "cpu", machine=machine, speedup=speedup, rates=rates, runs=figures)


def run_torchtitan(args: argparse.Namespace) -> dict:
    """One run of the real program, measured by its own metrics.jsonl."""
    settings = {
        "job.config_file": ROOT / "train_configs/llama3/debug_model.toml",
        "training.steps": args.steps,
        "training.local_batch_size": args.batch_size,
        "training.seq_len": args.seq_len,
        "training.mixed_precision_param": "float32",
        "activation_checkpoint.mode": "none",
    }
    records = train([f"--{key}={value}" for key, value in settings.items()]).records
    return {
        "seconds_per_step": [r["seconds_per_step"] for r in records[WARM_UP:]],
        "tokens_per_step": args.batch_size * args.seq_len,
        "memory_gib": records[-1]["memory"],
    }


def run_transformers(args: argparse.Namespace) -> dict:
    flags = ["--steps", args.steps, "--batch-size", args.batch_size, "--seq-len", args.seq_len]
    command = [sys.executable, __file__, "--only=transformers", *map(str, flags)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def train_transformers(args: argparse.Namespace) -> dict:
    """The loop a PyTorch user would write around LlamaForCausalLM."""
    model = _transformers_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4, weight_decay=0.1, fused=True)
    vocab_size = model.config.vocab_size
    batches = torch.randint(vocab_size, (args.steps, args.batch_size, args.seq_len + 1))
    seconds, start = [], time.perf_counter()
    for batch in batches:
        logits = model(input_ids=batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
    return {
        "seconds_per_step": seconds[WARM_UP:],
        "tokens_per_step": args.batch_size * args.seq_len,
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _transformers_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # of the dev extra

    shape = FLAVORS["debugmodel"]
    scaling = shape.rope_scaling
    config = LlamaConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        vocab_size=shape.vocab_size,
        rms_norm_eps=shape.norm_eps,
        max_position_embeddings=shape.max_seq_len,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": shape.rope_theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.device("meta"):
        ours = shape.build()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (ours, model)]
    assert sizes[0] == sizes[1], f"{sizes[0]} parameters in ours, {sizes[1]} in transformers'"
    return model


def _tokens_per_second(run: dict) -> float:
    return run["tokens_per_step"] / statistics.fmean(run["seconds_per_step"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="runs of each side")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run, of which 10 warm up")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--only", choices=["transformers"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
