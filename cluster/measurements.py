"""Tokens a second that were measured on a GPU: what `tests/benchmarks/bench_engine.py --save` wrote."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from cluster.sizing import INTERNLM2, Gpu, Throughput
from serve_app.reward_model.architecture import DecoderConfig

__all__ = ["RESULTS", "measured"]

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).parents[1] / "tests" / "benchmarks" / "results"
WORKLOAD = "mixed"
# The benchmark's presets, by the model whose shape they have.
PRESETS = dict(zip(INTERNLM2, ("1.8b", "7b", "20b"), strict=True))


def measured(config: DecoderConfig, gpu: Gpu, *, dtype: str, folder: Path = RESULTS) -> Throughput | None:
    """The rate of this model's shape on this GPU in this dtype, with its file for a source; None where none is."""
    presets = [PRESETS[name] for name, known in INTERNLM2.items() if _shape(known) == _shape(config)]
    for preset in presets:
        path = folder / f"bench_engine_{preset}_cuda.json"
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            precision = "fp8" if result["quantization"] == "fp8" else result["dtype"]
            if _is_gpu(gpu, result["hardware"]) and precision == dtype:
                return Throughput(float(result["workloads"][WORKLOAD]["tokens_per_s"]), f"measured: {path.name}")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is no result of bench_engine and is left out: %r", path, error)
    return None


def _shape(config: DecoderConfig) -> tuple[int, int, int]:
    return config.hidden_size, config.num_layers, config.num_parameters


def _is_gpu(gpu: Gpu, hardware: str) -> bool:
    """Whether CUDA's name of a device is that of the GPU, such as `NVIDIA A100-SXM4-80GB` of `A100-80`."""
    name, _, memory = gpu.name.partition("-")
    return bool(re.search(rf"\b{name}\b", hardware)) and (not memory or f"{memory}GB" in hardware)
