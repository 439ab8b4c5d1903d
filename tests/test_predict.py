"""predict.py in this process, without a server."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict

import pytest
from cog_server import GOOD, PATIENCE, data_uri, encoded, expect, noise, write_weights
from PIL import Image

import predict
from convmixer import Classifier, zoo
from convmixer.cpu import kernel
from convmixer.weights import CheckpointError
from serving import RequestError, models, watcher

NAMED = "convmixer_768_32"


@pytest.fixture
def predictor(monkeypatch, tmp_path) -> Iterator[predict.Predictor]:
    write_weights(tmp_path / "model.safetensors")
    monkeypatch.setenv("COG_WEIGHTS", str(tmp_path / "model.safetensors"))
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path))
    monkeypatch.setenv("COG_MAX_CONCURRENCY", "3")
    monkeypatch.delenv("CONVMIXER_DOWNLOAD", raising=False)
    predictor = predict.Predictor()
    predictor.setup()
    yield predictor
    predictor.decoder.close()


def ask(predictor: predict.Predictor, image: str = GOOD, model="auto", top_k=5, heatmap=False):
    return predictor.run(image=image, model=model, top_k=top_k, heatmap=heatmap)


def test_setup_says_in_one_line_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("COG_WEIGHTS", str(tmp_path / "gone.safetensors"))
    with pytest.raises(CheckpointError, match=r"^the file that COG_WEIGHTS names is not there.*$"):
        predict.Predictor().setup()
    (tmp_path / "file").touch()  # as in a container with --read-only and no --tmpfs
    monkeypatch.setattr(predict, "check_folder", lambda: watcher.check_folder(str(tmp_path / "file" / "predictions")))
    with pytest.raises(OSError, match=r"^Cog needs the folder .* --tmpfs /tmp$"):
        predict.Predictor().setup()


def test_auto_is_one_model_with_its_name_warm_for_all_slots_and_told_once_to_be_slow(predictor, monkeypatch, caplog):
    def load(*_):
        raise kernel.KernelError("there is none today")

    warmed, path = [], zoo.resolve("auto")[1]
    monkeypatch.setattr(kernel, "load", load)
    monkeypatch.setattr(Classifier, "warm_up", lambda self, batch=1: warmed.append(batch))
    monkeypatch.setattr(zoo, "resolve", lambda model: (NAMED, path))
    predictor.models = models.Models(together=3)
    outputs = [asyncio.run(ask(predictor, model=name)) for name in ("auto", NAMED)]
    assert [output.engine for output in outputs] == ["numpy", "numpy"]
    assert warmed == [3]
    assert caplog.text.count("there is none today") == 1


def test_requests_that_come_together_share_the_network(predictor):
    """And a heat map changes no score, though a large JPEG is read at more of its sides to be shown."""
    classifier = asyncio.run(predictor.models.get("auto"))
    shared, run, release = [], classifier.engine.run, threading.Event()

    def recorded(batch, stages=0):
        shared.append(len(batch))
        assert release.wait(PATIENCE)
        return run(batch, stages)

    classifier.engine.run = recorded
    large = encoded(noise(40, 30).resize((1600, 1200), Image.Resampling.BICUBIC), "JPEG")
    wanted = [(encoded(noise(60, 50, seed)), 1 + seed, seed == 2) for seed in range(4)] + [(large, 5, False)]

    async def ask_all() -> list[predict.Output]:
        asked = [asyncio.create_task(ask(predictor, data_uri(each[0]), "auto", *each[1:])) for each in wanted]
        asked.append(asyncio.create_task(ask(predictor, data_uri(large), heatmap=True)))
        while len(predictor.batcher._waiting) < 5:  # while the first is on the device
            await asyncio.sleep(0.001)
        release.set()
        return await asyncio.gather(*asked)

    *outputs, drawn = asyncio.run(ask_all())
    assert shared == [1, 5]
    for output, each in zip(outputs, wanted, strict=True):
        expect(asdict(output), classifier, *each)
    assert drawn.heatmap and drawn.predictions == outputs[-1].predictions


# Models that are not there.


@pytest.mark.parametrize("name", ["convmixer_768_32.safetensors", "/etc/passwd", None])
def test_no_file_is_opened_by_the_name_of_a_model(predictor, name):
    with pytest.raises(RequestError, match=r"choose one of auto, convmixer_1536_20, "):
        asyncio.run(ask(predictor, model=name))


def test_a_download_has_a_deadline_and_its_failure_is_remembered(predictor, monkeypatch, capfd):
    """Nothing answers at the address of the proxy, which takes every connection."""
    monkeypatch.setenv("CONVMIXER_DOWNLOAD", "1")
    monkeypatch.setattr(models, "DOWNLOAD_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")

        async def check():
            for _ in range(3):
                with pytest.raises(RequestError, match=f"{NAMED} is not on this server"):
                    await ask(predictor, model=NAMED)

        asyncio.run(check())
    assert capfd.readouterr().err.count("timed out after 0.5 seconds") == 1


def test_a_model_is_loaded_once_for_all_who_wait_and_the_log_has_why_it_failed(predictor, monkeypatch, capfd, tmp_path):
    (tmp_path / f"{NAMED}.safetensors").touch()
    outcomes, begun, release = [CheckpointError("damaged"), "a classifier"], threading.Event(), threading.Event()

    def load(name: str):
        begun.set()
        assert release.wait(PATIENCE)
        if isinstance(outcome := outcomes.pop(0), Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(models, "Classifier", load)
    monkeypatch.setattr(models, "REMEMBERED_SECONDS", 0.0)

    async def check():
        for kind in (RequestError, str):
            begun.clear()
            release.clear()
            waiting = [asyncio.create_task(predictor.models.get(NAMED)) for _ in range(3)]
            await asyncio.to_thread(begun.wait, PATIENCE)
            waiting[0].cancel()
            assert (await ask(predictor)).model == "random"  # meanwhile
            release.set()
            outcome = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(each) for each in outcome] == [asyncio.CancelledError, kind, kind]
            await asyncio.sleep(0.01)  # a failure is forgotten
        assert await predictor.models.get(NAMED) == "a classifier" and not outcomes

    asyncio.run(check())
    assert capfd.readouterr().err == f"{NAMED}: damaged\n"
