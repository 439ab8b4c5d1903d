"""ConvMixer ("Patches Are All You Need?", Trockman and Kolter, https://arxiv.org/abs/2201.09792), packaged.

from convmixer import Classifier
for prediction in Classifier().classify("dog.jpg"):
    print(prediction.label, prediction.score)
"""

from .classifier import Classifier, Prediction
from .images import ImageError, load_image
from .model import ConvMixer, ConvMixerConfig, build
from .preprocessing import Preprocessing
from .weights import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from .zoo import ModelError

__version__ = "0.1.0"
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
