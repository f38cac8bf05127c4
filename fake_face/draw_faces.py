"""Draws portraits of people who do not exist: stand-ins for downloaded faces, made offline from a seed.

    python fake_face/draw_faces.py DIR                            # 1000 faces of 64x64 pixels
    python fake_face/draw_faces.py DIR --count 200 --size 256

Framed like the photographs of thispersondoesnotexist.com: eyes at 45% of the height, chin near 86%.

`imagine` turns a seed into a person: numbers and colours for skin, bones, hair, expression, pose and light.
The functions after it paint that person from back to front. Every shape is a polygon with a soft edge, and
every length is a fraction of the picture's side, so the same seed is the same person at any size.
"""
import argparse
import math
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

# Palettes run from one end of a range to the other; a colour may fall between two neighbours.
SKIN = [(252, 226, 208), (246, 208, 182), (230, 182, 148), (208, 152, 114), (170, 116, 82), (128, 84, 60),
        (94, 61, 47)]
HAIR = [(34, 27, 26), (58, 39, 31), (92, 59, 38), (132, 88, 52), (182, 138, 84), (222, 188, 130)]
IRIS = [(58, 36, 22), (92, 58, 30), (112, 96, 50), (84, 118, 84), (78, 122, 160), (120, 138, 150)]
WALL = [(64, 84, 114), (150, 180, 196), (226, 214, 194), (130, 150, 104), (124, 86, 70)]
CLOTH = [(38, 44, 60), (70, 92, 124), (150, 60, 58), (226, 222, 214), (96, 112, 84), (60, 58, 58),
         (198, 152, 90), (120, 84, 120), (176, 190, 204), (62, 110, 116)]
RED, WHITE, BLACK = (158, 72, 34), (255, 244, 230), (14, 10, 12)
CIRCLE = [(math.cos(i * math.pi / 8), math.sin(i * math.pi / 8)) for i in range(16)]
SIDES = (-1, 1)                                                           # left and right, as a sign for x


def mix(a, b, amount):
    """The colour `amount` of the way from a (0) to b (1)."""
    return tuple(round(x + (y - x) * amount) for x, y in zip(a, b))


def along(palette, where):
    """The colour at `where`, 0 to 1, on a palette."""
    where *= len(palette) - 1
    i = min(int(where), len(palette) - 2)
    return mix(palette[i], palette[i + 1], where - i)


def disc(centre, rx, ry):
    """The outline of an ellipse."""
    return [(centre[0] + rx * x, centre[1] + ry * y) for x, y in CIRCLE]


def moved(outline, down):
    return [(x, y + down) for x, y in outline]


def mirrored(half):
    """A closed outline from its right half, which runs from the middle at the top to the middle below."""
    return half + [(-x, *rest) for x, *rest in reversed(half) if x]


class Canvas:
    """A square picture that is painted in fractions of its side."""

    def __init__(self, image):
        self.image, self.side = image, image.width
        steps = 2 + self.side // 160                                      # of a curve, from point to point
        self.weights = [(t * (t * (2 - t) - 1) / 2, (t * t * (3 * t - 5) + 2) / 2,
                         t * (t * (4 - 3 * t) + 1) / 2, t * t * (t - 1) / 2)
                        for t in (i / steps for i in range(steps))]

    @classmethod
    def plain(cls, side, colour):
        return cls(Image.new("RGB", (side, side), colour))

    def smooth(self, points, closed=False):
        """A curve (a Catmull-Rom spline) through the points."""
        around = [points[-1], *points, *points[:2]] if closed else [points[0], *points, points[-1]]
        line = []
        for (ax, ay), (bx, by), (cx, cy), (dx, dy) in zip(around, around[1:], around[2:], around[3:]):
            line += [(a * ax + b * bx + c * cx + d * dx, a * ay + b * by + c * cy + d * dy)
                     for a, b, c, d in self.weights]
        return line if closed else [*line, points[-1]]

    def mask(self, outlines, soft, opacity, width):
        """What the outlines cover, as a greyscale image, and the box of pixels where it belongs."""
        side, pad = self.side, 2.5 * soft + width
        xs, ys = [x for line in outlines for x, _ in line], [y for line in outlines for _, y in line]
        left, top = (max(int((min(v) - pad) * side), 0) for v in (xs, ys))
        right, bottom = (min(int((max(v) + pad) * side) + 2, side) for v in (xs, ys))
        shrink = max(1, round(soft * side / 1.3))                         # a wide blur needs few pixels,
        finer = 3 if soft * side < 0.7 else 1                             # a thin edge many
        wide, high, scale = -((left - right) // shrink), -((top - bottom) // shrink), finer / shrink
        mask = Image.new("L", (wide * finer, high * finer))
        pen = ImageDraw.Draw(mask)
        for i, line in enumerate(outlines):
            ink = round(255 * (opacity[i] if isinstance(opacity, tuple) else opacity))
            line = [((x * side - left) * scale - 0.5, (y * side - top) * scale - 0.5) for x, y in line]
            if width:
                pen.line(line, ink, max(1, round(width * side * scale)), "curve")
            else:
                pen.polygon(line, ink)
        if finer > 1:
            mask = mask.reduce(finer)
        elif soft < 0.01:
            mask = mask.filter(ImageFilter.BoxBlur(1.5 * soft * side / shrink))   # quick, and will do
        else:
            mask = mask.filter(ImageFilter.GaussianBlur(soft * side / shrink))
        if shrink > 1:
            mask = mask.resize((wide * shrink, high * shrink), Image.BILINEAR)
            mask = mask.crop((0, 0, right - left, bottom - top))
        return mask, (left, top, right, bottom)

    def paint(self, outlines, colour, soft=0.005, opacity=1.0, width=0.0):
        """Fill the outlines, or with a width follow them as a brush. Opacity: one for all, or a tuple."""
        mask, box = self.mask(outlines, soft, opacity, width)
        self.image.paste(colour, box, mask)

    def show_through(self, layer, outlines, soft=0.006):
        """Lay another canvas over this one, seen through the outlines only."""
        mask, box = self.mask(outlines, soft, 1.0, 0.0)
        there = [edge * layer.side / self.side for edge in box]
        self.image.paste(layer.image.resize(mask.size, Image.BICUBIC, there), box, mask)


def imagine(seed):
    """The person and the picture that a seed stands for: every number and colour that the painting needs."""
    r = random.Random(seed)
    u = r.uniform
    p = SimpleNamespace()
    p.fine = min(max(r.choice((0.15, 0.85)) + r.gauss(0, 0.15), 0), 1)    # features: 0 broad, 1 fine
    p.age, tone = u(0, 1) ** 1.5, u(0, 1)

    p.skin = mix(along(SKIN, tone), (226, 160, 120), u(0, 0.2))
    p.shadow = tuple(round(c * k) for c, k in zip(p.skin, (0.60, 0.48, 0.44)))
    p.glow = mix(p.skin, (255, 240, 222), 0.45)
    p.hair = along(HAIR, u(0, 1) * max(0.12, 1 - 1.1 * tone))
    if tone < 0.35 and r.random() < 0.12:
        p.hair = mix(RED, p.hair, u(0, 0.4))
    p.hair = mix(p.hair, (200, 198, 196), u(0, 1.6) * max(0, p.age - 0.4))
    p.iris = along(IRIS, u(0, 1) * max(0.15, 1 - 1.5 * tone))

    p.yaw, p.nod = (min(max(r.gauss(0, k), -2 * k), 2 * k) for k in (0.17, 0.1))  # radians: right, down
    p.tilt, p.scale = r.gauss(0, 0.05), u(1.03, 1.11)
    p.centre = 0.5 + u(-0.015, 0.015), 0.45 + u(-0.012, 0.012)
    p.light, p.warmth = u(0.5, 1) * r.choice(SIDES), u(0, 1)              # from the left (-) or right (+)

    p.face = u(0.217, 0.235) + 0.012 * (1 - p.fine)                       # half the width at the eyes
    p.jaw = p.face * (u(0.76, 0.85) + 0.07 * (1 - p.fine))
    p.chin = u(0.35, 0.378) + 0.012 * (1 - p.fine)
    p.neck = 0.118 + 0.03 * (1 - p.fine)
    p.eye_x, p.eye_w, p.eye_h = u(0.11, 0.12), u(0.051, 0.058), u(0.022, 0.03)
    p.slant, p.gaze = u(-0.003, 0.009), (u(-0.009, 0.009), u(-0.003, 0.003))
    p.brow_y, p.brow_arch, p.frown = u(0.06, 0.073), u(0.003, 0.012), u(-0.007, 0.003)
    p.brow_w = u(0.009, 0.013) + 0.005 * (1 - p.fine)
    p.nose_y, p.nose_w = u(0.12, 0.14), u(0.04, 0.048) + 0.01 * tone
    p.mouth_y, p.mouth_w, p.lip = u(0.212, 0.23), u(0.074, 0.088), u(0.014, 0.02) + 0.006 * tone
    p.smile = u(-0.15, 1)
    p.gap = 0.038 * max(0, p.smile) * max(0, u(-0.5, 1))                  # between the lips
    p.lips = mix(p.skin, (160, 54, 60), 0.42)
    lipstick = mix((170, 30, 52), (204, 92, 92), u(0, 1)), max(0, u(-0.6, 0.7))
    if p.fine > 0.5:
        p.lips = mix(p.lips, *lipstick)
    p.beard = u(0.25, 1) if p.fine < 0.5 and r.random() < 0.45 else 0     # from stubble to a full beard

    p.style = r.choices(("bald", "short", "bob", "long", "curly", "tied"),
                        (0, 1, 5, 8, 3, 3) if p.fine > 0.5 else (1.2, 10, 0.4, 0.7, 2, 0))[0]
    volume, p.fringe, p.part = u(0, 1), u(0, 1), u(-0.1, 0.1)
    p.hair_top, p.hair_side, p.hair_tip = {                               # two thicknesses, and y of the tips
        "bald": (0, 0, 0), "tied": (0.012, 0.006, 0.02), "short": (0.02 + 0.05 * volume, 0.012, 0.03),
        "bob": (0.03 + 0.02 * volume, 0.04, 0.2 + 0.14 * volume), "long": (0.03 + 0.02 * volume, 0.035, 0.64),
        "curly": (0.05 + 0.04 * volume, 0.05 + 0.03 * volume, 0.34 * p.fine)}[p.style]
    p.wave, p.phase, p.bun = 0.024 * u(0, 1) ** 2, u(0, 6), p.style == "tied" and volume > 0.4
    p.strands = [(u(0, 1), u(0, 1), u(-1, 1)) for _ in range(20)]

    p.glasses, p.square = r.random() < 0.2, u(0.7, 0.95)
    p.rims = r.choice([(36, 32, 34), (96, 62, 42), (150, 132, 104)])
    p.cloth = mix(r.choice(CLOTH), r.choice(CLOTH), u(0, 0.4))
    p.collar, p.neckline, p.shoulder = r.random() < 0.35, u(0, 1), 0.905 + u(-0.015, 0.015)
    p.wall = [mix(along(WALL, u(0, 1)), (128, 128, 132), u(0, 0.3)) for _ in range(2)]
    p.blobs = [(u(0, 1), u(0, 0.8), u(0.08, 0.22)) for _ in range(r.randint(2, 6))]
    return p


def pose(p):
    """The function that takes points of this head to points of the picture.

    Head coordinates: from between the eyes, x to the right, y down, z towards the viewer, all in sides of the
    picture. Where z is not given the point lies on the front of the face.
    """
    turn_c, turn_s = math.cos(p.yaw), math.sin(p.yaw)
    tilt_c, tilt_s = math.cos(p.tilt) * p.scale, math.sin(p.tilt) * p.scale

    def at(x, y, z=None):
        depth = (0.15 - 1.6 * x * x if z is None else z) - 0.1
        x, y = x * turn_c + depth * turn_s, y + depth * p.nod
        return p.centre[0] + x * tilt_c - y * tilt_s, p.centre[1] + x * tilt_s + y * tilt_c
    return at


def draw_background(p, picture):
    wall = Canvas.plain(40, p.wall[0])
    wall.paint([[(0, 0.55), (1, 0.35), (1, 1), (0, 1)]], p.wall[1], 0.25)
    blobs = [disc((x, y), size, size) for x, y, size in p.blobs]
    wall.paint(blobs[::2], (255, 242, 216), 0.05, 0.25)
    wall.paint(blobs[1::2], (40, 46, 50), 0.05, 0.2)
    picture.image = wall.image.resize(picture.image.size, Image.BILINEAR)


def draw_body(p, picture, head):
    """Neck, shoulders and clothes, with the shadow of the head on them."""
    y, n, dip = p.shoulder, p.neck, 0.02 + 0.08 * p.neckline
    skin = Canvas.plain(48, mix(p.skin, p.shadow, 0.3))
    skin.paint([disc((0.5 - p.light * 0.14, 0.85), 0.07, 0.2), moved(head, 0.05)], p.shadow, 0.03, 0.75)
    column = [(n, 0.65), (n, 0.87), (0.28, 1.06)]
    picture.show_through(skin, [[(0.5 + x, y) for x, y in mirrored(column)]])

    dark, light = mix(p.cloth, BLACK, 0.45), mix(p.cloth, WHITE, 0.3)
    edge = [(0, y + dip), (n * 0.6, y + dip * 0.75), (n + 0.02, y - 0.03)]
    coat = picture.smooth(mirrored([*edge, (0.3, y + 0.01), (0.48, y + 0.055), (0.6, 1.1)]), closed=True)
    cloth = Canvas.plain(48, p.cloth)
    cloth.paint([disc((0.5 + p.light * 0.3, y + 0.02), 0.14, 0.03)], light, 0.03, 0.7)
    cloth.paint([disc((0.5 - p.light * 0.5, 1), 0.26, 0.2), [(0.5 + x, y + 0.02) for x, y in mirrored(edge)]],
                dark, 0.04, (0.8, 0.4))
    picture.show_through(cloth, [[(0.5 + x, y) for x, y in coat]])
    if p.collar:
        flap = [(n + 0.035, y - 0.05), (n * 0.85, y - 0.015), (0.03, y + dip), (0.09, y + dip + 0.06),
                (n + 0.06, y + 0.02)]
        flaps = [[(0.5 + s * x, y) for x, y in flap] for s in SIDES]
        picture.paint([moved(flap, 0.012) for flap in flaps], dark, 0.01, 0.6)
        picture.paint(flaps, light, 0.005, (0.9, 0.6) if p.light < 0 else (0.6, 0.9))


def draw_skin(p, picture, at, head, hair):
    """Ears, nose, and the light and shadow of the face, the shadow of the hair included."""
    def spot(x, y, rx, ry, z=None):
        return disc(at(x, y, z), rx, ry)

    ear = p.face + 0.006, 0.025
    picture.paint([spot(s * ear[0], ear[1], 0.026, 0.062, -0.04) for s in SIDES], mix(p.skin, p.shadow, 0.3))
    picture.paint([spot(s * ear[0], ear[1], 0.011, 0.036, -0.04) for s in SIDES], p.shadow, 0.009, 0.6)

    lit, ny, nw, my, mw = math.copysign(1, p.light), p.nose_y, p.nose_w, p.mouth_y, p.mouth_w
    skin = Canvas.plain(min(picture.side, 256) * 5 // 8, p.skin)
    blush = mix(p.skin, (214, 80, 70), 0.5)
    skin.paint([spot(s * 0.145, 0.12, 0.05, 0.04) for s in SIDES], blush, 0.03, 0.4)
    edges = [spot(lit * 0.26, 0.2, 0.05, 0.3, 0), spot(-lit * 0.26, 0.06, 0.14, 0.42, 0),
             spot(0, p.chin + 0.03, 0.17, 0.045, 0.12)]
    skin.paint(edges, p.shadow, 0.05, (0.4, 0.9 * abs(p.light), 0.6))
    cheek_brow_chin = [spot(lit * 0.13, 0.085, 0.055, 0.05), spot(lit * 0.04, -0.15, 0.1, 0.045),
                       spot(0, p.chin - 0.04, 0.03, 0.018)]
    skin.paint(cheek_brow_chin, p.glow, 0.035, 0.7)

    folds = [[at(s * nw * 1.15, ny), at(s * (mw + 0.012), my - 0.035), at(s * (mw + 0.024), my + 0.01)]
             for s in SIDES]
    skin.paint(folds, p.shadow, 0.01, 0.12 + 0.25 * max(0, p.smile) + 0.35 * p.age, 0.008)
    sockets = [spot(s * (p.eye_x - 0.012), -0.014, 0.062, 0.026) for s in SIDES]
    skin.paint([*sockets, spot(0, my + p.gap + 0.042, 0.036, 0.008)], p.shadow, 0.016, 0.5)

    dark_side = [(0.014, -0.03, 0.16), (0.014, 0.04, 0.19), (nw * 0.6, ny - 0.012, 0.2),
                 (nw * 1.2, ny + 0.012, 0.16), (nw * 1.15, ny - 0.03, 0.15), (0.034, 0.02, 0.15)]
    nose = [spot(0, ny + 0.045, 0.01, 0.02), spot(lit * nw * 1.25, ny - 0.002, 0.008, 0.018),
            [at(-lit * x, y, z) for x, y, z in dark_side], spot(0, ny + 0.022, nw * 0.95, 0.008, 0.18)]
    skin.paint(nose, p.shadow, 0.011, (0.3, 0.25, 0.55, 0.75))
    ridge = [(-0.004, -0.01, 0.18), (0.01, -0.01, 0.18), (0.011, ny - 0.02, 0.22), (-0.004, ny - 0.02, 0.22)]
    tip = spot(lit * 0.004, ny - 0.012, 0.014, 0.011, 0.23)
    skin.paint([[at(lit * x, y, z) for x, y, z in ridge], tip], p.glow, 0.012, 0.65)
    if hair:
        skin.paint([moved(lock, 0.014) for lock in hair[:2]], p.shadow, 0.016, 0.6)
    picture.show_through(skin, [head])
    nostrils = [spot(s * nw * 0.5, ny + 0.014, 0.011, 0.005, 0.19) for s in SIDES]
    picture.paint(nostrils, mix(p.shadow, (30, 10, 10), 0.6), 0.005, 0.9)


def draw_beard(p, picture, at):
    f, j, c, y = p.face, p.jaw, p.chin, p.mouth_y
    half = [(0, p.nose_y + 0.045), (0.035, p.nose_y + 0.043), (p.mouth_w + 0.02, y - 0.012),
            (f * 0.68, y - 0.035), (f * 0.93, 0.04, 0), (f * 0.99, 0.07, 0), (j * 1.02, 0.2, 0.03),
            (j * 0.74, c - 0.06, 0.08), (0.06, c + 0.012 * p.beard, 0.12), (0, c + 0.02 * p.beard, 0.13)]
    outline = picture.smooth([at(*q) for q in mirrored(half)], closed=True)
    colour = mix(p.hair, p.shadow, 0.3)
    picture.paint([outline], colour, 0.014, 0.25 + 0.6 * p.beard ** 1.5)
    shine = disc(at(p.light * 0.03, c - 0.045), 0.06, 0.02)
    picture.paint([shine], mix(colour, WHITE, 0.2), 0.02, 0.5 * p.beard)


def draw_eyes(p, picture, at):
    x, y, w, h, arch = p.eye_x, -p.brow_y, p.eye_w, p.eye_h, p.brow_arch
    uppers, lowers, brows, balls = [], [], [], []
    for s in SIDES:
        inner, outer = at(s * (x - w), 0.006), at(s * (x + w), -p.slant)
        upper = at(s * (x - w * 0.4), -h), at(s * (x + w * 0.35), -h - p.slant * 0.4)
        lower = at(s * (x + w * 0.4), h * 0.66), at(s * (x - w * 0.35), h * 0.7)
        brow = [(-0.062, p.frown), (-0.01, -arch * 0.6), (0.035, -arch), (0.073, 0.006),
                (0.035, p.brow_w * 0.75 - arch), (-0.01, p.brow_w - arch * 0.6), (-0.058, p.brow_w + p.frown)]
        uppers.append(picture.smooth([inner, *upper, outer]))
        lowers.append(picture.smooth([outer, *lower, inner]))
        brows.append(picture.smooth([at(s * (x + a), y + b) for a, b in brow], closed=True))
        balls.append(at(s * x + p.gaze[0], p.gaze[1] - 0.003))

    eyes = Canvas(picture.image.copy())
    lids = [upper + lower for upper, lower in zip(uppers, lowers)]
    side = math.copysign(0.008, p.light)
    eyes.paint(lids, mix((238, 232, 228), p.shadow, 0.1), 0.006)
    eyes.paint([disc(ball, 0.0245, 0.0245) for ball in balls], mix(p.iris, BLACK, 0.5), 0.004)
    eyes.paint([disc((x, y + 0.004), 0.015, 0.014) for x, y in balls], mix(p.iris, WHITE, 0.15), 0.006, 0.9)
    eyes.paint([disc(ball, 0.0105, 0.0105) for ball in balls], BLACK, 0.003)
    eyes.paint(uppers, (60, 40, 36), 0.006, 0.5, 0.011)
    eyes.paint([disc((x + side, y - 0.009), 0.006, 0.006) for x, y in balls], WHITE, 0.002)
    picture.show_through(eyes, lids, 0.003)

    creases = [moved(line, -0.015) for line in uppers]
    bags = [moved(line, 0.022) for line in lowers]
    picture.paint(creases + lowers, p.shadow, 0.005, 0.55, 0.005)
    picture.paint(bags, p.shadow, 0.009, 0.1 + 0.45 * p.age, 0.008)
    picture.paint(uppers, (34, 22, 20), 0.003, 0.95, 0.008 + 0.004 * p.fine)
    picture.paint(brows, mix(p.hair, (30, 20, 18), 0.45), 0.006, 0.88)


def draw_mouth(p, picture, at):
    w, gap, lip = p.mouth_w + 0.012 * max(0, p.smile), p.gap, p.lip
    left, right = (at(s * w, p.mouth_y - 0.003 - 0.016 * p.smile) for s in SIDES)
    top, low = p.mouth_y - gap * 0.3, p.mouth_y + gap * 0.85

    def line(start, points, end):
        return picture.smooth([start, *(at(x * w, y) for x, y in points), end])

    upper = line(left, [(-0.5, top - 0.002), (0, top + 0.002), (0.5, top - 0.002)], right)
    lower = line(right, [(0.5, low), (0, low + gap * 0.15 + 0.002), (-0.5, low)], left)
    bow = line(right, [(0.55, top - lip * 0.7), (0.17, top - lip * 1.1), (0, top - lip * 0.8),
                       (-0.17, top - lip * 1.1), (-0.55, top - lip * 0.7)], left)
    bowl = line(left, [(-0.55, low + lip), (0, low + gap * 0.15 + lip * 1.45), (0.55, low + lip)], right)
    shine = disc(at(p.light * 0.01, low + lip * 0.65), 0.024, 0.004)
    picture.paint([upper + bow], mix(p.lips, (60, 10, 20), 0.25))
    picture.paint([lower + bowl], p.lips)
    picture.paint([shine], mix(p.lips, WHITE, 0.5), 0.007, 0.6)
    if gap < 0.006:
        picture.paint([upper], (64, 20, 24), 0.004, 0.85, 0.007)
    else:
        bite = line(right, [(0.5, low - gap * 0.25), (0, low - gap * 0.2), (-0.5, low - gap * 0.25)], left)
        middle = (left[0] + right[0]) / 2
        teeth = [(middle + (x - middle) * 0.86, y) for x, y in upper + bite]
        picture.paint([upper + lower], (66, 20, 24), 0.004)
        picture.paint([teeth], (246, 241, 234), 0.004)


def hair_locks(p, picture, at):
    """The left and the right half of the hair: (outer, inner) curves, each from the parting to the tips."""
    f, top, side, tip, locks = p.face, p.hair_top, p.hair_side, p.hair_tip, []
    hanging = tip > 0.1
    fringe = 0.28 * max(0, p.fringe - 0.6) if hanging else 0.035 * p.fringe - 0.03 * p.age * (1 - p.fine)
    for s in SIDES if p.style != "bald" else ():
        slope = 0.15 * s * p.part                                         # the hairline is lower on one side
        outer = [(p.part * 0.5, -0.325 - top, 0.05), (s * 0.105, -0.304 - top, 0.03),
                 (s * (0.193 + side * 0.8 + top * 0.2), -0.215 - top * 0.6, 0),
                 (s * (f + side), -0.06, -0.02)]
        inner = [(p.part, -0.205 + fringe, 0.1), (s * 0.1, -0.19 + fringe + slope, 0.08),
                 (s * 0.175, -0.135 + fringe * 0.8 + slope, 0.05), (s * f * 0.97, -0.04, 0.02)]
        for k in (0.25, 0.5, 0.75, 1):
            y = tip * k
            sway = p.wave * math.sin(14 * y + p.phase + s) if hanging else 0
            width = side * (1 - 0.5 * k ** 4) + 0.1 * y if hanging else 0.012 * (1 - k)
            outer.append((s * (f + width + sway), y, -0.02))
            inner.append((s * (f * (0.93 if hanging else 0.975) + sway * 0.7), y * (1 - 0.04 * k), 0.02))
        locks.append(tuple(picture.smooth([at(*q) for q in half]) for half in (outer, inner)))
    return locks


def draw_back_hair(p, picture, at, locks):
    dark = mix(p.hair, BLACK, 0.45)
    if p.hair_tip > 0.1:
        picture.paint([locks[0][0][::-1] + locks[1][0]], dark, 0.008)
    if p.bun:
        picture.paint([disc(at(0, -0.36, -0.05), 0.085, 0.07)], dark, 0.008)


def draw_hair(p, picture, locks, hair):
    """The hair in front, strand by strand."""
    layer = Canvas.plain(min(picture.side, 384) * 3 // 4, p.hair)
    pen, side = ImageDraw.Draw(layer.image), layer.side
    tones = [tuple(min(255, round(c * (1 + 0.36 * tone))) for c in p.hair) for _, _, tone in p.strands]
    n = len(locks[0][0])
    for outer, inner in locks:
        for (across, down, _), colour in zip(p.strands, tones):
            i = round(down * (n - 1))
            if p.style == "curly":
                x, y = (a + (b - a) * across for a, b in zip(inner[i], outer[i]))
                strand = disc((x, y), 0.02, 0.02)[1:12]
            elif p.hair_tip > 0.1:
                strand = [(a + (c - a) * across, b + (d - b) * across)
                          for (a, b), (c, d) in zip(inner[::2], outer[::2])]
            else:
                strand = [inner[i], outer[max(i - n // 7, 0)]]
            pen.line([(x * side, y * side) for x, y in strand], colour, max(1, side // 64), "curve")
    layer.image = layer.image.filter(ImageFilter.BoxBlur(side * 0.007))

    gloss = [[((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in zip(inner, outer)][n // 10:n // 2]
             for outer, inner in locks]
    dark = mix(p.hair, BLACK, 0.6)
    layer.paint(gloss, mix(p.hair, WHITE, 0.3), 0.02, (0.7, 0.3) if p.light < 0 else (0.3, 0.7), 0.03)
    layer.paint([locks[0 if p.light > 0 else 1][0]], dark, 0.03, 0.6, 0.05)
    layer.paint([[locks[0][0][0], locks[0][1][0]]], dark, 0.008, 0.5, 0.01)
    picture.show_through(layer, hair)


def draw_glasses(p, picture, at):
    rim = [(math.copysign(abs(x) ** p.square, x), math.copysign(abs(y) ** p.square, y)) for x, y in CIRCLE]
    lenses = [[at(s * (0.118 + 0.077 * x), 0.01 + 0.055 * y, 0.17) for x, y in rim] for s in SIDES]
    bridge = picture.smooth([at(-0.042, 0, 0.18), at(0, -0.012, 0.2), at(0.042, 0, 0.18)])
    arms = [[lens[0], at(s * (p.face + 0.004), -0.005, 0)] for s, lens in zip(SIDES, lenses)]
    picture.paint(lenses, (225, 235, 245), 0.01, 0.1)
    picture.paint([*(lens + lens[:2] for lens in lenses), bridge, *arms], p.rims, 0.003, 0.95, 0.008)


def draw_face(seed, size=64):
    """The person of this seed as an RGB image of size x size pixels, size 16 to 1024."""
    p = imagine(seed)
    at = pose(p)
    picture = Canvas.plain(size if size > 256 else max(2 * size, 128), WHITE)
    f, j, c = p.face, p.jaw, p.chin
    skull = [(0, -0.32, 0.05), (0.11, -0.3, 0.04), (0.2, -0.205, 0.02), (f * 0.99, -0.07, 0),
             (f * 0.98, 0.06, 0), (j * 1.02, 0.2, 0.03), (j * 0.72, c - 0.075, 0.08),
             (0.062, c - 0.012, 0.12), (0, c, 0.13)]
    head = picture.smooth([at(*q) for q in mirrored(skull)], closed=True)
    locks = hair_locks(p, picture, at)
    hair = [outer + inner[::-1] for outer, inner in locks]
    if p.style == "curly":
        hair += [disc(point, 0.034, 0.034) for outer, _ in locks for point in outer[::len(outer) // 15]]

    draw_background(p, picture)
    draw_back_hair(p, picture, at, locks)
    draw_body(p, picture, head)
    draw_skin(p, picture, at, head, hair)
    if p.beard:
        draw_beard(p, picture, at)
    draw_eyes(p, picture, at)
    draw_mouth(p, picture, at)
    if locks:
        draw_hair(p, picture, locks, hair)
    if p.glasses:
        draw_glasses(p, picture, at)

    bright = mix((248, 251, 255), (255, 247, 234), p.warmth)
    light = Image.new("RGB", (2, 1), bright)
    light.putpixel((0 if p.light > 0 else 1, 0), mix(bright, (150, 150, 170), 0.35 * abs(p.light)))
    image = picture.image.resize((size, size), Image.BOX)
    return ImageChops.multiply(image, light.resize(image.size, Image.BILINEAR))


def fill_folder(folder, count, size, seed=0):
    """Write the faces `seed` to `seed + count - 1` into a folder, skipping those that are there already.

    Their names are face_NNNNNN.png up to 128 pixels a side, face_NNNNNN.jpg above. The folder is made if it
    is missing, and no image is ever seen half written. Raises OSError when one cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind, ending = ("PNG", "png") if size <= 128 else ("JPEG", "jpg")
    for number in tqdm(range(seed, seed + count), desc="drawing faces", unit="face", disable=None):
        path = folder / f"face_{number:06d}.{ending}"
        if not path.exists():
            part = path.with_suffix(".part")
            draw_face(number, size).save(part, kind, quality=90, compress_level=1)
            os.replace(part, path)


def main():
    parser = argparse.ArgumentParser(description="Draw faces of people who do not exist into a folder.")
    parser.add_argument("folder", metavar="DIR", help="where the images go; created if missing")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="how many faces (default 1000)")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="16 to 1024 (default 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first face (default 0)")
    args = parser.parse_args()
    if not 16 <= args.size <= 1024:
        parser.error(f"--size {args.size} is outside 16 to 1024")
    if args.count < 0 or args.seed < 0:
        parser.error("--count and --seed cannot be negative")
    try:
        fill_folder(args.folder, args.count, args.size, args.seed)
    except OSError as error:
        sys.exit(f"Cannot write faces into {args.folder}: {error.strerror or error}.")
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
