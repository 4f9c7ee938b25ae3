"""Chat templates: given in place of the checkpoint's, checked at load, part of the fingerprint, never code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve_app.reward_model import CheckpointError, RewardModel
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.chat_template import template_text
from serve_app.reward_model.model_files import fingerprint, resolve
from serve_app.reward_model.tokenizer import Tokenizer
from tests.conftest import chat
from tests.reward_model.classifiers import CHATML, write

DATED = "{{ strftime_now('%d %b %Y') }} " + CHATML
CHAT = chat("hello, how are you?", "the answer is four")


def read(folder: Path, **options: Any) -> Tokenizer:
    return Tokenizer.from_pretrained(folder, config=DecoderConfig.from_folder(folder), **options)


def test_a_template_in_place_of_a_missing_one_scores_as_if_it_had_been_there(tmp_path: Path) -> None:
    whole = RewardModel.from_pretrained(write(tmp_path / "whole"), dtype="float32")
    bare = write(tmp_path / "bare", template=None)
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    for template in (file, str(file), CHATML):
        model = RewardModel.from_pretrained(bare, dtype="float32", chat_template=template)
        assert model.get_score(CHAT) == whole.get_score(CHAT)
        assert model.fingerprint == fingerprint(bare, chat_template=CHATML)
    assert len({fingerprint(bare), fingerprint(bare, chat_template=CHATML), fingerprint(bare, chat_template="{{")}) == 3


def test_a_checkpoint_without_a_template_says_how_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no chat template.*--chat-template FILE"):
        read(write(tmp_path, template=None))


@pytest.mark.parametrize("named", [False, True])
def test_a_template_that_writes_todays_date_is_refused_alone_and_among_named_ones(tmp_path: Path, named: bool) -> None:
    other = {"name": "tool_use", "template": CHATML}
    write(tmp_path, template=[{"name": "default", "template": DATED}, other] if named else DATED)
    with pytest.raises(CheckpointError, match="today's date"):
        read(tmp_path)
    assert read(tmp_path, chat_template=CHATML).encode(CHAT)


def test_of_named_templates_the_default_is_used(tmp_path: Path) -> None:
    write(tmp_path / "one")
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": DATED}]
    write(tmp_path / "named", template=named)
    assert read(tmp_path / "named").encode(CHAT) == read(tmp_path / "one").encode(CHAT)
    write(tmp_path / "lost", template=[{"name": "rag", "template": CHATML}, {"name": "tool_use", "template": CHATML}])
    with pytest.raises(CheckpointError, match="tokenizer_config.json: .*--chat-template"):
        read(tmp_path / "lost")


@pytest.mark.parametrize(
    "broken", ["{% for m in messages %}", "{{ messages[9]['content'].x() }}", "{{ raise_exception('x') }}"]
)
def test_a_template_that_renders_nothing_is_one_error_that_names_its_file(tmp_path: Path, broken: str) -> None:
    write(tmp_path, template=None)
    (tmp_path / "chat_template.jinja").write_text(broken)
    with pytest.raises(CheckpointError, match="chat_template.jinja renders no conversation"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match="that was given renders no conversation"):
        read(tmp_path, chat_template=broken)


def test_a_template_cannot_reach_what_is_around_it(tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(CheckpointError, match="renders no conversation"):
        read(write(tmp_path), chat_template=escape)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no chat template file .*missing.jinja"):
        template_text(str(tmp_path / "missing.jinja"))
    (tmp_path / "empty.jinja").write_text("hello")
    with pytest.raises(CheckpointError, match="empty.jinja holds no Jinja template"):
        template_text(tmp_path / "empty.jinja")


def test_the_files_of_templates_and_vocabularies_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is asked of the Hub, for a model that is to be loaded and for its tokenizer alone."""
    from fnmatch import fnmatch

    asked: list[list[str]] = []

    def snapshot_download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    resolve("org/model", None)
    resolve("org/model", None, weights=False)
    for name in (
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "merges.txt",
        "vocab.txt",
        "spiece.model",
        "tokenizer.json",
    ):
        for patterns in asked:
            assert any(fnmatch(name, pattern) for pattern in patterns), name
    assert not any(fnmatch("modeling_evil.py", pattern) for patterns in asked for pattern in patterns)
