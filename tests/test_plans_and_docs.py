"""Plans and links work, the README names what there is. tests/docs tries what documents show."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from lazymerge.cli.main import main
from lazymerge.engine.planning import signatures
from lazymerge.methods import METHODS
from lazymerge.recipe import parse_recipe

import reference
from make_synthetic_checkpoint import SHAPES, make_checkpoint

ROOT = Path(__file__).parent.parent
PLANS = sorted((ROOT / "plans").glob("*.y*ml"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLAN_13B = ROOT / "plans" / "orca_wizard_platypus_13b.yml"

LEAST_PLANS = 6
"""A plan that is removed, or no longer found here, makes the count fail."""

LINK = re.compile(r"\]\(([^)\s]+)\)")


def relative_links(document: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = LINK.findall(text)
    return [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


def test_plans_are_found_and_every_method_has_one() -> None:
    assert len(PLANS) >= LEAST_PLANS
    shown = {
        parse_recipe(path.read_text("utf-8"), path, signatures()).merge_method for path in PLANS
    }
    assert shown == set(METHODS)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_a_plan_opens_with_a_comment_that_names_its_command(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    comment = "\n".join(lines[: [line.startswith("#") for line in lines].index(False)])
    commands = re.findall(r"lazymerge +(?:plan|run) +(\S+)", comment)
    assert commands, "no command in the opening comment"
    assert set(commands) == {f"plans/{path.name}"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_point_to_files(document: Path) -> None:
    missing = [link for link in relative_links(document) if not (document.parent / link).exists()]
    assert not missing


def test_the_readme_has_links_and_they_are_found() -> None:
    assert "docs/recipes.md" in relative_links(ROOT / "README.md")


def test_the_readme_names_every_command_and_method() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for command in ("plan", "run", "inspect", "methods", "schema"):
        assert f"`lazymerge {command}" in text
    assert [name for name in METHODS if f"`{name}`" not in text] == []


def test_every_method_has_a_float64_reference_with_its_parameters() -> None:
    assert set(METHODS) <= set(reference.METHODS)
    for name, method in METHODS.items():
        declared = {parameter.name for parameter in method.signature.parameters}
        _, known = reference.METHODS[name]
        # int8_mask is accepted and has no effect, so that a reference may do without
        assert declared - {"int8_mask"} == known - {"int8_mask"}, name


def test_the_13b_plan_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three 13B checkpoints whose data are holes: planned from their headers, in 300 MiB."""
    models = [
        "garage-bAInd/Platypus2-13B",
        "psmathur/orca_mini_v3_13b",
        "WizardLM/WizardLM-13B-V1.2",
    ]
    for name in models:
        make_checkpoint(tmp_path / name, SHAPES["llama2-13b"], shards=3, sparse=True)
    recipe = tmp_path / "recipe.yml"
    recipe.write_bytes(PLAN_13B.read_bytes())
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    arguments = ["lazymerge", "plan", "recipe.yml", "--dry-run", "--layers", "--no-measure"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--memory", "300MiB"])
    with pytest.raises(SystemExit) as caught:
        main()
    shown = capsys.readouterr()
    assert (caught.value.code, shown.err) == (0, "")
    for name in models:
        assert name in shown.out
    assert "363 tensors, 13.0B parameters, F16, 26.0 GB in 6 shards" in shown.out
    assert "reads 78.1 GB, writes 26.0 GB" in shown.out
    assert "model.layers.0–39" in shown.out
    assert re.search(r"weight +B 1 +C 0.3\b", shown.out)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
