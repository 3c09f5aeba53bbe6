"""Stream memory: the KV cache in blocks, each stream's block table, tokens and committed length.

    kv       uint8, per layer [blocks][block_size][width], float16 or float32: latent and rotated key, or
             keys and values of all heads
    tables   int32 (streams, blocks per stream): which blocks hold positions 0, 1, 2, ...
    tokens   int32 (streams, context): prompt, then answer
    records  one per stream: request key, committed length, prompt length, generation

The daemon owns the memory and alone writes `records` and `tokens`; the scheduler writes `kv` and
`tables`. Whatever lies beyond the committed length is garbage by definition: a step
that was begun by a scheduler that died is simply repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..shm.layout import Field, Layout

RECORD = np.dtype(
    [
        ("active", np.int32),
        ("prompt_length", np.int32),
        ("committed", np.int64),  # tokens known to the daemon: prompt and committed answer
        ("computed", np.int64),  # how many of them have their KV
        ("serial", np.int64),  # which submission the record belongs to
        ("reserved", np.uint8, 32),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamShape:
    """Sizes of the stream memory."""

    layers: int
    width: int
    streams: int
    context: int
    block_size: int = 16
    value_nbytes: int = 2  # float16; 4: float32

    @property
    def blocks_per_stream(self) -> int:
        """Blocks that a stream of full context needs."""
        return -(-self.context // self.block_size)

    @property
    def num_blocks(self) -> int:
        """Blocks in all: enough for every stream at full context, so that none is ever preempted."""
        return self.blocks_per_stream * self.streams

    @property
    def layer_nbytes(self) -> int:
        """Bytes of one layer's cache."""
        return self.num_blocks * self.block_size * self.width * self.value_nbytes

    def layout(self) -> Layout:
        """Return the layout of the arena."""
        return Layout(
            (
                Field(name="records", dtype=RECORD, shape=(self.streams,)),
                Field(name="tables", dtype=np.int32, shape=(self.streams, self.blocks_per_stream)),
                Field(name="tokens", dtype=np.int32, shape=(self.streams, self.context)),
                Field(name="kv", dtype=np.uint8, shape=(self.layers * self.layer_nbytes,)),
            )
        )


class StreamMemory:
    """Arrays over the arena; see the module for who writes what."""

    def __init__(self, shape: StreamShape, memory: npt.NDArray[np.uint8]) -> None:
        layout = shape.layout()
        self.shape = shape
        self.records: npt.NDArray[np.void] = layout.view(memory, "records").view(RECORD)
        self.tables: npt.NDArray[np.int32] = layout.view(memory, "tables").view(np.int32)
        self.tokens: npt.NDArray[np.int32] = layout.view(memory, "tokens").view(np.int32)
        self.kv: npt.NDArray[np.uint8] = layout.view(memory, "kv").view(np.uint8)
        # As kernels take it: see `workers.kernels.layers.kv_values`.
        self.cache = self.kv if shape.value_nbytes == 2 else self.kv.view(np.float32)


class BlockPool:
    """Free blocks of the cache. The lowest free block is taken first: runs repeat exactly."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Number of blocks nobody holds."""
        return len(self._free)

    def held(self, stream: int) -> list[int]:
        """Return the blocks of `stream`, in the order of its positions."""
        return self._held.get(stream, [])

    def grow(self, stream: int, blocks: int) -> list[int]:
        """Give `stream` blocks until it holds `blocks`; return the new ones."""
        held = self._held.setdefault(stream, [])
        new = [self._free.pop() for _ in range(blocks - len(held))]
        held.extend(new)
        return new

    def adopt(self, stream: int, blocks: list[int]) -> None:
        """Take over the blocks that a predecessor gave to `stream`."""
        self._held[stream] = list(blocks)
        taken = set(blocks)
        self._free = [block for block in self._free if block not in taken]

    def release(self, stream: int) -> None:
        """Take all blocks of `stream` back."""
        self._free.extend(self._held.pop(stream, []))
        self._free.sort(reverse=True)
