"""Speculative decoding: what the drafter does in one step, beside the target's verification.

The target verifies k drafts per decode sequence in the same forward pass (`StepShape.queries` = 1 + k): that is its own
lowering. The drafter then proposes the next k. As in vLLM's EAGLE and MTP proposers (`vllm/v1/spec_decode`, 0.32) its
first pass runs over all new tokens of the step, which also fills its K/V, and k - 1 more passes over one token per
sequence; each of the k passes ends with the head. Costs by method:

- `ngram`: a lookup on the host. Nothing on the GPU, and no host time is assumed beyond that of the tokens verified.
- `mtp`: the model's own prediction layers, once per pass, with a projection of 2h to h in front of them.
- `eagle`: one more decoder layer like the target's last one with attention, with the same projection (EAGLE,
  arXiv:2401.15077, 3.1).
- `draft_model`: `draft_parameters` weights, read once per pass, divided among the `tp` GPUs.

Neglected: of a draft model everything but its weights (attention, collectives, K/V, launches beyond one per pass); in
passes after the first, the attention of sequences whose prefill is in the step; drafts cut short cost a full draft.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from perfsim.errors import InputError
from perfsim.ops.gemm import gemm
from perfsim.ops.op import Collective, Driver, Num, Op
from perfsim.ops.step import StepShape, attention_spans
from perfsim.ops.transformer import lower
from perfsim.spec.model import ACTIVATION_BYTES, LayerGroup, ModelArch
from perfsim.spec.policy import SpeculativeDecoding

COMPONENT = "drafting"


def draft_layers(model: ModelArch, speculative: SpeculativeDecoding) -> tuple[LayerGroup, ...]:
    """The decoder layers that one pass of the drafter runs; empty where it has none of the target's shape.

    Raises InputError for `mtp` on a model without prediction layers.
    """
    if speculative.method == "mtp":
        if not model.num_nextn_predict_layers:
            raise InputError(f"policy.speculative.method: {model.name} has no multi-token-prediction layers, got 'mtp'")
        if model.mtp_layers:
            return model.mtp_layers
    if speculative.method not in ("mtp", "eagle"):
        return ()
    attending = [group for group in model.layers if group.reach is not None]
    return ((attending or model.layers)[-1].model_copy(update={"count": 1}),)


def with_drafter(model: ModelArch, speculative: SpeculativeDecoding | None) -> ModelArch:
    """The target and the drafter's layers: what a GPU holds weights and K/V of."""
    if speculative is None:
        return model
    return model.model_copy(update={"layers": (*model.layers, *draft_layers(model, speculative))})


def drafter_bytes(model: ModelArch, speculative: SpeculativeDecoding | None, *, tp: int) -> float:
    """Weights of the drafter on each of `tp` GPUs beside its layers: the projection, or all of a draft model."""
    if speculative is None or speculative.method == "ngram":
        return 0.0
    width = ACTIVATION_BYTES[model.dtype]
    if speculative.draft_parameters is not None:
        return speculative.draft_parameters * width / tp
    return 2.0 * model.hidden_size**2 * width


def lower_with_drafts(
    model: ModelArch, step: StepShape, *, speculative: SpeculativeDecoding | None, tp: int, **how: Any
) -> list[Op | Collective]:
    """As `lower`, with the drafter's work behind that of the target; without `speculative` the same."""
    work = lower(model, step, tp=tp, **how)
    if speculative is not None:
        work += draft_work(model, step, speculative, tp=tp, **how)
    return work


def draft_work(
    model: ModelArch, step: StepShape, speculative: SpeculativeDecoding, *, tp: int, pp: int = 1, **how: Any
) -> list[Op | Collective]:
    """All passes of the drafter in one step on one GPU; it runs on one pipeline stage, whatever `pp`."""
    first, again = step, _next_pass(step)
    more = speculative.num_speculative_tokens - 1
    if speculative.method == "ngram":
        return []
    if speculative.method == "draft_model":
        return [*_passes(_weights(model, speculative, first.tokens, tp), 1),
                *_passes(_weights(model, speculative, again.tokens, tp), more, driver="sequences")]  # fmt: skip
    drafter = model.model_copy(update={"layers": draft_layers(model, speculative)})
    spans, ours = attention_spans(model), attention_spans(drafter)
    if not set(ours) <= set(spans):
        raise InputError(f"policy.speculative: prediction layers of {model.name} attend other spans than its layers")
    picks = [spans.index(span) for span in ours]
    work: list[Op | Collective] = []
    for shape, count in ((first, 1), (again, more)):
        later = shape is again
        fuse = gemm(model, "draft_proj", 1, shape.tokens, model.hidden_size, 2 * model.hidden_size,
                    weight_dtype=model.dtype)  # fmt: skip
        for item in (fuse, *lower(drafter, _aligned(shape, picks), tp=tp, **how)):
            if item.driver == "logits":  # the head runs in every pass, on one position per sequence
                if later:
                    work += _passes(item, count + 1, driver="sequences")
            elif not later:
                work += _passes(_renumbered(item, picks), count, driver=item.driver)
            elif item.driver == "expansion":  # nothing but the sequences' own tokens
                work += _passes(_of_sequences(item, step), count, driver="decodes")
            elif item.kind != "prefill_attention" and item.driver != "prefill":
                driver = "sequences" if item.driver == "tokens" else item.driver
                work += _passes(_renumbered(item, picks), count, driver=driver)
    return work


def _next_pass(step: StepShape) -> StepShape:
    """One token per sequence; the other data-parallel ranks are taken to decode as well."""
    zeros = tuple(0.0 * entries for entries in step.prefill_context)
    group = None if step.group_tokens is None else step.group_tokens / step.queries
    return StepShape(
        step.logits, step.logits, step.decode_sequences, step.decode_context, 0.0 * step.prefill_tokens, zeros, zeros,
        group,
    )  # fmt: skip


def _aligned(step: StepShape, picks: list[int]) -> StepShape:
    """The sums of the spans that the drafter has."""
    return replace(
        step,
        decode_context=tuple(step.decode_context[index] for index in picks),
        prefill_pairs=tuple(step.prefill_pairs[index] for index in picks),
        prefill_context=tuple(step.prefill_context[index] for index in picks),
    )


def _passes(item: Op | Collective, count: int, *, driver: Driver = "tokens") -> Iterator[Op | Collective]:
    """`count` passes of `item`, named as the drafter's; nothing for none."""
    if count:
        name = item.name if item.name.startswith("draft") else f"draft_{item.name}"
        yield replace(item, name=name, count=item.count * count, driver=driver, part=COMPONENT)


def _of_sequences(item: Op | Collective, step: StepShape) -> Op | Collective:
    """An expansion that follows the decoding sequences alone."""
    if isinstance(item, Collective):
        return item
    return replace(item, mix=(), active=np.minimum(step.decode_sequences, 1.0))


def _renumbered(item: Op | Collective, picks: list[int]) -> Op | Collective:
    """With the target's numbers of the spans."""
    if isinstance(item, Collective) or not item.mix:
        return item
    return replace(item, mix=tuple((picks[index], weight) for index, weight in item.mix))


def _weights(model: ModelArch, speculative: SpeculativeDecoding, tokens: Num, tp: int) -> Op:
    """A draft model's pass as one product with all its weights, in the target's activation format."""
    parameters = (speculative.draft_parameters or 0.0) / tp
    read = parameters * ACTIVATION_BYTES[model.dtype] + 0.0 * tokens
    return Op("gemm", "draft_model", 1, tokens * (2.0 * parameters), read, 0.0 * tokens, model.dtype)
