"""Heat maps as the page gets them: small grids for heat.js to paint, and what they show in words."""

import base64
from collections.abc import Sequence

import numpy as np
from PIL import Image

from convmixer import Prediction
from convmixer.explain import HeatMap
from demo.words import evidence

MAX_SIDE = 48  # values a grid is sent with; a finer one is averaged


def grids(predictions: Sequence[Prediction], maps: Sequence[HeatMap]) -> dict:
    """An answer's maps: rows, columns, and by class index {"grid": ..., "words": ...}.

    A grid is base64 of int8, row by row; 127 is the largest absolute value of all the maps, so that classes compare.
    """
    values = [_at_most(heatmap.values) for heatmap in maps]
    largest = max(float(abs(each).max()) for each in values) or 1
    rows, columns = values[0].shape
    by_class = {
        str(heatmap.index): {
            "grid": base64.b64encode(np.int8(np.rint(127 / largest * each)).tobytes()).decode(),
            "words": evidence(prediction.score, heatmap),
        }
        for prediction, heatmap, each in zip(predictions, maps, values, strict=True)
    }
    return {"rows": rows, "columns": columns, "maps": by_class}


def _at_most(values: np.ndarray) -> np.ndarray:
    """A map (h, w) with no more than MAX_SIDE values a side."""
    rows, columns = (min(MAX_SIDE, side) for side in values.shape)
    if values.shape == (rows, columns):
        return values
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((columns, rows), Image.Resampling.BOX))
