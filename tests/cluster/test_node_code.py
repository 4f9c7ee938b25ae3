"""Which nodes lack rayward or have another one, and sending it along."""

from __future__ import annotations

import pytest

from cluster.node_code import NodeCode, code_here, code_on_nodes, missing_modules, why_ship

HERE = NodeCode("here", "abc")


@pytest.mark.parametrize(
    ("fingerprints", "why"),
    [
        (["abc", "abc"], None),
        (["abc", None], "n1 lacks it"),
        (["abc", "def"], "n1 has another"),
        ([None, None, "def"], "n0 and 1 more nodes lacks it and n2 has another"),
    ],
)
def test_code_is_sent_where_a_node_runs_none_or_another(fingerprints: list[str | None], why: str | None) -> None:
    nodes = [NodeCode(f"n{place}", fingerprint) for place, fingerprint in enumerate(fingerprints)]
    assert why_ship(nodes, HERE) == why


def test_what_cannot_be_sent_along_is_named() -> None:
    assert missing_modules([HERE]) is None
    assert missing_modules([HERE, NodeCode("n1", None, ("torch", "tqdm"))]) == "n1 lacks torch, tqdm"


def test_nodes_say_what_they_run(local_ray: None) -> None:
    here = code_here()
    assert here.fingerprint
    assert not here.missing
    assert [(node.fingerprint, node.versions) for node in code_on_nodes()] == [(here.fingerprint, here.versions)]


def test_a_node_that_does_not_answer_counts_as_having_nothing(local_ray: None) -> None:
    (node,) = code_on_nodes(timeout_s=0.0)
    assert node.fingerprint is None
