"""Which kind of table this is, by its columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perfsim.errors import InputError, nearest
from validation.compare import (
    aic_kernels,
    exchanges,
    inferencex,
    isim,
    layers,
    llmservingsim,
    mixed_attention,
    silicon,
    unpublished,
)
from validation.compare.outcome import Outcome
from validation.compare.table import Table


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of table: the columns that it must have, and its comparison, which may drop repeated rows.

    `read` says whether its comparison reads any column, whose types then matter.
    """

    name: str
    columns: frozenset[str]
    compare: Callable[[Table], tuple[Table, Outcome]]
    read: bool = True


KINDS = (
    Kind("vLLM load tests of inference-sim, by stage", isim.STAGES, isim.compare_stages),
    Kind("vLLM load tests of inference-sim, by request", isim.REQUESTS, isim.compare_requests),
    Kind("vLLM runs of LLMServingSim, by request", llmservingsim.REQUESTS, llmservingsim.compare_requests),
    Kind("vLLM runs of LLMServingSim, by second", llmservingsim.SERIES, llmservingsim.compare_series),
    Kind("serving measurements of aiconfigurator", silicon.COLUMNS, silicon.compare),
    Kind("InferenceX", inferencex.SERVING, inferencex.compare_serving),
    Kind("InferenceX, decode over position", inferencex.POSITION, inferencex.compare_position),
    Kind("products of aiconfigurator", aic_kernels.GEMM, aic_kernels.compare_gemm),
    Kind("attention of aiconfigurator", aic_kernels.ATTENTION, aic_kernels.compare_attention),
    Kind("latent attention of aiconfigurator", aic_kernels.LATENT, aic_kernels.compare_latent),
    Kind("fused experts of aiconfigurator", aic_kernels.EXPERTS, aic_kernels.compare_experts),
    Kind("quantisation of aiconfigurator", aic_kernels.QUANTISE, aic_kernels.compare_quantise),
    Kind("mixed attention of LLMServingSim", mixed_attention.MIXED, mixed_attention.compare_mixed),
    Kind("skewed attention of LLMServingSim", mixed_attention.SKEWED, mixed_attention.compare_skewed),
    Kind("attention of Frontier", mixed_attention.FRONTIER, mixed_attention.compare_frontier),
    Kind("layers of LLMServingSim", layers.LAYERS, layers.compare_layers),
    Kind("older layers of LLMServingSim", layers.OLD_LAYERS, layers.compare_old_layers),
    Kind("linear operators of Vidur", layers.LINEAR, layers.compare_linear),
    Kind("collectives", exchanges.COLLECTIVES, exchanges.compare_collectives),
    Kind("collectives of public documents", exchanges.PUBLIC, exchanges.compare_public),
    Kind("expert exchange of DeepEP", exchanges.DEEPEP, exchanges.compare_deepep),
    Kind("training with FSDP", unpublished.FSDP, unpublished.compare, read=False),
    Kind("MLPerf training", unpublished.MLPERF, unpublished.compare, read=False),
    Kind("published training runs", unpublished.PUBLISHED, unpublished.compare, read=False),
    Kind("published training tables", unpublished.TABLES, unpublished.compare, read=False),
    Kind("vTrain's runs", unpublished.VTRAIN, unpublished.compare, read=False),
    Kind("MLPerf inference", unpublished.MLPERF_INFERENCE, unpublished.compare_mlperf, read=False),
    Kind("Splitwise's profile", unpublished.SPLITWISE, unpublished.compare_splitwise, read=False),
)


def kind_of(table: Table) -> Kind:
    """The kind whose columns are all there, the one with the most of them; InputError when there is none."""
    names = set(table.names)
    fitting = [kind for kind in KINDS if kind.columns <= names]
    if fitting:
        return max(fitting, key=lambda kind: len(kind.columns))
    near = max(KINDS, key=lambda kind: len(kind.columns & names) / len(kind.columns))
    if not near.columns & names:
        raise InputError(f"--table: '{table.path.name}' has no column of a known table, expected those of one of them")
    missing = sorted(near.columns - names)
    lacking = ", ".join(f"'{name}'{nearest(name, names - near.columns)}" for name in missing[:5])
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    raise InputError(f"--table: '{table.path.name}' is nearest to '{near.name}', but has no column {lacking}{more}")
