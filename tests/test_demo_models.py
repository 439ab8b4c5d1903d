"""The models of the demo: which can answer, which could be fetched, and visitors' own checkpoints."""

import os

import pytest
import torch

from convmixer import CheckpointError, ModelError, zoo
from convmixer.model import ConvMixer, ConvMixerConfig
from convmixer.preprocessing import Preprocessing
from convmixer.weights import Checkpoint, save_checkpoint
from demo.models import MAX_OWN, Models, multiplications

SHIPPED = "convmixer_256_8_cifar10"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COG_WEIGHTS", raising=False)


def write_checkpoint(path, size=32, **architecture):
    config = ConvMixerConfig(
        **{"dim": 4, "depth": 1, "kernel_size": 3, "patch_size": 2, "num_classes": 2} | architecture
    )
    labels = tuple(f"label {number}" for number in range(config.num_classes))
    state_dict = ConvMixer(config).state_dict()
    save_checkpoint(path, Checkpoint("costly", config, state_dict, labels, Preprocessing(size), {}, {}))
    return path


def test_without_files_the_shipped_model_answers_and_the_others_could_be_fetched():
    models = Models()
    assert models.default == SHIPPED and models.names() == [SHIPPED]
    assert {row["name"] for row in models.missing()} == {name for name in zoo.MODELS if name != SHIPPED}
    sizes = [row["parameters"] for row in models.missing()]
    assert sizes == sorted(sizes)
    assert models.get("auto") is models.get(SHIPPED)
    assert models.describe(SHIPPED) == f"{SHIPPED} · 10 classes, 94.4 % right"


def test_the_first_file_is_the_default_and_equal_names_are_told_apart(random_checkpoint):
    first, second = random_checkpoint(seed=0), random_checkpoint(seed=1)
    models = Models([str(first), str(second), SHIPPED])
    assert models.default == "random" and models.names() == ["random", SHIPPED, "random (2)"]
    weights = [models.get(name).network.head.weight for name in ("random", "random (2)")]
    assert not torch.equal(*weights)
    assert models.describe("random (2)") == "random (2) · 10 classes"


def test_a_file_that_is_not_there_and_a_name_that_is_none_are_said_at_the_start(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing\.safetensors"):
        Models([str(tmp_path / "missing.safetensors")])
    with pytest.raises(ModelError, match="did you mean convmixer_768_32"):
        Models(["convmixer_768_23"])


def test_weights_that_have_come_into_the_cache_can_answer(random_checkpoint, monkeypatch):
    entry = zoo.ModelEntry("tiny", ConvMixerConfig(16, 2, 5, 2, 10), Preprocessing(32), {}, "ada/tiny", "http://a.b/x")
    monkeypatch.setitem(zoo.MODELS, "tiny", entry)
    models = Models()
    assert "tiny" not in models.names() and "tiny" in [row["name"] for row in models.missing()]
    zoo.cache_dir().mkdir()
    random_checkpoint().rename(zoo.cache_dir() / "tiny.safetensors")
    assert models.names() == [SHIPPED, "tiny"]
    assert "tiny" not in [row["name"] for row in models.missing()]


@pytest.mark.parametrize("name", ["convmixer_768_32", "nonsense", "../../etc/passwd", ""])
def test_a_model_that_is_not_here_is_neither_fetched_nor_opened(name):
    with pytest.raises(ModelError, match=f"is not on this machine; choose one of {SHIPPED}"):
        Models().get(name)
    assert not zoo.cache_dir().exists()


def test_an_own_checkpoint_answers_its_owner_only(random_checkpoint, picture):
    models = Models()
    own = models.add_own(random_checkpoint(), "mine.safetensors")
    assert own.name == "yours: random"
    assert models.get(own.name, [own]).classify(picture())[0].label.startswith("label ")
    with pytest.raises(ModelError):
        models.get(own.name)
    assert own.name not in models.names()


def test_own_checkpoints_of_one_name_are_told_apart(random_checkpoint):
    models = Models()
    first = models.add_own(random_checkpoint(seed=0), "mine.safetensors")
    second = models.add_own(random_checkpoint(seed=1), "mine.safetensors", [first])
    assert (first.name, second.name) == ("yours: random", "yours: random (2)")
    weights = [models.get(own.name, [first, second]).network.head.weight for own in (first, second)]
    assert not torch.equal(*weights)


def test_few_own_checkpoints_stay_in_memory_and_a_deleted_one_is_asked_for_again(random_checkpoint):
    models = Models()
    owns = [models.add_own(random_checkpoint(seed), "mine.safetensors") for seed in range(MAX_OWN + 1)]
    kept = models.get(owns[1].name, [owns[1]])
    assert models.get(owns[1].name, [owns[1]]) is kept
    os.remove(owns[0].path)
    os.remove(owns[1].path)
    assert models.get(owns[1].name, [owns[1]]) is kept  # still in memory
    with pytest.raises(CheckpointError, match="upload it again"):
        models.get(owns[0].name, [owns[0]])


def test_what_is_no_checkpoint_is_named_as_the_visitor_calls_it(tmp_path):
    path = tmp_path / "0123abc.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError) as caught:
        Models().add_own(path, "mine.safetensors")
    assert str(caught.value).startswith("mine.safetensors ") and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("size, architecture", [(4096, {"patch_size": 1}), (4096, {"patch_size": 2, "dim": 64})])
def test_a_small_file_that_asks_for_much_is_refused_before_it_runs(tmp_path, size, architecture):
    path = write_checkpoint(tmp_path / "costly.safetensors", size, **architecture)
    assert path.stat().st_size < 200_000
    with pytest.raises(CheckpointError, match=r"costly\.safetensors needs too much .*command line"):
        Models().add_own(path, "costly.safetensors")


def test_multiplications_are_those_of_the_convolutions():
    # per position: stem 3 * 2 * 2 * 4, depthwise 3 * 3 * 4, pointwise 4 * 4; biases and norms: 4 * (1 + 2) each
    config = ConvMixerConfig(4, 1, kernel_size=3, patch_size=2, num_classes=2)
    assert multiplications(config, side=16) == 16**2 * (48 + 36 + 16 + 3 * 12)


def test_the_largest_published_model_is_within_the_limits():
    from demo.models import MAX_MULTIPLICATIONS, MAX_VALUES

    config, side = zoo.MODELS["convmixer_1536_20"].config, 224 // 7
    assert multiplications(config, side) < MAX_MULTIPLICATIONS and config.dim * side**2 < MAX_VALUES
