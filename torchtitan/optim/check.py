"""Does the optimizer fit the installation, the model, and the checkpoint that a run goes on from?"""

from collections.abc import Collection, Mapping
from importlib.util import find_spec

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.optimizer_groups import read_groups
from torchtitan.config.schema import Optimizer
from torchtitan.optim.groups import Settings, check_patterns


def check_optimizer(config: Optimizer, num_dims: Mapping[str, int]) -> None:
    """Raise ConfigError for what cannot work with a model of these parameters: dimensions by name."""
    check_patterns(config, num_dims)
    if config.uses_torchao and find_spec("torchao") is None:
        key = "bf16_stochastic_round" if config.bf16_stochastic_round else "name"
        reason = "is torchao's, which is not installed."
        remedy = "Install it: pip install torchao==0.18.0."
        raise ConfigError([Fault(f"optimizer.{key}", reason, remedy, getattr(config, key))])


def check_saved_state(
    config: Optimizer, num_dims: Mapping[str, int], saved: Collection[str], checkpoint: object
) -> None:
    """Raise ConfigError where the state of a checkpoint (its tensors' names) is another optimizer's."""
    tables = read_groups(config)
    for name, dims in num_dims.items():
        is_muons = Settings.of(name, dims, config, tables).optimizer == "Muon"
        state = f"optimizer.{name}.{'momentum_buffer' if is_muons else 'exp_avg'}"
        if state not in saved:
            reason = f"{checkpoint} was saved with another optimizer: it has no {state}."
            remedy = 'Set checkpoint.exclude_from_loading = ["optimizer"] to begin with new state.'
            raise ConfigError([Fault("optimizer.name", reason, remedy, config.name)])
