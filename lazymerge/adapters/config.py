"""adapter_config.json of PEFT, as data: what of it says how an adapter's tensors are used.

Most keys are about training, and are not looked at. A key that makes the adapter another one than
plain LoRA or DoRA is an error by its name: merged as if it were not there, the model would be wrong
without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..checkpoint.json_file import parse_json_mapping
from ..checkpoint.regular_file import open_regular_file, read_exactly
from ..checkpoint.tensor import FileInfo
from ..checkpoint.wording import kind, quoted, shown
from ..errors import InputError

CONFIG_NAME = "adapter_config.json"
LIMIT_BYTES = 10_000_000
LIMIT_VALUES = 200_000
"""The largest name every layer of a model in three keys."""

MOST_RANK = 1 << 20
MOST_NUMBER = 1e30

REFUSED: Mapping[str, str] = {
    "lora_bias": "adds to biases",
    "trainable_token_indices": "changes rows of the embeddings for some tokens",
    "target_parameters": "changes parameters that are no layer's weight",
    "layer_replication": "repeats layers of the model",
    "alora_invocation_tokens": "acts on a part of the text only",
    "use_qalora": "groups the inputs of a quantised model",
    "use_bdlora": "has factors in blocks",
    "arrow_config": "chooses between several adapters",
    "kasa_config": "has a third factor",
    "monteclora_config": "is a mixture of adapters",
    "velora_config": "is of another kind than plain LoRA",
}
"""Keys that, set, make an adapter something else; and what."""

KEEPS_THE_MODEL = ("gaussian", "eva", "orthogonal")
"""Values of init_lora_weights, besides true and false, with which training begins from the model as
it is. With the others its weights are changed first."""

MOST_EXPRESSIONS = 20
MOST_EXPRESSION_CHARACTERS = 200

_SIMPLE = re.compile(r"[\w.\\|()\[\]^$*+-]*")
_WORDS = re.compile(r"\^?[\w.-]+\$?")

MOST_MODULE_CHARACTERS = 1_000
"""A longer name is no module's, and is not compared with expressions."""

_REMEDY = "Merge it into its model with peft first."


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says.

    rank: of every change, where rank_pattern says nothing else; None: it does.
    alpha: lora_alpha.
    alphas_by_end: of modules whose names end in some words (are, after ^), by those: the number in
        alpha_pattern, the pattern, and the alpha.
    alphas_by_expression: the same of other patterns. The first that fits counts.
    is_rank_stabilised: scaling is alpha / √r and not alpha / r.
    is_dora: outputs are scaled to a length.
    is_transposed: fan_in_fan_out.
    saved: parts of names of modules that are the adapter's own as wholes.
    keeps_ties: ensure_weight_tying: a tied embedding and head that are saved stay tied.
    bias: none, lora_only or all.
    """

    rank: int | None
    alpha: float
    alphas_by_end: Mapping[str, tuple[int, str, float]]
    alphas_by_expression: tuple[tuple[int, str, float], ...]
    is_rank_stabilised: bool
    is_dora: bool
    is_transposed: bool
    saved: tuple[str, ...]
    keeps_ties: bool
    bias: str

    def scaling(self, module: str, rank: int) -> float:
        """The factor of a module's product.

        module: its name, as the adapter writes it.
        """
        words = module.split(".")
        ends = [f"^{module}", *(".".join(words[first:]) for first in range(len(words)))]
        fitting = [self.alphas_by_end[end] for end in ends if end in self.alphas_by_end]
        if len(module) <= MOST_MODULE_CHARACTERS:
            fitting += [found for found in self.alphas_by_expression if _fits(found[1], module)]
        alpha = min(fitting)[2] if fitting else self.alpha
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    def is_saved(self, name: str) -> bool:
        """Whether a tensor is one of a module that is the adapter's own as a whole: one whose name
        ends as one of modules_to_save does, `input_layernorm` for `norm`, as peft has it."""
        words = name.split(".")
        modules = [".".join(words[:count]) for count in range(1, len(words))]
        return any(module.endswith(self.saved) for module in modules)


def read_adapter_config(path: Path) -> tuple[AdapterConfig, FileInfo]:
    """An adapter's config, and the file as it is.

    path: of the file; it is read whole.

    Raises InputError naming the file, the key and the remedy.
    """
    with open_regular_file(path) as (descriptor, status):
        if status.st_size > LIMIT_BYTES:
            raise InputError(
                f"{path}: holds {status.st_size:,} bytes; at most {LIMIT_BYTES:,} are read. It is "
                "not what its name says: download the adapter again."
            )
        content = read_exactly(descriptor, status.st_size, path)
    document = parse_json_mapping(content, path, limit_values=LIMIT_VALUES)
    file = FileInfo(
        path=path.name,
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        header_digest=xxhash.xxh3_128_hexdigest(content),
    )
    return _Reader(path, document).config(), file


class _Reader:
    def __init__(self, path: Path, document: Mapping[str, object]) -> None:
        self.path = path
        self.document = document

    def config(self) -> AdapterConfig:
        peft_type = self.document.get("peft_type")
        if peft_type != "LORA":
            raise self.error("peft_type", f"is {shown(peft_type)}; only LORA is known. {_REMEDY}")
        self._refuse_other_kinds()
        ranks = self._numbers("rank_pattern")
        rank = self._number("r", 8)
        if rank != int(rank) or not 0 < rank <= MOST_RANK:
            raise self.error("r", f"is {shown(rank)}, no rank. Download the adapter again.")
        alphas = self._alphas()
        bias = self.document.get("bias", "none")
        if not isinstance(bias, str) or bias not in ("none", "lora_only", "all"):
            raise self.error("bias", f"is {shown(bias)}; known are none, lora_only and all")
        return AdapterConfig(
            rank=None if ranks else int(rank),
            alpha=self._number("lora_alpha", 8),
            alphas_by_end={a[1].removesuffix("$"): a for a in reversed(alphas) if _is_end(a[1])},
            alphas_by_expression=tuple(a for a in alphas if not _is_end(a[1])),
            is_rank_stabilised=self._flag("use_rslora"),
            is_dora=self._flag("use_dora"),
            is_transposed=self._flag("fan_in_fan_out"),
            saved=self._names("modules_to_save"),
            keeps_ties=self._flag("ensure_weight_tying"),
            bias=bias,
        )

    def _refuse_other_kinds(self) -> None:
        for key, value in self.document.items():
            if not value:
                continue
            if key in REFUSED:
                raise self.error(key, f"is set: such an adapter {REFUSED[key]}. {_REMEDY}")
            if key.startswith("use_") and key not in ("use_rslora", "use_dora"):
                raise self.error(
                    key, f"is {shown(value)}, and not known to this version. {_REMEDY}"
                )
        begun = self.document.get("init_lora_weights", True)
        if isinstance(begun, str) and begun.lower() not in KEEPS_THE_MODEL:
            raise self.error(
                "init_lora_weights",
                f"is {shown(begun)}: training began by changing the model's weights, so the "
                "adapter does not fit the model as it is. Have peft convert it "
                "(save_pretrained with path_initial_model_for_weight_conversion), or, if the "
                "model named is the changed one, set the key to true.",
            )

    def _alphas(self) -> list[tuple[int, str, float]]:
        alphas = self._numbers("alpha_pattern")
        expressions = [pattern for pattern, _ in alphas if not _is_end(pattern)]
        for number, pattern in enumerate(expressions):
            if number == MOST_EXPRESSIONS or not _is_simple(pattern):
                raise self.error(
                    "alpha_pattern",
                    f"holds the regular expression {quoted(pattern)}; known are names, and "
                    f"{MOST_EXPRESSIONS} expressions of alternatives and one repetition. Write the "
                    "names of its modules out, each with its alpha.",
                )
        return [(number, pattern, alpha) for number, (pattern, alpha) in enumerate(alphas)]

    def _number(self, key: str, default: float) -> float:
        value = self.document.get(key)
        return default if value is None else self._finite(key, value)

    def _finite(self, key: str, value: object) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and -MOST_NUMBER <= value <= MOST_NUMBER:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]  # it is not nan either
        raise self.error(key, f"holds {shown(value)}, no number. Download the adapter again.")

    def _numbers(self, key: str) -> tuple[tuple[str, float], ...]:
        value = self.document.get(key)
        if value is None:
            return ()
        if not isinstance(value, dict):
            raise self.error(key, f"is {kind(value)}, no mapping. Download the adapter again.")
        return tuple((pattern, self._finite(key, number)) for pattern, number in value.items())

    def _flag(self, key: str) -> bool:
        value = self.document.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(
                key, f"is {shown(value)}, neither true nor false. Download the adapter again."
            )
        return value

    def _names(self, key: str) -> tuple[str, ...]:
        value = self.document.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.error(key, "is no list of names. Download the adapter again.")
        return tuple(value)

    def error(self, key: str, problem: str) -> InputError:
        return InputError(f"{self.path}: {key} {problem}")


def _is_simple(pattern: str) -> bool:
    """Whether no name can make a regular expression slow: one thing at most is repeated, and no
    group is."""
    if len(pattern) > MOST_EXPRESSION_CHARACTERS or not _SIMPLE.fullmatch(pattern):
        return False
    if len(re.findall(r"[*+]", pattern)) > 1 or re.search(r"\)[*+]", pattern):
        return False
    if re.search(r"\[.*\[|--|\|\|", pattern):  # what sets may mean in later versions of Python
        return False
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_end(pattern: str) -> bool:
    """Whether a pattern is words that a module's name ends in, or after ^ all of them. To peft a
    dot stands for any character; here it is a dot, which in names it is."""
    return _WORDS.fullmatch(pattern) is not None


def _fits(pattern: str, module: str) -> bool:
    """Whether an expression means a module: as peft has it, its last words or all of them."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
