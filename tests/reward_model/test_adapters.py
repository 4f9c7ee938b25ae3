"""Adapters, value heads beside a language model, OpenRLHF's folders: scores are those of the trainer's arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as BackendTokenizer
from torch import Tensor

from serve_app.reward_model import CheckpointError, RewardModel, UnsupportedArchitectureError, WeightError, tiny
from serve_app.reward_model.architecture import Normalization
from serve_app.reward_model.checkpoint import read_config
from serve_app.reward_model.model_files import fingerprint, tokenizer_folder
from tests.conftest import chat
from tests.reward_model.tiny_checkpoints import (
    HIDDEN,
    SEQUENCES,
    assert_scores,
    body,
    drawn,
    last_states,
    load,
    write,
)

RANK, ALPHA = 4, 12
QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
HEAD = drawn(1, HIDDEN, seed=5)
LOW = {QUERY: drawn(RANK, HIDDEN, seed=20), DOWN: drawn(RANK, 160, seed=21)}
HIGH = {QUERY: drawn(HIDDEN, RANK, seed=22), DOWN: drawn(HIDDEN, RANK, seed=23)}
PEFT = "base_model.model."


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A language model, as people train reward models from."""
    weights = body() | {"lm_head.weight": drawn(300, HIDDEN, seed=9)}
    return write(tmp_path / "base", weights, "LlamaForCausalLM")


def lora() -> dict[str, Tensor]:
    """The changes as PEFT saves them: without the adapter's name."""
    low = {f"{PEFT}{name}.lora_A.weight": tensor for name, tensor in LOW.items()}
    return low | {f"{PEFT}{name}.lora_B.weight": tensor for name, tensor in HIGH.items()}


def adapter(folder: Path, base: Path | str, tensors: dict[str, Tensor], **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": ["score"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def merged(scales: dict[str, float]) -> dict[str, Tensor]:
    weights = body()
    for name, scale in scales.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale * (HIGH[name] @ LOW[name])
    return weights


@pytest.mark.parametrize(
    "name", ["score.weight", "score.modules_to_save.weight", "score.modules_to_save.default.weight"]
)
@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({}, dict.fromkeys((QUERY, DOWN), ALPHA / RANK)),
        ({"use_rslora": True}, dict.fromkeys((QUERY, DOWN), ALPHA / math.sqrt(RANK))),
        ({"alpha_pattern": {"down_proj": 2}}, {QUERY: ALPHA / RANK, DOWN: 2 / RANK}),
    ],
    ids=["alpha over rank", "rank-stabilised", "alpha by pattern"],
)
def test_an_adapter_scores_as_its_merged_model(
    tmp_path: Path, base: Path, options: dict[str, Any], scales: dict[str, float], name: str
) -> None:
    folder = adapter(tmp_path / "adapter", base, lora() | {PEFT + name: HEAD}, **options)
    assert_scores(load(folder), last_states(merged(scales)) @ HEAD[0])


def test_changes_are_added_before_the_sum_is_rounded(tmp_path: Path, base: Path) -> None:
    folder = adapter(tmp_path / "adapter", base, lora() | {f"{PEFT}score.weight": HEAD})
    rounded = merged(dict.fromkeys((QUERY, DOWN), ALPHA / RANK)) | {"score.weight": HEAD}
    whole = write(tmp_path / "whole", rounded, "LlamaForSequenceClassification", num_labels=1)
    scores = [
        RewardModel.from_pretrained(str(path), device="cpu", dtype="bfloat16").score_token_ids(SEQUENCES)
        for path in (folder, whole)
    ]
    assert np.array_equal(scores[0], scores[1])


def test_embeddings_and_transposed_changes(tmp_path: Path, base: Path) -> None:
    low, high = drawn(RANK, 300, seed=30), drawn(HIDDEN, RANK, seed=31)
    name = f"{PEFT}model.embed_tokens.lora_embedding_"
    folder = adapter(tmp_path / "adapter", base, {f"{name}A": low, f"{name}B": high, f"{PEFT}score.weight": HEAD})
    weights = body()
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] + ALPHA / RANK * (high @ low).T
    assert_scores(load(folder), last_states(weights) @ HEAD[0])
    turned = {
        f"{PEFT}{QUERY}.lora_A.weight": HIGH[QUERY].T,
        f"{PEFT}{QUERY}.lora_B.weight": LOW[QUERY].T,
        f"{PEFT}score.weight": HEAD,
    }
    folder = adapter(tmp_path / "turned", base, turned, fan_in_fan_out=True)
    assert_scores(load(folder), last_states(merged({QUERY: ALPHA / RANK})) @ HEAD[0])


def test_a_resized_embedding_sets_the_vocabulary(tmp_path: Path, base: Path) -> None:
    larger = torch.cat([body()["model.embed_tokens.weight"], drawn(5, HIDDEN, seed=40)])
    tensors = lora() | {f"{PEFT}score.weight": HEAD, f"{PEFT}model.embed_tokens.weight": larger}
    model = load(adapter(tmp_path / "adapter", base, tensors))
    assert model.config.vocab_size == 305
    assert np.isfinite(model.score_token_ids([[304]])).all()
    assert_scores(model, last_states(merged(dict.fromkeys((QUERY, DOWN), ALPHA / RANK))) @ HEAD[0])


def test_the_base_is_named_by_the_adapter_or_by_option(tmp_path: Path, base: Path) -> None:
    folder = adapter(tmp_path / "adapter", tmp_path / "gone", lora() | {f"{PEFT}score.weight": HEAD})
    with pytest.raises(CheckpointError, match=r"the base of the adapter .* does not exist; .*; base_model names"):
        load(folder)
    model = load(folder, base_model=str(base))
    assert model.score_token_ids(SEQUENCES).tolist() == pytest.approx(
        (last_states(merged(dict.fromkeys((QUERY, DOWN), ALPHA / RANK))) @ HEAD[0]).tolist(), rel=1e-4, abs=1e-4
    )
    with pytest.raises(CheckpointError, match=r"base_model is for adapters; .* holds no adapter_config\.json"):
        load(write(tmp_path / "whole", body() | {"score.weight": HEAD}, "RewardModel"), base_model=str(base))


def test_the_fingerprint_covers_adapter_and_base(tmp_path: Path, base: Path) -> None:
    folder = adapter(tmp_path / "adapter", base, lora() | {f"{PEFT}score.weight": HEAD})
    first = load(folder).fingerprint
    assert first == fingerprint(folder) != fingerprint(base)
    write(base, body(seed=2) | {"lm_head.weight": drawn(300, HIDDEN)}, "LlamaForCausalLM")
    second = fingerprint(folder)
    adapter(folder, base, lora() | {f"{PEFT}score.weight": HEAD + 1})
    assert len({first, second, fingerprint(folder)}) == 3


def test_the_tokenizer_is_the_adapters_or_else_the_bases(tmp_path: Path, base: Path) -> None:
    folder = adapter(tmp_path / "adapter", base, lora())
    assert tokenizer_folder(folder) == base
    (folder / "tokenizer_config.json").write_text("{}")
    assert tokenizer_folder(folder) == folder


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({f"{PEFT}{QUERY}.lora_B.weight": drawn(32, RANK)}, r"q_proj\.weight has shape \[32, 64\].*weight \[64, 64\]"),
        ({f"{PEFT}{QUERY}.lora_B.weight": drawn(HIDDEN, 3)}, r"shapes \[4, 64\] and \[64, 3\], which do not multiply"),
        (
            {f"{PEFT}model.layers.7.x.lora_{half}.weight": drawn(4, 4) for half in "AB"},
            r"the adapter changes model\.layers\.7\.x\.weight, which its base has not",
        ),
        ({f"{PEFT}model.layers.0.mlp.up_proj.lora_A.weight": drawn(4, 4)}, r"up_proj\.weight lacks lora_B"),
        ({f"{PEFT}score.weight": drawn(2, HIDDEN)}, r"score\.weight has shape \[2, 64\].*adapter_model\.safetensors"),
        ({f"{PEFT}{QUERY}.lora_magnitude_vector.weight": drawn(4)}, r"lora_magnitude_vector.* not supported"),
    ],
    ids=["another base", "halves", "no such layer", "one half", "two labels", "another kind"],
)
def test_an_adapter_that_does_not_fit_is_named(
    tmp_path: Path, base: Path, tensors: dict[str, Tensor], reason: str
) -> None:
    folder = adapter(tmp_path / "adapter", base, lora() | {f"{PEFT}score.weight": HEAD} | tensors)
    with pytest.raises(WeightError, match=reason):
        load(folder)


def test_an_adapter_without_a_head_says_so(tmp_path: Path, base: Path) -> None:
    with pytest.raises(WeightError, match="no head in"):
        load(adapter(tmp_path / "adapter", base, lora()))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"peft_type": "LOHA"}, "adapter type LOHA .* LORA is: merge"),
        ({"peft_type": "PROMPT_TUNING"}, "adapter type PROMPT_TUNING"),
        ({"use_dora": True}, "adapter option use_dora"),
        ({"layer_replication": [[0, 2]]}, "adapter option layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"task_type": "CAUSAL_LM"}, "LlamaForCausalLM is a language model"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(
    tmp_path: Path, base: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        read_config(adapter(tmp_path / "adapter", base, lora(), **options))


def test_a_reward_models_own_adapter_keeps_its_head(tmp_path: Path) -> None:
    reward_model = body() | {"score.weight": HEAD}
    write(tmp_path / "base", reward_model, "LlamaForSequenceClassification", num_labels=1)
    folder = adapter(tmp_path / "adapter", tmp_path / "base", lora(), modules_to_save=None)
    assert_scores(load(folder), last_states(merged(dict.fromkeys((QUERY, DOWN), ALPHA / RANK))) @ HEAD[0])


VALUE_HEAD = {"v_head.summary.weight": HEAD, "v_head.summary.bias": torch.tensor([0.3])}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_llama_factorys_value_head_lies_beside_the_model(base: Path, suffix: str) -> None:
    """`train/callbacks.py`, full tuning: model.safetensors of the language model, the head in a file of its own."""
    if suffix == "safetensors":
        save_file(VALUE_HEAD, base / "value_head.safetensors")
    else:
        torch.save(VALUE_HEAD, base / "value_head.bin")
    model = load(base)
    assert model.config.reading == "last"
    assert_scores(model, last_states(body()) @ HEAD[0] + 0.3)


def test_llama_factorys_value_head_lies_beside_an_adapter(tmp_path: Path, base: Path) -> None:
    """`train/callbacks.py`, LoRA tuning: adapter_model.safetensors and the head, nothing of the base."""
    folder = adapter(tmp_path / "adapter", base, lora(), task_type="CAUSAL_LM", modules_to_save=None)
    save_file(VALUE_HEAD, folder / "value_head.safetensors")
    assert_scores(load(folder), last_states(merged(dict.fromkeys((QUERY, DOWN), ALPHA / RANK))) @ HEAD[0] + 0.3)


def test_openrlhf_keeps_mean_and_std_and_applies_them_by_request(tmp_path: Path) -> None:
    """`models/model.py`: class RewardModel, a head named by value_head_prefix, statistics in config.json."""
    weights = body("qwen2") | {"reward_head.weight": HEAD}
    fields: dict[str, Any] = {"value_head_prefix": "reward_head", "normalize_reward": True, "mean": 1.5, "std": 2.0}
    folder = write(tmp_path, weights, "RewardModel", "qwen2", **fields)
    raw = last_states(body("qwen2"), "qwen2") @ HEAD[0]
    model = load(folder)
    assert (model.config.reading, model.normalization) == ("eos", Normalization(1.5, 2.0))
    assert_scores(model, raw)
    normalized = load(folder, normalize=True)
    assert_scores(normalized, (raw - 1.5) / 2.0)
    assert normalized.fingerprint != model.fingerprint


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(("eos", "end"), [("<|im_end|>", "No.<|im_end|>"), ("</s>", "No.<|im_end|> </s>")])
def test_openrlhf_ends_a_text_in_eos(tmp_path: Path, eos: str, end: str) -> None:
    """`datasets/reward_dataset.py`: newlines stripped, an eos token behind a space where there is none, read there."""
    tiny.write(tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML, "eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"vocab_size": 1024}
    write(tmp_path, body(**options) | {"score.weight": HEAD}, "RewardModel", options=options)
    tokenizer = load(tmp_path).tokenizer
    text = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n" + end
    backend = BackendTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(chat("Is it?", "No.")) == expected
    shorter = tokenizer.encode(chat("Is it?", "No."), truncation="right", max_tokens=6)
    assert shorter == [*expected[:5], backend.token_to_id(eos)]


def test_normalisation_needs_the_checkpoints_figures(base: Path) -> None:
    save_file(VALUE_HEAD, base / "value_head.safetensors")
    with pytest.raises(UnsupportedArchitectureError, match="no mean and std"):
        load(base, normalize=True)


@pytest.mark.parametrize("tied", [False, True])
def test_a_logit_is_read_by_request_alone(tmp_path: Path, tied: bool) -> None:
    weights = body() | ({} if tied else {"lm_head.weight": drawn(300, HIDDEN, seed=9)})
    folder = write(tmp_path, weights, "LlamaForCausalLM", tie_word_embeddings=tied)
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    with pytest.raises(UnsupportedArchitectureError, match="is a language model, not a reward model.*head='logit:0'"):
        load(folder)
    for row in (0, 7):
        assert_scores(load(folder, head=f"logit:{row}"), last_states(body()) @ head[row])
    assert load(folder, head="logit:0").fingerprint != load(folder, head="logit:7").fingerprint


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ("logit:300", "no row of the vocabulary of 300"),
        ("logit:-1", "head is 'logit:ID'"),
        ("score", "head is 'logit:"),
    ],
)
def test_a_head_that_names_no_row_is_refused(base: Path, head: str, reason: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        load(base, head=head)


def test_a_reward_models_own_head_is_not_set_aside(tmp_path: Path) -> None:
    folder = write(tmp_path, body() | {"score.weight": HEAD}, "LlamaForSequenceClassification", num_labels=1)
    with pytest.raises(UnsupportedArchitectureError, match="this checkpoint has its own head"):
        load(folder, head="logit:0")
