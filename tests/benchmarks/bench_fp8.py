"""How far scores drift with 8-bit weights, and how many pairs change their order.

    python -m tests.benchmarks.bench_fp8 --model ../shared/models/tiny-internlm2-reward --conversations FILE.jsonl

Each line of the file holds `input_ids`. Drift is against float32; a pair flips where the better of two conversations
in float32 is not the better one any more. bfloat16 stands beside it, since part of the drift is its own. The last line
is JSON. Speed is measured by `bench_engine --quantization fp8`, on a GPU that has it.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve_app.reward_model import RewardModel
from serve_app.reward_model.architecture import Quantization


def main() -> int:
    """Print the drift of bfloat16 and of fp8; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_fp8", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--conversations", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    sequences = [json.loads(line)["input_ids"] for line in args.conversations.read_text("utf-8").splitlines()]

    def scores(dtype: str, quantization: Quantization) -> NDArray[np.float32]:
        model = RewardModel.from_pretrained(args.model, device=args.device, dtype=dtype, quantization=quantization)
        return model.score_token_ids(sequences)

    exact = scores("float32", "none")
    result = {
        "bfloat16": drift(exact, scores("bfloat16", "none")),
        "fp8": drift(exact, scores("bfloat16", "fp8")),
        "score_std": round(float(exact.std()), 3),
        "conversations": len(sequences),
    }
    print(json.dumps(result))
    return 0


def drift(exact: NDArray[np.float32], scores: NDArray[np.float32]) -> dict[str, float]:
    """Mean and largest absolute difference, and the share of pairs whose order changes."""
    difference = np.abs(scores - exact)
    pairs = np.array(list(combinations(range(len(exact)), 2)))
    flips = (exact[pairs[:, 0]] < exact[pairs[:, 1]]) != (scores[pairs[:, 0]] < scores[pairs[:, 1]])
    return {
        "mean": round(float(difference.mean()), 4),
        "max": round(float(difference.max()), 4),
        "pair_flips": round(float(flips.mean()), 5),
    }


if __name__ == "__main__":
    sys.exit(main())
