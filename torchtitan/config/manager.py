"""How does a run get its configuration? Command line over TOML file over defaults.

`load_config` merges and type-checks; `checks.check_config` then says whether the values can work.
`python -m torchtitan.config.manager --job.config_file X ...` prints the merged config as TOML.
"""

import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torchtitan.config.checks import check_config
from torchtitan.config.command_line import (
    SOURCE,
    Option,
    key_of,
    last_value,
    merge_options,
    split_options,
)
from torchtitan.config.extensions import extended_schema
from torchtitan.config.faults import EXIT_CONFIG, ConfigError, Fault
from torchtitan.config.merge import merge_toml
from torchtitan.config.names import leaf_keys, section_names
from torchtitan.config.schema import JobConfig
from torchtitan.config.toml_file import read_toml, to_toml
from torchtitan.logging import logger


def load_config(argv: Sequence[str]) -> JobConfig:
    """The merged configuration; raises ConfigError with every mistake in the file and in argv.

    Values are checked for their types, and for sense (check_config) only where it raises anyway.
    `--help` in argv prints all keys and exits with status 0.
    """
    options = split_options(argv)
    file, faults = read_toml(last_value(options, "job.config_file"))
    schema, more = extended_schema(_custom_module(options, file.table))
    faults += more
    config, more = merge_toml(schema(), file)
    faults += more
    config, more = merge_options(config, options)
    faults += more
    if faults:
        raise ConfigError(located(faults + _further_faults(config, faults), argv))
    return _follow_deprecated(config)


def key_sources(argv: Sequence[str]) -> dict[str, str]:
    """Where each key that is set comes from: 'file:line' or 'command line'. Defaults are absent."""
    options = split_options(argv)
    file, _ = read_toml(last_value(options, "job.config_file"))
    schema, _ = extended_schema(_custom_module(options, file.table))
    known = leaf_keys(schema)
    sections = section_names(known)
    sources = {key: file.source(key) for key in file.lines if key not in sections}
    return sources | {key_of(option, known): SOURCE for option in options}


def located(faults: Iterable[Fault], argv: Sequence[str]) -> list[Fault]:
    """The faults, each with the place in the file or on the command line its key was set."""
    sources = key_sources(argv)
    return [
        fault if fault.source else replace(fault, source=sources.get(fault.setting, ""))
        for fault in faults
    ]


def main(argv: Sequence[str]) -> int:
    """Print the merged config as TOML, or the mistakes in it; the exit status."""
    try:
        print(to_toml(load_config(argv)), end="")
    except ConfigError as error:
        print(f"The configuration cannot be read:\n{error}", file=sys.stderr)
        return EXIT_CONFIG
    return 0


def _custom_module(options: Sequence[Option], table: dict[str, Any]) -> str:
    """The module that extends the schema, found before there is a schema to read values by."""
    for key in ("job.custom_config_module", "experimental.custom_args_module"):
        section, _, name = key.partition(".")
        keys = table.get(section)
        in_file = keys.get(name) if isinstance(keys, dict) else None
        if module := last_value(options, key) or in_file:
            return module if isinstance(module, str) else ""
    return ""


def _further_faults(config: JobConfig, faults: list[Fault]) -> list[Fault]:
    """What check_config would refuse next, where that does not hang on the faults so far."""
    doubtful = [key for key in leaf_keys(config) if any(key in str(fault) for fault in faults)]
    further = check_config(config)
    return [fault for fault in further if not any(key in str(fault) for key in doubtful)]


def _follow_deprecated(config: JobConfig) -> JobConfig:
    """Values of keys that were renamed but still load, moved to where they are read."""
    if (path := config.model.tokenizer_path) is not None:
        logger.warning("model.tokenizer_path is deprecated: write model.hf_assets_path.")
        model = replace(config.model, hf_assets_path=path, tokenizer_path=None)
        config = replace(config, model=model)
    if module := config.experimental.custom_args_module:
        logger.warning(
            "experimental.custom_args_module is deprecated: write job.custom_config_module."
        )
        module = config.job.custom_config_module or module
        job = replace(config.job, custom_config_module=module)
        experimental = replace(config.experimental, custom_args_module="")
        config = replace(config, job=job, experimental=experimental)
    return config


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `--help | head` ends quietly
    sys.exit(main(sys.argv[1:]))
