"""Architectures that load, by the class name in config.json: family of layers, kind of head, where the score is read.

Each reading rule is that of the public code named beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["internlm2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"]
Activation = Literal["silu", "gelu_tanh"]

Reading = Literal["reward_token", "last_non_pad", "before_first_pad", "last", "eos", "step"]
"""The token whose hidden state the head reads.

"reward_token": the one that every sequence ends in. "last_non_pad": the rightmost that is not `pad_token_id`.
"before_first_pad": the one before the first `pad_token_id`, else the last. "last": the last of the text, pad id or not.
"eos": the eos token, which stands right behind the text, its trailing newlines stripped. "step": where each step of an
answer ends, by the model's `StepRule`.
"""

HeadKind = Literal[
    "scalar", "logit", "gating", "quantile_gating", "weighted", "probability", "two_labels", "two_logits"
]
"""The formula from hidden states to the score: see `heads.py`."""

StepRule = Literal["qwen", "skywork", "trl", "shepherd", "rlhflow"]
"""How a process reward model reads an answer in steps: see `steps.py`."""
TEMPLATED_RULES: tuple[StepRule, ...] = ("qwen", "rlhflow")
"""Rules that render a conversation; the others join plain texts, and need no chat template."""

INTERNLM2 = "InternLM2ForRewardModel"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A class of model. `family` None is any of them: config.json's model_type says which.

    `is_language_model`: its own head gives words, so that another must be named. `counts_labels`: `num_labels` is one.
    `steps` is the rule of a process reward model, which scores steps and no whole conversation.
    """

    family: Family | None
    reading: Reading
    head: HeadKind = "scalar"
    is_language_model: bool = False
    counts_labels: bool = False
    steps: StepRule | None = None


_CLASSES: dict[str, Family] = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Gemma": "gemma",
    "Gemma2": "gemma2",
}
MODEL_TYPES: dict[str, Family] = {"internlm2": "internlm2", **{family: family for family in _CLASSES.values()}}

ARCHITECTURES: dict[str, Architecture] = {
    # InternLM2's modeling file reads the last attended token, which its tokenizer makes the reward token.
    INTERNLM2: Architecture("internlm2", "reward_token"),
    # Transformers, `modeling_layers.GenericForSequenceClassification`.
    **{
        f"{name}ForSequenceClassification": Architecture(family, "last_non_pad", counts_labels=True)
        for name, family in _CLASSES.items()
    },
    # Transformers' `GenericForTokenClassification` scores every token; verl, which trains reward models of this class,
    # takes the last attended one (`RewardModelWorker`).
    **{
        f"{name}ForTokenClassification": Architecture(family, "last", counts_labels=True)
        for name, family in _CLASSES.items()
    },
    # LLaMA-Factory reads its value head at the last attended token (`train/rm/trainer.py`). NVIDIA's cards of
    # Llama-3.1-Nemotron-70B-Reward-HF and Llama-3.3-Nemotron-70B-Reward read logit 0 of the first token that would be
    # generated, which are the last token's logits.
    **{f"{name}ForCausalLM": Architecture(family, "last", is_language_model=True) for name, family in _CLASSES.items()},
    "InternLM2ForCausalLM": Architecture("internlm2", "last", is_language_model=True),
    # Qwen2.5-Math-RM, WorldPM: vLLM's `qwen2_rm.py` and SGLang's `qwen2_rm.py` pool the last token.
    "Qwen2ForRewardModel": Architecture("qwen2", "last"),
    "Qwen3ForRewardModel": Architecture("qwen3", "last"),
    # Qwen2.5-Math-PRM's `modeling_qwen2_rm.py` and card; SkyworkAI/skywork-o1-prm-inference.
    "Qwen2ForProcessRewardModel": Architecture("qwen2", "step", head="two_labels", steps="qwen"),
    "Qwen2ForPrmModel": Architecture("qwen2", "step", head="probability", steps="skywork"),
    # AceCoder's `rm_utils.py`: the value head of the last attended token.
    "Qwen2ForCausalRM": Architecture("qwen2", "last"),
    # RewardBench's `inform.py`, `openbmb.py`, `starling.py`, `grm.py`, `beaver.py`.
    "INFORMForSequenceClassification": Architecture("llama", "before_first_pad"),
    "LlamaRewardModel": Architecture("llama", "last"),
    "EurusRewardModel": Architecture("mistral", "last"),
    "GPTRewardModel": Architecture(None, "before_first_pad"),
    "GRewardModel": Architecture(None, "last"),
    "LlamaForScore": Architecture("llama", "last"),
    "LlamaModelForScore": Architecture("llama", "last"),
    # OpenRLHF's `datasets/reward_dataset.py` strips newlines and ends the text in eos; `models/model.py` reads there.
    "RewardModel": Architecture(None, "eos"),
    # ArmoRM's `modeling_custom.py`; RewardBench's `qrm.py`; SGLang's `llama_reward.py` (URM).
    "LlamaForRewardModelWithGating": Architecture("llama", "before_first_pad", head="gating"),
    "LlamaForRewardModelWithGating3": Architecture("llama", "before_first_pad", head="quantile_gating"),
    "LlamaForRewardModelWithGating31": Architecture("llama", "before_first_pad", head="quantile_gating"),
    "LlamaForSequenceClassificationWithNormal_Weights": Architecture("llama", "last", head="weighted"),
}
SUPPORTED_ARCHITECTURES = tuple(sorted(name for name, found in ARCHITECTURES.items() if not found.is_language_model))

_GATING_GEMMA = "gating heads on Gemma 2 are not"
_EXPERTS = "mixtures of experts are not"
REFUSED: dict[str, str] = {
    "AtheneForSequenceClassification": "it reads a CLS token that its pipeline appends to the text",
    "LDLRewardModel27B": _GATING_GEMMA,
    "Gemma2ForRewardModelWithGating": _GATING_GEMMA,
    "Gemma2ForQuantileSequenceClassification": _GATING_GEMMA,
    "Gemma3ForSequenceClassification": "Gemma 3 is not",
    "Gemma3TextForSequenceClassification": "Gemma 3 is not",
    "Qwen3_5ForSequenceClassification": "its gated delta-net layers are not",
    "JambaForSequenceClassification": "its Mamba layers are not",
    "MixtralForSequenceClassification": _EXPERTS,
    "Qwen2MoeForSequenceClassification": _EXPERTS,
    "Qwen3MoeForSequenceClassification": _EXPERTS,
    "DebertaV2ForSequenceClassification": "encoders are not; decoders are",
    "ElectraForSequenceClassification": "encoders are not; decoders are",
    "DebertaV2PairRM": "it compares two answers in one text",
    "T5ForConditionalGeneration": "it compares two answers in one text",
    "GPTNeoXRewardModel": "GPT-NeoX is not",
    "GPTNeoXForSequenceClassification": "GPT-NeoX is not",
    "Qwen2_5_VLForConditionalGeneration": "it reads images",
}

# Llama 3's tokens of "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", the same in ArmoRM's
# `modeling_custom.py` and in QRM's code: the gate reads the end of the prompt.
GATE_PATTERN = (128009, 128006, 78191, 128007, 271)

_HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# The order in `armo-rm/stage-1_prepare.py` of RLHFlow/RLHF-Reward-Modeling and on ArmoRM's card.
_ARMO = (
    *(f"helpsteer-{name}" for name in _HELPSTEER),
    *(
        f"ultrafeedback-{name}"
        for name in ("overall_score", "instruction_following", "truthfulness", "honesty", "helpfulness")
    ),
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    *(f"code-{name}" for name in ("complexity", "style", "explanation", "instruction-following", "readability")),
)


def attribute_names(kind: HeadKind, num_objectives: int, num_labels: int) -> tuple[str, ...]:
    """Names of a head's attributes: those their authors give where the number is theirs, else numbered ones."""
    if kind in ("gating", "quantile_gating"):
        return _ARMO if num_objectives == len(_ARMO) else _numbered(num_objectives)
    if kind == "weighted":
        return _HELPSTEER if num_labels == 2 * len(_HELPSTEER) else _numbered(num_labels // 2)
    return ()


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"attribute-{index}" for index in range(count))
