"""Check a downloaded reward model: against figures that its authors publish, or against Transformers on this machine.

    python -m jobs.verify --model internlm/internlm2-1_8b-reward
    python -m jobs.verify --model Skywork/Skywork-Reward-V2-Qwen3-0.6B --against transformers

Figures for given chats are known of InternLM2-1.8B-Reward, POLAR-7B, Skywork-Reward-V2-Qwen3-0.6B,
Skywork-Reward-V2-Llama-3.1-8B, Skywork-Reward-Llama-3.1-8B and its v0.2. A checkpoint is told by its architecture and
size and not by its name: one of Llama-3.1-8B's is held against each of the three models of that shape.

--against transformers is for every model whose class Transformers ships. Its own tokenizer and class score six short
chats, in English and Chinese, in the same dtype on the same device; token ids, the place where the score is read and
both scores are printed side by side. One of the two models is in memory at a time.

    python -m jobs.verify --model tiny

recomputes the embedded model's accuracy on held-out questions of each kind that it was taught.

Exit status: 0 all agree, 4 something does not, 1 the model cannot be loaded or there is nothing to hold it against, 2
an option is wrong, 130 or 143 it was interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes a second to import, so that signals are answered meanwhile
    from jobs.command import launch

    launch("jobs.verify")

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from jobs.benchmarks import taught
from jobs.benchmarks.published import PUBLISHED, Published, Shape, published_for
from jobs.benchmarks.side_by_side import (
    Reading,
    check_class,
    our_readings,
    room_warning,
    transformers_readings,
)
from jobs.command import parse, run_command
from jobs.errors import UnpublishedModelError
from serve_app.reward_model import tiny

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel
    from serve_app.reward_model.architecture import DecoderConfig

EXIT_MISMATCH = 4
ELSEWHERE = "--against transformers compares any model whose class Transformers ships"


class VerifyConfig(BaseModel):
    """Check a model against the figures that its authors publish, or against Transformers on this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "internlm/internlm2-1_8b-reward"
    """A folder, a Hugging Face id, or tiny."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    against: Literal["published", "transformers"] = "published"
    """published: figures that the model's authors publish; transformers: Transformers' own class on this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's on cuda; on cpu bfloat16 where the processor has it, else float32."""
    chat_template: str | None = Field(default=None, min_length=1)
    """A file with a Jinja chat template in place of the checkpoint's, for both sides."""


@dataclass(frozen=True, slots=True)
class Check:
    """One published figure, ours, and whether they agree."""

    name: str
    card: str
    ours: str
    agrees: bool


def main(args: Sequence[str] | None = None, *, prog: str = "python -m jobs.verify") -> int:
    """Run the command line; the exit status."""
    config = parse(VerifyConfig, args, prog=prog, description=__doc__)
    return run_command(prog, lambda: verify(config), log_level=logging.WARNING)


def verify(config: VerifyConfig) -> int:
    """Print the table of checks; the exit status.

    Raises:
        CheckpointError: the model cannot be loaded.
        UnpublishedModelError: no figures are published for a model of this shape.
        ComparisonError: Transformers has no class for it, or cannot load it.
    """
    if config.against == "transformers":
        return _beside_transformers(config)
    return _on_lessons(config) if config.model == tiny.NAME else _against_published(config)


def _on_lessons(config: VerifyConfig) -> int:
    model = _load(config)
    found = taught.accuracies(model, num_pairs=taught.NUM_PAIRS)
    print(f"{tiny.note(config.model)}\n\n{config.model} in {_dtype(model)} on {model.device}, on held-out questions")
    print(*taught.table(found), sep="\n")
    if taught.is_as_taught(found):
        return 0
    least = f"{taught.LEAST_OF_A_KIND:.0%} of each kind and {taught.LEAST_OF_ALL:.0%} of all"
    print(f"MISMATCH: the embedded model gets {least}: a fault, or other weights")
    return EXIT_MISMATCH


def _against_published(config: VerifyConfig) -> int:
    shape = _shape(config)  # from the small files: weights are read, and downloaded, for a model that has figures
    candidates = published_for(shape)
    if not candidates:
        known = ", ".join(figures.model for figures in PUBLISHED)
        raise UnpublishedModelError(
            f"no figures are published for a model such as {config.model} ({shape.architecture}, hidden size "
            f"{shape.hidden_size}, {shape.num_layers} layers); there are figures of {known}. {ELSEWHERE}"
        )
    model = _load(config)
    print(f"{config.model} in {_dtype(model)} on {model.device}")
    agreed = [figures.model for figures in candidates if _print_checks(model, figures)]
    if agreed:
        print(f"these are the figures of {', '.join(agreed)}")
        return 0
    print(
        f"a model of this shape whose figures are others: not {' nor '.join(figures.model for figures in candidates)}, "
        f"or a fault; {ELSEWHERE}"
    )
    return EXIT_MISMATCH


def _print_checks(model: RewardModel, figures: Published) -> bool:
    """Print the checks of one model's figures; whether all agree."""
    results = checks(model, figures)
    print(f"\n{figures.model}: {figures.source}")
    print(f"{'check':<12}{'published':>14}{'rayward':>14}")
    for check in results:
        print(f"{check.name:<12}{check.card:>14}{check.ours:>14}  {'ok' if check.agrees else 'MISMATCH'}")
    return all(check.agrees for check in results)


def checks(model: RewardModel, figures: Published) -> list[Check]:
    """Score the published chats, compare and rank them, and hold each result against the published one."""
    tolerance = figures.allowed(model)
    pairs = zip(figures.scores, model.get_scores(figures.conversations), strict=True)
    results = [
        Check(f"score_{number}", f"{card:.6f}", f"{ours:.6f}", abs(ours - card) <= tolerance)
        for number, (card, ours) in enumerate(pairs, start=1)
    ]
    better, ranks = model.compare(*figures.conversations), model.rank(figures.conversations)
    results.append(Check("compare", "True", str(better), better is True))
    results.append(Check("rank", "[0, 1]", str(ranks), ranks == [0, 1]))
    return results


def _beside_transformers(config: VerifyConfig) -> int:
    import transformers

    _, shape_config = _small_files(config)
    check_class(shape_config.architecture)
    model = _load(config)
    dtype, folder, device, template = _dtype(model), model.folder, model.device, model.chat_template
    torch_dtype = model.dtype
    ours = our_readings(model)
    del model  # before Transformers' copy is loaded
    if warning := room_warning(folder, device):
        print(warning, file=sys.stderr)
    theirs = transformers_readings(folder, shape_config, device=device, dtype=torch_dtype, chat_template=template)
    print(
        f"{config.model} in {dtype} on {device}, beside {shape_config.architecture} of Transformers "
        f"{transformers.__version__}"
    )
    return 0 if _print_side_by_side(ours, theirs, dtype=dtype) else EXIT_MISMATCH


def _print_side_by_side(ours: Mapping[str, Reading], theirs: Mapping[str, Reading], *, dtype: str) -> bool:
    """Print both readings of each chat; whether all agree."""
    width = max(map(len, ours)) + 2
    names = ("token ids", "read at", "rayward", "Transformers")
    print(f"{'chat':<{width}}" + "".join(f"{name:>16}" for name in names))
    agree = []
    for name, reading in ours.items():
        other = theirs[name]
        agree.append(reading.agrees(other, dtype=dtype))
        same_ids = reading.token_ids == other.token_ids
        cells = (
            _both(len(reading.token_ids), len(other.token_ids), same=same_ids),
            _both(reading.place, other.place, same=reading.place == other.place),
            f"{reading.score:.6f}",
            f"{other.score:.6f}",
        )
        line = f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells)
        print(f"{line}  {'ok' if agree[-1] else 'MISMATCH'}")
    print("(two numbers with / between them are rayward's and Transformers'; token ids are compared one by one)")
    return all(agree)


def _both(ours: int, theirs: int, *, same: bool) -> str:
    return str(ours) if same else f"{ours} / {theirs}"


def _small_files(config: VerifyConfig) -> tuple[Path, DecoderConfig]:
    """The folder with the model's configuration and tokenizer, and the configuration."""
    from serve_app.reward_model.architecture import DecoderConfig
    from serve_app.reward_model.model_files import resolve

    folder = resolve(config.model, config.revision, weights=False)
    return folder, DecoderConfig.from_folder(folder)


def _shape(config: VerifyConfig) -> Shape:
    from serve_app.reward_model.chat_template import template_text
    from serve_app.reward_model.tokenizer import Tokenizer

    folder, decoder = _small_files(config)
    template = None if config.chat_template is None else template_text(Path(config.chat_template))
    tokenizer = Tokenizer.from_pretrained(folder, config=decoder, chat_template=template)
    return Shape.of(decoder, takes_reference=tokenizer.takes_reference)


def _load(config: VerifyConfig) -> RewardModel:
    from serve_app.reward_model import RewardModel  # brings torch

    return RewardModel.from_pretrained(
        config.model,
        revision=config.revision,
        device=config.device,
        dtype=config.dtype,
        chat_template=None if config.chat_template is None else Path(config.chat_template),
    )


def _dtype(model: RewardModel) -> str:
    return str(model.dtype).removeprefix("torch.")
