"""predict.py in this process, without a server."""

import asyncio
import base64
import io
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from cog_server import GOOD, PATIENCE, data_uri, encoded, noise
from PIL import Image

import predict
from convmixer import Classifier, zoo
from convmixer.weights import CheckpointError
from serving import RequestError, models, watcher


@pytest.fixture
def weights(monkeypatch, random_checkpoint):
    path = random_checkpoint()
    monkeypatch.setenv("COG_WEIGHTS", str(path))
    monkeypatch.delenv("CONVMIXER_DOWNLOAD", raising=False)
    monkeypatch.setenv("CONVMIXER_CACHE", str(path.parent / "cache"))
    return path


@pytest.fixture
def predictor(weights) -> Iterator[predict.Predictor]:
    predictor = predict.Predictor()
    predictor.setup()
    yield predictor
    predictor.decoder.close()


def ask(predictor: predict.Predictor, image: str = GOOD, model="auto", top_k=5, heatmap=False):
    return predictor.run(image=image, model=model, top_k=top_k, heatmap=heatmap)


def test_setup_without_the_weights_that_cog_weights_names(monkeypatch, tmp_path):
    monkeypatch.setenv("COG_WEIGHTS", str(tmp_path / "gone.safetensors"))
    predictor = predict.Predictor()
    with pytest.raises(CheckpointError, match="COG_WEIGHTS"):
        predictor.setup()
    predictor.decoder.close()


def test_setup_where_cog_could_not_write_gets_one_line(monkeypatch, tmp_path):
    """As in a container with --read-only and no --tmpfs."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(predict, "check_folder", lambda: watcher.check_folder(str(tmp_path / "file" / "predictions")))
    with pytest.raises(OSError, match=r"^Cog needs the folder .* --tmpfs /tmp$"):
        predict.Predictor().setup()


def test_the_first_model_is_warm_for_as_many_as_there_are_slots(monkeypatch, weights):
    events = []

    class Recorder(Classifier):
        def warm_up(self, batch=1):
            events.append(batch)
            super().warm_up(batch)

    monkeypatch.setattr(models, "Classifier", Recorder)
    models.Models(together=3)
    assert events == [3]


def test_auto_and_the_name_of_what_it_is_are_one_model(monkeypatch, weights):
    monkeypatch.setattr(zoo, "resolve", lambda model: ("convmixer_768_32", weights))

    async def check():
        found = models.Models(1)
        assert await found.get("auto") is await found.get("convmixer_768_32")

    asyncio.run(check())


@pytest.mark.parametrize("name", ["resnet50", "convmixer_768_32.safetensors", "/etc/passwd", "", None])
def test_no_file_is_opened_by_the_name_of_a_model(weights, name):
    with pytest.raises(RequestError, match=r"choose one of auto, convmixer_1536_20, "):
        asyncio.run(models.Models(1).get(name))


def test_requests_that_come_together_share_the_network(predictor):
    classifier = asyncio.run(predictor.models.get("auto"))
    shared, run = [], classifier.engine.run

    def recorded(batch, stages=0):
        shared.append(len(batch))
        assert release.wait(PATIENCE)
        return run(batch, stages)

    classifier.engine.run = recorded
    release = threading.Event()
    pictures = [encoded(noise(60, 50, seed=seed)) for seed in range(12)]

    async def ask_all() -> list[predict.Output]:
        asked = [
            asyncio.create_task(ask(predictor, data_uri(picture), "auto", 1 + index % 3, index % 4 == 0))
            for index, picture in enumerate(pictures)
        ]
        while len(predictor.batcher._waiting) < 11:  # while the first is on the device
            await asyncio.sleep(0.001)
        release.set()
        return await asyncio.gather(*asked)

    outputs = asyncio.run(ask_all())
    assert shared == [1, 11]
    classifier.engine.run = run
    for index, (output, picture) in enumerate(zip(outputs, pictures, strict=True)):
        expected = classifier.classify(picture, 1 + index % 3)
        assert [each.label for each in output.predictions] == [each.label for each in expected]
        assert [each.score for each in output.predictions] == pytest.approx([each.score for each in expected])
        assert (output.heatmap is not None) == (index % 4 == 0)
        if output.heatmap:
            drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(output.heatmap.split(",")[1])))).astype(int)
            assert abs(drawn - np.asarray(classifier.heatmap(picture).overlay())).max() <= 1


@pytest.mark.parametrize("seed", range(3))
def test_a_heat_map_does_not_change_the_scores(predictor, seed):
    """A large JPEG is read at a fraction of its sides for the network, and at more of them to be shown."""
    picture = data_uri(encoded(noise(40, 30, seed).resize((1600, 1200), Image.Resampling.BICUBIC), "JPEG"))

    async def check():
        plain, drawn = [await ask(predictor, picture, heatmap=heatmap) for heatmap in (False, True)]
        assert drawn.predictions == plain.predictions

    asyncio.run(check())


# Models that are not there.


def test_a_download_has_a_deadline_and_its_failure_is_remembered(predictor, monkeypatch, capfd):
    """Nothing answers at the address of the proxy, which takes every connection."""
    monkeypatch.setenv("CONVMIXER_DOWNLOAD", "1")
    monkeypatch.setattr(models, "DOWNLOAD_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")

        async def check():
            for _ in range(3):
                with pytest.raises(RequestError, match="convmixer_768_32 is not on this server"):
                    await ask(predictor, model="convmixer_768_32")
            monkeypatch.setattr(models, "REMEMBERED_SECONDS", 0)

        asyncio.run(check())
    assert capfd.readouterr().err.count("timed out after 1.0 seconds") == 1


def test_a_model_is_loaded_once_for_all_who_wait_for_it(predictor, monkeypatch):
    monkeypatch.setattr(zoo, "local_path", lambda name: "here")
    monkeypatch.setattr(models, "REMEMBERED_SECONDS", 0.0)
    loaded, release = [], threading.Event()

    def load(name: str):
        loaded.append(name)
        assert release.wait(PATIENCE)
        if len(loaded) == 1:
            raise RequestError("no such luck")
        return "a classifier"

    monkeypatch.setattr(models, "_load", load)

    async def check():
        get = predictor.models.get
        for outcome in (RequestError, str):
            release.clear()
            waiting = [asyncio.create_task(get("convmixer_768_32")) for _ in range(3)]
            await asyncio.sleep(0.01)
            waiting[0].cancel()
            assert isinstance(await get("auto"), Classifier)  # meanwhile
            release.set()
            first, *others = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(first, asyncio.CancelledError)
            assert [type(other) for other in others] == [outcome, outcome]
            await asyncio.sleep(0.01)  # the failure is forgotten
        await get("convmixer_768_32")

    asyncio.run(check())
    assert loaded == ["convmixer_768_32"] * 2


def test_a_damaged_model_gets_one_line_and_the_log_has_why(predictor, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path))
    (tmp_path / "convmixer_768_32.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(RequestError, match="convmixer_768_32 is not on this server"):
        asyncio.run(ask(predictor, model="convmixer_768_32"))
    assert "convmixer_768_32.safetensors" in capfd.readouterr().err
