"""Draws docs/answer.png: the sample picture, the shipped model's answer, and its heat map.

python docs/answer.py
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from convmixer import Classifier  # noqa: E402
from convmixer.__main__ import percent  # noqa: E402
from convmixer.sample import draw_sample  # noqa: E402

INK, GREY, BAR, PAPER = (32, 36, 44), (110, 116, 126), (225, 95, 35), (255, 255, 255)
WIDTH, HEIGHT, MARGIN, GAP = 1600, 440, 40, 40


def main() -> None:
    classifier = Classifier("convmixer_256_8_cifar10")
    picture = draw_sample()
    predictions, heatmap = classifier.classify_with_heatmap(picture)
    sheet = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(sheet)
    title, text = ImageFont.load_default(26), ImageFont.load_default(24)

    top = 64
    sheet.paste(picture, (MARGIN, top))
    draw.text((MARGIN, 20), "picture", INK, title)
    left = MARGIN + picture.width + GAP
    draw.text((left, 20), f"answer of {classifier.name}", INK, title)
    for row, prediction in enumerate(predictions):
        y = top + 14 + 68 * row
        draw.text((left, y), prediction.label, INK, text)
        draw.text((left + 400, y), percent(prediction.score), GREY, text, anchor="ra")
        draw.rectangle((left, y + 34, left + 400, y + 44), (238, 239, 241))
        draw.rectangle((left, y + 34, left + max(2, round(400 * prediction.score)), y + 44), BAR)
    right = WIDTH - MARGIN - picture.width
    draw.text((right, 20), f"where it saw {heatmap.label}", INK, title)
    sheet.paste(heatmap.overlay(), (right, top))
    sheet.save(ROOT / "docs" / "answer.png", optimize=True)


if __name__ == "__main__":
    main()
