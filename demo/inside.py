"""Look inside: a network's filters, and what becomes of a picture on its way through the blocks."""

from collections.abc import Sequence

from convmixer import Classifier, sheets
from demo import render
from demo.answers import Answers, Picture
from demo.models import Own

VIEWS = BLOCKS, PATCHES, DEPTHWISE = "Block by block", "Patch filters", "Depthwise filters"


def look(answers: Answers, picture: Picture, model: str, own: Sequence[Own], view: str, block: int) -> str:
    """One of VIEWS of a model as HTML; picture: one that could be answered; block: 1 to the network's depth."""
    classifier = answers.classifier(model, own)
    if view == PATCHES:
        return patches(classifier)
    if view == DEPTHWISE:
        return depthwise(classifier, block)
    return blocks(classifier, answers.source(picture), block)


def patches(classifier: Classifier) -> str:
    """The first layer's filters, as HTML."""
    side, dim = classifier.config.patch_size, classifier.config.dim
    caption = (
        f"The network first cuts the picture into patches of {side} × {side} pixels and compares each with these "
        f"{dim:,} filters."
    )
    return render.sheet(
        sheets.patch_filters(classifier.weights["stem.0.weight"]), f"{dim:,} patch-embedding filters", caption
    )


def depthwise(classifier: Classifier, block: int) -> str:
    """The depthwise filters of one block, as HTML."""
    side, dim = classifier.config.kernel_size, classifier.config.dim
    caption = (
        f"In block {block} each of {dim:,} channels looks around itself through one of these windows of "
        f"{side} × {side} patches: orange adds, blue takes away."
    )
    alt = f"{dim:,} depthwise filters of block {block}"
    filters = classifier.weights[f"blocks.{block - 1}.0.fn.0.weight"]
    return render.sheet(sheets.depthwise_filters(filters), alt, caption)


def blocks(classifier: Classifier, source, block: int) -> str:
    """The picture's features after the first layer and each block, and the strongest channels of one block."""
    features = classifier.features(source)
    maps = render.blocks(
        sheets.feature_maps(features),
        block,
        features[0].shape[-1],
        "Places of the same colour look the same to the network, block after block: point at one to find it in all of "
        "them, and press a block to see its channels.",
    )
    strongest = sheets.strongest_channels(features[block], columns=8)
    alt = f"The 16 strongest channels after block {block}"
    caption = f"The 16 channels that have most to say about this picture after block {block}, bright where they say it."
    return maps + render.sheet(strongest, alt, caption)
