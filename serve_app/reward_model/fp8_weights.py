"""Fp8Layout: how a checkpoint keeps its matrices as 8-bit floats with scales, and the weights that these stand for.

A weight is its 8-bit float times its scale: one scale for each row or for the matrix (compressed-tensors,
`weight_scale`), or for each block of 128 by 128 (DeepSeek's and Qwen's "fp8", `weight_scale_inv`: in spite of its name
it is multiplied with). The products are then as exact as the model's dtype; servers that run such files in 8 bits round
what goes into each product as well, which no file says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve_app.reward_model.errors import UnsupportedArchitectureError, WeightError

if TYPE_CHECKING:
    from torch import Tensor

SCALE_ENDS = (".weight_scale", ".weight_scale_inv")
INPUT_SCALE_END = ".input_scale"
"""Of what goes into a product, where a server rounds it by a scale known before; it is not rounded here."""

SIXTEEN_BITS = "load the weights it was made from, in 16 bits"
EIGHT_BITS = f"{SIXTEEN_BITS}; quantization='fp8' then makes 8-bit floats"


@dataclass(frozen=True, slots=True)
class Fp8Layout:
    """Scales of a checkpoint's 8-bit matrices: one for each `block` of rows and columns, else one for each row or one
    for all.
    """

    block: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Fp8Layout | None:
        """The layout that config.json names; None for a checkpoint that is not quantised.

        Raises:
            UnsupportedArchitectureError: it is quantised in another way; the message names it and what to load.
        """
        found = config.get("quantization_config") or config.get("compression_config")
        if not found:
            return None
        method = str(found.get("quant_method") or found.get("format") or "an unnamed method")
        if method == "fp8" and found.get("fmt", "e4m3") == "e4m3":
            return cls(_block(found.get("weight_block_size")))
        if method == "compressed-tensors":
            return cls._of_compressed(found)
        advice = EIGHT_BITS if "fp8" in method else SIXTEEN_BITS
        raise UnsupportedArchitectureError(f"the checkpoint is quantised by {method}, which is not supported: {advice}")

    @classmethod
    def _of_compressed(cls, found: Mapping[str, Any]) -> Fp8Layout:
        groups = list((found.get("config_groups") or {}).values())
        if len(groups) != 1 or found.get("format") != "float-quantized":
            raise UnsupportedArchitectureError(
                f"the checkpoint is quantised by compressed-tensors as {found.get('format')!r} in {len(groups)} "
                f"groups, which is not supported, one group of 'float-quantized' is: {EIGHT_BITS}"
            )
        weights = groups[0].get("weights") or {}
        known = (weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True)) == ("float", 8, True)
        strategy = weights.get("strategy")
        if not known or strategy not in ("tensor", "channel", "block"):
            raise UnsupportedArchitectureError(
                f"the checkpoint is quantised by compressed-tensors with {dict(weights)}, which is not supported: "
                f"{EIGHT_BITS}"
            )
        return cls(_block(weights.get("block_structure")) if strategy == "block" else None)

    def weight(self, name: str, stored_OI: Tensor, scale: Tensor | None) -> Tensor:
        """The weight that 8-bit floats and their scale stand for, float32 [O, I]; any other tensor as it is.

        Raises:
            WeightError: the scale is missing or surplus, or its shape is not the layout's.
        """
        if (stored_OI.itemsize == 1) != (scale is not None):
            what = "has a scale and is no matrix" if scale is not None else "has no scale and is one"
            raise WeightError(f"weight {name} {what} of 8-bit floats")
        if scale is None:
            return stored_OI
        num_rows, num_columns = stored_OI.shape
        wanted = {(), (1,), (num_rows,), (num_rows, 1)}
        if self.block is not None:
            rows, columns = self.block
            wanted = {(-(-num_rows // rows), -(-num_columns // columns))}
        if tuple(scale.shape) not in wanted:
            raise WeightError(f"the scale of {name} has shape {list(scale.shape)}, not {sorted(map(list, wanted))}")
        scale = scale.float()
        if self.block is not None:
            spread = scale.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
            return stored_OI.float() * spread[:num_rows, :num_columns]
        return stored_OI.float() * scale.reshape(-1, 1)


def _block(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise UnsupportedArchitectureError(
            f"the blocks of the checkpoint's 8-bit floats are {size!r}, not [rows, columns]"
        )
    return size[0], size[1]
