"""Lane messages and frames of arrays: each survives the wire, and what is none is refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.workers.framing import ALIGNMENT, join, split
from sterna.workers.messages import (
    Compute,
    Configure,
    ExpertPage,
    FileSlab,
    Hello,
    LayerShape,
    Outputs,
    Paged,
    PageIn,
    ToScheduler,
    ToWorker,
    Trouble,
    decode_for_scheduler,
    decode_for_worker,
    encode,
)

SHAPE = LayerShape(
    d_model=256,
    d_ff=512,
    precisions=[[(4, 512, 256, 0), (4, 512, 256, 4096), (3, 256, 512, 8192)], [(5, 512, 256, 0)]],
)
COMPUTE = Compute(
    seq=2**40,
    layer=3,
    precision=1,
    activation_kind=256,
    tokens=5,
    experts=[1, 7],
    slots=[0, 80],
    starts=[0, 2, 9],
)
PAGE = ExpertPage(1, 2, 3, 1, [FileSlab(2**40, 16896, 35, "blk.1.ffn_gate_exps.weight")])
TO_WORKER = (
    Configure(layers={1: SHAPE, 46: SHAPE}),
    COMPUTE,
    PageIn(seq=1, page=PAGE),
    PageIn(seq=1, page=PAGE, urgent=False),
)
TO_SCHEDULER = (
    Hello(index=1, incarnation=2, pid=3),
    Outputs(seq=4, busy_ns=2**50),
    Paged(seq=5, nbytes=2**33, read_ns=2**50, busy_ns=0),
    Trouble(seq=7, code="model_read", text="the model file ends at byte 5, expected 9"),
)


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda message: type(message).__name__)
def test_messages_to_workers_survive(message: ToWorker) -> None:
    assert decode_for_worker(encode(message)) == message


@pytest.mark.parametrize("message", TO_SCHEDULER, ids=lambda message: type(message).__name__)
def test_messages_to_the_scheduler_survive(message: ToScheduler) -> None:
    assert decode_for_scheduler(encode(message)) == message


def test_a_message_for_the_other_side_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_for_scheduler(encode(COMPUTE))
    with pytest.raises(msgspec.ValidationError):
        decode_for_worker(encode(TO_SCHEDULER[0]))


def altered(message: msgspec.Struct, **fields: object) -> bytes:
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(encode(message)), **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "Reboot"},
        {"extra": 1},
        {"layer": "3"},
        {"layer": None},
        {"experts": [1, "7"]},
        {"starts": 9},
        {"tokens": 5.5},
    ],
    ids=str,
)
def test_what_is_misshapen_is_refused(fields: dict[str, object]) -> None:
    assert decode_for_worker(altered(COMPUTE)) == COMPUTE
    with pytest.raises(msgspec.ValidationError):
        decode_for_worker(altered(COMPUTE, **fields))


def test_a_missing_field_is_refused() -> None:
    body = msgspec.msgpack.decode(encode(COMPUTE))
    for name in body:
        less = {key: value for key, value in body.items() if key != name}
        with pytest.raises(msgspec.ValidationError):
            decode_for_worker(msgspec.msgpack.encode(less))


@pytest.mark.parametrize(
    "raw", [b"", b"\xc1", b"\x00", encode(COMPUTE)[:-1], encode(COMPUTE) + b"\x00", b"\xff" * 64]
)
def test_bytes_that_are_no_message_are_refused(raw: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_for_worker(raw)


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        COMPUTE.seq = 1  # type: ignore[misc]


# ---- frames of arrays ----

DTYPES = (np.int8, np.int32, np.float32, np.uint8)
SIZES = st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 40)), max_size=6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SIZES)
def test_arrays_come_out_as_they_went_in(sizes: list[tuple[type, int]]) -> None:
    rng = np.random.default_rng(len(sizes))
    arrays = [rng.integers(-100, 100, (size, 3)).astype(dtype) for dtype, size in sizes]
    frame = join(arrays)
    parts = split(frame)
    assert [bytes(part) for part in parts] == [array.tobytes() for array in arrays]
    start = np.frombuffer(frame, np.uint8).ctypes.data
    for part in parts:
        if len(part):
            assert (np.frombuffer(part, np.uint8).ctypes.data - start) % ALIGNMENT == 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_frame_is_refused_or_stays_inside(data: st.DataObject) -> None:
    whole = join([np.arange(20, dtype=np.int32), np.zeros((3, 5), np.float32), np.ones(7, np.int8)])
    frame = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if frame:
            frame[data.draw(st.integers(0, min(len(frame), 20) - 1))] = data.draw(st.integers(0, 255))
    try:
        parts = split(bytes(frame))
    except ValueError:
        return
    assert sum(len(part) for part in parts) <= len(frame)
    assert len(parts) <= 16


@pytest.mark.parametrize("cut", [0, 3, 4, 15, 16, 40, 95, 96])
def test_a_frame_cut_short_is_refused(cut: int) -> None:
    whole = join([np.arange(20, dtype=np.int32), np.arange(4, dtype=np.int8)])
    assert [len(part) for part in split(whole)] == [80, 4]
    with pytest.raises(ValueError, match=r"frame|array"):
        split(whole[:cut])
