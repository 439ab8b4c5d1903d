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


async def asked(device: Device, batcher: Batcher, requests: list[tuple[int, int]]) -> list[asyncio.Task]:
    """Requests that came in this order and wait for the device, but for the first, a 0, which is on it."""
    first = asyncio.create_task(batcher.submit(0, 0))
    await asyncio.to_thread(device.begun.wait, 120)
    tasks = [first, *(asyncio.create_task(batcher.submit(*each)) for each in requests)]
    await asyncio.sleep(0)
    return tasks


@pytest.mark.parametrize(
    ("most", "requests", "batches"),
    [
        pytest.param(64, [(0, 1), (0, 2), (0, 3)], [[1, 2, 3]], id="all that wait go together"),
        pytest.param(2, [(0, 1), (0, 2), (0, 3)], [[1, 2], [3]], id="a batch has a largest size"),
        pytest.param(2, [(0, 1), (1, 9), (0, 2), (0, 3)], [[1, 2], [9], [3]], id="no model starves another"),
        pytest.param(64, [(0, 1), (0, -2), (0, 3)], [[1, -2, 3], [1], [-2], [3]], id="the guilty one fails alone"),
    ],
)
def test_what_waits_goes_together(most, requests, batches):
    async def check():
        device = Device()
        batcher = Batcher(device.run, most)
        tasks = await asked(device, batcher, requests)
        device.free.set()
        _, *answers = await asyncio.gather(*tasks, return_exceptions=True)
        for (model, item), answer in zip(requests, answers, strict=True):
            assert answer == 3 * item + model if item > 0 else str(answer) == f"a batch with {item}"
        assert device.batches == [[0], *batches]
        assert await batcher.submit(0, 7) == 21 and device.batches[-1] == [7]  # nobody waits for company

    asyncio.run(check())


@pytest.mark.parametrize("wrong", [[], [1, 2, 3]])
def test_answers_are_not_shifted_by_a_run_that_gives_too_few_or_too_many(wrong):
    async def check():
        batcher = Batcher(lambda model, items: [3 * items[0]] if len(items) == 1 else wrong)
        assert await asyncio.gather(*(batcher.submit(0, item) for item in (4, 5))) == [12, 15]

    asyncio.run(check())


def test_a_cancelled_request_leaves_its_place_to_another():
    async def check():
        device = Device()
        batcher = Batcher(device.run, 2)
        tasks = await asked(device, batcher, [(0, 1), (0, 2), (0, 3), (0, 4)])
        for index in (1, 3, 0):  # the last is under way: it ends, and nobody hears of it
            tasks[index].cancel()
        await asyncio.sleep(0)
        device.free.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answers[2], answers[4]] == [6, 12]
        assert all(isinstance(answers[index], asyncio.CancelledError) for index in (0, 1, 3))
        assert device.batches == [[0], [2, 4]]

    asyncio.run(check())
