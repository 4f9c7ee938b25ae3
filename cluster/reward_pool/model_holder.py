"""The model of one actor, and how its weights come, go to sleep and are exchanged. All of it runs in one thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from cluster.reward_pool.errors import AsleepError, RewardPoolError, SleepError, WeightsUpdateError
from serve_app.reward_model import ChangedFilesError, DeviceError, ModelSpec, RewardModel, ScoringError
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.checkpoint import load_weights, read_config
from serve_app.reward_model.decoder import Decoder
from serve_app.reward_model.model_files import resolve
from serve_app.reward_model.parked_weights import ParkedWeights
from serve_app.reward_model.scores import Outputs
from serve_app.reward_model.steps import StepEncoder, SteppedAnswer
from serve_app.reward_model.tokenizer import Tokenizer
from serve_app.reward_model.weights import DecoderWeights

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# A checkpoint that a trainer saved may carry a tokenizer of its own: it must make the same ids of these.
PROBE_CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What's 12 * 34?  \u4f60\u597d \U0001f600\n\tdef f(x): return x"},
    {"role": "assistant", "content": "408 <|im_end|> </s> \u00e9\u00e0"},
)


@dataclass(frozen=True, slots=True)
class WeightsVersion:
    """The weights that a pool scores with: the `number` rises with each update, `fingerprint` is of their files."""

    number: int
    model: str
    revision: str | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _Staged:
    """New weights in host memory, checked, and where they are from."""

    folder: Path
    config: DecoderConfig
    weights: DecoderWeights


@dataclass(frozen=True, slots=True)
class _Previous:
    """The model before the last exchange, until that is final; `parked` are its weights, where they moved."""

    model: RewardModel | None
    version: WeightsVersion
    parked: ParkedWeights | None


class ModelSlot:
    """Holds a model: awake, or asleep with its weights on the host (CUDA) or given up and read again (CPU)."""

    def __init__(self, spec: ModelSpec) -> None:
        self.named = spec
        """As it was named at first: later weights come without a tokenizer, or with the same."""
        self._spec = spec
        self._model: RewardModel | None = None
        self._parked: ParkedWeights | None = None
        self._staged: _Staged | None = None
        self._previous: _Previous | None = None
        self._version: WeightsVersion | None = None

    @property
    def version(self) -> WeightsVersion:
        if self._version is None:
            raise RewardPoolError("no model was loaded yet")
        return self._version

    @cached_property
    def _probe_ids(self) -> list[int]:
        return _encoded_probe(*self.named.read())

    @property
    def is_asleep(self) -> bool:
        return self._model is None or self._parked is not None

    @property
    def cached_tokens(self) -> int:
        """Tokens that were read from the prefix cache since these weights were loaded."""
        return 0 if self._model is None else self._model.scorer.cached_tokens

    @property
    def model(self) -> RewardModel:
        """The model, awake. Raises `AsleepError` where it is not."""
        if self._model is None or self._parked is not None:
            raise AsleepError("the pool sleeps: call wake() before it scores")
        return self._model

    def open(self, version: WeightsVersion | None, *, asleep: bool) -> None:
        """Take up the model for the first time, or `version` of it after a restart; `asleep` leaves it on disk.

        Raises:
            CheckpointError: it cannot be loaded.
            RewardPoolError: its files are no longer those of the version.
        """
        if version is not None:
            self._take(version)
            if asleep:
                return
        self._model = self._loaded()
        if version is None:
            self._take(WeightsVersion(0, self._spec.model, self._spec.revision, self._model.fingerprint))

    def outputs(self, sequences: Sequence[Sequence[int]]) -> list[Outputs | ScoringError]:
        """What the model says of each sequence, in order, or the error that it alone has."""
        return self.model.scorer.outputs(sequences)

    def empty_cache(self) -> None:
        """Give the memory back that is kept between calls."""
        if self._model is not None:
            self._model.scorer.release_memory()
            _empty_cuda_cache(self._model.device)

    def sleep(self) -> None:
        """Free the device's memory of the weights. Asleep already, it stays so.

        Raises:
            SleepError: the host has not the memory for them; the model is awake then.
        """
        if self.is_asleep:
            return
        model = self.model
        if model.device.type != "cuda":
            self._spec = replace(self._spec, token_budget=model.scorer.token_budget)
            self._model = None
            return
        model.scorer.release_memory()
        try:
            self._parked = ParkedWeights(model.scorer.decoder)
        except (MemoryError, RuntimeError) as error:
            raise SleepError(f"the weights do not fit the host's memory: {error}") from error

    def wake(self) -> None:
        """Bring the weights back, bit for bit. Awake already, it stays so.

        Raises:
            SleepError: the device has not the memory, or the files are not those any more; it sleeps on then.
        """
        if not self.is_asleep:
            return
        try:
            if self._parked is not None:
                self._parked.put_back()
                self._parked = None
                self.model.scorer.measure_budget()  # others may have taken memory meanwhile
            else:
                self._model = self._loaded()
        except (MemoryError, RuntimeError) as error:
            raise SleepError(f"the weights do not fit the device's memory: {error}") from error

    def stage(self, model: str, revision: str | None) -> str:
        """Read a checkpoint into host memory, beside the weights in use; its files' fingerprint.

        Raises:
            CheckpointError: it cannot be read.
            WeightsUpdateError: it is of another architecture, shape or tokenizer.
            AsleepError: the weights in use are not on the device.
        """
        current = self.model
        self._staged = None
        folder = resolve(model, revision)
        base = self.named.base_model
        config = read_config(folder, base_model=base, head=self.named.head, normalize=self.named.normalize)
        _check_same(current.config, config, folder)
        has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
        if has_tokenizer and _encoded_probe(*self.named.read(folder)) != self._probe_ids:
            raise WeightsUpdateError(f"the tokenizer or chat template in {folder} makes other token ids")
        host = [torch.device("cpu")] * len(current.devices)
        weights = load_weights(folder, config, device=host, dtype=current.dtype, base_model=base)
        self._staged = _Staged(folder, config, weights)
        return self.named.fingerprint_of(folder)

    def commit(self, version: WeightsVersion) -> None:
        """Score with the staged weights from now on; the ones before stay at hand until `finish` or `roll_back`.

        Raises:
            WeightsUpdateError: there are none, or the device has not the memory; the weights are the ones before.
        """
        staged, before = self._staged, self.model
        if staged is None:
            raise WeightsUpdateError("there are no staged weights")
        self._staged = None
        before.scorer.release_memory()  # prefixes of these weights are nobody's any more
        try:
            parked = ParkedWeights(before.scorer.decoder) if before.device.type == "cuda" else None
        except (MemoryError, RuntimeError) as error:
            raise WeightsUpdateError(f"the weights in use do not fit the host's memory: {error}") from error
        self._previous = _Previous(before, self.version, parked)
        lacking = self._exchange(staged, before)
        if lacking is not None:  # outside of the handler, whose traceback would keep the new weights in memory
            self.roll_back()
            raise WeightsUpdateError(f"the new weights do not fit the device's memory: {lacking}")
        self._take(version)

    def _exchange(self, staged: _Staged, before: RewardModel) -> str | None:
        """Make the staged weights a model on the device; what the device says where it lacks the memory."""
        try:
            weights = staged.weights.moved_to(before.scorer.decoder.device_map)
            decoder = Decoder(staged.config, weights, quantization=self._spec.quantization)
            decoder.run_by(before.scorer.decoder.row_rule)
            self._model = RewardModel(
                decoder,
                staged.folder,
                token_budget=before.scorer.token_budget,
                memory_share=self._spec.memory_share,
                prefix_cache_bytes=self._spec.prefix_cache_bytes,
                chat_template=self.named.chat_template,
                base_model=self.named.base_model,
            )
        except (MemoryError, RuntimeError, DeviceError) as error:
            return str(error)
        return None

    def roll_back(self) -> None:
        """Score with the weights again that were there before the last `stage` or `commit`."""
        self._staged = None
        previous, self._previous = self._previous, None
        if previous is None:
            return
        device = previous.model.device if previous.model is not None else torch.device("cpu")
        self._model = None
        _empty_cuda_cache(device)
        if previous.parked is not None:
            previous.parked.put_back()
        self._model = previous.model
        self._take(previous.version)

    def finish(self) -> None:
        """Let go of the weights before the last `commit`."""
        self._previous = None

    def _take(self, version: WeightsVersion) -> None:
        self._version = version
        self._spec = replace(
            self._spec, model=version.model, revision=version.revision, fingerprint=version.fingerprint
        )

    def _loaded(self) -> RewardModel:
        """The model of the spec; where a version names its files, of these alone."""
        try:
            return self._spec.load()
        except ChangedFilesError as error:
            raise SleepError(f"{error}, or make a new pool: this one cannot give the same scores again") from None


def _encoded_probe(config: DecoderConfig, tokenizer: Tokenizer) -> list[int]:
    if tokenizer.scores_steps:
        answer = SteppedAnswer.parse(PROBE_CHAT[1:2], [PROBE_CHAT[2]["content"], ""])
        (encoded,) = StepEncoder.of(config, tokenizer).encode_batch([answer])
        if isinstance(encoded, ScoringError):
            raise encoded
        return encoded.sequences[-1]
    return tokenizer.encode({"messages": PROBE_CHAT, "reference": "408" if tokenizer.takes_reference else None})


def _check_same(ours: DecoderConfig, theirs: DecoderConfig, folder: Path) -> None:
    """A new checkpoint may differ in its weights and their dtype alone."""
    differ = [
        f"{name} {getattr(ours, name)} -> {getattr(theirs, name)}"
        for name in DecoderConfig.__slots__
        if name != "dtype" and getattr(ours, name) != getattr(theirs, name)
    ]
    if differ:
        raise WeightsUpdateError(f"{folder} is another model: {', '.join(differ)}")


def _empty_cuda_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
