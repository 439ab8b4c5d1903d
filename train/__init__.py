"""Training and evaluation of ConvMixer: ``train/run.py`` and ``train/evaluate.py`` are the commands."""
