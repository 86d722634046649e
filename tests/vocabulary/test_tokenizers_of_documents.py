"""Tokenizers in recipes of several documents: what comes of one merge after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import signatures
from lazymerge.engine.reference import run_reference
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.saved_plans import load_plan
from lazymerge.engine.unfinished import plan_of_unfinished
from lazymerge.engine.verification import verify_output
from lazymerge.errors import InputError
from lazymerge.graph.compile import seed_of_part
from lazymerge.graph.node import Reduce
from lazymerge.graph.operations import placed_rows
from lazymerge.recipe import parse_recipe
from safetensors.torch import load_file
from tokenizer_cases import WORDS, add_special, bpe, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

RESOURCES = Resources(1 << 30, workers=2)

UNION = {"tokenizer_source": "union"}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """a, b, c and d, whose vocabularies overlap."""
    words = {**WORDS, "d": ["hello dog", "quite other words"]}
    special = {"a": ["<ab>", "<a>"], "b": ["<ab>", "<bc>"], "c": ["<bc>", "<c>"], "d": ["<d>"]}
    for seed, (name, texts) in enumerate(words.items()):
        tokenizer = add_special(bpe(texts), *special[name])
        config = {"chat_template": "{{ 'of a' }}"} if name == "a" else {}
        rows = tokenizer.get_vocab_size() + (3 if name == "d" else 0)
        make_model(tmp_path / name, tokenizer, seed=seed, config=config, rows=rows)
    return {name: str(tmp_path / name) for name in words}


def document(method: str, names: list[str], **keys: Any) -> dict[str, Any]:
    """A merge of models, the first of which is the base where the method has one."""
    parameters: dict[str, Any] = {"slerp": {"t": 0.3}, "passthrough": {}}.get(
        method, {"weight": 0.4, "density": 0.6}
    )
    if method in ("linear", "task_arithmetic"):
        parameters = {"weight": 0.4}
    made = {"merge_method": method, "parameters": parameters, "seed": 3}
    if method in ("linear", "passthrough"):
        return {**made, "models": [{"model": name} for name in names], **keys}
    return {**made, "base_model": names[0], "models": [{"model": n} for n in names[1:]], **keys}


def plan_of(documents: list[dict[str, Any]], folder: Path) -> Plan:
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return lazymerge.plan(path).with_resources(RESOURCES)


def in_steps(documents: list[dict[str, Any]], folder: Path) -> Path:
    """One merge after the other, each written in the dtype that it computes in."""
    places: dict[str, str] = {}
    output = folder
    for number, whole in enumerate(documents):
        name = whole.get("name")
        alone = json.loads(json.dumps({k: v for k, v in whole.items() if k != "name"}))
        text = json.dumps(alone)
        for known, place in places.items():
            text = text.replace(json.dumps(known), json.dumps(place))
        alone = json.loads(text)
        if name is not None:
            parsed = parse_recipe(yaml.safe_dump(whole), "recipe.yml", signatures())
            alone |= {"seed": seed_of_part(parsed), "out_dtype": "float32"}
            plan = plan_of([alone], folder)
            computed = {plan.graph.block_node(write.source).dtype for write in plan.graph.writes}
            alone["out_dtype"] = "float64" if "F64" in computed else "float32"
        output = folder / f"step {number}"
        run_plan(plan_of([alone], folder), output, fsync=False)
        if name is not None:
            places[name] = str(output)
    return output


def check(documents: list[dict[str, Any]], folder: Path) -> Plan:
    """That all at once gives the bytes of one after the other."""
    expected = in_steps(documents, folder)
    plan = plan_of(documents, folder)
    run_plan(plan, folder / "out", fsync=False)
    found = load_file(folder / "out" / "model.safetensors")
    wanted = load_file(expected / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in (folder / "out", expected)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    configs = [
        json.loads((each / "config.json").read_text()) for each in (folder / "out", expected)
    ]
    assert configs[0] == configs[1]
    names = [{p.name for p in each.iterdir()} for each in (folder / "out", expected)]
    assert names[0] == names[1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / "out" / name).read_bytes() == (expected / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert loaded(torch.tensor([[0, 5]])).logits.shape[-1] == configs[0]["vocab_size"]
    return plan


@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "slerp", "ties", "dare_ties", "passthrough"]
)
@pytest.mark.parametrize("last", ["base", "model"])
def test_the_vocabulary_of_a_merge_is_matched(
    models: dict[str, str], method: str, last: str, tmp_path: Path
) -> None:
    a, b, c, d = models.values()
    names = [a] if method == "passthrough" else [a, b]
    inner = document(method, names, name="inner", tokenizer_source="union")
    order = ["inner", c, d] if last == "base" else [c, "inner", d]
    check([inner, document("task_arithmetic", order, out_dtype="float32", **UNION)], tmp_path)


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer_source": "inner"},
        {"tokenizer_source": "base"},
        {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
        {
            "tokenizer": {
                "source": "union",
                "tokens": {
                    "<new>": {"source": {"kind": "model_token", "model": "inner", "token": "<ab>"}},
                    "<c>": {"source": {"kind": "zero"}, "force": True},
                    "<a>": {"source": "inner", "force": True},
                },
            },
            "chat_template": "chatml",
        },
        {"tokenizer_source": "union", "chat_template": "auto"},
    ],
)
@pytest.mark.parametrize("base", ["inner", "c"])
def test_every_form(
    models: dict[str, str], keys: dict[str, Any], base: str, tmp_path: Path
) -> None:
    a, b, c, _ = models.values()
    inner = document(
        "slerp",
        [a, b],
        name="inner",
        tokenizer={"source": "union", "tokens": {"<t>": None}, "pad_to_multiple_of": 16},
    )
    order = ["inner", c] if base == "inner" else [c, "inner"]
    check([inner, document("ties", order, out_dtype="bfloat16", **keys)], tmp_path)


def test_the_output_has_the_tokenizer_of_its_base(models: dict[str, str], tmp_path: Path) -> None:
    """The last merge says nothing of a tokenizer; its base, or its only model, has one made."""
    a, b, c, d = models.values()
    one = document("linear", [a, b, c], name="one", tokenizer_source="union")
    two = document("linear", [d, "one"], name="two", tokenizer_source="one", chat_template="chatml")
    last = document("slerp", ["one", "two"], out_dtype="float32")
    plan = check([one, two, last], tmp_path)
    assert "<c>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert plan.tokenizer is not None
    assert [*plan.tokenizer.merges] == ["one", "two"]


def test_a_merge_without_a_tokenizer_has_its_bases(models: dict[str, str], tmp_path: Path) -> None:
    a, _, c, _ = models.values()
    inner = document("passthrough", [a], name="inner")
    outer = document("slerp", ["inner", c], name="outer", tokenizer_source="base")
    check([inner, outer, document("linear", [c, "outer"], out_dtype="float32", **UNION)], tmp_path)


def test_three_deep(models: dict[str, str], tmp_path: Path) -> None:
    a, b, c, d = models.values()
    documents = [
        document("dare_ties", [a, b], name="one", tokenizer_source="union"),
        document("slerp", [c, "one"], name="two", tokenizer_source="union"),
        document("slerp", [d, "two"], out_dtype="float32", tokenizer_source="union"),
    ]
    plan = check(documents, tmp_path)
    rows = {write.name: write.shape[0] for write in plan.graph.writes}
    assert rows[EMBEDDING] == rows[HEAD] == len(AutoTokenizer.from_pretrained(tmp_path / "out"))


def test_a_merge_that_only_gives_its_tokenizer(models: dict[str, str], tmp_path: Path) -> None:
    a, b, c, d = models.values()
    inner = document("linear", [a, b], name="inner", tokenizer_source="union")
    last = document("slerp", [c, d], out_dtype="float32", tokenizer_source="inner")
    check([inner, last], tmp_path)


class _StopError(Exception):
    pass


class _Stopping:
    """Ends a run after its first tensor."""

    def __getattr__(self, name: str) -> Any:
        def told(*arguments: Any) -> None:
            if name == "finished":
                raise _StopError

        return told


def test_saved_resumed_and_verified(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, b, c, _ = models.values()
    monkeypatch.chdir(tmp_path)
    documents = [
        document("dare_ties", [b, c], name="inner", tokenizer_source="a"),
        document("slerp", [c, "inner"], out_dtype="float32", tokenizer_source="union"),
    ]
    plan = plan_of(documents, tmp_path)
    run_plan(plan, tmp_path / "whole", fsync=False)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json", RESOURCES).fingerprint == plan.fingerprint
    with pytest.raises(_StopError):
        run_plan(plan, tmp_path / "out", fsync=False, observer=_Stopping())
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    run_plan(plan_of_unfinished(tmp_path / "out", RESOURCES), tmp_path / "out", fsync=False)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    checked = verify_output(tmp_path / "out", recompute=99, resources=RESOURCES)
    assert checked.problems == ()
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a" / "tokenizer.json"
    content = json.loads(path.read_text())
    numbers = content["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokenizer is not what it was"):
        load_plan(tmp_path / "plan.json", RESOURCES)


@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "slerp", "nuslerp", "multislerp", "karcher"]
)
@pytest.mark.parametrize("weight", [0.4, -0.4])
def test_combinations_are_not_held(
    models: dict[str, str],
    method: str,
    weight: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They need no memory for the embedding, and give the bytes that holding it gives."""
    a, b, c, _ = models.values()
    inner = document("linear", [a, b], name="inner", tokenizer_source="union")
    if method != "linear":
        inner = {**document("slerp", [a, b], name="inner", **UNION), "merge_method": method}
    inner["parameters"] = {"t": 0.3} if method == "slerp" else {"weight": weight}
    if method in ("nuslerp", "multislerp", "karcher"):
        del inner["base_model"]
        inner["models"] = [{"model": a}, {"model": b}]
    if method == "karcher":
        del inner["parameters"]
    tokenizer = {"source": "union", "tokens": {"<none>": None}}
    last = document("linear", ["inner", c], out_dtype="float32", tokenizer=tokenizer)
    last["parameters"] = {"weight": -1, "normalize": False}
    plan = check([inner, last], tmp_path)
    assert "held_rows" not in {getattr(node, "operation", None) for node in plan.graph}
    monkeypatch.setattr(placed_rows, "_keeps_rows", lambda graph, node: False)
    held = plan_of([inner, last], tmp_path)
    operations = [getattr(node, "operation", None) for node in held.graph]
    assert operations.count("held_rows") == 2
    run_plan(held, tmp_path / "held", fsync=False)
    contents = [
        (tmp_path / each / "model.safetensors").read_bytes() for each in ("out", "held", "step 1")
    ]
    assert contents[0] == contents[1] == contents[2]


def test_memory_for_what_is_held_is_planned(models: dict[str, str], tmp_path: Path) -> None:
    a, b, c, _ = models.values()
    inner = document("ties", [a, b], name="inner", tokenizer_source="union")
    plan = plan_of([inner, document("slerp", [c, "inner"], **UNION)], tmp_path)
    held = [n for n in plan.graph if isinstance(n, Reduce) and n.operation == "held_rows"]
    assert len(held) == 2
    for node in held:
        operation = placed_rows.HeldRows()
        needed = operation.statistics_bytes(1, dict(node.parameters), node.element_count, 1, 8)
        assert needed >= 2 * 8 * node.element_count


def test_the_reference_agrees(models: dict[str, str], tmp_path: Path) -> None:
    a, b, c, _ = models.values()
    inner = document("ties", [a, b], name="inner", tokenizer_source="union")
    padded = {"source": "union", "pad_to_multiple_of": 64}
    last = document("slerp", [c, "inner"], out_dtype="float32", tokenizer=padded)
    plan = plan_of([inner, last], tmp_path)
    expected = run_reference(plan.graph)
    for kernels in ("native", "torch"):
        resources = Resources(1 << 30, workers=2, kernels=kernels)
        run_plan(plan.with_resources(resources), tmp_path / kernels, fsync=False)
        found = load_file(tmp_path / kernels / "model.safetensors")
        for name, values in expected.items():
            torch.testing.assert_close(found[name].double(), values, atol=1e-6, rtol=1e-6)
    one, two = (tmp_path / kernels / "model.safetensors" for kernels in ("native", "torch"))
    assert one.read_bytes() == two.read_bytes()


def test_what_is_cut_cannot_be_matched(models: dict[str, str], tmp_path: Path) -> None:
    a, b, c, _ = models.values()
    path = tmp_path / "recipe.yml"
    inner = document("linear", [b, a], name="inner")
    documents = [inner, document("slerp", [c, "inner"], **UNION)]
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    with pytest.raises(InputError, match="give the merge inner a tokenizer of its own"):
        lazymerge.plan(path, truncate_embeddings=True)
