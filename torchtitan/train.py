"""Entry point of one rank: configuration, then a Trainer, then its run."""

import signal
import sys
from collections.abc import Sequence
from functools import partial

if __name__ == "__main__":  # what is imported now takes seconds: Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from torchtitan.agreement import check_agreement
from torchtitan.checkpoint.find import what_is_left
from torchtitan.config.faults import EXIT_CONFIG, ConfigError
from torchtitan.config.manager import load_config
from torchtitan.distributed.comm import (
    World,
    destroy_process_group,
    init_process_group,
    pick_device,
)
from torchtitan.dry_run import dry_run
from torchtitan.host_memory import keep_freed_memory
from torchtitan.logging import init_logger, logger
from torchtitan.observability.clock import StartClock
from torchtitan.observability.watchdog import Watchdog
from torchtitan.preemption import EXIT_START_AGAIN, StopRequest
from torchtitan.preflight import prepare, prepare_again, report, world_size_asked_for
from torchtitan.quantization.converters import unused_sections
from torchtitan.reproducibility import make_deterministic
from torchtitan.run_lock import hold_folder
from torchtitan.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says; returns the exit status."""
    start = StartClock()
    start.done("imports")
    init_logger()
    world = World.from_environment()
    device = pick_device(world)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        config = load_config(argv)
        if world.rank == 0:
            for line in unused_sections(config):
                logger.warning(line)
        if config.comm.mode == "fake_backend":
            for line in dry_run(config, world_size_asked_for()):
                logger.info(line)
            return 0
        setup = prepare(config, world.size, device)
        if world.rank == 0:
            hold_folder(config.job.dump_folder)
    except ConfigError as error:
        if world.rank == 0:
            report(error, argv)
        return EXIT_CONFIG
    start.done("checks")
    stop = StopRequest(config.checkpoint.max_run_seconds)
    resumable = config.checkpoint.enable and not config.checkpoint.load_only
    if resumable:
        stop.listen()
    dump_folder, timeout = config.job.dump_folder, config.comm.init_timeout_seconds
    make_deterministic(config.debug)
    init_process_group(config.comm, dump_folder, device)
    farewell = partial(what_is_left, config)
    with Watchdog(world, timeout, dump_folder, not resumable, farewell) as watchdog:
        try:
            check_agreement(config)
            setup = prepare_again(setup, world.size, device)
        except ConfigError as error:
            if world.local_rank == 0:  # on every machine: its user may look there
                report(error, argv)
            status = EXIT_CONFIG
        else:
            start.done("process group")
            done = Trainer(setup, world, device, watchdog, stop, start).run()
            status = 0 if done else EXIT_START_AGAIN
    # Not within: without an agent, watchdogs speak through a store of rank 0, which ends after this.
    destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
