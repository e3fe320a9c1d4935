"""Records what vLLM's scheduler decides with its offloading connector, under random scripts.

    python -m validation.kv_offload.record_schedule

As `validation.scheduler.record`, whose environment and engine it uses, with OffloadingConnector and a tier of `chunks`
blocks. vLLM has no transfers for CPUs, so a stand-in takes the place of the worker that copies: nothing is copied, and
a transfer has ended when the worker is next asked; with async scheduling, where on a GPU it waits for the step in
flight, when it is asked the time after. vLLM tells the connector about requests that finish together in the order of a
set of strings; here it is the order in which they finish.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from validation.scheduler import record
from validation.scheduler.script import Case, Row

FOLDER = Path(__file__).parent / "schedules"
SCRIPTS = (*range(12), *(100 + number for number in range(16)))  # from 100 on with async scheduling


class Instant:
    """Stands for the worker that copies; `delay`: what was submitted since it was last asked has not ended yet."""

    delay = False

    def __init__(self) -> None:
        self.submitted: list[int] = []
        self.waiting: list[int] = []

    def submit_store(self, job_id: int, source: Any, target: Any) -> bool:
        self.submitted.append(job_id)
        return True

    submit_load = submit_store

    def get_finished(self) -> list[Any]:
        """Transfers that have ended."""
        from vllm.v1.kv_offload.base import TransferResult

        ended = self.waiting if self.delay else self.submitted
        self.waiting, self.submitted = (self.submitted if self.delay else []), []
        return [TransferResult(job_id=job_id, success=True) for job_id in ended]

    def wait(self, job_ids: set[int]) -> None: ...

    def shutdown(self) -> None: ...


def script(seed: int) -> tuple[Case, int]:
    """A random script about three texts that some prompts go beyond, and the chunks of the tier."""
    draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
    rows: list[Row] = []
    step = 0
    for index in range(draw.randint(12, 40)):
        step += draw.choice([0, 0, 1, 2, 5, 9] if seed < 100 else [0, 0, 1, 2, 3])
        pieces = [draw.choice("pqr")] + ([draw.choice("pqrs")] if draw.random() < 0.6 else [])
        text = "+".join(f"{name}{draw.choice([32, 64, 96, 128])}" for name in pieces)
        if draw.random() < 0.7:
            text += f"+{chr(97 + index % 15) * (2 + index // 15)}{draw.choice([1, 17, 40, 64])}"
        rows.append((step, text, draw.choice([1, 2, 8, 20, 40])))
    limits = {
        "total_blocks": draw.choice([14, 20, 40]), "max_num_seqs": draw.choice([2, 4, 8]),
        "max_num_batched_tokens": draw.choice([64, 128]), "reserve_full_isl": draw.choice([True, True, False]),
        "prefix_caching": draw.choice([True, True, False]), "long_prefill_token_threshold": draw.choice([0, 0, 40]),
        "priority": draw.random() < 0.2, "async_scheduling": seed >= 100,
    }  # fmt: skip
    return Case(f"offload-{seed}", tuple(rows), limits), draw.choice([6, 16, 60])


def patch(chunks: list[int]) -> None:
    """Put the stand-in into vLLM, and a tier of `chunks[0]` chunks."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
    from vllm.engine import arg_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    arguments, build = arg_utils.EngineArgs, OffloadingConnectorScheduler.build_connector_meta
    begin, free = CPUOffloadingSpec.__init__, Scheduler._free_request
    order: list[str] = []

    def sized(self: Any, config: Any) -> None:
        begin(self, config)
        self.num_chunks = chunks[0]

    def freed(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        order.append(request.request_id)
        return free(self, request, *args, **kwargs)

    def ordered(self: Any, output: Any) -> Any:
        finished = output.finished_req_ids
        output.finished_req_ids = sorted(finished, key=order.index)
        meta = build(self, output)
        output.finished_req_ids = finished
        return meta

    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    arg_utils.EngineArgs = lambda **given: arguments(
        **given,
        kv_transfer_config=KVTransferConfig(**connector, kv_connector_extra_config={"cpu_bytes_to_use": 1 << 30}),
    )
    CPUOffloadingSpec.__init__, CPUOffloadingSpec.get_worker = sized, lambda self, caches: Instant()
    Scheduler._free_request, OffloadingConnectorScheduler.build_connector_meta = freed, ordered


def main() -> None:
    """Record all scripts; those in which an engine with async scheduling is idle are left out."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    chunks = [0]
    patch(chunks)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(record.MODEL))
        for seed in SCRIPTS:
            case, chunks[0] = script(seed)
            Instant.delay = seed >= 100
            try:
                log = record.record(case, model=folder)
            except RuntimeError as error:
                print(error)
                continue
            log["chunks"] = chunks[0]
            (FOLDER / f"{case.name}.json").write_text(json.dumps(log, separators=(",", ":")) + "\n")
            print(f"{case.name}: {len(log['decisions'])} decisions")


if __name__ == "__main__":
    main()
