"""Which reward model a job scores with: read on the driver, loaded on the workers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.connect import ClusterResources
from jobs.errors import CorpusError, ScorerError
from jobs.options import EngineOptions
from serve_app.reward_model import RewardModel
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.chat_template import template_text
from serve_app.reward_model.checkpoint import fingerprint, resolve
from serve_app.reward_model.model import resolve_device, resolve_dtype
from serve_app.reward_model.tiny import NAME as TINY
from serve_app.reward_model.tokenizer import Tokenizer

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
    chat_template: str | None = None
    """The text of one in place of the checkpoint's."""
    takes_reference: bool = False
    """Whether the model compares responses with references: see `Tokenizer.takes_reference`."""

    @classmethod
    def of(cls, options: EngineOptions, resources: ClusterResources) -> ModelSource:
        """The model as the driver sees it: mistakes show before anything is started on a worker."""
        name = options.model or TINY
        template = None if options.chat_template is None else template_text(options.chat_template)
        folder = resolve(name, options.revision)
        decoder = DecoderConfig.from_folder(folder)
        tokenizer = Tokenizer.from_pretrained(folder, config=decoder, chat_template=template)
        device = options.device if options.device != "auto" else "cuda" if resources.num_gpus else "cpu"
        dtype = resolve_dtype(options.dtype, decoder, resolve_device(device))
        is_folder = Path(name).expanduser().is_dir()
        return cls(
            model=str(folder.resolve()) if is_folder else name,  # workers stand in another working folder
            revision=options.revision,
            fingerprint=fingerprint(folder, chat_template=template),
            device=device,
            dtype=str(dtype).removeprefix("torch."),
            token_budget=options.token_budget,
            chat_template=template,
            takes_reference=tokenizer.takes_reference,
        )

    def check_reference(self, column: str | None) -> None:
        """Refuse a corpus without references for a model that needs them, and one with for a model that takes none.

        Raises:
            CorpusError: it says which flag to give or to leave out.
        """
        if self.takes_reference and column is None:
            raise CorpusError(
                f"{self.model} is a POLAR model, which compares each response with a reference: name their column with "
                "--reference-column"
            )
        if column is not None and not self.takes_reference:
            raise CorpusError(
                f"{self.model} takes no reference, POLAR's models alone do: leave --reference-column {column} out"
            )

    def load(self) -> RewardModel:
        """Load the model on this worker.

        Raises:
            ScorerError: the worker's copy of the model is not the driver's.
        """
        model = RewardModel.from_pretrained(
            self.model,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            token_budget=self.token_budget or "auto",
            chat_template=self.chat_template,
        )
        model.tokenizer  # noqa: B018  # read with the model, not with the first rows
        if model.fingerprint != self.fingerprint:
            raise ScorerError(
                f"the files of {self.model} on worker {os.uname().nodename} are not those on the driver "
                f"({model.fingerprint} there, {self.fingerprint} here); give a --revision or a shared folder"
            )
        return model
