"""What the process needs before the first import of torchmetrics and the first training step."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_TORCHVISION_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None  # a Library's definitions live as long as the object


def declare_torchvision_operators() -> bool:
    """Let torchvision be imported beside a torch that its compiled library was not built for.

    torchmetrics imports torchvision wherever it is installed, and torchvision fails to import when its compiled
    operators do not load (``operator torchvision::nms does not exist``): the usual case of its PyPI wheel beside a
    CPU-only torch. Metabolt needs none of these operators, so declaring their schemas is enough.

    Returns:
        Whether schemas were declared; False where torchvision is absent or its library loads.
    """
    global _library
    if _library is not None:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = Path(next(iter(spec.submodule_search_locations)))
    for library in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(library))
            return False
        except OSError:
            continue
    missing = [n for n in _TORCHVISION_SCHEMAS if not torch._C._dispatch_has_kernel(f"torchvision::{n}")]
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        _library.define(_TORCHVISION_SCHEMAS[name])
    return True


def keep_freed_memory() -> None:
    """Stop glibc from handing large blocks back to the kernel at every training step.

    Each step would fault the same pages in again; keeping them makes training on a CPU 1.2 to 1.4 times faster.
    Does nothing outside Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def memory_of_the_machine() -> int:
    """Bytes of memory and swap, or those that the process's control group may take; of Linux, elsewhere 2**63."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        most = sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("MemTotal:", "SwapTotal:")))
    except OSError:
        return 2**63
    try:
        group = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return most
    return min(most, int(group)) if group.isdigit() else most


def memory_within_reach() -> int:
    """Bytes of memory that this process has, and that nobody has; of Linux, elsewhere 2**63."""
    try:
        of_all = Path("/proc/meminfo").read_text().splitlines()
        own = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 2**63
    free = sum(1024 * int(line.split()[1]) for line in of_all if line.startswith(("MemAvailable:", "SwapFree:")))
    return free + sum(1024 * int(line.split()[1]) for line in own if line.startswith("VmData:"))


def prepare() -> None:
    """Run both; calling it again changes nothing."""
    declare_torchvision_operators()
    keep_freed_memory()
