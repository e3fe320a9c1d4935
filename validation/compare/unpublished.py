"""Tables that are recognised, and that nothing can be predicted for: training, and runs without a published plan."""

from __future__ import annotations

from validation.compare.outcome import Outcome
from validation.compare.table import Table

FSDP = frozenset({"model", "seq_len", "gpus", "gpu", "mfu_pct", "micro_batch", "grad_accum", "fsdp_sharding"})
MLPERF = frozenset({"version", "submitter", "system", "benchmark", "accelerator", "nodes", "run_minutes_median"})
PUBLISHED = frozenset({"source", "model", "gpu", "n_gpus", "tp", "pp", "dp", "metric", "value"})
TABLES = frozenset({"source", "table", "model", "gpu", "gpus", "technique", "seq_len", "local_batch", "dp_shard"})
VTRAIN = frozenset({"params_b", "gpus", "global_batch", "micro_batch", "hidden", "heads", "layers", "iter_ms"})
MLPERF_INFERENCE = frozenset({"version", "division", "submitter", "system", "model", "scenario", "accelerator",
                              "accel_per_node", "samples_per_s"})  # fmt: skip
SPLITWISE = frozenset({"model", "hardware", "prompt_size", "batch_size", "token_size", "prompt_ms", "token_ms",
                       "tensor_parallel"})  # fmt: skip


def compare(table: Table) -> tuple[Table, Outcome]:
    """Every row of a training table, with the reason."""
    return table, Outcome(["training is not simulated yet"] * len(table))


def compare_mlperf(table: Table) -> tuple[Table, Outcome]:
    """MLPerf's logs: parallelism, number formats and lengths are in the submitters' code and the datasets."""
    return table, Outcome(["plan not published: parallelism, number formats and lengths"] * len(table))


def compare_splitwise(table: Table) -> tuple[Table, Outcome]:
    """Splitwise's profile: a CPU-bound engine of 2023 that the repository does not name."""
    return table, Outcome(["engine and version not published"] * len(table))
