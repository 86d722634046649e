"""`evaluate`: one tensor's value of a setting."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lazymerge.recipe import Condition, Conditions, Gradient, evaluate

numbers = st.floats(-1e6, 1e6)
depths = st.floats(0.0, 1.0)


@settings(deadline=None)
@given(value=st.one_of(numbers, st.booleans(), st.integers(), st.text()), depth=depths)
def test_a_scalar_is_its_own_value_everywhere(
    value: float | bool | int | str, depth: float
) -> None:
    assert evaluate(value, "model.norm.weight", depth) is value


@settings(deadline=None)
@given(values=st.lists(numbers, min_size=1, max_size=8))
def test_a_gradient_starts_and_ends_exactly_at_its_end_values(values: list[float]) -> None:
    gradient = Gradient(tuple(values))
    assert evaluate(gradient, "x", 0.0) == values[0]
    assert evaluate(gradient, "x", 1.0) == values[-1]


@settings(deadline=None)
@given(values=st.lists(numbers, min_size=2, max_size=8), depth=depths)
def test_a_gradient_is_linear_between_neighbours(values: list[float], depth: float) -> None:
    result = evaluate(Gradient(tuple(values)), "x", depth)
    assert isinstance(result, float)
    lower = min(int(depth * (len(values) - 1)), len(values) - 2)
    start, end = values[lower], values[lower + 1]
    fraction = depth * (len(values) - 1) - lower
    assert result == pytest.approx(start + fraction * (end - start), rel=1e-12, abs=1e-9)
    assert min(start, end) <= result <= max(start, end)


@settings(deadline=None)
@given(
    values=st.lists(numbers, min_size=1, max_size=6),
    depth=depths,
    scale=st.floats(-100, 100),
    shift=numbers,
)
def test_a_gradient_commutes_with_affine_maps(
    values: list[float], depth: float, scale: float, shift: float
) -> None:
    plain = evaluate(Gradient(tuple(values)), "x", depth)
    mapped = evaluate(Gradient(tuple(scale * value + shift for value in values)), "x", depth)
    assert isinstance(plain, float)
    assert mapped == pytest.approx(scale * plain + shift, rel=1e-9, abs=1e-4)


@settings(deadline=None)
@given(value=numbers, count=st.integers(1, 9), depth=depths)
def test_a_constant_gradient_is_that_constant_to_the_last_bit(
    value: float, count: int, depth: float
) -> None:
    assert evaluate(Gradient((value,) * count), "x", depth) == value


@settings(deadline=None)
@given(values=st.lists(numbers, min_size=2, max_size=6).map(sorted), layers=st.integers(2, 40))
def test_a_rising_gradient_rises_over_the_layers(values: list[float], layers: int) -> None:
    over_layers = [
        evaluate(Gradient(tuple(values)), "x", layer / (layers - 1)) for layer in range(layers)
    ]
    for before, after in pairwise(over_layers):
        assert isinstance(before, float)
        assert isinstance(after, float)
        assert after >= before - 1e-9


@pytest.mark.parametrize(
    ("depth", "expected"), [(0.0, "a"), (0.49, "a"), (0.5, "b"), (0.99, "b"), (1.0, "c")]
)
def test_a_gradient_of_texts_or_booleans_selects(depth: float, expected: str) -> None:
    assert evaluate(Gradient(("a", "b", "c")), "x", depth) == expected
    booleans = evaluate(Gradient((True, False, True)), "x", depth)
    assert booleans is {"a": True, "b": False, "c": True}[expected]


NAMES = st.sampled_from(
    ["model.layers.0.mlp.up_proj.weight", "model.layers.11.self_attn.q_proj.weight", "lm_head"]
)
FILTERS = st.sampled_from([None, "*", "mlp", "self_attn", "layers.1", "weight", "absent", ""])


@settings(deadline=None)
@given(
    filters=st.lists(FILTERS, max_size=6),
    name=NAMES,
    depth=depths,
)
def test_the_first_condition_that_matches_decides(
    filters: list[str | None], name: str, depth: float
) -> None:
    conditions = Conditions(tuple(Condition(i, text) for i, text in enumerate(filters)))
    matching = [i for i, text in enumerate(filters) if text in (None, "*") or str(text) in name]
    assert evaluate(conditions, name, depth) == (matching[0] if matching else None)


def test_a_condition_may_hold_a_gradient() -> None:
    conditions = Conditions((Condition(Gradient((0.0, 1.0)), "mlp"), Condition(0.25)))
    assert evaluate(conditions, "layers.3.mlp.up", 0.75) == 0.75
    assert evaluate(conditions, "layers.3.attn.q", 0.75) == 0.25


def test_a_false_or_zero_value_is_a_value_and_not_a_missing_match() -> None:
    assert evaluate(Conditions((Condition(0.0, "a"), Condition(1.0))), "a", 0.0) == 0.0
    assert evaluate(Conditions((Condition(False), Condition(True))), "a", 0.0) is False


def test_a_star_inside_a_longer_filter_is_an_ordinary_character() -> None:
    assert evaluate(Conditions((Condition(1.0, "mlp*"),)), "layers.0.mlp.up", 0.0) is None
