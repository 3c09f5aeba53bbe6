"""The model as the daemon holds it: context, arenas, records."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from sterna.runtime.config import Config
from sterna.runtime.daemon.model.model_memory import ModelMemory
from sterna.runtime.daemon.model.served_model import ServedModel
from sterna.shm.errors import ConfigError

from ....system import gguf_copy as gc


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ctx_size is 513; .*tales-small.gguf was made for 512 tokens"):
        ServedModel.load(Config(ctx_size=513))


def test_the_default_context_is_the_model_s() -> None:
    model = ServedModel.load(Config())
    try:
        assert model.context == 512
    finally:
        model.close()


def test_whichever_part_is_named_the_first_file_is_the_same(tmp_path: Path) -> None:
    """Checksums are kept by it."""
    gc.copy_model(tmp_path / "m.gguf", shards=2)
    for number in (1, 2):
        model = ServedModel.load(Config(model=gc.shard_path(tmp_path / "m.gguf", number, 2)))
        model.close()
        assert model.paths == tuple(str(gc.shard_path(tmp_path / "m.gguf", each, 2)) for each in (1, 2))


def test_arenas_are_given_back() -> None:
    model = ServedModel.load(Config(ctx_size=64, max_num_seqs=2))
    memory = ModelMemory(model)
    assert set(memory.scheduler_fds) == {"weights", "dense", "streams"}
    assert memory.memory_bytes["kv"] == 2 * 64 * 6 * 160 * 2  # streams, positions, layers, width, float16
    memory.put_prompt(1, 9, [5, 6, 7])
    memory.commit(1, 3, 8)
    record = memory.streams.records[1]
    assert (record["computed"], record["committed"], record["serial"]) == (3, 4, 9)
    assert memory.lengths(1) == (4, 3)
    assert memory.streams.tokens[1, :4].tolist() == [5, 6, 7, 8]
    memory.close()
    model.close()
    assert memory.scheduler_fds == {}


def test_what_is_decided_at_the_start_cannot_be_written_to() -> None:
    model = ServedModel.load(Config(ctx_size=64))
    with pytest.raises(FrozenInstanceError):
        model.decision = model.decision  # type: ignore[misc]
    model.close()


def test_what_is_being_given_back_is_out_of_reach_before_it_is_gone() -> None:
    """And what is to be added counts only when it is there: a scheduler may be started in between."""
    model = ServedModel.load(Config(ternary="2", ctx_size=64, max_num_seqs=2, workers=1, memory="300MiB"))
    memory = ModelMemory(model)
    less = model.plan_resize(memory.decision.total - 20 * 53_248)
    assert memory.begin_resize(less) == [60]
    assert (memory.limits, memory.decision.num_slots) == ([60], 60)
    memory.resized(less)
    assert memory.begin_resize(model.decision) == [80]
    assert (memory.limits, memory.decision.num_slots) == ([60], 60)
    memory.resized(model.decision)
    assert (memory.limits, memory.decision.num_slots) == ([80], 80)
    memory.close()
    model.close()
