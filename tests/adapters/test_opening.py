"""What references mean, what adapters are read as, and what is refused and why."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.adapters import config as config_module
from lazymerge.adapters import open_model, split_reference
from lazymerge.adapters.config import AdapterConfig, _is_simple, read_adapter_config
from lazymerge.adapters.names import Part, part_of
from lazymerge.api import inspect
from lazymerge.checkpoint.tensor import LowRank
from lazymerge.cli.inspect import inspection_view
from lazymerge.cli.plan_view import plan_view
from lazymerge.engine.resources import Resources
from lazymerge.errors import DoesNotFitError, InputError, LazymergeError
from rich.console import Console
from safetensors.torch import load_file, save_file

from conftest import write_adapter, write_checkpoint
from merging import bits, plan_of, run

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    f"{Q}.weight": (8, 8),
    f"{Q}.bias": (8,),
    f"{UP}.weight": (12, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
WRAPPED = "base_model.model."


def tensors_of(
    module: str, shape: tuple[int, int] = (12, 8), rank: int = 2
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(module))
    return {
        f"{module}.lora_A.weight": torch.randn(rank, shape[1], generator=generator),
        f"{module}.lora_B.weight": torch.randn(shape[0], rank, generator=generator),
    }


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model `base` and an adapter `tuned`, in the current folder."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    write_checkpoint(tmp_path / "base", tensors, {"model_type": "llama", "vocab_size": 20})
    write_adapter(tmp_path / "tuned", tensors_of(WRAPPED + UP), r=2, lora_alpha=8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changes(reference: str) -> dict[str, LowRank]:
    tensors = open_model(reference).tensors
    return {name: tensor.change for name, tensor in tensors.items() if tensor.change is not None}


# --------------------------------------------------------------------------- references


def test_a_model_with_an_adapter(models: Path) -> None:
    opened = open_model("base+tuned")
    assert opened.reference == "base+tuned"
    assert opened.folder == str(models / "base")
    assert opened.adapter is not None
    facts = opened.adapter
    assert (facts.reference, facts.folder, facts.kind) == ("tuned", str(models / "tuned"), "LoRA")
    assert (facts.ranks, facts.changed, facts.replaced) == ((2,), 1, 0)
    assert facts.parameter_count == 2 * (12 + 8)
    assert [file.path for file in facts.files] == [
        "adapter_model.safetensors",
        "adapter_config.json",
    ]
    (change,) = changes("base+tuned").values()
    assert (change.rank, change.scaling, change.is_transposed) == (2, 4.0, False)
    plain = open_model("base")
    assert plain.adapter is None
    config = (models / "tuned" / "adapter_config.json").stat().st_size
    with (models / "tuned" / "adapter_model.safetensors").open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    assert opened.header_bytes_read == plain.header_bytes_read + config + header


@pytest.mark.parametrize("name", ["a+b", "+a", "a+", "base+tuned"])
def test_a_folder_of_that_name_is_that_folder(name: str, models: Path) -> None:
    write_checkpoint(models / name, {"w": torch.zeros(3)})
    opened = open_model(name)
    assert opened.adapter is None
    assert list(opened.tensors) == ["w"]
    assert split_reference(name) == (name, None)


def test_several_marks(models: Path) -> None:
    """The one between a model and an adapter that are there."""
    (models / "base").rename(models / "ba+se")
    (models / "tuned").rename(models / "tu+ned")
    assert open_model("ba+se+tu+ned").adapter is not None
    assert split_reference("ba+se+tu+ned") == ("ba+se", "tu+ned")
    assert split_reference("ba+se+new") == ("ba+se", "new")
    with pytest.raises(InputError, match="can be read in several ways"):
        open_model("ba+si+other")


@pytest.mark.parametrize("reference", ["+tuned", "base+", "+"])
def test_half_a_reference(reference: str, models: Path) -> None:
    with pytest.raises(InputError, match=r"names no model, or no adapter\. Write MODEL\+ADAPTER"):
        open_model(reference)


@given(st.text())
def test_any_text_is_a_reference_or_an_error(text: str) -> None:
    with contextlib.suppress(InputError):
        open_model(f"{text}+{text}")


# ------------------------------------------------------------------------------- names

NAMES = {
    "a.q.lora_A.weight": Part("a.q.weight", "A"),
    "a.q.lora_A.default.weight": Part("a.q.weight", "A"),
    "a.q.lora_B.my_adapter.weight": Part("a.q.weight", "B"),
    "a.wte.lora_embedding_A": Part("a.wte.weight", "A", True),
    "a.wte.lora_embedding_B.default": Part("a.wte.weight", "B", True),
    "a.q.lora_magnitude_vector": Part("a.q.weight", "magnitude"),
    "a.q.lora_magnitude_vector.weight": Part("a.q.weight", "magnitude"),
    "a.q.lora_magnitude_vector.default.weight": Part("a.q.weight", "magnitude"),
    "a.head.weight": Part("a.head.weight", "whole"),
    "a.head.modules_to_save.weight": Part("a.head.weight", "whole"),
    "a.head.modules_to_save.default.weight": Part("a.head.weight", "whole"),
    "a.head.modules_to_save.default.out.bias": Part("a.head.out.bias", "whole"),
    "a.q.base_layer.bias": Part("a.q.bias", "whole"),
    "a.q.lora_B.bias": None,
    "a.q.lora_B.default.bias": None,
    "a.q.lora_A.x.y.weight": None,
    "a.q.lora_diag": None,
    "a.embed.token_adapter.trainable_tokens_delta": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert part_of(name) == NAMES[name]


@given(st.text())
def test_any_name_is_something_or_nothing(name: str) -> None:
    part = part_of(name)
    assert part is None or len(part.target) <= len(name)


EXPORTS = {
    "by peft": lambda name: WRAPPED + name,
    "unwrapped": lambda name: name,
    "of a compiled model": lambda name: f"{WRAPPED}_orig_mod.{name}",
    "of a bare model": lambda name: WRAPPED + name.removeprefix("model."),
    "of a model within another": lambda name: f"{WRAPPED}language_model.{name}",
}


@pytest.mark.parametrize("export", EXPORTS)
def test_what_exports_put_before_names(export: str, models: Path) -> None:
    named = EXPORTS[export]
    tensors = tensors_of(named(UP)) | tensors_of(named(Q), (8, 8))
    write_adapter(models / "tuned", tensors, r=2)
    assert set(changes("base+tuned")) == {f"{UP}.weight", f"{Q}.weight"}


def test_a_model_without_the_usual_prefix(models: Path) -> None:
    tensors = load_file(models / "base" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    write_checkpoint(models / "bare", bare)
    assert set(changes("bare+tuned")) == {f"{UP}.weight".removeprefix("model.")}


# ------------------------------------------------------------------------------ scaling


def config(**values: Any) -> AdapterConfig:
    return AdapterConfig(
        **{
            "rank": None,
            "alpha": 16.0,
            "alphas_by_end": {},
            "alphas_by_expression": (),
            "is_rank_stabilised": False,
            "is_dora": False,
            "is_transposed": False,
            "saved": (),
            "keeps_ties": False,
            "bias": "none",
            **values,
        }
    )


def test_scaling() -> None:
    assert config().scaling("a.q_proj", 4) == 4.0
    assert config(is_rank_stabilised=True).scaling("a.q_proj", 4) == 8.0


def with_alphas(folder: Path, alphas: dict[str, float]) -> AdapterConfig:
    """A config with alphas of some modules by pattern, and 16 for the others."""
    document = {"peft_type": "LORA", "lora_alpha": 16, "alpha_pattern": alphas}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    found, _ = read_adapter_config(folder / "adapter_config.json")
    return found


def test_scaling_by_pattern(tmp_path: Path) -> None:
    alphas = {"layers.0.q_proj": 2, "q_proj": 6, "^model.k_proj": 8, "v_(a|b)": 4, "v_a": 1}
    own = with_alphas(tmp_path, alphas)
    assert own.scaling("model.v_a", 2) == 2.0  # the first counts
    assert own.scaling("model.v_b", 2) == 2.0
    assert own.scaling("model.layers.0.q_proj", 2) == 1.0
    assert own.scaling("model.layers.10.q_proj", 2) == 3.0
    assert own.scaling("model.k_proj", 2) == 4.0
    assert own.scaling("other.model.k_proj", 2) == 8.0
    assert own.scaling("model.my_q_proj", 2) == 8.0


@pytest.mark.parametrize(
    ("pattern", "module", "fits"),
    [
        ("q_proj", "q_proj", True),
        ("q_proj", "a.q_proj", True),
        ("q_proj", "a.xq_proj", False),
        ("q_proj$", "a.q_proj", True),
        ("^q_proj", "a.q_proj", False),
        ("^a.q_proj$", "a.q_proj", True),
        ("a.q_proj", "q_proj", False),
        ("(a|b).q_proj", "x.b.q_proj", True),
        ("^(a|b).q_proj", "x.b.q_proj", False),
        (".*q_proj", "x.b.q_proj", True),
    ],
)
def test_patterns(pattern: str, module: str, fits: bool, tmp_path: Path) -> None:
    assert (with_alphas(tmp_path, {pattern: 1}).scaling(module, 1) == 1) is fits
    assert (re.match(rf"(.*\.)?({pattern})$", module) is not None) is fits  # as peft does


def test_many_patterns_take_no_time(tmp_path: Path) -> None:
    own = with_alphas(tmp_path, {f"layers.{n}.q_proj": n for n in range(50_000)})
    began = time.process_time()
    for number in range(2_000):
        assert own.scaling(f"model.layers.{number}.q_proj", 1) == number
    own = with_alphas(tmp_path, {".*[x]": 1})
    assert own.scaling("a" * 1_000_000, 1) == 16
    assert time.process_time() - began < 2


def test_modules_that_end_like_those_to_save() -> None:
    own = config(saved=("norm", "lm_head"))
    for name, is_saved in (
        ("model.layers.0.input_layernorm.weight", True),
        ("model.norm.weight", True),
        ("lm_head.weight", True),
        ("model.norms.weight", False),
        ("norm", False),
    ):
        assert own.is_saved(name) is is_saved


@pytest.mark.parametrize("is_transposed", [False, True])
def test_square_matrices_are_as_the_others_are(is_transposed: bool, models: Path) -> None:
    """Whatever fan_in_fan_out says; it only counts where there is no other."""
    square = tensors_of(WRAPPED + Q, (8, 8))
    own = tensors_of(WRAPPED + UP, (8, 12) if is_transposed else (12, 8))
    for flag in (False, True):
        write_adapter(models / "tuned", square | own, r=2, fan_in_fan_out=flag)
        found = changes("base+tuned")
        assert {change.is_transposed for change in found.values()} == {is_transposed}
        write_adapter(models / "tuned", square, r=2, fan_in_fan_out=flag)
        assert changes("base+tuned")[f"{Q}.weight"].is_transposed is flag


# ------------------------------------------------------------------- tensors as wholes


def test_modules_to_save(models: Path) -> None:
    head = torch.randn(20, 8).bfloat16()
    tensors = tensors_of(WRAPPED + UP) | {f"{WRAPPED}lm_head.weight": head}
    write_adapter(models / "tuned", tensors, r=2, modules_to_save=["lm_head"])
    opened = open_model("base+tuned")
    assert opened.adapter is not None
    assert (opened.adapter.changed, opened.adapter.replaced) == (1, 1)
    recipe = {"merge_method": "passthrough", "models": [{"model": "base+../tuned"}]}
    os.chdir(models / "base")
    merged = run(
        plan_of(models, {**recipe, "models": [{"model": f"base+{models}/tuned"}]}, {}),
        models / "out",
    )
    assert bits(merged["lm_head.weight"]) == bits(head)


def test_embeddings_with_more_rows(models: Path) -> None:
    rows = torch.randn(23, 8)
    tensors = {f"{WRAPPED}{name}": rows for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_adapter(models / "tuned", tensors | tensors_of(WRAPPED + UP), r=2)
    opened = open_model("base+tuned")
    assert opened.config is not None
    assert opened.config["vocab_size"] == 23
    assert any("embeddings of 23 rows" in notice for notice in opened.notices)
    plan = plan_of(
        models, {"merge_method": "passthrough", "models": [{"model": f"base+{models}/tuned"}]}, {}
    )
    assert plan.config is not None
    assert plan.config["vocab_size"] == 23
    assert bits(run(plan, models / "out")["lm_head.weight"]) == bits(rows)


def test_embeddings_of_a_tied_model_with_more_rows(models: Path) -> None:
    """PEFT saves both of a vocabulary that has grown: they are one matrix and stay it."""
    tensors = load_file(models / "base" / "model.safetensors")
    del tensors["lm_head.weight"]
    config = {"model_type": "llama", "vocab_size": 20, "tie_word_embeddings": True}
    write_checkpoint(models / "base", tensors, config)
    rows = torch.randn(23, 8)
    names = [f"{WRAPPED}{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    for saved in ([names[0]], names):
        tensors = dict.fromkeys(saved, rows) | tensors_of(WRAPPED + UP)
        write_adapter(models / "tuned", tensors, r=2)
        opened = open_model("base+tuned")
        assert opened.config == config | {"vocab_size": 23}
        assert opened.tensors["model.embed_tokens.weight"].shape == (23, 8)
        assert "lm_head.weight" not in opened.tensors
        assert any("is the output head too: both change" in notice for notice in opened.notices)


def test_torch_files(models: Path) -> None:
    tensors = load_file(models / "tuned" / "adapter_model.safetensors")
    (models / "tuned" / "adapter_model.safetensors").unlink()
    torch.save(tensors, models / "tuned" / "adapter_model.bin")
    assert set(changes("base+tuned")) == {f"{UP}.weight"}
    recipe = {"merge_method": "passthrough", "models": [{"model": f"base+{models}/tuned"}]}
    merged = run(plan_of(models, recipe, {}), models / "out")
    base = load_file(models / "base" / "model.safetensors")[f"{UP}.weight"]
    first, second = (tensors[f"{WRAPPED}{UP}.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(merged[f"{UP}.weight"], base + 4 * second @ first)


# ---------------------------------------------------------------------- what is refused


def other_config(**values: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write


def other_tensors(tensors: dict[str, torch.Tensor], **settings: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_adapter(folder, tensors, **{"r": 2, **settings})

    return write


def no(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def text(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(content)

    return write


def outside(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "adapter_model.safetensors").symlink_to("../elsewhere.safetensors")


def of_bytes(folder: Path) -> None:
    tensors = {name: t.to(torch.int8) for name, t in tensors_of(WRAPPED + UP).items()}
    write_adapter(folder, tensors, r=2)


OWN = tensors_of(WRAPPED + UP)
A, B = OWN
MAGNITUDE = f"{WRAPPED}{UP}.lora_magnitude_vector"

REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (no("adapter_config.json"), r"holds no adapter_config\.json .*Correct the path"),
    "no tensors": (no("adapter_model.safetensors"), r"holds no adapter_model\.safetensors"),
    "no JSON": (text("{"), r"adapter_config\.json:1:2: is not valid JSON"),
    "a list": (text("[]"), "is not a JSON mapping"),
    "nothing": (text("{}"), r"peft_type is null; only LORA is known\. Merge it .* with peft"),
    "nested": (text('{"a":' + "[" * 100 + "]" * 100 + "}"), "nest"),
    "another kind": (other_config(peft_type="ADALORA"), 'peft_type is "ADALORA"'),
    "a list as kind": (other_config(peft_type=["LORA"]), "peft_type is"),
    "biases of factors": (
        other_config(lora_bias=True),
        "lora_bias is set: such an adapter adds to",
    ),
    "tokens": (other_config(trainable_token_indices=[1]), "trainable_token_indices is set"),
    "layers twice": (other_config(layer_replication=[[0, 2]]), "layer_replication is set"),
    "of the future": (other_config(use_magic=True), "use_magic is true, and not known to this"),
    "pissa": (
        other_config(init_lora_weights="pissa"),
        'init_lora_weights is "pissa": training beg',
    ),
    "loftq": (other_config(init_lora_weights="loftq"), "does not fit the model as it is"),
    "rank of text": (other_config(r="8"), 'r holds "8", no number'),
    "rank of none": (other_config(r=0), "r is 0.0, no rank"),
    "half a rank": (other_config(r=2.5), "r is 2.5, no rank"),
    "a huge rank": (other_config(r=10**12), "no rank"),
    "true as a number": (other_config(lora_alpha=True), "lora_alpha holds true, no number"),
    "nan": (other_config(lora_alpha=float("nan")), "lora_alpha holds NaN, no number"),
    "too large a number": (other_config(lora_alpha=1e300), "lora_alpha holds 1e\\+300, no number"),
    "a digit string": (other_config(lora_alpha=10**400), "lora_alpha holds .*, no number"),
    "a word as a flag": (other_config(use_dora="yes"), 'use_dora is "yes", neither true nor false'),
    "patterns in a list": (other_config(alpha_pattern=[1]), "alpha_pattern is a list, no mapping"),
    "an expression": (
        other_config(alpha_pattern={"(a+)+b": 1}),
        r"alpha_pattern holds the regular expression '\(a\+\)\+b'; .* Write the names",
    ),
    "names that are none": (
        other_config(modules_to_save=[1]),
        "modules_to_save is no list of names",
    ),
    "unknown biases": (other_config(bias="some"), 'bias is "some"; known are none, lora_only'),
    "another rank": (
        other_config(r=3),
        r"lora_A.weight' is of rank 2, adapter_config.json says r: 3 .* download both again",
    ),
    "a link that leaves": (outside, "outside the adapter's folder. Replace the link"),
    "another model's": (
        other_tensors(tensors_of("base_model.model.model.layers.7.mlp.up_proj")),
        r"'base_model.model.model.layers.7.mlp.up_proj.lora_A.weight' is for .* has no such tensor",
    ),
    "other shapes": (
        other_tensors(tensors_of(WRAPPED + UP, (12, 9))),
        r"has shape \[2, 9\] and .* \[12, 2\], which do not fit 'model.layers.0.mlp.up_proj",
    ),
    "other ranks": (
        other_tensors({A: OWN[A], B: torch.zeros(12, 3)}),
        r"has shape \[2, 8\] and .* \[12, 3\], which do not fit",
    ),
    "a vector": (other_tensors({A: torch.zeros(8), B: OWN[B]}), r"has shape \[8\] and"),
    "rank nothing": (
        other_tensors({A: torch.zeros(0, 8), B: torch.zeros(12, 0)}),
        r"has shape \[0, 8\] and",
    ),
    "one factor": (other_tensors({A: OWN[A]}), r"has no lora_B beside it"),
    "for a vector": (
        other_tensors(tensors_of(f"{WRAPPED}model.norm", (8, 8))),
        r"do not fit 'model.norm.weight' of shape \[8\]",
    ),
    "two adapters": (
        other_tensors(OWN | {A.replace(".weight", ".other.weight"): OWN[A]}),
        "are of two adapters. Keep one",
    ),
    "no floats": (of_bytes, "is I8, not a float"),
    "DoRA unsaid": (other_tensors(OWN | {MAGNITUDE: torch.ones(12)}), "does not say use_dora"),
    "no lengths": (other_tensors(OWN, use_dora=True), "has no lora_magnitude beside it"),
    "too few lengths": (
        other_tensors(OWN | {MAGNITUDE: torch.ones(8)}, use_dora=True),
        "has 8 elements for 12 outputs",
    ),
    "another factor": (
        other_tensors(OWN | {f"{WRAPPED}{UP}.lora_diag": torch.ones(2)}),
        "is not known",
    ),
    "a stray tensor": (
        other_tensors(OWN | {f"{WRAPPED}model.norm.weight": torch.ones(8)}),
        "is neither a factor nor of one of the modules_to_save",
    ),
    "a head of its own": (
        other_tensors(
            OWN | {f"{WRAPPED}score.weight": torch.ones(2, 8)}, modules_to_save=["score"]
        ),
        "has no such tensor",
    ),
    "saved in another shape": (
        other_tensors(
            OWN | {f"{WRAPPED}model.norm.weight": torch.ones(9)}, modules_to_save=["norm"]
        ),
        r"has shape \[9\], 'model.norm.weight' of base \[8\]",
    ),
    "nothing in it": (other_tensors({}), "holds no tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, models: Path) -> None:
    spoil, message = REFUSED[case]
    spoil(models / "tuned")
    with pytest.raises(InputError, match=message) as caught:
        open_model("base+tuned")
    assert str(models / "tuned") in str(caught.value)


KEYS = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("fan_in_fan_out", "modules_to_save", "bias", "init_lora_weights", "lora_bias", "use_x", "x"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


def test_any_config_is_taken_or_refused_by_name(models: Path) -> None:
    @given(st.dictionaries(st.sampled_from(KEYS), JSON | st.just("LORA"), max_size=5))
    def check(values: dict[str, Any]) -> None:
        document = {"peft_type": "LORA", "r": 2, **values}
        (models / "tuned" / "adapter_config.json").write_text(json.dumps(document))
        try:
            opened = open_model("base+tuned")
        except InputError as error:
            problem = str(error)
        else:
            problem = None
            assert opened.adapter is not None
        assert problem is None or str(models / "tuned") in problem

    check()


@given(st.text(alphabet=r"abq_.\|()[]^$*+-d1{}?", max_size=30))
def test_expressions_that_are_taken_are_quick(pattern: str) -> None:
    assert not _is_simple(pattern) or not re.search(r"[{}?]|\)[*+]", pattern)
    if _is_simple(pattern):
        config_module._fits(pattern, "model.layers.0.self_attn.q_proj." * 10 + "!")


def test_what_people_are_shown(models: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": f"base+{models}/tuned"}]}
    plan = plan_of(models, recipe, {})
    console = Console(file=StringIO(), width=200)
    console.print(plan_view(plan, models, is_given=False))
    console.print(inspection_view(inspect("base+tuned", scan=True), with_tensors=False))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count("tuned, LoRA, rank 2, 40 parameters, changes 1 tensor") == 2
    assert inspect("base+tuned").as_dict()["adapter"]["ranks"] == (2,)
    assert plan.as_dict()["models"][0]["adapter"]["changed"] == 1


def test_what_is_no_folder(models: Path) -> None:
    with pytest.raises(InputError, match=r"adapter 'nowhere': not found \(resolved to "):
        open_model("base+nowhere")
    with pytest.raises(InputError, match=r"is not a folder\. Give the folder that holds"):
        open_model("base+tuned/adapter_config.json")


def test_quantised_models(models: Path) -> None:
    tensors = load_file(models / "base" / "model.safetensors")
    save_file(
        tensors | {f"{UP}.weight": torch.zeros(12, 8, dtype=torch.uint8)},
        models / "base" / "model.safetensors",
    )
    with pytest.raises(InputError, match=r"is U8: the model is quantised\. Take its unquantised"):
        open_model("base+tuned")


def test_many_problems_are_a_few_lines(models: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for number in range(40):
        tensors |= tensors_of(f"{WRAPPED}model.layers.{number + 5}.mlp.up_proj")
    write_adapter(models / "tuned", tensors, r=2)
    with pytest.raises(InputError, match="and 30 more problems of this kind") as caught:
        open_model("base+tuned")
    assert len(str(caught.value).splitlines()) == 11


def test_dora_of_convolutions(models: Path) -> None:
    write_checkpoint(models / "base", {"conv.weight": torch.zeros(4, 3, 2, 2)})
    tensors = {
        "conv.lora_A.weight": torch.ones(2, 3, 2, 2),
        "conv.lora_B.weight": torch.ones(4, 2, 1, 1),
        "conv.lora_magnitude_vector": torch.ones(1, 4, 1, 1),
    }
    write_adapter(models / "tuned", tensors, r=2, use_dora=True)
    with pytest.raises(InputError, match="DoRA is known for matrices only"):
        open_model("base+tuned")


def test_rows_that_a_tokenizer_would_move(models: Path) -> None:
    """Of an embedding that is changed they are refused; of one that is replaced they are not."""
    vocabulary = {f"t{number}": number for number in range(20)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    (models / "base" / "tokenizer.json").write_text(json.dumps(tokenizer))
    name = "model.embed_tokens"
    factors = {
        f"{name}.lora_embedding_A": torch.ones(2, 20),
        f"{name}.lora_embedding_B": torch.ones(8, 2),
    }
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f"base+{models}/tuned"}],
        "parameters": {"weight": 1},
        "tokenizer": {
            "source": "union",
            "tokens": {"t3": {"source": {"kind": "zero"}, "force": True}},
        },
    }
    write_adapter(models / "tuned", factors, r=2)
    with pytest.raises(InputError, match=r"is changed by its adapter: its rows cannot be matched"):
        plan_of(models, recipe, {})
    write_adapter(
        models / "tuned", {f"{name}.weight": torch.ones(20, 8)}, modules_to_save=["embed_tokens"]
    )
    merged = run(plan_of(models, recipe, {}), models / "out")[f"{name}.weight"]
    assert merged.sum() == 19 * 8


def test_rows_that_are_cut(models: Path) -> None:
    """The leading ones, of a changed embedding too; not where DoRA needs them all."""
    write_checkpoint(
        models / "small",
        {n: torch.zeros((9, *s[1:]) if s[0] == 20 else s) for n, s in SHAPES.items()},
    )
    name = "model.embed_tokens"
    generator = torch.Generator().manual_seed(1)
    factors = {
        f"{name}.lora_embedding_A": torch.randn(2, 20, generator=generator),
        f"{name}.lora_embedding_B": torch.randn(8, 2, generator=generator),
    } | tensors_of("lm_head", (20, 8))
    write_adapter(models / "tuned", factors, r=2, lora_alpha=2)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f"base+{models}/tuned"}, {"model": "small"}],
        "parameters": {"weight": 0.5},
    }
    merged = run(plan_of(models, recipe, {}, truncate_embeddings=True), models / "out")
    base = load_file(models / "base" / "model.safetensors")
    a, b = (factors[f"{name}.lora_embedding_{x}"] for x in "AB")
    expected = (base[f"{name}.weight"] + (b @ a).T)[:9] / 2
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    a, b = (factors[f"lm_head.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(merged["lm_head.weight"], (base["lm_head.weight"] + b @ a)[:9] / 2)
    lengths = {
        f"{name}.lora_magnitude_vector": torch.ones(8),
        "lm_head.lora_magnitude_vector": torch.ones(20),
    }
    write_adapter(models / "tuned", factors | lengths, r=2, use_dora=True)
    with pytest.raises(InputError, match="only 9 of its 20 rows are merged"):
        plan_of(models, recipe, {}, truncate_embeddings=True)


def test_projections_that_are_taken_apart(tmp_path: Path) -> None:
    """An adapter of the one that holds several."""
    generator = torch.Generator().manual_seed(3)
    rows = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
    apart = {
        f"model.layers.0.{n}.weight": torch.randn(r, 8, generator=generator)
        for n, r in rows.items()
    }
    fused = torch.randn(16, 8, generator=generator)
    own = tensors_of("base_model.model.model.layers.0.qkv_proj", (16, 8))
    lengths = torch.rand(16, generator=generator)
    adapter = write_adapter(
        tmp_path / "adapter",
        own | {"base_model.model.model.layers.0.qkv_proj.lora_magnitude_vector": lengths},
        r=2,
        lora_alpha=2,
        use_dora=True,
    )
    recipe = {
        "merge_method": "linear",
        "base_model": "apart",
        "models": [
            {"model": "apart", "parameters": {"weight": 0}},
            {"model": f"fused+{adapter}", "parameters": {"weight": 1}},
        ],
    }
    write_checkpoint(tmp_path / "apart", apart)
    write_checkpoint(tmp_path / "fused", {"model.layers.0.qkv_proj.weight": fused})
    merged = run(plan_of(tmp_path, recipe, {}), tmp_path / "out")
    a, b = own.values()
    whole = fused + b @ a
    whole = whole / whole.norm(dim=1, keepdim=True) * lengths[:, None]
    for name, part in zip(apart, whole.split(list(rows.values())), strict=True):
        torch.testing.assert_close(merged[name], part, rtol=1e-5, atol=1e-6)


def test_too_little_memory_for_factors(models: Path) -> None:
    rank = 1 << 18
    write_adapter(models / "tuned", tensors_of(WRAPPED + UP, rank=rank), r=rank)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"base+{models}/tuned"}]}
    with pytest.raises(DoesNotFitError, match="of statistics; the smallest limit"):
        plan_of(models, recipe, {}, Resources(70 << 20, workers=1))


def test_a_broken_header_names_the_file(models: Path) -> None:
    path = models / "tuned" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(LazymergeError, match=r"adapter_model\.safetensors: "):
        open_model("base+tuned")
