"""Whole merges of models with different tokenizers: from YAML to an output that loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lazymerge import api
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import plan_recipe_file
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.saved_plans import load_plan
from lazymerge.engine.unfinished import plan_of_unfinished
from lazymerge.engine.verification import verify_output
from lazymerge.errors import InputError
from lazymerge.graph.node import Read
from safetensors.torch import load_file, save_file
from tokenizer_cases import KINDS, WIDTH, WORDS, add_special, bpe, make_model, unigram
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

RESOURCES = Resources(1 << 30, workers=2)


def write_models(folder: Path, kind: str = "bpe", **options: Any) -> dict[str, dict[str, Any]]:
    """a, b and c; b and c have a token that a lacks, b has two of its own."""
    tensors = {}
    for seed, (name, words) in enumerate(WORDS.items()):
        tokenizer = KINDS[kind](words)
        if name != "a":
            add_special(tokenizer, "<|im_start|>")
        if name == "b":
            add_special(tokenizer, "<only_b>")
            tokenizer.add_tokens(["plainb"])
        tensors[name] = make_model(folder / name, tokenizer, seed=seed, **options)
    return tensors


def recipe(folder: Path, **keys: Any) -> Path:
    document = {
        "merge_method": "linear",
        "models": [{"model": str(folder / name), "parameters": {"weight": 1}} for name in "abc"],
        "dtype": "float32",
        **keys,
    }
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(document))
    return path


def plan_of(folder: Path, **keys: Any) -> Plan:
    return plan_recipe_file(recipe(folder, **keys), RESOURCES)


def merged(plan: Plan, output: Path) -> dict[str, torch.Tensor]:
    run_plan(plan, output, fsync=False)
    return load_file(output / "model.safetensors")


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def vocabulary(folder: Path) -> dict[str, int]:
    numbers: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    return numbers


def row_by_the_rules(
    token: str,
    name: str,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    vocabularies: Mapping[str, Mapping[str, int]],
    base: str | None,
) -> torch.Tensor:
    """The mean of all models' rows in float64, gaps filled as mergekit fills them."""
    having = {
        model: tensors[model][name][vocabularies[model][token]].double()
        for model in tensors
        if token in vocabularies[model]
    }
    if len(having) > 1 and base in having:
        filled = having[base]
    elif having:
        filled = sum(having.values()) / len(having)
    else:
        filled = torch.zeros(WIDTH, dtype=torch.float64)
    return sum(having.get(model, filled) for model in tensors) / len(tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [None, "a", "b"])
def test_union(kind: str, base: str | None, tmp_path: Path) -> None:
    tensors = write_models(tmp_path, kind)
    vocabularies = {name: vocabulary(tmp_path / name) for name in "abc"}
    keys = {} if base is None else {"base_model": str(tmp_path / base)}
    values = merged(plan_of(tmp_path, tokenizer_source="union", **keys), tmp_path / "out")
    numbers = vocabulary(tmp_path / "out")
    assert set(numbers) == set().union(*vocabularies.values())
    first = vocabularies[base or "a"]
    assert {token: numbers[token] for token in first} == first
    for name in (EMBEDDING, HEAD):
        assert values[name].shape == (len(numbers), WIDTH)
        for token, number in numbers.items():
            wanted = row_by_the_rules(token, name, tensors, vocabularies, base)
            torch.testing.assert_close(values[name][number].double(), wanted, atol=1e-6, rtol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(numbers)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("hello world", "the lazy dog", "<|im_start|>hello"):
        assert tokenizer.unk_token_id is None
        again = tokenizer.decode(tokenizer(text)["input_ids"])
        assert again.replace(" ", "") == text.replace(" ", "")
    assert tokenizer("<|im_start|>")["input_ids"] == [numbers["<|im_start|>"]]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([[0, len(numbers) - 1]])).logits.shape[-1] == len(numbers)


def test_special_tokens_that_the_base_has_as_pieces(tmp_path: Path) -> None:
    """A text is split at them; at other added tokens, which the base reads in its own way, not."""
    make_model(tmp_path / "a", bpe(WORDS["a"]), seed=1)
    before = vocabulary(tmp_path / "a")
    pieces = sorted(token for token in before if token in "hello" and 1 < len(token) < 5)
    special, plain = "quick", pieces[0]
    assert f"Ġ{special}" in before
    other = add_special(bpe(WORDS["b"]), f"Ġ{special}")
    other.add_tokens([plain])
    for name in "bc":
        make_model(tmp_path / name, other, seed=2)
    merged(plan_of(tmp_path, tokenizer_source="union"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    numbers = tokenizer.get_vocab()
    assert {token: numbers[token] for token in before} == before
    assert tokenizer.tokenize(f"xĠ{special}x") == ["x", f"Ġ{special}", "x"]
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    properties = {each["content"]: each["special"] for each in added}
    assert properties[f"Ġ{special}"]
    assert plain not in properties


@pytest.mark.parametrize("base", [None, "a", "b"])
def test_heads_of_tied_models_are_their_embeddings(base: str | None, tmp_path: Path) -> None:
    """a has a head, b has none: its rows of the tokens that a lacks are those of its embedding."""
    tensors = write_models(tmp_path)
    for name in "bc":
        make_model(tmp_path / name, tokenizer_of(tmp_path / name), has_head=False)
        tensors[name] = load_file(tmp_path / name / "model.safetensors")
    vocabularies = {name: vocabulary(tmp_path / name) for name in "abc"}
    keys = {} if base is None else {"base_model": str(tmp_path / base)}
    tokens = {"<|im_start|>": {"source": str(tmp_path / "b"), "force": True}}
    plan = plan_of(tmp_path, tokenizer={"source": "union", "tokens": tokens}, **keys)
    assert not any("hold zeros" in notice for notice in plan.notices)
    values, numbers = merged(plan, tmp_path / "out"), vocabulary(tmp_path / "out")
    seen = {n: {**t, HEAD: t.get(HEAD, t[EMBEDDING])} for n, t in tensors.items()}
    for token, number in numbers.items():
        wanted = row_by_the_rules(token, HEAD, seen, vocabularies, base)
        if token in tokens:
            wanted = seen["b"][HEAD][vocabularies["b"][token]].double()
        torch.testing.assert_close(values[HEAD][number].double(), wanted, atol=1e-6, rtol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_tokens_that_only_models_of_other_slices_have(tmp_path: Path) -> None:
    write_models(tmp_path)
    path = tmp_path / "recipe.yml"
    sources = [[{"model": str(tmp_path / name), "layer_range": [0, 1]}] for name in "ab"]
    document = {
        "merge_method": "passthrough",
        "slices": [{"sources": each} for each in sources],
        "tokenizer_source": "union",
    }
    path.write_text(yaml.safe_dump(document))
    plan = plan_recipe_file(path, RESOURCES)
    values, numbers = merged(plan, tmp_path / "out"), vocabulary(tmp_path / "out")
    for name, model in ((EMBEDDING, "a"), (HEAD, "b")):
        lacking = [number for t, number in numbers.items() if t not in vocabulary(tmp_path / model)]
        assert lacking
        assert (values[name] == 0).all(dim=1).nonzero().flatten().tolist() == sorted(lacking)
        start = f"{len(lacking)} of its rows hold zeros: {tmp_path / model}, which it is merged"
        assert [n for n in plan.notices if n.startswith(start) and n.endswith(f": {name}")]

    tokens = {"<|im_start|>": {"source": str(tmp_path / "b")}}
    document["tokenizer"] = {"source": "union", "tokens": tokens}
    del document["tokenizer_source"]
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InputError) as caught:
        plan_recipe_file(path, RESOURCES)
    assert (
        f"its row from {tmp_path / 'b'}, and the tensor is merged from {tmp_path / 'a'} alone"
        in (str(caught.value))
    )


def test_base_and_model_as_source(tmp_path: Path) -> None:
    write_models(tmp_path)
    base = {"base_model": str(tmp_path / "b")}
    for source, model in (("base", "b"), (str(tmp_path / "c"), "c")):
        plan = plan_of(tmp_path, tokenizer={"source": source}, **base)
        merged(plan, tmp_path / model / "out")
        assert vocabulary(tmp_path / model / "out") == vocabulary(tmp_path / model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (tmp_path / model / "out" / name).read_bytes()
            assert content == (tmp_path / model / name).read_bytes()


def test_equal_vocabularies_are_read_as_without_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = bpe(WORDS["a"])
    for seed, name in enumerate("abc"):
        make_model(tmp_path / name, tokenizer, seed=seed)
    plain = plan_of(tmp_path)
    for source in ("union", "base", str(tmp_path / "c")):
        plan = plan_of(tmp_path, tokenizer_source=source)
        assert [node.id for node in plan.graph] == [node.id for node in plain.graph]
        assert plan.notices == plain.notices


def test_rows_behind_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = bpe(WORDS["a"])
    rows = tokenizer.get_vocab_size()
    stored = {
        name: make_model(tmp_path / name, tokenizer, seed=seed, rows=rows + seed)
        for seed, name in enumerate("abc")
    }
    plan = plan_of(tmp_path, tokenizer_source="base")
    assert any(f"has {rows + 2} rows for {rows} tokens" in notice for notice in plan.notices)
    assert all(node.rows is None for node in plan.graph if isinstance(node, Read))
    values = merged(plan, tmp_path / "out")
    wanted = sum(tensors[EMBEDDING][:rows].double() for tensors in stored.values()) / 3
    torch.testing.assert_close(values[EMBEDDING].double(), wanted, atol=1e-6, rtol=1e-6)


def test_chosen_rows_and_padding(tmp_path: Path) -> None:
    stored = write_models(tmp_path)
    vocabularies = {name: vocabulary(tmp_path / name) for name in "abc"}
    a, b, c = (str(tmp_path / name) for name in "abc")
    tokenizer = {
        "source": "union",
        "pad_to_multiple_of": 64,
        "tokens": {
            "<zero>": {"source": {"kind": "zero"}},
            "<like hello>": {"source": {"kind": "model_token", "model": b, "token": "hello"}},
            "<seventh>": {"source": {"kind": "model_token", "model": c, "token_id": 7}},
            "<|im_start|>": {"source": c, "force": True},
            "hello": {"source": a},
            "<nothing said>": None,
        },
    }
    plan = plan_of(tmp_path, tokenizer=tokenizer)
    values = merged(plan, tmp_path / "out")
    numbers = vocabulary(tmp_path / "out")
    assert len(numbers) % 64
    assert any("'<nothing said>'" in notice for notice in plan.notices)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in (EMBEDDING, HEAD):
        padded = -(-len(numbers) // 64) * 64
        assert values[name].shape == (padded, WIDTH)
        assert config["vocab_size"] == padded
        wanted = {
            "<zero>": torch.zeros(WIDTH),
            "<nothing said>": torch.zeros(WIDTH),
            "<like hello>": stored["b"][name][vocabularies["b"]["hello"]],
            "<seventh>": stored["c"][name][7],
            "<|im_start|>": stored["c"][name][vocabularies["c"]["<|im_start|>"]],
        }
        for token, row in wanted.items():
            torch.testing.assert_close(
                values[name][numbers[token]], row.float(), atol=1e-6, rtol=1e-6
            )
        mean = values[name][: len(numbers)].double().mean(0)  # linear: of the merged rows, too
        for row in values[name][len(numbers) :]:
            torch.testing.assert_close(row.double(), mean, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ({"<x>": {"source": "elsewhere"}}, "elsewhere is not a model that is merged"),
        (
            {"<x>": {"source": {"kind": "model_token", "model": "A", "token": "<none>"}}},
            "has no token '<none>'",
        ),
        (
            {"<x>": {"source": {"kind": "model_token", "model": "A", "token_id": 9999}}},
            "row 9999",
        ),
        ({"<only_b>": {"source": "A"}}, "has no such token"),
    ],
)
def test_sources_that_do_not_exist(tokens: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write_models(tmp_path)
    text = json.dumps(tokens).replace('"A"', json.dumps(str(tmp_path / "a")))
    with pytest.raises(InputError, match=problem):
        plan_of(tmp_path, tokenizer={"source": "union", "tokens": json.loads(text)})


def test_tokens_without_rows_leave_the_tokenizer(tmp_path: Path) -> None:
    """As of models whose tokenizer has a [PAD] that their embeddings have no row for."""
    tokenizer = add_special(bpe(WORDS["a"]), "<|last|>", "[PAD]")
    rows = tokenizer.get_vocab_size() - 1
    for seed, name in enumerate("abc"):
        config = {"pad_token": "[PAD]", "additional_special_tokens": ["<|last|>", "[PAD]"]}
        make_model(tmp_path / name, tokenizer, seed=seed, rows=rows, config=config)
    plan = plan_of(tmp_path, tokenizer_source="base")
    assert sum("[PAD]" in notice for notice in plan.notices) == 2
    values = merged(plan, tmp_path / "out")
    assert values[EMBEDDING].shape[0] == rows
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(loaded) == rows
    assert "[PAD]" not in loaded.get_vocab()


def test_a_tail_of_the_vocabulary_without_rows(tmp_path: Path) -> None:
    for make in (bpe, unigram):
        folder = tmp_path / make.__name__
        tokenizer = make(WORDS["a"])
        rows = tokenizer.get_vocab_size() - 3
        for seed, name in enumerate("abc"):
            make_model(folder / name, tokenizer, seed=seed, rows=rows)
        merged(plan_of(folder, tokenizer_source="base"), folder / "out")
        kept = vocabulary(folder / "out")
        assert kept == {t: n for t, n in tokenizer.get_vocab().items() if n < rows}


def test_a_model_without_a_tokenizer_has_the_base_vocabulary(tmp_path: Path) -> None:
    write_models(tmp_path)
    tokenizer = bpe(WORDS["a"])
    make_model(tmp_path / "c", tokenizer, seed=9)
    (tmp_path / "c" / "tokenizer.json").unlink()
    plan = plan_of(tmp_path, tokenizer_source="union")
    assert any("c has no tokenizer" in notice for notice in plan.notices)
    merged(plan, tmp_path / "out")
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        plan_of(tmp_path, tokenizer_source="union")


def test_numbers_in_the_config_that_are_others_now(tmp_path: Path) -> None:
    write_models(tmp_path)
    numbers = {name: vocabulary(tmp_path / name) for name in "ac"}
    moved = next(t for t, n in numbers["a"].items() if numbers["c"].get(t, n) != n)
    gone = next(token for token in numbers["a"] if token not in numbers["c"])
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    config |= {"bos_token_id": 1, "eos_token_id": numbers["a"][moved]}
    config |= {"pad_token_id": numbers["a"][gone], "sep_token_id": None}
    path.write_text(json.dumps(config))
    plan = plan_of(tmp_path, tokenizer_source=str(tmp_path / "c"))
    said = [notice for notice in plan.notices if "token_id" in notice]
    assert len(said) == 2
    assert f"eos_token_id: {numbers['a'][moved]}, which is {numbers['c'][moved]}" in said[0]
    assert f"pad_token_id: {numbers['a'][gone]}, which is absent" in said[1]
    assert not any(
        "token_id" in notice for notice in plan_of(tmp_path, tokenizer_source="union").notices
    )


def test_block_quantised_embeddings_are_refused(tmp_path: Path) -> None:
    write_models(tmp_path)
    path = tmp_path / "c" / "model.safetensors"
    tensors = load_file(path)
    rows = tensors[EMBEDDING].shape[0]
    tensors[EMBEDDING] = tensors[EMBEDDING].to(torch.float8_e4m3fn)
    tensors[f"{EMBEDDING}_scale_inv"] = torch.ones(-(-rows // 128), 1)
    save_file(tensors, path)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="block-quantised: its rows cannot be matched"):
        plan_of(tmp_path, tokenizer_source="union")


def test_widths_that_differ(tmp_path: Path) -> None:
    write_models(tmp_path)
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    tensors[EMBEDDING] = torch.zeros(tensors[EMBEDDING].shape[0], WIDTH + 1)
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    with pytest.raises(InputError, match="different shapes"):
        plan_of(tmp_path, tokenizer_source="union")


# ---------------------------------------------------------------- saved plans, resuming, verifying


def test_saved_plans(tmp_path: Path) -> None:
    write_models(tmp_path)
    plan = plan_of(tmp_path, tokenizer={"source": "union", "pad_to_multiple_of": 32})
    plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json", RESOURCES)
    assert again.fingerprint == plan.fingerprint
    values, others = merged(plan, tmp_path / "one"), merged(again, tmp_path / "two")
    assert all(torch.equal(values[name], others[name]) for name in values)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    bpe(["quite other words"]).save(str(tmp_path / "c" / "tokenizer.json"))
    with pytest.raises(InputError, match="tokenizer is not what it was"):
        load_plan(tmp_path / "plan.json", RESOURCES)


def test_saved_plans_whose_tables_were_altered(tmp_path: Path) -> None:
    write_models(tmp_path)
    plan_of(tmp_path, tokenizer_source="union").save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    reads = [node for node in document["graph"] if "rows" in node]
    reads[0]["rows"], reads[1]["rows"] = reads[1]["rows"], reads[0]["rows"]
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"altered|damaged"):
        load_plan(tmp_path / "plan.json", RESOURCES)
    reads[0]["row_count"] += 1
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="damaged"):
        load_plan(tmp_path / "plan.json", RESOURCES)


def test_fingerprints_follow_the_tokenizer(tmp_path: Path) -> None:
    write_models(tmp_path)
    prints = {
        plan_of(tmp_path, **keys).fingerprint
        for keys in (
            {"tokenizer_source": "base"},
            {"tokenizer_source": "union"},
            {"tokenizer_source": "union", "chat_template": "chatml"},
            {"tokenizer_source": "union", "chat_template": "llama3"},
            {"tokenizer": {"source": "union", "tokens": {"<t>": None}}},
        )
    }
    assert len(prints) == 5


class _StopError(Exception):
    pass


class _Stopping:
    """Ends a run after its first tensor."""

    def __getattr__(self, name: str) -> Any:
        def told(*arguments: Any) -> None:
            if name == "finished":
                raise _StopError

        return told


@pytest.mark.parametrize("source", ["union", "other"])
def test_resuming_from_elsewhere(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path)
    make_model(tmp_path / "other", add_special(bpe(WORDS["b"]), "<|im_start|>"))
    monkeypatch.chdir(tmp_path)
    keys = {"tokenizer_source": source}
    whole = merged(plan_of(tmp_path, **keys), tmp_path / "whole")
    with pytest.raises(_StopError):
        run_plan(plan_of(tmp_path, **keys), tmp_path / "out", fsync=False, observer=_Stopping())
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    report = run_plan(plan_of_unfinished(tmp_path / "out", RESOURCES), tmp_path / "out")
    assert report.resumed_tensors >= 1
    values = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(values[name], whole[name]) for name in whole)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    checked = verify_output(tmp_path / "out", recompute=99, resources=RESOURCES)
    assert checked.problems == ()
    assert len(checked.recomputed) == len(whole)
    assert checked.edited == ()


def test_resuming_after_a_tokenizer_has_changed(tmp_path: Path) -> None:
    write_models(tmp_path)
    plan = plan_of(tmp_path, tokenizer_source="union")
    with pytest.raises(_StopError):
        run_plan(plan, tmp_path / "out", fsync=False, observer=_Stopping())
    path = tmp_path / "c" / "tokenizer.json"
    before = path.read_bytes()
    document = json.loads(before)
    numbers = document["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]  # the output's tokenizer stays
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="a tokenizer has changed: its tokens have other numbers"):
        plan_of_unfinished(tmp_path / "out", RESOURCES)
    bpe(["quite other words"]).save(str(path))
    with pytest.raises(InputError, match=r"a tokenizer has changed: tokenizer\.json"):
        plan_of_unfinished(tmp_path / "out", RESOURCES)
    path.write_bytes(before)
    run_plan(plan_of_unfinished(tmp_path / "out", RESOURCES), tmp_path / "out", fsync=False)


# ------------------------------------------------------------------------------- chat templates

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye."},
]

RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Be kind.\n\nHello? [/INST] Hi.</s>[INST] Bye. [/INST]",
    "alpaca": (
        "Be kind.\n\n### Instruction:\nHello?\n\n### Response:\nHi.</s>\n\n"
        "### Instruction:\nBye.\n\n### Response:\n"
    ),
    "exaone": (
        "[|system|]Be kind.[|endofturn|]\n[|user|]Hello?\n[|assistant|]Hi.[|endofturn|]\n"
        "[|user|]Bye.\n[|assistant|]"
    ),
    "{{ messages[0]['content'] }} and more": "Be kind. and more",
}


@pytest.mark.parametrize(("template", "text"), RENDERED.items())
@pytest.mark.parametrize("source", [None, "union"])
def test_chat_templates(template: str, text: str, source: str | None, tmp_path: Path) -> None:
    for seed, (name, words) in enumerate(WORDS.items()):
        config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ 'another' }}"}
        tokenizer = bpe(words, ("<unk>", "<s>", "</s>"))
        rows = 300 if source is None else None
        make_model(tmp_path / name, tokenizer, seed=seed, config=config, rows=rows)
    keys = {} if source is None else {"tokenizer_source": source}
    merged(plan_of(tmp_path, chat_template=template, **keys), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered == text
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == tokenizer.chat_template


def test_the_template_that_most_models_have(tmp_path: Path) -> None:
    templates = {"a": "{{ 'one' }}", "b": " {{ 'two' }}\n", "c": "{{ 'two' }}"}
    for seed, (name, words) in enumerate(WORDS.items()):
        make_model(tmp_path / name, bpe(words), seed=seed, rows=300)
        if name == "b":  # in a file of its own, as newer versions write it
            (tmp_path / name / "chat_template.jinja").write_text(templates[name])
        else:
            named = [{"name": "other", "template": "x"}]
            named += [{"name": "default", "template": templates[name]}]
            config = {"chat_template": named if name == "c" else templates[name]}
            (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    merged(plan_of(tmp_path, chat_template="auto"), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'two' }}"
    (tmp_path / "c" / "tokenizer_config.json").unlink()
    merged(plan_of(tmp_path, chat_template="auto"), tmp_path / "first")
    assert (tmp_path / "first" / "chat_template.jinja").read_text() == "{{ 'one' }}"


def test_no_model_has_a_template(tmp_path: Path) -> None:
    write_models(tmp_path, rows=340)
    plan = plan_of(tmp_path, chat_template="auto")
    assert any("finds none" in notice for notice in plan.notices)
    merged(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


# -------------------------------------------------------------------------------- SentencePiece


def only_sentencepiece(folder: Path, contents: Mapping[str, bytes]) -> None:
    for seed, (name, content) in enumerate(contents.items()):
        make_model(folder / name, bpe(WORDS["a"]), seed=seed, rows=300)
        (folder / name / "tokenizer.json").unlink()
        (folder / name / "tokenizer.model").write_bytes(content)


def test_one_tokenizer_of_sentencepiece_is_copied(tmp_path: Path) -> None:
    only_sentencepiece(tmp_path, {"a": b"one", "b": b"one", "c": b"one"})
    for source in ("base", "union"):
        plan = plan_of(tmp_path, tokenizer_source=source)
        merged(plan, tmp_path / source)
        assert (tmp_path / source / "tokenizer.model").read_bytes() == b"one"
        assert not (tmp_path / source / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer_source": "union"},
        {"tokenizer": {"source": "base", "pad_to_multiple_of": 8}},
    ],
)
def test_tokenizers_of_sentencepiece_are_not_looked_into(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    last = b"two" if "tokenizer_source" in keys else b"one"
    only_sentencepiece(tmp_path, {"a": b"one", "b": b"one", "c": last})
    with pytest.raises(InputError, match=r"tokenizer\.model and no tokenizer\.json.*Convert it"):
        plan_of(tmp_path, **keys)


def test_stale_files_are_left_out(tmp_path: Path) -> None:
    write_models(tmp_path)
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"knows no new tokens")
    (tmp_path / "a" / "generation_config.json").write_text("{}")
    plan = plan_of(tmp_path, tokenizer_source="union")
    assert any(notice.startswith("tokenizer.model would not know") for notice in plan.notices)
    merged(plan, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.model" not in names
    assert "generation_config.json" in names
    merged(plan_of(tmp_path, tokenizer_source="base"), tmp_path / "base")
    assert (tmp_path / "base" / "tokenizer.model").read_bytes() == b"knows no new tokens"


def test_the_library_refuses_a_tokenizer(tmp_path: Path) -> None:
    write_models(tmp_path)
    path = tmp_path / "a" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"] = [["not", "there"]]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"a/tokenizer\.json: the tokenizers library refuses it"):
        plan_of(tmp_path, tokenizer_source="union")


def test_from_python_and_in_words(tmp_path: Path) -> None:
    write_models(tmp_path)
    plan = api.plan(recipe(tmp_path, tokenizer_source="union"), memory="1GiB")
    assert "tokenizer.json, tokenizer_config.json" in plan.summary()
    api.run(plan, tmp_path / "out", fsync=False)
    assert api.verify(tmp_path / "out").problems == ()


def test_a_normalizer_is_kept_and_not_run(tmp_path: Path) -> None:
    """Thirty replacements of a letter by two make a token of a gigabyte."""
    write_models(tmp_path)
    path = tmp_path / "a" / "tokenizer.json"
    document = json.loads(path.read_text())
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    document["normalizer"] = {"type": "Sequence", "normalizers": [doubling] * 40}
    ids = [token["id"] for token in document["added_tokens"]]
    document["added_tokens"].append(
        {
            "id": 1 + max([*document["model"]["vocab"].values(), *ids]),
            "content": "aaaaaaaa",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": True,
            "special": False,
        }
    )
    path.write_text(json.dumps(document))
    plan = plan_of(tmp_path, tokenizer_source="union")
    assert plan.tokenizer is not None
    written = json.loads(plan.tokenizer.files["tokenizer.json"])
    assert written["normalizer"] == document["normalizer"]


def test_a_piece_without_text(tmp_path: Path) -> None:
    """It has a row in its model, and no text is ever split into it: a union has none for it."""
    write_models(tmp_path)
    path = tmp_path / "b" / "tokenizer.json"
    document = json.loads(path.read_text())
    token = next(reversed(document["model"]["vocab"]))
    document["model"]["merges"] = [
        pair for pair in document["model"]["merges"] if "".join(pair).replace(" ", "") != token
    ]
    document["model"]["vocab"][""] = document["model"]["vocab"].pop(token)
    path.write_text(json.dumps(document))
    plan = plan_of(tmp_path, tokenizer_source="union")
    merged(plan, tmp_path / "out")
    assert "" not in vocabulary(tmp_path / "out")
