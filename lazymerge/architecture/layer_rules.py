"""How configs say of which kind each layer is: the forms that there are, and the keys of each.

    by layer     layer_types: [mamba, attention, mamba]     an entry for each layer
    text         hybrid_override_pattern: "M*M"             a character for each layer
    runs         attention_types: [[[global, local], 6]]    entries, and how often they are repeated
    repeated     block_types: [recurrent, attention]        entries, repeated as long as need be
    numbers      mlp_only_layers: [0, 3]                    which layers are of the kind
    leading      first_k_dense_replace: 3                   how many at the beginning are
    trailing     num_kv_shared_layers: 10                   how many at the end are
    periods      attn_layer_period: 8, attn_layer_offset: 4 every eighth, from the fifth on

The tables below are the whole knowledge of families. Every form can be read (`kind`: of one layer)
and written (`write`: so that it says the kinds given, as far as the form can).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

Config = Mapping[str, object]

TYPES_BY_LAYER = ("layer_types", "layers_block_type", "attn_type_list", "attention_layers")
"""Lists that have an entry for each layer, whatever else the config says."""

_TEXTS_BY_LAYER = ("hybrid_override_pattern",)

_RUNS = ("attention_types",)

_REPEATED = ("block_types", "_block_types")

_NUMBERS = (
    "mlp_only_layers",  # qwen-moe
    "moe_layers",  # llama 4
    "full_attention_layers",
    "full_attn_idxs",  # lfm2
    "attn_layer_indices",  # bamba
    "attn_layer_idx",  # mamba-ssm
    "attn_layer_idxs",  # striped hyena
    "hyena_layer_idxs",
    "hcl_layer_idxs",
    "hcm_layer_idxs",
    "hcs_layer_idxs",
    "cross_attention_layers",  # mllama
    "hybrid_layer_ids",  # zamba 2
    "local_layer_ids",
    "window_block_indices",  # vitdet
    "global_attn_indexes",  # segment anything
    "fullatt_block_indexes",  # qwen2.5-vl, the part that sees
)
"""Lists of the numbers of layers that are of a kind."""

_LEADING = {
    "first_k_dense_replace": 0,  # deepseek
    "num_dense_layers": 0,  # afmoe, lfm2-moe
    "moe_layer_start_index": 0,  # ernie
    "moe_layer_end_index": 1,
}
"""How many layers at the beginning are of a kind; 1: the number of the last of them."""

_TRAILING = ("num_kv_shared_layers",)  # gemma 3n

_NOT_BY_LAYER = frozenset(
    {
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
        "mrope_section",
        "image_grid_pinpoints",
        "keys_to_ignore_at_inference",
        "mtp_layers_block_type",
    }
)
"""Lists that may happen to be as long as there are layers."""


class Rule(ABC):
    """One of the things that a config says of its layers. key: where."""

    key: str

    @abstractmethod
    def kind(self, config: Config, layer: int, count: int) -> object:
        """Of which kind a layer of `count` is; None: the config does not say."""

    @abstractmethod
    def write(self, config: dict[str, object], kinds: Sequence[object]) -> list[str]:
        """Has the config say the kinds of its layers, as far as that can be said.

        Returns what a person should know of it.
        """


@dataclass(frozen=True, slots=True)
class ByLayer(Rule):
    """A list with an entry for each layer."""

    key: str

    def kind(self, config: Config, layer: int, count: int) -> object:
        values = config.get(self.key)
        if isinstance(values, list):
            return values[layer] if layer < len(values) else None
        period = next((p for p in PERIODS if p.key in config and p.types == self.key), None)
        if period is None or period.words is None:
            return None
        return period.words[0 if period.kind(config, layer, count) else 1]

    def write(self, config: dict[str, object], kinds: Sequence[object]) -> list[str]:
        config[self.key] = list(kinds)
        return []


@dataclass(frozen=True, slots=True)
class Text(Rule):
    """A text with a character for each layer."""

    key: str

    def kind(self, config: Config, layer: int, count: int) -> object:
        text = config.get(self.key)
        return text[layer] if isinstance(text, str) and layer < len(text) else None

    def write(self, config: dict[str, object], kinds: Sequence[object]) -> list[str]:
        config[self.key] = "".join(map(str, kinds))
        return []


@dataclass(frozen=True, slots=True)
class Runs(Rule):
    """Entries and how often they are repeated, several times."""

    key: str

    def kind(self, config: Config, layer: int, count: int) -> object:
        for run in _list(config, self.key):
            match run:
                case [list(entries), int(times)] if entries:
                    if layer < len(entries) * times:
                        return entries[layer % len(entries)]
                    layer -= len(entries) * times
                case _:
                    return None
        return None

    def write(self, config: dict[str, object], kinds: Sequence[object]) -> list[str]:
        config[self.key] = [[list(kinds), 1]]
        return []


@dataclass(frozen=True, slots=True)
class Repeated(Rule):
    """Entries that are repeated as long as there are layers."""

    key: str

    def kind(self, config: Config, layer: int, count: int) -> object:
        entries = _list(config, self.key)
        return entries[layer % len(entries)] if entries else None

    def write(self, config: dict[str, object], kinds: Sequence[object]) -> list[str]:
        if not _says(self, config, kinds):
            config[self.key] = list(kinds)
        return []


@dataclass(frozen=True, slots=True)
class Numbers(Rule):
    """The numbers of the layers that are of a kind."""

    key: str

    def kind(self, config: Config, layer: int, count: int) -> object:
        return layer in _list(config, self.key)

    def write(self, config: dict[str, object], kinds: Sequence[object]) -> list[str]:
        config[self.key] = [layer for layer, is_of_kind in enumerate(kinds) if is_of_kind]
        return []


@dataclass(frozen=True, slots=True)
class Leading(Rule):
    """How many layers at the beginning are of a kind.

    short: by how much the number falls short of that. Where it is below 0 all are, or none.
    """

    key: str
    short: int

    def kind(self, config: Config, layer: int, count: int) -> object:
        value = config.get(self.key)
        if not isinstance(value, int):
            return False
        return value < 0 or layer < value + self.short

    def write(self, config: dict[str, object], kinds: Sequence[object]) -> list[str]:
        if cast(int, config[self.key]) >= 0:
            leading = kinds.index(False) if False in kinds else len(kinds)
            config[self.key] = max(leading - self.short, 0)
        return []


@dataclass(frozen=True, slots=True)
class Trailing(Rule):
    """How many layers at the end are of a kind."""

    key: str

    def kind(self, config: Config, layer: int, count: int) -> object:
        value = config.get(self.key)
        return isinstance(value, int) and layer >= count - value

    def write(self, config: dict[str, object], kinds: Sequence[object]) -> list[str]:
        reverse = kinds[::-1]
        config[self.key] = reverse.index(False) if False in reverse else len(kinds)
        return []


@dataclass(frozen=True, slots=True)
class Period(Rule):
    """One layer in so many is of a kind.

    place: which of them, the first being 0 and the last -1; or the key that says which.
    types: list with an entry for each layer that the family heeds first, if there is one.
    words: its entries for the layers of the kind, and for the others.
    numbers: list of the numbers of such layers that the family heeds first, if there is one.
    exceptions: list of the numbers of layers that are not of the kind all the same.
    """

    key: str
    place: str | int
    types: str | None = None
    words: tuple[object, object] | None = None
    numbers: str | None = None
    exceptions: str | None = None

    def kind(self, config: Config, layer: int, count: int) -> object:
        if (
            self.types is not None
            and self.words is not None
            and isinstance(config.get(self.types), list)
        ):
            values = _list(config, self.types)
            return values[layer] == self.words[0] if layer < len(values) else None
        if self.numbers is not None and isinstance(config.get(self.numbers), list):
            return layer in _list(config, self.numbers)
        period = config.get(self.key)
        place = config.get(self.place) if isinstance(self.place, str) else self.place
        if not isinstance(period, int) or not isinstance(place, int):
            return None
        if self.exceptions is not None and layer in _list(config, self.exceptions):
            return False
        return period > 0 and layer % period == place % period

    def write(self, config: dict[str, object], kinds: Sequence[object]) -> list[str]:
        if _says(self, config, kinds):
            return []
        if self.exceptions is not None and self.exceptions in config:
            config[self.key] = 1
            config[self.exceptions] = [place for place, kind in enumerate(kinds) if not kind]
            return []
        if self.numbers is not None and self.numbers in config:
            config[self.numbers] = [place for place, kind in enumerate(kinds) if kind]
            return []
        if self._fit(config, kinds) or self.types is None or self.words is None:
            return []
        config[self.types] = [self.words[0 if kind else 1] for kind in kinds]
        return [
            f"{self.key} in config.json cannot say of which kind the layers are; {self.types}, "
            "which was added, does, for versions of transformers that know it"
        ]

    def _fit(self, config: dict[str, object], kinds: Sequence[object]) -> bool:
        """Writes the shortest period that says the kinds, if there is one."""
        first = kinds.index(True) if True in kinds else len(kinds)
        for period in range(1, len(kinds) + 2):
            place = first if isinstance(self.place, str) else self.place % period
            if place < period and all(
                (layer % period == place) == kind for layer, kind in enumerate(kinds)
            ):
                config[self.key] = period
                if isinstance(self.place, str):
                    config[self.place] = place
                return True
        return False


PERIODS = (
    Period("attn_layer_period", "attn_layer_offset"),  # jamba, zamba
    Period("expert_layer_period", "expert_layer_offset"),
    Period("decoder_sparse_step", -1, exceptions="mlp_only_layers"),  # qwen-moe, nllb-moe
    Period("encoder_sparse_step", -1),
    Period("interleave_moe_layer_step", -1, numbers="moe_layers"),  # llama 4
    Period("no_rope_layer_interval", -1, types="no_rope_layers", words=(0, 1)),
    Period("sliding_window_pattern", -1, "layer_types", ("full_attention", "sliding_attention")),
    Period(
        "global_attn_every_n_layers", 0, "layer_types", ("full_attention", "sliding_attention")
    ),  # modernbert; afmoe, which counts otherwise, always has layer_types
    Period("full_attention_interval", -1, "layer_types", ("full_attention", "linear_attention")),
    Period("layer_group_size", -1, "layer_types", ("full_attention", "linear_attention")),
    Period("moe_layer_freq", 0),  # deepseek
    Period("moe_layer_interval", -1),  # ernie
    Period("dense_attention_every_n_layers", -1),  # phi 3 small
    Period("cross_attention_frequency", 0),  # blip 2
    Period("mb_per_layer", 0),  # phi 4 flash
)


_RULES: Mapping[str, Rule] = {
    rule.key: rule
    for rule in (
        *map(Text, _TEXTS_BY_LAYER),
        *map(Runs, _RUNS),
        *map(Repeated, _REPEATED),
        *map(Numbers, _NUMBERS),
        *(Leading(key, short) for key, short in _LEADING.items()),
        *map(Trailing, _TRAILING),
        *PERIODS,
    )
}

KEYS_OF_KINDS = frozenset(
    {*_RULES, *(p.place for p in PERIODS if isinstance(p.place, str)), "max_window_layers"}
)
"""Keys that are about layers' kinds, and so not about how many layers there are."""

_FORMS: Mapping[type[Rule], type] = {
    Text: str,
    Runs: list,
    Repeated: list,
    Numbers: list,
    Leading: int,
    Trailing: int,
    Period: int,
}
"""What a value must be for its key's rule to hold. A moe_layer_freq, say, may be a list as well."""


def rules_of(config: Config, counts: Collection[int]) -> list[Rule]:
    """What a config says of its layers: lists first, since periods go by them.

    counts: how long a list with an entry for each layer may be.
    """
    lists: list[Rule] = []
    others: list[Rule] = []
    for key, value in config.items():
        rule = _RULES.get(key)
        if rule is not None and isinstance(value, _FORMS[type(rule)]):
            is_list = not isinstance(rule, Period)
            if isinstance(rule, Text) and len(cast(str, value)) not in counts:
                continue
            (lists if is_list else others).append(rule)
        elif (
            isinstance(value, list)
            and key not in _NOT_BY_LAYER
            and len(value) in counts
            and (len(value) > 1 or key in TYPES_BY_LAYER)  # many lists happen to have one entry
        ):
            lists.append(ByLayer(key))
    return [*lists, *others]


def _list(config: Config, key: str) -> list[object]:
    value = config.get(key)
    return value if isinstance(value, list) else []


def _says(rule: Rule, config: Config, kinds: Sequence[object]) -> bool:
    return all(rule.kind(config, place, len(kinds)) == kind for place, kind in enumerate(kinds))
