"""Handover: the residual stream on its way from one device to the next, beside what both compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Handover:
    """A way to `target`. Between cards it has a stream of its own on each.

    PyTorch lets a copy wait for all that was launched on both cards' streams: on the streams of computation a card
    would wait for the next one at each batch, and be idle.
    """

    target: torch.device
    sending: torch.cuda.Stream | None = None
    receiving: torch.cuda.Stream | None = None

    @classmethod
    def between(cls, source: torch.device, target: torch.device) -> Handover:
        """The way from `source`; on one device, and on CPUs, nothing is copied."""
        if source == target:
            return cls(target)
        return cls(target, torch.cuda.Stream(source), torch.cuda.Stream(target))

    def bring(self, hidden_TH: Tensor) -> Tensor:
        """The rows on `target`; computation there waits for them, the host does not."""
        if self.sending is None or self.receiving is None:
            return hidden_TH
        self.sending.wait_stream(torch.cuda.current_stream(hidden_TH.device))
        with torch.cuda.stream(self.sending), torch.cuda.stream(self.receiving):
            arrived = hidden_TH.to(self.target, non_blocking=True)
        computing = torch.cuda.current_stream(self.target)
        computing.wait_stream(self.receiving)
        hidden_TH.record_stream(self.sending)  # the allocators keep both until those streams are done with them
        arrived.record_stream(computing)
        return arrived


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within it, `device` is CUDA's current one, where Triton launches; nothing on CPUs."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
