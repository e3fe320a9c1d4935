"""A resolved scenario in words: a title, and the facts a reader wants to see without opening the YAML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perfsim.report import deployment
from perfsim.report.format import human, significant, words

if TYPE_CHECKING:
    from perfsim.metrics.result import Result

    Rows = list[tuple[str, str]]
    Json = dict[str, Any]


def title(scenario: Json) -> str:
    """Model and hardware, such as `Llama-3.1-70B on 8 × NVIDIA H100 SXM`; GPUs of all replicas at the start."""
    return f"{model_name(scenario)} on {deployment.hardware(scenario)}"


def subtitle(result: Result) -> str:
    """Traffic and size of the run in one line."""
    workload = result.scenario["workload"]
    if workload["kind"] == "trace":
        traffic = f"trace {_file_name(workload['trace'])}"
    else:
        kind = {"rag": "questions over documents", "synthetic": "synthetic traffic"}.get(
            workload["kind"], workload["kind"]
        )
        traffic = f"{kind}, {workload['arrivals']['kind']} arrivals"
    counts = result.metrics["counts"]
    parts = [traffic, f"{counts['completed']:,} requests served"]
    if counts["rejected"]:
        parts.append(f"{counts['rejected']:,} rejected")
    if counts.get("failed"):
        parts.append(f"{counts['failed']:,} failed")
    if result.metrics["makespan_s"] is not None:
        parts.append(f"{human(result.metrics['makespan_s'], 's')} simulated")
    return " · ".join(parts)


def model_name(scenario: Json) -> str:
    """The model's Hugging Face id, or its name when it has none."""
    model = scenario["model"]
    return str(model.get("hf_id") or model["name"])


def first_guess(result: Result) -> bool:
    """Whether nobody fitted the coefficients that this result rests on."""
    return bool(result.scenario["calibration"]["status"] == "first-guess")


def bands_note(result: Result) -> str:
    """One line on what the bands are, or on why there are none."""
    said = result.provenance.get("uncertainty")
    if not isinstance(said, dict):
        return f"Bands: {said or 'not quantified'}."
    factors = said["factors"]
    guesses = sum("guess" in source for source in factors.values())
    of_guesses = f", the sizes of {guesses} of them partly guessed" if guesses else ""
    return f"In brackets: 5–95% bands from {len(factors)} factors{of_guesses}; {said['runs']} reruns."


def sections(scenario: Json) -> list[tuple[str, Rows]]:
    """Titled groups of (name, value) rows: model, hardware, policy, workload."""
    workload = scenario["workload"]
    if workload["kind"] == "trace":
        workload = {**workload, "trace": _file_name(workload["trace"])}
    policy = [("Parallelism", deployment.ranks(scenario["parallel"])), *flatten(scenario["policy"], raw=True)]
    service = deployment.rows(scenario)
    return [
        *([("Deployment", service)] if service else []),
        ("Model", _model(scenario["model"])),
        ("Hardware", _hardware(scenario["hardware"])),
        ("Serving policy", policy),
        ("Workload", flatten(workload)),
    ]


def flatten(tree: Json, prefix: str = "", *, raw: bool = False) -> Rows:
    """Rows of (label, value) for every leaf of a nested dict; missing values are left out, `raw` keeps the keys."""
    rows: Rows = []
    for key, value in tree.items():
        label = key if raw else words(key)
        if isinstance(value, dict):
            rows.extend(flatten(value, f"{prefix}{label}: ", raw=raw))
        elif value is not None and value != []:
            rows.append((prefix + label, _leaf(value)))
    return rows


def _file_name(trace: str) -> str:
    """A trace without its folders: where a file lies on one machine is no part of a result."""
    return trace.replace("\\", "/").rsplit("/", 1)[-1]


def _leaf(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(_leaf(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_leaf(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _model(model: Json) -> Rows:
    layers = [f"{group['count']} × {_attention(group['attention'])}, {_mlp(group['mlp'])}" for group in model["layers"]]
    return [
        ("Name", str(model["name"])),
        ("Architecture", str(model["architecture"])),
        ("Layers", "; ".join(layers)),
        ("Hidden size", f"{model['hidden_size']:,}"),
        ("Vocabulary", f"{model['vocab_size']:,}"),
        ("Longest context", f"{model['max_position_embeddings']:,} tokens"),
        ("Types", f"activations and KV cache {model['dtype']}, weights {model['linear_dtype']}"),
    ]


def _attention(attention: Json) -> str:
    if attention["kind"] == "mla":
        return f"MLA, {attention['num_attention_heads']} heads, latent {attention['kv_lora_rank']}"
    heads, shared = attention["num_attention_heads"], attention["num_key_value_heads"]
    window = f", window {attention['window']:,}" if attention.get("window") else ""
    return f"{heads} query and {shared} KV heads of {attention['head_dim']}{window}"


def _mlp(mlp: Json) -> str:
    if mlp["kind"] == "moe":
        return f"{mlp['num_experts_per_tok']} of {mlp['num_experts']} experts, {mlp['moe_intermediate_size']:,} wide"
    return f"MLP {mlp['intermediate_size']:,} wide"


def _hardware(node: Json) -> Rows:
    gpu = node["accelerator"]
    memory, link = gpu["memory"], node["scale_up"]
    peak = ", ".join(f"{dtype} {significant(rate / 1e12)}" for dtype, rate in gpu["peak_flops"].items())
    price = gpu.get("price_per_hour")
    return [
        ("Node", f"{node['label']}, {node['accelerator_count']} GPUs"),
        ("GPU", str(gpu["label"])),
        ("Memory", f"{human(memory['capacity'], 'bytes')} {memory['kind'].upper()} at "
                   f"{human(memory['read_bandwidth'], 'bytes')}/s per GPU"),
        ("Dense peak", f"{peak} TFLOP/s per GPU"),
        ("GPU to GPU", f"{words(link['kind'])}, {human(link['bandwidth'], 'bytes')}/s each way"),
        ("Power", f"{human(gpu.get('tdp'), 'W')} per GPU at most, {human(node['host_power'], 'W')} host"),
        ("Price", "not published" if price is None else f"{human(price, 'USD')} per GPU and hour"),
    ]  # fmt: skip
