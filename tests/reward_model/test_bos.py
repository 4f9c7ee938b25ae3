"""Ids are the reference pipelines': the rendered text with the tokenizer's own special tokens, none of them twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.tokenizer import Tokenizer
from tests.conftest import chat
from tests.reward_model.classifiers import CHATML, tokenizer_adds, write

BOS = "<s>"
CHAT = chat("hello, how are you?", "the answer is four")


def ids_of(folder: Path) -> tuple[list[int], Any]:
    """Our ids of `CHAT`, and Transformers' tokenizer."""
    tokenizer = Tokenizer.from_pretrained(folder, config=DecoderConfig.from_folder(folder))
    return tokenizer.encode(CHAT), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", ["writes", "does not"])
@pytest.mark.parametrize("tokenizer", ["adds", "does not"])
def test_there_is_a_bos_where_tokenizer_or_template_has_one(tmp_path: Path, tokenizer: str, template: str) -> None:
    writes = template == "writes"
    write(tmp_path, bos=BOS, template="{{ bos_token }}" + CHATML if writes else CHATML)
    if tokenizer == "adds":
        tokenizer_adds(tmp_path, front=BOS)
    ours, reference = ids_of(tmp_path)
    text = reference.apply_chat_template(CHAT, tokenize=False)
    assert ours == reference(text.removeprefix(BOS) if tokenizer == "adds" else text)["input_ids"]
    assert ours.count(reference.bos_token_id) == (1 if writes or tokenizer == "adds" else 0)


def test_a_bos_that_neither_writes_is_not_put_in_front(tmp_path: Path) -> None:
    """As in Transformers, through the text and through the template alike."""
    ours, reference = ids_of(write(tmp_path, bos=BOS))
    assert ours == reference.apply_chat_template(CHAT, return_dict=False)
    assert ours == reference(reference.apply_chat_template(CHAT, tokenize=False))["input_ids"]


def test_an_eos_that_the_tokenizer_adds_is_there_once(tmp_path: Path) -> None:
    tokenizer_adds(write(tmp_path), end="<|endoftext|>")
    ours, reference = ids_of(tmp_path)
    assert ours == reference(reference.apply_chat_template(CHAT, tokenize=False))["input_ids"]
    tokenizer_adds(tmp_path, end="<|im_end|>")
    ours, reference = ids_of(tmp_path)
    assert ours == reference.apply_chat_template(CHAT, return_dict=False)


def test_an_eos_that_the_tokenizer_adds_outlasts_truncation(tmp_path: Path) -> None:
    """As Transformers truncates: the text's tokens go, special tokens stay."""
    tokenizer_adds(write(tmp_path, bos=BOS), front=BOS, end="<|endoftext|>")
    tokenizer = Tokenizer.from_pretrained(tmp_path, config=DecoderConfig.from_folder(tmp_path))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = reference.apply_chat_template(CHAT, tokenize=False)
    expected = reference(text, truncation=True, max_length=12)["input_ids"]
    assert tokenizer.encode(CHAT, truncation="right", max_tokens=12) == expected
    left = tokenizer.encode(chat("hello world " * 50, "four"), truncation="left", max_tokens=20)
    assert (len(left), left[0], left[-1]) == (20, expected[0], expected[-1])


def test_a_turn_that_opens_with_the_bos_keeps_it(tmp_path: Path) -> None:
    """TRL's setup_chat_format names <|im_start|> the BOS."""
    ours, reference = ids_of(write(tmp_path, bos="<|im_start|>", pad="<|im_end|>"))
    assert ours == reference.apply_chat_template(CHAT, return_dict=False)


@pytest.mark.parametrize(
    "kind", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast"]
)
def test_a_byte_level_tokenizer_keeps_its_spaces_whatever_its_class(tmp_path: Path, kind: str) -> None:
    """Under Transformers before 5.22 a byte-level tokenizer.json lost them with the classes of Llama."""
    write(tmp_path, tokenizer_class=kind)
    ours, _ = ids_of(tmp_path)
    plain = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = plain.apply_chat_template(CHAT, tokenize=False)
    assert ours == plain.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert "how are you?" in plain.decode(ours)
