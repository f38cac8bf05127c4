"""Does sample_distance rank sets of samples as a trained face network does?

    pip install dlib-bin face-recognition-models "setuptools<81"
    python tests/benchmarks/rank_distances.py --dataroot FACES --size 64 RESULTS...

Each RESULTS is a folder of scriptc.py: every grid in it is a set of 64 samples, and its samples/ are one set of each 64.
The reference is the Fréchet distance of dlib's 128 face descriptors to those of the real faces. The table gives Spearman's
rank correlation with it, over all sets and over the half with the smaller reference, of the distance of mean colours, of
the distance of fine detail, and of the mean of both, in 8, 16 and 24 cells a side (sample_distance is the mean of both in
16), and of the held-out loss in metrics.csv (grids only).
"""

import argparse
import csv
import pathlib
import sys

import dlib
import face_recognition_models
import numpy as np
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import scriptc  # noqa: E402

landmarks = dlib.shape_predictor(face_recognition_models.pose_predictor_five_point_model_location())
network = dlib.face_recognition_model_v1(face_recognition_models.face_recognition_model_location())


def descriptors(images):
    """dlib's descriptors (N, 128) of faces (N, 3, S, S) in [-1, 1], which all have the face at the same place."""
    found = []
    for image in images:
        large = np.asarray(scriptc.to_image(image).resize((300, 300), Image.Resampling.BICUBIC))
        found.append([*network.compute_face_descriptor(large, landmarks(large, dlib.rectangle(75, 85, 225, 245)))])
    return torch.tensor(found, dtype=torch.float64)


class Cells(scriptc.RealFaces):
    """RealFaces with `side` cells a side that sees colours (0), fine detail (1) or both: `parts`."""

    def __init__(self, faces, numbers, side, parts):
        self.side, self.parts = side, parts
        super().__init__(faces, numbers)

    def reduce(self, images):
        return super().reduce(images, self.side)[self.parts]


MEASURES = {f"{name}, {side}": (side, parts) for side in (8, 16, 24)
            for name, parts in (("colours", [0]), ("detail", [1]), ("colours and detail", [0, 1]))}


def frechet(one, other):
    root = torch.linalg.eigvals(one.T.cov() @ other.T.cov()).real.clamp(min=0).sqrt().sum()
    return ((one.mean(0) - other.mean(0)).square().sum() + one.T.cov().trace() + other.T.cov().trace() - 2 * root).item()


def to_tensor(pixels):
    return torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1) / 127.5 - 1


def sets_of(folder, size):
    """(name, images (64, 3, S, S), held-out loss or NaN) of every set of samples in a results folder."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    for row in rows:
        path = folder / scriptc.GRID.format(row["epoch"], row["step"])
        if row.get("sample_distance") and path.exists():
            tiles = to_tensor(Image.open(path).convert("RGB"))[:, 2:, 2:].unfold(1, size, size + 2).unfold(2, size, size + 2)
            images = tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)
            yield f"{folder.name}, step {row['step']}", images, float(row["heldout_loss"])
    samples = sorted((folder / "samples").glob("sample_*.png"))
    for first in range(0, len(samples) - 63, 64):
        images = torch.stack([to_tensor(Image.open(path).convert("RGB")) for path in samples[first:first + 64]])
        yield f"{folder.name}, samples from {first + 1}", images, float("nan")


def correlation(one, other):
    """Spearman's rank correlation of two lists, without the places where either has no number."""
    both = np.array([one, other])[:, np.isfinite(one) & np.isfinite(other)]
    ranks = both.argsort(axis=1).argsort(axis=1)
    return np.corrcoef(ranks)[0, 1] if both.shape[1] > 2 else float("nan")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataroot", type=pathlib.Path, required=True, help="the real faces")
    parser.add_argument("--size", type=int, default=64, help="side of the samples in pixels")
    parser.add_argument("results", nargs="+", type=pathlib.Path)
    args = parser.parse_args(argv)
    paths = [path for path in sorted(args.dataroot.rglob("*")) if path.suffix.lower() in scriptc.SUFFIXES]
    pixels = np.stack([scriptc.read_image(path, args.size) for path in paths])
    faces = scriptc.Faces(pixels, range(len(pixels)), torch.device("cpu"))
    numbers = torch.arange(len(pixels))
    real = {name: Cells(faces, numbers, *settings) for name, settings in MEASURES.items()}
    reference = descriptors(faces.batch(numbers))
    table = []
    for folder in args.results:
        for name, images, loss in sets_of(folder, args.size):
            measured = [cells.sample_distance(images) for cells in real.values()]
            table.append([frechet(descriptors(images), reference), *measured, loss])
            print(f"{name:50}", *(f"{value:8.4f}" for value in table[-1]), flush=True)
    table = np.array(table)
    late = table[:, 0] <= np.median(table[:, 0])
    print(f"\n| number | all {len(table)} sets | the better {late.sum()} |\n| --- | --- | --- |")
    for column, name in enumerate([*MEASURES, "held-out loss"], 1):
        print(f"| {name} | {correlation(table[:, 0], table[:, column]):.2f} "
              f"| {correlation(table[late, 0], table[late, column]):.2f} |")


if __name__ == "__main__":
    main()
