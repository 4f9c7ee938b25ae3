"""An endpoint that fails, stalls, answers in part and cuts connections: what came is kept, the rest has a reason."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from jobs.errors import GeneratorError
from jobs.generation.candidates import Candidate, Generation, Prompt
from jobs.generation.endpoint import OUTAGE_PROMPTS, Endpoint, HttpGenerator, only_model
from jobs.generation.options import Sampling
from serve_app.reward_model.conversation import Message
from tests.serve_app.scripted_server import Reply, Request, ScriptedServer, refusal, serving

CARD = Sampling(num_candidates=3, temperature=0.8, top_k=50, top_p=0.95, max_new_tokens=512)
ALL = Generation(tuple(Candidate(f"answer {number}", "stop") for number in range(3)))


def prompt(text: str = "What is 2 + 2?", row: int = 0) -> Prompt:
    return Prompt((Message("user", text),), key=f"a:{row}")


def choices(*texts: str | None, finish_reason: str = "stop") -> Reply:
    found = [
        {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        for index, text in enumerate(texts)
    ]
    return Reply({"object": "chat.completion", "choices": found, "usage": {}})


def everything(request: Request) -> Reply:
    return choices(*(f"answer {number}" for number in range(request.body["n"])))


@contextmanager
def asking(
    answer: Callable[[Request], Reply], sampling: Sampling = CARD, **options: Any
) -> Iterator[tuple[HttpGenerator, ScriptedServer]]:
    """A generator and the server it asks; retries wait a hundredth of what they do by default."""
    with serving(answer) as server:
        endpoint = Endpoint(server.url + "/v1", "chat", **({"max_retries": 2} | options))
        generator = HttpGenerator(endpoint, sampling, first_backoff_s=0.005)
        try:
            yield generator, server
        finally:
            generator.close()


def scripted(*replies: Reply) -> Callable[[Request], Reply]:
    """Each reply once, in turn, and the last one for ever."""
    left = list(replies)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def test_a_request_carries_the_prompt_the_key_and_the_cards_sampling() -> None:
    chat = Prompt((Message("system", "Be brief."), Message("user", "Hi")), key="a:0")
    with asking(everything, api_key="secret") as (generator, server):
        assert generator.generate([chat]) == [ALL]
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["Authorization"] == "Bearer secret"
    assert request.body == {
        "model": "chat",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "n": 3,
        "max_tokens": 512,
        "temperature": 0.8,
        "top_p": 0.95,
        "top_k": 50,
    }
    assert "secret" not in repr(generator._endpoint)


def test_fields_can_be_left_out_changed_and_added() -> None:
    plain = Sampling(num_candidates=1, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=9)
    fields = {"max_tokens": None, "max_completion_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}}
    with asking(everything, plain, body_fields=fields) as (generator, server):
        generator.generate([prompt()])
    assert server.requests[0].body.keys() == {
        "model", "messages", "n", "temperature", "max_completion_tokens", "chat_template_kwargs"
    }  # fmt: skip


def test_a_server_that_gives_fewer_choices_is_asked_for_the_rest() -> None:
    given = iter(range(9))
    with asking(lambda request: choices(f"answer {next(given)}")) as (generator, server):
        assert generator.generate([prompt()]) == [ALL]
    assert [request.body["n"] for request in server.requests] == [3, 2, 1]


def test_a_server_that_gives_more_choices_has_the_first_kept() -> None:
    with asking(lambda request: choices(*(f"answer {number}" for number in range(5)))) as (generator, _):
        assert generator.generate([prompt()]) == [ALL]


@pytest.mark.parametrize(
    "bad",
    [
        refusal(500),
        refusal(503),
        refusal(429),
        refusal(408),
        Reply({"choices": []}, is_cut=True),
        Reply(b"<html>"),
        Reply({"object": "chat.completion"}),
        Reply([1, 2]),
        Reply({"choices": [{"message": {"content": [{"type": "text"}]}}]}),
        choices(None, finish_reason="content_filter"),
        Reply(b'{"choices": [{"message": {"content": "half \\ud83d"}}]}'),
    ],
    ids=lambda reply: f"{reply.status} {str(reply.body)[:20]}",
)
def test_what_may_pass_is_tried_again(bad: Reply) -> None:
    with asking(scripted(bad, bad, choices("answer 0", "answer 1", "answer 2"))) as (generator, server):
        assert generator.generate([prompt()]) == [ALL]
    assert len(server.requests) == 3


def test_retries_are_used_up_and_the_reason_is_the_last_one() -> None:
    with asking(scripted(refusal(500), refusal(503, "no GPU\nfree"))) as (generator, server):
        assert generator.generate([prompt()]) == [Generation((), ("HTTP 503: no GPU free (asked 3 times)",) * 3)]
    assert len(server.requests) == 3


def test_a_connection_that_is_refused_is_a_reason_too() -> None:
    with asking(everything) as (generator, _):
        pass
    generator = HttpGenerator(generator._endpoint, CARD, first_backoff_s=0.005)  # nobody listens there any more
    (generation,) = generator.generate([prompt()])
    generator.close()
    assert generation.failures[0].startswith("ConnectError: ")


def test_a_server_that_stalls_is_given_up_in_time() -> None:
    released = threading.Event()

    def stall(request: Request) -> Reply:
        released.wait(120)
        return everything(request)

    with asking(stall, timeout_s=0.2, max_retries=1) as (generator, _):
        started = time.monotonic()
        generations = generator.generate([prompt()])
        waited = time.monotonic() - started
        released.set()
    assert generations == [Generation((), ("no answer within 0.2 s (asked 2 times)",) * 3)]
    assert waited >= 0.4


def test_what_came_before_a_failure_is_kept() -> None:
    with asking(scripted(choices("answer 0", "answer 1"), refusal(500, "gone"))) as (generator, _):
        assert generator.generate([prompt()]) == [Generation(ALL.candidates[:2], ("HTTP 500: gone (asked 3 times)",))]


def test_a_prompt_that_is_refused_is_not_asked_again_and_leaves_others_alone() -> None:
    def answer(request: Request) -> Reply:
        too_long = len(request.body["messages"][0]["content"]) > 100
        return refusal(400, "the prompt is too long") if too_long else everything(request)

    with asking(answer) as (generator, server):
        refused, answered = generator.generate([prompt("word " * 50, row=0), prompt(row=1)])
    assert refused == Generation((), ("HTTP 400: the prompt is too long",) * 3)
    assert answered == ALL
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_is_no_prompts_fault_ends_the_job(status: int) -> None:
    with asking(lambda request: refusal(status, "the model `chat` does not exist")) as (generator, server):
        with pytest.raises(GeneratorError, match=rf"HTTP {status}: the model `chat` does not exist; check --generator"):
            generator.generate([prompt()])
        assert len(server.requests) == 1


def test_the_server_says_how_long_to_wait() -> None:
    retry = refusal(429, retry_after="1")
    with asking(scripted(retry, choices("answer 0", "answer 1", "answer 2"))) as (generator, _):
        started = time.monotonic()
        assert generator.generate([prompt()]) == [ALL]
        assert time.monotonic() - started >= 1
    with asking(lambda request: refusal(429, retry_after="Wed, 21 Oct 2099 07:28:00 GMT")) as (generator, server):
        (generation,) = generator.generate([prompt()])
        assert generation.failures[0] == "HTTP 429: no (asked 1 times)"
        assert len(server.requests) == 1
    with asking(scripted(refusal(503, retry_after="later"), choices(*"abc"))) as (generator, _):
        assert len(generator.generate([prompt()])[0].candidates) == 3


def test_an_endpoint_that_is_down_ends_the_job_instead_of_marking_every_prompt() -> None:
    answers = iter([everything] * 4)
    with asking(lambda request: next(answers, lambda _: refusal(503))(request), max_retries=0) as (generator, _):
        assert generator.generate([prompt(row=row) for row in range(4)]) == [ALL] * 4
        for row in range(OUTAGE_PROMPTS - 1):
            assert len(generator.generate([prompt(row=row)])[0].failures) == 3
        with pytest.raises(GeneratorError, match=f"down: not one of the last {OUTAGE_PROMPTS} prompts"):
            generator.generate([prompt()])
    with (
        asking(lambda request: refusal(503), max_retries=0) as (generator, _),
        pytest.raises(GeneratorError, match="down: not one of the last 2 prompts"),
    ):
        generator.generate([prompt(row=0), prompt(row=1)])


def test_requests_in_flight_are_bounded_over_all_threads() -> None:
    full = threading.Event()

    def slow(request: Request) -> Reply:
        if server.max_in_flight == 4:
            full.set()
        assert full.wait(120), "never four at once"
        time.sleep(0.01)  # in which more would come
        return everything(request)

    with asking(slow, concurrency=4) as (generator, server):
        prompts = [prompt(row=row) for row in range(12)]
        threads = [threading.Thread(target=generator.generate, args=(prompts[half::2],)) for half in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(server.requests) == 12
    assert server.max_in_flight == 4


def test_a_seed_is_sent_only_if_given_and_never_twice() -> None:
    seeded = Sampling(3, *(0.8, 50, 0.95, 512), seed=7)
    runs = []
    for _ in range(2):
        with asking(scripted(choices("a"), refusal(503), choices("b", "c")), seeded) as (generator, server):
            generator.generate([prompt()])
            runs.append([request.body["seed"] for request in server.requests])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3
    assert all(0 <= seed < 2**31 for seed in runs[0])


def test_a_trial_request_finds_mistakes_before_the_job_begins() -> None:
    with asking(everything) as (generator, server):
        generator.check()
        assert (server.requests[0].body["n"], server.requests[0].body["max_tokens"]) == (1, 1)
    for alive in (choices(None, finish_reason="length"), refusal(429)):
        with asking(scripted(alive)) as (generator, _):
            generator.check()
    with (
        asking(lambda request: refusal(400, "Unrecognized request argument: top_k")) as (generator, _),
        pytest.raises(GeneratorError, match=r"Unrecognized request argument: top_k; --top-k 0"),
    ):
        generator.check()
    with (
        asking(lambda request: refusal(503, "starting")) as (generator, _),
        pytest.raises(GeneratorError, match="does not answer a trial request: HTTP 503: starting"),
    ):
        generator.check()


def test_the_only_model_is_found_and_a_choice_is_asked_for() -> None:
    def models(*names: str) -> Callable[[Request], Reply]:
        return lambda request: Reply({"object": "list", "data": [{"id": name} for name in names]})

    with serving(models("qwen")) as server:
        assert only_model(server.url + "/v1", "key") == "qwen"
        assert server.requests[0].headers["Authorization"] == "Bearer key"
    with serving(models("qwen", "llama")) as server, pytest.raises(GeneratorError, match="2 models: qwen, llama"):
        only_model(server.url + "/v1", None)
    with serving(lambda request: Reply({"data": [3]})) as server, pytest.raises(GeneratorError, match="does not list"):
        only_model(server.url + "/v1", None)
    with serving(lambda request: Reply(b"<html>")) as server, pytest.raises(GeneratorError, match="--generator-model"):
        only_model(server.url + "/v1", None)


def test_an_endpoint_that_is_dead_is_called_so() -> None:
    with serving(everything) as server:
        url = server.url + "/v1"
    for dead, told in (
        (url, "is the server running"),
        ("http://[", "is the server running"),
        ("ftp://x", "address up to"),
    ):
        with pytest.raises(GeneratorError, match=told) as caught:
            only_model(dead, None)
        assert "--generator-model" not in str(caught.value)
    for status, told in ((503, "still starting"), (401, "refuses the API key")):
        with (
            serving(scripted(refusal(status))) as server,
            pytest.raises(GeneratorError, match=told) as caught,
        ):
            only_model(server.url + "/v1", None)
        assert "--generator-model" not in str(caught.value)


SPENT = "all 512 tokens went into thinking, none into the response (finish_reason: length); raise --max-new-tokens"


@pytest.mark.parametrize("nothing", [None, ""])
def test_tokens_that_all_went_into_thinking_are_the_prompts_reason_and_no_outage(nothing: str | None) -> None:
    thinking = choices(nothing, nothing, nothing, finish_reason="length")
    with asking(lambda request: thinking) as (generator, server):
        rows = [prompt(row=row) for row in range(OUTAGE_PROMPTS + 4)]
        assert generator.generate(rows) == [Generation((), (SPENT,) * 3)] * len(rows)
        assert len(server.requests) == len(rows)


def test_candidates_beside_those_that_only_thought_are_kept() -> None:
    half = choices("answer 0", None, finish_reason="length")
    with asking(scripted(half, choices("answer 1"))) as (generator, server):
        (generation,) = generator.generate([prompt()])
    assert generation == Generation((Candidate("answer 0", "length"), Candidate("answer 1", "stop")), (SPENT,))
    assert [request.body["n"] for request in server.requests] == [3, 1]
