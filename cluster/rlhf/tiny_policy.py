"""A policy small enough to train on two cores in seconds: a random Llama over the embedded model's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from serve_app.reward_model.tiny import cached_folder

PROMPTS = (
    "What is a good answer?",
    "How are you?",
    "Please help me think about time.",
    "Could you make up a question for people?",
    "What do you know about it?",
    "Is there more than one way out?",
    "When will they come back?",
    "Answer in one word: yes or no?",
)
END_OF_TURN = "<|im_end|>"
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@lru_cache(maxsize=1)
def policy_tokenizer() -> Any:
    """A ChatML tokenizer from Transformers, padded on the left; its padding is its EOS, as many policies have it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(cached_folder() / "tokenizer.json"),
        bos_token="<s>",
        eos_token=END_OF_TURN,
        pad_token=END_OF_TURN,
        padding_side="left",
        chat_template=CHATML,
    )


def random_policy(seed: int) -> Any:
    """A `LlamaForCausalLM` of 0.1 million random parameters, the same for the same seed."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(_config())


def random_values(seed: int) -> Any:
    """The same body with a head of one value a token, which starts at zero."""
    from transformers import LlamaForTokenClassification

    torch.manual_seed(seed)
    config = _config()
    config.num_labels = 1
    model = LlamaForTokenClassification(config)
    torch.nn.init.zeros_(model.score.weight)
    return model


def _config() -> Any:
    from transformers import LlamaConfig

    tokenizer = policy_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )


@dataclass(frozen=True, slots=True)
class Rollout:
    """Prompts and sampled responses. Shape legend: B sequences, P prompt tokens, R response tokens, T = P + R.

    `sequences_BT` holds prompts padded on the left and responses padded on the right, and `mask_BT` tells which tokens
    count: the padding's id is that of a response's end, which counts.
    """

    sequences_BT: Tensor
    mask_BT: Tensor
    response_mask_BR: Tensor
    num_prompt_tokens: int

    def rows(self, places: Tensor) -> Rollout:
        """Some of the sequences, in the order of their `places`."""
        sequences_BT, mask_BT, response_mask_BR = self.sequences_BT, self.mask_BT, self.response_mask_BR
        return Rollout(sequences_BT[places], mask_BT[places], response_mask_BR[places], self.num_prompt_tokens)

    def response_texts(self) -> list[str]:
        """The responses with the special tokens in them."""
        responses_BR = self.sequences_BT[:, self.num_prompt_tokens :]
        kept = [row[mask.bool()].tolist() for row, mask in zip(responses_BR, self.response_mask_BR, strict=True)]
        texts: list[str] = policy_tokenizer().batch_decode(kept, skip_special_tokens=False)
        return texts


@torch.no_grad()
def generate(policy: Any, prompts: list[str], *, max_new_tokens: int) -> Rollout:
    """Sample one response to each prompt at temperature 1."""
    tokenizer = policy_tokenizer()
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    sequences_BT = policy.generate(**encoded, do_sample=True, top_k=0, max_new_tokens=max_new_tokens)
    num_prompt_tokens = encoded["input_ids"].shape[1]
    is_end_BR = sequences_BT[:, num_prompt_tokens:] == tokenizer.eos_token_id
    response_mask_BR = (is_end_BR.cumsum(dim=1) - is_end_BR.long() == 0).long()  # up to the first end, and that
    mask_BT = torch.cat([encoded["attention_mask"], response_mask_BR], dim=1)
    return Rollout(sequences_BT, mask_BT, response_mask_BR, num_prompt_tokens)
