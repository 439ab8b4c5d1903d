"""Export to ONNX: the file alone, in ONNX Runtime, gives what the classifier gives."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, write_checkpoint

from convmixer import Classifier, ConvMixerConfig, Preprocessing
from convmixer.__main__ import main
from convmixer.export import ExportError, _check_sizes, _difference
from convmixer.preprocessing import preprocess

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime runs what was exported")
pytest.importorskip("onnxscript", reason="the exporter needs it")

# torchvision, which the exporter likes to mention, need not be installed.
EXPORT = "import sys; sys.modules['torchvision'] = None; from convmixer.__main__ import main; sys.exit(main())"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The checkpoint, and the file that a process of its own has made of it."""
    folder = tmp_path_factory.mktemp("exported")
    model, target = write_checkpoint(folder, name="größer"), folder / "model.onnx"
    command = [sys.executable, "-c", EXPORT, "export", str(model), "--to", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert done.stdout.startswith(f"{target}: {target.stat().st_size / 1e6:.1f} MB, opset ")
    assert "equal to PyTorch in ONNX Runtime up to " in done.stdout
    return model, target


def assert_answers_as(model, content, picture):
    classifier = Classifier(model, device="cpu")
    size = classifier.preprocessing.size
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["batch", 3, size, size])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["name"] == classifier.name and tuple(json.loads(metadata["labels"])) == classifier.labels
    assert ConvMixerConfig(**json.loads(metadata["architecture"])) == classifier.config
    preprocessing = Preprocessing.from_dict(json.loads(metadata["preprocessing"]))
    for batch in (1, 2, 5):
        pictures = [picture(60, 45, seed) for seed in range(batch)]
        prepared = np.stack([preprocess(each, preprocessing) for each in pictures])
        found = session.run(["logits"], {"image": prepared})[0]
        np.testing.assert_allclose(found, classifier.logits(pictures), rtol=0, atol=1e-5)


def test_the_file_alone_answers_as_the_classifier_does(exported, random_checkpoint, picture):
    model, content = exported[0], exported[1].read_bytes()
    assert str(ROOT).encode() not in content  # nothing about the machine
    assert_answers_as(model, content, picture)
    assert _difference(content, Classifier(model, device="cpu").network, 32) < 1e-5
    assert _difference(content, Classifier(random_checkpoint(seed=1), device="cpu").network, 32) > 1e-2


def test_without_onnx_runtime_nothing_is_checked(call_main, random_checkpoint, monkeypatch, tmp_path, picture):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    model = random_checkpoint(size=33, activation="relu")
    code, out, err = call_main(main, "export", model, "--to", tmp_path / "model.onnx")
    assert (code, err) == (0, "") and "not checked, because onnxruntime is not installed" in out
    assert_answers_as(model, (tmp_path / "model.onnx").read_bytes(), picture)


@pytest.mark.parametrize(
    ("model", "to", "line"),
    [
        ("convmixer_768_23", "model.onnx", "did you mean convmixer_768_32"),
        ("auto", "model.pb", "must end in .onnx"),
        ("auto", "no/such/model.onnx", "no/such does not exist"),
        ("auto", "folder.onnx", "folder.onnx: is a folder"),
        ("auto", "before.onnx", "pip install 'convmixer[onnx]'"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(call_main, monkeypatch, tmp_path, model, to, line):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "before.onnx").write_bytes(b"before")
    if to == "before.onnx":
        monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, out, err = call_main(main, "export", model, "--to", tmp_path / to)
    assert (code, out, err.count("\n")) == (2, "", 1) and line in err
    assert len([*tmp_path.iterdir()]) == 2 and (tmp_path / "before.onnx").read_bytes() == b"before"


def test_what_fits_no_file_and_pictures_without_a_whole_patch_are_refused():
    with pytest.raises(ExportError, match="2 GiB"):
        _check_sizes(ConvMixerConfig(4096, 32), 224)
    with pytest.raises(ExportError, match="1 pixels hold no patch of 2 pixels"):
        _check_sizes(ConvMixerConfig(8, 1, 3, 2), 1)
