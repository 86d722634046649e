"""YAML as positioned trees: the same values as PyYAML's safe loader, and bounds that hold."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lazymerge.errors import Position, RecipeError
from lazymerge.recipe import source as source_module
from lazymerge.recipe.source import (
    DEPTH_LIMIT,
    NODE_LIMIT,
    PROBLEM_LIMIT,
    SIZE_LIMIT_BYTES,
    decode_source,
    read_source,
)


@pytest.fixture(params=["libyaml", "python"])
def _both_loaders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with PyYAML's C parser and with its Python one."""
    if request.param == "python":
        monkeypatch.setattr(source_module, "_LOADER", yaml.SafeLoader)
    elif not yaml.__with_libyaml__:
        pytest.skip("PyYAML without libyaml")


def problems_of(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_source(text, "r")
    return [line.removeprefix("r:") for line in str(caught.value).split("\n")]


TEXT = """\
# a comment
method: ties
models:
  - model: äöü   # two-byte characters count as one column
    weight: [0.1, {value: 2}]
  - {model: b, "quoted key": 'x'}
block: |
  several
  lines
"""

POSITIONS: list[tuple[tuple[str | int, ...], tuple[int, int], tuple[int, int]]] = [
    (("method",), (2, 1), (2, 9)),
    (("models",), (3, 1), (4, 3)),
    (("models", 0), (4, 5), (4, 5)),
    (("models", 0, "model"), (4, 5), (4, 12)),
    (("models", 0, "weight"), (5, 5), (5, 13)),
    (("models", 0, "weight", 0), (5, 14), (5, 14)),
    (("models", 0, "weight", 1, "value"), (5, 20), (5, 27)),
    (("models", 1), (6, 5), (6, 5)),
    (("models", 1, "quoted key"), (6, 16), (6, 30)),
    (("block",), (7, 1), (7, 8)),
]


@pytest.mark.usefixtures("_both_loaders")
@pytest.mark.parametrize(("steps", "key", "value"), POSITIONS)
def test_every_key_and_value_has_its_position(
    steps: tuple[str | int, ...], key: tuple[int, int], value: tuple[int, int]
) -> None:
    source = read_source(TEXT, "r")
    assert source.key_position(steps) == Position(*key)
    assert source.position(steps) == Position(*value)


def test_positions_of_what_is_not_there() -> None:
    source = read_source(TEXT, "r")
    assert source.position(()) == Position(2, 1)
    for steps in [("absent",), ("method", "x"), ("models", "0")]:
        with pytest.raises(KeyError):
            source.position(steps)
    with pytest.raises(IndexError):
        source.position(("models", 2))


SAME_AS_PYYAML = [
    TEXT,
    "a: 1e-4\nb: 1.0e-4\nc: 1_000\nd: 0x1f\ne: 010\nf: 1:30\ng: .inf\nh: ~\ni: on\nj: 'on'\n",
    "a: &x {p: 1, q: 2}\nb: *x\nc: {<<: *x, q: 3, r: 4}\n",
    "a: &x {p: 1, q: 2}\nb: &y {p: 5, s: 6}\nc: {q: 9, <<: [*x, *y]}\n",
    "a: &x {p: 1}\nb: &y {<<: *x, q: 2}\nc: {<<: *y}\n",
    "'<<': 1\n",
    "a: !!str 12\nb: !!float 1\nc: ! 12\nd: !!map {e: !!seq [!!null '']}\n",
    "\ufeffa: 1\n",
    "a: 1\r\nb: 2\r\n",
    "---\na: 1\n...\n",
    "a: 2001-01-01\nb: !!binary aGFsbG8=\n",
    'a: "\\e[31m"\n',
]


@pytest.mark.usefixtures("_both_loaders")
@pytest.mark.parametrize("text", SAME_AS_PYYAML)
def test_values_are_those_of_the_safe_loader(text: str) -> None:
    ours, theirs = read_source(text, "r").value, yaml.safe_load(text)
    assert ours == theirs
    assert list(ours) == list(theirs)


def test_the_first_of_several_merged_mappings_wins_and_own_keys_win_over_all() -> None:
    text = "x: &x {key: 1, other: 2}\ny: &y {key: 3, third: 4}\nz: {other: 5, <<: [*x, *y]}\n"
    assert read_source(text, "r").value["z"] == {"key": 1, "third": 4, "other": 5}


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(
    tree=st.dictionaries(st.text(), trees, min_size=1, max_size=4),
    flow=st.sampled_from([None, True, False]),
    style=st.sampled_from([None, '"', "'"]),
)
def test_any_tree_survives_a_round_trip(
    tree: dict[str, object], flow: bool | None, style: str | None
) -> None:
    text = yaml.safe_dump(tree, default_flow_style=flow, default_style=style, sort_keys=False)
    assert read_source(text, "r").value == yaml.safe_load(text)


def test_an_alias_stands_where_it_is_written_and_its_inside_where_it_is_defined() -> None:
    source = read_source("a: &x\n  p: 1\nb: *x\nc:\n  <<: *x\n", "r")
    assert source.position(("b",)) == Position(3, 4)
    assert source.position(("b", "p")) == Position(2, 6)
    assert source.key_position(("c", "p")) == Position(2, 3)


@pytest.mark.usefixtures("_both_loaders")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x [1, *x]\n", "1:11: the alias '*x' stands inside the value it repeats"),
        ("&x a: {<<: *x}\n", "1:12: << takes a mapping or a list of mappings"),
        ("&x\na: {<<: *x}\n", "2:9: the alias '*x' stands inside the value it repeats"),
        ("a: *x\n", "1:4: no anchor '&x' stands before this alias of it"),
        ("a: &x a\n*x : 1\n", "2:1: the key 'a' stands in this mapping twice, first in line 1"),
        ("<<: {a: 1}\n<<: {b: 1}\n", "2:1: the key '<<' stands in this mapping twice"),
        ("a: 1\nb:\n\t- c\n", "3:1: a tab stands in this line's indentation"),
        ("a:\n  b: 1\n \tc: 1\n", "3:2: a tab stands in this line's indentation"),
        ("a: b: c\n", "1:5: not valid YAML: mapping values are not allowed"),
        ("a: [", "1:5: not valid YAML"),
        ("a: &x 1\nb: &x 2\n", "2:4: the anchor '&x' is already in use above"),
        ("a: 'x\n", "2:1: not valid YAML: found unexpected end of stream"),
        (
            "a: 1\n---\n- 1\n",
            "3:1: a recipe is a mapping (merge_method: ..., models: ...), this is a list",
        ),
        ("a: &x 1\n---\nb: *x\n", "3:4: "),
        ("a: 1\n---\n" * 1001, "1999:1: more than 1000 documents"),
        ("", "1:1: the recipe is empty"),
        ("~\n", "1:1: the recipe is empty"),
        ("text\n", "1:1: a recipe is a mapping (merge_method: ..., models: ...), this is a single"),
        ("a: x\x00y\n", "1:5: the character '\\x00' is not allowed in YAML"),
        ("a: x\ufeffy\n", "1:5: the character '\\ufeff' is not allowed in YAML"),
        ("a: \ud800\n", "1:4: the character '\\ud800' is not allowed in YAML"),
        ("a: 0x" + "f" * 2000, "1:4: a number of more than 1,000 characters"),
        ("a: 1" + ":1" * 2000, "1:4: a number of more than 1,000 characters"),
        ("a: " + "9" * 2000, "1:4: a number of more than 1,000 characters"),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    problems = problems_of(text)
    assert len(problems) == 1
    assert problems[0].startswith(expected)


@pytest.mark.usefixtures("_both_loaders")
def test_an_escaped_surrogate_is_refused() -> None:
    (problem,) = problems_of('a: "\\ud800"\n')
    assert problem.startswith("1:")


def test_not_utf8_is_refused_at_its_place() -> None:
    with pytest.raises(RecipeError, match=r"^r:2:5: not UTF-8 text \(byte 0xff\)"):
        decode_source("a: 1\nbä: ".encode() + b"\xff\n", "r")
    assert decode_source("ä: 1\n".encode(), "r") == "ä: 1\n"


def bomb_of_lists(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} [{aliases}]")
    return "\n".join(lines) + "\n"


def bomb_of_merges(levels: int) -> str:
    lines = ["a0: &a0 {x0: 1, x1: 1, x2: 1, x3: 1}"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} {{<<: [{aliases}], y{level}: [{aliases}]}}")
    return "\n".join(lines) + "\n"


@pytest.mark.usefixtures("_both_loaders")
@pytest.mark.parametrize("bomb", [bomb_of_lists(30), bomb_of_merges(30)], ids=["lists", "merges"])
def test_alias_bombs_end_quickly_in_one_error(bomb: str) -> None:
    started = time.process_time()
    (problem,) = problems_of(bomb)
    assert "more than 100,000 values, counting what each alias repeats" in problem
    assert time.process_time() - started < 5.0


def test_aliases_may_repeat_up_to_the_limit() -> None:
    source = read_source(bomb_of_lists(4), "r")
    assert source.root.size == 1 + 4 + sum(10**n for n in range(1, 5)) + sum(
        sum(10**n for n in range(level + 1)) for level in range(4)
    )
    assert source.root.size < NODE_LIMIT
    plain = source.value["a3"]
    assert isinstance(plain, list)
    assert len(plain) == 10


TAG = "%TAG !{}! tag:x,2000:{}"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x85", "\u2028", "\u2029"])
def test_many_directives_end_quickly_in_one_error(end: str) -> None:
    """libyaml compares each with all before it: half a million took minutes."""
    for mark in ("", "\ufeff"):
        text = mark + "".join(TAG.format(n, n) + end for n in range(200_000)) + "--- \na: 1\n"
        started = time.process_time()
        (problem,) = problems_of(text)
        assert "more than 10 directives (lines that begin with %); remove them" in problem
        assert time.process_time() - started < 2.0
    if "\n" in end:
        assert problem.startswith("11:1: ")


@pytest.mark.usefixtures("_both_loaders")
def test_a_few_directives_and_any_other_percent_signs_are_read() -> None:
    text = "%YAML 1.1\n" + "".join(TAG.format(n, n) + "\n" for n in range(9)) + "---\n"
    assert read_source(text + "a: 1\n", "r").value == {"a": 1}
    lines = " %b\n" * 1000
    assert read_source(f"a: |\n{lines}c: '%'\n", "r").value == {"a": "%b\n" * 1000, "c": "%"}


@pytest.mark.usefixtures("_both_loaders")
@pytest.mark.parametrize("opening", ["[", "{", "- ", "? ", "{a: "])
def test_deep_nesting_ends_quickly_in_one_error(opening: str) -> None:
    started = time.process_time()
    assert len(problems_of("a:\n " + opening * 20_000)) == 1
    assert time.process_time() - started < 5.0


def test_nesting_up_to_the_limit_is_read() -> None:
    inside = DEPTH_LIMIT - 1
    read_source("a: " + "[" * inside + "]" * inside, "r")
    (problem,) = problems_of("a: " + "[" * (inside + 1) + "]" * (inside + 1))
    assert problem == f"1:{4 + inside}: nested more than {DEPTH_LIMIT} levels deep"


def test_large_texts_are_refused() -> None:
    for text in ["#" * (SIZE_LIMIT_BYTES + 1), "#" + "ä" * (SIZE_LIMIT_BYTES // 2)]:
        assert problems_of(text) == [" larger than a recipe may be (10,000,000 bytes)"]
        with pytest.raises(RecipeError, match="larger than a recipe may be"):
            decode_source(text.encode(), "r")


def test_many_problems_are_cut_short() -> None:
    problems = problems_of("\n".join(f"{number}: x" for number in range(5000)))
    assert len(problems) == PROBLEM_LIMIT + 1
    assert problems[-1].endswith("too many problems; the rest is not shown")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,? \n\t\r<=0.1\\\ufeff\x00é", max_size=60))
def test_no_text_raises_anything_but_a_recipe_error(text: str) -> None:
    # libyaml allows a little more than PyYAML's own parser: each is compared with itself.
    source = problems = None
    try:
        source = read_source(text, "r")
    except RecipeError as error:
        problems = error.problems
    if source is not None:
        assert source.value == yaml.load(text, Loader=source_module._LOADER)
        return
    assert problems
    lines = text.count("\n") + text.count("\r") + 1
    for problem in problems:
        assert problem.position is not None
        assert 1 <= problem.position.line <= lines
