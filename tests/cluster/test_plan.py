"""What the estimate says, and that it never passes an assumption for a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster import plan
from cluster.plan import PlanConfig, main, report
from tests.goldens import make_golden


def printed(**options: Any) -> str:
    text, fits = report(PlanConfig.model_validate({"rows": 1_000_000, "tokens_per_row": 500} | options))
    assert fits
    return text


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measured", lambda *known, **more: None)


def test_what_is_assumed_is_said() -> None:
    text = printed()
    assert "500,000,000 tokens" in text
    assert "assumed: 40% of 989.4 TFLOP/s (NVIDIA H100 data sheet, SXM, bfloat16, dense); NOT measured" in text
    assert "No rate of rayward was measured on this GPU" in text


def test_a_given_rate_is_used() -> None:
    text = printed(tokens_per_s=10_000, replicas=4)
    assert "10,000 tokens/s a replica (given with --tokens-per-s)" in text
    assert "       4     4       3.9       15.4" in text  # 500e6 / 1e4 / 3600 / 4 / 0.9
    assert "of the GPU's peak" not in text


def test_cores_of_an_endpoint_follow_the_conversations_a_second_and_their_length() -> None:
    text = printed(tokens_per_s=100_000)
    # 200 conversations/s at 1.2 + 500 * 0.0019 and 0.2 + 500 * 0.0008 ms
    assert (
        "cores of an endpoint      0.43 a replica, 0.12 with lists of 32, for HTTP and tokenising: 200 conversations/s"
        in text
    )
    assert "beside its model, 0.6 in lists of 32" in text


def test_within_hours_finds_the_replicas() -> None:
    assert "       5     5       3.1       15.4" in printed(tokens_per_s=10_000, within_hours=3.2)


def test_a_model_that_does_not_fit_says_where_it_would() -> None:
    config = PlanConfig(
        rows=1, tokens_per_row=1, model="internlm/internlm2-20b-reward", gpu="A100-40", gpus_per_replica=1
    )
    text, fits = report(config)
    assert not fits
    assert "does not fit one A100-40 of 40.0 GB" in text
    assert "32,768 tokens must fit beside them; --max-tokens bounds it" in text
    assert "it fits H200, H100, A100-80, 2 A100-40, L40S, 3 L4" in text


def test_a_large_model_takes_the_fewest_gpus_that_it_fits() -> None:
    large = {"model": "internlm/internlm2-20b-reward", "gpu": "L4", "tokens_per_s": 1000}
    assert "       2     6" in printed(**large, replicas=2)
    shorter = printed(**large, replicas=2, max_tokens=8192)
    assert "       2     4" in shorter
    assert "on 2 L4: 1,000 tokens/s a replica" in shorter
    assert "memory of its fullest GPU 2" in shorter
    assert "the 2 GPUs are on one node, share the layers and reach 85% of their sum" in shorter
    text = printed(model="Qwen/Qwen2.5-Math-RM-72B", gpu="H100", replicas=1)
    assert "in bfloat16 on 2 H100" in text
    assert "(85% of 2 times assumed: 40% of" in text
    assert "       1     3" in printed(model="allenai/Llama-3.1-70B-Instruct-RM-RB2", gpu="H100", replicas=1)


def test_a_folder_is_planned_with(tmp_path: Path) -> None:
    assert "my-reward in float16 on L4" in printed(model=str(make_golden("gqa", tmp_path / "my-reward")), gpu="L4")


def test_the_command_prints_it_and_names_what_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["plan", "--rows", "10", "--tokens-per-row", "5", "--replicas", "1"])
    assert main() == 0
    assert "GPU memory of a replica" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["plan", "--rows", "10", "--tokens-per-row", "5", "--model", "./nowhere"])
    assert main() == 1
    assert "model folder ./nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"replicas": 1, "within_hours": 1}, "not both"), ({"dtype": "fp8", "gpu": "L4"}, "fp8 needs an H100 or H200")],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        printed(**options)
