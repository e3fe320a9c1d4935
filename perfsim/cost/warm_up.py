"""Kernels that are compiled when a step first needs them: what an engine that has started is not yet ready for.

vLLM runs unquantised experts as a Triton kernel (`vllm/model_executor/layers/fused_moe/fused_moe.py`, 0.15.1). Its tile
sizes are looked up for the tuned number of tokens nearest to that of the step, and Triton compiles it anew for every
set of tiles and for whether two of its arguments are divisible by 16: the pairs of token and picked expert, and those
pairs with room for the padding of each expert's. CUDA graphs are captured at start-up, and steps that fit one are
padded to it; one longer step, the longest, is run for profiling. So the first long steps wait for the compiler.

Neglected: a compiler's cache on disk, which a container that has run before may have.
"""

from __future__ import annotations

from dataclasses import dataclass

from perfsim.spec.calibration import EngineProfile
from perfsim.spec.expert_tiles import tiles_of
from perfsim.spec.model import ModelArch
from perfsim.spec.policy import ParallelPlan

LARGEST_GRAPH = 512  # tokens, or twice the sequences if that is less (vllm/config/vllm.py, _set_cudagraph_sizes)
DIVISOR = 16  # Triton's specialisation of integers
Kind = tuple[int, bool, bool]


@dataclass(frozen=True, slots=True)
class ExpertKernels:
    """How long the first step of a kind waits, and what is ready at start-up: steps up to `graph` and of `longest`.

    `tiles` are (tokens, which tiles are used for them); without any, there is one set of tiles for more tokens than
    `experts`, and another for fewer.
    """

    seconds: float
    graph: int
    longest: int
    experts: int
    picks: int
    tiles: tuple[tuple[int, int], ...] = ()

    def kind(self, tokens: int) -> Kind:
        """What a step of so many tokens is compiled for."""
        pairs = tokens * self.picks
        tile = int(tokens > self.experts)
        if self.tiles:
            tile = min(self.tiles, key=lambda tuned: abs(tuned[0] - tokens))[1]
        # Each expert may waste a tile less one row, and tiles are multiples of 16 rows.
        return tile, pairs % DIVISOR == 0, (pairs - self.experts) % DIVISOR == 0

    def at_start(self) -> set[Kind]:
        """What is compiled before the first request: the sizes of CUDA graphs, and the longest step.

        1, 2, 4, then multiples of 8, from 256 on of 16 (vllm/config/vllm.py, 0.15.1).
        """
        sizes = [1, 2, 4, *range(8, 256, 8), *range(256, self.graph + 1, 16)]
        return {self.kind(tokens) for tokens in sizes if tokens <= self.graph} | {self.kind(self.longest)}


class WarmUp:
    """Which kernels one engine has compiled so far; without `kernels`, none ever is."""

    __slots__ = ("_kernels", "_ready", "compiles")

    def __init__(self, kernels: ExpertKernels | None) -> None:
        self._kernels = kernels
        self._ready = set() if kernels is None else kernels.at_start()
        self.compiles = kernels is not None

    def wait(self, tokens: int) -> float:
        """Seconds that a step of so many tokens waits for kernels, which are there from then on."""
        kernels = self._kernels
        if kernels is None or tokens <= kernels.graph:
            return 0.0
        kind = kernels.kind(tokens)
        if kind in self._ready:
            return 0.0
        self._ready.add(kind)
        return kernels.seconds


def expert_kernels(
    model: ModelArch, engine: EngineProfile, parallel: ParallelPlan, *, accelerator: str, max_tokens: int,
    max_seqs: int, eager: bool = False,
) -> ExpertKernels | None:  # fmt: skip
    """The kernels of the first group of unquantised experts; None without any, or if compiling takes no time.

    `eager` engines capture no graphs, so that of all steps only the longest is ready.
    With pipeline stages or data-parallel ranks there are none: whose step is the first is not told apart there.
    """
    found = [group.mlp for group in model.layers if group.mlp is not None and group.mlp.kind == "moe"]
    if not engine.kernel_compile or not found or model.expert_dtype not in ("bf16", "fp16"):
        return None
    if parallel.pp > 1 or parallel.dp > 1:
        return None
    experts = found[0]
    tiles = tiles_of(
        accelerator, experts=experts.num_experts // parallel.ep,
        width=experts.moe_intermediate_size * parallel.ep // parallel.tp,
    )  # fmt: skip
    graph = 0 if eager else min(2 * max_seqs, LARGEST_GRAPH, max_tokens)
    return ExpertKernels(
        engine.kernel_compile, graph, max_tokens, experts.num_experts, experts.num_experts_per_tok,
        tuple(tiles.items()),
    )  # fmt: skip
