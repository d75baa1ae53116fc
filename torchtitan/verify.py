"""Does a layout compute what one process computes? The oracle, for any training config.

`python -m torchtitan.verify --job.config_file X [overrides]` trains the config's model for two steps
twice, on the layout's ranks and on one, in fp32 on this machine's CPU, and compares every gradient.
`--verify.full` keeps the model's size, `--verify.json FILE` writes the report for machines.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torchtitan.config.faults import EXIT_CONFIG, ConfigError, Fault
from torchtitan.config.manager import load_config
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.launch import run_ranks
from torchtitan.logging import init_logger
from torchtitan.preflight import report
from torchtitan.verify_case import alone, settle, without_rounding
from torchtitan.verify_report import ROUNDING, TOLERANCE, Report, compare_gradients, deviation, summary
from torchtitan.verify_routing import NEAR_TIE, summarize
from torchtitan.verify_steps import Sabotage, run_steps


def verify(config: JobConfig, full: bool = False, sabotage: Sabotage | None = None) -> Report:
    """Compare a config's layout with one process. Raises ConfigError where it cannot work at all."""
    start = time.perf_counter()
    case = settle(config, full)
    reference = run_ranks(run_steps, 1, alone(case), None, None, timeout=600)[0]
    recorded = reference.recorded
    tolerances = {}
    if (finer := without_rounding(case)) != case:
        [unrounded] = run_ranks(run_steps, 1, alone(finer), None, recorded, timeout=600)
        moved = compare_gradients([unrounded], reference, {})
        tolerances = {row.name: max(ROUNDING * row.error, TOLERANCE) for row in moved}
    ranks = run_ranks(run_steps, case.world_size, case, sabotage, recorded, timeout=600)
    near_tie = max([NEAR_TIE, *tolerances.values()])
    return Report(
        settled=list(case.settled),
        world_size=case.world_size,
        loss_deviation=deviation(ranks[0].losses, reference.losses),
        norm_deviation=deviation(ranks[0].norms, reference.norms),
        norms_equal=all(rank.norms == ranks[0].norms for rank in ranks),
        rows=compare_gradients(ranks, reference, tolerances),
        routing=summarize([rank.flips for rank in ranks], ranks[0].loads, reference.loads, near_tie),
        seconds=time.perf_counter() - start,
        peak_mib=[rank.peak_mib for rank in ranks],
    )


def main(argv: Sequence[str]) -> int:
    """Verify the layout that `argv` describes; 0 equal, 1 wrong, 2 refused."""
    init_logger()
    if {"-h", "--help"} & set(argv):
        print(__doc__)  # before the keys of a config
    try:
        argv, full, json_file = _own_options(argv)
        result = verify(load_config(argv), full)
    except ConfigError as error:
        report(error, argv)
        return EXIT_CONFIG
    print(summary(result))
    if json_file:
        content = asdict(result) | {"passed": result.passed, "tolerance": result.tolerance}
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        Path(json_file).write_text(json.dumps(content, indent=1))
    return 0 if result.passed else 1


def _own_options(argv: Sequence[str]) -> tuple[list[str], bool, str | None]:
    """The arguments for the config, and ours: --verify.full and --verify.json FILE."""
    rest, full, json_file = [], False, None
    words = iter(argv)
    for word in words:
        if word == "--verify.full":
            full = True
        elif word == "--verify.json":
            json_file = next(words, "")
        elif word.startswith("--verify.json="):
            json_file = word.partition("=")[2]
        else:
            rest.append(word)
    if json_file == "":
        raise ConfigError([Fault("--verify.json", "needs the name of a file.")])
    return rest, full, json_file


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
