"""serving/batching.py by itself: who waits for whom, and who gets which answer."""

import asyncio
import ctypes
import random
import threading
from functools import partial

import pytest

from serving.batching import Batcher

FOR_EVER = 1000  # seconds: a test in which something waits for the window to pass fails


class Device:
    """Stands where the network does: triples numbers, notes every batch, and begins when it is allowed to."""

    def __init__(self):
        self.batches, self.free, self.begun = [], threading.Event(), threading.Event()
        self.free.set()

    def run(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.begun.set()
        assert self.free.wait(60)
        if any(item < 0 for item in items):
            raise ArithmeticError(f"a batch with {min(items)}")
        return [3 * item for item in items]

    def run_too(self, items: list[int]) -> list[int]:
        """Another model."""
        return [result + 1 for result in self.run(items)]

    async def hold(self, batcher: Batcher) -> asyncio.Task:
        """Keep the device busy with a 0 until it is freed."""
        self.free.clear()
        first = asyncio.create_task(batcher.submit(self.run, lambda: 0))
        await asyncio.to_thread(self.begun.wait, 60)
        return first


async def waiting(batcher: Batcher, run, items: list[int]) -> list[asyncio.Task]:
    """Requests that came in this order and wait for the device."""
    tasks = []
    for item in items:
        tasks.append(asyncio.create_task(batcher.submit(run, lambda item=item: item)))
        await until(lambda item=item: any(entry.item == item for entry in batcher._waiting.get(run, ())))
    return tasks


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def test_what_waits_for_the_device_goes_together():
    async def check():
        device, batcher = Device(), Batcher(window_s=0)
        first = await device.hold(batcher)
        others = await waiting(batcher, device.run, [1, 2, 3])
        device.free.set()
        assert await asyncio.gather(first, *others) == [0, 3, 6, 9]
        assert device.batches == [[0], [1, 2, 3]]

    asyncio.run(check())


def test_a_batch_has_a_largest_size():
    async def check():
        device, batcher = Device(), Batcher(window_s=FOR_EVER, max_batch=2)
        first = await device.hold(batcher)
        others = await waiting(batcher, device.run, [1, 2, 3, 4, 5])
        device.free.set()
        assert await asyncio.gather(first, *others) == [0, 3, 6, 9, 12, 15]
        assert device.batches == [[0], [1, 2], [3, 4], [5]]

    asyncio.run(check())


@pytest.mark.parametrize("fate", ["prepared", "failed", "cancelled"])
def test_a_request_waits_for_one_that_is_on_its_way_and_no_longer(fate):
    async def check():
        device, batcher, release = Device(), Batcher(window_s=FOR_EVER), threading.Event()

        def prepare() -> int:
            assert release.wait(60)
            if fate == "failed":
                raise ValueError("no picture")
            return 2

        late = asyncio.create_task(batcher.submit(device.run, prepare))
        (early,) = await waiting(batcher, device.run, [1])
        await asyncio.sleep(0.05)
        assert device.batches == []
        if fate == "cancelled":
            late.cancel()
            assert await early == 3  # the other is still held
        release.set()
        assert await early == 3
        (outcome,) = await asyncio.gather(late, return_exceptions=True)
        assert device.batches == ([[1, 2]] if fate == "prepared" else [[1]])
        if fate == "prepared":
            assert outcome == 6
        else:
            assert isinstance(outcome, ValueError if fate == "failed" else asyncio.CancelledError)

    asyncio.run(check())


def test_a_request_does_not_wait_longer_than_the_window():
    async def check():
        device, batcher, release = Device(), Batcher(window_s=0.01), threading.Event()
        late = asyncio.create_task(batcher.submit(device.run, lambda: release.wait(60) and 2))
        assert await batcher.submit(device.run, lambda: 1) == 3
        release.set()
        assert await late == 6
        assert device.batches == [[1], [2]]

    asyncio.run(check())


def test_no_request_waits_for_one_of_another_model():
    async def check():
        device, batcher, release = Device(), Batcher(window_s=FOR_EVER), threading.Event()
        late = asyncio.create_task(batcher.submit(device.run_too, lambda: release.wait(60) and 2))
        assert await batcher.submit(device.run, lambda: 1) == 3
        release.set()
        assert await late == 7

    asyncio.run(check())


def test_only_the_guilty_request_fails():
    async def check():
        device, batcher = Device(), Batcher()
        first = await device.hold(batcher)
        others = await waiting(batcher, device.run, [1, -2, 3, -4])
        device.free.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        assert [repr(answer) for answer in answers] == [
            "0",
            "3",
            "ArithmeticError('a batch with -2')",
            "9",
            "ArithmeticError('a batch with -4')",
        ]
        assert device.batches == [[0], [1, -2, 3, -4], [1], [-2], [3], [-4]]

    asyncio.run(check())


@pytest.mark.parametrize("wrong", [[1], [1, 2, 3, 4], []])
def test_answers_are_not_shifted_by_a_run_that_gives_too_few_or_too_many(wrong):
    async def check():
        device, batcher = Device(), Batcher()

        def run(items: list[int]) -> list[int]:
            return [3 * items[0]] if len(items) == 1 else wrong

        first = await device.hold(batcher)
        others = await waiting(batcher, run, [5, 6, 7])
        device.free.set()
        assert await asyncio.gather(first, *others) == [0, 15, 18, 21]

    asyncio.run(check())


def test_a_cancelled_request_leaves_its_place_to_another():
    async def check():
        device, batcher = Device(), Batcher(max_batch=2)
        first = await device.hold(batcher)
        others = await waiting(batcher, device.run, [1, 2, 3, 4])
        others[0].cancel()
        others[2].cancel()
        await asyncio.sleep(0)
        first.cancel()  # under way: it ends, and nobody hears of it
        device.free.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        assert [answers[2], answers[4]] == [6, 12]
        assert all(isinstance(answers[index], asyncio.CancelledError) for index in (0, 1, 3))
        assert device.batches == [[0], [2, 4]]

    asyncio.run(check())


class Stray(BaseException):
    """What Cog raises in a thread to cancel a request is no Exception either."""


@pytest.mark.parametrize("number", [0, 2])
def test_a_stray_exception_does_not_end_the_thread(number):
    async def check():
        device, batcher = Device(), Batcher()
        first = await device.hold(batcher)
        others = await waiting(batcher, device.run, list(range(1, number + 1)))
        assert ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(batcher._thread.ident), ctypes.py_object(Stray)
        )
        device.free.set()
        (failed,) = await asyncio.gather(first, return_exceptions=True)
        assert repr(failed) == "RuntimeError('the request was interrupted; send it again')"
        assert await asyncio.gather(*others) == [3 * item for item in range(1, number + 1)]
        assert await batcher.submit(device.run, lambda: 9) == 27

    asyncio.run(check())


def test_no_model_starves_another():
    async def check():
        device, batcher = Device(), Batcher(max_batch=2)
        first = await device.hold(batcher)
        tasks = [first, *await waiting(batcher, device.run, [1, 2, 3])]
        tasks += await waiting(batcher, device.run_too, [10])
        tasks += await waiting(batcher, device.run, [4, 5])
        device.free.set()
        assert await asyncio.gather(*tasks) == [0, 3, 6, 9, 31, 12, 15]
        assert device.batches == [[0], [1, 2], [3, 4], [10], [5]]

    asyncio.run(check())


def test_hundreds_of_interleaved_requests_get_their_own_answers():
    chance = random.Random(0)
    kinds = chance.choices(["good", "unreadable", "guilty", "cancelled"], [70, 10, 10, 10], k=600)

    def prepare(number: int, kind: str) -> int:
        if kind == "unreadable":
            raise ValueError(f"picture {number}")
        return -number if kind == "guilty" else number

    async def check():
        device, batcher = Device(), Batcher(window_s=0.002, max_batch=7)
        runs = [device.run, device.run_too, partial(Device.run, device)]
        outcomes = {}

        async def request(number: int, kind: str, wait: float, patience: float) -> None:
            await asyncio.sleep(wait)
            submission = batcher.submit(runs[number % 3], partial(prepare, number, kind))
            task = asyncio.create_task(submission)
            if kind == "cancelled":
                await asyncio.sleep(patience)
                task.cancel()
            (outcomes[number],) = await asyncio.gather(task, return_exceptions=True)

        await asyncio.gather(
            *(
                request(number, kind, chance.uniform(0, 0.3), chance.uniform(0, 0.003))
                for number, kind in enumerate(kinds, 1)
            )
        )
        for number, kind in enumerate(kinds, 1):
            outcome, right = outcomes[number], 3 * number + (number % 3 == 1)
            if kind == "unreadable":
                assert repr(outcome) == f"ValueError('picture {number}')"
            elif kind == "guilty":
                assert repr(outcome) == f"ArithmeticError('a batch with -{number}')"
            elif kind == "good" or not isinstance(outcome, asyncio.CancelledError):
                assert outcome == right
        assert max(map(len, device.batches)) > 1
        assert not batcher._waiting and not batcher._coming  # nothing is kept of those that are gone
        await batcher.close()

    asyncio.run(check())


def test_closing_waits_for_those_that_came_before():
    async def check():
        device, batcher, release = Device(), Batcher(window_s=FOR_EVER), threading.Event()
        first = await device.hold(batcher)
        late = asyncio.create_task(batcher.submit(device.run, lambda: release.wait(60) and 2))
        others = await waiting(batcher, device.run, [1])
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.02)
        with pytest.raises(RuntimeError, match="takes no more requests"):
            await batcher.submit(device.run, lambda: 3)
        device.free.set()
        await asyncio.sleep(0.02)
        assert not closing.done()
        release.set()
        await closing
        assert await asyncio.gather(first, *others, late) == [0, 3, 6]

    asyncio.run(check())


@pytest.mark.parametrize(("name", "value"), [("window_s", -1), ("window_s", float("nan")), ("max_batch", 0)])
def test_a_setting_that_is_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be at least"):
        Batcher(**{name: value})
