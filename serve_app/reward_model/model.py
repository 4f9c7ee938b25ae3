"""RewardModel, the engine's front door: conversations or token ids in, one score each out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray

from serve_app.reward_model.architecture import DecoderConfig, Normalization, Quantization
from serve_app.reward_model.chat_template import template_text
from serve_app.reward_model.checkpoint import load_weights, read_config
from serve_app.reward_model.conversation import Conversation, ConversationLike, Message
from serve_app.reward_model.decoder import Decoder
from serve_app.reward_model.errors import ConversationError, DeviceError, ScoringError
from serve_app.reward_model.invariance import find_variance, widened
from serve_app.reward_model.linear import check_sizes, whole_sums
from serve_app.reward_model.model_files import fingerprint, resolve, tokenizer_folder
from serve_app.reward_model.prefix_cache import CacheBytes
from serve_app.reward_model.prefixes import in_tree_order
from serve_app.reward_model.scorer import SequenceScorer
from serve_app.reward_model.scores import Aggregate, Score, StepScores, ranks
from serve_app.reward_model.steps import StepEncoder, sequences_of, stepped_answers, with_scores
from serve_app.reward_model.token_budget import CPU_TOKEN_BUDGET
from serve_app.reward_model.tokenizer import EncodedConversation, Tokenizer, Truncation
from serve_app.reward_model.turn_list import TurnList

logger = logging.getLogger(__name__)
S = TypeVar("S")
T = TypeVar("T")

ENCODED_AHEAD = 256
"""Conversations that are tokenised while those before them are scored, at first; see `_largest_slice`."""
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


class RewardModel:
    """A reward model on one device, or its layers spread over several. Calls from several threads take turns.

    A conversation's score depends on the model, the dtype, the kind of device and the conversation alone: batch size,
    neighbours, order and number of threads change no bit of it. Scores are raw logits in float32. Tokens that several
    sequences of a call begin with are computed once.
    """

    def __init__(
        self,
        decoder: Decoder,
        folder: Path,
        *,
        token_budget: int | Literal["auto"] = "auto",
        memory_share: float = 1.0,
        prefix_cache_bytes: CacheBytes = 0,
        chat_template: str | None = None,
        base_model: str | None = None,
    ) -> None:
        self.config = decoder.config
        self.device = decoder.device
        self.devices = decoder.devices
        self.dtype = decoder.dtype
        self.folder = folder
        self.chat_template = chat_template
        self.base_model = base_model
        self.scorer = SequenceScorer(
            decoder, token_budget=token_budget, memory_share=memory_share, prefix_cache_bytes=prefix_cache_bytes
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        token_budget: int | Literal["auto"] = "auto",
        memory_share: float = 1.0,
        prefix_cache_bytes: CacheBytes = 0,
        quantization: Quantization = "none",
        invariant: bool = True,
        chat_template: str | Path | None = None,
        base_model: str | None = None,
        head: str | None = None,
        normalize: bool = False,
    ) -> RewardModel:
        """Load a reward model. No code from a model's repository is ever run.

        Args:
            model: `"tiny"`, a local folder, or a Hugging Face id such as `"internlm/internlm2-1_8b-reward"`.
            revision: branch, tag or commit of a Hugging Face id.
            device: `"auto"` is CUDA where there is one, else the CPU. Several share the layers, for models that fit no
                single card: `"cuda:0,cuda:1"`. The scores have the bits of one card.
            dtype: `"auto"` is the checkpoint's on CUDA; on CPU bfloat16 where the processor has it, else float32.
            token_budget: tokens in one forward pass; a longer sequence runs alone. `"auto"` is 4096 on CPU; on CUDA
                what the free memory holds, as a trial pass measures it.
            memory_share: of each card, where processes share it: the budget leaves the rest to them, also while they
                have not taken it yet.
            prefix_cache_bytes: memory on the device for keys and values of recent prefixes, which later calls need not
                read again; 0 keeps none. `"auto"` is 256 MiB on CPU, and on CUDA a sixteenth of what the weights leave
                free.
            quantization: `"fp8"` multiplies 8-bit floats, for NVIDIA GPUs of the Hopper generation or newer. Scores
                then drift: the README says how far.
            invariant: False lets CUDA choose kernels by batch size: scores may then change in their last bits with
                the batch. CPUs lose nothing by the contract and ignore it.
            chat_template: a Jinja template in place of the checkpoint's, or the file of one: for checkpoints that have
                none. It is part of the fingerprint.
            base_model: for an adapter, the folder or id of the model it changes, in place of the one it names.
            head: `"logit:ID"` scores with the logit of vocabulary row ID at the last token, for language models that
                were trained to give their reward there, such as Llama-3.1-Nemotron-70B-Reward-HF (`"logit:0"`).
                `"steps:RULE"` says that it is a process reward model, for `score_steps`: `"steps:shepherd"` and
                `"steps:rlhflow"` of language models, `"steps:trl"` of a token classification with two labels
                (`"steps:trl:SEPARATOR"` where the separator of its steps is no newline). No file of a checkpoint says
                so, therefore it is never guessed.
            normalize: score `(raw - mean) / std` with the checkpoint's own figures, as OpenRLHF does where its reward
                normalisation is on: see `normalization`.

        Raises:
            DeviceError: the device is not there or has not the memory for the prefix cache, or several are of different
                kinds or more than layers.
            CheckpointError: files are missing or broken.
            UnsupportedArchitectureError: the model's architecture or an option of it is not supported.
            WeightError: a weight is missing, surplus or misshapen.
        """
        template = None if chat_template is None else template_text(chat_template)
        folder = resolve(model, revision)
        config = read_config(folder, base_model=base_model, head=head, normalize=normalize)
        check_sizes(quantization, config)
        targets = usable_devices(device)
        weights = load_weights(
            folder, config, device=targets, dtype=resolve_dtype(dtype, config, targets[0]), base_model=base_model
        )
        decoder = Decoder(config, weights, quantization=quantization, invariant=invariant)
        if invariant:
            fit(decoder)
        return cls(
            decoder,
            folder,
            token_budget=token_budget,
            memory_share=memory_share,
            prefix_cache_bytes=prefix_cache_bytes,
            chat_template=template,
            base_model=base_model,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's chat template and vocabulary, read on first use: token ids can be scored without it."""
        folder = tokenizer_folder(self.folder, base_model=self.base_model)
        return Tokenizer.from_pretrained(folder, config=self.config, chat_template=self.chat_template)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides a score, but the device and the dtype: see `model_files.fingerprint`."""
        return fingerprint(
            self.folder,
            chat_template=self.chat_template,
            base_model=self.base_model,
            head=self.config.head.named,
            normalize=self.config.head.normalize,
        )

    @property
    def processors(self) -> tuple[str, ...]:
        """The kind of processor that scores are computed on: on another one they may differ in their last bits."""
        return (self.scorer.processor,)

    @property
    def normalization(self) -> Normalization | None:
        """Mean and standard deviation that the trainer saved beside the weights. Scores are raw all the same, unless
        the model was loaded with `normalize`.
        """
        return self.config.head.normalization

    def get_score(self, conversation: ConversationLike) -> float:
        """The score of one conversation. Raises a `ScoringError` where it has none."""
        return self.get_scores([conversation])[0]

    def get_scores(self, conversations: Sequence[ConversationLike]) -> list[float]:
        """The scores of conversations in input order: a list for any number of them, `[]` for none."""
        return [score.value for score in self.score(conversations)]

    @overload
    def compare(self, first: ConversationLike, second: ConversationLike) -> bool: ...
    @overload
    def compare(
        self, first: ConversationLike, second: ConversationLike, *, return_scores: Literal[True]
    ) -> tuple[bool, list[float]]: ...
    def compare(
        self, first: ConversationLike, second: ConversationLike, *, return_scores: bool = False
    ) -> bool | tuple[bool, list[float]]:
        """Whether `first` scores strictly higher than `second`; with `return_scores` also the two scores."""
        scores = self.get_scores([first, second])
        better = scores[0] > scores[1]
        return (better, scores) if return_scores else better

    @overload
    def rank(self, conversations: Sequence[ConversationLike]) -> list[int]: ...
    @overload
    def rank(
        self, conversations: Sequence[ConversationLike], *, return_scores: Literal[True]
    ) -> tuple[list[int], list[float]]: ...
    def rank(
        self, conversations: Sequence[ConversationLike], *, return_scores: bool = False
    ) -> list[int] | tuple[list[int], list[float]]:
        """The 0-based rank of each conversation, 0 the best, ties in input order; `return_scores` adds the scores."""
        scores = self.get_scores(conversations)
        places = ranks(scores)
        return (places, scores) if return_scores else places

    def score(
        self,
        conversations: Sequence[ConversationLike],
        *,
        truncation: Truncation = "error",
        max_tokens: int | None = None,
        strict: bool = False,
    ) -> list[Score]:
        """Score conversations, in input order.

        Args:
            conversations: each a list of messages with a role and a content; for POLAR's models a `Conversation` with
                a `reference`, or a mapping with `messages` and `reference`.
            truncation: what to do with one over the limit: see `Tokenizer.encode_batch`.
            max_tokens: a limit below the model's own.
            strict: raise a `MalformedConversationError` for one whose score would carry warnings.

        Raises:
            ScoringError: the first conversation that cannot be scored, its place in `error.index`. To score the
                others all the same, use `outcomes`.
        """
        return _all_or_raise(self.outcomes(conversations, truncation=truncation, max_tokens=max_tokens, strict=strict))

    def outcomes(
        self,
        conversations: Sequence[ConversationLike],
        *,
        truncation: Truncation = "error",
        max_tokens: int | None = None,
        strict: bool = False,
    ) -> list[Score | ScoringError]:
        """Like `score`, but a conversation that cannot be scored yields its error and the others their scores."""
        parsed = [_parsed(conversation) for conversation in _listed(conversations)]
        # Those that begin with the same messages are encoded and scored in one slice, so that these are computed once.
        order = in_tree_order([_prompt_of(item) for item in parsed])
        outcomes: dict[int, Score | ScoringError] = {}
        places = iter(order)
        encode = partial(self.tokenizer.encode_batch, truncation=truncation, max_tokens=max_tokens, strict=strict)
        for encoded in _encoded_ahead(encode, [parsed[place] for place in order], self._largest_slice):
            outcomes |= {next(places): outcome for outcome in self._score_encoded(encoded)}
        return _with_index([outcomes[place] for place in range(len(parsed))])

    def score_turns(
        self,
        conversation: ConversationLike,
        *,
        truncation: Truncation = "error",
        max_tokens: int | None = None,
        strict: bool = False,
    ) -> list[Score]:
        """The score after each message of the assistant, in order, for little more time than the last one takes.

        Each has the bits that `score` gives the conversation cut behind that message. The options are those of `score`
        and apply to each turn: with `truncation` "left", what turns have in common is computed again where oldest turns
        are dropped.

        Raises:
            ConversationError: no message is the assistant's.
            ScoringError: the first turn that cannot be scored, its place among the turns in `error.index`. To get the
                others all the same, use `turn_outcomes`.
        """
        turns = Conversation.parse(conversation).turns()
        return self.score(turns, truncation=truncation, max_tokens=max_tokens, strict=strict)

    def turn_outcomes(
        self,
        conversations: Sequence[ConversationLike],
        *,
        truncation: Truncation = "error",
        max_tokens: int | None = None,
        strict: bool = False,
    ) -> list[list[Score | ScoringError] | ScoringError]:
        """Like `score_turns`, for a list: the outcome of each turn of each conversation, in input order.

        A conversation that is malformed or has no message of the assistant's yields one error.
        """
        turns = TurnList.of([_parsed(conversation) for conversation in _listed(conversations)])
        return turns.outcomes(self.outcomes(turns.flat, truncation=truncation, max_tokens=max_tokens, strict=strict))

    @overload
    def score_steps(
        self, conversation: ConversationLike, steps: Sequence[str], *, max_tokens: int | None = ..., strict: bool = ...
    ) -> list[float]: ...
    @overload
    def score_steps(
        self,
        conversation: ConversationLike,
        steps: Sequence[str],
        *,
        aggregate: Aggregate,
        max_tokens: int | None = ...,
        strict: bool = ...,
    ) -> float: ...
    def score_steps(
        self,
        conversation: ConversationLike,
        steps: Sequence[str],
        *,
        aggregate: Aggregate | None = None,
        max_tokens: int | None = None,
        strict: bool = False,
    ) -> list[float] | float:
        """A process reward model's score of each step of an answer: the probability that it is good.

        Args:
            conversation: the messages before the answer.
            steps: the answer's steps, in order; `steps.py` says how each kind of model reads them.
            aggregate: one number in place of the list: the `"product"` of the scores, their `"minimum"` or the
                `"last"` one.
            max_tokens: a limit below the model's own. Nothing is shortened: a longer answer is an error.
            strict: as `score` has it.

        Raises:
            ConversationError: the model scores no steps, the conversation is malformed, or there are no steps.
            ScoringError: the first step that cannot be scored, its place in `error.index`.
        """
        (outcome,) = self.step_outcomes([conversation], [steps], max_tokens=max_tokens, strict=strict)
        if isinstance(outcome, ScoringError):
            raise outcome
        return list(outcome.values) if aggregate is None else outcome.aggregate(aggregate)

    def step_outcomes(
        self,
        conversations: Sequence[ConversationLike],
        steps: Sequence[Sequence[str]],
        *,
        max_tokens: int | None = None,
        strict: bool = False,
    ) -> list[StepScores | ScoringError]:
        """Like `score_steps`, for a list: the scores of each answer's steps, in order, or the error that it alone has.

        What answers begin with alike, as those of one prompt and the branches of a search, is computed once.
        """
        answers = stepped_answers(_listed(conversations), steps)
        outcomes: list[StepScores | ScoringError] = []
        encode = partial(self.step_encoder.encode_batch, max_tokens=max_tokens, strict=strict)
        for encoded in _encoded_ahead(encode, answers, self._largest_slice):
            outcomes += with_scores(encoded, self.scorer.score(sequences_of(encoded)))
        return outcomes

    @cached_property
    def step_encoder(self) -> StepEncoder:
        """What makes token ids of answers in steps. Raises `ConversationError` where the model scores no steps."""
        return StepEncoder.of(self.config, self.tokenizer)

    def score_token_ids(self, sequences: Sequence[Sequence[int] | NDArray[np.integer]]) -> NDArray[np.float32]:
        """Score sequences of token ids as they are: float32 [len(sequences)].

        Each is read at its last token; for a `*ForSequenceClassification` whose configuration names a padding token,
        at its last token that is no padding: see `DecoderConfig.num_read`.

        Raises:
            TokenIdsError: one is empty, longer than the model's limit or holds an id outside the vocabulary.
        """
        lists = [sequence.tolist() if isinstance(sequence, np.ndarray) else list(sequence) for sequence in sequences]
        return np.array(_all_or_raise(_with_index(self.scorer.score(lists))), dtype=np.float32)

    @property
    def _largest_slice(self) -> int:
        """Conversations that are tokenised at once, so that a card's passes are full and wait for none."""
        return ENCODED_AHEAD * max(1, self.scorer.token_budget // CPU_TOKEN_BUDGET)

    def _score_encoded(self, encoded: list[EncodedConversation | ScoringError]) -> list[Score | ScoringError]:
        """The score of each encoded conversation, in order; what could not be encoded keeps its error."""
        able = [item.token_ids for item in encoded if isinstance(item, EncodedConversation)]
        outputs = iter(self.scorer.outputs(able))
        names = self.config.head.attributes
        return [item if isinstance(item, ScoringError) else item.scored(next(outputs), names) for item in encoded]


def _encoded_ahead(encode: Callable[[Sequence[S]], T], items: Sequence[S], largest: int) -> Iterator[T]:
    """Items encoded in slices of `ENCODED_AHEAD`, then of twice as many each, up to `largest`; each slice is encoded on
    a thread while the one before it is scored.
    """
    slices, size, at = [], ENCODED_AHEAD, 0
    while at < len(items):
        slices.append(items[at : at + size])
        at, size = at + size, min(2 * size, largest)
    if len(slices) < 2:
        yield from map(encode, slices)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as pool:
        pending = pool.submit(encode, slices[0])
        for following in slices[1:]:
            encoded = pending.result()
            pending = pool.submit(encode, following)
            yield encoded
        yield pending.result()


def fit(decoder: Decoder) -> None:
    """Probe whether the decoder's products keep a row's bits on this machine, and say so in a warning where they do
    not; where they do on CUDA, let them run in all numbers of rows that have the same bits.
    """
    config = decoder.config
    find = partial(
        find_variance,
        decoder.row_rule,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        attend=decoder.attend,
    )
    like = torch.empty(0, device=decoder.device)
    kinds = [(decoder.head.linears, like), (decoder.linears, like.to(decoder.dtype))]
    with whole_sums(decoder.device):
        for linears, kind in kinds:
            if linears and (variance := find(linears, kind)):
                logger.warning("on this machine %s changes its last bits with the batch or the threads", variance)
                return
        if decoder.device.type == "cuda":
            products = [(linear, kind) for linears, kind in kinds for linear in linears]
            decoder.run_by(widened(decoder.row_rule, products))


def _listed(conversations: Sequence[ConversationLike]) -> Sequence[ConversationLike]:
    if isinstance(conversations, Conversation | str):
        raise TypeError(f"a list of conversations is wanted, not one {type(conversations).__name__}")
    return conversations


def _parsed(conversation: ConversationLike) -> Conversation | ConversationError:
    try:
        return Conversation.parse(conversation)
    except ConversationError as error:
        return error


def _prompt_of(parsed: Conversation | ConversationError) -> tuple[Message, ...]:
    return parsed.prompt if isinstance(parsed, Conversation) else ()


def _with_index(results: list[T | ScoringError]) -> list[T | ScoringError]:
    """Tell each error of a list its place."""
    for place, result in enumerate(results):
        if isinstance(result, ScoringError) and len(results) > 1:
            result.index = place
    return results


def _all_or_raise(results: list[T | ScoringError]) -> list[T]:
    for result in results:
        if isinstance(result, ScoringError):
            raise result
    return [result for result in results if not isinstance(result, ScoringError)]


def resolve_device(device: str | torch.device) -> torch.device:
    """`device` itself, or for `"auto"` CUDA where there is one, else the CPU; of several the first.

    Raises:
        DeviceError: it names no device of these kinds, or devices of two kinds.
    """
    return _named_devices(device)[0]


def usable_devices(device: str | torch.device) -> tuple[torch.device, ...]:
    """The devices named, if this machine has them. Raises `DeviceError`."""
    devices = _named_devices(device)
    for one in devices:
        _check_is_there(one)
    if devices[0].type == "cuda" and len(devices) > 1:
        if len(set(devices)) < len(devices):
            raise DeviceError(f"device is {str(device)!r}: the layers are spread over different cards, each named once")
        if len(names := {torch.cuda.get_device_name(one) for one in devices}) > 1:
            raise DeviceError(
                f"the cards that share a model are of one kind, or bits would differ, not {sorted(names)}"
            )
    return devices


def _named_devices(device: str | torch.device) -> tuple[torch.device, ...]:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = tuple(torch.device(name.strip()) for name in str(device).split(","))
    except RuntimeError:
        found = ()
    kinds = {one.type for one in found}
    if len(kinds) != 1 or not kinds <= {"cpu", "cuda"}:
        raise DeviceError(
            f"device is 'auto', 'cpu', 'cuda' or one of several as 'cuda:1', several as 'cuda:0,cuda:1', not "
            f"{str(device)!r}"
        )
    return found


def _check_is_there(device: torch.device) -> None:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        has = f"this machine has {num_gpus} GPUs" if num_gpus else "PyTorch finds no GPU on this machine"
        raise DeviceError(f"device is {str(device)!r}, but {has}; use device='cpu' or 'auto', or check the driver")


def resolve_dtype(dtype: str | torch.dtype, config: DecoderConfig, device: torch.device) -> torch.dtype:
    """`dtype` as a torch dtype; `"auto"` is the checkpoint's on CUDA, and what the processor does fast on CPU."""
    if isinstance(dtype, str):
        if dtype == "auto":
            dtype = config.dtype if device.type == "cuda" else cpu_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"dtype is 'auto' or one of {sorted(DTYPES)}, not {dtype!r}")
        dtype = DTYPES[dtype]
    if dtype == torch.float16 and device.type == "cpu":
        warnings.warn(
            "float16 on a CPU is about 15 times slower than bfloat16; use dtype='auto' unless you mean it",
            stacklevel=3,
        )
    return dtype


def cpu_dtype() -> str:
    """bfloat16 where the processor multiplies it natively: AVX512-BF16 or AMX on x86, BF16 on Arm."""
    cpu_info = Path("/proc/cpuinfo")
    flags = cpu_info.read_text().split() if cpu_info.is_file() else []
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "float32"
