"""The generator that a job uses: checked on the driver, made on the workers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connect import ClusterResources
from jobs.errors import GeneratorError
from jobs.generation import tiny
from jobs.generation.chat_encoder import ChatEncoder
from jobs.generation.endpoint import Endpoint, HttpGenerator, only_model
from jobs.generation.options import GeneratorOptions, Sampling
from serve_app.reward_model.errors import CheckpointError
from serve_app.reward_model.model_files import fingerprint, resolve

if TYPE_CHECKING:
    from jobs.generation.local import LocalGenerator

TEMPLATE_FILES = ("*.jinja",)


@dataclass(frozen=True, slots=True)
class HttpSource:
    """An OpenAI-compatible endpoint."""

    endpoint: Endpoint
    sampling: Sampling

    @classmethod
    def of(cls, options: GeneratorOptions, sampling: Sampling) -> HttpSource:
        """The endpoint as the options name it; its key is read from the environment here, on the driver.

        Raises:
            GeneratorError: the address is no address, or the endpoint does not say which model it serves.
        """
        url = options.generator.rstrip("/")
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise GeneratorError("--generator holds a user or password; put the key into the environment instead")
        if "?" in url or "#" in url:
            raise GeneratorError(f"--generator ends in /v1 or the like, without a query; got {url}")
        api_key = os.environ.get(options.api_key_env) or None
        if api_key and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
            raise GeneratorError(f"the key in {options.api_key_env} holds what no HTTP header may carry")
        endpoint = Endpoint(
            url,
            options.generator_model or only_model(url, api_key),
            api_key,
            timeout_s=options.request_timeout_s,
            max_retries=options.max_retries,
            concurrency=options.concurrency,
            body_fields=options.body_fields,
        )
        return cls(endpoint, sampling)

    @property
    def title(self) -> str:
        return f"{self.endpoint.model} at {self.endpoint.url}"

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that decide the candidates, as far as anything does."""
        fields = dict(self.endpoint.body_fields)
        return {"generator": self.endpoint.url, "generator_model": self.endpoint.model, "extra_body": fields}

    def check(self) -> None:
        """Ask for one token, before anything is begun; see `HttpGenerator.check`."""
        generator = self.load()
        try:
            generator.check()
        finally:
            generator.close()

    def load(self) -> HttpGenerator:
        """A generator that asks the endpoint."""
        return HttpGenerator(self.endpoint, self.sampling)


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A causal model; `fingerprint` is that of the files the driver planned with."""

    model: str
    revision: str | None
    fingerprint: str
    architecture: str | None
    device: str
    dtype: str
    batch_size: int
    sampling: Sampling

    @classmethod
    def of(cls, options: GeneratorOptions, sampling: Sampling, resources: ClusterResources) -> LocalSource:
        """The model as the driver sees it: mistakes show before anything is started on a worker.

        Raises:
            CheckpointError: it is not there, its configuration cannot be read, or it is no chat model.
        """
        folder = _resolve(options.generator, options.generator_revision)
        config = _read_config(folder)
        ChatEncoder.from_pretrained(folder)
        device = options.generator_device
        if device == "auto":
            device = "cuda" if resources.num_gpus else "cpu"
        is_folder = Path(options.generator).expanduser().is_dir() and options.generator not in tiny.NAMES
        return cls(
            model=str(folder.resolve()) if is_folder else options.generator,  # workers stand in another folder
            revision=options.generator_revision,
            fingerprint=fingerprint(folder),
            architecture=next(iter(config.get("architectures") or []), None),
            device=device,
            dtype=_dtype(options.generator_dtype, config, device),
            batch_size=options.generator_batch_size,
            sampling=sampling,
        )

    @property
    def title(self) -> str:
        return f"{self.model} on {self.device} in {self.dtype}"

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that decide the candidates."""
        return {
            "generator_fingerprint": self.fingerprint,
            "generator_device": self.device,
            "generator_dtype": self.dtype,
        }

    def check(self) -> None:
        """Nothing: the model was read when this was made."""

    def load(self) -> LocalGenerator:
        """Load the model on this worker.

        Raises:
            CheckpointError: the model cannot be loaded.
            GeneratorError: the worker's copy of the model is not the driver's.
        """
        import torch

        from jobs.generation.local import LocalGenerator, load_causal
        from serve_app.reward_model.model import DTYPES

        folder = _resolve(self.model, self.revision)
        if (found := fingerprint(folder)) != self.fingerprint:
            raise GeneratorError(
                f"the files of {self.model} on worker {os.uname().nodename} are not those on the driver ({found} "
                f"there, {self.fingerprint} here); give a --generator-revision or a shared folder"
            )
        device, dtype = torch.device(self.device), DTYPES[self.dtype]
        model = load_causal(folder, architecture=self.architecture, device=device, dtype=dtype)
        return LocalGenerator(model, ChatEncoder.from_pretrained(folder), self.sampling, batch_size=self.batch_size)


def source_of(options: GeneratorOptions, sampling: Sampling, resources: ClusterResources) -> HttpSource | LocalSource:
    """The generator that the options name.

    Raises:
        GeneratorError: an endpoint cannot be asked.
        CheckpointError: a local model cannot be read.
    """
    if options.is_endpoint:
        return HttpSource.of(options, sampling)
    return LocalSource.of(options, sampling, resources)


def _resolve(model: str, revision: str | None) -> Path:
    return tiny.cached_folder(model) if model in tiny.NAMES else resolve(model, revision, also=TEMPLATE_FILES)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is no object")
    return config


def _dtype(chosen: str, config: dict[str, Any], device: str) -> str:
    if chosen != "auto":
        return chosen
    from serve_app.reward_model.model import DTYPES, cpu_dtype  # brings torch

    if device == "cpu":
        return cpu_dtype()
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return stored if stored in DTYPES else "bfloat16"
