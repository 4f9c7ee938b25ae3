"""ModelSpec: which reward model, and how it is loaded. Every door - endpoint, jobs, pools of actors - names it so.

A spec is plain values: it is read from options, travels to the processes that score, and is loaded there. It brings
torch when a model is resolved or loaded, so that options and their help do without.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from serve_app.reward_model import tiny
from serve_app.reward_model.architecture import DecoderConfig, Quantization
from serve_app.reward_model.errors import ChangedFilesError, DeviceError, UnsupportedDeviceError
from serve_app.reward_model.model_files import fingerprint, resolve, tokenizer_folder

if TYPE_CHECKING:
    import torch

    from serve_app.reward_model.model import RewardModel
    from serve_app.reward_model.tokenizer import Tokenizer

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A reward model by name, and how it is loaded.

    Args:
        model: `"tiny"`, a local folder, or a Hugging Face id.
        revision: branch, tag or commit of a Hugging Face id.
        device: `"auto"`, `"cpu"` or `"cuda"`.
        dtype: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        token_budget: tokens in one forward pass.
        prefix_cache_bytes: memory for recent prefixes: see `RewardModel.from_pretrained`. It changes no score.
        quantization: `"none"` or `"fp8"`.
        fingerprint: the one that the model's files must have; None takes them as they are.
        chat_template: the text of a Jinja template in place of the checkpoint's.
        base_model: for an adapter, the folder or id of the model it changes, in place of the one it names.
        head: `"logit:ID"` reads a vocabulary row's logit: see `RewardModel.from_pretrained`.
        normalize: normalise with the checkpoint's own mean and deviation.
        takes_reference: whether conversations need a reference, as POLAR's do; `resolved` finds it out.
        attributes: names of what a gating head gives beside the score; `resolved` finds them out.
        num_devices: devices that the layers are spread over; the bits are those of one.
        memory_share: of a card, where several processes share it.
        scores_steps: whether it is a process reward model; `resolved` finds it out.
    """

    model: str = tiny.NAME
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    token_budget: int | Literal["auto"] = "auto"
    quantization: Quantization = "none"
    fingerprint: str | None = None
    chat_template: str | None = None
    base_model: str | None = None
    head: str | None = None
    normalize: bool = False
    takes_reference: bool = False
    attributes: tuple[str, ...] = ()
    scores_steps: bool = False
    prefix_cache_bytes: int | Literal["auto"] = 0
    num_devices: int = 1
    memory_share: float = 1.0

    def on_gpus(self, num_gpus: float) -> ModelSpec:
        """The spec for a process that has so many GPUs, a part of one or several that share the layers; as it is for 0.

        Raises:
            DeviceError: several, and not a whole number of them.
        """
        if is_uneven(num_gpus):
            raise DeviceError(f"{num_gpus:g} GPUs for one process: it takes a part of one, or a whole number of them")
        if not num_gpus:
            return self
        return replace(self, num_devices=max(1, int(num_gpus)), memory_share=min(1.0, num_gpus))

    def check_device(self) -> None:
        """Raise what can be known without the model: the quantization needs another device than the one named.

        Raises:
            UnsupportedDeviceError: fp8 on CPUs, where it saves nothing.
        """
        if self.quantization == "fp8" and self.device == "cpu":
            raise UnsupportedDeviceError(
                "fp8 needs an NVIDIA GPU of the Hopper generation or newer, such as an H100 or H200, and the device "
                "is cpu: leave the quantization out, or take another device"
            )

    def resolved(self) -> ModelSpec:
        """The spec with all that this machine can tell: the folder's whole path or the commit of a Hugging Face id,
        the device, the dtype, and the fingerprint of the files. Each process that loads it loads the same, or raises.

        The device is the caller's to name where it is another machine's.

        Raises:
            CheckpointError: the files are not there, or the configuration or tokenizer cannot be read.
            UnsupportedDeviceError: the device cannot do what is asked of it.
        """
        from serve_app.reward_model.model import resolve_device, resolve_dtype

        self.check_device()
        folder = resolve(self.model, self.revision)
        config, tokenizer = self.read(folder)
        device = resolve_device(self.device)
        found = replace(
            self,
            model=absolute(self.model),
            base_model=None if self.base_model is None else absolute(self.base_model),
            revision=_commit(folder) or self.revision,
            device=self.device if self.device != "auto" else device.type,
            dtype=dtype_name(resolve_dtype(self.dtype, config, device)),
            fingerprint=self._checked(folder),
            takes_reference=tokenizer.takes_reference,
            attributes=config.head.attributes,
            scores_steps=tokenizer.scores_steps,
        )
        found.check_device()
        return found

    def load(self) -> RewardModel:
        """Load the model in this process.

        Raises:
            CheckpointError: the files are missing or broken.
            ChangedFilesError: they have another fingerprint than the spec.
            UnsupportedDeviceError: the device cannot do what is asked of it.
            DeviceError: it is not there, or there are too few of them.
        """
        from serve_app.reward_model.linear import check_quantization
        from serve_app.reward_model.model import RewardModel, resolve_device

        device = resolve_device(self.device)
        replace(self, device=device.type).check_device()
        check_quantization(self.quantization, device)  # before gigabytes are read
        if self.fingerprint is not None:
            self.check_files()
        return RewardModel.from_pretrained(
            self.model,
            revision=self.revision,
            device=device if self.num_devices == 1 else self._several(device.type),
            dtype=self.dtype,
            token_budget=self.token_budget,
            memory_share=self.memory_share,
            prefix_cache_bytes=self.prefix_cache_bytes,
            quantization=self.quantization,
            chat_template=self.chat_template,
            base_model=self.base_model,
            head=self.head,
            normalize=self.normalize,
        )

    def _several(self, kind: str) -> str:
        """The devices of a process, as `from_pretrained` takes them: Ray shows a process its own cards alone."""
        return ",".join(f"{kind}:{index}" if kind == "cuda" else kind for index in range(self.num_devices))

    def read(self, folder: Path | None = None) -> tuple[DecoderConfig, Tokenizer]:
        """The model's shape and its tokenizer, from the files in `folder`, or from its small files alone.

        Raises:
            CheckpointError: they are not there, or cannot be read.
        """
        from serve_app.reward_model.checkpoint import read_config
        from serve_app.reward_model.tokenizer import Tokenizer

        folder = folder or resolve(self.model, self.revision, weights=False)
        config = read_config(folder, base_model=self.base_model, head=self.head, normalize=self.normalize)
        source = tokenizer_folder(folder, base_model=self.base_model)
        return config, Tokenizer.from_pretrained(source, config=config, chat_template=self.chat_template)

    def fingerprint_of(self, folder: Path, *, weights: bool = True) -> str:
        """The fingerprint of files read as this spec has it: see `model_files.fingerprint`."""
        return fingerprint(
            folder,
            weights=weights,
            chat_template=self.chat_template,
            base_model=self.base_model,
            head=self.head,
            normalize=self.normalize,
        )

    def check_files(self) -> None:
        """Compare the model's files on this machine with the spec's fingerprint.

        Raises:
            CheckpointError: the files are not there.
            ChangedFilesError: they have another fingerprint.
        """
        self._checked(resolve(self.model, self.revision))

    def _checked(self, folder: Path) -> str:
        found = self.fingerprint_of(folder)
        if self.fingerprint not in (None, found):
            raise ChangedFilesError(
                f"the files of {self.model} on {os.uname().nodename} have the fingerprint {found}, not "
                f"{self.fingerprint}: they changed, or are another copy; name a revision or a folder that every node "
                "sees, or put the former files back"
            )
        return found


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as a process has it: what decides its scores and its token ids, and how much it takes at once."""

    model: str
    revision: str | None
    fingerprint: str
    tokenizer_fingerprint: str
    device: str
    dtype: str
    quantization: Quantization
    token_budget: int
    processor: str
    chat_template: str | None = None
    base_model: str | None = None
    head: str | None = None
    normalize: bool = False
    takes_reference: bool = False
    attributes: tuple[str, ...] = ()
    scores_steps: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, model: RewardModel) -> ModelFacts:
        """Facts of a spec's loaded model. Keep them: files may change under a running process."""
        return cls(
            model=spec.model,
            revision=_commit(model.folder) or spec.revision,
            fingerprint=model.fingerprint,
            tokenizer_fingerprint=spec.fingerprint_of(model.folder, weights=False),
            device=model.device.type,
            dtype=dtype_name(model.dtype),
            quantization=spec.quantization,
            token_budget=model.scorer.token_budget,
            processor=model.scorer.processor,
            chat_template=spec.chat_template,
            base_model=spec.base_model,
            head=spec.head,
            normalize=spec.normalize,
            takes_reference=model.tokenizer.takes_reference,
            attributes=model.config.head.attributes,
            scores_steps=model.tokenizer.scores_steps,
        )

    @property
    def spec(self) -> ModelSpec:
        """The spec of the same model, for who reads its small files elsewhere."""
        return ModelSpec(
            model=self.model,
            revision=self.revision,
            chat_template=self.chat_template,
            base_model=self.base_model,
            head=self.head,
            normalize=self.normalize,
        )

    @property
    def key(self) -> str:
        """Stands for all that decides a score: equal keys, equal bits, on processors of one kind."""
        return "/".join((self.fingerprint, self.device, self.dtype, self.quantization))


def is_uneven(num_gpus: float) -> bool:
    """Whether so many GPUs cannot be one process's: it has a part of one, or whole ones."""
    return num_gpus > 1 and num_gpus != int(num_gpus)


def absolute(model: str) -> str:
    """A folder's whole path, since other processes stand in other folders; any other name as it is."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if model not in tiny.NAMES and folder.is_dir() else model


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as options name it: `"float32"`."""
    return str(dtype).removeprefix("torch.")


def _commit(folder: Path) -> str | None:
    """The commit of a downloaded snapshot, whose folder is named after it; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) else None
