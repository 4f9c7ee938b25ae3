"""DeviceMap: which layers of a decoder are on which device, spread by the bytes of their weights.

The embedding is on the first device, the last norm and the head on the last. Layers take equal time, so no device
has many more of them than another: the bytes decide who has one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.reward_model.errors import DeviceError

if TYPE_CHECKING:
    import torch

    from serve_app.reward_model.architecture import DecoderConfig

NORM_BYTES = 4


@dataclass(frozen=True, slots=True)
class DeviceMap:
    """`num_layers[i]` consecutive layers are on `devices[i]`; a device may stand there twice."""

    devices: tuple[torch.device, ...]
    num_layers: tuple[int, ...]

    @classmethod
    def of(cls, config: DecoderConfig, devices: Sequence[torch.device], *, itemsize: int) -> DeviceMap:
        """The map for weights of `itemsize` bytes.

        Raises:
            DeviceError: there are more devices than layers.
        """
        return cls(tuple(devices), layers_of_devices(config, len(devices), itemsize=itemsize))

    def of_layers(self) -> list[torch.device]:
        """The device of each layer."""
        return [device for device, count in zip(self.devices, self.num_layers, strict=True) for _ in range(count)]


def layers_of_devices(config: DecoderConfig, num_devices: int, *, itemsize: int) -> tuple[int, ...]:
    """How many layers each device has: each in turn goes to a device that is at most one layer heavier than the
    lightest, among these to one with the fewest layers.

    Raises:
        DeviceError: there are more devices than layers.
    """
    if num_devices > config.num_layers:
        raise DeviceError(f"{num_devices} devices cannot share {config.num_layers} layers: name fewer")
    layer = layer_bytes(config, itemsize=itemsize)
    loads = [0.0] * num_devices
    loads[0] = embedding_bytes(config)
    counts = [0] * num_devices
    for left in range(config.num_layers, 0, -1):
        empty = [place for place in range(num_devices) if not counts[place]]
        able = empty if len(empty) == left else range(num_devices)
        lightest = min(loads[place] for place in able)
        light = [place for place in able if loads[place] <= lightest + layer]
        chosen = min(light, key=lambda place: (counts[place], loads[place]))
        counts[chosen] += 1
        loads[chosen] += layer
    return tuple(counts)


def layer_bytes(config: DecoderConfig, *, itemsize: int) -> int:
    """Bytes of one layer's weights, matrices of `itemsize` bytes a number."""
    return config.num_parameters // config.num_layers * itemsize + 2 * NORM_BYTES * config.hidden_size


def embedding_bytes(config: DecoderConfig) -> int:
    """Bytes of the embedding, which keeps the checkpoint's dtype."""
    return config.vocab_size * config.hidden_size * (4 if config.dtype == "float32" else 2)
