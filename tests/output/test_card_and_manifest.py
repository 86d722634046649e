"""The model card's front matter and fences, and the manifest that is there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.errors import InputError
from lazymerge.output.card import model_card
from lazymerge.output.manifest import MANIFEST_NAME, read_document, write_document, write_text


def card(recipe: str = "a: 1\n", models: tuple[str, ...] = ("org/base", "./local")) -> str:
    return model_card(
        "merged",
        recipe,
        "ties",
        "Trims and elects.",
        "https://arxiv.org/abs/2306.01708",
        models,
        models[0],
        "1.2.3",
    )


def front_matter(text: str) -> dict[str, Any]:
    opening, front, _ = text.split("---\n", 2)
    assert opening == ""
    parsed = yaml.safe_load(front)
    assert isinstance(parsed, dict)
    return parsed


def test_front_matter_and_text() -> None:
    text = card()
    assert front_matter(text) == {
        "library_name": "transformers",
        "tags": ["merge", "mergekit", "lazymerge"],
        "base_model": ["org/base"],
        "base_model_relation": "merge",
    }
    assert "# merged\n\nA merge of models, made with lazymerge 1.2.3.\n" in text
    assert "`ties`: Trims and elects. ([source](https://arxiv.org/abs/2306.01708))\n" in text
    assert "- org/base (base)\n- ./local\n" in text
    assert text.endswith("## Recipe\n\n```yaml\na: 1\n```\n")


def test_without_hub_models_there_is_no_base_model() -> None:
    assert "base_model" not in front_matter(card(models=("/models/a", "../b/c/d", "x")))


def test_a_folder_is_no_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert front_matter(card(models=("org/base", "org/other")))["base_model"] == ["org/other"]


@given(st.lists(st.sampled_from(["`", "``", "```yaml\n", "````\n", "a: 1\n", "---\n"]), max_size=9))
def test_a_recipe_cannot_leave_its_fence(parts: list[str]) -> None:
    recipe = "".join(parts)
    text = card(recipe)
    front_matter(text)
    section = text.split("## Recipe\n\n", 1)[1]
    fence = section[: len(section) - len(section.lstrip("`"))]
    assert len(fence) >= 3
    assert fence not in recipe
    assert section == f"{fence}yaml\n{recipe.rstrip()}\n{fence}\n"


def test_manifest(tmp_path: Path) -> None:
    write_document(tmp_path / MANIFEST_NAME, {"tensors": {"é": 1}}, fsync=True)
    assert json.loads((tmp_path / MANIFEST_NAME).read_text("utf-8")) == {
        "format": 1,
        "tensors": {"é": 1},
    }
    assert read_document(tmp_path / MANIFEST_NAME)["tensors"] == {"é": 1}
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_a_manifest_of_another_format(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text('{"format": 2}')
    with pytest.raises(InputError, match="was not written by this version"):
        read_document(tmp_path / MANIFEST_NAME)


def test_text_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    write_text(path, "old", fsync=True)

    def torn(descriptor: int) -> None:
        os.truncate(descriptor, 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new", fsync=True)
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_text(path, "new", fsync=False)
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]
