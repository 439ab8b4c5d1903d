"""The functions of predict.py and serve.py, without a server."""

import socket
import tempfile

import pytest

import convmixer
import predict
import serve
from convmixer import Classifier, zoo
from convmixer.weights import CheckpointError


@pytest.fixture
def own_temporary_folder(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)  # setup changes it for the whole process


def test_setup_without_the_weights_that_cog_weights_names(monkeypatch, tmp_path, own_temporary_folder):
    monkeypatch.setenv("COG_WEIGHTS", str(tmp_path / "gone.safetensors"))
    with pytest.raises(CheckpointError, match="COG_WEIGHTS"):
        predict.Predictor().setup()


def test_each_model_is_loaded_once_and_the_first_is_warm(monkeypatch, random_checkpoint, own_temporary_folder):
    path = random_checkpoint()
    monkeypatch.setenv("COG_WEIGHTS", str(path))
    events = []

    class Recorder(Classifier):
        def __init__(self, model):
            events.append(model)
            super().__init__(str(path))

        def warm_up(self, batch=1):
            events.append("runs")
            super().warm_up(batch)

    monkeypatch.setattr(convmixer, "Classifier", Recorder)
    predictor = predict.Predictor()
    predictor.setup()
    for model in ("auto", "convmixer_768_32", "convmixer_768_32", "auto", "convmixer_1536_20"):
        predictor.classifier(model)
    assert events == ["auto", "runs", "convmixer_768_32", "convmixer_1536_20"]


def test_auto_and_the_name_of_what_it_is_are_one_model(monkeypatch, random_checkpoint, own_temporary_folder):
    path = random_checkpoint()
    monkeypatch.setattr(zoo, "resolve", lambda model: ("convmixer_768_32", path))
    monkeypatch.setattr(convmixer, "Classifier", lambda model: Classifier(str(path)))
    predictor = predict.Predictor()
    predictor.setup()
    assert predictor.classifier("auto") is predictor.classifier("convmixer_768_32")


def test_no_file_is_opened_by_the_name_of_a_model(monkeypatch, random_checkpoint, own_temporary_folder):
    path = random_checkpoint()
    monkeypatch.setenv("COG_WEIGHTS", str(path))
    predictor = predict.Predictor()
    predictor.setup()
    with pytest.raises(predict.RequestError, match="choose one of auto, "):
        predictor.classifier(str(path))


def test_only_pictures_from_cog_are_read(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    inside, outside, link = folder / "inside", tmp_path / "outside", folder / "link"
    inside.write_bytes(b"inside")
    outside.write_bytes(b"outside")
    link.symlink_to(outside)
    assert predict.read_picture(predict.Path(inside), folder) == b"inside"
    for image in (outside, link, folder / ".." / "outside", str(inside), "inside", None, 7):
        with pytest.raises(predict.RequestError, match="must be an http or https URL"):
            predict.read_picture(image, folder)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.truncate(predict.MAX_BYTES + 1)
    with pytest.raises(predict.RequestError, match="104,857,601 bytes, more than the 104,857,600"):
        predict.read_picture(path, tmp_path)


@pytest.fixture
def no_start(monkeypatch):
    """serve.py would become the server: a test that should have stopped it before must fail instead."""
    monkeypatch.setattr(serve, "write_schema", lambda: pytest.fail("the server would start"))


@pytest.mark.parametrize("port", ["abc", "", "0", "-1", "65536", "5000.0", "²"])
def test_a_port_that_is_none_gets_one_line(no_start, port, capsys):
    with pytest.raises(SystemExit) as stopped:
        serve.main([f"--port={port}"])
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err == f"serve.py: argument --port: {port!r} is not a port; give a number from 1 to 65535\n"
    )


def test_a_port_in_use_gets_one_line(no_start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as stopped:
            serve.main(["--port", str(port)])
    assert stopped.value.code.startswith(f"serve.py: port {port} of 127.0.0.1 cannot be used (Address already in use)")
    assert "\n" not in stopped.value.code
