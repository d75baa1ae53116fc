"""Runs the integration cases through run_train.sh and holds their curves against one process's.

`python -m tests.integration_tests.run_tests OUTPUT_DIR [--test_name NAME] [--ngpu N]`
"""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.integration_tests.cases import CASES, REFERENCE, OverrideDefinitions

REPO = Path(__file__).parents[2]
CONFIG_FILE = REPO / "tests/integration_tests/tiny.toml"
RELATIVE_TOLERANCE = 1e-6
TIMEOUT_SECONDS = 240
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES")


def run_case(case: OverrideDefinitions, output_dir: Path) -> list[float]:
    """Launch a case and return its losses by step; raises RuntimeError with the output if it fails."""
    dump_folder = output_dir / case.test_name
    for args in case.override_args:
        args = [f"--job.dump_folder={dump_folder}", *args]
        launch(CONFIG_FILE, args, ngpu=case.ngpu, nnodes=case.nnodes)
    return losses(dump_folder)


def losses(dump_folder: Path) -> list[float]:
    """A run's losses by step."""
    lines = (dump_folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def assert_same_curve(losses: list[float], reference: list[float]) -> None:
    assert len(losses) == len(reference), (losses, reference)
    for step, (loss, expected) in enumerate(zip(losses, reference, strict=True), start=1):
        assert math.isclose(loss, expected, rel_tol=RELATIVE_TOLERANCE), (step, loss, expected)


def launch(
    config_file: Path, args: Sequence[str], ngpu: int = 1, nnodes: int = 1, status: int = 0
) -> str:
    """Start run_train.sh once a node, wait for all, and return what they printed.

    Raises RuntimeError, with that, where one ends with another status.
    """
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    environment |= {"CONFIG_FILE": str(config_file), "NGPU": str(ngpu)}
    if nnodes > 1:
        environment |= {"NNODES": str(nnodes), "RDZV_ENDPOINT": f"localhost:{_free_port()}"}
    nodes = [
        subprocess.Popen(
            [REPO / "run_train.sh", *args],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(nnodes)
    ]
    try:
        output = "\n".join(node.communicate(timeout=TIMEOUT_SECONDS)[0] for node in nodes)
    finally:
        for node in nodes:
            node.terminate()
    if any(node.returncode != status for node in nodes):
        raise RuntimeError(f"{config_file} {' '.join(args)} failed\n{output}")
    return output


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    names = [case.test_name for case in CASES]
    parser.add_argument("--test_name", default="all", choices=["all", *names])
    parser.add_argument("--ngpu", type=int, default=4, help="leave out cases of more ranks")
    args = parser.parse_args()

    reference = run_case(REFERENCE, args.output_dir / "reference")
    failed = 0
    for case in CASES:
        chosen = args.test_name in ("all", case.test_name)
        if not chosen or case.ngpu * case.nnodes > args.ngpu:
            continue
        try:
            assert_same_curve(run_case(case, args.output_dir), reference)
            print(f"passed  {case.test_name}: {case.test_descr}", flush=True)
        except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
            failed += 1
            print(f"FAILED  {case.test_name}: {case.test_descr}\n{error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
