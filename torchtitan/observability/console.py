"""What a logged step looks like on the console: one line, the format of upstream's."""

import os
import sys
from collections.abc import Mapping
from datetime import timedelta

COLORS = {
    "red": "\033[31m",
    "green": "\033[32m",
    "yellow": "\033[33m",
    "blue": "\033[34m",
    "magenta": "\033[35m",
    "cyan": "\033[36m",
    "orange": "\033[38;2;180;60;0m",
    "turquoise": "\033[38;2;54;234;195m",
}
RESET = "\033[39m"


def shows_color() -> bool:
    """Whether the log is read on a terminal: this process's, or the launcher's, which says so."""
    return sys.stderr.isatty() or "FORCE_COLOR" in os.environ


def training_line(record: Mapping[str, float], eta_seconds: float | None, *, color: bool) -> str:
    """A training step's record (the fields of docs/metrics.md); what does not apply is left out."""
    parts = [
        ("red", f"step: {record['step']:2}"),
        ("green", f"loss: {record['loss']:8.5f}"),
        ("orange", f"grad_norm: {record['grad_norm']:7.4f}"),
        ("turquoise", _memory(record)),
        ("blue", f"tps: {round(record['tokens_per_second_per_device']):,}"),
        ("cyan", f"tflops: {record['tflops']:,.2f}"),
    ]
    if "mfu" in record:
        parts.append(("magenta", f"mfu: {record['mfu']:.2f}%"))
    if eta_seconds is not None:
        parts.append(("yellow", f"eta: {timedelta(seconds=round(eta_seconds))}"))
    return _join(parts, color)


def validation_line(record: Mapping[str, float], *, color: bool) -> str:
    parts = [
        ("yellow", f"validate step: {record['step']:2}"),
        ("green", f"loss: {record['validation_loss']:8.5f}"),
        ("turquoise", _memory(record)),
        ("blue", f"tps: {round(record['validation_tokens_per_second_per_device']):,}"),
    ]
    return _join(parts, color)


def _memory(record: Mapping[str, float]) -> str:
    return f"memory: {record['memory']:5.2f}GiB({record['memory_percent']:.2f}%)"


def _join(parts: list[tuple[str, str]], color: bool) -> str:
    if not color:
        return "  ".join(text for _, text in parts)
    return "  ".join(COLORS[name] + text for name, text in parts) + RESET
