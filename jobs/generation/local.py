"""Candidates from a causal language model on this worker: Transformers' `generate`, with a seed for each candidate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jobs.generation.candidates import Candidate, Generation, Prompt
from jobs.generation.chat_encoder import ChatEncoder
from jobs.generation.internlm2 import ARCHITECTURE as INTERNLM2
from jobs.generation.internlm2 import load_internlm2
from jobs.generation.options import Sampling
from serve_app.reward_model.errors import CheckpointError, ConversationError


class CandidateSampler(LogitsProcessor):
    """Draws the next token of each row and leaves it the only possible one, for a decoder that takes the likeliest.

    Transformers' own sampling draws all rows from one random stream, in which a candidate depends on its neighbours.
    Here row b reads number t of its own stream at step t, and takes the token at which the cumulated probability
    passes it (inverse transform sampling).

    Args:
        seeds: one a row.
        num_steps: the most tokens that will be drawn for a row.
    """

    def __init__(self, seeds: Sequence[int], num_steps: int, *, device: torch.device) -> None:
        streams = [torch.rand(num_steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self._drawn_BT = torch.stack(streams).double().to(device)
        self._step = 0
        self.is_finite_B = torch.ones(len(seeds), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulated_BV = scores.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
        self.is_finite_B &= cumulated_BV[:, -1].isfinite()
        # Every number drawn is below 1, so the token found has a probability above 0.
        passed_B1 = self._drawn_BT[:, self._step, None] * cumulated_BV[:, -1:]
        token_B1 = torch.searchsorted(cumulated_BV, passed_B1, right=True).clamp_max_(scores.shape[-1] - 1)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


def processors(
    sampling: Sampling, seeds: Sequence[int], num_steps: int, *, device: torch.device
) -> tuple[LogitsProcessorList, CandidateSampler | None]:
    """Steps from logits to a token: temperature, top k and top p as Transformers does them, then the draw."""
    if sampling.temperature == 0:
        return LogitsProcessorList(), None
    chain = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    sampler = CandidateSampler(seeds, num_steps, device=device)
    chain.append(sampler)
    return chain, sampler


def load_causal(folder: Path, *, architecture: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    """The causal model in `folder`, on `device`. No code in the folder is ever run.

    Raises:
        CheckpointError: Transformers does not know the architecture, or files are missing or broken.
    """
    if architecture == INTERNLM2:
        return load_internlm2(folder, device=device, dtype=dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=dtype)
    except Exception as error:  # Transformers raises many types for a missing or broken model
        raise CheckpointError(f"no causal model could be loaded from {folder}: {error}") from error
    torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False)


class LocalGenerator:
    """A causal model that answers one prompt after the other, each with `batch_size` candidates at a time.

    A candidate follows from the model, the dtype, the sampling options, the seed, the prompt's place in the corpus
    and the candidate's number: a restart makes the same again on the same kind of machine with as many threads.
    """

    def __init__(self, model: Any, encoder: ChatEncoder, sampling: Sampling, *, batch_size: int) -> None:
        self._model = model
        self._encoder = encoder
        self._sampling = sampling
        self._batch_size = batch_size
        self._end_ids = _end_ids(model, encoder)
        # What the checkpoint's generation_config.json says of sampling would be mixed into ours.
        model.generation_config = GenerationConfig()
        self._max_positions = _max_positions(model)
        # Models with a recurrent state have no keys to repeat.
        self._reads_once = not getattr(type(model), "_is_stateful", False)

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """The outcome of each prompt, in order; a prompt that the model cannot read has its reason."""
        return [self._generation(prompt) for prompt in prompts]

    def _generation(self, prompt: Prompt) -> Generation:
        total = self._sampling.num_candidates
        try:
            ids = self._encoder.encode(prompt.messages)
            if self._max_positions is not None and len(ids) >= self._max_positions:
                raise ConversationError(f"the prompt has {len(ids)} tokens, the generator reads {self._max_positions}")
        except ConversationError as error:
            return Generation((), (str(error),) * total)
        came: list[Candidate] = []
        failures: list[str] = []
        for first in range(0, total, self._batch_size):
            numbers = range(first, min(first + self._batch_size, total))
            for outcome in self._batch(ids, [self._sampling.seed_of(prompt.key, number) for number in numbers]):
                if isinstance(outcome, Candidate):
                    came.append(outcome)
                else:
                    failures.append(outcome)
        return Generation(tuple(came), tuple(failures))

    def _batch(self, ids: list[int], seeds: list[int]) -> list[Candidate | str]:
        """A candidate for each seed, or the reason why it has none."""
        try:
            return self._continued(ids, seeds)
        except torch.OutOfMemoryError as error:
            memory_error = str(error).partition("\n")[0]
        if len(seeds) == 1:
            return [f"the generator ran out of memory: {memory_error}"]
        torch.cuda.empty_cache()
        half = len(seeds) // 2
        return self._batch(ids, seeds[:half]) + self._batch(ids, seeds[half:])

    @torch.inference_mode()
    def _continued(self, ids: list[int], seeds: list[int]) -> list[Candidate | str]:
        device = self._model.device
        num_steps = self._sampling.max_new_tokens
        if self._max_positions is not None:
            num_steps = min(num_steps, self._max_positions - len(ids))
        chain, sampler = processors(self._sampling, seeds, num_steps, device=device)
        ids_BT = torch.tensor([ids], device=device).expand(len(seeds), -1)
        generated_BT = self._model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            past_key_values=self._read_once(ids_BT),
            logits_processor=chain,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=num_steps,
                eos_token_id=sorted(self._end_ids) or None,
                pad_token_id=min(self._end_ids, default=0),
            ),
        )[:, len(ids) :]
        return [self._outcome(row, place, sampler) for place, row in enumerate(generated_BT)]

    def _read_once(self, ids_BT: Tensor) -> DynamicCache | None:
        """Keys and values of the prompt but its last token: computed once, and repeated for each candidate."""
        if not self._reads_once:
            return None
        cache = DynamicCache(config=self._model.config)
        if ids_BT.shape[1] > 1:
            self._model.base_model(ids_BT[:1, :-1], past_key_values=cache, use_cache=True)  # no head, no logits
            cache.batch_repeat_interleave(ids_BT.shape[0])
        return cache

    def _outcome(self, row_T: Tensor, place: int, sampler: CandidateSampler | None) -> Candidate | str:
        if sampler is not None and not sampler.is_finite_B[place]:
            return "the generator computed NaN or infinity"
        tokens = row_T.tolist()
        end = next((at for at, token in enumerate(tokens) if token in self._end_ids), None)
        return Candidate(self._encoder.decode(tokens[:end]), "length" if end is None else "stop")


def _end_ids(model: Any, encoder: ChatEncoder) -> set[int]:
    """Tokens that end a response: those of generation_config.json or config.json, EOS, and the template's own."""
    found: set[int] = encoder.end_of_turn_ids()
    for known in (model.generation_config.eos_token_id, model.config.eos_token_id, encoder.eos_token_id):
        found |= set(known) if isinstance(known, list) else set() if known is None else {known}
    return found


def _max_positions(model: Any) -> int | None:
    """The longest sequence the model reads, in tokens, where its configuration says; dynamic RoPE stretches it."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    return int(positions * rope["factor"]) if positions and rope.get("rope_type") == "dynamic" else positions
