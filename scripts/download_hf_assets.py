"""Fetches what a run needs of a model on the Hugging Face Hub: tokenizer, config, weights.

    python scripts/download_hf_assets.py --repo_id meta-llama/Llama-3.1-8B --assets tokenizer config

The files lie in ./assets/hf/<name of the model>, or under --local_dir, and model.hf_assets_path takes
that folder. A download that was interrupted goes on where it stopped; files that are there stay.
HF_TOKEN or --hf_token is needed for models behind a license, HF_ENDPOINT names another server.
"""

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from torchtitan.checkpoint.hf_names import CONFIG, GENERATION, TOKENIZER

PATTERNS = {
    "tokenizer": TOKENIZER,
    "config": (CONFIG, GENERATION),
    "safetensors": ("*.safetensors",),
    "index": ("*.safetensors.index.json",),
}

FAILURES = (*HfHubHTTPError.__bases__, LocalEntryNotFoundError)
"""What the library raises; its releases stand on different HTTP libraries."""


def main() -> int:
    args = _parse()
    patterns = [p for kind, found in PATTERNS.items() if kind in args.kinds for p in found]
    folder = Path(args.local_dir) / args.repo_id.rpartition("/")[2]
    try:
        # Of the files at the top: what lies deeper is other software's.
        api = HfApi(token=args.hf_token)
        names = api.list_repo_files(args.repo_id, revision=args.revision)
        wanted = [n for n in names if "/" not in n and any(fnmatch(n, p) for p in patterns)]
        if not wanted:
            print(f"{args.repo_id} has no {', '.join(sorted(args.kinds))} files.", file=sys.stderr)
            return 1
        snapshot_download(
            args.repo_id,
            revision=args.revision,
            allow_patterns=wanted,
            local_dir=folder,
            token=args.hf_token,
        )
    except FAILURES as error:
        print(f"{args.repo_id}: {_reason(error, args.revision)}", file=sys.stderr)
        return 1
    print(f"{folder}: {', '.join(sorted(wanted))}")
    return 0


def _reason(error: Exception, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return (
            "is behind a license. Accept it on the model's page, and pass --hf_token or set HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}."
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such model, or it is private and --hf_token does not open it."
    return f"{error}. Run the same command again: it goes on where it stopped."


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repo_id", required=True, help="such as meta-llama/Llama-3.1-8B")
    parser.add_argument(
        "--assets",
        nargs="+",
        choices=[*PATTERNS, "all"],
        default=["tokenizer"],
        help="what to fetch; safetensors are the weights, index names their files",
    )
    parser.add_argument("--local_dir", default="assets/hf", help="folder of the models' folders")
    parser.add_argument("--hf_token", help="by default that of HF_TOKEN or of `hf auth login`")
    parser.add_argument("--revision", help="branch, tag or commit; by default main")
    args = parser.parse_args()
    args.kinds = set(PATTERNS) if "all" in args.assets else set(args.assets)
    return args


if __name__ == "__main__":
    sys.exit(main())
