"""What an engine is told once: limits of its scheduler, its block pool, and what is served beside."""

from __future__ import annotations

from dataclasses import dataclass

from perfsim.cost.host_tier import TierPlan
from perfsim.cost.warm_up import ExpertKernels
from perfsim.serving.acceptance import mean_emission


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Scheduler limits, every default filled in; token and block counts.

    Beside the blocks of its growing cache a sequence holds `window_blocks`, whatever its length, and per (most, groups)
    of `span_blocks` as many as its tokens fill in each of `groups`, at most `most`: windows and chunks.
    At most `max_loras` LoRA adapters (0: any) are in one step, `adapter_load` seconds bring one to the GPU.
    With `acceptance`, the chance of each draft token to be accepted after those before it, every decode verifies so
    many drafts per step; `lookahead` positions more have blocks, for what the drafter writes. `seed` is for the draws.
    Without `mixed_steps` prompts are computed in steps of their own, before any decode.
    A `prefill_only` engine hands a request over after its first token and holds its blocks until they are fetched.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    total_blocks: int
    window_blocks: int = 0
    span_blocks: tuple[tuple[int, int], ...] = ()
    priority: bool = False
    chunked_prefill: bool = True
    mixed_steps: bool = True
    prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    async_scheduling: bool = True
    reserve_full_isl: bool = True
    watermark_blocks: int = 0
    prefill_only: bool = False
    max_loras: int = 0
    adapter_load: float = 0.0
    acceptance: tuple[float, ...] = ()
    lookahead: int = 0
    seed: int = 0
    tier: TierPlan | None = None
    expert_kernels: ExpertKernels | None = None
    timeout: float = float("inf")  # seconds after which clients give up

    @property
    def mean_emission(self) -> float:
        """Mean tokens that a decode puts out per step."""
        return mean_emission(self.acceptance)

    def beside(self, tokens: int) -> int:
        """Blocks that a sequence which ends with `tokens` tokens holds beside those of its growing cache.

        They are set aside at admission: short of its window a sequence is charged a little early.
        """
        if not self.span_blocks:
            return self.window_blocks
        filled = -(-tokens // self.block_size)
        return self.window_blocks + sum(groups * min(filled, most) for most, groups in self.span_blocks)
