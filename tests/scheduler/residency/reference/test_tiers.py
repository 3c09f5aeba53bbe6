"""Memory tiers: presets, ruvllm's pinned table and golden vectors (ADR-092), and real swaps in bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.scheduler.residency.reference.hardware import GIB, KIB, MIB
from sterna.scheduler.residency.reference.tiers import PRESETS, HardwareConfig, MemoryTier, TierMapper
from sterna.shm.errors import ConfigError

from .vectors import cases, number_of

GOLDEN = cases("mapper")
SRAM, DRAM, STORAGE = MemoryTier


def reference(n: int = 8, sram: int = 8, dram: int = 200) -> TierMapper:
    return TierMapper(HardwareConfig(sram_slots=sram, dram_slots=dram), n, compat=True)


@pytest.mark.parametrize(
    ("preset", "expert_bytes", "slots"),
    [
        ("raspberry-pi-5", 34_000_000, (0, 189)),
        ("raspberry-pi-5", 500 * KIB, (4, 12582)),
        ("mobile", MIB, (4, 2048)),
        ("desktop", 8 * MIB, (4, 1536)),
        ("wasm-browser", 2 * MIB, (1, 512)),
    ],
)
def test_pinned_presets(preset: str, expert_bytes: int, slots: tuple[int, int]) -> None:
    config = PRESETS[preset].for_experts(expert_bytes)
    assert (config.sram_slots, config.dram_slots) == slots
    assert TierMapper(config, 8).tier_summary() == {SRAM: 0, DRAM: 0, STORAGE: 8}


def test_pinned_configs() -> None:
    custom = HardwareConfig(sram_bytes=32 * MIB, dram_bytes=8 * GIB).for_experts(8 * MIB)
    assert (custom.sram_slots, custom.dram_slots, custom.total_slots) == (4, 1024, 1028)
    assert HardwareConfig(sram_slots=8, dram_slots=200).total_slots == 208
    default = PRESETS["custom"]
    assert (default.sram_slots, default.dram_slots, default.total_budget) == (2, 8, 8 * MIB + 4 * GIB)
    assert default.for_experts(0).sram_slots == 8 * MIB
    assert [t.label for t in MemoryTier] == [
        "SRAM (L2/L3 Cache)", "DRAM (Main Memory)", "Storage (Flash/NVMe)",
    ]  # fmt: skip


def test_pinned_moves() -> None:
    mapper = reference()
    seen = []
    for e, tier in ((0, SRAM), (1, DRAM), (0, DRAM), (1, STORAGE)):
        assert mapper.assign_tier(e, tier)
        seen.append((mapper.used(SRAM), mapper.used(DRAM)))
    assert seen == [(1, 0), (1, 1), (0, 2), (0, 1)]
    assert not mapper.assign_tier(8, SRAM)
    assert mapper.get_tier(8) is STORAGE


def test_pinned_latencies_and_summary() -> None:
    mapper = reference()
    assert mapper.estimate_paging_latency(99) == 100
    mapper.set_latencies_us(1, 10, 200)
    mapper.apply([(0, SRAM), (1, DRAM), (2, DRAM)])
    assert [mapper.estimate_paging_latency(e) for e in (0, 1, 3, 99)] == [1, 10, 200, 200]
    assert mapper.tier_summary() == {SRAM: 1, DRAM: 2, STORAGE: 5}
    assert mapper.experts_in_tier(DRAM) == [1, 2]
    assert (mapper.available(SRAM), mapper.available(DRAM), mapper.available(STORAGE)) == (7, 198, None)


def test_pinned_accesses() -> None:
    mapper = reference()
    before = mapper.priority(0)
    mapper.record_access(0, 0.9)
    mapper.record_access(0, 0.8)
    mapper.record_access(8, 1.0)
    record = mapper.record(0)
    assert (record.count, record.last_access) == (2, 2)
    assert record.average_weight == pytest.approx(0.161)
    assert mapper.priority(0) > before == 0.0


def test_pins() -> None:
    for compat in (True, False):
        mapper = TierMapper(HardwareConfig(), 4, compat=compat)
        mapper.pin(1)
        mapper.pin(9)
        assert mapper.record(1).pinned
        mapper.record_access(1, 1.0)
        mapper.reset_affinity()
        assert mapper.record(1).pinned is not compat
        assert mapper.priority(1) == 0.0
        mapper.unpin(1)
        assert not mapper.record(1).pinned


@pytest.mark.parametrize("case", GOLDEN, ids=number_of)
def test_golden_sequences(case: dict[str, Any]) -> None:
    n = case["n"]
    mapper = reference(n, case["sram_slots"], case["dram_slots"])
    for op, e, value, ok in case["ops"]:
        if op == "assign":
            assert mapper.assign_tier(e, MemoryTier(value)) is bool(ok)
        elif op == "access":
            mapper.record_access(e, value)
        else:
            (mapper.pin if op == "pin" else mapper.unpin)(e)
    assert mapper.tiers.tolist() == case["tiers"]
    assert [mapper.used(SRAM), mapper.used(DRAM)] == case["used"]
    assert [mapper.available(SRAM), mapper.available(DRAM)] == case["available"]
    assert mapper.priorities().tolist() == pytest.approx(case["priority"], rel=3e-7)
    assert [mapper.estimate_paging_latency(e) for e in range(n)] == case["latency"]
    assert [[e, int(tier)] for e, tier in mapper.suggest_tier_changes()] == case["suggest"]


def test_golden_sequences_are_all_there() -> None:
    assert len(GOLDEN) == 20


def mapper_in_bytes(
    n: int = 4,
    sram: int = 100,
    dram: int = 200,
    each: int = 100,
    **options: Any,  # noqa: ANN401
) -> TierMapper:
    return TierMapper(HardwareConfig(sram_bytes=sram, dram_bytes=dram, expert_bytes=each), n, **options)


def use(mapper: TierMapper, *experts: int) -> None:
    for e in experts:
        mapper.record_access(e, 0.5)


def test_bytes_are_enforced() -> None:
    mapper = mapper_in_bytes()
    assert mapper.assign_tier(0, SRAM)
    assert not mapper.assign_tier(1, SRAM)
    assert mapper.get_tier(1) is STORAGE
    assert mapper.assign_tier(0, SRAM)
    assert mapper.apply([(0, DRAM), (1, SRAM)])
    assert not mapper.apply([(2, DRAM), (3, DRAM)])
    assert mapper.tiers.tolist() == [DRAM, SRAM, STORAGE, STORAGE]


def test_a_hot_expert_displaces_a_cold_one() -> None:
    mapper = mapper_in_bytes()
    use(mapper, 0, 1, 1, 2, 2, 2)
    assert mapper.suggest_tier_changes() == [(2, SRAM), (1, DRAM), (0, DRAM)]
    assert mapper.apply(mapper.suggest_tier_changes())
    assert mapper.suggest_tier_changes() == []
    use(mapper, *[3] * 9)
    assert mapper.suggest_tier_changes() == [(2, DRAM), (0, STORAGE), (3, SRAM)]
    assert mapper.apply(mapper.suggest_tier_changes())
    assert mapper.used(SRAM) == 100
    assert mapper.used(DRAM) == 200


def test_hysteresis_and_pins_keep_what_is_there() -> None:
    mapper = mapper_in_bytes(n=2, dram=0, hysteresis=0.5)
    use(mapper, 0, 0, 0)
    mapper.apply(mapper.suggest_tier_changes())
    use(mapper, *[1] * 5)
    assert mapper.priority(1) > mapper.priority(0)
    assert mapper.suggest_tier_changes() == []
    use(mapper, *[1] * 30)
    assert mapper.suggest_tier_changes() == [(0, STORAGE), (1, SRAM)]
    mapper.pin(0)
    assert mapper.suggest_tier_changes() == []


def test_recency_fades_with_the_clock() -> None:
    mapper = mapper_in_bytes(tau=10.0)
    use(mapper, 0)
    fresh = mapper.priority(0)
    use(mapper, *[1] * 20)
    assert fresh - mapper.priority(0) == pytest.approx(1 - np.exp(-2), rel=1e-5)


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    sram=st.integers(0, 120),
    dram=st.integers(0, 200),
    events=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 4)), max_size=60),
)
def test_no_tier_ever_holds_more_bytes_than_it_has(
    sizes: list[int], sram: int, dram: int, events: list[tuple[int, int]]
) -> None:
    """Also: what is suggested can be applied, and nothing more is suggested after."""
    mapper = mapper_in_bytes(len(sizes), sram, dram, expert_bytes=sizes)
    for e, what in events:
        if what == 0:
            changes = mapper.suggest_tier_changes()
            assert mapper.apply(changes)
        elif what == 1:
            mapper.assign_tier(e, MemoryTier(e % 3))
        elif what == 2:
            (mapper.pin if e % 2 else mapper.unpin)(e % len(sizes))
        else:
            use(mapper, e % len(sizes))
        for tier, capacity in ((SRAM, sram), (DRAM, dram)):
            assert sum(size for size, t in zip(sizes, mapper.tiers, strict=True) if t == tier) <= capacity


def test_wrong_arguments_are_refused() -> None:
    for options in ({"tau": 0.0}, {"hysteresis": -1.0}, {"expert_bytes": [1, 2]}, {"expert_bytes": -1}):
        with pytest.raises(ConfigError):
            mapper_in_bytes(**options)
