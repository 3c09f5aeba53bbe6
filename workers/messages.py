"""What scheduler and workers say to each other. Bulk arrays travel after the message, in one frame.

    scheduler -> worker   configure, compute (+ activations, routing), page_in
    worker -> scheduler   hello, outputs (+ rows), paged, trouble

Both ends are processes of one daemon; the structures are still validated on arrival.
"""

from __future__ import annotations

import msgspec


class LaneMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all: the tag is the class name."""


class Hello(LaneMessage, frozen=True, kw_only=True):
    """A worker is there. `incarnation` is the number of its start, see `WorkerSpec`."""

    index: int
    incarnation: int
    pid: int


class LayerShape(msgspec.Struct, frozen=True, kw_only=True):
    """The experts of one layer, in each precision that they may be held in; the first is the file's own."""

    d_model: int
    d_ff: int
    precisions: list[list[tuple[int, int, int, int]]]
    """For each, gate, up, down as (format, rows, columns, byte offset in the slot); then, if the experts have
    them, the biases of these as (F32, length, 1, byte offset)."""
    activation: int = 0
    """See `workers.activation`."""


class Configure(LaneMessage, frozen=True, kw_only=True):
    """What a worker has to know before anything else: the shape of each layer's experts."""

    layers: dict[int, LayerShape]


class Compute(LaneMessage, frozen=True, kw_only=True):
    """Run experts over token rows.

    Arrays follow: the rows, then the routing rows, int32: for each pair the row of its token.
    """

    seq: int
    layer: int
    precision: int
    """Which of the layer's, that of all these experts."""
    activation_kind: int
    """0: float32 rows follow; else the block of the int8 rows that follow (q, scales, sums)."""
    tokens: int
    """Number of rows."""
    experts: list[int]
    """Their ids in the layer."""
    slots: list[int]
    """Where each of them lies."""
    starts: list[int]
    """The pairs of expert i are routing rows starts[i]:starts[i + 1]."""


class Outputs(LaneMessage, frozen=True, kw_only=True):
    """Answer to `compute`: one frame follows, float32 (pairs, d_model), in the order of the pairs."""

    seq: int
    busy_ns: int


class FileSlab(msgspec.Struct, frozen=True, array_like=True):
    """A part of one of the model's files: one matrix or bias of one expert."""

    offset: int
    """The first byte in the file."""
    nbytes: int
    type_id: int
    """Of the tensor, as GGUF numbers it."""
    tensor: str
    """Its name, for errors."""
    file: int = 0
    """Which file of a split model."""


class ExpertPage(msgspec.Struct, frozen=True, array_like=True):
    """One expert, the slot and precision it goes to, and where in the file the parts lie."""

    layer: int
    expert: int
    slot: int
    precision: int
    slabs: list[FileSlab]
    """In the order of the layer's `precisions`: gate, up, down, then their biases if there are any."""


class PageIn(LaneMessage, frozen=True, kw_only=True):
    """Read an expert into its slot while others are computed; answered by `paged` or `trouble`."""

    seq: int
    page: ExpertPage
    urgent: bool = True
    """Somebody waits for it; what is not urgent is read when nothing else is."""


class Paged(LaneMessage, frozen=True, kw_only=True):
    """The expert is complete."""

    seq: int
    nbytes: int
    """Bytes read; 0 when the slot held the expert already, or an earlier request had it read."""
    read_ns: int
    """Time that threads spent on reading them."""
    busy_ns: int
    """Time from request to answer."""


class Trouble(LaneMessage, frozen=True, kw_only=True):
    """The request `seq` could not be carried out; `code` and `text` are those of a SternaError."""

    seq: int
    code: str
    text: str


ToWorker = Configure | Compute | PageIn
ToScheduler = Hello | Outputs | Paged | Trouble

encode = msgspec.msgpack.Encoder().encode
decode_for_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_for_scheduler = msgspec.msgpack.Decoder(ToScheduler).decode
