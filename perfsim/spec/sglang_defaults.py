"""What SGLang would choose where a command line leaves a choice open.

Source: sglang/srt/arg_groups/memory_hook.py (`handle_gpu_memory_settings`, `reserve_for_graph_mb`), cuda_graph_hook.py
(`generate_prefill_cuda_graph_batch_sizes`) beside it, and sglang/srt/mem_cache/kv_cache_configurator.py
(`resolve_max_num_reqs`), read in the sglang 0.5.23 wheel on PyPI.
"""

from __future__ import annotations

from perfsim.spec.hardware import Accelerator
from perfsim.units import MIB

PAGE_SIZE = 1
MAX_PREFILL_TOKENS = 16384
MAX_LORAS_PER_BATCH = 8
# The estimate is 512 x KV tokens / context length, between 2048 and 4096: its lower end holds for long contexts.
MAX_RUNNING_REQUESTS = 2048
# (memory below this many MiB, chunked_prefill_size, largest decode graph with tp < 4, with tp >= 4)
_BY_MEMORY = (
    (20 * 1024, 2048, 8, 8), (35 * 1024, 4096, 48, 160), (60 * 1024, 4096, 32, 160), (160 * 1024, 8192, 256, 512),
    (float("inf"), 16384, 512, 512),
)  # fmt: skip


def chunked_prefill_size(accelerator: Accelerator) -> int:
    """Tokens of a prefill step, by the device's memory."""
    return _row(accelerator)[0]


def mem_fraction_static(
    accelerator: Accelerator, *, gpus: int, tp: int, attention_ranks: int, chunk: int, mla: bool
) -> float:
    """The share of the device for weights and KV cache: what activations and CUDA graphs are expected to leave.

    `gpus` is tp * pp, `tp` includes the attention ranks, `chunk` is the prefill step before it is divided among them.
    Neglected: vision models, DeepEP buffers, sizing after graph capture (off by default), graphs that are turned off.
    """
    memory = accelerator.memory.capacity / MIB
    _, small, large = _row(accelerator)
    decode_graph = small if tp < 4 else large
    reserved = 512 + max(chunk, 2048) * 1.5 + gpus / 8 * 1024
    reserved += decode_graph * 2
    if attention_ranks > 1:
        reserved += decode_graph * attention_ranks * (4.5 if decode_graph > 300 else 3)
    reserved += 1.5 * 1024 if mla else 8 * _prefill_graphs(chunk)
    if memory > 60 * 1024:
        reserved = max(reserved, 10 * 1024)
    return round((memory - reserved) / memory, 3)


def draft_shape(architecture: str, *, standalone: bool) -> tuple[int, int]:
    """(steps, top-k) of speculative decoding; `_auto_choose_speculative_params` of speculative_hook.py."""
    wide = not standalone and architecture in ("LlamaForCausalLM", "Grok1ForCausalLM", "Grok1VForCausalLM")
    return (5, 4) if wide else (3, 1)


def _row(accelerator: Accelerator) -> tuple[int, int, int]:
    memory = accelerator.memory.capacity / MIB
    return next((chunk, small, large) for below, chunk, small, large in _BY_MEMORY if memory < below)


def _prefill_graphs(chunk: int) -> int:
    sizes = [*range(4, 33, 4), *range(48, 257, 16), *range(288, 513, 32), *range(576, 1025, 64),
             *range(1280, 4097, 256), *range(4608, chunk + 1, 512)]  # fmt: skip
    return sum(size <= chunk for size in sizes)
