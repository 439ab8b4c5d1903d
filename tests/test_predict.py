"""predict.py and serving/batching.py in this process, without a server."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
from cog_server import GOOD, PATIENCE, write_weights

import predict
from convmixer import Classifier, zoo
from convmixer.weights import CheckpointError
from serving import RequestError, models
from serving.batching import Batcher

NAMED = "convmixer_768_32"


@pytest.fixture
def predictor(monkeypatch, tmp_path) -> Iterator[predict.Predictor]:
    write_weights(tmp_path / "model.safetensors")
    monkeypatch.setenv("COG_WEIGHTS", str(tmp_path / "model.safetensors"))
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path))
    monkeypatch.delenv("CONVMIXER_DOWNLOAD", raising=False)
    predictor = predict.Predictor()
    predictor.setup()
    yield predictor
    predictor.decoder.close()


def ask(predictor: predict.Predictor, model: str = "auto"):
    return predictor.run(image=GOOD, model=model, top_k=5, heatmap=False)


def test_auto_and_the_name_of_what_it_is_are_one_model_warm_for_all_slots(predictor, monkeypatch):
    warmed, path = [], zoo.resolve("auto")[1]
    monkeypatch.setattr(zoo, "resolve", lambda model: (NAMED, path))
    monkeypatch.setattr(Classifier, "warm_up", lambda self, batch: warmed.append(batch))
    monkeypatch.setenv("COG_MAX_CONCURRENCY", "3")
    predictor.decoder.close()
    predictor.setup()
    first, second = (asyncio.run(predictor.models.get(name)) for name in ("auto", NAMED))
    assert first is second and warmed == [3]


def test_no_file_is_opened_by_the_name_of_a_model(predictor):
    with pytest.raises(RequestError, match=r"choose one of auto, convmixer_1536_20, "):
        asyncio.run(ask(predictor, model="/etc/passwd"))


def test_a_download_has_a_deadline_and_its_failure_is_remembered(predictor, monkeypatch, capfd):
    """Nothing answers at the address of the proxy, which takes every connection."""
    monkeypatch.setenv("CONVMIXER_DOWNLOAD", "1")
    monkeypatch.setattr(models, "DOWNLOAD_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")

        async def check():
            for _ in range(2):
                with pytest.raises(RequestError, match=f"{NAMED} is not on this server"):
                    await ask(predictor, model=NAMED)

        asyncio.run(check())
    assert capfd.readouterr().err.count("timed out after 0.5 seconds") == 1


def test_a_model_is_loaded_once_for_all_who_wait_and_again_after_a_failure(predictor, monkeypatch, capfd, tmp_path):
    (tmp_path / f"{NAMED}.safetensors").touch()
    outcomes, release = iter([CheckpointError("damaged"), None]), threading.Event()

    def load(name: str) -> str:
        assert release.wait(PATIENCE)
        if error := next(outcomes):
            raise error
        return "a classifier"

    monkeypatch.setattr(models, "Classifier", load)
    monkeypatch.setattr(models, "REMEMBERED_SECONDS", 0.0)

    async def check():
        waiting = [asyncio.create_task(predictor.models.get(NAMED)) for _ in range(3)]
        assert (await ask(predictor)).model == "random"  # meanwhile
        waiting[0].cancel()
        release.set()
        outcome = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in outcome] == [asyncio.CancelledError, RequestError, RequestError]
        await asyncio.sleep(0.01)
        assert [await predictor.models.get(NAMED) for _ in range(2)] == ["a classifier"] * 2

    asyncio.run(check())
    assert capfd.readouterr().err == f"{NAMED}: damaged\n"


# Who goes through the network with whom, and who gets which answer.


class Device:
    """Stands where the network does: triples numbers, notes every batch, and begins when it is allowed to."""

    def __init__(self):
        self.batches, self.free, self.begun = [], threading.Event(), threading.Event()

    def run(self, model: int, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.begun.set()
        assert self.free.wait(PATIENCE)
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
    async def check():
        device = Device()
        batcher = Batcher(device.run, most)
        tasks = [asyncio.create_task(batcher.submit(0, 0))]  # on the device alone when the others come
        await asyncio.to_thread(device.begun.wait, PATIENCE)
        tasks += [asyncio.create_task(batcher.submit(*each)) for each in requests]
        await asyncio.sleep(0)
        for index in cancelled:
            tasks[index].cancel()
        await asyncio.sleep(0)
        device.free.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for task, (model, item), answer in zip(tasks, [(0, 0), *requests], answers, strict=True):
            wanted = 3 * item + model if item >= 0 else f"a batch with {item}"
            assert isinstance(answer, asyncio.CancelledError) if task.cancelled() else str(answer) == str(wanted)
        assert [index for index, task in enumerate(tasks) if task.cancelled()] == cancelled
        assert device.batches == [[0], *batches]

    asyncio.run(check())
