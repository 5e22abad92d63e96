"""The small Frechet distance of `train.score_every`: what the trainer calls with the averaged model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ldm_dcn.cache_layout import is_cache
from ldm_dcn.config import Config
from ldm_dcn.errors import UserError
from ldm_dcn.model import Model
from ldm_dcn.processes import Processes

from .extractors import load_extractor
from .features import FeatureExtractor
from .measurement import Measured, measure
from .moments import Statistics
from .sources import SampleSource, choose_labels, classes_of, open_reference


class OnTheWay:
    """Scores models of one run: the same labels, seeds, extractor and reference each time.

    The extractor and the reference come from `sample.score_extractor` and `sample.score_reference` (null: the images trained on).
    Raises `UserError` where one of them is missing or cannot be had, before training starts.
    """

    def __init__(self, config: Config) -> None:
        settings = config.sample
        if settings.score_extractor is None:
            raise UserError(
                "train.score_every is on and sample.score_extractor is not set; set it to digits, inception:WEIGHTS_FILE, or "
                "another that eval.fid takes"
            )
        if config.data.condition == "text":
            raise UserError(
                "train.score_every draws from classes, and data.condition=text; set train.score_every=0, and score what "
                "sample.py --npz draws from prompts with eval.fid"
            )
        if settings.score_reference is None and is_cache(config.data.source):
            raise UserError(
                f"train.score_every is on and {config.data.source} is a latent cache, which holds no images to compare with; set "
                "sample.score_reference to the images that it was made of, or to statistics of theirs (eval.fid --save-statistics)"
            )
        self._settings, self._precision = settings, config.train.precision
        self._reference_name = settings.score_reference or config.data.source
        self._scorer: FeatureExtractor = load_extractor(settings.score_extractor)
        self._images, self._statistics = open_reference(
            self._reference_name,
            image_channels=config.data.image_channels,
            image_size=config.data.image_size,
            max_bad=config.data.max_bad if settings.score_reference is None else 0,
        )
        if self._statistics is not None:
            self._statistics.check(self._scorer)
        self._real: Measured | Statistics | None = self._statistics
        self._learned_from = config.data.source
        if self._images is not None and self._images.labels is not None:
            self._labels(settings.score_images, *classes_of(config, self._images))

    def _labels(
        self, count: int, num_classes: int, class_names: Sequence[str] = ()
    ) -> tuple[str | None, Tensor | None]:
        """Raises `UserError` where the reference has other classes."""
        return choose_labels(
            "auto",
            count,
            num_classes,
            self._images,
            0,
            learned_from=self._learned_from,
            class_names=class_names,
            mend="set sample.score_reference to images of the classes that are trained on, or to statistics (eval.fid "
            "--save-statistics), against which each class is drawn alike",
        )

    def __call__(self, model: Model, count: int, processes: Processes) -> dict[str, Any]:
        """The distance of `count` images, under its own name, and everything it depends on; on the first of `processes`."""
        settings, device = self._settings, str(model.denoiser.device)

        def prepare() -> tuple[str | None, Tensor | None]:
            self._scorer.to(device)
            if self._real is None and processes.is_first:
                self._real = measure(self._images, self._scorer, device=device)
            return self._labels(count, model.num_classes, model.class_names)

        rule, labels = processes.together(prepare)  # what fails in one of them alone fails in all
        source = SampleSource(
            model,
            model.name,
            labels,
            count,
            label_rule=rule,
            guidance=settings.guidance,
            guidance_interval=settings.guidance_interval,
            guidance_rescale=settings.guidance_rescale,
            sampler=settings.sampler,
            steps=settings.steps,
            seed=0,
            precision=None,  # the run's own
        )
        measured = measure(
            source, self._scorer, batch_size=settings.batch_size, device=device, processes=processes
        )
        if measured is None:
            return {}
        distance = measured.moments.frechet_distance(self._real.moments)
        return {
            f"fd_{self._scorer.name}": distance,
            "N": count,
            "guidance": settings.guidance,
            "guidance_interval": list(settings.guidance_interval),
            **({"guidance_rescale": settings.guidance_rescale} if settings.guidance_rescale else {}),
            "sampler": settings.sampler,
            "sampler_steps": settings.steps,
            "weights": model.tags.get("weights"),
            "precision": self._precision,
            "extractor_weights": self._scorer.fingerprint,
            "resize": self._scorer.resize,
            "reference": self._reference_name,
            "seed": 0,
        }
