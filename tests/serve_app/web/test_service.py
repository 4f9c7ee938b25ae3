"""Which of the served models a request means."""

from __future__ import annotations

import pytest

from serve_app.web.service import ApiError, served_name

SERVED = {"small": "org/internlm2-1_8b-reward", "team/big": "/models/internlm2-7b-reward/"}


@pytest.mark.parametrize(
    ("requested", "name"),
    [
        (None, "small"),
        ("", "small"),
        ("small", "small"),
        ("org/internlm2-1_8b-reward", "small"),
        ("internlm2-1_8b-reward", "small"),
        ("team/big", "team/big"),
        ("big", "team/big"),
        ("/models/internlm2-7b-reward/", "team/big"),
        ("internlm2-7b-reward", "team/big"),
    ],
)
def test_a_name_an_id_or_the_last_part_of_either(requested: str | None, name: str) -> None:
    assert served_name(requested, SERVED) == name


@pytest.mark.parametrize("requested", ["other/small", "other/internlm2-7b-reward", "team", "org", "Small"])
def test_another_model_is_refused_and_those_served_are_named(requested: str) -> None:
    with pytest.raises(ApiError, match="served: 'small', 'team/big'") as caught:
        served_name(requested, SERVED)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_the_last_part_of_several_is_none_of_them() -> None:
    served = {"one/rm": "a/first", "two/rm": "b/second"}
    with pytest.raises(ApiError):
        served_name("rm", served)
    assert served_name("two/rm", served) == "two/rm"
    assert served_name("rm", {"rm": "a/x", "other/rm": "b/y"}) == "rm"
