"""Models at addresses whose vocabularies differ: their tokenizers are read, rows are gathered."""

from __future__ import annotations

from pathlib import Path

import lazymerge
import pytest
import yaml
from lazymerge.engine.run import run_plan
from tokenizer_cases import WORDS, bpe, make_model

from range_server import range_server

pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")


def recipe(root: object, folder: Path, method: str) -> Path:
    entries = [{"model": f"{root}/words-{n}", "parameters": {"weight": 0.4}} for n in ("b", "c")]
    document = {"merge_method": method, "models": entries, "tokenizer_source": "union"}
    if method == "ties":
        document |= {"base_model": f"{root}/words-a", "parameters": {"density": 0.5}}
    (folder / "recipe.yml").write_text(yaml.safe_dump(document))
    return folder / "recipe.yml"


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_vocabularies_that_are_united(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in another order than in the file; tokenizers made from those of all models."""
    monkeypatch.setattr("lazymerge.engine.needed_ranges.CHUNK_BYTES", 4096)
    for seed, name in enumerate(WORDS):
        make_model(tmp_path / f"words-{name}", bpe(WORDS[name]), seed=seed)
    written = []
    with range_server(tmp_path) as server:
        for root, out in ((tmp_path, "local"), (server.address, "out")):
            run_plan(lazymerge.plan(recipe(root, tmp_path, method)), tmp_path / out, fsync=False)
            names = ("*.safetensors", "tokenizer*.json", "config.json")
            found = [path for name in names for path in sorted((tmp_path / out).glob(name))]
            written.append({path.name: path.read_bytes() for path in found})
        assert written[0].keys() >= {"tokenizer.json", "model.safetensors"}
        assert written[1] == written[0]
        assert lazymerge.verify(tmp_path / "out", recompute=2).problems == ()
