"""Trace files: what is written is read again, and what is broken is named by line and column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sterna.scheduler.residency.replay import trace as traces
from sterna.scheduler.residency.replay.trace import DECODE, PREFILL, Routes, read_trace
from sterna.scheduler.residency.replay.writer import RoutedEvent, TraceHead, TraceWriter
from sterna.shm.errors import ModelFileError, ModelNotFound

SAMPLE = Path(__file__).parents[3] / "data/route-sample.csv"
HEAD = TraceHead(model="a b\nc", architecture="x", num_experts=8, top_k=2, expert_bytes=[0, 100, 70])
HEADER = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"


def routes(tokens: int) -> Routes:
    rng = np.random.default_rng(tokens)
    others = rng.integers(0, 8, (tokens, 2)).astype(np.int32)
    others[0, 1] = -1
    return Routes(
        scores=rng.random((tokens, 2), dtype=np.float32),
        others=others,
        other_scores=rng.random((tokens, 2), dtype=np.float32),
        spread=rng.random(tokens, dtype=np.float32),
    )


def events() -> list[RoutedEvent]:
    found = []
    for step, layer, tokens in ((0, 1, 3), (0, 2, 3), (1, 1, 1), (1, 2, 1), (2, 1, 2), (2, 2, 2)):
        experts = np.array([[(step + t) % 8, (layer + 3 * t + 4) % 8] for t in range(tokens)], dtype=np.int32)
        resident = np.zeros(8, dtype=np.uint8)
        resident[5] = 1
        found.append(
            RoutedEvent(
                step=step,
                layer=layer,
                prefill=step == 0,
                turns=list(range(tokens)),
                experts=experts,
                weights=np.full((tokens, 2), 0.5, dtype=np.float32),
                resident=resident,
                runner_ups=routes(tokens),
            )
        )
    return found


@pytest.mark.parametrize("runner_ups", [False, True])
def test_what_is_written_is_read(tmp_path: Path, runner_ups: bool) -> None:
    path = tmp_path / "a.csv"
    with TraceWriter(path, HEAD, runner_ups=runner_ups) as writer:
        for event in events():
            writer.add(event)
    assert writer.stopped is None
    read = read_trace(path)
    assert (read.num_layers, read.experts_per_layer, read.top_k) == (3, 8, 2)
    assert read.expert_bytes.tolist() == [0, 100, 70]
    assert (read.num_tokens, read.num_events, read.total_bytes, read.cycle_bytes) == (6, 6, 1360, 340)
    assert read.layers.tolist() == [1, 2] * 3
    assert read.phases.tolist() == [PREFILL] * 2 + [DECODE] * 4
    assert np.diff(read.rows).tolist() == [3, 3, 1, 1, 2, 2]
    assert (read.experts == np.concatenate([event.experts for event in events()])).all()
    assert (read.weights == 0.5).all()
    assert read.logical.tolist() == [6, 6, 2, 2, 4, 4]
    starts, keys, tokens = read.uses()
    first = slice(starts[0], starts[1])
    assert keys[first].tolist() == [8, 9, 10, 13, 8 + 3][:0] + sorted({8, 9, 10, 13, 8 + 3})
    assert tokens[first].tolist() == [2.0, 1.0, 1.0, 1.0, 1.0]
    if not runner_ups:
        assert read.runner_ups is None
        return
    assert read.runner_ups is not None
    written = [event.runner_ups for event in events()]
    for name in ("scores", "others", "spread"):
        expected = np.concatenate([getattr(each, name) for each in written])
        assert getattr(read.runner_ups, name) == pytest.approx(expected, rel=1e-6)


def test_a_miss_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with TraceWriter(path, HEAD) as writer:
        writer.add(events()[0])
    rows = [line.split(",") for line in path.read_text().splitlines() if line[0].isdigit()]
    assert [(int(row[5]), int(row[7]), int(row[8])) for row in rows] == [
        (0, 0, 100),
        (5, 1, 0),
        (1, 0, 100),
        (0, 0, 0),
        (2, 0, 100),
        (3, 0, 100),
    ]


def test_writer_stops_at_its_limit_and_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with TraceWriter(path, HEAD, max_bytes=400) as writer:
        for event in events() * 10:
            writer.add(event)
    assert writer.stopped == "the trace reached its limit of 400 bytes"
    assert path.stat().st_size <= 400
    assert read_trace(path).num_events >= 1
    with pytest.raises(FileExistsError):
        TraceWriter(path, HEAD)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_medium_does_not_stop_the_scheduler(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "a.csv", HEAD)
    writer._file.close()
    writer._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115, PTH123 - the writer closes it
    writer.add(events()[0])
    writer.close()
    assert writer.stopped is not None
    assert "No space left" in writer.stopped


def test_sample() -> None:
    read = read_trace(SAMPLE)
    assert (read.num_layers, read.experts_per_layer, read.top_k, read.num_tokens) == (2, 128, 6, 58)
    assert np.diff(read.rows).tolist() == [28, 28] + [1] * 60


ROW = "0,1,5,0,0,3,0.5,0,100\n"


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        ("", ":1:1:", "expected a header line"),
        ("# x\n" + HEADER, ":2:1:", "without a row"),
        ("turn,phase\n", ":1:1:", "expected one column step"),
        (HEADER + "0,1,5,0,0,3,0.5,0\n", ":2:1:", "expected 9 fields, found 8"),
        (HEADER + ROW + "0,1,5,0,1,x,0.5,0,100\n", ":3:6:", "expert is 'x', not a number"),
        (HEADER + "0,1,5,0,0,-3,0.5,0,100\n", ":2:6:", "expert is -3"),
        (HEADER + "0,1,5,0,0,1.5,0.5,0,100\n", ":2:6:", "expert is 1.5"),
        (HEADER + ROW + "0,2,5,0,1,3,0.5,0,100\n", ":3:2:", "phase is 2"),
        (HEADER + "0,1,5,0,0,3,nan,0,100\n", ":2:7:", "weight is nan"),
        (HEADER + "0,1,5,9999,0,3,0.5,0,100\n", ":2:4:", "layer is 9999 (below 1024)"),
        ("# n_layer=2 n_expert=3\n" + HEADER + ROW, ":3:6:", "expert is 3 (below 3)"),
        (HEADER + "0,1,5,0,1,3,0.5,0,100\n", ":2:5:", "slot is 1 after another token"),
        (HEADER + ROW + "0,1,5,1,1,3,0.5,0,100\n", ":3:5:", "slot is 1 after another token"),
        (HEADER + ROW + "0,1,5,0,64,3,0.5,0,100\n", ":3:5:", "slot is 64 (below 64)"),
        (HEADER + ROW + "0,1,5,0,1,\xff,0.5,0,100\n", ":3:11:", "not ASCII"),
        (HEADER + "0" * 70_000 + "\n", ":2:65536:", "longer than 65536 bytes"),
        (HEADER + ROW.replace("100", "0"), ".csv:", "how many bytes an expert of layer 0 has"),
        (HEADER + ROW.replace("100", "1e300"), ":2:9:", "expert_bytes is 1e+300"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, where: str, problem: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ModelFileError) as caught:
        read_trace(path)
    assert where in str(caught.value)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_many_rows_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER + ROW * 300)
    monkeypatch.setattr(traces, "ROWS_AT_ONCE", 64)
    assert read_trace(path).rows[-1] == 300
    monkeypatch.setattr(traces, "MAX_ROWS", 299)
    with pytest.raises(ModelFileError, match=":301:1: more than 299 rows"):
        read_trace(path)
    with pytest.raises(ModelNotFound):
        read_trace(tmp_path / "b.csv")
