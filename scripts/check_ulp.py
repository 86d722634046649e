#!/usr/bin/env python3
"""Check a merged checkpoint, element by element, against float64 arithmetic.

    python scripts/check_ulp.py RECIPE MERGED        a linear or task_arithmetic merge: is it right?
    python scripts/check_ulp.py --between ONE OTHER  how far apart are two merges?

The first form shares no code with lazymerge: it reads the recipe itself (scalar parameters only),
evaluates the method's definition in float64 and measures

    error = |stored - reference| / ulp(reference)

where ulp(reference) is the spacing of the output dtype around the float64 value, that of the
subnormals below the smallest normal number. An element rounded once, to nearest, from the exact
value has an error of at most 0.5. Float32 arithmetic that rounds at the end decides a few near
ties the other way, so "not nearest" counts errors above 0.5 + 2^-8.

Where terms cancel to less than float64 can tell from zero, the reference is rounding noise. An
element whose error exceeds 0.5 + 2^-8 ulp only by what the reference itself may be off (a bound
from the magnitudes of the terms) is "undecided" and left out of the other counts.

Exit 1 if any error is above 1 ulp, or tensors are missing, of another shape or dtype, or not of
the recipe. Relative model paths are taken from the working directory.

The second form counts in steps: the number of representable values from one to the other, +0
and -0 being the same. It always ends with 0 unless the checkpoints cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

PIECE_ELEMENTS = 1 << 16
"""Elements per arithmetic step: the float64 buffers stay in the processor's cache."""

SEGMENT_ELEMENTS = 1 << 22
"""Elements between two openings of the files: what has been mapped is resident until closed."""

NEAREST_LIMIT_ULPS = 0.5 + 2.0**-8

EXPONENT_BITS = 0x7FF0_0000_0000_0000
"""Of a float64. A finite number with all other bits cleared is the power of two at or below it."""


@dataclass(frozen=True, slots=True)
class Format:
    """A float dtype by its safetensors name.

    precision: bits of the significand, the implicit one included.
    minimum_exponent: exponent of the smallest normal number.
    """

    dtype: torch.dtype
    precision: int
    minimum_exponent: int


FORMATS: dict[str, Format] = {
    "F32": Format(torch.float32, 24, -126),
    "F16": Format(torch.float16, 11, -14),
    "BF16": Format(torch.bfloat16, 8, -126),
    "F8_E4M3": Format(torch.float8_e4m3fn, 4, -6),
    "F8_E5M2": Format(torch.float8_e5m2, 3, -14),
}
"""What a float64 reference can judge; float64 itself it cannot."""

INTEGER_VIEWS: dict[int, tuple[torch.dtype, torch.dtype]] = {
    1: (torch.int8, torch.int32),
    2: (torch.int16, torch.int32),
    4: (torch.int32, torch.int64),
    8: (torch.int64, torch.int64),
}
"""By item size: the integer of that size, and one in which differences do not overflow (those
of 8 bytes may; they are taken in float64)."""


class CheckError(Exception):
    """The check cannot be made."""


class Checkpoint:
    """The safetensors files of a folder: names, dtypes and shapes, and row ranges on demand."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckError(f"{folder}: no .safetensors file there")
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.dtypes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (the handle is no mapping)
                    stored = opened.get_slice(name)
                    self.files[name] = file
                    self.dtypes[name] = stored.get_dtype()
                    self.shapes[name] = tuple(stored.get_shape())

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as a flat tensor; its pages are unmapped when it is gone."""
        with safe_open(self.files[name], framework="pt") as opened:
            rows: torch.Tensor = (
                opened.get_slice(name)[start:stop] if self.shapes[name] else opened.get_tensor(name)
            )
        return rows.reshape(-1)


@dataclass(frozen=True, slots=True)
class Merge:
    """A recipe as a weighted sum: Σ weights[i] · models[i], or base + Σ weights[i] (xᵢ − base).

    weights: as the recipe has them; `coefficients` works in lambda and normalize.
    """

    method: str
    base: str | None
    models: tuple[str, ...]
    weights: tuple[float, ...]
    normalize: bool
    scale: float
    out_dtype: str | None

    def coefficients(self, present: Sequence[int]) -> list[float]:
        """The factor of each model in `present`, the models that have a tensor."""
        weights = [self.weights[index] for index in present]
        total = math.fsum(weights) if self.normalize else 1.0
        if self.method == "linear":
            if total == 0:
                raise CheckError("linear: the weights add up to zero, and normalize is true")
            return [weight / total for weight in weights]
        if abs(total) < 1e-8:
            total = 1.0
        return [self.scale * weight / total for weight in weights]


def read_merge(path: Path) -> Merge:
    """The recipe of a linear or task_arithmetic merge.

    Raises CheckError for other methods, for slices, and for parameters that are no scalars.
    """
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    method = recipe.get("merge_method") if isinstance(recipe, dict) else None
    if method not in ("linear", "task_arithmetic"):
        raise CheckError(f"{path}: only linear and task_arithmetic can be checked, not {method}")
    if "models" not in recipe:
        raise CheckError(f"{path}: only recipes with a list of models can be checked")
    shared = recipe.get("parameters") or {}
    base = recipe.get("base_model")
    if method == "task_arithmetic" and base is None:
        raise CheckError(f"{path}: task_arithmetic needs base_model")
    models: list[str] = []
    weights: list[float] = []
    for entry in recipe["models"]:
        if method == "task_arithmetic" and entry["model"] == base:
            continue  # its difference to itself is zero, and its weight counts for nothing
        settings = {**shared, **(entry.get("parameters") or {})}
        if "weight" not in settings:
            raise CheckError(f"{path}: no weight for {entry['model']}")
        models.append(entry["model"])
        weights.append(_scalar(path, "weight", settings["weight"]))
    out_dtype = recipe.get("out_dtype") or recipe.get("dtype")
    return Merge(
        method=method,
        base=base if method == "task_arithmetic" else None,
        models=tuple(models),
        weights=tuple(weights),
        normalize=bool(_scalar(path, "normalize", shared.get("normalize", method == "linear"))),
        scale=_scalar(path, "lambda", shared.get("lambda", 1.0)),
        out_dtype=None if out_dtype is None else str(out_dtype),
    )


def _scalar(path: Path, name: str, value: object) -> float:
    if isinstance(value, (bool, int, float)):
        return float(value)
    raise CheckError(f"{path}: {name} must be a scalar to be checked, not {value!r}")


@dataclass
class Report:
    """What was found in the elements of one dtype.

    elements: how many were compared.
    max_error: in ulps (against float64) or steps (between two merges).
    not_nearest: errors above 0.5 + 2^-8 ulp; always 0 between two merges.
    undecided: errors that float64 cannot tell from a smaller one; in no other count.
    above_one: errors above one ulp or step.
    not_finite: elements where exactly one side is NaN, or that overflow on one side; they
        count as above_one with an infinite error.
    max_difference: the largest absolute difference of finite elements.
    """

    elements: int = 0
    max_error: float = 0.0
    not_nearest: int = 0
    above_one: int = 0
    not_finite: int = 0
    undecided: int = 0
    max_difference: float = 0.0

    def add(self, other: Report) -> None:
        """Take in what was found in more elements."""
        self.elements += other.elements
        self.max_error = max(self.max_error, other.max_error)
        self.not_nearest += other.not_nearest
        self.above_one += other.above_one
        self.not_finite += other.not_finite
        self.undecided += other.undecided
        self.max_difference = max(self.max_difference, other.max_difference)


class Buffers(threading.local):
    """Float64 work space of one thread."""

    def __init__(self) -> None:
        self.reference = torch.empty(PIECE_ELEMENTS, dtype=torch.float64)
        self.term = torch.empty(PIECE_ELEMENTS, dtype=torch.float64)
        self.base = torch.empty(PIECE_ELEMENTS, dtype=torch.float64)
        self.spacing = torch.empty(PIECE_ELEMENTS, dtype=torch.float64)


def weighted_sum(
    inputs: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    base: torch.Tensor | None,
    buffers: Buffers,
) -> torch.Tensor:
    """Σ cᵢ xᵢ, or base + Σ cᵢ (xᵢ − base), in float64; the result lies in buffers.reference.

    inputs, base: flat, of equal length, at most PIECE_ELEMENTS.
    """
    count = len(inputs[0]) if base is None else len(base)
    reference, term = buffers.reference[:count], buffers.term[:count]
    if base is None:
        reference.zero_()
        for values, coefficient in zip(inputs, coefficients, strict=True):
            reference.add_(term.copy_(values), alpha=coefficient)
        return reference
    base_values = buffers.base[:count].copy_(base)
    reference.copy_(base_values)
    for values, coefficient in zip(inputs, coefficients, strict=True):
        reference.add_(term.copy_(values).sub_(base_values), alpha=coefficient)
    return reference


def reference_uncertainty(
    inputs: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    base: torch.Tensor | None,
    chosen: torch.Tensor,
) -> torch.Tensor:
    """A bound of |weighted_sum − exact value| at the chosen elements.

    chosen: bool, one per element.

    n terms pass at most n + 2 roundings of 2^-53, relative to sums that the sum of magnitudes
    bounds, and the coefficients carry a few of their own (lambda, normalize).
    Source: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3.
    """
    count = int(chosen.sum())
    base_magnitude = (
        torch.zeros(count, dtype=torch.float64) if base is None else base[chosen].double().abs()
    )
    total = base_magnitude.clone()
    for values, coefficient in zip(inputs, coefficients, strict=True):
        total += (values[chosen].double().abs() + base_magnitude) * abs(coefficient)
    return total * ((len(inputs) + 5) * 2.0**-53)


def judge(
    stored: torch.Tensor,
    reference: torch.Tensor,
    form: Format,
    buffers: Buffers,
    uncertainty: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Report:
    """Compare stored elements with their float64 reference.

    stored: flat, of the output dtype. reference: float64, equally long; left as it is.
    uncertainty: how far the reference may be off at the elements that a bool tensor chooses;
        None: it is exact.
    """
    count = len(stored)
    report = Report(elements=count)
    if count == 0:
        return report
    error = buffers.term[:count].copy_(stored).sub_(reference).abs_()
    largest_difference = error.max().item()
    spacing = buffers.spacing[:count]
    torch.bitwise_and(reference.view(torch.int64), EXPONENT_BITS, out=spacing.view(torch.int64))
    spacing.clamp_(min=2.0**form.minimum_exponent)
    spacing.mul_(2.0 ** (1 - form.precision))
    error.div_(spacing)
    largest = error.max().item()  # NaN if any is
    if not math.isfinite(largest):
        # Elements without a finite error are right when they are what the reference rounds
        # to: the same infinity, or NaN.
        special = ~torch.isfinite(error)
        special |= ~torch.isfinite(stored.to(torch.float64))
        rounded = reference[special].to(torch.float32).to(form.dtype).to(torch.float64)
        found = stored[special].to(torch.float64)
        same = (rounded == found) | (rounded.isnan() & found.isnan())
        report.not_finite = int((~same).sum())
        report.not_nearest = report.above_one = report.not_finite
        error[special] = 0.0
        largest = error.max().item()
        largest_difference = (error * spacing).max().item()
    if largest > NEAREST_LIMIT_ULPS and uncertainty is not None:
        suspect = error > NEAREST_LIMIT_ULPS
        # The exact value may be as large as |reference| + doubt, with the spacing it has there.
        doubt = uncertainty(suspect)
        upper = reference[suspect].abs_().add_(doubt)
        upper_spacing = (upper.view(torch.int64) & EXPONENT_BITS).view(torch.float64)
        upper_spacing = upper_spacing.clamp_(min=2.0**form.minimum_exponent)
        upper_spacing.mul_(2.0 ** (1 - form.precision))
        suspect_error = error[suspect]
        difference = suspect_error * spacing[suspect]
        excused = (difference - doubt) <= NEAREST_LIMIT_ULPS * upper_spacing
        report.undecided = int(excused.sum())
        error[suspect] = torch.where(excused, 0.0, suspect_error)
        largest = error.max().item()
    if largest > NEAREST_LIMIT_ULPS:
        report.not_nearest += int((error > NEAREST_LIMIT_ULPS).sum())
        report.above_one += int((error > 1.0).sum())
    report.max_error = math.inf if report.not_finite else largest
    report.max_difference = largest_difference
    return report


def steps_between(one: torch.Tensor, other: torch.Tensor) -> Report:
    """Compare flat tensors of the same float dtype by the representable values between them."""
    report = Report(elements=len(one))
    if torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
        return report
    one_ordinals, other_ordinals = _ordinal(one), _ordinal(other)
    steps = (one_ordinals - other_ordinals).abs()
    working_dtype = torch.float64 if one.element_size() > 2 else torch.float32
    difference = one.to(working_dtype).sub_(other.to(working_dtype)).abs_()
    largest_difference = difference.max().item()
    if not math.isfinite(largest_difference):
        # Finite values have finite differences in the wider dtype (float64 may overflow). The
        # others agree when both are NaN, or the same infinity.
        special = ~difference.isfinite()
        one_special, other_special = one[special].double(), other[special].double()
        agree = (one_special == other_special) | (one_special.isnan() & other_special.isnan())
        report.not_finite = report.above_one = int((~agree).sum())
        steps[special] = 0
        difference[special] = 0.0
        largest_difference = difference.max().item()
    largest_steps = float(steps.max())
    if largest_steps > 1:
        report.above_one += int((steps > 1).sum())
    report.max_error = math.inf if report.not_finite else largest_steps
    report.max_difference = largest_difference
    return report


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    """Number of steps from zero, negative below it: sign and magnitude bits as an integer."""
    narrow, wide = INTEGER_VIEWS[values.element_size()]
    bits = values.view(narrow).to(wide)
    ordinal = torch.where(bits < 0, torch.iinfo(narrow).min - bits, bits)
    return ordinal.to(torch.float64) if wide is narrow else ordinal


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of one tensor; a scalar is one row."""

    name: str
    start: int
    stop: int


def segments(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Segment]:
    """Every tensor in runs of whole rows of about SEGMENT_ELEMENTS; at least one row."""
    for name, shape in shapes.items():
        rows = shape[0] if shape else 1
        row_elements = max(1, prod(shape[1:]))
        step = max(1, SEGMENT_ELEMENTS // row_elements)
        for start in range(0, rows, step):
            yield Segment(name, start, min(rows, start + step))


def check_merge(
    recipe: Path, merged_folder: Path, threads: int | None = None
) -> tuple[dict[str, Report], list[str]]:
    """Judge a merged checkpoint.

    Returns a report per safetensors dtype, and what is wrong besides values. Raises CheckError
    when the recipe or a model cannot be read, or the output's dtype cannot be judged.
    """
    merge = read_merge(recipe)
    merged = Checkpoint(merged_folder)
    opened = {name: Checkpoint(Path(name)) for name in {*merge.models, merge.base} - {None} if name}
    base = None if merge.base is None else opened[merge.base]
    models = [opened[name] for name in merge.models]
    readers = [*models, base] if base is not None else models

    faults: list[str] = []
    judged: dict[str, tuple[int, ...]] = {}
    for name in sorted(
        {name for model in opened.values() for name in model.files} - set(merged.files)
    ):
        faults.append(f"{name}: not in {merged_folder}")
    for name, shape in merged.shapes.items():
        having = [model for model in readers if name in model.files]
        if not having:
            faults.append(f"{name}: in none of the recipe's models")
        elif any(model.shapes[name] != shape for model in having):
            faults.append(f"{name}: {shape} in the output, another shape in a model")
        elif base is not None and name not in base.files:
            faults.append(f"{name}: not in the base, cannot be judged")
        elif having[0].dtypes[name][0] not in "BF" or having[0].dtypes[name] == "BOOL":
            judged[name] = shape
        elif merged.dtypes[name] == "F64":
            raise CheckError(f"{name}: float64 outputs cannot be judged by float64 arithmetic")
        elif merged.dtypes[name] not in FORMATS:
            faults.append(f"{name}: stored as {merged.dtypes[name]}")
        elif merge.out_dtype not in (None, str(FORMATS[merged.dtypes[name]].dtype)[6:]):
            faults.append(f"{name}: stored as {merged.dtypes[name]}, not as {merge.out_dtype}")
        else:
            judged[name] = shape

    buffers = Buffers()

    def check(segment: Segment) -> tuple[str, Report]:
        name, rows = segment.name, (segment.start, segment.stop)
        dtype = merged.dtypes[name]
        stored = merged.read_rows(name, *rows)
        present = [index for index, model in enumerate(models) if name in model.files]
        if dtype not in FORMATS:
            copied = [model.read_rows(name, *rows) for model in readers if name in model.files]
            different = sum(int((stored != values).sum()) for values in copied)
            error = math.inf if different else 0.0
            return dtype, Report(len(stored), error, different, different)
        coefficients = merge.coefficients(present)
        inputs = [models[index].read_rows(name, *rows) for index in present]
        base_values = None if base is None else base.read_rows(name, *rows)
        report = Report()
        for first in range(0, len(stored), PIECE_ELEMENTS):
            piece = slice(first, first + PIECE_ELEMENTS)
            terms = (
                [values[piece] for values in inputs],
                coefficients,
                None if base_values is None else base_values[piece],
            )
            reference = weighted_sum(*terms, buffers)
            uncertainty = partial(reference_uncertainty, *terms)
            report.add(judge(stored[piece], reference, FORMATS[dtype], buffers, uncertainty))
        return dtype, report

    return _reports(check, judged, threads), faults


def check_between(
    one_folder: Path, other_folder: Path, threads: int | None = None
) -> tuple[dict[str, Report], list[str]]:
    """Compare two checkpoints: a report per dtype, and the tensors that cannot be compared."""
    one, other = Checkpoint(one_folder), Checkpoint(other_folder)
    faults = [f"{name}: only in one" for name in sorted(set(one.files) ^ set(other.files))]
    compared: dict[str, tuple[int, ...]] = {}
    for name, shape in one.shapes.items():
        if name not in other.files:
            continue
        kind, other_kind = (one.dtypes[name], shape), (other.dtypes[name], other.shapes[name])
        if kind != other_kind:
            faults.append(f"{name}: {kind} in one, {other_kind} in the other")
        else:
            compared[name] = shape

    def check(segment: Segment) -> tuple[str, Report]:
        report = Report()
        one_rows = one.read_rows(segment.name, segment.start, segment.stop)
        other_rows = other.read_rows(segment.name, segment.start, segment.stop)
        for first in range(0, len(one_rows), PIECE_ELEMENTS):
            piece = slice(first, first + PIECE_ELEMENTS)
            if one_rows.is_floating_point():
                report.add(steps_between(one_rows[piece], other_rows[piece]))
            else:
                different = int((one_rows[piece] != other_rows[piece]).sum())
                error = math.inf if different else 0.0
                report.add(Report(len(one_rows[piece]), error, 0, different))
        return one.dtypes[segment.name], report

    return _reports(check, compared, threads), faults


def _reports(
    check: Callable[[Segment], tuple[str, Report]],
    shapes: Mapping[str, tuple[int, ...]],
    threads: int | None,
) -> dict[str, Report]:
    """Run `check` on all segments, several at a time, and add up its reports by dtype."""
    reports: dict[str, Report] = {}
    intra_operation_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the segments are what runs in parallel
    pool = ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1))
    try:
        for dtype, report in pool.map(check, list(segments(shapes))):
            reports.setdefault(dtype, Report()).add(report)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(intra_operation_threads)
    return reports


def _print_table(reports: Mapping[str, Report], unit: str, seconds: float) -> None:
    table = Table(caption=f"{seconds:.1f} s", caption_justify="left")
    table.add_column("dtype")
    columns = ["elements", f"max error ({unit})"]
    columns += ["undecided", "not nearest (> 0.5 + 2^-8)"] if unit == "ulp" else []
    columns += [f"> 1 {unit}", "of these not finite", "max difference"]
    for column in columns:
        table.add_column(column, justify="right")
    for dtype, report in sorted(reports.items()):
        cells = [f"{report.elements:,}", f"{report.max_error:.6g}"]
        cells += [f"{report.undecided:,}", f"{report.not_nearest:,}"] if unit == "ulp" else []
        cells += [f"{report.above_one:,}", f"{report.not_finite:,}", f"{report.max_difference:.3g}"]
        table.add_row(dtype, *cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # in a pipe rich assumes 80 columns and would cut numbers
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        usage="%(prog)s [--threads N] [--json] (RECIPE MERGED | --between ONE OTHER)",
    )
    parser.add_argument("paths", nargs=2, type=Path, help="RECIPE MERGED, or ONE OTHER")
    parser.add_argument("--between", action="store_true", help="compare two merged checkpoints")
    parser.add_argument("--threads", type=int, metavar="N", help="default: cores, at most 8")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parsed = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        compare = check_between if parsed.between else check_merge
        reports, faults = compare(parsed.paths[0], parsed.paths[1], parsed.threads)
    except (CheckError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    if parsed.json:
        document = {dtype: asdict(report) for dtype, report in sorted(reports.items())}
        print(json.dumps({"dtypes": document, "faults": faults, "seconds": seconds}, indent=2))
    else:
        _print_table(reports, "step" if parsed.between else "ulp", seconds)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    wrong = not parsed.between and any(report.above_one for report in reports.values())
    return 1 if faults or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
