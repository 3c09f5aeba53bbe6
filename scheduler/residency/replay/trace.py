"""Routing traces: which experts each token used in each layer, as a CSV file.

The columns are those of BigMoeOnEdge's `route_trace v1`: turn, phase (0 prefill, 1 decode), step, layer,
slot (rank of the expert in the token's selection), expert, weight, residency, expert_bytes (read for this
row). Four more are optional: score (of the row's expert in the router's selection space), runner_up and
runner_up_score (the expert of rank k + slot and its score; -1 for none) and spread (largest minus smallest
score of the token).
Comment lines before the header name the model and, per layer, the bytes of an expert.

An event is what one layer needs at once: consecutive rows of one layer and step, or of one layer in prefill,
where step counts tokens. A row of slot 0 begins a token.

Not in here: what a policy makes of a trace (`simulate.py`); writing one (`writer.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ....shm.errors import ModelFileError, ModelNotFound, ModelReadError

COLUMNS: Final = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency", "expert_bytes")
RUNNER_UP_COLUMNS: Final = ("score", "runner_up", "runner_up_score", "spread")
PREFILL, DECODE = 0, 1

MAX_ROWS = 5_000_000
ROWS_AT_ONCE = 1 << 16
MAX_LINE = 65_536
MAX_LAYERS, MAX_EXPERTS, MAX_TOP_K = 1024, 4096, 64
MAX_EXPERT_BYTES = 2**40

_LAYER_LINE = re.compile(r"# layer=(\d{1,6}) expert_bytes=(\d{1,15})\b")
_MODEL_FIELD = re.compile(r"\b(n_layer|n_expert|n_expert_used)=(\d{1,6})\b")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """A trace in the order of the file; ranks that a token does not have are expert -1."""

    experts_per_layer: int
    expert_bytes: NDArray[np.int64]  # (layers,)
    rows: NDArray[np.int64]  # (events + 1,) first token of each event
    layers: NDArray[np.int32]  # (events,)
    phases: NDArray[np.uint8]  # (events,) DECODE if all of its tokens decode
    experts: NDArray[np.int32]  # (tokens, k) best first
    weights: NDArray[np.float32]  # (tokens, k)
    runner_ups: Routes | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the model, also those without a row."""
        return len(self.expert_bytes)

    @property
    def num_events(self) -> int:
        """Layers times steps that were recorded."""
        return len(self.layers)

    @property
    def top_k(self) -> int:
        """The most experts that a token uses."""
        return int(self.experts.shape[1])

    @property
    def logical(self) -> NDArray[np.int64]:
        """Experts used per event, each token's counted, int64 (events,)."""
        per_token = (self.experts >= 0).sum(axis=1)
        return np.add.reduceat(per_token, self.rows[:-1]).astype(np.int64)

    @property
    def num_tokens(self) -> int:
        """Passes through the layers: tokens in the layer that saw most."""
        per_layer = np.zeros(self.num_layers, dtype=np.int64)
        np.add.at(per_layer, self.layers, np.diff(self.rows))
        return int(per_layer.max())

    @property
    def total_bytes(self) -> int:
        """Bytes of all routed experts."""
        return int(self.expert_bytes.sum()) * self.experts_per_layer

    @property
    def cycle_bytes(self) -> int:
        """Bytes of what one token uses in all layers."""
        return int(self.expert_bytes.sum()) * self.top_k

    def uses(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """Return the distinct keys of each event and by how many of its tokens they are used.

        That is (starts (events + 1,), keys (n,), tokens (n,)); key = layer * experts + expert, ascending.
        """
        events = np.repeat(np.arange(self.num_events), np.diff(self.rows))
        base = events * self.experts_per_layer
        used = self.experts >= 0
        pairs, counts = np.unique((self.experts + base[:, None])[used], return_counts=True)
        event, expert = np.divmod(pairs, self.experts_per_layer)
        starts = np.searchsorted(event, np.arange(self.num_events + 1)).astype(np.int64)
        keys = self.layers[event] * self.experts_per_layer + expert
        return starts, keys.astype(np.int32), counts.astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routes:
    """The scores behind a trace: ranks 0..k-1, the runner-ups of ranks k..2k-1 (-1 for none), the spread."""

    scores: NDArray[np.float32]  # (tokens, k)
    others: NDArray[np.int32]  # (tokens, k)
    other_scores: NDArray[np.float32]  # (tokens, k)
    spread: NDArray[np.float32]  # (tokens,)


def read_trace(path: Path) -> Trace:
    """Read a trace file.

    Raises ModelNotFound or ModelReadError if it cannot be read, ModelFileError with file:line:column if a
    line is not what the module says or a limit is passed.
    """
    try:
        with path.open("rb") as file:
            return _Reader(str(path)).read(iter(lambda: file.readline(MAX_LINE + 1), b""))
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: no such trace file") from None
    except OSError as error:
        raise ModelReadError(f"{path}: {error.strerror}") from error


class _Reader:
    """Turns lines into a trace."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._line = 0
        self._fields: dict[str, int] = {}
        self._bytes: dict[int, int] = {}
        self._columns: list[str] = []

    def read(self, lines: Iterator[bytes]) -> Trace:
        """Return the trace in `lines`."""
        self._read_head(lines)
        have_scores = all(name in self._columns for name in RUNNER_UP_COLUMNS)
        wanted = [*COLUMNS, *(RUNNER_UP_COLUMNS if have_scores else ())]
        order = [self._columns.index(name) for name in wanted]
        found: list[list[float]] = []
        blocks: list[NDArray[np.float64]] = []
        first_line = self._line + 1
        for raw in lines:
            self._line += 1
            if self._line - first_line >= MAX_ROWS:
                raise self._error(1, f"more than {MAX_ROWS} rows")
            if len(found) == ROWS_AT_ONCE:
                blocks.append(np.array(found))
                found = []
            cells = self._text(raw).split(",")
            if len(cells) != len(self._columns):
                raise self._error(1, f"expected {len(self._columns)} fields, found {len(cells)}")
            try:
                found.append([float(cells[i]) for i in order])
            except ValueError:
                raise self._bad_cell(cells, order) from None
        if not found:
            raise self._error(1, "a trace without a row")
        return self._trace(np.concatenate([*blocks, np.array(found)]), first_line)

    def _read_head(self, lines: Iterator[bytes]) -> None:
        for raw in lines:
            self._line += 1
            text = self._text(raw)
            if not text.startswith("#"):
                self._columns = text.split(",")
                for name in COLUMNS:
                    if self._columns.count(name) != 1:
                        raise self._error(1, f"expected one column {name}, found {text[:80]!r}")
                return
            if layer := _LAYER_LINE.match(text):
                self._bytes[int(layer[1])] = int(layer[2])
            self._fields |= {name: int(value) for name, value in _MODEL_FIELD.findall(text)}
        raise self._error(1, "expected a header line of column names")

    def _text(self, raw: bytes) -> str:
        if len(raw) > MAX_LINE:
            raise self._error(MAX_LINE, f"a line longer than {MAX_LINE} bytes")
        try:
            return raw.decode("ascii").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise self._error(error.start + 1, "not ASCII text") from None

    def _trace(self, values: NDArray[np.float64], first_line: int) -> Trace:
        self._check(values, first_line)
        _, phase, step, layer, slot, expert = (values[:, i].astype(np.int64) for i in range(6))
        begins = np.flatnonzero(slot == 0)
        token = np.cumsum(slot == 0) - 1
        sort = np.where(phase == DECODE, step + 1, 0)[begins]
        new = np.flatnonzero((np.diff(sort) != 0) | (np.diff(layer[begins]) != 0)) + 1
        rows = np.concatenate(([0], new, [len(begins)])).astype(np.int64)
        top_k = max(int(slot.max()) + 1, min(self._fields.get("n_expert_used", 0), MAX_TOP_K))

        def by_rank(column: int, dtype: type[np.generic], fill: float) -> NDArray[Any]:
            out = np.full((len(begins), top_k), fill, dtype=dtype)
            out[token, slot] = values[:, column]
            return out

        runner_ups = None
        if values.shape[1] > len(COLUMNS):
            runner_ups = Routes(
                scores=by_rank(9, np.float32, -np.inf),
                others=by_rank(10, np.int32, -1),
                other_scores=by_rank(11, np.float32, -np.inf),
                spread=values[begins, 12].astype(np.float32),
            )
        return Trace(
            experts_per_layer=self._fields.get("n_expert", int(expert.max()) + 1),
            expert_bytes=self._expert_bytes(values, layer),
            rows=rows,
            layers=layer[begins[rows[:-1]]].astype(np.int32),
            phases=phase[begins[rows[:-1]]].astype(np.uint8),
            experts=by_rank(5, np.int32, -1),
            weights=by_rank(6, np.float32, 0.0),
            runner_ups=runner_ups,
        )

    def _check(self, values: NDArray[np.float64], first_line: int) -> None:
        """Refuse rows that are no trace: a value out of range, or ranks that do not follow one another."""
        layers = min(self._fields.get("n_layer", MAX_LAYERS), MAX_LAYERS)
        experts = min(self._fields.get("n_expert", MAX_EXPERTS), MAX_EXPERTS)
        limits = {
            "turn": 2**31, "phase": 2, "step": 2**31, "layer": layers, "slot": MAX_TOP_K, "expert": experts,
            "residency": 2, "expert_bytes": MAX_EXPERT_BYTES,
        }  # fmt: skip
        names = [*COLUMNS, *RUNNER_UP_COLUMNS][: values.shape[1]]
        for i, name in enumerate(names):
            column = values[:, i]
            good = np.isfinite(column)
            if name in limits:
                good &= (column >= 0) & (column < limits[name]) & (column == np.floor(column))
            elif name == "runner_up":
                good &= (column >= -1) & (column < experts) & (column == np.floor(column))
            elif name == "runner_up_score":
                good |= values[:, i - 1] < 0
            if not good.all():
                row = int(np.argmin(good))
                self._line = first_line + row
                limit = f" (below {limits[name]})" if name in limits else ""
                raise self._error(self._columns.index(name) + 1, f"{name} is {column[row]:g}{limit}")
        slot = values[:, 4]
        follows = np.concatenate(([slot[0] == 0], (slot[1:] == 0) | (slot[1:] == slot[:-1] + 1)))
        same = (values[1:, 1:4] == values[:-1, 1:4]).all(axis=1)
        follows[1:] &= (slot[1:] == 0) | same
        if not follows.all():
            row = int(np.argmin(follows))
            self._line = first_line + row
            raise self._error(self._columns.index("slot") + 1, f"slot is {slot[row]:g} after another token")

    def _expert_bytes(self, values: NDArray[np.float64], layer: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return each layer's bytes of an expert: as the head says, or the most that a row has read."""
        layers = max(self._fields.get("n_layer", 0), int(layer.max()) + 1)
        read = np.zeros(layers, dtype=np.int64)
        np.maximum.at(read, layer, values[:, 8].astype(np.int64))
        for each, size in self._bytes.items():
            if each < layers and size < MAX_EXPERT_BYTES:
                read[each] = size
        if not read[np.unique(layer)].all():
            missing = int(np.unique(layer)[np.argmin(read[np.unique(layer)])])
            raise ModelFileError(
                f"{self._name}: nothing says how many bytes an expert of layer {missing} has"
            )
        return read

    def _bad_cell(self, cells: list[str], order: list[int]) -> ModelFileError:
        for i in order:
            try:
                float(cells[i])
            except ValueError:
                return self._error(i + 1, f"{self._columns[i]} is {cells[i][:40]!r}, not a number")
        return self._error(1, "not a row of numbers")

    def _error(self, column: int, text: str) -> ModelFileError:
        """Return an error at field `column` of the current line."""
        return ModelFileError(f"{self._name}:{max(1, self._line)}:{column}: {text}")
