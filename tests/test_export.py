"""Export to ONNX: the file alone, in ONNX Runtime, gives what the classifier gives."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

from convmixer import Classifier, ConvMixerConfig, Preprocessing, load_checkpoint, save_checkpoint
from convmixer.__main__ import main
from convmixer.export import ExportError, _check_sizes, _difference
from convmixer.preprocessing import preprocess
from convmixer.sample import draw_sample
from convmixer.zoo import MODELS

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs what was exported")
pytest.importorskip("onnxscript", reason="the exporter needs it")

SHIPPED = "convmixer_256_8_cifar10"


@pytest.fixture
def export(capsys, tmp_path):
    """A function that runs the export command; gives (code, stdout, stderr)."""

    def call(model: object, to: object = tmp_path / "model.onnx"):
        code = main(["export", str(model), "--to", str(to)])
        return code, *capsys.readouterr()

    return call


def open_session(path) -> onnxruntime.InferenceSession:
    """The file's content as a model; from memory, where it could not find a second file."""
    return onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def changed(path, **changes):
    """A copy of a checkpoint file with other fields."""
    copy = path.with_name("changed.safetensors")
    save_checkpoint(copy, replace(load_checkpoint(path), **changes))
    return copy


@pytest.mark.parametrize(("activation", "size"), [("gelu", 32), ("relu", 33)])
def test_the_logits_equal_those_of_pytorch_for_any_batch(export, random_checkpoint, tmp_path, activation, size):
    model = random_checkpoint(classes=7, size=size)
    config = replace(load_checkpoint(model).config, activation=activation)
    model = changed(model, config=config)
    code, out, err = export(model)
    assert (code, err) == (0, "")
    target = tmp_path / "model.onnx"
    assert out.startswith(f"{target}: {target.stat().st_size / 1e6:.1f} MB, opset ")
    assert "equal to PyTorch in ONNX Runtime up to " in out
    assert out.count("\n") == 1

    session = open_session(target)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["batch", 3, size, size])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 7])
    network = Classifier(str(model), device="cpu").network
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = network(images).numpy()
        np.testing.assert_allclose(session.run(None, {"image": images.numpy()})[0], expected, rtol=0, atol=1e-5)


def test_the_file_says_how_to_use_it(export, random_checkpoint, tmp_path):
    labels = ("plain", 'with "quotes" and, commas', "größer")
    model = changed(random_checkpoint(classes=3), name="Größe", labels=labels)
    assert export(model)[0] == 0
    checkpoint = load_checkpoint(model)
    metadata = open_session(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert set(metadata) == {"name", "labels", "preprocessing", "architecture"}
    assert metadata["name"] == "Größe"
    assert tuple(json.loads(metadata["labels"])) == labels
    assert Preprocessing.from_dict(json.loads(metadata["preprocessing"])) == checkpoint.preprocessing
    assert ConvMixerConfig(**json.loads(metadata["architecture"])) == checkpoint.config
    assert str(ROOT).encode() not in (tmp_path / "model.onnx").read_bytes()  # nothing about the machine


def test_the_shipped_model_answers_as_the_classifier_does(export, tmp_path, picture):
    if not MODELS[SHIPPED].shipped.exists():
        pytest.skip("the shipped weights are not in this checkout")
    assert export(SHIPPED)[0] == 0
    session, classifier = open_session(tmp_path / "model.onnx"), Classifier(SHIPPED, device="cpu")
    metadata = session.get_modelmeta().custom_metadata_map
    labels, preprocessing = (json.loads(metadata[key]) for key in ("labels", "preprocessing"))
    assert metadata["name"] == SHIPPED
    for image in (draw_sample(), picture(60, 45)):
        prepared = preprocess(image, Preprocessing.from_dict(preprocessing))[None]
        scores = torch.from_numpy(session.run(["logits"], {"image": prepared})[0]).softmax(dim=1)[0]
        predictions = classifier.classify(image)
        assert [labels[i] for i in scores.argsort(descending=True)[:5]] == [p.label for p in predictions]
        assert scores.max().item() == pytest.approx(predictions[0].score, abs=1e-5)


def test_it_is_silent_and_needs_onnx_only_when_it_exports(random_checkpoint, python, tmp_path):
    """In a process of its own, where torchvision, which the exporter likes to mention, is not installed."""
    code = """if True:
        import sys
        sys.modules["torchvision"] = None
        import convmixer.__main__, convmixer.export
        assert not {"onnx", "onnxscript", "onnxruntime"} & set(sys.modules)
        sys.exit(convmixer.__main__.main(sys.argv[1:]))
    """
    result = python("-c", code, "export", random_checkpoint(), "--to", tmp_path / "model.onnx")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    assert open_session(tmp_path / "model.onnx").get_inputs()


def test_other_weights_are_noticed(export, random_checkpoint, tmp_path):
    models = [random_checkpoint(seed) for seed in (0, 1)]
    assert export(models[0])[0] == 0
    content = (tmp_path / "model.onnx").read_bytes()
    same, other = (_difference(content, Classifier(str(model), device="cpu").network, 32) for model in models)
    assert same < 1e-5
    assert other > 1e-2


def test_without_onnx_runtime_it_says_that_nothing_was_checked(export, random_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    code, out, err = export(random_checkpoint())
    assert (code, err) == (0, "")
    assert "not checked, because onnxruntime is not installed" in out


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(export, random_checkpoint, monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = export(random_checkpoint())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "pip install 'convmixer[onnx]'" in err
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("model", "to", "parts"),
    [
        ("convmixer_768_23", "model.onnx", ["'convmixer_768_23'", "convmixer_768_32"]),
        ("no/such.safetensors", "model.onnx", ["no/such.safetensors"]),
        (SHIPPED, "model.pb", ["model.pb", ".onnx"]),
        (SHIPPED, "onnx", ["onnx: ", "must end in .onnx"]),
        (SHIPPED, "no/such/model.onnx", ["no/such", "does not exist"]),
        (SHIPPED, "folder.onnx", ["folder.onnx", "is a folder"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(export, tmp_path, model, to, parts):
    (tmp_path / "folder.onnx").mkdir()
    code, out, err = export(model, tmp_path / to)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Traceback" not in err
    assert all(part in err for part in parts), err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


def test_a_target_is_asked_for(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", SHIPPED])
    assert stop.value.code == 2
    assert "--to" in capsys.readouterr().err


def test_pictures_without_a_whole_patch_are_refused(export, random_checkpoint, tmp_path):
    model = changed(random_checkpoint(), preprocessing=Preprocessing(1))
    code, _, err = export(model)
    assert (code, err.count("\n")) == (2, 1)
    assert "1 pixels hold no patch of 2 pixels" in err
    assert not (tmp_path / "model.onnx").exists()


def test_more_than_one_file_can_hold_is_refused():
    _check_sizes(ConvMixerConfig(4096, 30), 224)
    with pytest.raises(ExportError, match="2 GiB"):
        _check_sizes(ConvMixerConfig(4096, 32), 224)


def test_what_was_there_survives_a_failure(export, random_checkpoint, tmp_path):
    """The disk takes no more than 8 KiB a file."""
    resource = pytest.importorskip("resource", reason="limits the size of files as Unix does")
    model, target = random_checkpoint(), tmp_path / "out" / "model.onnx"
    target.parent.mkdir()
    target.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        code, out, err = export(model, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "File too large" in err
    assert target.read_bytes() == b"before"
    assert [path.name for path in target.parent.iterdir()] == ["model.onnx"]
