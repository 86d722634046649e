"""Reading vocabularies: what transformers says of the same files, and files that are hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lazymerge.errors import InputError
from lazymerge.vocabulary import read_vocabulary
from lazymerge.vocabulary import reading as reading_module
from lazymerge.vocabulary.reading import Numbers
from tokenizer_cases import KINDS, WORDS, add_special, bpe
from tokenizers import Tokenizer
from transformers import AutoTokenizer

FAST = "PreTrainedTokenizerFast"

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "nothing": {"tokenizer_config.json": {}},
    "special tokens that are not there": {
        "tokenizer_config.json": {
            "mask_token": "[m]",
            "eos_token": {"__type": "AddedToken", "content": "[e]"},
            "pad_token": "[p]",
            "bos_token": "<s>",
            "additional_special_tokens": ["[x]", "[y]"],
            "image_token": "[image]",
            "add_prefix_token": True,
        }
    },
    "added tokens in the config": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "900": {"content": "[far]", "special": True},
                "500": {"content": "[near]"},
            },
            "pad_token": "[p]",
        },
        "added_tokens.json": {"[unread]": 1},
        "special_tokens_map.json": {"mask_token": "[unread too]"},
    },
    "as older models have them": {
        "tokenizer_config.json": {"pad_token": "[other]"},
        "added_tokens.json": {"[second]": 401, "[first]": 400},
        "special_tokens_map.json": {"mask_token": "[m]", "pad_token": {"content": "[p]"}},
    },
}


def write(folder: Path, tokenizer: Tokenizer, files: dict[str, dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        if name == "tokenizer_config.json":
            content = {"tokenizer_class": FAST, **content}
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("files", CONFIGS.values(), ids=CONFIGS)
def test_numbers_are_those_of_transformers(
    kind: str, files: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    tokenizer = add_special(KINDS[kind](WORDS["a"]), "<|one|>", "<|two|>")
    tokenizer.add_tokens(["plain"])
    write(tmp_path, tokenizer, files)
    vocabulary = read_vocabulary(str(tmp_path))
    assert vocabulary is not None
    assert vocabulary.numbers == AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert list(vocabulary.numbers.values()) == sorted(vocabulary.numbers.values())


def test_numbers_are_those_of_the_library_where_a_vocabulary_has_holes() -> None:
    own = {"<unk>": 0, "a": 1, "b": 5}
    document = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": own, "unk_token": "<unk>"},
        "added_tokens": [],
    }
    tokenizer = Tokenizer.from_str(json.dumps(document))
    numbers = Numbers(own)
    for token in ["x", "b", "y", "z", "x"]:
        tokenizer.add_tokens([token])
        numbers.add(token)
        assert numbers.all() == tokenizer.get_vocab()


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert read_vocabulary(str(tmp_path)) is None


GOOD = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}}}


def changed(**keys: Any) -> dict[str, Any]:
    return {**GOOD, **keys}


def added(**keys: Any) -> dict[str, Any]:
    return changed(added_tokens=[{"id": 0, "content": "x", **keys}])


HOSTILE: dict[str, tuple[object, str]] = {
    "a list": ([], "is not a JSON mapping"),
    "no model": ({}, "has no mapping `model`"),
    "a model that is a list": (changed(model=[]), "has no mapping `model`"),
    "another model": (changed(model={"type": "Other", "vocab": {}}), 'of type "Other"'),
    "a type of its own": (changed(model={"type": [[]], "vocab": {}}), "of type|Download"),
    "a type that is a number": (changed(model={"type": 1.5, "vocab": {}}), "of type 1.5"),
    "no vocabulary": (changed(model={"type": "BPE"}), "no `vocab`"),
    "a number as vocabulary": (changed(model={"type": "BPE", "vocab": 7}), "no `vocab`"),
    "negative": (changed(model={"vocab": {"a": -1}}), "token 'a' no number below"),
    "huge": (changed(model={"vocab": {"a": 1 << 40}}), "token 'a' no number below"),
    "true": (changed(model={"vocab": {"a": True}}), "token 'a' no number below"),
    "float": (changed(model={"vocab": {"a": 1.0}}), "token 'a' no number below"),
    "pieces": (changed(model={"vocab": [["a", 0.0], "b"]}), "entry 1"),
    "pieces of one": (changed(model={"vocab": [["a"]]}), "entry 0"),
    "added that is no list": (changed(added_tokens={"a": 1}), "no list"),
    "added numbers": (changed(added_tokens=[1]), "without text"),
    "added without text": (added(content=None), "without text"),
    "nested": (changed(model={"vocab": {}, "x": json.loads("[" * 70 + "]" * 70)}), "nested"),
}


@pytest.mark.parametrize(("document", "problem"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(document: object, problem: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=problem) as caught:
        read_vocabulary(str(tmp_path))
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "document", "problem"),
    [
        ("tokenizer_config.json", [], "is not a JSON mapping"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": 5}}, "without text"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 30: {"content": "a"}}}, "999"),
        ("added_tokens.json", {"a": "b"}, "without a number"),
        ("special_tokens_map.json", 5, "is not a JSON mapping"),
    ],
)
def test_hostile_files_beside(name: str, document: object, problem: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOOD))
    (tmp_path / name).write_text(json.dumps(document))
    with pytest.raises(InputError, match=problem) as caught:
        read_vocabulary(str(tmp_path))
    assert name in str(caught.value)


def test_size_and_values_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(GOOD))
    monkeypatch.setattr(reading_module, "LIMIT_VALUES", 5)
    with pytest.raises(InputError, match="more than 5 values"):
        read_vocabulary(str(tmp_path))
    monkeypatch.setattr(reading_module, "LIMIT_BYTES", 10)
    with pytest.raises(InputError, match="at most 10 are read"):
        read_vocabulary(str(tmp_path))
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    monkeypatch.undo()
    with pytest.raises(InputError, match="at most 100,000,000 are read"):
        read_vocabulary(str(tmp_path))


def test_links_out_of_the_model(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(GOOD))
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").symlink_to(outside)
    with pytest.raises(InputError, match="out of the model's folder"):
        read_vocabulary(str(model))


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{\n"model": ')
    with pytest.raises(InputError, match=r"tokenizer\.json:2:"):
        read_vocabulary(str(tmp_path))


def test_a_vocabulary_below_a_size() -> None:
    tokenizer = add_special(bpe(WORDS["a"]), "<|one|>", "<|two|>")
    vocabulary = reading_module.Vocabulary.of(
        tokenizer.get_vocab(with_added_tokens=False),
        {
            token: reading_module.AddedToken(token)
            for token in ["<unk>", "<s>", "<|one|>", "<|two|>"]
        },
    )
    assert vocabulary.numbers == tokenizer.get_vocab()
    size = tokenizer.get_vocab_size() - 1
    below = vocabulary.below(size)
    assert set(vocabulary.numbers) - set(below.numbers) == {"<|two|>"}
    assert vocabulary.below(size + 1) is vocabulary
    assert vocabulary.below(None) is vocabulary


def test_an_added_token_without_text_is_passed_over(tmp_path: Path) -> None:
    """As the tokenizers library does."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(added(content="")))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": ""}))
    found = read_vocabulary(str(tmp_path))
    assert found is not None
    assert (dict(found.numbers), dict(found.added)) == ({"a": 0}, {})
