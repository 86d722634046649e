"""Precision and range that the output's dtype costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...checkpoint.tensor import DTYPES
from ...engine.plan import Plan
from .suspicion import Suspicion, listed, short


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What a dtype can hold.

    bits: significant ones, the leading 1 among them. largest: finite number.
    smallest: above 0, as people read it.
    """

    bits: int
    largest: float
    smallest: str


_HOLDS = {
    "F64": _Numbers(53, 1.8e308, "5e-324"),
    "F32": _Numbers(24, 3.4e38, "1.4e-45"),
    "BF16": _Numbers(8, 3.4e38, "9e-41"),
    "F16": _Numbers(11, 65504, "6e-8"),
    "F8_E4M3": _Numbers(4, 448, "2e-3"),
    "F8_E5M2": _Numbers(3, 57344, "1.5e-5"),
}
_FLOAT8 = ("F8_E4M3", "F8_E5M2")


@dataclass(slots=True)
class _Change:
    """Tensors of one dtype that become another's."""

    models: dict[str, None]
    names: dict[str, None]


def dtype_suspicions(plan: Plan) -> Iterator[Suspicion]:
    """Where the output can hold less than its inputs."""
    changes: dict[tuple[str, str], _Change] = {}
    narrow: dict[str, int] = {}
    written: dict[str, int] = {}
    tensors_of = {model: checkpoint.tensors for model, checkpoint in plan.checkpoints.items()}
    for tensor, write in zip(plan.tensors, plan.graph.writes, strict=True):
        name, after = tensor.name, write.dtype
        if after not in _HOLDS:
            continue
        written[after] = written.get(after, 0) + 1
        for model in tensor.by_model:
            info = tensors_of[model].get(name) if model in tensors_of else None
            if info is None or info.dtype not in _HOLDS:
                continue
            if info.dtype == after and after not in _FLOAT8:
                continue
            if info.dtype in _FLOAT8 and info.scale is None:
                narrow[model] = narrow.get(model, 0) + 1
            before = info.value_dtype
            if before != after:
                change = changes.setdefault((before, after), _Change({}, {}))
                change.models[model] = None
                change.names[name] = None
    total = len(plan.tensors)
    for (before, after), change in changes.items():
        yield from _loss(before, after, change, total)
    if narrow:
        yield Suspicion(
            "float8-input",
            f"{listed(list(narrow))} hold{'s' if len(narrow) == 1 else ''} float8 numbers "
            f"({max(narrow.values())} tensors) of 3 or 4 significant bits: small differences "
            "between models were rounded away before the merge; merge the bfloat16 originals "
            "where there are any",
            "note",
        )
    for dtype in _FLOAT8:
        if dtype in written and not narrow:
            yield Suspicion(
                "float8-output",
                f"{written[dtype]} tensors are written as {dtype}, without scales: numbers beyond "
                f"{_HOLDS[dtype].largest:g} and below {_HOLDS[dtype].smallest} are lost; write "
                "bfloat16 (out_dtype: bfloat16), and quantise the result",
                "note",
            )


def _loss(before: str, after: str, change: _Change, total: int) -> Iterator[Suspicion]:
    """What is lost between two dtypes, if anything."""
    old, new = _HOLDS[before], _HOLDS[after]
    names = list(change.names)
    what = f"{listed(list(change.models))}: {before} becomes {after}"
    if len(names) < total:
        what += f" in {len(names)} of {total} tensors ({short(names[0])}{', …' * (len(names) > 1)})"
    bits = f"{new.bits} of {old.bits} significant bits are kept"
    if new.largest < old.largest:
        kept = f", and {bits}" * (new.bits < old.bits)
        yield Suspicion(
            "dtype-range",
            f"{what}: above {new.largest:g} is inf, below {new.smallest} is 0{kept}; "
            "dtype: bfloat16 keeps the range",
            "note",
        )
    elif new.bits < old.bits:
        yield Suspicion(
            "dtype-precision",
            f"{what}: {bits}; out_dtype: {DTYPES[before].torch_name} keeps all",
            "note",
        )
