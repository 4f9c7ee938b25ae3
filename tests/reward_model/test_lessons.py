"""What the embedded model is taught: questions whose right answers are right, and whose length gives nothing away."""

from __future__ import annotations

from random import Random

import pytest

from serve_app.reward_model import lessons
from serve_app.reward_model.lessons import KINDS, LessonPair

KIND = pytest.mark.parametrize("kind", KINDS)


@KIND
def test_the_rule_tells_right_from_wrong(kind: str) -> None:
    draw = Random(0)
    for _ in range(40):
        asked = lessons.question(kind, draw, held_out=False)
        assert asked.kind == kind
        assert all(asked.accepts(answer) for answer in asked.right)
        assert not [answer for _, answer in asked.wrong if asked.accepts(answer)]
        assert all(fault for fault, _ in asked.wrong)


@KIND
def test_the_longer_answer_is_the_right_one_half_the_time(kind: str) -> None:
    signs = [len(pair.chosen) - len(pair.rejected) for pair in lessons.pairs(kind, 200, seed=3)]
    assert sum(sign > 0 for sign in signs) == sum(sign < 0 for sign in signs) == 100


@KIND
def test_what_is_held_out_is_never_trained_on(kind: str) -> None:
    trained = lessons.pairs(kind, 100, seed=0, held_out=False)
    held_out = lessons.pairs(kind, 100, seed=0)
    assert not {pair.question.key for pair in trained} & {pair.question.key for pair in held_out}
    assert len({pair.question.key for pair in held_out}) > 1
    assert lessons.pairs(kind, 5, seed=0) == held_out[:5]
    assert lessons.pairs(kind, 5, seed=1) != held_out[:5]


def shown(kind: str, answer: str) -> LessonPair:
    """A pair of a kind whose right answers include one."""
    draw = Random(0)
    while True:
        asked = lessons.question(kind, draw, held_out=False)
        if asked.accepts(answer):
            return lessons.pair(asked, draw, longer=True)


def test_an_open_question_has_more_right_answers_than_are_drawn() -> None:
    listed = shown("format", "- tea\n- milk\n- juice").question
    assert listed.accepts("- wine\n- beer\n- coffee")
    assert not listed.accepts("- wine\n- beer\n- wine")
    assert not listed.accepts("- wine\n- beer")
    assert not listed.accepts("wine, beer, coffee")
    named = shown("repeating", "梨、桃子、葡萄").question
    assert named.accepts("西瓜、香蕉、苹果。")
    assert not named.accepts("西瓜、西瓜、苹果")


def test_every_text_is_in_the_words() -> None:
    """Or it is the plural of one, which is spelt."""
    known = {form for word in lessons.words() for form in (word, f"{word}s")}
    for kind in KINDS:
        for pair in lessons.pairs(kind, 20, seed=0):
            for text in (*(content for _, content in pair.question.messages), pair.chosen, pair.rejected):
                assert set(lessons.words_of(text)) <= known
