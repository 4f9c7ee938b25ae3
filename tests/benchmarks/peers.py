"""What the engine is measured against: the same weights in Transformers' Llama classes, batched as people do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.weights import DecoderWeights

__all__ = ["PaddedPeer"]


@dataclass(slots=True)
class PaddedPeer:
    """Padded batches through `LlamaModel`, the score read at each sequence's last token.

    `batch_size` 8, unsorted and eager is the InternLM2-Reward model card's way; 16, sorted and SDPA a better one.
    """

    model: LlamaModel
    head: Tensor
    batch_size: int
    sort: bool

    @classmethod
    def of(
        cls, config: DecoderConfig, weights: DecoderWeights, *, batch_size: int, sort: bool, attention: str
    ) -> PaddedPeer:
        """A peer with these weights, without a copy of the matrices."""
        dtype, device = weights.layers[0].qkv.dtype, weights.embedding.device
        llama_config = LlamaConfig(  # type: ignore[call-arg]  # options of its base class
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_eps,
            max_position_embeddings=config.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            attn_implementation=attention,
            use_cache=False,
        )
        with torch.device("meta"):
            model = LlamaModel(llama_config).requires_grad_(False)
        sizes = [config.query_size, config.kv_size, config.kv_size]
        state = {"embed_tokens.weight": weights.embedding.to(dtype), "norm.weight": weights.norm}
        for index, layer in enumerate(weights.layers):
            query, key, value = layer.qkv.split(sizes)
            gate, up = layer.gate_up.chunk(2)
            parts = {
                "input_layernorm": layer.attention_norm,
                "post_attention_layernorm": layer.mlp_norm,
                "self_attn.q_proj": query,
                "self_attn.k_proj": key,
                "self_attn.v_proj": value,
                "self_attn.o_proj": layer.output,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": layer.down,
            }
            state |= {f"layers.{index}.{name}.weight": tensor.to(dtype) for name, tensor in parts.items()}
        state["norm.weight"] = weights.norm.to(dtype)
        model.load_state_dict(state, assign=True, strict=True)
        with torch.device(device):
            model.rotary_emb = type(model.rotary_emb)(llama_config)
        return cls(model.eval(), weights.head.layers[0].weight[0], batch_size, sort)

    def batches(self, sequences: Sequence[list[int]]) -> list[list[list[int]]]:
        """The batches this way of working makes of the sequences."""
        ordered = sorted(sequences, key=len) if self.sort else sequences
        return [list(ordered[at : at + self.batch_size]) for at in range(0, len(ordered), self.batch_size)]

    @torch.inference_mode()
    def score(self, sequences: Sequence[list[int]]) -> list[float]:
        """The scores of one batch, in order."""
        device = self.head.device
        lengths = torch.tensor([len(ids) for ids in sequences], device=device)
        longest = int(lengths.max())
        ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences], device=device)
        mask_BL = torch.arange(longest, device=device)[None] < lengths[:, None]
        hidden_BLH = self.model(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
        last_BH = hidden_BLH[torch.arange(len(sequences), device=device), lengths - 1]
        scores: list[float] = (last_BH.float() @ self.head).tolist()
        return scores
