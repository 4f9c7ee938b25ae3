"""A decoder's weights, put away in host memory while others need the device's, and brought back bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from serve_app.reward_model.decoder import Decoder


class ParkedWeights:
    """The bytes of a decoder's weights on the host. Until `put_back` the decoder must not be used.

    Every tensor stays what it is, and so do the views of it; its storage alone is emptied and filled again. What is
    small and follows from the configuration, as the table of rotary angles, stays on the device.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Copy the weights to the host and give their device memory back.

        Raises:
            RuntimeError: the host has not the memory (the decoder can be used on then), or a weight is in a layout
                of oneDNN's own, as on CPUs, whose bytes cannot be reached.
        """
        storages = {
            storage.data_ptr(): storage for tensor in _tensors(decoder.weights()) for storage in _storage(tensor)
        }
        self._storages = list(storages.values())
        self._sizes = [storage.nbytes() for storage in self._storages]
        pinned = decoder.device.type == "cuda"
        self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in self._sizes]
        for host, storage in zip(self._host, self._storages, strict=True):
            host.copy_(_bytes(storage))
        for storage in self._storages:
            storage.resize_(0)
        decoder.release_buffers()
        _give_back(decoder.devices)

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes)

    def put_back(self) -> None:
        """Bring the weights back to the device.

        Raises:
            RuntimeError: the device has not the memory. The weights are still parked then.
        """
        try:
            for storage, size in zip(self._storages, self._sizes, strict=True):
                storage.resize_(size)
        except RuntimeError:
            for storage in self._storages:
                storage.resize_(0)
            raise
        for host, storage in zip(self._host, self._storages, strict=True):
            _bytes(storage).copy_(host)


def _storage(tensor: Tensor) -> Iterator[UntypedStorage]:
    if tensor.layout != torch.strided:
        raise RuntimeError(f"a weight in the layout {tensor.layout} cannot be put away")
    yield tensor.untyped_storage()


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _tensors(weights: Any) -> Iterator[Tensor]:
    """The tensors in dataclasses, tuples and lists, at any depth."""
    if isinstance(weights, Tensor):
        yield weights
    elif dataclasses.is_dataclass(weights):
        for field in dataclasses.fields(weights):
            yield from _tensors(getattr(weights, field.name))
    elif isinstance(weights, tuple | list):
        for item in weights:
            yield from _tensors(item)


def _give_back(devices: Iterable[torch.device]) -> None:
    cards = [device for device in devices if device.type == "cuda"]
    for card in cards:
        torch.cuda.synchronize(card)
    if cards:
        torch.cuda.empty_cache()
