"""Half precision where the processor has instructions for it."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

BFLOAT16 = ("bf16", "bf16-mixed", "bf16-true")
# Flags of the processor by which it multiplies matrices of bfloat16 itself; others emulate, ten times as slowly.
INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


@cache
def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself; taken to, where the system does not tell."""
    if platform.system() != "Linux":
        return True
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return True
    flags = next(
        (line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features"))), None
    )
    return flags is None or not INSTRUCTIONS.isdisjoint(flags)


def on_cpu(trainer: Any) -> bool:
    """Whether a Trainer of these settings computes on the processor."""
    accelerator = trainer.get("accelerator") or "auto"
    if accelerator != "auto":
        return accelerator == "cpu"
    return not torch.cuda.is_available() and not torch.backends.mps.is_available()


def instead_of(trainer: Any) -> str | None:
    """The precision to compute in, where the one that is asked for is slower than it here; None to leave it."""
    if str(trainer.get("precision")) in BFLOAT16 and on_cpu(trainer) and not has_bfloat16():
        return "32-true"
    return None
