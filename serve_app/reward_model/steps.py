"""Process reward models: a prompt and an answer in steps -> the sequences whose last tokens give the steps' scores.

Attention is causal, so a step's score is that of everything up to where it is read. How texts are joined, and where
that is, each rule has from its authors' code:

- "qwen": Qwen2.5-Math-PRM's card. The chat template, `<extra_0>` behind each step, read there.
- "skywork": `io_utils.prepare_input` of SkyworkAI/skywork-o1-prm-inference. BOS, the question and a newline, then each
  step, encoded by itself, and the newline's token, read there.
- "trl": `tokenize_row` of TRL's `prm_trainer.py`. BOS where the tokenizer names one, the question, then each step,
  encoded by itself, and the separator, read at its last token.
- "shepherd": Math-Shepherd's card. The question, a space and the steps, a line each, a space and `SHEPHERD_TAG` behind
  each, read there.
- "rlhflow": `math-rm/prm_evaluate.py` of RLHFlow/RLHF-Reward-Modeling. The chat template, each step a user's message
  that the assistant answers with `+`, the first behind the question and a space; read at the token before the `+`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve_app.reward_model.conversation import Conversation, ConversationLike, Message, warnings_of
from serve_app.reward_model.errors import (
    CheckpointError,
    ConversationError,
    ConversationTooLongError,
    MalformedConversationError,
    ScoringError,
)
from serve_app.reward_model.families import StepRule
from serve_app.reward_model.scores import StepScores

if TYPE_CHECKING:
    from serve_app.reward_model.architecture import DecoderConfig
    from serve_app.reward_model.tokenizer import Tokenizer

QWEN_TAG = "<extra_0>"
SHEPHERD_TAG = "\u043a\u0438"
GOOD, BAD = "+", "-"


@dataclass(frozen=True, slots=True)
class SteppedAnswer:
    """A prompt, and an answer to it in steps."""

    prompt: Conversation
    steps: tuple[str, ...]

    @classmethod
    def parse(cls, prompt: ConversationLike, steps: Sequence[str]) -> SteppedAnswer:
        """Check both.

        Raises:
            ConversationError: the prompt is malformed, or ends in a message of the assistant's; or there are no steps,
                or one is no text.
        """
        parsed = Conversation.parse(prompt)
        if parsed.response.role == "assistant":
            raise ConversationError("the prompt ends in a message of the assistant's: the steps are the answer")
        if parsed.reference is not None:
            raise ConversationError("a model that scores steps takes no reference")
        if isinstance(steps, str) or not isinstance(steps, Sequence) or not steps:
            raise ConversationError("an answer is a list of one or more steps, each a string")
        texts = [Conversation.parse([{"role": "step", "content": step}]).response.content for step in steps]
        return cls(parsed, tuple(texts))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What looks wrong in it: see `conversation.warnings_of`."""
        return warnings_of(Conversation((*self.prompt.messages, Message("assistant", "".join(self.steps)))))


@dataclass(frozen=True, slots=True)
class EncodedSteps:
    """Token ids of an answer up to each of its steps: the model's score of each is the step's, at its last token."""

    sequences: tuple[list[int], ...]
    warnings: tuple[str, ...] = ()

    def scored(self, outcomes: Sequence[float | ScoringError]) -> StepScores | ScoringError:
        """What scores of the sequences make of the answer: the first error, its step in `index`, where there is one."""
        for step, outcome in enumerate(outcomes):
            if isinstance(outcome, ScoringError):
                outcome.index = step
                return outcome
        values = tuple(outcome for outcome in outcomes if not isinstance(outcome, ScoringError))
        return StepScores(values, max(map(len, self.sequences)), self.warnings)


class StepEncoder:
    """Encodes stepped answers by the rule of a process reward model.

    Raises:
        CheckpointError: the tokenizer lacks what the rule needs.
    """

    def __init__(self, tokenizer: Tokenizer, rule: StepRule, separator: str) -> None:
        self._tokenizer = tokenizer
        self._rule = rule
        self._separator = separator
        self._encode = {
            "qwen": self._qwen,
            "skywork": self._skywork,
            "trl": self._trl,
            "shepherd": self._shepherd,
            "rlhflow": self._rlhflow,
        }[rule]
        if rule == "qwen" and tokenizer.id_of(QWEN_TAG) is None:
            raise CheckpointError(f"the tokenizer has no token {QWEN_TAG}, where the steps of this model are read")
        if rule == "skywork" and tokenizer.bos_token_id is None:
            raise CheckpointError("the tokenizer names no bos_token, which stands in front of this model's questions")

    @classmethod
    def of(cls, config: DecoderConfig, tokenizer: Tokenizer) -> StepEncoder:
        """The encoder of a model. Raises `ConversationError` where it scores no steps."""
        if config.head.steps is None:
            raise ConversationError(
                f"{config.architecture} scores a conversation as a whole, and no steps: score the conversation up to "
                "each step, or name the rule of a process reward model whose files do not say it (head='steps:...')"
            )
        return cls(tokenizer, config.head.steps, config.head.separator)

    def encode_batch(
        self,
        answers: Sequence[SteppedAnswer | ScoringError],
        *,
        max_tokens: int | None = None,
        strict: bool = False,
    ) -> list[EncodedSteps | ScoringError]:
        """The sequences of each answer, in order, or the error that keeps it from being scored; errors given stay.

        Nothing is shortened: an answer of more than `max_tokens`, or the model's own limit, is an error. `strict` makes
        errors of warnings.
        """
        limit = min(max_tokens or self._tokenizer.max_tokens, self._tokenizer.max_tokens)
        return [item if isinstance(item, ScoringError) else self._outcome(item, limit, strict) for item in answers]

    def _outcome(self, answer: SteppedAnswer, limit: int, strict: bool) -> EncodedSteps | ScoringError:
        found = answer.warnings
        if strict and found:
            return MalformedConversationError("; ".join(found))
        try:
            sequences = self._encode(answer)
        except ScoringError as error:
            return error
        longest = max(map(len, sequences))
        if longest > limit:
            return ConversationTooLongError(longest, limit, "an answer in steps is not shortened")
        return EncodedSteps(tuple(sequences), found)

    def _qwen(self, answer: SteppedAnswer) -> list[list[int]]:
        messages = [*answer.prompt.messages, Message("assistant", "")]
        ids = self._tokenizer.rendered_ids(messages, pieces=answer.steps, separator=QWEN_TAG)
        return _up_to_each(ids, self._tokenizer.id_of(QWEN_TAG), answer, QWEN_TAG)

    def _skywork(self, answer: SteppedAnswer) -> list[list[int]]:
        tokenizer = self._tokenizer
        separator = tokenizer.plain_ids("\n")[-1:]
        front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return _growing([*front, *tokenizer.plain_ids(self._question(answer) + "\n")], self._ids(answer), separator)

    def _trl(self, answer: SteppedAnswer) -> list[list[int]]:
        tokenizer = self._tokenizer
        front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        separator = tokenizer.plain_ids(self._separator)
        return _growing([*front, *tokenizer.plain_ids(self._question(answer))], self._ids(answer), separator)

    def _shepherd(self, answer: SteppedAnswer) -> list[list[int]]:
        tokenizer = self._tokenizer
        steps = "\n".join(f"{step} {SHEPHERD_TAG}" for step in answer.steps)
        ids = tokenizer.framed_ids(f"{self._question(answer)} {steps}")
        return _up_to_each(ids, tokenizer.plain_ids(SHEPHERD_TAG)[-1], answer, SHEPHERD_TAG)

    def _rlhflow(self, answer: SteppedAnswer) -> list[list[int]]:
        *before, last = answer.prompt.messages
        first, *others = answer.steps
        good = self._tokenizer.plain_ids(GOOD)[-1]
        messages = list(before)
        sequences = []
        for text in (f"{last.content} {first}", *others):
            messages += [Message("user", text), Message("assistant", GOOD)]
            ids = self._tokenizer.rendered_ids(messages)
            place = next((at for at in range(len(ids) - 1, 0, -1) if ids[at] == good), 0)
            if not place:
                raise ConversationError(f"the chat template leaves no token {GOOD!r} where the assistant answers so")
            sequences.append(ids[:place])
        return sequences

    def _ids(self, answer: SteppedAnswer) -> list[list[int]]:
        return [self._tokenizer.plain_ids(step) for step in answer.steps]

    def _question(self, answer: SteppedAnswer) -> str:
        """The prompt's text, for rules without a chat template."""
        messages = answer.prompt.messages
        if len(messages) != 1 or messages[0].role != "user":
            raise ConversationError(
                f"this model reads a question and steps, without a chat template: the prompt is one message of the "
                f"user's, not {len(messages)} of {', '.join(dict.fromkeys(message.role for message in messages))}"
            )
        return messages[0].content


def stepped_answers(
    prompts: Sequence[ConversationLike], steps: Sequence[Sequence[str]]
) -> list[SteppedAnswer | ScoringError]:
    """The answers of two lists, in order, or what is wrong with each. Raises `ValueError` for lists that differ."""
    if len(prompts) != len(steps):
        raise ValueError(f"{len(prompts)} conversations have {len(steps)} lists of steps; each needs one")
    return [_parsed(prompt, own) for prompt, own in zip(prompts, steps, strict=True)]


def _parsed(prompt: ConversationLike, steps: Sequence[str]) -> SteppedAnswer | ScoringError:
    try:
        return SteppedAnswer.parse(prompt, steps)
    except ConversationError as error:
        return error


def sequences_of(encoded: Sequence[EncodedSteps | ScoringError]) -> list[list[int]]:
    """The sequences of all answers, end to end."""
    return [sequence for item in encoded if isinstance(item, EncodedSteps) for sequence in item.sequences]


def with_scores(
    encoded: Sequence[EncodedSteps | ScoringError], found: Sequence[float | ScoringError]
) -> list[StepScores | ScoringError]:
    """The scores of encoded answers, in order, from what was found of each of `sequences_of`; errors stay."""
    left = iter(found)
    return [
        item if isinstance(item, ScoringError) else item.scored([next(left) for _ in item.sequences])
        for item in encoded
    ]


def label_rows(rule: StepRule, encode: Callable[[str], Any]) -> tuple[int, int]:
    """The vocabulary rows that a language model says of a step: it is good, it is bad.

    Args:
        rule: "shepherd" or "rlhflow".
        encode: the tokenizer's, without special tokens around the text.

    Raises:
        CheckpointError: the tokenizer has no token of its own for either.
    """
    ids = list(encode(f"{GOOD} {BAD}")) if rule == "shepherd" else [encode(GOOD)[-1], encode(BAD)[-1]]
    if len(ids) != 2 or ids[0] == ids[1]:
        raise CheckpointError(f"the tokenizer makes {ids} of {GOOD!r} and {BAD!r}, not a token of each")
    return ids[0], ids[1]


def _up_to_each(ids: list[int], tag: int | None, answer: SteppedAnswer, text: str) -> list[list[int]]:
    """The ids up to each tag, one for each step."""
    ends = [place for place, token in enumerate(ids) if token == tag]
    if len(ends) != len(answer.steps):
        raise ConversationError(
            f"{len(ends)} tokens {text!r} stand for {len(answer.steps)} steps: a message or a step holds that text"
        )
    return [ids[: end + 1] for end in ends]


def _growing(ids: list[int], steps: Sequence[list[int]], separator: list[int]) -> list[list[int]]:
    """The ids with one more step behind them each time."""
    sequences = []
    for step in steps:
        ids = [*ids, *step, *separator]
        sequences.append(ids)
    return sequences
