"""What looks wrong about a checkpoint's numbers, from a scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from statistics import median

from ..architecture import LayerStacks
from ..architecture.layers import LayerPlace
from ..architecture.tying import heads
from ..checkpoint.tensor import Checkpoint
from ..sizes import format_bytes
from .scan import TensorScan
from .suspicions import Severity, Suspicion
from .suspicions.groups import layers_text, runs
from .suspicions.suspicion import number, short

EXTREME = 1_000.0
"""By judgement, not measured: trained weights hardly ever come near it."""

BROKEN = 1e6
"""No layer computes with numbers like this; bits have been flipped, or bytes read as others."""

FAR = 10.0
"""Times the root mean square of the same matrix in the other layers; by judgement, not measured."""

FAR_VECTORS = 50.0
"""The same of norms and biases, of which the first layers' differ more."""

LEAST_LAYERS = 4
"""Fewer say nothing of what is usual."""

MANY_SUBNORMALS = 0.01

MANY_ZEROS = 0.3
"""Of a matrix: it was pruned, or dropped by a merge."""


def scan_suspicions(
    checkpoint: Checkpoint, stacks: LayerStacks, scans: Sequence[TensorScan]
) -> Iterator[Suspicion]:
    """Everything that looks wrong about the numbers."""
    own = [scan for scan in scans if scan.name in checkpoint.tensors]
    places = {scan.name: stacks.locate(scan.name) for scan in own}
    for kind, severity, is_found, sentence in _LOOKS:
        found = [scan for scan in own if is_found(scan, len(checkpoint.tensors[scan.name].shape))]
        if found:
            yield Suspicion(kind, sentence(found).format(where=_where(found, places)), severity)
    yield from _outliers(checkpoint, own, places)
    yield from _equal_layers(checkpoint, own, places)
    yield from _equal_head(checkpoint, own)


Places = Mapping[str, LayerPlace | None]
Sentence = Callable[[Sequence[TensorScan]], str]


def _total(found: Sequence[TensorScan], what: str) -> int:
    return sum(getattr(scan, what) for scan in found)


def _elements(found: Sequence[TensorScan], what: str) -> str:
    count = _total(found, what)
    return "1 element is" if count == 1 else f"{count:,} elements are"


_LOOKS: tuple[tuple[str, Severity, Callable[[TensorScan, int], bool], Sentence], ...] = (
    (
        "nan",
        "mistake",
        lambda scan, _: scan.nan > 0,
        lambda found: (
            f"{_elements(found, 'nan')} nan: {{where}}; the model computes "
            "nan, and so does every merge of it; download it again, or train it anew"
        ),
    ),
    (
        "inf",
        "mistake",
        lambda scan, _: scan.inf > 0,
        lambda found: (
            f"{_elements(found, 'inf')} inf: {{where}}; numbers have left "
            "the range of the dtype; save the original as bfloat16"
        ),
    ),
    (
        "all-zero",
        "mistake",
        lambda scan, dimensions: scan.is_zero and dimensions > 1,
        lambda found: (
            f"{_tensors(found)} hold{'s' * (len(found) == 1)} only zeros: {{where}}; "
            "what they compute is lost, unless layers were put in without effect on purpose"
        ),
    ),
    (
        "zero-vectors",
        "note",
        lambda scan, dimensions: scan.is_zero and dimensions < 2 and not scan.name.endswith("bias"),
        lambda found: f"{_tensors(found)} hold{'s' * (len(found) == 1)} only zeros: {{where}}",
    ),
    (
        "constant",
        "mistake",
        lambda scan, dimensions: scan.is_constant and not scan.is_zero and dimensions > 1,
        lambda found: (
            f"{_tensors(found)} hold{'s' * (len(found) == 1)} one number everywhere: "
            "{where}; they were never trained, or are damaged"
        ),
    ),
    (
        "constant-vectors",
        "note",
        lambda scan, dimensions: scan.is_constant and not scan.is_zero and dimensions < 2,
        lambda found: (
            f"{_tensors(found)} hold{'s' * (len(found) == 1)} one number everywhere, as "
            "untrained ones do: {where}"
        ),
    ),
    (
        "magnitude",
        "mistake",
        lambda scan, _: scan.largest >= BROKEN,
        lambda found: (
            f"elements are as large as {number(max(s.largest for s in found))}: {{where}}"
            "; no model computes with such numbers; the file is damaged, or of another dtype"
        ),
    ),
    (
        "magnitude",
        "note",
        lambda scan, _: EXTREME <= scan.largest < BROKEN,
        lambda found: (
            f"elements are as large as {number(max(s.largest for s in found))}: {{where}}"
            "; averages with another model may not bear them"
        ),
    ),
    (
        "subnormals",
        "note",
        lambda scan, _: scan.subnormals > MANY_SUBNORMALS * scan.elements,
        lambda found: (
            f"{_elements(found, 'subnormals')} subnormal: {{where}}; they "
            "are imprecise, and some processors take them for 0"
        ),
    ),
    (
        "sparse",
        "note",
        lambda scan, dimensions: (
            dimensions > 1 and MANY_ZEROS * scan.elements < scan.zeros < scan.elements
        ),
        lambda found: (
            f"{_total(found, 'zeros') / _total(found, 'elements'):.0%} of the elements of "
            f"{_tensors(found)} are 0: {{where}}; the model was pruned"
        ),
    ),
)


def _tensors(found: Sequence[TensorScan]) -> str:
    return "1 tensor" if len(found) == 1 else f"{len(found)} tensors"


def _where(found: Sequence[TensorScan], places: Places, most: int = 3) -> str:
    """The tensors, those of a kind together: `mlp.up_proj.weight in layers 0–3 and 7`."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for scan in found:
        place = places[scan.name]
        if place is None:
            kinds[scan.name, ""] = []
        else:
            kinds.setdefault((place.suffix, place.stack.prefix), []).append(place.index)
    shown = []
    for (name, prefix), layers in list(kinds.items())[:most]:
        where = f" in {layers_text(layers)} of {short(prefix)}" if prefix else ""
        shown.append(short(name) + where)
    more = f" and {len(kinds) - most} more" if len(kinds) > most else ""
    return ", ".join(shown) + more


def _outliers(
    checkpoint: Checkpoint, scans: Sequence[TensorScan], places: Places
) -> Iterator[Suspicion]:
    """Tensors whose size is not that of the same tensor in the other layers."""
    kinds: dict[tuple[str, str], list[tuple[int, TensorScan]]] = {}
    for scan in scans:
        place = places[scan.name]
        usable = isfinite(scan.norm) and scan.norm > 0 and not scan.nan and not scan.inf
        if place is not None and usable and checkpoint.tensors[scan.name].scale is None:
            kinds.setdefault((place.stack.prefix, place.suffix), []).append((place.index, scan))
    for (prefix, suffix), members in kinds.items():
        if len(members) < LEAST_LAYERS:
            continue
        usual = median(scan.rms for _, scan in members)
        is_matrix = len(checkpoint.tensors[members[0][1].name].shape) > 1
        far = FAR if is_matrix else FAR_VECTORS
        found = [
            (layer, scan.rms)
            for layer, scan in members
            if not usual / far <= scan.rms <= usual * far
        ]
        if found:
            layers = layers_text([layer for layer, _ in found])
            times = max(found, key=lambda item: max(item[1] / usual, usual / item[1]))[1] / usual
            yield Suspicion(
                "outlier",
                f"{short(suffix)} in {layers} of {short(prefix)} is "
                f"{number(times)} times as large as in the other layers (root mean square); "
                "compare it with the original's",
                "note",
            )


def _equal_layers(
    checkpoint: Checkpoint, scans: Sequence[TensorScan], places: Places
) -> Iterator[Suspicion]:
    """Layers whose matrices are the same bytes."""
    contents: dict[str, dict[int, list[tuple[str, str]]]] = {}
    for scan in scans:
        place = places[scan.name]
        if place is not None and len(checkpoint.tensors[scan.name].shape) > 1 and not scan.is_zero:
            layers = contents.setdefault(place.stack.prefix, {})
            layers.setdefault(place.index, []).append((place.suffix, scan.checksum))
    for prefix, layers in contents.items():
        alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for layer, content in sorted(layers.items()):
            alike.setdefault(tuple(sorted(content)), []).append(layer)
        repeated = {numbers[0]: numbers[1:] for numbers in alike.values() if len(numbers) > 1}
        if repeated:
            copies = sorted(layer for numbers in repeated.values() for layer in numbers)
            yield Suspicion(
                "layers-repeated",
                f"{layers_text(copies)} of {short(prefix)} "
                f"{'is a copy' if len(copies) == 1 else 'are copies'} of {runs(sorted(repeated))}: "
                "the model was put together from slices of itself",
                "note",
            )


def _equal_head(checkpoint: Checkpoint, scans: Sequence[TensorScan]) -> Iterator[Suspicion]:
    """A stored head that is the embedding."""
    by_checksum: dict[str, list[str]] = {}
    for scan in scans:
        if scan.is_zero:
            continue
        by_checksum.setdefault(scan.checksum, []).append(scan.name)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    for head in heads(shapes):
        same = next((n for n in by_checksum.values() if head in n and len(n) > 1), [])
        other = next((n for n in same if n != head and shapes[n] == shapes[head]), None)
        if other is not None:
            size = format_bytes(checkpoint.tensors[head].size_bytes)
            yield Suspicion(
                "head-equal",
                f"{short(head)} is the same bytes as {short(other)}: with tie_word_embeddings: "
                f"true in config.json it need not be stored ({size})",
                "note",
            )
