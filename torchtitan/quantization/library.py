"""torchao, imported late and quietly: it takes seconds, and warns of kernels that nobody asked for."""

import importlib
import logging
from contextlib import ExitStack
from types import ModuleType

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.logging import quiet

VERSION = "0.18.0"
"""What the names that we use of it were checked on, with torch 2.11 and 2.13."""


def torchao(module: str) -> ModuleType:
    """The module of torchao with this name. Raises ConfigError where torchao is not installed."""
    with ExitStack() as stack:
        for name in ("torchao", "torch.utils._pytree"):
            stack.enter_context(quiet(logging.getLogger(name), logging.ERROR))
        try:
            return importlib.import_module(f"torchao.{module}")
        except ImportError as error:
            reason = f"converters of quantize.* need torchao, and it cannot be imported: {error}."
            remedy = f"Install it: pip install torchao=={VERSION}"
            raise ConfigError([Fault("model.converters", reason, remedy)]) from error
