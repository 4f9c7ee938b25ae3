"""Policies' tokenizers, made of the embedded model's: special tokens and chat templates are like real ones'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from serve_app.reward_model.tokenizer import quiet_transformers

__all__ = ["DEFAULT_SYSTEM", "chatml", "dated", "llama", "plain", "thinking"]

DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% set system = 'Cutting Knowledge Date: December 2023\nToday Date: DATE\n\n' %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = system + messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\n{{ system }}<|eot_id|>"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
THINKING = (
    "{{ bos_token }}{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<|{{ message['role'] }}|>{{ content }}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def _tokenizer(folder: Path, template: str | None, specials: tuple[str, ...] = (), **named: str) -> Any:
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({**named, "extra_special_tokens": list(specials)})
    tokenizer.chat_template = template
    return tokenizer


def chatml(folder: Path) -> Any:
    """As Qwen2.5: a default system prompt, EOS ends the turn and is the padding too."""
    return _tokenizer(folder, CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")


def llama(folder: Path) -> Any:
    """As Llama 3.1: headers, and a system turn that is always there."""
    markers = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    template = LLAMA.replace("DATE", "26 Jul 2024")
    return _tokenizer(folder, template, markers, bos_token=markers[0], eos_token="<|eot_id|>", pad_token="<|eot_id|>")


def dated(folder: Path) -> Any:
    """As Llama 3.2, whose template writes the day's date."""
    tokenizer = llama(folder)
    tokenizer.chat_template = LLAMA.replace("DATE\n\n'", "' + strftime_now('%d %b %Y') + '\n\n'")
    return tokenizer


def thinking(folder: Path) -> Any:
    """As DeepSeek-R1's distillations: the prompt opens the thought, and the template cuts thoughts of older turns."""
    return _tokenizer(folder, THINKING, ("<|user|>", "<|assistant|>"), eos_token="</s>", pad_token="</s>")


def plain(folder: Path) -> Any:
    """A base model's, without a chat template."""
    return _tokenizer(folder, None, eos_token="</s>", pad_token="</s>")
