"""serving/batching.py by itself: who goes with whom, and who gets which answer."""

import asyncio
import threading

import pytest

from serving.batching import Batcher


class Device:
    """Stands where the network does: triples numbers, notes every batch, and begins when it is allowed to."""

    def __init__(self):
        self.batches, self.free, self.begun = [], threading.Event(), threading.Event()
        self.free.set()

    def run(self, model: int, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.begun.set()
        assert self.free.wait(60)
        if any(item < 0 for item in items):
            raise ArithmeticError(f"a batch with {min(items)}")
        return [3 * item + model for item in items]

    async def hold(self, batcher: Batcher) -> asyncio.Task:
        """Keep the device busy with a 0 until it is freed."""
        self.free.clear()
        first = asyncio.create_task(batcher.submit(0, 0))
        await asyncio.to_thread(self.begun.wait, 60)
        return first


async def waiting(batcher: Batcher, model: int, items: list[int]) -> list[asyncio.Task]:
    """Requests that came in this order and wait for the device."""
    tasks = [asyncio.create_task(batcher.submit(model, item)) for item in items]
    await asyncio.sleep(0)
    return tasks


def test_what_waits_for_the_device_goes_together_and_nothing_waits_for_company():
    async def check():
        device = Device()
        batcher = Batcher(device.run)
        assert await batcher.submit(0, 9) == 27
        first = await device.hold(batcher)
        others = await waiting(batcher, 0, [1, 2, 3])
        device.free.set()
        assert await asyncio.gather(first, *others) == [0, 3, 6, 9]
        assert device.batches == [[9], [0], [1, 2, 3]]

    asyncio.run(check())


def test_a_batch_has_a_largest_size():
    async def check():
        device = Device()
        batcher = Batcher(device.run, most_together=2)
        first = await device.hold(batcher)
        others = await waiting(batcher, 0, [1, 2, 3, 4, 5])
        device.free.set()
        assert await asyncio.gather(first, *others) == [0, 3, 6, 9, 12, 15]
        assert device.batches == [[0], [1, 2], [3, 4], [5]]

    asyncio.run(check())


def test_no_model_starves_another():
    async def check():
        device = Device()
        batcher = Batcher(device.run, most_together=2)
        first = await device.hold(batcher)
        tasks = [first, *await waiting(batcher, 0, [1, 2, 3])]
        tasks += await waiting(batcher, 1, [10])
        tasks += await waiting(batcher, 0, [4, 5])
        device.free.set()
        assert await asyncio.gather(*tasks) == [0, 3, 6, 9, 31, 12, 15]
        assert device.batches == [[0], [1, 2], [3, 4], [10], [5]]

    asyncio.run(check())


def test_only_the_guilty_request_fails():
    async def check():
        device = Device()
        batcher = Batcher(device.run)
        first = await device.hold(batcher)
        others = await waiting(batcher, 0, [1, -2, 3, -4])
        device.free.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        guilty = [f"ArithmeticError('a batch with {number}')" for number in (-2, -4)]
        assert [repr(answer) for answer in answers] == ["0", "3", guilty[0], "9", guilty[1]]
        assert device.batches == [[0], [1, -2, 3, -4], [1], [-2], [3], [-4]]

    asyncio.run(check())


@pytest.mark.parametrize("wrong", [[1], [1, 2, 3, 4, 5], []])
def test_answers_are_not_shifted_by_a_run_that_gives_too_few_or_too_many(wrong):
    async def check():
        batcher = Batcher(lambda model, items: [3 * items[0]] if len(items) == 1 else wrong)
        tasks = [asyncio.create_task(batcher.submit(0, item)) for item in (4, 5, 6, 7)]
        assert await asyncio.gather(*tasks) == [12, 15, 18, 21]

    asyncio.run(check())


def test_a_cancelled_request_leaves_its_place_to_another():
    async def check():
        device = Device()
        batcher = Batcher(device.run, most_together=2)
        first = await device.hold(batcher)
        others = await waiting(batcher, 0, [1, 2, 3, 4])
        others[0].cancel()
        others[2].cancel()
        await asyncio.sleep(0)
        first.cancel()  # under way: it ends, and nobody hears of it
        device.free.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        assert [answers[2], answers[4]] == [6, 12]
        assert all(isinstance(answers[index], asyncio.CancelledError) for index in (0, 1, 3))
        assert device.batches == [[0], [2, 4]]
        assert await batcher.submit(0, 9) == 27

    asyncio.run(check())
