"""Kernels that are compiled when a step first needs them: what an engine that has started is not yet ready for.

vLLM runs unquantised experts as a Triton kernel (`vllm/model_executor/layers/fused_moe/fused_moe.py`, 0.15.1). Its tile
sizes are looked up for the tuned number of tokens nearest to that of the step, and Triton compiles it anew for every
tile size and for whether two of its arguments are divisible by 16: the pairs of token and picked expert, and those
pairs with room for the padding of each expert's. CUDA graphs are captured at start-up, and steps that fit one are
padded to it; one longer step, the longest, is run for profiling. So the first long steps wait for the compiler.

Neglected: tuned sizes that share their tiles; that models without tuned sizes have two; a compiler's cache on disk.
"""

from __future__ import annotations

from dataclasses import dataclass

from perfsim.spec.calibration import EngineProfile
from perfsim.spec.model import ModelArch
from perfsim.spec.policy import ParallelPlan

TUNED = (256, 512, 1024, 1536, 2048, 3072, 4096)  # tokens: keys of vLLM's tuned configurations beyond CUDA graphs
LARGEST_GRAPH = 512  # tokens, or twice the sequences if that is less (vllm/config/vllm.py, _set_cudagraph_sizes)
DIVISOR = 16  # Triton's specialisation of integers


@dataclass(frozen=True, slots=True)
class ExpertKernels:
    """How long the first step of a kind waits, and what is ready at start-up: steps up to `graph` and of `longest`."""

    seconds: float
    graph: int
    longest: int
    experts: int
    picks: int

    def kind(self, tokens: int) -> tuple[int, bool, bool] | None:
        """What a step of so many tokens is compiled for; None if nothing is."""
        if tokens <= self.graph:
            return None
        pairs = tokens * self.picks
        nearest = min(TUNED, key=lambda tuned: abs(tuned - tokens))
        # Each expert may waste a tile less one row, and tiles are multiples of 16 rows.
        return nearest, pairs % DIVISOR == 0, (pairs - self.experts) % DIVISOR == 0


class WarmUp:
    """Which kernels one engine has compiled so far; without `kernels`, none ever is."""

    __slots__ = ("_kernels", "_ready", "compiles")

    def __init__(self, kernels: ExpertKernels | None) -> None:
        self._kernels = kernels
        self._ready = set() if kernels is None else {None, kernels.kind(kernels.longest)}
        self.compiles = kernels is not None

    def wait(self, tokens: int) -> float:
        """Seconds that a step of so many tokens waits for kernels, which are there from then on."""
        if self._kernels is None:
            return 0.0
        kind = self._kernels.kind(tokens)
        if kind in self._ready:
            return 0.0
        self._ready.add(kind)
        return self._kernels.seconds


def expert_kernels(
    model: ModelArch, engine: EngineProfile, parallel: ParallelPlan, *, max_tokens: int, max_seqs: int
) -> ExpertKernels | None:
    """The kernels of the first group of unquantised experts; None without any, or if compiling takes no time.

    With pipeline stages or data-parallel ranks there are none: whose step is the first is not told apart there.
    """
    experts = [group.mlp for group in model.layers if group.mlp is not None and group.mlp.kind == "moe"]
    if not engine.kernel_compile or not experts or model.expert_dtype not in ("bf16", "fp16"):
        return None
    if parallel.pp > 1 or parallel.dp > 1:
        return None
    graph = min(2 * max_seqs, LARGEST_GRAPH, max_tokens)
    return ExpertKernels(
        engine.kernel_compile, graph, max_tokens, experts[0].num_experts, experts[0].num_experts_per_tok
    )
