"""Which reward model a job scores with: read on the driver, loaded on the workers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.connect import ClusterResources
from jobs.errors import ScorerError
from jobs.options import EngineOptions
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.model_files import fingerprint, resolve
from serve_app.reward_model.tiny import NAME as TINY
from serve_app.reward_model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel

__all__ = ["ModelSource"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model the actors load and how; `fingerprint` is that of the files the driver planned with."""

    model: str
    revision: str | None
    fingerprint: str
    device: str
    dtype: str
    token_budget: int | None

    @classmethod
    def of(cls, options: EngineOptions, resources: ClusterResources) -> ModelSource:
        """The model as the driver sees it: mistakes show before anything is started on a worker."""
        from serve_app.reward_model.model import resolve_device, resolve_dtype  # brings torch

        name = options.model or TINY
        folder = resolve(name, options.revision)
        decoder = DecoderConfig.from_folder(folder)
        Tokenizer.from_pretrained(folder, config=decoder)
        device = options.device if options.device != "auto" else "cuda" if resources.num_gpus else "cpu"
        dtype = resolve_dtype(options.dtype, decoder, resolve_device(device))
        is_folder = Path(name).expanduser().is_dir()
        return cls(
            model=str(folder.resolve()) if is_folder else name,  # workers stand in another working folder
            revision=options.revision,
            fingerprint=fingerprint(folder),
            device=device,
            dtype=str(dtype).removeprefix("torch."),
            token_budget=options.token_budget,
        )

    def load(self) -> RewardModel:
        """Load the model on this worker.

        Raises:
            ScorerError: the worker's copy of the model is not the driver's.
        """
        from serve_app.reward_model import RewardModel

        model = RewardModel.from_pretrained(
            self.model,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            token_budget=self.token_budget or "auto",
        )
        model.tokenizer  # noqa: B018  # read with the model, not with the first rows
        if model.fingerprint != self.fingerprint:
            raise ScorerError(
                f"the files of {self.model} on worker {os.uname().nodename} are not those on the driver "
                f"({model.fingerprint} there, {self.fingerprint} here); give a --revision or a shared folder"
            )
        return model
