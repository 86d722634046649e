"""Rearranged rows on the host device: read on the host, computed on the device."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
import torch
from device_cases import LATE, on_device, run_on_host, use_small_blocks
from lazymerge.engine import planning
from lazymerge.engine.tokenizer import TokenizerPlan
from lazymerge.vocabulary import Alignment

from merging import bits, plan_of, run

NAME = "model.embed_tokens.weight"
ROWS = {"base": 40, "a": 37, "b": 44}
METHODS = {"linear": ["base", "a", "b"], "slerp": ["a"], "ties": ["a", "b"]}


@pytest.mark.parametrize("padded_rows", [45, 48])
@pytest.mark.parametrize("method", METHODS)
def test_results_are_those_of_the_processor(
    method: str, padded_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_blocks(monkeypatch)
    generator = torch.Generator().manual_seed(3)
    tables = {
        model: array(
            "i", [*torch.randperm(rows, generator=generator).tolist(), *[-1] * (45 - rows)]
        )
        for model, rows in ROWS.items()
    }
    prefix = f"{tmp_path}/"
    alignment = Alignment(
        rows=45,
        padded_rows=padded_rows,
        tables={prefix + model: table for model, table in tables.items()},
        sizes={prefix + model: rows for model, rows in ROWS.items()},
        declared={prefix + model: rows for model, rows in ROWS.items()},
        chosen={},
    )
    said = TokenizerPlan(str(tmp_path), {}, alignment, (), 0)
    monkeypatch.setattr(planning, "plan_tokenizer", lambda *_: said)
    models = {
        model: {NAME: torch.randn(rows, 9, generator=generator).to(torch.bfloat16)}
        for model, rows in ROWS.items()
    }
    recipe = {
        "merge_method": method,
        "base_model": "base",
        "out_dtype": "bfloat16",
        "models": [
            {"model": model, "parameters": {} if method == "slerp" else {"weight": 0.5}}
            for model in METHODS[method]
        ],
        "parameters": {"t": 0.3} if method == "slerp" else {},
    }
    plan = plan_of(tmp_path, recipe, models)
    expected = run(plan, tmp_path / "cpu")[NAME]
    actual = run_on_host(on_device(plan), tmp_path / "device")[NAME]
    assert expected.shape == (padded_rows, 9)
    if method == "slerp":  # sums over blocks of another length
        torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)
    else:
        assert bits(actual) == bits(expected)
    for late in LATE[:3]:
        late_output = run_on_host(on_device(plan), tmp_path / "late", late)[NAME]
        assert bits(late_output) == bits(actual)
