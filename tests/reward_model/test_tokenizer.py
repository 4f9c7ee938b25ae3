"""Token ids: equal to the original's, one BOS, the reward token last, and no special token out of typed text."""

from __future__ import annotations

import copy
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as BackendTokenizer
from transformers import PreTrainedTokenizerFast

from serve_app.reward_model import (
    CheckpointError,
    ConversationError,
    ConversationTooLongError,
    RewardModel,
    tiny,
)
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.markup import MARK
from serve_app.reward_model.tokenizer import EncodedConversation, Tokenizer
from tests.conftest import chat

BOS = 1
SPECIALS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "<|reward|>": 92527,
    "<|plugin|>": 92538,
    "<|interpreter|>": 92539,
    "<|action_end|>": 92540,
    "<|action_start|>": 92541,
    "<|im_end|>": 92542,
    "<|im_start|>": 92543,
}


@pytest.fixture(scope="module", params=["tiny", "golden_fp32"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """The embedded model's, and InternLM2-Reward's where it is there."""
    model: RewardModel = request.getfixturevalue(request.param)
    return model.tokenizer


def special(tokenizer: Tokenizer, text: str) -> Any:
    """The id of a special token; None in a vocabulary that lacks it."""
    return tokenizer._backend.token_to_id(text)


def test_the_special_tokens_have_the_originals_ids(golden_fp32: RewardModel) -> None:
    assert {text: special(golden_fp32.tokenizer, text) for text in SPECIALS} == SPECIALS


def test_ids_equal_the_originals_on_every_golden(golden_fp32: RewardModel, goldens: list[dict[str, Any]]) -> None:
    encoded = golden_fp32.tokenizer.encode_batch([golden["messages"] for golden in goldens])
    ours = [item.token_ids for item in encoded if isinstance(item, EncodedConversation)]
    assert ours == [golden["input_ids"] for golden in goldens]


def test_exactly_one_bos_and_one_reward_token_at_the_ends(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(chat("What is 2 + 2?", "4"))
    assert (ids[0], ids.count(BOS)) == (BOS, 1)
    reward = special(tokenizer, "<|reward|>")
    assert (ids[-1], ids.count(reward)) == (reward, 1)


@pytest.mark.parametrize("text", sorted(SPECIALS))
@pytest.mark.parametrize("around", ["{}", "a {} b", "a{}b", "{0}{0}", "\n{}\n"])
def test_typed_special_tokens_stay_text(tokenizer: Tokenizer, text: str, around: str) -> None:
    content = around.format(text)
    ids = tokenizer.encode(chat(content, content))
    specials = {special(tokenizer, other) for other in SPECIALS}
    marks = ["<s>", *["<|im_start|>", "<|im_end|>"] * 2, "<|reward|>"]
    assert [token for token in ids if token in specials] == [special(tokenizer, mark) for mark in marks]
    turn = "<|im_start|>{}\n" + content + "<|im_end|>\n"
    assert tokenizer._backend.decode(ids, skip_special_tokens=False) == (
        "<s>" + turn.format("user") + turn.format("assistant") + "<|reward|>"
    )


@pytest.mark.parametrize("text", ["<|reward|>", "<|im_end|>", "<|im_start|>", "<|plugin|>"])
def test_typed_markup_has_the_ids_of_its_characters(tokenizer: Tokenizer, text: str) -> None:
    content = f"so {text} it\n{text}"
    assert tokenizer.encode(chat(content)) == chat_ids(tokenizer, [("user", content)])


def test_a_vocabulary_that_cannot_keep_typed_text_apart_refuses() -> None:
    backend = BackendTokenizer(models.WordLevel({"a": 0, "<end>": 1, "?": 2}, unk_token="?"))
    backend.add_special_tokens([AddedToken("<end>", normalized=False, special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}<end>"
    with pytest.raises(ConversationError, match="cannot keep as text"):
        Tokenizer(fast, reward_token_id=None, max_tokens=64).encode(chat("<end>"))


def chat_ids(tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> list[int]:
    """InternLM2's template piece by piece: special tokens by id, all else encoded with special tokens turned off."""
    plain = BackendTokenizer.from_str(tokenizer._backend.to_str())
    plain.encode_special_tokens = True
    ids = [BOS]
    for role, content in turns:
        ids.append(special(tokenizer, "<|im_start|>"))
        ids += plain.encode(f"{role}\n{content}", add_special_tokens=False).ids
        ids.append(special(tokenizer, "<|im_end|>"))
        ids += plain.encode("\n", add_special_tokens=False).ids
    return [*ids, special(tokenizer, "<|reward|>")]


def test_a_special_token_in_a_role_stays_text(tokenizer: Tokenizer) -> None:
    role = "user<|im_end|>"
    ids = tokenizer.encode([{"role": role, "content": "hi"}])
    assert ids == chat_ids(tokenizer, [(role, "hi")])


@pytest.mark.parametrize(
    "content", [MARK, f"{MARK}0", f"<|im_end|>{MARK}0", f"{MARK}1<|reward|>x", f"x{MARK}{MARK}0<|reward|>"]
)
def test_the_marker_character_itself_comes_through(tokenizer: Tokenizer, content: str) -> None:
    assert tokenizer.encode(chat(content)) == chat_ids(tokenizer, [("user", content)])


def test_a_special_token_sought_after_normalization_stays_text() -> None:
    backend = BackendTokenizer(models.BPE({chr(code): code - 32 for code in range(32, 127)}, []))
    backend.add_special_tokens([AddedToken("<end>", normalized=True, special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"
    ids = Tokenizer(fast, reward_token_id=None, max_tokens=64).encode(chat("a<end>b"))
    end = backend.token_to_id("<end>")
    assert [token == end for token in ids] == [False] * 7 + [True]


def test_one_bad_conversation_leaves_its_neighbours(tokenizer: Tokenizer) -> None:
    good = chat("hi", "yes")
    first, bad, last = tokenizer.encode_batch([good, [], good])
    assert isinstance(bad, ConversationError)
    assert first == last == EncodedConversation(tokenizer.encode(good))


class TestTruncation:
    LONG = chat("one " * 30, "two " * 30, "three " * 30, "four " * 30)

    def test_too_long_is_an_error_that_counts(self, tokenizer: Tokenizer) -> None:
        num_tokens = len(tokenizer.encode(self.LONG))
        with pytest.raises(ConversationTooLongError, match=f"has {num_tokens} tokens, the limit is 50") as caught:
            tokenizer.encode(self.LONG, max_tokens=50)
        assert (caught.value.num_tokens, caught.value.max_tokens) == (num_tokens, 50)

    def test_the_models_own_limit_holds(self, tmp_path: Path) -> None:
        tiny.write(tmp_path)
        config = replace(DecoderConfig.from_folder(tmp_path), max_positions=20)
        short = Tokenizer.from_pretrained(tmp_path, config=config)
        with pytest.raises(ConversationTooLongError, match="the limit is 20"):
            short.encode(self.LONG, max_tokens=50)

    def test_right_keeps_the_start_and_the_reward_token(self, tokenizer: Tokenizer) -> None:
        full = tokenizer.encode(self.LONG)
        assert tokenizer.encode(self.LONG, truncation="right", max_tokens=50) == [*full[:49], full[-1]]

    def test_left_drops_whole_turns_first(self, tokenizer: Tokenizer) -> None:
        kept = tokenizer.encode(self.LONG[2:])
        assert tokenizer.encode(self.LONG, truncation="left", max_tokens=len(kept) + 3) == kept

    def test_left_keeps_a_system_message_while_turns_are_dropped(self, tokenizer: Tokenizer) -> None:
        system = {"role": "system", "content": "Be kind."}
        kept = tokenizer.encode([system, *self.LONG[2:]])
        assert tokenizer.encode([system, *self.LONG], truncation="left", max_tokens=len(kept)) == kept

    def test_left_then_drops_the_oldest_prompt_tokens_and_keeps_the_response(self, tokenizer: Tokenizer) -> None:
        full = tokenizer.encode(self.LONG[2:])
        ids = tokenizer.encode(self.LONG, truncation="left", max_tokens=len(full) - 10)
        assert ids == [BOS, *full[11:]]

    def test_left_never_cuts_the_response(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(ConversationTooLongError, match="does not cut it"):
            tokenizer.encode(self.LONG, truncation="left", max_tokens=20)

    @pytest.mark.parametrize(
        "condition",
        [
            "messages[-1]['role'] != 'assistant'",
            "messages|length != 2 or messages[0]['role'] != 'user'",
            "messages|length % 2",
        ],
    )
    def test_left_needs_no_template_that_renders_a_prompt_alone(self, tokenizer: Tokenizer, condition: str) -> None:
        """Templates that want an assistant's message last, or exactly two messages: the ids are those of others."""
        inner = tokenizer._tokenizer.chat_template
        long = chat("a <|im_end|> word or two " * 30, "four <|im_end|>")
        expected = tokenizer.encode(long, truncation="left", max_tokens=60)
        strict = copy.copy(tokenizer)
        strict._tokenizer = copy.deepcopy(tokenizer._tokenizer)
        strict._tokenizer.chat_template = f"{{% if {condition} %}}{{{{ raise_exception('no') }}}}{{% endif %}}{inner}"
        ids = strict.encode(long, truncation="left", max_tokens=60)
        assert len(ids) == 60
        assert ids == expected

    def test_left_is_quick_with_many_turns(self, tokenizer: Tokenizer) -> None:
        turns = chat(*["a word or two"] * 2001)
        started = time.thread_time()
        ids = tokenizer.encode(turns, truncation="left", max_tokens=300)
        assert time.thread_time() - started < 10  # quadratic time would be minutes
        assert 280 < len(ids) <= 300

    def test_truncation_is_told(self, tokenizer: Tokenizer) -> None:
        max_tokens = len(tokenizer.encode(self.LONG[2:])) + 3
        cut, whole = tokenizer.encode_batch([self.LONG, chat("a")], truncation="left", max_tokens=max_tokens)
        assert isinstance(cut, EncodedConversation)
        assert isinstance(whole, EncodedConversation)
        assert (cut.truncated, whole.truncated) == (True, False)

    def test_unknown_truncation_is_refused(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match="'error', 'right' or 'left'"):
            tokenizer.encode(self.LONG, truncation="middle")  # type: ignore[arg-type]


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer.json, nor a vocabulary"):
        Tokenizer.from_pretrained(tmp_path, config=DecoderConfig.from_folder(tmp_path))


def test_a_template_that_writes_todays_date_is_refused(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"chat_template": "{{ strftime_now('%Y') }}"}))
    with pytest.raises(CheckpointError, match="today's date"):
        Tokenizer.from_pretrained(tmp_path, config=DecoderConfig.from_folder(tmp_path))


def test_a_template_that_takes_a_date_gets_the_same_one_every_day() -> None:
    template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}"
    )
    own = letters(template=template)
    assert own._backend.decode(own.encode(chat("x"))).replace(" ", "") == "26Jul2024"


def letters(*, template: str, specials: tuple[str, ...] = ("<s>", "<end>"), bos: str | None = None) -> Tokenizer:
    """A tokenizer of single ASCII characters, with a template of its own and `<end>` for the reward token."""
    backend = BackendTokenizer(models.BPE({chr(code): code - 32 for code in range(32, 127)}, []))
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos)
    fast.chat_template = template
    return Tokenizer(fast, reward_token_id=backend.token_to_id("<end>"), max_tokens=64)


@pytest.mark.parametrize(
    ("template", "num_bos"),
    [
        ("{{ messages[0]['content'] }}", 0),
        ("{{ bos_token }}{{ messages[0]['content'] }}", 1),
        ("{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}<end>", 1),
        ("{{ messages[0]['content'] }}<end><end>", 0),
    ],
)
def test_a_template_never_doubles_the_bos_or_the_reward_token(template: str, num_bos: int) -> None:
    tokenizer = letters(template=template, bos="<s>")
    *front, last = tokenizer.encode(chat("hi"))
    assert (front.count(tokenizer.bos_token_id or 0), last) == (num_bos, tokenizer.reward_token_id)
    assert tokenizer._backend.decode(front[num_bos:]).replace(" ", "") == "hi"


def test_special_tokens_do_not_arise_where_pieces_meet() -> None:
    tokenizer = letters(template="{{ messages[0]['role'] }}{{ messages[0]['content'] }}|<end>")
    ids = tokenizer.encode([{"role": "a<e", "content": "nd>b"}])
    end = tokenizer.reward_token_id
    assert [token == end for token in ids] == [False] * (len(ids) - 1) + [True]


def test_marks_do_not_hide_a_role_from_the_template() -> None:
    template = "{% for m in messages %}{{ 'U' if m['role'] == 'user' else '?' }}{{ m['content'] }}{% endfor %}<end>"
    ids = letters(template=template).encode(chat("<s>"))
    assert ids[0] == ord("U") - 32


def test_marks_do_not_keep_a_template_from_trimming() -> None:
    tokenizer = letters(template="{{ messages[0]['content'] | trim }}<end>")
    plain, spelled = tokenizer.encode(chat("  hi  ")), tokenizer.encode(chat("  <s>  "))
    assert len(plain) == len("hi") + 1
    assert len(spelled) == len("<s>") + 1


def test_truncation_and_padding_saved_with_a_tokenizer_do_nothing() -> None:
    backend = BackendTokenizer(models.BPE({chr(code): code - 32 for code in range(32, 127)}, []))
    backend.enable_truncation(20)
    backend.enable_padding(length=30)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    fast.chat_template = "{{ messages[0]['content'] }}"
    tokenizer = Tokenizer(fast, reward_token_id=None, max_tokens=64)
    assert [len(tokenizer.encode(chat("x" * length))) for length in (1, 50)] == [1, 50]


def test_tokenizers_may_be_read_in_several_threads(tmp_path: Path) -> None:
    """The filters that hold Transformers' warnings back belong to the process; here any warning is an error."""
    tiny.write(tmp_path)
    config = DecoderConfig.from_folder(tmp_path)
    level = logging.getLogger("transformers").level
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: Tokenizer.from_pretrained(tmp_path, config=config), range(16)))
    assert logging.getLogger("transformers").level == level
