"""Recipe + checkpoints → graph: one merge of tensors per output tensor.

    names      every tensor that any model has, in natural order
    presence   which models have it; what that means is decided here, and said in a notice
    shapes     must agree (embeddings may be cut, if asked for)
    dtypes     integers and booleans are copied when equal; floats are merged
    values     every parameter resolved for this tensor and model
    nodes      the method adds them; a Write ends each tensor

All problems of all tensors are gathered and raised once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import prod

from ..architecture import LayerStacks, find_layer_stacks, is_optional, is_vocabulary
from ..architecture.config import output_config
from ..architecture.layer_config import with_layers
from ..checkpoint.block_scales import dequantised_config
from ..checkpoint.tensor import DTYPES, FLOAT_DTYPES_BY_TORCH_NAME, Checkpoint, TensorInfo
from ..errors import InputError, InputErrors
from ..methods import METHODS, Contribution, Method, TensorMerge
from ..recipe.model import Conditions, Recipe, Setting, evaluate
from ..recipe.signature import Parameter, Scalar, Scope
from ..vocabulary import Alignment
from . import operations  # noqa: F401  (registers the shared operations)
from .embeddings import AlignedEmbeddings
from .graph import Graph
from .heads import config_of_output, with_tied_heads
from .node import Read, Write
from .operations.adapters import add_adapted, is_computed_wide
from .operations.block_scales import add_dequantised
from .targets import LayerOrigins, Source, Target, find_targets

MOST_PROBLEMS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class ResolvedTensor:
    """How one output tensor comes about, for people.

    method: name of the method, or "copy" where there is nothing to merge.
    parameters: resolved global parameters.
    by_model: resolved per-model parameters, in recipe order, for the models that take part.
    """

    name: str
    method: str
    parameters: Mapping[str, Scalar | None]
    by_model: Mapping[str, Mapping[str, Scalar | None]]


@dataclass(frozen=True, slots=True)
class CompiledMerge:
    """A recipe compiled against its checkpoints.

    graph: its writes are the output tensors, in natural order of their names.
    results: what every tensor is, by name.
    tensors: how each output tensor comes about, in the order of the writes.
    notices: what a person should know before running it; one sentence each.
    stacks: the layer stacks of the output.
    origins: of its layers, where they are put together from slices.
    models: all models, results of other merges among them, by reference.
    """

    graph: Graph
    results: Mapping[str, TensorInfo]
    tensors: tuple[ResolvedTensor, ...]
    notices: tuple[str, ...]
    stacks: LayerStacks
    origins: LayerOrigins
    models: Mapping[str, Checkpoint] = field(default_factory=dict)


Having = Mapping[Source, TensorInfo]
"""The models that have a tensor, the base first, and the tensor."""


@dataclass(slots=True)
class _Notices:
    """Notices by kind, each with the tensors it concerns: one sentence covers many tensors."""

    tensors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, sentence: str, tensor: str) -> None:
        self.tensors[sentence].append(tensor)

    def sentences(self) -> list[str]:
        return [f"{sentence}: {_some(names)}" for sentence, names in self.tensors.items()]


def compile_recipe(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    *,
    truncate_embeddings: bool = False,
    alignment: Alignment | None = None,
    merge_alignments: Mapping[str, Alignment] | None = None,
) -> CompiledMerge:
    """Compiles a recipe against the headers of its models.

    checkpoints: by model reference as written in the recipe.
    truncate_embeddings: merge the common leading rows where vocabularies differ in size.
    alignment: where the rows of the output's tokens are, if the recipe asks for a tokenizer.
    merge_alignments: the same of merges that it uses as models, by name.

    Raises:
        InputErrors: tensors that cannot be merged, every one of them.
    """
    graph = Graph()
    known = dict(checkpoints)
    notices: list[str] = []
    for merge in recipe.merges:
        own = (merge_alignments or {}).get(str(merge.name))
        part = _Compiler(merge, known, truncate_embeddings, own, graph, is_part=True)
        compiled = part.compile()
        config, said = config_of(
            known[merge.references[0]], compiled, known, is_vocabulary_matched=own is not None
        )
        notices += [f"{merge.name}: {notice}" for notice in (*compiled.notices, *said)]
        known[str(merge.name)] = Checkpoint(
            reference=str(merge.name),
            folder="",
            files=(),
            tensors=dict(compiled.results),
            config=config,
            header_bytes_read=0,
        )
    final = _Compiler(recipe, known, truncate_embeddings, alignment, graph, is_part=False)
    compiled = final.compile()
    return replace(compiled, notices=(*notices, *compiled.notices), models=known)


class _Compiler:
    def __init__(
        self,
        recipe: Recipe,
        checkpoints: Mapping[str, Checkpoint],
        truncate_embeddings: bool,
        alignment: Alignment | None,
        graph: Graph,
        *,
        is_part: bool,
    ) -> None:
        """is_part: its results are another merge's inputs, and not written."""
        self.is_part = is_part
        is_used = is_part or recipe.part_of is not None
        self.seed = seed_of_part(recipe) if is_used else recipe.seed
        self.results: dict[str, TensorInfo] = {}
        self.recipe = recipe
        self.method: Method = METHODS[recipe.merge_method]
        self.truncate_embeddings = truncate_embeddings
        self.graph = graph
        self.embeddings = AlignedEmbeddings(alignment, self.graph) if alignment else None
        self.notices = _Notices()
        self.problems: list[str] = []
        self.tied = with_tied_heads(recipe, checkpoints)
        found = find_targets(recipe, self.tied.models, self.method.signature.base)
        self.targets, self.origins = found.targets, found.origins
        self.names = [target.name for target in self.targets]
        for name in found.left_out:
            kind = "module" if recipe.modules else "slice"
            self.notices.add(f"copied from {recipe.references[0]}, since no {kind} has it", name)
        for model, name in self.tied.copies:
            self.notices.add(
                f"{model} uses its input embedding as output head, as its config.json says; what "
                "it stores as head is taken for a copy and not read",
                name,
            )

    def compile(self) -> CompiledMerge:
        tensors = []
        for target in self.targets:
            try:
                resolved = self._tensor(target)
            except InputError as error:
                self.problems.append(str(error))
                continue
            if resolved is not None:
                tensors.append(resolved)
        if not tensors and not self.problems:
            self.problems.append("the models hold no tensors that can be merged")
        if self.problems:
            raise InputErrors(_shortened(self.problems))
        return CompiledMerge(
            # a model of density 0, say, is not even read
            self.graph if self.is_part else self.graph.without_unused(),
            self.results,
            tuple(tensors),
            (*self.notices.sentences(), *self._unmatched_filters()),
            find_layer_stacks(self.names),
            self.origins,
        )

    def _tensor(self, target: Target) -> ResolvedTensor | None:
        name = target.name
        having = {
            source: source.checkpoint.tensors[inner]
            for source, inner in target.inputs
            if inner in source.checkpoint.tensors
        }
        lacking = [source for source, _ in target.inputs if source not in having]
        if lacking:
            if not is_optional(name):
                raise InputError(
                    f"tensor {name} is missing from {_models(lacking)}, "
                    f"present in {_models(having)}; "
                    "models of one architecture are needed"
                )
            if lacking[0].is_base:
                self.notices.add(
                    f"left out, since the base model {lacking[0].model} has no such tensor", name
                )
                return None
            self.notices.add(f"merged without {_models(lacking)}, which lack the tensor", name)
        tied = [s for s, inner in target.inputs if (s.model, inner) in self.tied.embeddings]
        if tied:
            self.notices.add(
                f"the input embeddings of {_models(tied)} are merged as their output heads, since "
                "they are tied",
                name,
            )
        reads = self._reads(name, having)
        nodes = self._nodes(name, reads, target.base)
        shape = self.graph.block_node(next(iter(nodes.values()))).shape
        is_float = self._is_float(name, reads)
        least = self.method.signature.min_models
        first = next(iter(having)).model
        if not is_float:
            source = self._identical(name, shape, nodes)
            method = "copy"
        elif target.is_copied or len(having) < least or prod(shape) == 0:
            if len(having) < len(target.inputs):
                self.notices.add(f"copied from {first} alone", name)
            source = nodes[first]
            method = "copy"
        else:
            return self._merge(target, shape, having, reads, nodes)
        self._result(name, self._output_dtype(reads, is_float), shape, source)
        return ResolvedTensor(name, method, {}, {s.model: {} for s in having})

    def _result(self, name: str, dtype: str, shape: tuple[int, ...], node: str) -> None:
        """What becomes of a tensor: it is written, or another merge reads it."""
        size = prod(shape) * DTYPES[dtype].item_bytes
        self.results[name] = TensorInfo(name, dtype, shape, "", 0, size, node=node)
        if not self.is_part:
            self.graph.add(Write(name, dtype, shape, node))

    def _merge(
        self,
        target: Target,
        shape: tuple[int, ...],
        having: Having,
        reads: Mapping[str, Read],
        nodes: Mapping[str, str],
    ) -> ResolvedTensor:
        signature = self.method.signature
        inner_names = {source.model: inner for source, inner in target.inputs}
        shared = {
            p.name: self._resolve(p, target.scopes, target.name, target.depth, None)
            for p in signature.parameters
            if p.scope is Scope.GLOBAL
        }
        contributions = {}
        for source in having:
            scopes = (source.settings, *target.scopes)
            inner = inner_names[source.model]
            values = {
                p.name: self._resolve(p, scopes, inner, target.depth, source.model)
                for p in signature.parameters
                if p.scope is Scope.MODEL or (p.scope is Scope.NON_BASE and not source.is_base)
            }
            node = nodes[source.model]
            contributions[source] = Contribution(source.model, node, values, source.place)
        merge = TensorMerge(
            name=target.name,
            shape=shape,
            base=next((c for s, c in contributions.items() if s.is_base), None),
            models=tuple(c for s, c in contributions.items() if not s.is_base),
            parameters=shared,
            graph=self.graph,
            seed=self.seed,
        )
        result = self._built(merge, reads)
        self._result(target.name, self._output_dtype(reads, True), shape, result)
        by_model = {c.model: c.parameters for c in contributions.values()}
        return ResolvedTensor(target.name, signature.name, shared, by_model)

    def _built(self, merge: TensorMerge, reads: Mapping[str, Read]) -> str:
        """The node of a merge. Where the method computes in float64, so are adapters' changes: the
        native kernels know one working dtype at a time."""
        result = self.method.build(merge)
        contributions = [*([merge.base] if merge.base else ()), *merge.models]
        changed = {c.model: c.node for c in contributions if reads[c.model].tensor.change}
        if not is_computed_wide(self.graph, result, changed.values()):
            return result
        wide = {model: self._node(reads[model], is_wide=True) for model in changed}
        base, *models = (replace(c, node=wide.get(c.model, c.node)) for c in contributions)
        if merge.base is None:
            return self.method.build(replace(merge, models=(base, *models)))
        return self.method.build(replace(merge, base=base, models=tuple(models)))

    def _reads(self, name: str, having: Having) -> dict[str, Read]:
        """One Read per model, of one shape but for embeddings whose rows are still to be matched.

        Raises:
            InputError: the shapes differ.
        """
        infos = {source.model: info for source, info in having.items()}
        folders = {
            source.model: info.folder or source.checkpoint.folder for source, info in having.items()
        }
        shapes = {info.shape for info in infos.values()}
        if len(shapes) > 1 and not (self.embeddings is not None and is_vocabulary(name)):
            infos = self._common_rows(name, infos)
        return {model: Read(folders[model], info) for model, info in infos.items()}

    def _node(self, read: Read, *, is_wide: bool = False) -> str:
        """The node that yields a tensor's values. is_wide: with an adapter, in float64."""
        if read.tensor.node is not None:
            return read.tensor.node
        stored, scale = Read(read.folder, read.tensor.stored), read.tensor.scale
        if stored.element_count == 0:
            return self.graph.add(stored)
        if scale is None:
            node = self.graph.add(stored)
        else:
            node = add_dequantised(self.graph, stored, scale)
        change = read.tensor.change
        return node if change is None else add_adapted(self.graph, node, change, is_wide=is_wide)

    def _nodes(self, name: str, reads: Mapping[str, Read], base: str | None) -> dict[str, str]:
        """One node per model, of one shape: rows of embeddings are matched by token.

        base: the model whose rows are taken first where others lack them.

        Raises:
            InputError: they cannot be.
        """
        if self.embeddings is None or not is_vocabulary(name):
            return {model: self._node(read) for model, read in reads.items()}
        quantised = [model for model, read in reads.items() if read.tensor.scale is not None]
        if quantised:
            raise InputError(
                f"tensor {name} of {', '.join(quantised)} is block-quantised: its rows cannot be "
                "matched; convert the model to bfloat16 first"
            )
        changed = [model for model, read in reads.items() if read.tensor.change is not None]
        if changed:
            raise InputError(
                f"tensor {name} of {', '.join(changed)} is changed by its adapter: its rows cannot "
                "be matched; merge the adapter into its model first (passthrough)"
            )
        nodes = self.embeddings.nodes(name, reads, base)
        unknown = self.embeddings.unknown_rows(name, reads, base)
        if unknown:
            self.notices.add(
                f"{unknown} of its rows hold zeros: {', '.join(reads)}, which it is merged from, "
                "lack these tokens",
                name,
            )
        alignment = self.embeddings.alignment
        for model, read in reads.items():
            tokens = alignment.sizes[model]
            if read.tensor.node is not None and read.shape[0] < min(
                tokens, alignment.declared[model] or tokens
            ):
                raise InputError(
                    f"tensor {name} of {model} is cut to {read.shape[0]} rows, and its tokens are "
                    f"{tokens}: give the merge {model} a tokenizer of its own"
                )
            if read.shape[0] > tokens:
                self.notices.add(
                    f"{model} has {read.shape[0]} rows for {tokens} tokens; the others are left "
                    "out",
                    name,
                )
            if not DTYPES[read.dtype].is_float and nodes[model] != read.id:
                raise InputError(
                    f"tensor {name} of {model} is of {read.dtype}: its rows cannot be matched; "
                    "convert the model to floats first"
                )
        return nodes

    def _common_rows(self, name: str, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        shapes = {model: info.shape for model, info in infos.items()}
        only_rows_differ = (
            is_vocabulary(name) and len({shape[1:] for shape in shapes.values()}) == 1
        )
        if not only_rows_differ:
            described = ", ".join(f"{list(shape)} in {model}" for model, shape in shapes.items())
            raise InputError(
                f"tensor {name} has different shapes: {described}; "
                "only models of one architecture and size can be merged"
            )
        described = ", ".join(f"{shape[0]} in {model}" for model, shape in shapes.items())
        if not self.truncate_embeddings:
            raise InputError(
                f"tensor {name} has different numbers of rows (vocabulary entries): {described}; "
                "match them by token: `tokenizer: {source: base}` in the recipe, or union, or a "
                "model; or --unsafe-truncate-embeddings merges the common leading rows"
            )
        if any(info.node is not None for info in infos.values()):
            raise InputError(
                f"tensor {name} has different numbers of rows: {described}; what another merge "
                "gives cannot be cut: cut its models there, or merge in two steps"
            )
        rows = min(shape[0] for shape in shapes.values())
        self.notices.add(f"cut to the {rows} leading rows that all models have", name)
        return {model: info.leading_rows(rows) for model, info in infos.items()}

    def _is_float(self, name: str, reads: Mapping[str, Read]) -> bool:
        """Whether the tensor is one of floats.

        Raises:
            InputError: in some models only, or integers of different kinds.
        """
        kinds = {DTYPES[read.dtype].is_float for read in reads.values()}
        dtypes = {read.dtype for read in reads.values()}
        if kinds == {True}:
            return True
        if len(dtypes) > 1:
            described = ", ".join(f"{read.dtype} in {model}" for model, read in reads.items())
            raise InputError(
                f"tensor {name} has dtypes that cannot be combined: {described}; "
                "convert the models to one dtype first"
            )
        return False

    def _identical(self, name: str, shape: tuple[int, ...], nodes: Mapping[str, str]) -> str:
        """The node for a tensor of integers or booleans, which must be equal in all models."""
        if len(set(nodes.values())) == 1:
            return next(iter(nodes.values()))
        merge = TensorMerge(name, shape, None, (), {}, self.graph)
        return merge.apply("identical", list(nodes.values()), tensor=name, models=tuple(nodes))

    def _output_dtype(self, reads: Mapping[str, Read], is_float: bool) -> str:
        """out_dtype, else dtype, else the dtype of the base or, without one, the first model."""
        asked = self.recipe.out_dtype or self.recipe.dtype
        if is_float and asked is not None:
            return FLOAT_DTYPES_BY_TORCH_NAME[asked].name
        return next(iter(reads.values())).tensor.value_dtype

    def _resolve(
        self,
        parameter: Parameter,
        scopes: Sequence[Mapping[str, Setting]],
        tensor_name: str,
        depth: float,
        model: str | None,
    ) -> Scalar | None:
        """A parameter's value for one tensor: the first scope that has one, else the default.

        Raises:
            InputError: it is required and no scope has one.
        """
        for settings in scopes:
            if parameter.name in settings:
                value = evaluate(settings[parameter.name], tensor_name, depth)
                if value is not None:
                    return value
        if parameter.required:
            of_model = f" of model {model}" if model else ""
            raise InputError(
                f"{self.recipe.path}: parameter {parameter.name}{of_model} has no value for "
                f"tensor {tensor_name}; add an entry without a filter to its list of conditions"
            )
        return parameter.default

    def _unmatched_filters(self) -> list[str]:
        """Filters that match no tensor: a misspelt name, most likely."""
        notices = []
        recipe = self.recipe
        scopes: list[tuple[str, Mapping[str, Setting]]] = [("", recipe.parameters)]
        scopes += [(f" of module {module.name}", module.parameters) for module in recipe.modules]
        slices = [*recipe.slices, *(piece for m in recipe.modules for piece in m.slices)]
        scopes += [(f" of slice {n}", piece.parameters) for n, piece in enumerate(slices, 1)]
        scopes += [(f" of model {entry.model}", entry.parameters) for entry in recipe.entries]
        names = {inner for target in self.targets for _, inner in target.inputs}
        names |= {*self.names}
        for owner, settings in scopes:
            for parameter, setting in settings.items():
                for text in setting_filters(setting):
                    if not any(text in name for name in names):
                        notices.append(
                            f"filter {text!r} of parameter {parameter}{owner} matches no tensor"
                        )
        return list(dict.fromkeys(notices))


def seed_of_part(recipe: Recipe) -> int:
    """The seed of a merge that others use: with one seed, two of a file would drop the same
    elements."""
    content = f"{recipe.seed} {recipe.name}".encode()
    return int.from_bytes(blake2b(content, digest_size=7).digest(), "big")


def config_of(
    source: Checkpoint,
    compiled: CompiledMerge,
    checkpoints: Mapping[str, Checkpoint],
    *,
    is_vocabulary_matched: bool = False,
) -> tuple[dict[str, object] | None, list[str]]:
    """The config of a merge: its main model's with the output's dtype, its rows where embeddings
    were cut or matched by token, and its layers where they were put together from slices; and what
    it cannot say of them."""
    base_config = dequantised_config(source)
    if base_config is None:
        return None, []
    sizes: Counter[str] = Counter()
    rows = None
    for name, result in compiled.results.items():
        if DTYPES[result.dtype].is_float:
            sizes[result.dtype] += result.element_count
        before = source.tensors.get(name)
        if not is_vocabulary(name) or before is None:
            continue
        if is_vocabulary_matched or before.shape != result.shape:
            rows = result.shape[0]
    dtype = DTYPES[sizes.most_common(1)[0][0]].torch_name if sizes else None
    config = output_config(base_config, dtype, rows)
    config, said = config_of_output(config, source, compiled.results)
    for stack, layers in compiled.origins.items():
        origins = [(checkpoints[model].config, number) for model, number in layers]
        config, sentences = with_layers(
            config,
            stack,
            origins,
            names_before=source.tensors,
            names_after=compiled.results,
        )
        said += sentences
    return config, said


def setting_filters(setting: Setting) -> list[str]:
    """The filter texts of a setting that restrict it to some tensors."""
    if not isinstance(setting, Conditions):
        return []
    return [c.filter for c in setting.entries if c.filter is not None and c.filter != "*"]


def _models(sources: Iterable[Source]) -> str:
    return ", ".join(source.model for source in sources)


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _shortened(problems: Sequence[str]) -> list[str]:
    """The first problems, and how many more there are: 291 missing tensors are one mistake."""
    if len(problems) <= MOST_PROBLEMS_SHOWN:
        return list(problems)
    rest = len(problems) - MOST_PROBLEMS_SHOWN
    return [*problems[:MOST_PROBLEMS_SHOWN], f"… and {rest} more problems of this kind"]
