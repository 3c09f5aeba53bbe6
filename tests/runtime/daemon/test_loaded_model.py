"""The model as the daemon holds it: context, arenas, records."""

from __future__ import annotations

from pathlib import Path

import pytest

from sterna.runtime.config import Config
from sterna.runtime.daemon.loaded_model import LoadedModel
from sterna.shm.errors import ConfigError

from ...system import gguf_copy as gc


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ctx_size is 513; .*tales-small.gguf was made for 512 tokens"):
        LoadedModel(Config(ctx_size=513))


def test_the_default_context_is_the_model_s() -> None:
    model = LoadedModel(Config())
    try:
        assert model.context == 512
    finally:
        model.close()


def test_whichever_part_is_named_the_first_file_is_the_same(tmp_path: Path) -> None:
    """Checksums are kept by it."""
    gc.copy_model(tmp_path / "m.gguf", shards=2)
    for number in (1, 2):
        model = LoadedModel(Config(model=gc.shard_path(tmp_path / "m.gguf", number, 2)))
        model.close()
        assert model.paths == [str(gc.shard_path(tmp_path / "m.gguf", each, 2)) for each in (1, 2)]


def test_arenas_are_given_back() -> None:
    model = LoadedModel(Config(ctx_size=64, max_num_seqs=2))
    model.allocate()
    assert set(model.scheduler_fds) == {"weights", "dense", "streams"}
    assert model.memory_bytes["kv"] == 2 * 64 * 6 * 160 * 2  # streams, positions, layers, width, float16
    model.put_prompt(1, 9, [5, 6, 7])
    model.commit(1, 3, 8)
    record = model.streams.records[1]
    assert (record["computed"], record["committed"], record["serial"]) == (3, 4, 9)
    assert model.streams.tokens[1, :4].tolist() == [5, 6, 7, 8]
    model.close()
    assert model.scheduler_fds == {}
