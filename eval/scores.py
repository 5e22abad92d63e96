"""Scores of images against a reference, as functions of features: distances, precision and recall, Inception score, neighbours.

Sums are in float64, whatever the extractor computes in. torchmetrics does those of the distances and of the Inception score;
it is kept from what kills it (a NaN feature ends the process inside its eigenvalue routine).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_dcn.errors import UserError

from .features import FeatureExtractor
from .metrics import image_metric
from .moments import Moments

KID_SUBSETS = 50
KID_SUBSET_SIZE = (
    500  # at most; the estimate is unbiased whatever the size, and the cost goes with its square
)
NEIGHBOURS = 3  # of precision and recall, as ADM's evaluator has it (Dhariwal & Nichol 2021, section 4.1)
INCEPTION_SCORE_SPLIT = 5000  # images, as ADM's evaluator has it: ten splits of 50,000
TILE = 4096  # features a side of the distances held at once, 128 MiB in float64
ROUNDING = 1e-13  # of squared lengths: a squared distance below it is of equal features


@dataclass(frozen=True)
class Features:
    """What an extractor made of N images: values (N, d) float64, spatial values (N, d') and logits (N, classes) where it has them."""

    values: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, chosen: Tensor | slice) -> Features:
        return Features(
            *(None if part is None else part[chosen] for part in (self.values, self.spatial, self.logits))
        )

    @classmethod
    def joined(cls, parts: list[Features]) -> Features:
        """Several one after the other."""
        names = ("values", "spatial", "logits")
        return cls(*(None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])
                     for name in names))  # fmt: skip


@torch.no_grad()
def extract(
    extractor: FeatureExtractor, images: Tensor, device: str | torch.device = "cpu", first: int = 0
) -> Features:
    """Features of uint8 images (N, c, H, W), the number `first` and following of their set.

    They go through the network in equal parts, whatever the batches they came in, so that these do not change the result.
    Raises `UserError` for features that are not finite, naming the images, and `ValueError` for images that are not uint8.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}; give uint8 (N, c, H, W), made by "
            "ldm_dcn.autoencoder.to_uint8"
        )
    if not len(images):
        raise ValueError("there are no images to score")
    parts = []
    with _full_precision(device):
        for some in images.split(extractor.at_once):
            values, spatial = extractor.with_spatial(some.to(device))
            _check_finite(values, f"features of extractor {extractor.name}", first)
            logits = extractor.logits(values)
            parts.append(
                Features(
                    values.to("cpu", torch.float64),
                    None if spatial is None else spatial.cpu(),
                    None if logits is None else logits.cpu(),
                )
            )
            first += len(some)
    return Features.joined(parts)


@contextmanager
def _full_precision(device: str | torch.device) -> Iterator[None]:
    """No autocast, and no TF32: it moves Inception's features by a thousandth, and so the distances."""
    kind, products = torch.device(device).type, torch.backends.cuda.matmul
    allowed, products.allow_tf32 = products.allow_tf32, False
    try:
        with (
            torch.autocast(kind, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False),
        ):
            yield
    finally:
        products.allow_tf32 = allowed


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to features a (N, d) and b (M, d), by `Moments.frechet_distance`."""
    _check_pair(a, b)
    return Moments.of(a).frechet_distance(Moments.of(b))


def kernel_distance(a: Tensor, b: Tensor, seed: int = 0) -> tuple[float, float]:
    """KID between features a (N, d) and b (M, d): mean and standard deviation over random subsets.

    The unbiased estimate of the squared MMD under (x.y / d + 1)^3 (Binkowski et al. 2018). Subsets are drawn from `seed`.
    """
    _check_pair(a, b)
    size = min(KID_SUBSET_SIZE, len(a), len(b))
    kid = image_metric("KernelInceptionDistance", a.shape[1], subsets=KID_SUBSETS, subset_size=size)
    kid.update(a.double(), real=True)
    kid.update(b.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchmetrics draws its subsets from the global generator
        mean, std = kid.compute()
    all_at_once = size == len(a) == len(b)  # then subsets are the same, and differ by rounding
    return mean.item(), 0.0 if all_at_once else std.item()


def inception_score(logits: Tensor, seed: int = 0) -> float:
    """exp of the mean KL divergence of p(class | image) from p(class), logits (N, classes) (Salimans et al. 2016).

    The mean over splits of `INCEPTION_SCORE_SPLIT` images, as ADM's evaluator has it; in an order drawn from `seed`, as
    torch-fidelity has it, because labels may come sorted.
    """
    _check_finite(logits, "logits", 0)
    splits = -(-len(logits) // INCEPTION_SCORE_SPLIT)
    score = image_metric("InceptionScore", logits.shape[1], splits=splits)
    score.update(logits.double())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="std")  # of one split's scores, which we do not use
        torch.manual_seed(seed)
        return score.compute()[0].item()


def precision_recall(
    samples: Tensor, reference: Tensor, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Share of samples (N, d) among the reference (M, d), and share of the reference among the samples.

    A point is among a set when it lies no further from one of its members than that member's third neighbour within the set
    (Kynkaanniemi et al. 2019, equations 1 to 3, k = 3 as ADM has it). Distances are held in tiles of 4096 x 4096.
    """
    _check_pair(samples, reference)
    for features in (samples, reference):
        if len(features) <= NEIGHBOURS:
            raise UserError(
                f"precision and recall look for {NEIGHBOURS} neighbours, and there are {len(features)} images; give more"
            )
    centre = reference.double().mean(0)  # short vectors lose fewer digits in |x|^2 - 2 x.y + |y|^2
    samples, reference = samples.double() - centre, reference.double() - centre
    of_samples, of_reference = _radii(samples, device), _radii(reference, device)
    sample_is_near = torch.zeros(len(samples), dtype=torch.bool)
    reference_is_near = torch.zeros(len(reference), dtype=torch.bool)
    for rows in _tiles(len(samples)):
        for columns in _tiles(len(reference)):
            distances = _squared_distances(samples[rows], reference[columns], device)
            sample_is_near[rows] |= (distances <= of_reference[columns].to(device)).any(1).cpu()
            reference_is_near[columns] |= (distances <= of_samples[rows, None].to(device)).any(0).cpu()
    return sample_is_near.double().mean().item(), reference_is_near.double().mean().item()


def _radii(points: Tensor, device: str | torch.device) -> Tensor:
    """(N,) squared distances of points (N, d) to their third neighbours."""
    radii = torch.empty(len(points), dtype=torch.float64)
    for rows in _tiles(len(points)):
        nearest = torch.empty(rows.stop - rows.start, 0, dtype=torch.float64, device=device)
        for columns in _tiles(len(points)):
            distances = torch.cat([nearest, _squared_distances(points[rows], points[columns], device)], 1)
            # with the point itself, at 0
            nearest = distances.topk(min(NEIGHBOURS + 1, distances.shape[1]), largest=False).values
        radii[rows] = nearest.amax(1).cpu()
    return radii


def _tiles(n: int) -> list[slice]:
    return [slice(start, min(start + TILE, n)) for start in range(0, n, TILE)]


def _squared_distances(x: Tensor, y: Tensor, device: str | torch.device) -> Tensor:
    """(len(x), len(y)) float64 on `device`; exactly 0 where rounding is all there is, so that copies are found to be copies."""
    x, y = x.to(device), y.to(device)
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = torch.addmm(lengths, x, y.T, alpha=-2)
    return distances.masked_fill_(distances <= ROUNDING * lengths, 0)


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images (logits (N, classes)) that the extractor puts into the class they were asked to be, labels (N,)."""
    if len(logits) != len(labels):
        raise ValueError(f"{len(logits)} logits came with {len(labels)} labels")
    return (logits.argmax(dim=1) == labels).double().mean().item()


def nearest_neighbour_distance(
    points: Tensor, reference: Tensor, device: str | torch.device = "cpu"
) -> float:
    """Median over points (N, d) of the root-mean-square difference to the nearest of reference (M, d); of copies exactly 0.

    Far below what unseen real images have to the same reference, it means that training images are being copied. Distances are
    held in tiles of 4096 x 4096; of whole numbers, as pixels are, they are exact.
    """
    points, reference = points.flatten(1), reference.flatten(1)
    if points.shape[1] != reference.shape[1]:
        raise ValueError(f"points have {points.shape[1]} values, the reference has {reference.shape[1]}")
    nearest = torch.full((len(points),), float("inf"), dtype=torch.float64, device=device)
    for rows in _tiles(len(points)):
        some = points[rows].to(device).double()
        for columns in _tiles(len(reference)):
            distances = _squared_distances(some, reference[columns].to(device).double(), device)
            nearest[rows] = torch.minimum(nearest[rows], distances.amin(1))
    return (nearest / points.shape[1]).sqrt().median().item()


def _check_pair(a: Tensor, b: Tensor) -> None:
    for features in (a, b):
        if features.ndim != 2:
            raise ValueError(f"features have shape {tuple(features.shape)}; give (N, d)")
        if len(features) < 2:
            raise UserError(
                f"a distance between distributions needs at least 2 images on each side, got {len(features)}"
            )
        _check_finite(features, "features", 0)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have {a.shape[1]} and {b.shape[1]} values; use one extractor for both")


def _check_finite(features: Tensor, what: str, first: int) -> None:
    finite = torch.isfinite(features).flatten(1).all(dim=1)
    if not bool(finite.all()):
        indices = [first + i for i in (~finite).nonzero().flatten().tolist()]
        raise UserError(
            f"{what} of {len(indices)} images are NaN or infinite, first of images {indices[:8]}; "
            "look at those images"
        )
