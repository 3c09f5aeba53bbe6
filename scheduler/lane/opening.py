"""Which transport serves a scheduler: the only place that knows them all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...shm.slots import SlotTable
from ...workers.checkpoint.file.gguf import GgufFile
from ...workers.messages import Configure
from ...workers.paging.checksums import Checksums
from ...workers.serve import ExpertWorker
from ..model.plan import ModelPlan
from ..spec import SchedulerSpec
from .interface import ServedLane
from .local import LocalLane, local_workers
from .zeromq import ZmqLane


def open_lane(
    spec: SchedulerSpec, plan: ModelPlan, file: GgufFile, weights: npt.NDArray[np.uint8]
) -> ServedLane:
    """Return the lane that `spec` names; "local" makes its workers at once, over the arena `weights`."""
    configure = Configure(layers=plan.layer_shapes())
    if spec.lane == "zmq":
        return ZmqLane(spec.lane_url, configure, plan.hyper.d_model, spec.step_timeout_s)
    # The first file names the checksums, as it does for a worker process.
    checksums = Checksums(spec.cache_dir, spec.model_id, str(file.paths[0]))
    slots = SlotTable(weights, spec.slots)
    workers = local_workers(
        lambda table: ExpertWorker(table, file.fds, checksums), slots, configure, spec.workers
    )
    return LocalLane(workers)
