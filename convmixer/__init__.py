"""ConvMixer ("Patches Are All You Need?", Trockman and Kolter, https://arxiv.org/abs/2201.09792), packaged.

from convmixer import Classifier
for prediction in Classifier().classify("dog.jpg"):
    print(prediction.label, prediction.score)

Each name is imported at its first use: who only decodes pictures does not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .classifier import Classifier, Prediction
    from .config import ConvMixerConfig
    from .images import ImageError, load_image
    from .model import ConvMixer, build
    from .preprocessing import Preprocessing
    from .weights import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
    from .zoo import ModelError

__version__ = "1.0.0"
__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Classifier",
    "ConvMixer",
    "ConvMixerConfig",
    "ImageError",
    "ModelError",
    "Prediction",
    "Preprocessing",
    "build",
    "load_checkpoint",
    "load_image",
    "save_checkpoint",
]

_MODULES = {
    "classifier": ("Classifier", "Prediction"),
    "images": ("ImageError", "load_image"),
    "config": ("ConvMixerConfig",),
    "model": ("ConvMixer", "build"),
    "preprocessing": ("Preprocessing",),
    "weights": ("Checkpoint", "CheckpointError", "load_checkpoint", "save_checkpoint"),
    "zoo": ("ModelError",),
}


def __getattr__(name: str) -> object:
    """A name of __all__, or a module of _MODULES, imported now."""
    for module, names in _MODULES.items():
        if name == module or name in names:
            home = importlib.import_module(f".{module}", __name__)
            value = home if name == module else getattr(home, name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
