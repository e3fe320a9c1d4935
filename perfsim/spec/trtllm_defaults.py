"""What TensorRT-LLM would choose where a command line leaves a choice open.

The block of 32 tokens and the 0.9 of free memory are also the defaults of Dynamo's TensorRT-LLM worker
(dynamo/trtllm/backend_args.py in the ai-dynamo 1.6.1 wheel on PyPI). The two batch limits are recalled from
tensorrt_llm/builder.py (`BuildConfig`), not read: verified: false.
"""

from __future__ import annotations

TOKENS_PER_BLOCK = 32
FREE_MEMORY_FRACTION = 0.9
MAX_BATCH_SIZE = 2048
MAX_NUM_TOKENS = 8192
