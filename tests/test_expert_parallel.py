"""What one GPU does and sends when data-parallel ranks share the experts, against counts made by hand."""

from __future__ import annotations

import pytest

from perfsim.ops.op import Collective, Op
from perfsim.ops.params import weight_bytes, weight_bytes_per_gpu
from perfsim.ops.step import StepShape
from perfsim.ops.transformer import lower
from perfsim.spec import catalog

# DeepSeek-V3: 58 of 61 layers with 256 experts of 7168 x 2048, of which a token visits 8, and a shared one.
MODEL = catalog.model("deepseek-ai--DeepSeek-V3")
LAYERS, HIDDEN, WIDTH, EXPERTS, TOP = 58, 7168, 2048, 256, 8
FP8 = 1 + 4 / 128**2
TOKENS = 64.0  # of each rank, all of them decodes


def lowered(*, tp: int, dp: int, ep: int) -> dict[str, Op | Collective]:
    """The work of one step by name; the shared expert's products are the last ones of their names."""
    step = StepShape(TOKENS, TOKENS, TOKENS, (TOKENS,), 0.0, (0.0,), (0.0,), dp * TOKENS)
    return {item.name: item for item in lower(MODEL, step, tp=tp, dp=dp, ep=ep)}


@pytest.mark.parametrize(("tp", "dp"), [(1, 32), (4, 8), (2, 4)])
def test_tokens_travel_to_their_experts_in_eight_bits_and_come_back_in_sixteen(tp: int, dp: int) -> None:
    work = lowered(tp=tp, dp=dp, ep=tp * dp)
    dispatch, combine = work["expert_dispatch"], work["expert_combine"]
    assert isinstance(dispatch, Collective)
    assert isinstance(combine, Collective)
    assert (dispatch.kind, dispatch.group, dispatch.count) == ("all_to_all", tp * dp, LAYERS)
    # The GPUs of a rank send a share each: together every token goes out once.
    assert dispatch.bytes * tp == TOKENS * TOP * HIDDEN
    assert combine.bytes * tp == TOKENS * TOP * HIDDEN * 2
    gather = work.get("gather_tokens")
    assert (gather is not None) == (tp > 1)
    if isinstance(gather, Collective):
        assert (gather.group, gather.bytes) == (tp, TOKENS / tp * HIDDEN * 2)


@pytest.mark.parametrize(("tp", "dp", "ep"), [(1, 32, 32), (4, 8, 32), (4, 8, 1), (8, 1, 8), (8, 1, 1)])
def test_the_experts_do_the_work_of_all_tokens_once(tp: int, dp: int, ep: int) -> None:
    experts = lowered(tp=tp, dp=dp, ep=ep)["experts"]
    assert isinstance(experts, Op)
    everything = dp * TOKENS * TOP * 2 * 3 * HIDDEN * WIDTH
    assert experts.count * experts.flops * tp * dp == pytest.approx(LAYERS * everything, rel=1e-12)


@pytest.mark.parametrize(("tp", "dp", "ep", "sequence"), [(4, 8, 32, True), (4, 8, 1, False), (4, 1, 4, False)])
def test_shared_experts_are_whole_where_each_gpu_has_tokens_of_its_own(
    tp: int, dp: int, ep: int, sequence: bool
) -> None:
    work = lowered(tp=tp, dp=dp, ep=ep)
    up, router = work["up_proj"], work["router"]
    assert isinstance(up, Op)
    assert isinstance(router, Op)
    rows = TOKENS / tp if sequence else TOKENS
    columns = 2 * WIDTH if sequence else 2 * WIDTH / tp
    assert up.flops == 2 * rows * HIDDEN * columns == 2 * TOKENS * HIDDEN * 2 * WIDTH / tp
    assert up.read_bytes == pytest.approx(HIDDEN * columns * FP8 + rows * HIDDEN * 2, rel=1e-12)
    assert router.flops == 2 * rows * HIDDEN * EXPERTS
    # Nothing is left to sum there: attention of 61 layers and the three dense ones.
    one = StepShape(1.0, 1.0, 1.0, (1.0,), 0.0, (0.0,), (0.0,))
    sums = [item.count for item in lower(MODEL, one, tp=tp, dp=dp, ep=ep) if item.name == "all_reduce"]
    assert sum(sums) == (64 if sequence else 122)


def test_weights_of_a_gpu_of_an_expert_parallel_group() -> None:
    expert = 3 * HIDDEN * WIDTH * FP8
    rest = weight_bytes(MODEL) - LAYERS * EXPERTS * expert
    assert weight_bytes_per_gpu(MODEL, tp=1, dp=32, ep=32) == pytest.approx(rest + LAYERS * 8 * expert, rel=1e-12)
    # Whole experts or slices of all: the same share of the routed ones; the shared one is whole beside whole ones.
    spread, sliced = (weight_bytes_per_gpu(MODEL, tp=4, dp=8, ep=ep) for ep in (32, 1))
    assert spread - sliced == pytest.approx(LAYERS * expert * 3 / 4, rel=1e-9)
    # Without data-parallel ranks all GPUs have the same tokens, and the shared expert is divided.
    assert weight_bytes_per_gpu(MODEL, tp=8, ep=8) == pytest.approx(weight_bytes_per_gpu(MODEL, tp=8), rel=1e-12)
