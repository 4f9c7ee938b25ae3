"""Checkpoints of 8-bit floats score as the weights that their floats and scales stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serve_app.reward_model import UnsupportedArchitectureError, WeightError
from serve_app.reward_model.architecture import DecoderConfig
from tests.reward_model.tiny_checkpoints import HIDDEN, SEQUENCES, body, drawn, load, write

CLASS = "LlamaForSequenceClassification"
BLOCK = 24  # divides neither side of the matrices


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    """The configuration that llm-compressor writes."""
    scheme = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": strategy, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": {"dynamic": True}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


LAYOUTS: dict[str, tuple[dict[str, Any], str, tuple[int, int]]] = {
    "channel": (compressed("channel"), "weight_scale", (1, 1 << 20)),
    "tensor": (compressed("tensor"), "weight_scale", (1 << 20, 1 << 20)),
    "block": (compressed("block", block_structure=[BLOCK, BLOCK]), "weight_scale", (BLOCK, BLOCK)),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}, "weight_scale_inv", (BLOCK, BLOCK)),
}


def quantised(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix as 8-bit floats, the scale of each block, and what the two stand for, block by block."""
    stored = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    meant = torch.empty_like(weight)
    scales = []
    for top in range(0, len(weight), rows):
        for left in range(0, weight.shape[1], columns):
            part = (slice(top, top + rows), slice(left, left + columns))
            scale = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scale).to(torch.float8_e4m3fn)
            meant[part] = stored[part].float() * scale
            scales.append(scale)
    across = -(-weight.shape[1] // columns)
    return stored, torch.stack(scales).view(-1, across), meant


def both(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's weights as 8-bit floats with scales, and as the numbers that these stand for."""
    _, name, (rows, columns) = LAYOUTS[kind]
    plain = body() | {"score.weight": drawn(1, HIDDEN)}
    eight = dict(plain)
    for key, weight in plain.items():
        if key.endswith("_proj.weight"):
            eight[key], scale, plain[key] = quantised(weight, rows, columns)
            eight[key.replace(".weight", f".{name}")] = scale.reshape(()) if kind == "tensor" else scale
    if kind == "channel":  # of what goes in, where a server knows it before
        eight["model.layers.0.self_attn.q_proj.input_scale"] = torch.tensor([0.5])
    return eight, plain


@pytest.mark.parametrize("kind", LAYOUTS)
def test_8_bit_floats_with_scales_score_as_what_they_stand_for(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eight, plain = both(kind)
    (tmp_path / "eight").mkdir()
    (tmp_path / "plain").mkdir()
    found = load(write(tmp_path / "eight", eight, CLASS, num_labels=1, quantization_config=LAYOUTS[kind][0]))
    assert "holds 8-bit floats: its scores are those of the weights that these stand for" in caplog.text
    expected = load(write(tmp_path / "plain", plain, CLASS, num_labels=1))
    assert found.score_token_ids(SEQUENCES).tolist() == expected.score_token_ids(SEQUENCES).tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model.layers.0.self_attn.q_proj.weight_scale": None}, "has no scale and is one of 8-bit floats"),
        ({"model.norm.weight_scale": torch.ones(1)}, "has a scale and is no matrix of 8-bit floats"),
        ({"model.layers.9.self_attn.q_proj.weight_scale": torch.ones(1)}, "layers.9.*whose scale is there"),
        ({"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(3, 3)}, r"the scale of .* has shape \[3, 3\]"),
    ],
)
def test_scales_that_do_not_fit_are_errors(change: dict[str, Tensor | None], reason: str, tmp_path: Path) -> None:
    weights = both("channel")[0] | change
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    with pytest.raises(WeightError, match=reason):
        load(write(tmp_path, kept, CLASS, num_labels=1, quantization_config=LAYOUTS["channel"][0]))


def test_small_numbers_without_a_configuration_are_no_weights(tmp_path: Path) -> None:
    weights = body() | {"score.weight": drawn(1, HIDDEN)}
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(WeightError, match=f"up_proj.weight in .* is of {str(dtype).removeprefix('torch.')}"):
            load(write(tmp_path, weights | {name: weights[name].to(dtype)}, CLASS, num_labels=1))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by bitsandbytes"),
        ({"quant_method": "awq", "bits": 4}, "quantised by awq"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        ({"quant_method": "hqq"}, "quantised by hqq.*in 16 bits"),
        ({"quant_method": "fbgemm_fp8"}, "quantised by fbgemm_fp8.*quantization='fp8'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "quantised by fp8"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "blocks .* are 128"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors as 'pack-quantized'"),
        (compressed("channel", num_bits=4), "compressed-tensors with .*'num_bits': 4"),
        (compressed("channel", symmetric=False), "compressed-tensors with .*'symmetric': False"),
        (compressed("token"), "compressed-tensors with .*'token'"),
    ],
)
def test_other_quantised_checkpoints_are_refused_by_their_method(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        DecoderConfig.from_dict({"architectures": [CLASS], "quantization_config": config})
