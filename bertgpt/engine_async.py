"""Steps of an engine for asyncio programs: they run in a thread, and all who wait share one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class SharedSteps:
    """One step at a time for everybody who waits in an event loop.

    Args:
        step: Runs a step.
    """

    def __init__(self, step: Callable[[], bool]) -> None:
        self._step = step
        self._running: dict[asyncio.AbstractEventLoop, asyncio.Task[bool]] = {}

    async def wait(self, seconds: float | None) -> bool:
        """Waits for the end of a step, which goes on if the wait is over before or cancelled.

        Args:
            seconds: How long to wait at most; None for as long as it takes.

        Returns:
            Whether it has ended.

        Raises:
            Exception: What the step raised.
        """
        loop = asyncio.get_running_loop()
        task = self._running.get(loop)
        if task is None or task.done():
            task = self._running[loop] = loop.create_task(asyncio.to_thread(self._step))
            task.add_done_callback(self._forget)
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if done:
            task.result()
        return bool(done)

    def _forget(self, task: asyncio.Task[bool]) -> None:
        loop = task.get_loop()
        if self._running.get(loop) is task:
            del self._running[loop]
        if not task.cancelled():
            task.exception()  # looked at: perhaps nobody waits any more
