"""What both conversions are told, and how they say what is wrong."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchtitan.config.faults import EXIT_CONFIG, ConfigError
from torchtitan.config.manager import load_config
from torchtitan.models.registry import model_config


@dataclass(frozen=True)
class Arguments:
    """A conversion's command line."""

    input: Path
    output: Path
    model_name: str
    model_config: Any
    dtype: torch.dtype | None
    hf_assets_path: Path | None = None


def run(convert: Callable[[Arguments], None], doc: str, takes_assets: bool = False) -> int:
    """Convert as the command line says; returns the exit status."""
    try:
        args = _parse(doc, takes_assets)
        convert(args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    print(args.output)
    return 0


def _parse(doc: str, takes_assets: bool) -> Arguments:
    parser = argparse.ArgumentParser(
        description=doc,
        epilog="Sizes that no flavor has: --model.overrides.n_layers 2, and so on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="the folder to read")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder to make")
    parser.add_argument("--model_name", required=True, help="the family, such as llama3")
    parser.add_argument("--model_flavor", required=True, help="the flavor, such as 8B")
    parser.add_argument(
        "--export_dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the weights; by default the input's",
    )
    if takes_assets:
        parser.add_argument("--hf_assets_path", type=Path, help="folder of the tokenizer to add")
    args, others = parser.parse_known_args()
    given = ["--model.name", args.model_name, "--model.flavor", args.model_flavor]
    model = load_config([*given, *others]).model
    return Arguments(
        args.input,
        args.output,
        model.name,
        model_config(model.name, model.flavor, model.overrides),
        args.export_dtype and getattr(torch, args.export_dtype),
        args.hf_assets_path if takes_assets else None,
    )
