"""Runs the integration cases and holds their loss curves against one process's.

`python -m tests.integration_tests.run_tests OUTPUT_DIR [--test_suite features|models] [--test_name NAME] [--ngpu N]`
"""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.integration_tests.cases import MODELS, SUITES, OverrideDefinitions
from torchtitan.distributed.comm import destroy_process_group
from torchtitan.distributed.launch import RankFailure, run_ranks
from torchtitan.train import main as train

REPO = Path(__file__).parents[2]
CONFIG_FILE = REPO / "tests/integration_tests/tiny.toml"
TIMEOUT_SECONDS = 240
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES")


def reference(model: str, output_dir: Path) -> list[float]:
    """The losses of one process, computed once for each output folder."""
    dump_folder = output_dir / f"reference_{model}"
    if not (dump_folder / "config.toml").exists():
        _fork(1, [f"--job.dump_folder={dump_folder}", *MODELS[model]])
    return losses(dump_folder)


def run_case(case: OverrideDefinitions, output_dir: Path) -> list[float]:
    """Run a case and return its losses by step; raises RuntimeError with the output if it fails."""
    dump_folder = output_dir / case.test_name
    for args in case.override_args:
        args = [f"--job.dump_folder={dump_folder}", *MODELS[case.model], *args]
        if case.launched:
            launch(CONFIG_FILE, args, ngpu=case.ngpu, nnodes=case.nnodes)
        else:
            _fork(case.ngpu, args)
    return losses(dump_folder)


def _fork(num_ranks: int, args: Sequence[str]) -> None:
    """Enter training's main in forked ranks."""
    argv = [f"--job.config_file={CONFIG_FILE}", *args]
    run_ranks(_train, num_ranks, argv, _free_port(), timeout=TIMEOUT_SECONDS)


def _train(argv: Sequence[str], port: int) -> None:
    destroy_process_group()  # main makes its own, as under torchrun
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    status = train(argv)
    if status:
        raise RuntimeError(f"exit status {status}")


def losses(dump_folder: Path) -> list[float]:
    """A run's losses by step."""
    lines = (dump_folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def assert_same_curve(losses: list[float], reference: list[float], tolerance: float) -> None:
    assert len(losses) == len(reference), (losses, reference)
    for step, (loss, expected) in enumerate(zip(losses, reference, strict=True), start=1):
        assert math.isclose(loss, expected, rel_tol=tolerance), (step, loss, expected)


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
    parser.add_argument("--test_suite", choices=list(SUITES), help="one of both suites")
    names = [case.test_name for cases in SUITES.values() for case in cases]
    parser.add_argument("--test_name", default="all", choices=["all", *names])
    parser.add_argument("--ngpu", type=int, default=8, help="leave out cases of more ranks")
    args = parser.parse_args()

    failed = 0
    for suite in [args.test_suite] if args.test_suite else SUITES:
        start = time.monotonic()
        passed = 0
        for case in SUITES[suite]:
            chosen = args.test_name in ("all", case.test_name)
            if not chosen or case.ngpu * case.nnodes > args.ngpu:
                continue
            try:
                found = run_case(case, args.output_dir)
                assert_same_curve(found, reference(case.model, args.output_dir), case.tolerance)
                passed += 1
                print(f"passed  {case.test_name}: {case.test_descr}", flush=True)
            except (AssertionError, RuntimeError, RankFailure, subprocess.TimeoutExpired) as error:
                failed += 1
                print(f"FAILED  {case.test_name}: {case.test_descr}\n{error}", flush=True)
        print(f"{suite}: {passed} passed in {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
