"""Example pictures for the demo, drawn by the program itself: nothing to download, nobody else's rights.

An outline is written as "x,y x,y ..." in pixels of the picture, a string, so that it stays on few lines.
"""

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageOps

from convmixer.sample import draw_sample

SIZE = 480, 360
FINE = 4  # outlines are drawn larger and reduced: Pillow's shapes have hard edges


def draw_examples() -> dict[str, Image.Image]:
    """RGB pictures of 480 x 360 pixels by the name of what they show, in display order."""
    return {
        "ship": draw_sample(),
        "cat": draw_cat(),
        "airplane": draw_airplane(),
        "horse": draw_horse(),
        "truck": draw_truck(),
        "bird": draw_bird(),
    }


def straight(text: str) -> np.ndarray:
    return np.array([point.split(",") for point in text.split()], float)


def curve(text: str, closed: bool = True) -> np.ndarray:
    """A smooth line through the points (cubic Hermite); a point that is given twice is a corner."""
    points = straight(text)
    before, after = np.roll(points, 1, 0), np.roll(points, -1, 0)
    if not closed:
        before[0], after[-1] = points[0], points[-1]
    slope = (after - before) / 2
    slope[(points == before).all(1) | (points == after).all(1)] = 0
    t = np.linspace(0, 1, 8, endpoint=False)[:, None]
    ends = np.roll(points, -1, 0), np.roll(slope, -1, 0)
    parts = [
        a + (b - a) * t**2 * (3 - 2 * t) + u * t * (1 - t) ** 2 - v * t**2 * (1 - t)
        for a, u, b, v in zip(points, slope, *ends, strict=True)
    ]
    return np.concatenate(parts if closed else [*parts[:-1], points[-1:]])


def stroke(text: str) -> np.ndarray:
    """A smooth band along the points of "x,y,width ..."."""
    line, width = np.split(curve(text, closed=False), [2], axis=1)
    along = np.gradient(line, axis=0)
    across = along[:, ::-1] * (-1, 1) / np.maximum(np.hypot(*along.T), 1e-6)[:, None] * width / 2
    return np.concatenate([line + across, (line - across)[::-1]])


def ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0) -> np.ndarray:
    t, turn = np.linspace(0, 2 * np.pi, 48, endpoint=False), np.radians(degrees)
    circle = np.stack([rx * np.cos(t), ry * np.sin(t)], 1)
    return circle @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]] + (x, y)


def gradient(size: tuple[int, int], top: str, bottom: str) -> Image.Image:
    rows = np.linspace(ImageColor.getrgb(top), ImageColor.getrgb(bottom), size[1]).round().astype(np.uint8)
    return Image.fromarray(np.repeat(rows[:, None], size[0], axis=1))


def coverage(outline: np.ndarray, box: tuple[int, int, int, int], fine: int = FINE) -> Image.Image:
    """How much of each pixel in the box lies inside the outline, 0 to 255."""
    mask = Image.new("L", ((box[2] - box[0]) * fine, (box[3] - box[1]) * fine))
    ImageDraw.Draw(mask).polygon(((outline - box[:2]) * fine).ravel().tolist(), fill=255)
    return mask.reduce(fine)


def paint(image, outline, top: str, bottom: str = "", soft: float = 0, opacity: float = 1, within=None) -> None:
    """Fill an outline (text: a curve) from one colour to another, ``soft`` at its edge, cut off by ``within``."""
    outline = curve(outline) if isinstance(outline, str) else outline
    corners = np.stack([outline.min(0) - 3 * soft - 1, outline.max(0) + 3 * soft + 1])
    box = tuple(np.clip(corners, 0, SIZE).astype(int).ravel().tolist())
    mask = coverage(outline, box, 1 if soft > 2 else FINE)  # a wide blur hides the steps, and a large mask is slow
    if soft:
        mask = mask.filter(ImageFilter.GaussianBlur(soft))
    if within is not None:
        mask = ImageChops.multiply(mask, coverage(within, box))
    if opacity < 1:
        mask = mask.point([round(value * opacity) for value in range(256)])
    image.paste(gradient(mask.size, top, bottom or top), box[:2], mask)


def clouds(image: Image.Image, *places: tuple[float, float, float]) -> None:
    """Soft puffs on a flat base at each (x, y, size)."""
    for x, y, size in places:
        for dx, dy, rx, ry in ((-34, 4, 26, 9), (-12, -5, 24, 15), (14, -9, 26, 19), (38, 3, 28, 10), (0, 8, 62, 7)):
            puff = ellipse(x + dx * size, y + dy * size, rx * size, ry * size)
            paint(image, puff, "#ffffff", "#e9f0f5", soft=4 * size, opacity=0.75)


def countryside() -> Image.Image:
    image = gradient(SIZE, "#93c0ea", "#f6f2e4")
    clouds(image, (90, 70, 1), (420, 48, 0.7))
    paint(image, "-40,190 60,160 150,176 260,158 380,178 520,150 520,300 -40,300", "#9fbcae", "#a9c49a", soft=1)
    for x, y, r in ((8, 196, 24), (38, 200, 17), (66, 203, 11), (418, 200, 15), (444, 196, 22), (478, 194, 26)):
        paint(image, ellipse(x, y, r * 1.15, r), "#7da26c", "#527a4c", soft=1.5)
    paint(image, "-60,212 120,203 300,208 540,200 540,400 -60,400", "#b4cd80", "#5f8f45")
    return image


def draw_airplane() -> Image.Image:
    """An airliner climbing above the clouds."""
    image = gradient(SIZE, "#4d8fd0", "#dcedf6")
    clouds(image, (85, 62, 0.8), (405, 56, 0.7), (20, 330, 1.6), (150, 342, 1.9), (300, 338, 1.5), (440, 322, 2))
    clouds(image, (240, 362, 2.2), (370, 364, 1.8))
    paint(image, straight("249,159 292,152 211,112 195,112"), "#9fb2c4", "#bccad6")  # far wing
    paint(image, "93,183 93,183 58,116 58,116 89,111 89,111 124,150 148,163 173,169 173,169", "#17447f", "#3273bd")
    paint(image, straight("76,147 104,127 114,138 83,163"), "#e0a63c")
    body = curve("416,158 392,142 350,140 250,155 161,169 80,181 85,189 150,202 217,204 300,196 376,183 411,168")
    paint(image, body, "#ffffff", "#e6ecf2")
    paint(image, "76,204 166,198 256,192 345,180 436,155 420,204 262,229 81,238", "#6d839b", soft=6, within=body)
    paint(image, straight("105,198 164,190 343,164 422,151 422,156 344,170 165,195"), "#2f6cb4", within=body)
    for x in range(150, 372, 10):
        paint(image, ellipse(x, 210 - 0.16 * x, 2.4, 3.6, -9), "#33465c")
    paint(image, "384,143 384,143 396,146 404,151 404,151 388,154 388,154", "#2a3b50")  # cockpit
    paint(image, straight("109,187 153,181 98,221 83,223"), "#c3cfda", "#92a5b8")  # near tailplane
    paint(image, "243,224 251,215 281,208 303,208 307,219 307,231 285,237 257,234", "#f7f9fb", "#8294a8")  # engine
    paint(image, ellipse(305, 219, 4.5, 11, -9), "#2c3a4c")
    paint(image, straight("268,200 280,199 281,210 265,213"), "#7f93a8")
    paint(image, "224,194 224,194 309,180 309,180 280,202 205,283 183,293 183,293", "#d7dfe7", "#9fb1c3")
    paint(image, "309,180 309,180 280,202 205,283 195,291 198,284 270,203 293,183 293,183", "#ffffff", "#d4dde5")
    return image


def draw_truck() -> Image.Image:
    """A box truck on a country road."""
    image = ImageOps.mirror(countryside())
    paint(image, straight("0,262 480,262 480,360 0,360"), "#cdc6ae", "#bdb59c")
    paint(image, straight("0,270 480,270 480,360 0,360"), "#868990", "#55585f")
    for x in range(-30, 480, 110):
        paint(image, straight(f"{x},332 {x + 60},332 {x + 54},340 {x - 8},340"), "#f0ebda")
    paint(image, ellipse(232, 303, 180, 8), "#17191d", soft=5, opacity=0.75)
    paint(image, straight("78,252 390,252 390,280 78,280"), "#3a3d44", "#24262b")  # chassis
    box = straight("72,108 284,108 284,258 72,258")
    paint(image, box, "#ffffff", "#d9dad8")
    for y, top, bottom in ((0, "#efb64a", "#dd9a33"), (22, "#d8553a", "#b53c29")):
        band = curve("60,222 130,216 200,186 300,168 300,192 205,208 140,238 60,246") + np.array([0, y])
        paint(image, band, top, bottom, within=box)
    paint(image, straight("50,236 300,236 300,275 50,275"), "#4a4f58", soft=9, opacity=0.35, within=box)
    for line in ("72,108 284,108 284,113 72,113", "72,108 76,108 76,258 72,258", "280,108 284,108 284,258 280,258"):
        paint(image, straight(line), "#c3c8cc", "#a4a9ae")
    cab = curve("290,152 290,152 297,141 344,140 355,146 375,191 389,199 396,214 398,270 398,270 290,270 290,270")
    paint(image, cab, "#e2603f", "#a83424")
    paint(image, straight("280,238 410,238 410,280 280,280"), "#5e1a12", soft=8, opacity=0.6, within=cab)
    window = curve("304,154 304,154 308,151 344,151 350,154 367,194 367,194 304,196 304,196")
    paint(image, window, "#dcecf5", "#6f93ad")
    paint(image, straight("320,145 334,145 318,200 300,200"), "#ffffff", opacity=0.45, within=window)
    for line in ("344,148 348,148 363,200 363,238 361,238 361,200", "299,150 301,150 301,252 299,252"):
        paint(image, straight(line), "#7c2619", within=cab)
    paint(image, straight("306,210 320,210 320,214 306,214"), "#7c2619")
    paint(image, straight("366,174 374,174 374,196 366,196"), "#2d3036", "#17191d")  # mirror
    paint(image, ellipse(392, 224, 5, 8), "#fff6d2", "#f2d27a")
    paint(image, ellipse(343, 272, 32, 30), "#3b120c", within=cab)
    paint(image, straight("380,262 404,262 404,279 380,279"), "#4a4e55", "#2a2c31")  # bumper
    for x in (130, 190, 343):
        for r, top, bottom in ((27, "#3f4249", "#1b1c20"), (14, "#eceff2", "#9ea3aa"), (5, "#6a6e76", "#44474d")):
            paint(image, ellipse(x, 278, r, r), top, bottom)
    return image


def draw_horse() -> Image.Image:
    """A chestnut horse in a meadow."""
    image = countryside()
    paint(image, ellipse(238, 322, 118, 8), "#28401c", soft=6, opacity=0.65)
    hind = "175,205 222,225 207,244 192,268 190,282 191,294 199,313 199,313 186,313 186,313 180,288 172,262 176,250"
    fore = "290,210 318,205 325,228 324,248 328,272 326,286 334,313 334,313 321,313 321,313 317,300 318,286 310,260"
    for leg in (hind, fore):  # the far ones
        paint(image, leg, "#7c4526", "#4a2815")
    paint(image, "150,160 136,155 121,170 108,240 116,282 116,282 128,262 134,230 138,200", "#54301a", "#2a170c")
    body = curve(
        "337,88 352,95 366,116 386,141 391,152 387,161 376,164 362,157 350,154 341,158 334,172 329,188 323,206 "
        "314,226 308,244 304,262 304,272 300,286 301,300 306,308 307,313 307,313 294,313 294,313 290,300 292,286 "
        "290,274 287,262 283,248 275,239 245,242 212,235 194,229 186,241 175,254 166,266 163,280 162,294 166,304 "
        "170,313 170,313 157,313 157,313 153,301 152,288 148,274 142,260 146,248 143,234 136,214 132,194 134,176 "
        "147,161 172,154 205,159 240,160 268,148 292,122 312,98"
    )
    paint(image, body, "#c57d45", "#7a4526")
    belly, rump = "150,232 212,222 250,230 300,214 318,232 280,262 200,262", "126,150 142,150 142,200 152,250 126,250"
    for shadow in (belly, rump, "304,140 332,150 324,210 310,200"):
        paint(image, shadow, "#4e2a14", soft=7, opacity=0.5, within=body)
    for light in (ellipse(195, 170, 55, 10), ellipse(290, 172, 16, 26, 25)):
        paint(image, light, "#e8a46b", soft=8, opacity=0.6, within=body)
    paint(image, "356,98 372,118 392,142 388,150 376,132 362,112", "#f3e6d6", soft=0.8, within=body)
    for x in (157, 294):
        sock = straight(f"{x - 9},296 {x + 20},292 {x + 20},313 {x - 9},313")
        paint(image, sock, "#f1e6d8", "#d3c4b2", within=body)
    for x in (157, 186, 294, 321):
        paint(image, straight(f"{x - 1},312 {x + 13},312 {x + 18},323 {x - 2},323"), "#43302a", "#221814")
    mane = "344,92 334,82 316,88 298,108 280,134 264,150 264,162 272,167 286,162 300,146 312,132 322,112 334,98"
    paint(image, mane, "#5a341c", "#33190c")
    paint(image, "330,92 330,92 335,64 335,64 346,82 345,93 345,93", "#b06c39", "#8a4f2a")  # ear
    paint(image, "338,84 348,88 358,106 358,106 348,102", "#5a341c", "#33190c")
    paint(image, ellipse(355, 114, 3.8, 3.2), "#1c0f08")
    paint(image, ellipse(356, 113, 1, 1), "#ffffff")
    paint(image, ellipse(384, 151, 2.4, 1.7, 40), "#3a1f10")
    for x, y in ((i * 83 % 480, 318 + i * 29 % 38) for i in range(60)):  # grass, scattered the same every time
        paint(image, stroke(f"{x},{y},2.4 {x + 1},{y - 7},1.8 {x + 3 - y % 7},{y - 13},0.5"), "#8fb862", "#4f7c39")
    return image


def draw_bird() -> Image.Image:
    """A robin on a branch."""
    image = gradient(SIZE, "#d9ebc6", "#6f9f74")
    blots = ((50, 60, 46, "#f4f6d8"), (150, 150, 30, "#eef3cf"), (420, 90, 58, "#bddba6"), (350, 30, 34, "#f1f5d4"))
    for x, y, r, colour in (*blots, (400, 250, 70, "#5e8f66"), (60, 260, 60, "#7fae7a"), (220, 350, 70, "#568760")):
        paint(image, ellipse(x, y, r, r), colour, soft=10, opacity=0.65)
    paint(image, stroke("330,296,6 380,262,5 420,246,4 456,222,2"), "#86684c", "#5d4632")
    branch = stroke("-10,322,22 100,312,20 220,303,19 330,297,15 420,290,10 500,272,7")
    paint(image, branch, "#94755a", "#5a4330")
    paint(image, branch + np.array([0, 7]), "#3a2a1d", soft=3, opacity=0.6, within=branch)
    for x, y, dx, dy in ((452, 225, 24, -20), (424, 244, 29, 13), (392, 257, 8, -31), (36, 322, 21, 25)):
        leaf = f"{x},{y},1 {x + dx * 0.2},{y + dy * 0.2},10 {x + dx * 0.5},{y + dy * 0.5},14 {x + dx},{y + dy},0"
        paint(image, stroke(leaf), "#9cc65f", "#5f9244")
        paint(image, stroke(f"{x},{y},2 {x + dx * 0.9},{y + dy * 0.9},0.5"), "#d3e6a0", opacity=0.7)
    paint(image, "150,232 120,276 84,322 84,322 92,332 104,332 104,332 140,296 180,262", "#6f5a44", "#45372a")
    for x in (229, 257):
        paint(image, stroke(f"{x - 5},270,6 {x - 3},284,4 {x},298,4"), "#5a3d2b")
        paint(image, stroke(f"{x - 11},303,2 {x - 6},297,4 {x + 8},297,4 {x + 13},303,2"), "#4f3525")
    paint(image, "294,119 294,119 312,124 332,136 332,136 312,140 298,143 298,143", "#6a6055", "#35302b")  # bill
    body = curve("303,136 298,112 284,94 256,85 228,100 206,140 166,200 130,262 160,279 224,287 286,246 306,178")
    paint(image, body, "#927a5d", "#7d6850")
    paint(image, "300,205 262,236 210,250 150,268 150,300 270,300 310,240", "#f5eee2", "#c9bca8", soft=6, within=body)
    breast = "312,104 290,102 270,110 258,130 256,156 244,184 240,212 252,232 276,236 300,220 320,180"
    paint(image, breast, "#ee8236", "#d4591f", soft=2.5, within=body)
    paint(image, "250,84 282,84 240,110 190,190 180,180 210,120", "#b89d7c", soft=6, opacity=0.6, within=body)
    paint(image, "310,150 316,200 250,284 250,300 330,300 330,150", "#7a3a18", soft=8, opacity=0.45, within=body)
    wing = curve("236,158 220,150 200,164 176,198 148,240 112,288 112,288 140,280 184,262 222,238 242,208 246,180")
    paint(image, wing + np.array([3, 5]), "#3a2c1e", soft=4, opacity=0.5, within=body)
    paint(image, wing, "#7d664d", "#46382b")
    paint(image, "236,160 222,152 202,166 186,192 200,208 228,204 242,186", "#957c5f", "#7a644b", soft=2, within=wing)
    for x, y in ((192, 216), (209, 222), (226, 225)):
        feather = stroke(f"{x},{y},1 {x / 2 + 60},{y / 2 + 140},2.6 {x / 4 + 74},277,1")
        paint(image, feather, "#a58c6d", within=wing)
    for x, y, r, colour in ((280, 121, 8, "#bb5f24"), (280, 121, 6.5, "#17110c"), (282, 118.5, 2, "#ffffff")):
        paint(image, ellipse(x, y, r, r), colour)
    return image


def draw_cat() -> Image.Image:
    """A tabby cat that sits on a rug, from the front."""
    image = gradient(SIZE, "#ecdcc4", "#d9c09c")
    for x, y in ((x, y) for x in (24, 84, 330, 390) for y in (36, 118)):
        pane = straight(f"{x},{y} {x + 52},{y + 10} {x + 52},{y + 84} {x},{y + 74}")
        paint(image, pane, "#fff8e6", "#ffefcf", soft=2.5, opacity=0.6)
    paint(image, straight("0,272 480,272 480,281 0,281"), "#eadcc6")
    paint(image, straight("0,280 480,280 480,360 0,360"), "#b98f66", "#8f6a49")
    paint(image, ellipse(240, 332, 205, 26), "#4f7f88", "#3a636c")
    paint(image, ellipse(240, 331, 188, 21), "#6d9ea5", "#4f828b")
    paint(image, ellipse(246, 340, 120, 9), "#182a30", soft=6, opacity=0.7)
    fur, shade, stripe, white = "#a99d8e", "#7c7266", "#4c443b", "#f3ede3"
    tail = stroke("290,326,30 340,334,28 372,318,26 380,288,24 368,264,22 360,256,21 354,253,15 350,252,6 349,252,1")
    paint(image, tail, fur, shade)
    for band in ("330,310,10 336,350,10", "362,300,10 386,340,10", "362,294,10 400,288,10", "342,272,18 366,242,18"):
        paint(image, stroke(band), stripe, soft=1, within=tail)

    def both(outline: np.ndarray, *colours: str, **options) -> None:
        for side in (-1, 1):
            paint(image, outline * (side, 1) + (240, 0), *colours, **options)

    body = curve("240,170 284,190 308,236 322,284 324,320 306,339 240,342 174,339 156,320 158,284 172,236 196,190")
    paint(image, body, fur, shade)
    for y in (222, 246, 270):
        both(stroke(f"{y / 4 + 14},{y},8 {y / 4 - 7},{y + 4},6 38,{y + 12},1"), stripe, soft=0.8, within=body)
    both(ellipse(58, 306, 30, 36, 10), shade, soft=3, within=body)
    both(ellipse(56, 309, 30, 36, 10), "#9a8f82", "#857b6f", soft=3, within=body)
    both(ellipse(58, 337, 24, 9), white, "#cfc5b8")
    both(stroke("26,226,40 25,290,36 23,338,36"), "#a09586", "#8b8175", soft=1.5)
    both(ellipse(23, 336, 21, 11), white, "#d3c9bc")
    for x in (17, 29):
        both(stroke(f"{x},335,1.5 {x},345,1.5"), "#a0968a")
    paint(image, stroke("240,250,2 240,300,4 240,340,4"), stripe, soft=1.5, opacity=0.8)
    paint(image, "240,180 286,200 276,236 256,262 240,282 224,262 204,236 194,200", white, "#ddd3c6", soft=4)
    paint(image, ellipse(240, 196, 62, 16), stripe, soft=7, opacity=0.5, within=body)
    both(curve("12,80 12,80 38,46 64,27 71,29 77,48 80,76 78,106 78,106 40,110"), "#a3978a", "#8d8377")
    both(curve("32,78 32,78 48,54 64,41 68,45 70,64 68,94 68,94"), "#dcaa9c", "#a97b70", soft=1.5)
    head = curve("240,62 283,68 313,98 326,154 326,154 300,178 240,199 180,178 154,154 154,154 167,98 197,68")
    paint(image, head, "#b3a798", "#8d8377")
    paint(image, ellipse(240, 80, 50, 14), "#cdc2b4", soft=8, opacity=0.7, within=head)
    paint(image, "240,126 252,150 284,168 276,190 240,204 204,190 196,168 228,150", white, soft=4, within=head)
    paint(image, stroke("240,58,10 240,84,8 240,106,1"), stripe, soft=0.6, within=head)
    both(stroke("24,58,10 20,84,8 12,106,1"), stripe, soft=0.6, within=head)
    for y in (128, 146, 164):
        both(stroke(f"90,{y},8 70,{y + 3},6 54,{y + 1},1"), stripe, soft=0.6, within=head)
    for rx, ry, *colours in ((19, 16.5, "#e0d6c8"), (17, 14.5, "#2a241e"), (15, 13, "#b9c95c", "#dfe08a")):
        both(ellipse(36, 130, rx, ry, 8), *colours)
    both(ellipse(36, 131, 6, 12), "#14120f")
    for x in (208, 280):  # not mirrored: both eyes see the same window
        paint(image, ellipse(x, 125, 3.4, 3.4), "#ffffff")
    both(stroke("0,168,2.4 3,177,2.4 11,180,2.2 19,175,1"), "#5a4a40")
    for y in (-7, 1, 9):
        both(stroke(f"26,{170 + y / 2},1.8 70,{166 + y},1.4 112,{170 + 2 * y},0.6"), "#fffdf8")
    paint(image, "228,157 240,154 252,157 246,165 240,169 234,165", "#dc9a8e", "#b4716a")
    return image
