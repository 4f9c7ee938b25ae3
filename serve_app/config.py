"""Options of the endpoint: those of `serve run serve_app.app:build_app` and of a Serve config file."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from serve_app.reward_model import ModelSpec
from serve_app.reward_model.spec import is_uneven


class ModelConfig(BaseModel):
    """One model: a deployment with replicas of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="`tiny`, a local folder, or a Hugging Face id", min_length=1)
    name: str = Field("", description="what requests call it; by default the last part of `model`")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    chat_template: str | None = Field(
        None, description="a file with a Jinja chat template in place of the checkpoint's, or the template itself"
    )
    base_model: str | None = Field(
        None, description="for a LoRA adapter, the folder or id of its base, in place of the one it names", min_length=1
    )
    head: str | None = Field(
        None,
        description="`logit:ID` scores with that vocabulary row's logit; `steps:trl`, `steps:shepherd` and "
        "`steps:rlhflow` name the rule of a process reward model",
        pattern=r"^(logit:[0-9]+|steps:.+)$",
    )
    normalize: bool = Field(False, description="normalise with the checkpoint's own mean and deviation (OpenRLHF)")
    dtype: str = Field("auto", description="auto, float32, float16 or bfloat16")
    quantization: Literal["none", "fp8"] = Field("none", description="fp8: faster on Hopper GPUs, scores drift")
    token_budget: PositiveInt | Literal["auto"] = Field("auto", description="tokens in one forward pass")
    prefix_cache_bytes: NonNegativeInt | Literal["auto"] = Field(
        "auto",
        description="memory of a replica's device for keys and values of recent prefixes; auto: 256 MiB on CPU, a "
        "sixteenth of what the weights leave free on a GPU; 0: none",
    )
    num_gpus: NonNegativeFloat | None = Field(
        None,
        description="GPUs of one replica: parts share one; several, on one node, share the model's layers; by default "
        "1 where the cluster has any (before Ray is joined: this machine), else 0",
    )
    gpu_type: str | None = Field(
        None, description="only on GPUs of this type, as Ray names them: H100, A100-80G, L40S, L4", min_length=1
    )
    num_cpus: NonNegativeFloat = Field(1.0, description="CPUs that Ray sets aside for one replica")
    threads: PositiveInt | None = Field(
        None,
        description="CPU threads of one replica; by default those of an even share that a trial at its start gains by",
    )
    num_replicas: PositiveInt = Field(1, description="replicas, where they do not follow the load")
    max_replicas: PositiveInt | None = Field(None, description="set it to let the number of replicas follow the load")
    min_replicas: int = Field(1, ge=0, description="the fewest replicas that follow the load; 0 frees the GPU")
    max_replicas_per_node: PositiveInt | None = Field(None, description="spread replicas over nodes")
    burst: NonNegativeInt = Field(
        4096, description="conversations that may wait for a replica however long they take: a trainer's batch"
    )
    max_wait_s: PositiveFloat = Field(
        30.0, description="beyond a burst, a replica refuses what would wait longer, at the rate of its last batches"
    )
    max_queued_tokens: PositiveInt | None = Field(
        None, description="a bound in waiting tokens, instead of burst and max_wait_s"
    )
    truncation: Literal["error", "right", "left"] = Field(
        "error",
        description="what becomes of a conversation over the model's length where the request says nothing: refused, "
        "its start kept (right), or its oldest turns dropped (left)",
    )
    max_tokens: int | None = Field(None, ge=2, description="the longest conversation, in tokens, below the model's own")

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, template: str | None) -> str | None:
        """The text of the file, which the nodes that score need not have."""
        from serve_app.reward_model.chat_template import template_text
        from serve_app.reward_model.errors import CheckpointError

        try:
            return None if template is None else template_text(template)
        except CheckpointError as error:
            raise ValueError(str(error)) from error

    def spec(self, device: str = "auto") -> ModelSpec:
        """The model as every door names it."""
        return ModelSpec(
            model=self.model,
            revision=self.revision,
            device=device,
            dtype=self.dtype,
            token_budget=self.token_budget,
            prefix_cache_bytes=self.prefix_cache_bytes,
            quantization=self.quantization,
            chat_template=self.chat_template,
            base_model=self.base_model,
            head=self.head,
            normalize=self.normalize,
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.name:
            object.__setattr__(self, "name", PurePath(self.model).name or self.model)
        if self.gpu_type is not None and self.num_gpus == 0:
            raise ValueError(f"gpu_type {self.gpu_type} with num_gpus 0: leave one of them out")
        if self.num_gpus is not None and is_uneven(self.num_gpus):
            raise ValueError(f"num_gpus {self.num_gpus:g}: a replica takes a part of a GPU, or a whole number of them")
        if self.quantization == "fp8" and self.num_gpus == 0:
            raise ValueError("quantization fp8 with num_gpus 0: fp8 is for GPUs; leave one of them out")
        if self.max_replicas is not None and self.max_replicas < max(1, self.min_replicas):
            raise ValueError(f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}")
        return self

    @property
    def may_sleep(self) -> bool:
        """Whether the model may have no replica while nobody asks."""
        return self.max_replicas is not None and self.min_replicas == 0


class ServiceConfig(BaseModel):
    """The endpoint: its models and who may use it.

    One model may be given without a list, its options beside it: `model=tiny num_replicas=2`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[ModelConfig] = Field(min_length=1, description="the first is the default")
    api_keys_file: str | None = Field(
        None, description="a file with an API key a line; more may stand in RAYWARD_API_KEYS, separated by commas"
    )
    allow_unauthenticated: bool = Field(
        False, description="serve without API keys to others than this machine; only behind a gateway that checks"
    )
    num_ingress_replicas: PositiveInt | None = Field(
        None,
        description="processes that check and tokenise requests; by default 2 in a cluster of several nodes, else 1",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "models" in data:
            return data
        if "model" not in data:
            raise ValueError("name a model, as in `model=tiny`, or list several under `models`")
        own = {key: value for key, value in data.items() if key in ModelConfig.model_fields}
        return {"models": [own], **{key: value for key, value in data.items() if key not in own}}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models need different names, not {names}; set `name`")
        return self
