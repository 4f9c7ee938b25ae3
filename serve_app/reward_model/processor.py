"""The processor that scores are computed on, in a line: what decides their last bits beside the model and its dtype.

Sums are cut as suits a processor's registers and caches, and otherwise from one version of PyTorch to the next. Within
one line a conversation has one score, to the bit.
"""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from glob import glob
from pathlib import Path

import torch

SUMS = 1
"""The version of the sums of this package: one more with each change that changes a score's bits on some processor."""
CPU_FACTS = Path("/proc/cpuinfo")
CPU_NUMBERS = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
CACHE_SIZES = "/sys/devices/system/cpu/cpu0/cache/index[23]/size"


@lru_cache(maxsize=8)
def processor_of(device: torch.device) -> str:
    """The kind of processor of a device, its caches or multiprocessors, and the versions of what computes there."""
    kind = _card(device) if device.type == "cuda" else _cpu(CPU_FACTS)
    return f"{kind}, torch {torch.__version__}, sums {SUMS}"


def _card(device: torch.device) -> str:
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name} ({facts.major}.{facts.minor}, {facts.multi_processor_count} multiprocessors)"


def _cpu(path: Path) -> str:
    facts = _first_cpu(path)
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = "/".join(facts[key] for key in CPU_NUMBERS if key in facts)
    limits = [f"{key}={os.environ[key]}" for key in ("ONEDNN_MAX_CPU_ISA", "MKL_CBWR") if key in os.environ]
    amx = ["AMX"] if torch.cpu._is_amx_tile_supported() else []
    instructions = " ".join([torch.backends.cpu.get_cpu_capability(), *amx, *limits])
    caches = " ".join(Path(size).read_text().strip() for size in sorted(glob(CACHE_SIZES)))
    return f"{name} ({', '.join(filter(None, (numbers, instructions, caches)))})"


def _first_cpu(path: Path) -> dict[str, str]:
    """What Linux says of its first CPU; nothing elsewhere."""
    if not path.is_file():
        return {}
    first = path.read_text(errors="replace").strip().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
