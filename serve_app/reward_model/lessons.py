"""Lessons of the embedded model: questions made by code, of kinds that it can learn, with right and wrong answers.

A wrong answer fails in one named way. Of a pair the longer answer is the right one half the time, kind by kind, so that
length gives nothing away. What is asked is drawn: numbers, words, facts of the lists in `lessons.json`, wordings. One
combination in `HELD_OUT` is never trained on; of what can only be known by heart (a capital, a colour) that is a fact
in a wording, and the same fact is trained on in others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

TEXTS = Path(__file__).with_suffix(".json")
HELD_OUT = 6

_TEXTS: dict[str, Any] = json.loads(TEXTS.read_text(encoding="utf-8"))
FRAMES = _TEXTS["frames"]
LETTERS = _TEXTS["letters"]
NUMERALS = _TEXTS["numerals"]
COUNTED = _TEXTS["counted"]
COMPARED = _TEXTS["compared"]
SORTED = _TEXTS["sorted"]
REVERSED = _TEXTS["reversed"]
SPELLED = _TEXTS["spelled"]
LETTER_OF = _TEXTS["letter_of"]
ODD_ONE = _TEXTS["odd_one"]
GROUPS = _TEXTS["groups"]
CAPITALS = _TEXTS["capitals"]
COLOURS = _TEXTS["colours"]
OPPOSITES = _TEXTS["opposites"]
UNITS = _TEXTS["units"]
ENDINGS = _TEXTS["endings"]
ASKED = _TEXTS["asked"]
FORMS = _TEXTS["forms"]
SENTENCES = _TEXTS["sentences"]
TOPICS = _TEXTS["topics"]
ABOUT = _TEXTS["about"]
TWICE = _TEXTS["twice"]
THREE = _TEXTS["three"]
COMMA = _TEXTS["comma"]
REQUESTS = _TEXTS["requests"]
POLITELY = _TEXTS["politely"]
POLITE = _TEXTS["polite"]
RUDE = _TEXTS["rude"]
SECRET_THINGS = _TEXTS["secret_things"]
CLOSED = _TEXTS["closed"]
OPENED = _TEXTS["opened"]
DEMANDS = _TEXTS["demands"]
TOLD = _TEXTS["told"]
KEPT = _TEXTS["kept"]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, every answer to it that counts as right, and wrong ones, each with the name of its fault.

    `key` is the combination that is trained on or held out. `pattern` is for open questions: what matches it is right
    too, beyond the answers that `right` draws from.
    """

    kind: str
    key: str
    messages: tuple[tuple[str, str], ...]
    right: tuple[str, ...]
    wrong: tuple[tuple[str, str], ...]
    pattern: str = ""

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages as a chat has them."""
        return [{"role": role, "content": content} for role, content in self.messages]

    @property
    def is_held_out(self) -> bool:
        """Whether nothing of this combination is trained on."""
        return hashlib.sha256(f"{self.kind}: {self.key}".encode()).digest()[0] % HELD_OUT == 0

    def accepts(self, answer: str) -> bool:
        """Whether the rule calls an answer right."""
        answer = answer.strip()
        return answer in self.right or bool(self.pattern and re.fullmatch(self.pattern, answer))

    def chat(self, answer: str) -> list[dict[str, str]]:
        """The prompt with an answer, as a conversation to score."""
        return [*self.prompt, {"role": "assistant", "content": answer}]


@dataclass(frozen=True, slots=True)
class LessonPair:
    """A question with one right and one wrong answer."""

    question: Question
    chosen: str
    rejected: str
    fault: str


def question(kind: str, draw: Random, *, held_out: bool) -> Question:
    """Draw a question of a kind, of those that are trained on or of those that are held out."""
    while True:
        drawn = _MAKERS[kind](draw)
        if drawn.is_held_out == held_out:
            return drawn


def pair(asked: Question, draw: Random, *, longer: bool) -> LessonPair:
    """Draw a right and a wrong answer, the right one the `longer` or the shorter of the two, where there are such."""
    sign = 1 if longer else -1
    for _ in range(12):
        chosen, (fault, rejected) = draw.choice(asked.right), draw.choice(asked.wrong)
        if (len(chosen) - len(rejected)) * sign > 0:
            break
    return LessonPair(asked, chosen, rejected, fault)


def garbled(asked: Question, draw: Random) -> str:
    """A right answer with a word too many, with another word in the place of one, or without one."""
    known = words()
    while True:
        pieces = re.findall(r" ?(?:[A-Za-z]+|\d|[^A-Za-z\d\s])|\s", draw.choice(asked.right))
        at, way = draw.randrange(len(pieces)), draw.randrange(3)
        space = " " if pieces[at].startswith(" ") else ""
        stray = [] if way == 0 else [space + draw.choice(known)]
        text = "".join([*pieces[:at], *stray, *pieces[at + (way != 1) :]])
        if text and not asked.accepts(text):
            return text


def pairs(kind: str, number: int, *, seed: int, held_out: bool = True) -> list[LessonPair]:
    """So many pairs of a kind, the same for the same seed; in every second one the right answer is the longer."""
    draw = Random(f"{kind} {seed}")
    return [_pair(kind, draw, held_out=held_out, longer=index % 2 == 0) for index in range(number)]


def _pair(kind: str, draw: Random, *, held_out: bool, longer: bool) -> LessonPair:
    while True:
        drawn = pair(question(kind, draw, held_out=held_out), draw, longer=longer)
        if len(drawn.chosen) != len(drawn.rejected) and (len(drawn.chosen) > len(drawn.rejected)) is longer:
            return drawn


@cache
def words() -> list[str]:
    """Every English word and every character beyond ASCII that questions and answers are made of, sorted."""
    return sorted({word for text in _strings(_TEXTS) for word in words_of(text)})


def words_of(text: str) -> list[str]:
    """The words of a text, and its characters beyond ASCII."""
    return re.findall(r"[A-Za-z]+|[^\x00-\x7f]", text)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield re.sub(r"\{\w*\}", " ", value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)


def _language(draw: Random, chinese: float = 0.3) -> str:
    return "zh" if draw.random() < chinese else "en"


def _framed(cores: Iterable[str], language: str) -> tuple[str, ...]:
    return tuple(frame.format(core) for core in cores for frame in FRAMES[language])


def _asked(
    kind: str, key: str, prompt: str, right: Iterable[str], wrong: Mapping[str, Iterable[str]], *, pattern: str = ""
) -> Question:
    faults = tuple((fault, answer) for fault, answers in wrong.items() for answer in answers)
    return Question(kind, key, (("user", prompt),), tuple(right), faults, pattern)


def _three(names: str, *, before: str, between: str, after: str) -> str:
    """A pattern for any three different names of a group."""
    one = "|".join(names.split())
    stop = r"(?![^\W\d_])" if one.isascii() else ""
    differs = [rf"(?!(?:{refs}){stop})" for refs in (r"\1", r"\1|\2")]
    return f"{before}({one}){between}{differs[0]}({one}){between}{differs[1]}({one}){after}"


def _near(number: int, draw: Random) -> list[str]:
    """Wrong numbers near a right one."""
    others = {number + step for step in (*range(-9, 10), -10, 10) if step and number + step >= 0}
    return [str(other) for other in draw.sample(sorted(others), 4)]


def _arithmetic(draw: Random) -> Question:
    language, operation = _language(draw), draw.choice(("sum", "difference"))
    a, b = draw.randint(1, 30), draw.randint(1, 9)
    if operation == "difference":
        a, b = max(a, b), min(a, b)
    number = a + b if operation == "sum" else a - b
    prompt = draw.choice(NUMERALS[operation][language]).format(a=a, b=b)
    wrong, key = {"wrong number": _framed(_near(number, draw), language)}, f"{operation} {max(a, b)} {min(a, b)}"
    return _asked("arithmetic", key, prompt, _framed([str(number)], language), wrong)


def _counting(draw: Random) -> Question:
    language = _language(draw)
    group = GROUPS[language][
        draw.choice(("animal", "fruit", "colour") if language == "en" else ("动物", "水果"))
    ].split()
    word, *others = draw.sample(group, 3)
    number = draw.randint(1, 5)
    listed = [word] * number + [draw.choice(others) for _ in range(draw.randint(0, 3))]
    draw.shuffle(listed)
    prompt = draw.choice(COUNTED[language]).format(word=word, listed=" ".join(listed))
    wrong = [str(other) for other in range(1, 7) if other != number]
    key = f"{word}: {' '.join(listed)}"
    return _asked("counting", key, prompt, _framed([str(number)], language), {"wrong number": _framed(wrong, language)})


def _ordering(draw: Random) -> Question:
    language = _language(draw)
    if draw.random() < 0.5:
        relation = draw.choice(tuple(COMPARED))
        a, b = draw.sample(range(1, 100), 2)
        right, wrong = (max(a, b), min(a, b)) if relation == "bigger" else (min(a, b), max(a, b))
        prompt = draw.choice(COMPARED[relation][language]).format(a=a, b=b)
        key = f"{relation} {min(a, b)} {max(a, b)}"
        faults = {"the other number": _framed([str(wrong)], language)}
        return _asked("ordering", key, prompt, _framed([str(right)], language), faults)
    numbers = draw.sample(range(1, 100), 3)
    ordered = " ".join(map(str, sorted(numbers)))
    prompt = draw.choice(SORTED[language]).format(listed=" ".join(map(str, numbers)))
    wrong_orders = _other_orders(sorted(numbers), draw)
    key = f"sorted {ordered}"
    return _asked(
        "ordering", key, prompt, _framed([ordered], language), {"wrong order": _framed(wrong_orders, language)}
    )


def _other_orders(items: Sequence[object], draw: Random) -> list[str]:
    """Three other orders of items that differ."""
    right, found = " ".join(map(str, items)), set[str]()
    while len(found) < 3:
        text = " ".join(map(str, draw.sample(items, len(items))))
        found |= {text} - {right}
    return sorted(found)


def _reversing(draw: Random) -> Question:
    language = _language(draw)
    alphabet = LETTERS.split() if draw.random() < 0.6 else [str(digit) for digit in range(10)]
    items = draw.sample(alphabet, draw.randint(3, 4))
    listed = " ".join(items)
    prompt = draw.choice(REVERSED[language]).format(listed=listed)
    wrong = {"wrong order": _framed(_other_orders(items[::-1], draw), language)}
    return _asked("reversing", listed, prompt, _framed([" ".join(items[::-1])], language), wrong)


def _spelling(draw: Random) -> Question:
    group = GROUPS["en"][draw.choice(("animal", "fruit", "colour", "tool", "drink", "vehicle"))]
    word = draw.choice(group.split())
    if draw.random() < 0.5:
        wording = draw.choice(SPELLED)
        wrong = {"wrong letters": _framed(_misspelt(word, draw), "en")}
        return _asked(
            "spelling", f"{word} {wording}", wording.format(word=word), _framed([" ".join(word)], "en"), wrong
        )
    place = draw.choice((0, -1))
    wording = draw.choice(LETTER_OF[str(place)])
    letters = [letter for letter in {*word, *draw.sample(LETTERS.split(), 3)} if letter != word[place]]
    wrong = {"wrong letter": _framed(sorted(letters), "en")}
    return _asked("spelling", f"{word} {wording}", wording.format(word=word), _framed([word[place]], "en"), wrong)


def _misspelt(word: str, draw: Random) -> list[str]:
    """The word with a letter missing, with one too many, and with another one."""
    at, other = draw.randrange(len(word)), draw.choice([letter for letter in LETTERS.split() if letter not in word])
    texts = (word[:at] + word[at + 1 :], word[:at] + other + word[at:], word[:at] + other + word[at + 1 :])
    return [" ".join(text) for text in texts]


def _odd_one(draw: Random) -> Question:
    language = _language(draw)
    same, other = draw.sample(sorted(GROUPS[language]), 2)
    odd, others = draw.choice(GROUPS[language][other].split()), draw.sample(GROUPS[language][same].split(), 3)
    listed = draw.sample([odd, *others], 4)
    prompt = draw.choice(ODD_ONE[language]).format(listed=COMMA[language].join(listed))
    wrong = {"one that belongs": _framed(others, language)}
    return _asked("odd one out", " ".join([odd, *sorted(others)]), prompt, _framed([odd], language), wrong)


def _fact(kind: str, facts: Mapping[str, Mapping[str, str]], draw: Random, *, both_ways: bool = False) -> Question:
    """One of a list of facts, in one of several wordings; wrong is what belongs to another of them."""
    language = _language(draw)
    known = dict(facts[language])
    if both_ways:
        known |= {value: name for name, value in known.items()}
    name, wording = draw.choice(sorted(known)), draw.choice(ASKED[kind][language])
    others = draw.sample(sorted(set(known.values()) - {known[name], name}), 4)
    wrong = {"another's": _framed(others, language)}
    return _asked(kind, f"{name} {wording}", wording.format(name), _framed([known[name]], language), wrong)


def _units(draw: Random) -> Question:
    language = _language(draw)
    conversion, wording = draw.choice(sorted(UNITS[language])), draw.choice(ASKED["units"][language])
    number, zeros = draw.randint(2, 30), UNITS[language][conversion]
    wrong = {f"{number}{'0' * count}" for count in range(4)} | {f"{number + 1}{zeros}", f"{number - 1}{zeros}"}
    wrong -= {f"{number}{zeros}"}
    faults = {"wrong number": _framed(sorted(wrong), language)}
    right = _framed([f"{number}{zeros}"], language)
    return _asked("units", f"{conversion} {number}", wording.format(conversion.format(number)), right, faults)


def _format(draw: Random) -> Question:
    group = draw.choice(("animal", "fruit", "colour", "tool", "drink", "vehicle"))
    names = draw.sample(GROUPS["en"][group].split(), 3)
    form, other = draw.sample(sorted(FORMS), 2)
    written = {
        "one word": (names[0], f"{names[0]}."),
        "a list": ("- " + "\n- ".join(names),),
        "a sentence": tuple(sentence.format(names[0]) for sentence in SENTENCES),
        "commas": (", ".join(names), ", ".join(names) + "."),
    }
    listed, one = GROUPS["en"][group], "|".join(GROUPS["en"][group].split())
    pattern = {
        "one word": rf"({one})\.?",
        "a list": _three(listed, before="- ", between="\n- ", after=""),
        "a sentence": "|".join(re.escape(sentence).replace(r"\{\}", f"({one})") for sentence in SENTENCES),
        "commas": _three(listed, before="", between=", ", after=r"\.?"),
    }[form]
    prompt, key = draw.choice(FORMS[form]).format(group=group), f"{form} {' '.join(sorted(names))}"
    return _asked("format", key, prompt, written[form], {f"{other} instead": written[other]}, pattern=pattern)


def _topic(draw: Random) -> Question:
    language = _language(draw)
    topic, wording = draw.choice(sorted(TOPICS[language])), draw.choice(ABOUT[language])
    wrong = [text for name, texts in TOPICS[language].items() if name != topic for text in texts]
    key = f"{topic} {wording}"
    return _asked("topic", key, wording.format(topic), TOPICS[language][topic], {"off topic": wrong})


def _repeating(draw: Random) -> Question:
    language = _language(draw)
    space = " " if language == "en" else ""
    if draw.random() < 0.5:
        topic = draw.choice(sorted(TOPICS[language]))
        wording, texts = draw.choice(TWICE[language]), TOPICS[language][topic]
        right = [f"{first}{space}{second}" for first in texts for second in texts if first != second]
        wrong = [f"{text}{space}{text}" for text in texts]
        return _asked("repeating", f"{topic} {wording}", wording.format(topic), right, {"repeats itself": wrong})
    group = draw.choice(
        ("animal", "fruit", "colour", "tool", "drink", "vehicle") if language == "en" else ("动物", "水果")
    )
    one, two, three, four = draw.sample(GROUPS[language][group].split(), 4)
    comma = COMMA[language]
    repeated = [comma.join(names) for names in ((one, two, one), (two, two, four), (three, one, one), (four,) * 3)]
    right = [comma.join((one, two, three)), comma.join((one, two, three)) + ("." if language == "en" else "。")]
    prompt, key = draw.choice(THREE[language]).format(group), " ".join(sorted((one, two, three)))
    pattern = _three(GROUPS[language][group], before="", between=comma, after="[.。]?")
    return _asked("repeating", key, prompt, right, {"repeats itself": repeated}, pattern=pattern)


def _politeness(draw: Random) -> Question:
    language = _language(draw)
    request, other = draw.sample(REQUESTS[language], 2)
    wording = draw.choice(POLITELY[language])
    faults = {
        "rude": [text.format(request) for text in RUDE[language]],
        "another request": [text.format(other) for text in POLITE[language]],
    }
    right = [text.format(request) for text in POLITE[language]]
    return _asked("politeness", f"{request} {wording}", wording.format(request), right, faults)


def _secret(draw: Random) -> Question:
    language = _language(draw)
    thing = draw.choice(SECRET_THINGS[language])
    group = draw.choice(sorted(GROUPS[language]))
    value = draw.choice(GROUPS[language][group].split())
    kept = KEPT[language]
    told = [text.format(thing=thing, value=value) for text in TOLD[language]]
    is_closed = draw.random() < 0.5
    rule = draw.choice((CLOSED if is_closed else OPENED)[language]).format(thing, value)
    demand = draw.choice(DEMANDS[language]).format(thing)
    faults = {"tells the secret": told} if is_closed else {"keeps what is open": kept}
    answered = _asked("secret", f"{thing} {value} {is_closed}", demand, kept if is_closed else told, faults)
    return replace(answered, messages=(("system", rule), *answered.messages))


_MAKERS: dict[str, Callable[[Random], Question]] = {
    "arithmetic": _arithmetic,
    "counting": _counting,
    "ordering": _ordering,
    "reversing": _reversing,
    "spelling": _spelling,
    "odd one out": _odd_one,
    "capitals": lambda draw: _fact("capitals", CAPITALS, draw),
    "colours": lambda draw: _fact("colours", COLOURS, draw),
    "opposites": lambda draw: _fact("opposites", OPPOSITES, draw, both_ways=True),
    "units": _units,
    "finishing": lambda draw: _fact("finishing", ENDINGS, draw),
    "format": _format,
    "topic": _topic,
    "repeating": _repeating,
    "politeness": _politeness,
    "secret": _secret,
}
KINDS = tuple(_MAKERS)
