"""The record itself: what cannot be a recipe is refused where it is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.tiny import BASE, RECIPE, TinyConfig

from distkit.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("best", "correct", "does not say which evaluation is best"),
        ("best", ("correct", "max", 1), "does not say which evaluation is best"),
        ("best", None, "does not say which evaluation is best"),
        ("best", ("correct", "maximum"), "does not say which evaluation is best"),
        ("best", ("correct", 1), "does not say which evaluation is best"),
        ("presets", {}, "has no presets"),
        ("presets", {"default": 3}, "preset default of recipe tiny is no configuration"),
        ("presets", {"default": TinyConfig}, "preset default of recipe tiny is no configuration"),
        ("config", BASE, "has no configuration class"),
        ("config", dict, "has no configuration class"),
        ("name", "../../evil", "no folder's"),
        ("name", "a/b", "no folder's"),
        ("name", "", "no folder's"),
        ("name", None, "no folder's"),
        ("name", "x" * 101, "no folder's"),
    ],
)
def test_what_is_no_recipe_is_refused(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        replace(RECIPE, **{field: value})
    assert len(str(caught.value).splitlines()) < 10
