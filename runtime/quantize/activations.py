"""How much each column of a model's matrices matters: mean squares of what a text multiplies them with.

The text runs through the model in this process, exactly and with every step that serving takes; matrices
and workers show what they read. In here: running and summing. Not in here: quantising with the result
(`convert.py`), storing it (`imatrix.py`). Imports numba.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from ...scheduler.assembly import EngineArenas, EngineSettings, assemble
from ...scheduler.decoder.observing import DenseObserver
from ...scheduler.lane.local import LocalLane, local_workers
from ...scheduler.messages import Sampling, Submit
from ...scheduler.model.plan import ModelPlan
from ...scheduler.model.planner import read_plan
from ...scheduler.state import Segment, Work
from ...shm.errors import OutOfResources, UsageError
from ...shm.slots import SlotClasses, SlotTable
from ...workers.checkpoint.file import names
from ...workers.checkpoint.file.gguf import GgufFile
from ...workers.messages import Configure
from ...workers.observing import ObservingWorker
from ..memory.room import read_room
from ..sizes import format_size
from .imatrix import ColumnSums

Progress = Callable[[str, int, int], None]
Floats = npt.NDArray[np.float32]

WINDOW: Final = 512  # tokens that see each other; the model's context if that is less
_EXPERTS_SHARE: Final = 0.6  # of the memory that the rest leaves
_GREEDY: Final = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def measure(file: GgufFile, token_ids: list[int], progress: Progress) -> ColumnSums:
    """Run `token_ids` through the model in windows; return the sums for every matrix that is multiplied.

    `progress(what, done, total)` in tokens. Experts that have no room are read as they are needed. Raises
    ModelFileError for a model that cannot be run, UsageError for fewer than two tokens, OutOfResources if the
    free memory does not hold the dense weights and the experts of a token.
    """
    if len(token_ids) < 2:
        raise UsageError("--calibrate: expected a text of at least two tokens, found fewer")
    model = _Model(file)
    try:
        for start in range(0, len(token_ids), model.window):
            model.run(token_ids[start : start + model.window])
            progress("calibrating", min(start + model.window, len(token_ids)), len(token_ids))
    finally:
        model.close()
    return model.sums


class _Model:
    """The engine over arenas of its own, with one worker and one stream."""

    def __init__(self, file: GgufFile) -> None:
        self.sums = ColumnSums()
        self._plan = plan = read_plan(file)
        self._file = file
        self.window = min(WINDOW, plan.hyper.context_length)
        settings = EngineSettings(classes=(), streams=1, context=self.window, max_batch_tokens=self.window)
        fixed = plan.dense_arena_nbytes + settings.stream_shape(plan).layout().nbytes
        settings = replace(settings, classes=_classes(file, plan, fixed))
        arenas = EngineArenas.private(plan, settings)
        workers = local_workers(
            lambda slots: ObservingWorker(slots, file.fds, self._see_expert),
            SlotTable(arenas.weights, settings.classes),
            Configure(layers=plan.layer_shapes()),
            settings.workers,
        )
        made = assemble(
            plan, file, arenas, LocalLane(workers), settings, observer=DenseObserver(self._see_dense)
        )
        self._streams, self._crew, self._engine = made.streams, made.crew, made.engine
        self._streams.tables[0] = np.arange(self._streams.shape.num_blocks)
        self._serial = 0

    def run(self, token_ids: list[int]) -> None:
        """Compute a window of its own."""
        count = len(token_ids)
        self._streams.tokens[0, :count] = token_ids
        self._serial += 1
        request = Submit(
            stream=0,
            serial=self._serial,
            prompt_length=count,
            committed=count,
            computed=0,
            max_length=count,
            sampling=_GREEDY,
            stop_ids=[],
            logprobs=None,
            prompt_logprobs=False,
            lossy_from=count,
        )
        self._engine.admit(request)
        segment = Segment(stream=0, serial=self._serial, start=0, count=count, sample=False)
        self._engine.step([Work(segment=segment, request=request)])

    def close(self) -> None:
        self._crew.close()

    def _see_dense(self, key: str, rows: Floats) -> None:
        info = self._plan.dense[key].tensor
        heads = len(info.shape) == 3 and info.shape[0] == len(rows)
        for head, of_head in enumerate(rows):
            if of_head.shape[-1] == info.shape[-1]:  # not of a tensor that is cut into parts
                self.sums.add(info.name, of_head, head if heads else 0, len(rows) if heads else 1)

    def _see_expert(self, layer: int, expert: int, x: Floats, middle: Floats) -> None:
        for role, rows in (("ffn_gate_exps", x), ("ffn_up_exps", x), ("ffn_down_exps", middle)):
            stacked = names.find(self._file, role, layer)
            if stacked is None and role != "ffn_down_exps":
                stacked = names.find(self._file, "ffn_gate_up_exps", layer)
                if stacked is not None and role == "ffn_up_exps":
                    continue  # both halves read the same
            alone = stacked or names.find(self._file, role, layer, expert)
            if alone is not None:
                part = (expert, self._plan.hyper.experts) if stacked else (0, 1)
                self.sums.add(alone.name, rows, *part)


def _classes(file: GgufFile, plan: ModelPlan, fixed: int) -> SlotClasses:
    """Return slots for all experts, or for as many of each size as fit next to `fixed` bytes.

    Raises OutOfResources if it does not hold the fewest that the model can be run with.
    """
    whole = plan.all_slots()
    fewest = [min(count, 2 * plan.hyper.experts_used + 2) for count, _ in whole]
    least = fixed + sum(count * nbytes for count, (_, nbytes) in zip(fewest, whole, strict=True))
    usable = read_room().usable
    if least > usable:
        raise OutOfResources(
            f"{file.label}: --calibrate runs the model in {format_size(least)} or more,"
            f" and {format_size(usable)} can be had; --imatrix takes what was measured elsewhere"
        )
    needed = sum(count * nbytes for count, nbytes in whole)
    share = min(1.0, _EXPERTS_SHARE * (usable - fixed) / max(1, needed))
    return [
        (max(least_count, int(count * share)), nbytes)
        for least_count, (count, nbytes) in zip(fewest, whole, strict=True)
    ]
