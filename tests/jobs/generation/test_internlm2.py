"""InternLM2ForCausalLM as Llama computes what the original does, and odd checkpoints are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.generation.internlm2 import load_internlm2
from serve_app.reward_model.errors import CheckpointError, UnsupportedArchitectureError, WeightError
from tests.goldens import make_causal_golden

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden checkpoint, to be spoiled."""
    return make_causal_golden(tmp_path / "causal")


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_logits_and_greedy_continuations_are_those_of_the_original(folder: Path) -> None:
    model: Any = load_internlm2(folder, device=CPU, dtype=torch.float32)
    for golden in json.loads((folder / "logits.json").read_text()):
        ids_BT = torch.tensor([golden["input_ids"]])
        logits_V = model(ids_BT).logits[0, -1]
        assert (logits_V - torch.tensor(golden["last_logits"])).abs().max() < 1e-4
        generated_BT = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=len(golden["greedy"]), do_sample=False
        )
        assert generated_BT[0, ids_BT.shape[1] :].tolist() == golden["greedy"]


def test_shards_of_bin_files_give_the_same_model(folder: Path) -> None:
    whole = load_internlm2(folder, device=CPU, dtype=torch.float32).state_dict()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
    for number, half in enumerate(halves):
        torch.save(half, folder / f"pytorch_model-{number}.bin")
    places = {name: f"pytorch_model-{number}.bin" for number, half in enumerate(halves) for name in half}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    sharded = load_internlm2(folder, device=CPU, dtype=torch.float32).state_dict()
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_biases_and_scaled_rotary_embedding_are_taken_over(folder: Path) -> None:
    change_config(folder, bias=True, rope_scaling={"type": "dynamic", "factor": 2.0})
    weights = load_file(folder / "model.safetensors")
    for layer in range(3):
        weights[f"model.layers.{layer}.attention.wqkv.bias"] = torch.arange(128).half()
        weights[f"model.layers.{layer}.attention.wo.bias"] = torch.ones(64).half()
    save_file(weights, folder / "model.safetensors")
    model = load_internlm2(folder, device=CPU, dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    # Two key/value heads of 16, each with two query heads before it: rows 0-31 and 64-95 are queries.
    assert attention.q_proj.bias.tolist() == [*range(32), *range(64, 96)]
    assert attention.k_proj.bias.tolist() == [*range(32, 48), *range(96, 112)]
    assert attention.v_proj.bias.tolist() == [*range(48, 64), *range(112, 128)]
    assert model.config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}


def test_tied_embeddings_are_the_head(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    del weights["output.weight"]
    save_file(weights, folder / "model.safetensors")
    model = load_internlm2(folder, device=CPU, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, weights["model.tok_embeddings.weight"].float())


def test_tokens_that_end_a_response_come_from_the_checkpoint(folder: Path) -> None:
    change_config(folder, eos_token_id=9)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 77]}')
    model = load_internlm2(folder, device=CPU, dtype=torch.float32)
    assert model.config.eos_token_id == 9
    assert model.generation_config.eos_token_id == [9, 77]


def test_a_checkpoint_that_does_not_fit_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "1.attention.wo" not in name}, folder / "other")
    shutil.move(folder / "other", folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"missing weights in .*: model\.layers\.1\.attention\.wo\.weight"):
        load_internlm2(folder, device=CPU, dtype=torch.float32)
    change_config(folder, rope_scaling={"type": "yarn", "factor": 2.0})
    with pytest.raises(UnsupportedArchitectureError, match="yarn"):
        load_internlm2(folder, device=CPU, dtype=torch.float32)
    change_config(folder, rope_scaling=None, hidden_size="large")
    with pytest.raises(CheckpointError, match=r"config\.json .*hidden_size is 'large'"):
        load_internlm2(folder, device=CPU, dtype=torch.float32)
