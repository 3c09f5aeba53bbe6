"""A model in several files answers as the same model in one, while experts are read from all of them."""

from __future__ import annotations

from pathlib import Path

from . import gguf_copy as gc
from .conftest import Serve
from .daemon_process import Daemon
from .requests import essence, run_alone, sampled

SHARDS = 3
REQUESTS = [sampled(number, max_tokens=16) for number in range(2)]


def test_three_files_answer_as_one(serve: Serve, shared: Daemon, tmp_path: Path) -> None:
    """A quarter of the experts have a slot, so that they are paged; the second file is the one named."""
    gc.copy_model(tmp_path / "model.gguf", shards=SHARDS)
    path = gc.shard_path(tmp_path / "model.gguf", 2, SHARDS)
    expected = [essence(result) for result in run_alone(shared.url, REQUESTS)]
    daemon = serve(str(path), "--workers", "2", "--resident-experts", "25%")
    assert [essence(result) for result in run_alone(daemon.url, REQUESTS)] == expected
    experts = daemon.status()["experts"]
    assert experts["slots"] == 20
    assert experts["fetched"] > 80  # every expert, and many again
