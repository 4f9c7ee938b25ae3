"""The actor's class without Ray: what it answers, in one thread, and how it takes wrong input."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from cluster.reward_pool.actor import RewardActor
from cluster.reward_pool.batch import score_answers
from cluster.reward_pool.dispatch import Part
from cluster.reward_pool.encoder import Encoding, RewardEncoder, values_of
from cluster.reward_pool.errors import (
    AsleepError,
    PolicyTokenizerError,
    RewardInputError,
    RewardPoolError,
)
from serve_app.batching.wire import ScoreReply, TokenBatch
from serve_app.reward_model import (
    ConversationError,
    ConversationTooLongError,
    MalformedConversationError,
    ModelSpec,
    RewardModel,
    ScoringError,
)
from serve_app.reward_model.scores import Outputs
from serve_app.reward_model.steps import stepped_answers
from serve_app.reward_model.tokenizer import EncodedConversation
from tests.cluster.reward_pool import policies
from tests.conftest import chat
from tests.reward_model import polar, stepwise

T = TypeVar("T")
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
CHATS = [chat("What is 2 + 2?", "4"), chat("Hi", "Hello"), chat("What is 2 + 2?", "Five, I think.")]


@pytest.fixture(scope="module")
def policy(tiny: RewardModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    policies.chatml(tiny.folder).save_pretrained(folder)
    return folder


def run(work: Callable[[RewardActor], Awaitable[T]], tiny: RewardModel, **encoding: Any) -> T:
    """What `work` returns of an actor that has the embedded model."""

    async def opened() -> T:
        actor = RewardActor(num_threads=torch.get_num_threads())
        await actor.open(ModelSpec(str(tiny.folder), device="cpu", dtype="float32"), Encoding(**encoding))
        return await work(actor)

    return asyncio.run(opened())


def test_answers_in_steps(tmp_path: Path, tiny: RewardModel) -> None:
    """An actor's, and a pool's whose actors are this process."""
    folder = stepwise.KINDS["qwen"].write(tmp_path)
    model = RewardModel.from_pretrained(folder, device="cpu", dtype="float32")
    prompt = [{"role": "user", "content": stepwise.QUESTION}]
    expected = [model.score_steps(prompt, steps) for steps in stepwise.ANSWERS]
    prompts, steps = [prompt, CHATS[0], prompt], [stepwise.ANSWERS[0], ["a"], stepwise.ANSWERS[1]]

    async def asked() -> list[Any]:
        actor = RewardActor(num_threads=torch.get_num_threads())
        await actor.open(ModelSpec(str(folder), device="cpu", dtype="float32"))
        null = await actor.score_steps(prompts, steps, on_error="null")
        return [null, await actor.score_steps([prompt] * 2, stepwise.ANSWERS, aggregate="minimum")]

    assert asyncio.run(asked()) == [[expected[0], None, expected[1]], [min(scores) for scores in expected]]

    class Actors:
        roster = SimpleNamespace(token_budget=40, members=[0, 1])

        async def score(self, batch: TokenBatch, parts: Sequence[Part]) -> list[ScoreReply]:
            return [ScoreReply.of(model.scorer.outputs(batch.lists(part.first, part.stop))) for part in parts]

    encoder = RewardEncoder(ModelSpec(str(folder)), Encoding())
    found = asyncio.run(score_answers(stepped_answers(prompts, steps), encoder, Actors()))  # type: ignore[arg-type]
    assert [list(found[place].values) for place in (0, 2)] == expected  # type: ignore[union-attr]
    assert isinstance(found[1], ConversationError)
    with pytest.raises(ConversationError, match="scores a conversation as a whole"):
        run(lambda actor: actor.score_steps([prompt], [["a"]]), tiny)


def padded(rows: list[list[int]], *, left: bool, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as a trainer pads them, and their mask."""
    width = max(map(len, rows)) + 2
    sequences = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for place, ids in enumerate(rows):
        where = slice(width - len(ids), width) if left else slice(0, len(ids))
        sequences[place, where] = torch.tensor(ids)
        mask[place, where] = 1
    return sequences, mask


def test_scores_are_the_engines_and_computed_in_one_thread(tiny: RewardModel) -> None:
    threads = set()

    async def score(actor: RewardActor) -> list[float | None]:
        scorer = actor._slot.model.scorer
        counted = scorer.outputs

        def counting(sequences: Sequence[Sequence[int]]) -> list[Outputs | ScoringError]:
            threads.add(threading.get_ident())
            return counted(sequences)

        scorer.outputs = counting  # type: ignore[method-assign]
        answers = await asyncio.gather(*(actor.score([chat]) for chat in CHATS * 5))
        return [value for answer in answers for value in answer]

    assert run(score, tiny) == tiny.get_scores(CHATS) * 5
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_texts_and_ids_give_the_conversations_scores(tiny: RewardModel, policy: Path) -> None:
    tokenizer = policies.chatml(tiny.folder)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    expected = tiny.get_scores(CHATS)

    async def ask(actor: RewardActor) -> list[Any]:
        found: list[Any] = [await actor.score_text(texts)]
        for left in (False, True):
            found.append((await actor.forward(*padded(rows, left=left, pad=tokenizer.eos_token_id))).tolist())
        sequences, mask = padded(rows, left=False, pad=tokenizer.eos_token_id)
        data: dict[str, Any] = {
            "sequences": [sequences[:2], sequences],
            "attention_mask": [mask[:2], mask],
            "pad_sequence": [True] * 2,
        }
        found += [tensor.tolist() for tensor in await actor.execute_batch("forward", data, 1, 2)]
        packed = torch.tensor([[token for row in rows for token in row]])
        found.append((await actor.forward(packed, packed_seq_lens=[len(row) for row in rows])).tolist())
        await actor.empty_cache()
        return found

    assert run(ask, tiny, policy_tokenizer=str(policy)) == [expected] * 5


def test_the_result_is_a_float32_tensor_of_the_batch(tiny: RewardModel, policy: Path) -> None:
    async def ask(actor: RewardActor) -> tuple[torch.Tensor, list[Any], list[Any]]:
        empty = torch.empty(0, 4, dtype=torch.int64)
        return await actor.forward(empty, empty), await actor.score([]), await actor.execute_batch("score", {}, 0, 4)

    rewards, scores, batch = run(ask, tiny, policy_tokenizer=str(policy))
    assert rewards.shape == (0,)
    assert rewards.dtype == torch.float32
    assert scores == batch == []


def test_wrong_calls_are_typed_errors(tiny: RewardModel, policy: Path) -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    calls: list[tuple[type[Exception], str, Callable[[RewardActor], Awaitable[Any]]]] = [
        (RewardInputError, "put it into a list", lambda actor: actor.score(CHATS[0])),
        (RewardInputError, "list of conversations", lambda actor: actor.score("Hi")),  # type: ignore[arg-type]
        (RewardInputError, "list of texts", lambda actor: actor.score_text("Hi")),
        (RewardInputError, "on_error", lambda actor: actor.score(CHATS, on_error="skip")),  # type: ignore[arg-type]
        (RewardInputError, "float32", lambda actor: actor.forward(ids.float())),
        (RewardInputError, "no method '_open'", lambda actor: actor.execute_batch("_open", {"a": [1]}, 0, 1)),
        (RewardInputError, "differ in length", lambda actor: actor.execute_batch("score", {"a": [1], "b": []}, 0, 1)),
        (ConversationError, "item 0: the text", lambda actor: actor.forward(ids)),
        (ConversationError, "item 1: .*ChatML", lambda actor: actor.score_text([CHATML + "Yo", "plain"])),
        (ConversationError, "item 1: .*no response", lambda actor: actor.score_text([CHATML, CHATML[:20]])),
    ]

    async def ask(actor: RewardActor) -> None:
        for error, message, call in calls:
            with pytest.raises(error, match=message):
                await call(actor)

    run(ask, tiny, policy_tokenizer=str(policy))


def test_one_bad_item_is_null_on_request_and_named_otherwise(tiny: RewardModel) -> None:
    good = tiny.get_scores(CHATS[:1])[0]
    batch = [CHATS[0], [{"role": "user"}], chat("Hi", "yes " * 200), CHATS[0]]

    async def ask(actor: RewardActor) -> tuple[list[float | None], int | None, str]:
        values = await actor.score(batch, on_error="null")
        with pytest.raises(ScoringError, match="item 1: message 0 lacks") as caught:
            await actor.score(batch)
        with pytest.raises(ConversationTooLongError, match="item 1: .*the limit is 50"):
            await actor.score(batch[::2])
        with pytest.raises(PolicyTokenizerError, match="declare policy_tokenizer"):
            await actor.forward(torch.ones(1, 2, dtype=torch.int64))
        return values, caught.value.index, str(caught.value)

    values, index, _ = run(ask, tiny, max_tokens=50)
    assert values == [good, None, None, good]
    assert index == 1


def test_sleep_waits_for_what_was_begun(tiny: RewardModel) -> None:
    expected = tiny.get_scores(CHATS)

    async def ask(actor: RewardActor) -> None:
        begun = asyncio.create_task(actor.score(CHATS))
        while not actor._lock._num_shared:
            await asyncio.sleep(0)
        await actor.sleep()
        assert await begun == expected
        assert (await actor.status()).is_asleep
        with pytest.raises(AsleepError):
            await actor.score(CHATS)
        await actor.wake()
        assert await actor.score(CHATS) == expected

    run(ask, tiny)


def test_an_actor_without_a_model_says_so() -> None:
    with pytest.raises(RewardPoolError, match="no model was loaded"):
        asyncio.run(RewardActor().score(CHATS))


def test_encoding_is_checked_at_once(tiny: RewardModel) -> None:
    for wrong in ({"truncation": "middle"}, {"max_tokens": 1}):
        with pytest.raises(RewardInputError, match=next(iter(wrong))):
            Encoding(**wrong)
    with pytest.raises(PolicyTokenizerError, match="/no/such"):
        run(lambda actor: actor.score([]), tiny, policy_tokenizer="/no/such")


def test_thoughts_are_left_out_where_asked_for() -> None:
    thoughtful = chat("Hi", "<think>\nWell <im>.\n</think>\n\nHello")
    stripped = RewardEncoder(ModelSpec(), Encoding(strip_thinking=True))
    kept = RewardEncoder(ModelSpec(), Encoding())
    bare = kept.encode(kept.conversations([chat("Hi", "Hello")]))
    assert stripped.encode(stripped.conversations([thoughtful])) == bare
    assert kept.encode(kept.conversations([thoughtful])) != bare
    users = chat("<think>a</think>Hi", "Hello")
    assert stripped.encode(stripped.conversations([users])) == kept.encode(kept.conversations([users]))


def test_a_reference_and_a_template_reach_the_token_ids(tiny: RewardModel, tmp_path: Path) -> None:
    judged = {"messages": chat("Capital?", "<think>a</think>Beijing."), "reference": "Beijing."}
    folder = polar.write(tmp_path)
    model = RewardModel.from_pretrained(folder, device="cpu", dtype="float32")
    stripped = RewardEncoder(ModelSpec(str(folder)), Encoding(strip_thinking=True))
    (item,) = stripped.encode(stripped.conversations([judged]))
    assert isinstance(item, EncodedConversation)
    assert item.token_ids == model.tokenizer.encode(judged | {"messages": chat("Capital?", "Beijing.")})
    reader = RewardEncoder(ModelSpec(chat_template="{{ messages[0]['content'] }}"), Encoding())
    (item,) = reader.encode(reader.conversations([chat("Hi", "Hello")]))
    assert (
        item
        == RewardModel(
            tiny.scorer.decoder, tiny.folder, chat_template="{{ messages[0]['content'] }}"
        ).tokenizer.encode_batch([chat("Hi", "Hello")])[0]
    )


def test_what_looks_wrong_is_logged_once_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    odd = [chat("Hi", "Hello"), chat("Hi"), chat("Hi")]
    lenient, strict = RewardEncoder(ModelSpec(), Encoding()), RewardEncoder(ModelSpec(), Encoding(strict=True))
    for _ in range(2):
        assert all(isinstance(item, EncodedConversation) for item in lenient.encode(lenient.conversations(odd)))
    assert [record.message.count("conversation 1 of a batch: last_not_assistant") for record in caplog.records] == [1]
    first, *others = strict.encode(strict.conversations(odd))
    assert isinstance(first, EncodedConversation)
    assert all(isinstance(item, MalformedConversationError) for item in others)


def test_values_name_the_first_item_without_a_score() -> None:
    errors: list[float | ScoringError] = [1.0, ConversationError("bad"), ConversationError("worse")]
    assert values_of(errors, "null") == [1.0, None, None]
    with pytest.raises(ConversationError, match="item 1: bad"):
        values_of(errors, "raise")


def test_an_actor_spreads_the_layers_over_the_gpus_that_ray_gave_it(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.reward_pool.actor.gpus_of_actor", lambda: 2.0)

    async def scored(actor: RewardActor) -> tuple[int, list[float | None]]:
        return len(actor._slot.model.devices), await actor.score(CHATS)

    num_devices, scores = run(scored, tiny)
    assert num_devices == 2
    assert scores == tiny.get_scores(CHATS)
