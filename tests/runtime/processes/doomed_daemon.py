"""A daemon for tests: starts a supervisor with three children, prints their pids, waits."""

from __future__ import annotations

import asyncio
import json

from sterna.runtime.processes.supervisor import Supervisor


async def main() -> None:
    supervisor = await Supervisor.start()
    children = [await supervisor.spawn(f"worker {i}", "nursery_entries:wait", {}, {}, 5.0) for i in range(3)]
    print(json.dumps([supervisor.nursery_pid, *(child.pid for child in children)]), flush=True)
    await asyncio.sleep(60)


asyncio.run(main())
