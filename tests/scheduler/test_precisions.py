"""Plans with several precisions, what these lose, and the allocation of experts to them under a budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

from sterna.runtime.config import embedded_model
from sterna.scheduler.model.plan import ModelPlan
from sterna.scheduler.model.planner import read_plan
from sterna.scheduler.model.precision_errors import measure
from sterna.scheduler.residency.precision.classes import PRECISION_PRESETS
from sterna.scheduler.residency.precision.plan import ExpertPrecisions, preset_precisions
from sterna.shm.errors import ConfigError
from sterna.workers.checkpoint.file import names
from sterna.workers.checkpoint.file.gguf import GgufFile
from sterna.workers.checkpoint.held.formats import DEFAULT_STORAGE, ActivationKind, Format, format_of
from sterna.workers.checkpoint.held.precisions import conversion

from . import altered_model as altered

PRECISIONS = ("file", "Q4_K", "Q3_K", "Q2_K", "TQ2_0")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GgufFile]:
    """The embedded model with Q8_0 experts, but for the down projections of layer 2, which stay ternary."""
    random = np.random.default_rng(2)

    def change(name: str, tensor: altered.Tensor) -> altered.Tensor:
        if not any(part in name for part in altered.EXPERTS) or name.startswith("blk.2.ffn_down_exps"):
            return tensor
        values = altered.values(name)
        # Ternary weights would lose nothing but at their scale; these are not ternary any more.
        noisy = values + (random.standard_normal(values.shape) * values.std() / 2).astype(np.float32)
        return quantize(noisy, Type.Q8_0), Type.Q8_0

    path = altered.write(tmp_path_factory.mktemp("precisions") / "q8.gguf", change=change)
    with GgufFile.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def plan(file: GgufFile) -> ModelPlan:
    return read_plan(file, precisions=PRECISIONS)


def test_precision_zero_is_the_plan_of_the_file(file: GgufFile, plan: ModelPlan) -> None:
    plain = read_plan(file)
    assert plain.precisions == ("file",)
    assert plan.experts == plain.experts
    assert plan.expert_nbytes == plain.expert_nbytes
    assert plan.all_slots() == plain.all_slots()
    assert plain.layer_shapes() == {
        layer: type(shape)(d_model=256, d_ff=256, precisions=shape.precisions[:1])
        for layer, shape in plan.layer_shapes().items()
    }
    assert all(len(matrices) == 1 for matrices in plain.tiers.values())
    assert plan.expert_page(file, 3, 1, 5).precision == 0
    assert plan.expert_page(file, 3, 1, 5, 2).precision == 2


def test_sizes_of_each_precision(plan: ModelPlan) -> None:
    """256 x 256: 16 groups of 16 rows, one block of 256 columns each."""
    matrix = {"Q8": 4096 + 256, "Q4_K": 2048 + 320, "Q3_K": 1536 + 288, "Q2_K": 1024 + 320, "TL1": 1024 + 32}
    for layer in plan.tiers:
        own = "TL1" if layer == 2 else "Q8"
        expected = [[*["Q8"] * 2, own]]
        smaller = ("Q4_K", "Q3_K", "Q2_K", "TL1")
        expected += [[form, form, own if layer == 2 else form] for form in smaller]
        assert [[m.shape.form.name for m in matrices] for matrices in plan.tiers[layer]] == expected
        sizes = [16 * sum(matrix[form] for form in forms) for forms in expected]
        assert list(plan.precision_nbytes[layer]) == [-(-size // 4096) * 4096 for size in sizes]
        for matrices in plan.tiers[layer]:
            ends = [0, *(m.at + m.shape.nbytes for m in matrices)]
            assert [m.at for m in matrices] == ends[:-1]
    sizes = {size for sizes in plan.precision_nbytes.values() for size in sizes}
    assert plan.slot_sizes() == sorted(sizes)
    assert {("Q4_K", Format.Q4_K), ("TQ2_0", Format.TL1)} <= plan.matrix_types
    assert plan.expert_activation(3) is ActivationKind.Q8_32
    assert plan.expert_activation(3, 1) is ActivationKind.Q8_256


def test_a_worker_knows_the_conversion_from_shape_and_slab(file: GgufFile, plan: ModelPlan) -> None:
    converted = 0
    for layer, shape in plan.layer_shapes().items():
        for precision, matrices in enumerate(shape.precisions):
            for (form, rows, columns, _), role in zip(matrices, altered.EXPERTS, strict=True):
                slab = names.expert_slab(file, role, layer, 0, plan.hyper.experts, rows, columns)
                target = conversion(slab.type, Format(form)) or slab.type
                assert format_of(target, columns, "test", DEFAULT_STORAGE) == form
                if target is not slab.type:
                    assert target.name == PRECISIONS[precision]
                    converted += 1
    assert converted == (5 * 3 - 1) * 4


def test_a_ternary_model_stays_as_it_is() -> None:
    with GgufFile.open(embedded_model()) as opened:
        plan = read_plan(opened, precisions=PRECISIONS)
        for layer, matrices in plan.tiers.items():
            assert set(matrices) == {plan.experts[layer]}
            assert set(plan.precision_nbytes[layer]) == {plan.expert_nbytes[layer]}
        assert plan.slot_sizes() == read_plan(opened).slot_sizes()
        assert not measure(opened, plan).any()


def test_gate_and_up_read_the_same_activations(tmp_path: Path) -> None:
    """IQ4_NL is no larger than Q4_K and stays, Q8_0 beside it is then not converted either."""

    def change(name: str, tensor: altered.Tensor) -> altered.Tensor:
        if "ffn_up_exps" in name:
            return quantize(altered.values(name), Type.Q8_0), Type.Q8_0
        if "ffn_gate_exps" in name:
            return np.zeros((16, 256, 256 // 32 * 18), np.uint8), Type.IQ4_NL
        return tensor

    with GgufFile.open(altered.write(tmp_path / "mixed.gguf", change=change)) as opened:
        plan = read_plan(opened, precisions=("file", "Q4_K", "Q3_K"))
    for own, four, three in plan.tiers.values():
        assert four == own
        assert [m.shape.form for m in three] == [Format.Q3_K, Format.Q3_K, own[2].shape.form]
    assert ("Q4_K", Format.Q4_K) not in plan.matrix_types


@pytest.mark.parametrize(
    "precisions", [(), ("Q4_K",), ("file", "Q6_K"), ("file", "Q2_K", "Q2_K"), ("file",) * 2]
)
def test_unknown_precisions_are_refused(file: GgufFile, precisions: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="expected file, then any of Q5_K"):
        read_plan(file, precisions=precisions)


# ---- allocation ----


def test_errors_are_measured_on_the_models_weights(file: GgufFile, plan: ModelPlan) -> None:
    errors = measure(file, plan)
    print(dict(zip(PRECISIONS, errors.mean(axis=0).round(5).tolist(), strict=True)))
    assert errors.shape == (5, 5)
    assert (errors[:, 0] == 0).all()
    assert (np.diff(errors, axis=1) > 0).all()
    # Layer 2 loses nothing in a third of its matrices.
    assert (errors[1, 1:] < 0.8 * errors[2, 1:]).all()
    more = measure(file, plan, experts=8)
    np.testing.assert_allclose(errors[:, 1:], more[:, 1:], rtol=0.1)


@pytest.mark.parametrize("preset", PRECISION_PRESETS)
def test_a_budget_is_kept_and_used_for_the_experts_in_use(file: GgufFile, preset: str) -> None:
    plan = read_plan(file, precisions=preset_precisions(preset))
    errors = measure(file, plan)
    counts = np.random.default_rng(4).zipf(1.5, plan.num_experts).astype(np.float64)
    counts[7] = counts.max() * 2
    keys = np.repeat(list(plan.tiers), plan.hyper.experts)
    hot, _, cold = (plan.precisions.index(name) for name in PRECISION_PRESETS[preset].formats)
    most = sum(plan.precision_nbytes[layer][hot] for layer in keys.tolist())
    least = sum(plan.precision_nbytes[layer][cold] for layer in keys.tolist())
    before = np.inf
    for share in (0.0, 0.25, 0.5, 1.0):
        budget = int(least + share * (most - least))
        chosen = ExpertPrecisions(plan, preset, errors).rebalance(counts, budget)
        assert chosen.dtype == np.int8
        used = [
            plan.precision_nbytes[layer][p] for layer, p in zip(keys.tolist(), chosen.tolist(), strict=True)
        ]
        assert budget - 64 * 1024 < sum(used) <= budget
        lost = counts @ errors[keys - 1, chosen]
        assert lost < before
        before = lost
        assert chosen[7] == hot or not share
    assert (chosen == hot).all()
    with pytest.raises(ConfigError, match="budget"):
        ExpertPrecisions(plan, preset, errors).rebalance(counts, least - 1)


def test_hot_experts_are_not_held_finer_than_in_the_file(tmp_path: Path) -> None:
    """In a file of Q3_K, "hot" Q4_K is the file's own."""

    def change(name: str, tensor: altered.Tensor) -> altered.Tensor:
        if any(part in name for part in altered.EXPERTS):
            return np.zeros((16, 256, 110), np.uint8), Type.Q3_K
        return tensor

    with GgufFile.open(altered.write(tmp_path / "q3.gguf", change=change)) as opened:
        plan = read_plan(opened, precisions=preset_precisions("default"))
    errors = np.tile([0.0, 0.0, 0.0, 0.1], (5, 1))
    assert (ExpertPrecisions(plan, "default", errors).rebalance(np.ones(80), 10**9) == 0).all()
    least = sum(16 * sizes[3] for sizes in plan.precision_nbytes.values())
    assert (ExpertPrecisions(plan, "default", errors).rebalance(np.ones(80), least) == 3).all()


def test_settled_experts_do_not_take_turns(file: GgufFile) -> None:
    plan = read_plan(file, precisions=preset_precisions("default"))
    precisions = ExpertPrecisions(plan, "default", measure(file, plan))
    counts = np.full(plan.num_experts, 100.0)
    budget = precisions.allocator.smallest_bytes + 40 * 8192
    first = precisions.rebalance(counts, budget)
    counts[::2] += 5
    assert (precisions.rebalance(counts, budget) == first).all()


def test_presets_and_shapes_are_checked(file: GgufFile, plan: ModelPlan) -> None:
    with pytest.raises(ConfigError, match="expected one of default"):
        preset_precisions("best")
    with pytest.raises(ConfigError, match="lacks Q5_K"):
        ExpertPrecisions(plan, "quality-focused", np.zeros((5, 5)))
    with pytest.raises(ConfigError, match=r"\(5, 4\): 5 layers, 5 precisions"):
        ExpertPrecisions(plan, "default", np.zeros((5, 4)))
