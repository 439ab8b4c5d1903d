"""serving/batching.py by itself: who goes with whom, and who gets which answer."""

import asyncio
import threading

import pytest

from serving.batching import Batcher


class Device:
    """Stands where the network does: triples numbers, notes every batch, and begins when it is allowed to."""

    def __init__(self):
        self.batches, self.free, self.begun = [], threading.Event(), threading.Event()

    def run(self, model: int, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.begun.set()
        assert self.free.wait(120)
        if min(items) < 0:
            raise ArithmeticError(f"a batch with {min(items)}")
        return [3 * item + model for item in items]


@pytest.mark.parametrize(
    ("most", "requests", "cancelled", "batches"),
    [
        pytest.param(2, [(0, 1), (0, 2), (0, 3)], [], [[1, 2], [3]], id="as many as fit go together"),
        pytest.param(2, [(0, 1), (1, 9), (0, 2), (0, 3)], [], [[1, 2], [9], [3]], id="no model starves another"),
        pytest.param(64, [(0, 1), (0, -2), (0, 3)], [], [[1, -2, 3], [1], [-2], [3]], id="the guilty fails alone"),
        pytest.param(2, [(0, 1), (0, 2), (0, 3)], [0, 1], [[2, 3]], id="who is cancelled leaves a place"),
    ],
)
def test_what_waits_for_the_device_goes_together(most, requests, cancelled, batches):
    """The first request, a 0, is on the device alone when the others come."""

    async def check():
        device = Device()
        batcher = Batcher(device.run, most)
        tasks = [asyncio.create_task(batcher.submit(0, 0))]
        await asyncio.to_thread(device.begun.wait, 120)
        tasks += [asyncio.create_task(batcher.submit(*each)) for each in requests]
        await asyncio.sleep(0)
        for index in cancelled:
            tasks[index].cancel()
        await asyncio.sleep(0)
        device.free.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for index, ((model, item), answer) in enumerate(zip([(0, 0), *requests], answers, strict=True)):
            if index in cancelled:
                assert isinstance(answer, asyncio.CancelledError)
            else:
                assert answer == 3 * item + model if item >= 0 else str(answer) == f"a batch with {item}"
        assert device.batches == [[0], *batches]

    asyncio.run(check())


@pytest.mark.parametrize("wrong", [[], [1, 2, 3]])
def test_answers_are_not_shifted_by_a_run_that_gives_too_few_or_too_many(wrong):
    async def check():
        batcher = Batcher(lambda model, items: [3 * items[0]] if len(items) == 1 else wrong)
        assert await asyncio.gather(*(batcher.submit(0, item) for item in (4, 5))) == [12, 15]

    asyncio.run(check())
