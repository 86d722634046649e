"""Which tensors of a model an adapter changes, and how.

    A, B      W + scaling · B @ A           a linear layer, W of shape (out, in)
              W + scaling · (B @ A)ᵀ        W of shape (in, out): gpt-2's layers; and embeddings
    whole     in W's place                  modules_to_save, biases, embeddings with more rows

Where the model ties its output head to its input embedding, W is one matrix for both: factors of
either change both, as peft has it. A head or an embedding that is one of modules_to_save was
trained apart from the other: then the model has both from there on.

Shapes say which of the first two a matrix is. Where it is square they do not: then it is as the
adapter's other matrices are, and if there are none, or of both kinds, as fan_in_fan_out says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from ..architecture import is_vocabulary
from ..architecture.layouts import WRAPPERS, renamed
from ..architecture.tying import embedding_of_head, head_of_embedding, is_head, is_tied
from ..checkpoint.tensor import DTYPES, Checkpoint, LowRank, TensorInfo
from ..checkpoint.wording import quoted, shown
from ..errors import InputErrors
from .names import FIRST, MAGNITUDE, SECOND, WHOLE, WRAPPERS_OF_WHOLES, Part, part_of
from .reading import AdapterFiles

MOST_PROBLEMS_SHOWN = 10


@dataclass(slots=True)
class _Parts:
    """What an adapter has for one tensor, by kind."""

    target: str
    by_kind: dict[str, TensorInfo] = field(default_factory=dict)
    is_embedding: bool = False


@dataclass(frozen=True, slots=True)
class Adapted:
    """A model with an adapter.

    tensors: by name. is_untied: it has an output head of its own now, unlike the model's config
        says. notices: one sentence each.
    """

    tensors: dict[str, TensorInfo]
    is_untied: bool
    notices: tuple[str, ...]


def adapted_tensors(model: Checkpoint, adapter: AdapterFiles) -> Adapted:
    """A model's tensors, as they are with an adapter.

    Raises:
        InputErrors: a tensor of the adapter fits none of the model's, or is not known; each is
            named, with the remedy.
    """
    return _Matching(model, adapter).tensors()


class _Matching:
    def __init__(self, model: Checkpoint, adapter: AdapterFiles) -> None:
        self.model = model
        self.adapter = adapter
        self.problems: list[str] = []
        self.notices: list[str] = []
        self.is_untied = False

    def tensors(self) -> Adapted:
        parts = self._parts()
        names = self._names(parts)
        tensors = dict(self.model.tensors)
        self._tie(parts, names, tensors)
        changes: list[tuple[str, _Parts]] = []
        for target, own in parts.items():
            name = names[target]
            if name not in tensors:
                self._problem(
                    next(iter(own.by_kind.values())),
                    f"is for {quoted(name)}, and {self.model.reference} has no such tensor. Is it "
                    "the model that the adapter was trained on, of the same class (a head of its "
                    "own cannot be added)?",
                )
                continue
            if WHOLE in own.by_kind:
                tensors[name] = self._replaced(tensors[name], own.by_kind.pop(WHOLE))
            if own.by_kind:
                changes.append((name, own))
        squares_transposed = self._are_squares_transposed(tensors, changes)
        for name, own in changes:
            changed = self._changed(tensors[name], own, squares_transposed)
            if changed is not None:
                tensors[name] = changed
        if not parts and not self.problems:
            self.problems.append(f"{self.adapter.path}: holds no tensor. Download it again.")
        if self.problems:
            raise InputErrors(_shortened(self.problems))
        return Adapted(tensors, self.is_untied, tuple(self.notices))

    def _tie(
        self, parts: dict[str, _Parts], names: dict[str, str], tensors: dict[str, TensorInfo]
    ) -> None:
        """Sorts out what is for a matrix that is both input embedding and output head.

        parts, names: by target; a head's go to its embedding where the two stay one.
        tensors: the model's; where the two part, the head is among them.
        """
        shapes = {name: tensor.shape for name, tensor in self.model.tensors.items()}
        of_head = {
            embedding_of_head(name, shapes): target
            for target, name in names.items()
            if is_head(name)
        }
        of_embedding = {name: target for target, name in names.items() if is_vocabulary(name)}
        for embedding in [name for name in shapes if name in {*of_head, *of_embedding}]:
            target, other = of_head.get(embedding), of_embedding.get(embedding)
            head = head_of_embedding(embedding, shapes) if target is None else names[target]
            if head is None or not self._is_tied(head, is_named=target is not None):
                continue
            own, others = parts.get(target or ""), parts.get(other or "")
            if self._is_apart(own) or self._is_apart(others, shapes[embedding]):
                tensors[head] = replace(self.model.tensors[embedding], name=head)
                self.is_untied = True
                self.notices.append(
                    f"the adapter was trained with {quoted(head)} and {quoted(embedding)} apart, "
                    "which the model ties; from here on it has both"
                )
                continue
            self.notices.append(
                f"the adapter changes {quoted(embedding)}, which is the output head too: both "
                "change"
            )
            if own is None or target is None:
                continue
            names[target] = embedding
            if others is not None and other is not None:
                del parts[other]
                parts[target] = self._as_one(others, own)

    def _is_tied(self, head: str, *, is_named: bool) -> bool:
        """is_named: the adapter is for the head, too, so that the model has one."""
        said = is_tied(self.model.config)
        return is_named and head not in self.model.tensors if said is None else said

    def _is_apart(self, own: _Parts | None, shape: tuple[int, ...] | None = None) -> bool:
        """Whether an embedding or a head was trained as a copy. shape: that it must have to be one;
        the head of a model whose vocabulary has grown is nowhere else."""
        if own is None or self.adapter.config.keeps_ties or WHOLE not in own.by_kind:
            return False
        is_of_shape = shape in (None, own.by_kind[WHOLE].shape)
        return is_of_shape and self.adapter.config.is_saved(own.target)

    def _as_one(self, embedding: _Parts, head: _Parts) -> _Parts:
        """What is for an embedding and for the head that is tied to it."""
        if FIRST in embedding.by_kind and FIRST in head.by_kind:
            self._problem(
                head.by_kind[FIRST],
                f"and {quoted(embedding.by_kind[FIRST].name)} both change one matrix: "
                f"{self.model.reference} ties its output head to its input embedding. Merge the "
                "adapter into its model with peft first.",
            )
        factors = head if FIRST in head.by_kind else embedding
        by_kind = {**head.by_kind, **embedding.by_kind}
        return _Parts(factors.target, by_kind, factors.is_embedding)

    def _names(self, targets: Iterable[str]) -> dict[str, str]:
        """What the model calls the tensors that an adapter is for."""
        bare = {target: self._unwrapped(target) for target in targets}
        found = renamed(bare.values(), self.model.tensors)
        names = {}
        for target, name in bare.items():
            other = found.get(name, name)
            # a module keeps its own name: `score` does not become `lm_head`
            names[target] = other if _last_words(other) == _last_words(name) else name
        return names

    def _unwrapped(self, name: str) -> str:
        """A name without what wrappers of the model have put before it."""
        while name not in self.model.tensors:
            wrapper = next((each for each in WRAPPERS if name.startswith(each)), None)
            if wrapper is None:
                break
            name = name.removeprefix(wrapper)
        return name

    def _problem(self, tensor: TensorInfo, problem: str) -> None:
        self.problems.append(f"{self.adapter.path}: tensor {quoted(tensor.name)} {problem}")

    def _parts(self) -> dict[str, _Parts]:
        """By the name of the tensor that they are for, as the adapter would write it."""
        found: dict[str, _Parts] = {}
        for tensor in self.adapter.tensors.values():
            part = part_of(tensor.name)
            if part is None:
                self._problem(
                    tensor,
                    "is not known: it is of another kind than plain LoRA or DoRA. Merge the "
                    "adapter into its model with peft first.",
                )
                continue
            if not DTYPES[tensor.dtype].is_float:
                self._problem(tensor, f"is {tensor.dtype}, not a float. Dequantise the adapter.")
                continue
            if not self._is_wanted(tensor, part):
                continue
            own = found.setdefault(part.target, _Parts(part.target))
            other = own.by_kind.setdefault(part.kind, tensor)
            own.is_embedding |= part.is_embedding
            if other is not tensor:
                self._problem(
                    tensor,
                    f"and {quoted(other.name)} are of two adapters. Keep one of them in the file.",
                )
        return found

    def _is_wanted(self, tensor: TensorInfo, part: Part) -> bool:
        config = self.adapter.config
        if part.kind == MAGNITUDE and not config.is_dora:
            self._problem(
                tensor, "is one of DoRA, and adapter_config.json does not say use_dora. Correct it."
            )
            return False
        if part.kind != WHOLE:
            return True
        is_bias = part.target.endswith(".bias") and config.bias != "none"
        is_wrapped = any(f".{word}." in tensor.name for word in WRAPPERS_OF_WHOLES)
        if is_bias or is_wrapped or config.is_saved(part.target) or is_vocabulary(part.target):
            return True
        self._problem(
            tensor,
            "is neither a factor nor of one of the modules_to_save in adapter_config.json. Name "
            "its module there if it is to take the place of the model's own.",
        )
        return False

    def _replaced(self, before: TensorInfo, tensor: TensorInfo) -> TensorInfo:
        """A tensor of the adapter in the place of one of the model's."""
        same_rows_matter = not is_vocabulary(before.name)
        if (
            before.shape != tensor.shape
            if same_rows_matter
            else before.shape[1:] != tensor.shape[1:] or len(before.shape) != len(tensor.shape)
        ):
            self._problem(
                tensor,
                f"has shape {shown(list(tensor.shape))}, {quoted(before.name)} of "
                f"{self.model.reference} {shown(list(before.shape))}. They are of two models.",
            )
        return replace(tensor, name=before.name, folder=self.adapter.folder)

    def _are_squares_transposed(
        self, tensors: Mapping[str, TensorInfo], changes: Iterable[tuple[str, _Parts]]
    ) -> bool:
        seen = set()
        for name, own in changes:
            shape, ends = tensors[name].shape, _ends(own)
            if ends is None or own.is_embedding or len(shape) != 2 or is_vocabulary(name):
                continue
            if shape[0] != shape[1] and ends in (shape, shape[::-1]):
                seen.add(ends != shape)
        return seen.pop() if len(seen) == 1 else self.adapter.config.is_transposed

    def _changed(
        self, tensor: TensorInfo, own: _Parts, squares_transposed: bool
    ) -> TensorInfo | None:
        """A tensor with its factors; None, reported, where they do not fit."""
        first, second = own.by_kind.get(FIRST), own.by_kind.get(SECOND)
        magnitude = own.by_kind.get(MAGNITUDE)
        wanted = {FIRST: first, SECOND: second} | (
            {MAGNITUDE: magnitude} if self.adapter.config.is_dora else {}
        )
        missing = [kind for kind, part in wanted.items() if part is None]
        if missing or first is None or second is None:
            self._problem(
                next(iter(own.by_kind.values())),
                f"has no lora_{missing[0]} beside it. Download the adapter again.",
            )
            return None
        ends = _ends(own)
        fits = ends is not None and (
            ends in (tensor.shape[::-1],) if own.is_embedding else _fits(tensor.shape, ends, first)
        )
        if ends is None or not fits:
            self._problem(
                first,
                f"has shape {shown(list(first.shape))} and {quoted(second.name)} "
                f"{shown(list(second.shape))}, which do not fit {quoted(tensor.name)} of shape "
                f"{shown(list(tensor.shape))}. Is {self.model.reference} the model that the "
                "adapter was trained on?",
            )
            return None
        if not DTYPES[tensor.dtype].is_float:
            self._problem(
                first,
                f"changes {quoted(tensor.name)}, which is {tensor.dtype}: the model is quantised. "
                "Take its unquantised version.",
            )
            return None
        config, rank = self.adapter.config, first.shape[0]
        if config.rank not in (None, rank):
            self._problem(
                first,
                f"is of rank {rank}, adapter_config.json says r: {config.rank} and no "
                "rank_pattern. The two are not of one adapter: download both again.",
            )
            return None
        if magnitude is not None and not self._is_dora_known(tensor, magnitude, ends):
            return None
        is_square = len(set(tensor.shape)) == 1
        return replace(
            tensor,
            change=LowRank(
                folder=self.adapter.folder,
                first=first,
                second=second,
                is_transposed=own.is_embedding
                or (
                    len(tensor.shape) == 2
                    and (squares_transposed if is_square else ends != tensor.shape)
                ),
                scaling=config.scaling(_module(own.target), rank),
                rows=tensor.shape[0],
                magnitude=magnitude,
            ),
        )

    def _is_dora_known(
        self, tensor: TensorInfo, magnitude: TensorInfo, ends: tuple[int, ...]
    ) -> bool:
        if len(tensor.shape) != 2:
            self._problem(
                magnitude,
                f"is for a tensor of shape {shown(list(tensor.shape))}; DoRA is known for matrices "
                "only. Merge the adapter into its model with peft first.",
            )
        elif magnitude.element_count != ends[0]:
            self._problem(
                magnitude,
                f"has {magnitude.element_count} elements for {ends[0]} outputs of "
                f"{quoted(tensor.name)}. Download the adapter again.",
            )
        else:
            return True
        return False


def _ends(own: _Parts) -> tuple[int, ...] | None:
    """What the product of two factors is between: outputs, and inputs in one dimension or more;
    None where they do not fit each other."""
    first, second = own.by_kind.get(FIRST), own.by_kind.get(SECOND)
    if first is None or second is None or len(first.shape) < 2 or len(second.shape) < 2:
        return None
    rank = first.shape[0]
    if second.shape[1] != rank or prod(second.shape[2:]) != 1 or rank == 0:
        return None
    return (second.shape[0], *first.shape[1:])


def _fits(shape: tuple[int, ...], ends: tuple[int, ...], first: TensorInfo) -> bool:
    """Whether a matrix or a convolution's kernels may have a change between these ends."""
    return ends == shape or (len(first.shape) == 2 and ends == shape[::-1])


def _last_words(name: str) -> list[str]:
    return name.split(".")[-2:]


def _module(target: str) -> str:
    """The name of a tensor's module, without what PEFT puts before it."""
    return target.rpartition(".")[0].removeprefix("base_model.model.")


def _shortened(problems: list[str]) -> list[str]:
    if len(problems) <= MOST_PROBLEMS_SHOWN:
        return problems
    rest = len(problems) - MOST_PROBLEMS_SHOWN
    return [*problems[:MOST_PROBLEMS_SHOWN], f"… and {rest} more problems of this kind"]
