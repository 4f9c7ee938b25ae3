"""Clusters that cannot be joined are one clear error."""

from __future__ import annotations

import pytest

from cluster.connect import ClusterError, connect


@pytest.mark.parametrize("address", ["auto", "foo"])
def test_an_address_without_a_cluster_is_an_error_that_names_it(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    if ray.is_initialized():
        pytest.skip("this process is connected to Ray already")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=f"--address {address} cannot be joined"), connect(address):
        pass
