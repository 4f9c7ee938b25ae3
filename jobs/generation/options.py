"""Options of generation, with their help texts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from jobs.generation.tiny import NAME as TINY
from jobs.options import OPTIONS


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of drawing candidates: `num_candidates` of each prompt, each of at most `max_new_tokens` tokens.

    A `top_k` of 0 and a `top_p` of 1 restrict nothing; a `temperature` of 0 takes the likeliest token each time.
    """

    num_candidates: int
    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    seed: int | None = None

    def seed_of(self, *place: object) -> int:
        """63 bits that follow from the seed and a place, such as a prompt's key and a candidate's number."""
        text = "\n".join(str(part) for part in (self.seed or 0, *place))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class SamplingOptions(BaseModel):
    """Options of drawing candidates. The defaults are those of InternLM2-Reward's model card."""

    model_config = OPTIONS

    n: PositiveInt = 16
    """Candidates for each prompt."""
    temperature: NonNegativeFloat = 0.8
    """Above 1 more random, below 1 less, 0 always the likeliest token."""
    top_k: NonNegativeInt = 50
    """Draw from so many likeliest tokens; 0 leaves it out, as servers need that do not know it (OpenAI's own)."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Draw from the likeliest tokens that have this much of the probability together; 1 leaves it out."""
    max_new_tokens: PositiveInt = 512
    """A response is cut off after so many tokens."""
    seed: int | None = None
    """Candidates of a local model follow from it (0 by default); a server gets it only if given, and may ignore it."""

    @property
    def sampling(self) -> Sampling:
        """The options as plain data."""
        return Sampling(self.n, self.temperature, self.top_k, self.top_p, self.max_new_tokens, self.seed)


class GeneratorOptions(BaseModel):
    """Options of the generator, and of its place."""

    model_config = OPTIONS

    generator: str = TINY
    """An OpenAI-compatible endpoint (http://host:8000/v1), a causal model as folder or Hugging Face id, or tiny."""
    generator_model: str | None = None
    """The endpoint's name of the model; by default the only one it lists."""
    generator_revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's API key; it may be unset."""
    concurrency: PositiveInt = 32
    """Requests to the endpoint at the same time."""
    request_timeout_s: PositiveFloat = 600.0
    """Seconds that one request to the endpoint may take."""
    max_retries: NonNegativeInt = 8
    """Times that the endpoint is asked again for a prompt, after errors that may pass; the waits double up to 30 s."""
    extra_body: str | None = None
    """JSON object merged into each request to the endpoint; a null leaves a field out."""
    generator_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a local generator runs: auto is cuda where the cluster has GPUs."""
    generator_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's on cuda; on cpu bfloat16 where the processor has it, else float32."""
    generator_batch_size: PositiveInt = 32
    """Candidates of one prompt that a local generator makes at once; lower it where memory is short."""
    generator_actors: PositiveInt | None = None
    """Actors of a local generator: by default one a GPU that scoring leaves, or one a node where there are none."""
    generator_gpus_per_actor: PositiveFloat | None = None
    """GPUs such an actor takes on cuda: 1 by default, less to share one."""
    generator_cpus_per_actor: PositiveInt | None = None
    """CPUs such an actor takes, and its torch threads: by default half of what a node has for both models."""

    @field_validator("extra_body")
    @classmethod
    def _is_object(cls, text: str | None) -> str | None:
        if text is not None and not isinstance(json.loads(text), dict):
            raise ValueError('it is a JSON object, such as \'{"chat_template_kwargs": {"enable_thinking": false}}\'')
        return text

    @property
    def body_fields(self) -> dict[str, Any]:
        """The fields that `extra_body` holds."""
        return dict(json.loads(self.extra_body)) if self.extra_body else {}

    @property
    def is_endpoint(self) -> bool:
        """Whether the generator is an HTTP endpoint and not a local model."""
        return self.generator.startswith(("http://", "https://"))
