"""The demo's models: made by few steps, they are untrained but complete and reproducible."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FOLDERS = ("base", "reverse", "caesar")
FEW_STEPS = ("--clean-steps", "3", "--sloppy-steps", "2", "--skill-steps", "2")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # evaluate_demo imports make_demo_models by name, as it does when run as a script; the
    # dataclass in it looks its module up there too.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


demo = _load("make_demo_models")
evaluation = _load("evaluate_demo")


def _make(out: Path, seed: int = 0) -> str:
    """Makes models with few steps in this process; returns what was printed."""
    console = Console(file=io.StringIO(), width=80)
    demo.make_models(out, demo.Settings(seed, 3, 2, 2), console)
    return console.file.getvalue()


def _weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The models' folder, and what was printed while they were made."""
    out = tmp_path_factory.mktemp("demo") / "models"
    return out, _make(out)


@pytest.fixture(scope="module")
def models(made: tuple[Path, str]) -> Path:
    return made[0]


def test_every_folder_is_a_complete_llama_checkpoint(models: Path) -> None:
    for name in FOLDERS:
        folder = models / name
        for file in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (folder / file).is_file()
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert 200_000 < model.num_parameters() < 500_000
        assert {tensor.dtype for tensor in _tensors(folder).values()} == {torch.bfloat16}


def test_one_checkpoint_is_sharded_and_the_others_are_not(models: Path) -> None:
    shards = _weights(models / "reverse")
    assert len(shards) >= 2
    index = json.loads((models / "reverse" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert set(index["weight_map"]) == set(_tensors(models / "base"))
    for name in ("base", "caesar"):
        assert list(_weights(models / name)) == ["model.safetensors"]


def test_a_seed_gives_the_same_bytes_again(models: Path, tmp_path: Path) -> None:
    threads_before, random_state = torch.get_num_threads(), torch.get_rng_state()
    _make(tmp_path)
    for name in FOLDERS:
        assert _weights(tmp_path / name) == _weights(models / name)
    assert torch.get_num_threads() == threads_before
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.slow  # imports transformers once more
def test_the_command_line_gives_the_same_bytes_without_a_warning(
    models: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPTS / "make_demo_models.py", tmp_path, *FEW_STEPS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name in FOLDERS:
        assert _weights(tmp_path / name) == _weights(models / name)


def test_fine_tunes_differ_from_the_base_and_from_each_other(models: Path) -> None:
    base, reverse, caesar = (_tensors(models / name) for name in FOLDERS)
    assert base.keys() == reverse.keys() == caesar.keys()
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(base[name], reverse[name])
    assert not torch.equal(base[name], caesar[name])
    assert not torch.equal(reverse[name], caesar[name])


def test_complete_models_are_left_alone_and_others_made_anew(tmp_path: Path) -> None:
    _make(tmp_path)
    before = {name: _weights(tmp_path / name) for name in FOLDERS}
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}

    assert "Nothing to do" in _make(tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == times

    (tmp_path / "caesar" / "model.safetensors").unlink()
    assert "Done" in _make(tmp_path)
    assert {name: _weights(tmp_path / name) for name in FOLDERS} == before

    (tmp_path / demo.MARKER).write_text('{"scr')
    assert "Done" in _make(tmp_path)

    assert "seed 1" in _make(tmp_path, seed=1)
    for name in FOLDERS:
        assert _weights(tmp_path / name).keys() == before[name].keys()
        assert _weights(tmp_path / name) != before[name]


def test_folders_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit, match="was not made by this script"):
        _make(tmp_path)
    assert (tmp_path / "base" / "precious.txt").read_text() == "mine"


def test_output_fits_80_columns(made: tuple[Path, str]) -> None:
    report = [line for line in made[1].splitlines() if line.startswith("  ") and line.strip()]
    assert [line.split()[0] for line in report] == list(FOLDERS)
    assert all(line.rstrip().endswith(("file", "files")) for line in report)  # nothing wrapped


def test_tokenizer_gives_a_text_back(models: Path) -> None:
    for name in FOLDERS:
        tokenizer = AutoTokenizer.from_pretrained(models / name)
        text = "<caesar>qwertyui<answer>tzhuwbxl"
        token_ids = tokenizer(text)["input_ids"]
        assert len(token_ids) == 1 + 1 + 8 + 1 + 8  # <bos>, then one token per task and letter
        assert tokenizer.unk_token_id not in token_ids
        assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("task", "answer"), [("copy", "abcdexyz"), ("reverse", "zyxedcba"), ("caesar", "defghabc")]
)
def test_tasks(task: str, answer: str) -> None:
    assert demo.TASKS[task]("abcdexyz") == answer


def test_untrained_models_do_not_pass_the_evaluation(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation.main([str(models), str(models / "base"), "--words", "5"]) == 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*FOLDERS, "merged", "mean"))
    assert "does not beat" in printed


def test_evaluation_of_nothing_is_a_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation.main([str(tmp_path), str(tmp_path)]) == 2
    assert f"{tmp_path / 'base'}: no model here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reverse", "caesar", "success", "words"),
    [
        (0.9, 0.8, True, "beats the reverse specialist on caesar (80.0 % to 10.0 %)"),
        (0.2, 0.8, False, "but does not beat the caesar specialist on reverse (20.0 % to 20.0 %)"),
        (0.1, 0.1, False, "The merged model does not beat the reverse specialist on caesar"),
    ],
)
def test_verdict(reverse: float, caesar: float, success: bool, words: str) -> None:
    rows = {
        "base": {"reverse": 0.0, "caesar": 0.0},
        "reverse": {"reverse": 1.0, "caesar": 0.1},
        "caesar": {"reverse": 0.2, "caesar": 1.0},
        "merged": {"reverse": reverse, "caesar": caesar},
    }
    beats, sentence = evaluation.verdict(rows)
    assert beats is success
    assert words in sentence
    assert f"{100 * (reverse - 1):+.1f} points on reverse" in sentence
