"""Recording of a routing trace, as the scheduler process goes; `trace.py` says what is in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from .trace import COLUMNS, DECODE, PREFILL, RUNNER_UP_COLUMNS, Routes

BUFFERED_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHead:
    """What the first lines of a trace say."""

    model: str
    architecture: str
    num_experts: int
    top_k: int
    expert_bytes: Sequence[int]  # per layer; 0 for a layer without routed experts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedEvent:
    """One MoE layer of one step: what its tokens use and what was resident when it began.

    `prefill` if any of its tokens is of a prompt; those have the step of their chunk.
    """

    step: int
    layer: int
    prefill: bool
    turns: Sequence[int]  # (tokens,) any number that tells requests apart
    experts: NDArray[np.int32]  # (tokens, k) best first, -1 for none
    weights: NDArray[np.float32]  # (tokens, k)
    resident: NDArray[np.uint8]  # (experts,) of this layer
    runner_ups: Routes | None = None


class TraceWriter:
    """Appends events to a new file at `path`; one thread. Close it, or use it as a context.

    Never raises because of the medium: on the first OSError, or at `max_bytes`, it stops and `stopped` says
    why. Creating the file may raise OSError.
    """

    def __init__(
        self, path: Path, head: TraceHead, *, runner_ups: bool = False, max_bytes: int = 1 << 30
    ) -> None:
        self.stopped: str | None = None
        self._runner_ups, self._max_bytes, self._written = runner_ups, max_bytes, 0
        self._expert_bytes = head.expert_bytes
        self._file = path.open("x", encoding="ascii", buffering=BUFFERED_BYTES)
        model = " ".join(head.model.encode("ascii", "replace").decode().split())
        columns = [*COLUMNS, *(RUNNER_UP_COLUMNS if runner_ups else ())]
        self._put(
            "# route_trace v1\n"
            f"# model={model} arch={head.architecture} n_layer={len(head.expert_bytes)} "
            f"n_expert={head.num_experts} n_expert_used={head.top_k}\n"
            + "".join(
                f"# layer={i} expert_bytes={size}\n" for i, size in enumerate(head.expert_bytes) if size
            )
            + f"{','.join(columns)}\n"
        )

    def add(self, event: RoutedEvent) -> None:
        """Append one event; the first row of a missing expert carries the bytes that are read for it."""
        if self.stopped is not None:
            return
        phase = PREFILL if event.prefill else DECODE
        size, missing = self._expert_bytes[event.layer], event.resident == 0
        lines = []
        for row, turn in enumerate(event.turns):
            for slot, expert in enumerate(event.experts[row].tolist()):
                if expert < 0:
                    continue
                read = size if missing[expert] else 0
                here = int(event.resident[expert] != 0)
                missing[expert] = False
                lines.append(
                    f"{turn},{phase},{event.step},{event.layer},{slot},{expert},"
                    f"{event.weights[row, slot]:.6g},{here},{read}{self._scores(event, row, slot)}\n"
                )
        self._put("".join(lines))

    def _scores(self, event: RoutedEvent, row: int, slot: int) -> str:
        if not self._runner_ups:
            return ""
        routes = event.runner_ups
        if routes is None:
            return ",0,-1,0,0"
        other = int(routes.others[row, slot])
        score = routes.other_scores[row, slot] if other >= 0 else 0.0
        return f",{routes.scores[row, slot]:.7g},{other},{score:.7g},{routes.spread[row]:.7g}"

    def _put(self, text: str) -> None:
        if self._written + len(text) > self._max_bytes:
            self.stopped = f"the trace reached its limit of {self._max_bytes} bytes"
            return
        try:
            self._file.write(text)
        except OSError as error:
            self.stopped = f"the trace could not be written: {error.strerror}"
            return
        self._written += len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self._file.flush()
        except OSError as error:
            self.stopped = f"the trace could not be written: {error.strerror}"

    def close(self) -> None:
        """Write what is buffered and close the file; safe to call twice."""
        try:
            self._file.close()
        except OSError as error:
            self.stopped = f"the trace could not be written: {error.strerror}"

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
