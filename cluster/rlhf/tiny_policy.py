"""Policies small enough to train on two cores in minutes, and what they are asked.

The taught one is the embedded generator, which answers some of its questions right. The random one is a smaller Llama
over the same vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from serve_app.reward_model import lessons
from serve_app.reward_model.tiny import cached_folder

KIND = "repeating"
NUM_PROMPTS = 8


def _questions() -> dict[str, lessons.Question]:
    draw = Random(KIND)
    found: dict[str, lessons.Question] = {}
    while len(found) < NUM_PROMPTS:
        question = lessons.question(KIND, draw, held_out=True)
        found[question.messages[-1][1]] = question
    return found


QUESTIONS = _questions()
"""Questions of one kind by their prompts; neither the policy nor the reward model was trained on them."""
PROMPTS = tuple(QUESTIONS)
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


def is_right(prompt: str, response: str) -> bool:
    """Whether the rule calls a response to one of `PROMPTS` right; the marker of its end does not count."""
    return QUESTIONS[prompt].accepts(response.removesuffix(END_OF_TURN))


def share_right(prompts: Sequence[str], responses: Sequence[str]) -> float:
    """The share of responses that the rule calls right."""
    right = [is_right(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    return sum(right) / len(right)


def taught_policy() -> Any:
    """The embedded generator as a `LlamaForCausalLM` in float32: 1.2 million parameters."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(_taught_config())
    _fill(model.model)
    return model


def taught_values() -> Any:
    """The same body with a head of one value a token, which starts at zero."""
    from transformers import LlamaForTokenClassification

    config = _taught_config()
    config.num_labels = 1
    model = LlamaForTokenClassification(config)
    _fill(model.model)
    torch.nn.init.zeros_(model.score.weight)
    return model


def _taught_config() -> Any:
    shape = json.loads((cached_folder() / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return _config(
        **{name: shape[name] for name in (*names, "rms_norm_eps")},
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        tie_word_embeddings=True,
    )


@torch.no_grad()
def _fill(body: Any) -> None:
    """Copy the trunk of the embedded model into a Llama's; `wqkv` has the heads of each group side by side."""
    weights = load_file(cached_folder() / "model.safetensors")
    body.embed_tokens.weight.copy_(weights["model.tok_embeddings.weight"])
    body.norm.weight.copy_(weights["model.norm.weight"])
    config = body.config
    group = config.num_attention_heads // config.num_key_value_heads
    for number, layer in enumerate(body.layers):
        names = {
            "attention.wo": layer.self_attn.o_proj,
            "attention_norm": layer.input_layernorm,
            "feed_forward.w1": layer.mlp.gate_proj,
            "feed_forward.w2": layer.mlp.down_proj,
            "feed_forward.w3": layer.mlp.up_proj,
            "ffn_norm": layer.post_attention_layernorm,
        }
        for name, module in names.items():
            module.weight.copy_(weights[f"model.layers.{number}.{name}.weight"])
        wqkv = weights[f"model.layers.{number}.attention.wqkv.weight"]
        heads = wqkv.view(config.num_key_value_heads, group + 2, -1, config.hidden_size).split([group, 1, 1], dim=1)
        attention = layer.self_attn
        for module, part in zip((attention.q_proj, attention.k_proj, attention.v_proj), heads, strict=True):
            module.weight.copy_(part.reshape(-1, config.hidden_size))


def random_policy(seed: int) -> Any:
    """A `LlamaForCausalLM` of 0.1 million random parameters, the same for the same seed."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(_config(**SHAPE))


def _config(**shape: Any) -> Any:
    from transformers import LlamaConfig

    tokenizer = policy_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
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
