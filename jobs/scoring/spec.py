"""Which reward model a job scores with: read on the driver from its options, loaded on the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from cluster.connect import ClusterResources
from jobs.errors import CorpusError
from jobs.options import EngineOptions
from serve_app.reward_model import ModelSpec
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.chat_template import template_text
from serve_app.reward_model.model_files import resolve
from serve_app.reward_model.spec import ModelFacts
from serve_app.reward_model.steps import StepEncoder

if TYPE_CHECKING:
    from serve_app.reward_model.tokenizer import Tokenizer

Model: TypeAlias = ModelSpec | ModelFacts
"""The model of a job: a resolved spec for actors of its own, or the facts of a served model."""


def check_model_files(options: EngineOptions) -> tuple[DecoderConfig, Tokenizer]:
    """The model's configuration and tokenizer. Its weight files are opened too, so that a file which is missing or
    broken is told before Ray starts.

    Raises:
        CheckpointError: one is; the message names it.
    """
    from serve_app.reward_model.checkpoint import check_weight_files

    spec = spec_named(options, options.device)
    folder = resolve(spec.model, spec.revision)
    config, tokenizer = spec.read(folder)
    check_steps(options, spec.model, tokenizer.scores_steps)
    if tokenizer.scores_steps:
        StepEncoder.of(config, tokenizer)
    check_weight_files(folder, base_model=spec.base_model)
    return config, tokenizer


def check_steps(options: EngineOptions, model: str, scores_steps: bool) -> None:
    """Refuse a process reward model for whole conversations, and any other for answers in steps.

    Raises:
        CorpusError: it says which flag to give or to leave out.
    """
    column = options.scored_steps
    if scores_steps and column is None:
        raise CorpusError(
            f"{model} is a process reward model, which scores the steps of an answer: name their column in jobs.score "
            "with --steps-column"
        )
    if column is not None and not scores_steps:
        raise CorpusError(
            f"{model} scores conversations as a whole: leave --steps-column {column} out, or name the rule of a "
            "process reward model whose files do not say it (--head steps:shepherd, steps:rlhflow or steps:trl)"
        )


def spec_of(options: EngineOptions, resources: ClusterResources) -> ModelSpec:
    """The model as the driver sees it, resolved: mistakes show before anything is started on a worker.

    Raises:
        CheckpointError: the files are not there, or cannot be read.
        UnsupportedDeviceError: the workers' device cannot do what is asked of it.
    """
    device = options.device if options.device != "auto" else "cuda" if resources.num_gpus else "cpu"
    return spec_named(options, device).resolved()


def named(options: EngineOptions) -> str:
    """The model's name, which a job without replicas elsewhere has.

    Raises:
        CorpusError: it is not there.
    """
    if options.model is None:
        raise CorpusError("no model is named: --model takes a folder, a Hugging Face id, or tiny to try it out")
    return options.model


def spec_named(options: EngineOptions, device: str) -> ModelSpec:
    """The model by the names that options have, as they are."""
    return ModelSpec(
        model=named(options),
        revision=options.revision,
        device=device,
        dtype=options.dtype,
        token_budget=options.token_budget or "auto",
        prefix_cache_bytes=options.prefix_cache_bytes,
        quantization=options.quantization or "none",
        chat_template=None if options.chat_template is None else template_text(options.chat_template),
        base_model=options.base_model,
        head=options.head,
        normalize=options.normalize,
    )


def check_reference(model: Model, column: str | None) -> None:
    """Refuse a corpus without references for a model that needs them, and one with them for a model that takes none.

    Raises:
        CorpusError: it says which flag to give or to leave out.
    """
    if model.takes_reference and column is None:
        raise CorpusError(
            f"{model.model} is a POLAR model, which compares each response with a reference: name their column with "
            "--reference-column"
        )
    if column is not None and not model.takes_reference:
        raise CorpusError(
            f"{model.model} takes no reference, POLAR's models alone do: leave --reference-column {column} out"
        )


def identity_of_model(model: Model) -> dict[str, Any]:
    """The part of a run's identity that is the model's: a resumed run must have it in common with the first."""
    identity = {"model_fingerprint": model.fingerprint, "device": model.device, "dtype": model.dtype}
    if model.quantization != "none":  # folders of earlier versions have no such key
        identity["quantization"] = model.quantization
    return identity


def record_of_model(model: Model) -> dict[str, Any]:
    """For the manifest: the model by the name, commit and fingerprint that were found."""
    names = ("revision", "fingerprint", "device", "dtype", "quantization")
    return {"model": {"name": model.model, **{name: getattr(model, name) for name in names}}}
