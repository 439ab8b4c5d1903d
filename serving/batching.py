"""Requests that have queued up while the device was busy go through the network together.

Nobody waits for company: a request that finds the device free goes at once, alone.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MOST_TOGETHER = 64


class Batcher:
    """run: called in one thread, the only one that uses the device, with a model and the items of a batch; gives a
    result for each, in the same order. If it raises, each item is tried again alone, so that only the guilty one's
    request fails, with what ``run`` raised for it.
    """

    def __init__(self, run: Callable[[Any, list], list], most_together: int = MOST_TOGETHER):
        self._run, self._most = run, most_together
        self._waiting: deque[tuple[Any, Any, asyncio.Future]] = deque()  # model, item, result; as they came
        self._is_working = False
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")

    async def submit(self, model: Any, item: Any) -> Any:
        """The result for ``item``. A caller may be cancelled at any time: what has not begun is not begun."""
        result = asyncio.get_running_loop().create_future()
        self._waiting.append((model, item, result))
        if not self._is_working:
            self._is_working = True
            # A context of its own: Cog takes what is printed in a request's for that request's log.
            self._task = asyncio.create_task(self._work(), context=contextvars.Context())
        return await result

    async def _work(self) -> None:
        """One batch after the other, until nobody waits."""
        try:
            while batch := self._next_batch():
                if not await self._answer(batch):
                    for entry in batch:
                        await self._answer([entry])
        finally:
            self._is_working = False

    def _next_batch(self) -> list[tuple]:
        """All that wait for the model of the one that has waited longest, up to the most, but those that went away."""
        batch, others = [], deque()
        for entry in self._waiting:
            if not entry[2].done():
                fits = len(batch) < self._most and (not batch or entry[0] is batch[0][0])
                (batch if fits else others).append(entry)
        self._waiting = others
        return batch

    async def _answer(self, batch: list[tuple]) -> bool:
        """Whether everybody in the batch has an answer now; if not, it was more than one, and one of them is guilty."""
        model, items = batch[0][0], [item for _, item, _ in batch]
        try:
            values = await asyncio.get_running_loop().run_in_executor(self._device, self._run, model, items)
            pairs = list(zip(batch, values, strict=True))
        except Exception as error:
            if len(batch) > 1:
                return False
            pairs = [(batch[0], error)]
        for (_, _, result), value in pairs:
            if not result.done():
                (result.set_exception if isinstance(value, Exception) else result.set_result)(value)
        return True
