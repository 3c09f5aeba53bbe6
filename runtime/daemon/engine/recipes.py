"""What scheduler and workers of one daemon are started with. Starts nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ....scheduler.spec import SchedulerSpec
from ....workers.spec import WorkerSpec
from ....workers.user_cache import user_cache
from ...config import Config
from ...processes.placement import Launch
from ..model.model_memory import ModelMemory
from ..model.served_model import ServedModel
from .restarts import StartMember


class EngineRecipes:
    """Makes the `Launch` of each start; `folder` holds the sockets within the engine."""

    def __init__(
        self, config: Config, model: ServedModel, memory: ModelMemory, folder: Path, control_url: str
    ) -> None:
        self._config = config
        self._model = model
        self._memory = memory
        self._folder = folder
        self._control_url = control_url

    def launch(self, start: StartMember) -> Launch:
        """Return what this start needs, with the memory limits as they are now."""
        worker = start.member.worker
        if worker is None:
            return Launch(
                name=str(start.member),
                entry="sterna.scheduler.process:run",
                spec=msgspec.to_builtins(self._scheduler(start.generation)),
                fds=self._memory.scheduler_fds,
            )
        return Launch(
            name=str(start.member),
            entry="sterna.workers.process:run",
            spec=msgspec.to_builtins(self._worker(worker, start)),
            fds=self._memory.worker_fds,
        )

    def _lane_url(self, generation: int) -> str:
        return f"ipc://{self._folder}/lane-{generation}.sock"

    def _scheduler(self, generation: int) -> SchedulerSpec:
        config, model = self._config, self._model
        return SchedulerSpec(
            generation=generation,
            model_path=str(model.path),
            model_id=model.id,
            control_url=self._control_url,
            lane="local" if config.lane == "local" else "zmq",
            lane_url=self._lane_url(generation),
            workers=model.wants.workers,
            slots=model.slots,
            cache_dir=str(user_cache()),
            context=model.context,
            limits=self._memory.limits,
            streams=model.streams_shape.streams,
            value_nbytes=model.streams_shape.value_nbytes,
            max_batch_tokens=model.wants.max_batch_tokens,
            threads=config.threads,
            storage=model.plan.storage,
            precisions=list(model.plan.precisions),
            assignment=list(model.plan.assignment),
            prefetch=config.prefetch,
            step_timeout_s=config.step_timeout_s,
            start_timeout_s=config.start_timeout_s,
            trace=str(config.trace.absolute()) if config.trace else "",
            log_level=config.log_level,
        )

    def _worker(self, index: int, start: StartMember) -> WorkerSpec:
        model = self._model
        return WorkerSpec(
            index=index,
            incarnation=start.incarnation,
            lane_url=self._lane_url(start.generation),
            slots=model.slots,
            model_path=model.paths[0],  # whichever part was named
            model_id=model.id,
            cache_dir=str(user_cache()),
            log_level=self._config.log_level,
        )
