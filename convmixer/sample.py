"""A picture that the project draws, so that everything can be tried without a file."""

from PIL import Image, ImageDraw


def draw_sample() -> Image.Image:
    """A ship on the sea, RGB, 480 x 360 pixels."""
    scale = 4  # drawn larger and reduced: Pillow's shapes have hard edges
    image = Image.new("RGB", (480 * scale, 360 * scale))
    draw = ImageDraw.Draw(image)

    def shape(points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        draw.polygon([(x * scale, y * scale) for x, y in points], fill=colour)

    for y in range(360 * scale):
        share = y / (360 * scale)
        sky, sea = (
            (150 + 70 * share, 185 + 50 * share, 225 + 10 * share),
            (45 - 20 * share, 95 - 40 * share, 135 - 45 * share),
        )
        draw.line([(0, y), (480 * scale, y)], fill=tuple(round(value) for value in (sky if share < 0.6 else sea)))
    shape([(70, 190), (420, 180), (395, 250), (105, 250)], (60, 62, 72))  # hull
    shape([(70, 190), (420, 180), (418, 192), (75, 201)], (225, 225, 228))
    shape([(99, 240), (400, 238), (395, 250), (105, 250)], (140, 45, 40))  # red below the waterline
    shape([(280, 130), (385, 128), (390, 184), (276, 187)], (235, 235, 236))  # bridge
    shape([(300, 95), (360, 94), (362, 130), (298, 131)], (220, 222, 226))
    shape([(318, 60), (344, 60), (346, 95), (316, 95)], (190, 60, 45))  # funnel
    for x in range(290, 380, 15):
        shape([(x, 145), (x + 8, 145), (x + 8, 155), (x, 155)], (70, 95, 120))
    for x, colour in zip(
        range(110, 265, 26), [(170, 75, 50), (65, 105, 145), (185, 150, 70), (75, 125, 90)] * 2, strict=False
    ):
        shape([(x, 158), (x + 24, 158), (x + 24, 188), (x, 188)], colour)  # containers
    shape([(92, 110), (96, 110), (97, 190), (91, 190)], (110, 110, 115))  # mast
    for y in (258, 275, 300, 330):
        for x in range(-20, 480, 70):
            start = x + (y * 37) % 60
            shape([(start, y), (start + 34, y - 1), (start + 36, y + 1), (start + 2, y + 2)], (95, 145, 175))
    return image.resize((480, 360), Image.Resampling.LANCZOS)
