"""`LatentDiffusion`, called by hand: what a person may give it, and what is refused in one line."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from ldm_dcn import LatentDiffusion, sampling
from ldm_dcn.denoiser import Denoiser
from ldm_dcn.errors import UserError
from ldm_dcn.sampling import DEFAULTS
from ldm_dcn.trainer import train
from tiny import WHOLE, setting, tiny_config


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = tiny_config(tmp_path_factory.mktemp("pipeline"), setting("model.unet", WHOLE), "train.steps=1")
    assert train(config) == 0
    return LatentDiffusion.from_pretrained(config.folder)


class Words:
    """A text encoder whose prompts are all the same."""

    def encode(self, prompts: list[str]) -> torch.Tensor:
        return torch.zeros(len(prompts), 3, 8)


@pytest.fixture
def draw_text(draw: LatentDiffusion) -> LatentDiffusion:
    """The same U-Net as one of captions."""
    denoiser = Denoiser(draw.model.unet, empty_tokens=torch.zeros(3, 8))
    return LatentDiffusion(
        replace(draw.model, denoiser=denoiser, text_encoder={"spec": "nowhere"}, _encoder=Words())
    )


def pixels(draw: LatentDiffusion, **arguments: Any) -> list[list[int]]:
    return [np.asarray(picture).flatten().tolist() for picture in draw(steps=2, **arguments)]


@pytest.mark.parametrize(
    "labels",
    [(3, 7), range(3, 8, 4), np.array([3, 7]), torch.tensor([3, 7]), iter([3, 7])],
    ids=lambda labels: type(labels).__name__,
)
def test_labels_are_whole_numbers_in_any_row(draw: LatentDiffusion, labels: Any) -> None:
    assert pixels(draw, labels=labels) == pixels(draw, labels=[3, 7])


def test_seeds_are_counted_from_the_first_or_given_one_by_one(draw: LatentDiffusion) -> None:
    third, fourth = pixels(draw, labels=[3, 3], seed=3)
    assert pixels(draw, labels=[3, 3], seed=[4, 3]) == [fourth, third] != [third, fourth]
    assert pixels(draw, labels=[3, 3], seed=range(3, 5)) == [third, fourth]


@pytest.mark.parametrize("label", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_one_label_needs_no_list(draw: LatentDiffusion, label: Any) -> None:
    assert pixels(draw, labels=label) == pixels(draw, labels=[3])
    assert pixels(draw, labels=label, batch_size=np.int64(4)) == pixels(draw, labels=[3])


def test_one_prompt_is_not_a_list_of_letters(draw_text: LatentDiffusion) -> None:
    assert len(draw_text(prompts="a red fox", steps=1)) == 1
    assert len(draw_text(prompts=("a red fox", ""), steps=1)) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"labels": []}, "there is nothing to draw; ask for at least one image"),
        ({"labels": "12"}, "label '12' is no number, no range and no name of a class of tiny"),
        ({"labels": {1, 2}}, "labels are {1, 2}; give whole numbers in a list"),
        ({"labels": 1.5}, "labels are 1.5; give whole numbers in a list"),
        ({"labels": ["one"]}, "label 'one' is no number, no range and no name of a class of tiny"),
        ({"labels": [1.5]}, "label 1.5 is no whole number"),
        ({"labels": [True]}, "label True is no whole number"),
        ({"labels": [None]}, "label None is no whole number"),
        ({"labels": [[1, 2]]}, "label [1, 2] is no whole number"),
        ({"labels": torch.tensor([1.0])}, "label 1.0 is no whole number"),
        ({"labels": np.array([[1], [2]])}, "is no whole number"),
        ({"labels": [-1]}, "label -1 does not exist: tiny knows 10 classes, 0 to 9"),
        ({"labels": 10}, "label 10 does not exist"),
        ({"labels": [2**70]}, "every label must be a whole number of at most"),
        ({"count": 0}, "count 0: ask for 1 to 1,000,000 pictures"),
        ({"count": -1}, "count -1: ask for"),
        ({"count": True}, "count True: ask for"),
        ({"count": 1.0}, "count 1.0: ask for"),
        ({"count": 10**13}, "count 10000000000000: ask for"),
        ({"labels": [1], "count": 1}, "give exactly one of labels, prompts and count"),
        ({}, "give exactly one of labels, prompts and count"),
        ({"prompts": "a red fox"}, "tiny takes no prompts; it knows 10 classes"),
        ({"count": 1, "seed": 1.5}, "seed 1.5 is no whole number"),
        ({"count": 1, "seed": "a"}, "seed 'a' is no whole number"),
        ({"count": 1, "seed": True}, "seed True is no whole number"),
        ({"count": 1, "seed": [1.5]}, "seed [1.5] is no whole number"),
        ({"count": 1, "seed": [1, 2]}, "1 pictures came with 2 seeds"),
        ({"count": 2, "seed": [1, -1]}, "seed -1 is negative"),
        ({"count": 1, "seed": -1}, "seed -1 is negative"),
        ({"count": 2, "seed": 2**63 - 1}, "every seed must be a whole number of at most"),
        ({"count": 1, "guidance": math.nan}, "guidance nan: guidance must be finite"),
        ({"count": 1, "guidance": "2"}, "guidance '2' is no number"),
        ({"count": 1, "guidance": None}, "guidance None is no number"),
        ({"count": 1, "guidance_interval": 0.5}, "guidance interval 0.5: give two shares"),
        ({"count": 1, "guidance_interval": "01"}, "guidance interval '01': give two shares"),
        ({"count": 1, "guidance_interval": (0, 0.5, 1)}, "guidance interval (0, 0.5, 1): give two shares"),
        ({"count": 1, "steps": 2.5}, "2.5 sampling steps were asked for; use 1 to 1000"),
        ({"count": 1, "steps": "20"}, "'20' sampling steps were asked for"),
        ({"count": 1, "steps": None}, "None sampling steps were asked for"),
        ({"count": 1, "sampler": ["ddim"]}, "sampler '['ddim']' is unknown; use one of"),
        ({"count": 1, "batch_size": 1.5}, "batch size 1.5: draw at least one"),
        ({"count": 1, "batch_size": True}, "batch size True: draw at least one"),
        ({"count": 1, "precision": "half"}, "precision 'half' is unknown; use one of fp32, bf16, fp16"),
        ({"count": 1, "progress": 5}, "progress 5 cannot be called"),
        ({"count": 1, "guidence": 2}, "unknown setting 'guidence' (did you mean 'guidance'?)"),
        ({"count": 1, "seeds": [4]}, "unknown setting 'seeds' (did you mean 'seed'?)"),
        ({"count": 1, "eta": 0.3}, "unknown setting 'eta'; there are sampler, steps, guidance, "),
    ],
)
def test_what_means_nothing_is_refused_before_it_draws(
    draw: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(
        "ldm_dcn.sampling.sample_latents", lambda *_, **__: pytest.fail("it drew", pytrace=False)
    )
    with pytest.raises(UserError) as caught:
        draw(**arguments)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"labels": [1]}, "tiny takes prompts, not labels; give prompts="),
        ({"prompts": []}, "there is nothing to draw"),
        ({"prompts": 3}, "prompts are 3; give texts in a list"),
        ({"prompts": [None]}, "prompt None is no text"),
        ({"prompts": ["fox", b"fox"]}, "prompt b'fox' is no text"),
        ({"prompts": ["\ud800"]}, r"prompt '\ud800' is no text"),
    ],
)
def test_what_is_no_prompt_is_refused(
    draw_text: LatentDiffusion, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        draw_text(**arguments)
    assert expected in str(caught.value)


def test_what_is_not_given_is_the_runs_own(draw: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its section `sample`; without one, what `generate` takes by itself."""
    seen: list[dict[str, Any]] = []

    def generate(*_: Any, **settings: Any) -> torch.Tensor:
        seen.append(settings)
        return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr("ldm_dcn.pipeline.generate", generate)
    own = {"sampler": "euler", "steps": 7, "guidance": 3.0, "guidance_interval": [0.1, 0.9]}
    own["guidance_rescale"] = 0.7
    theirs = LatentDiffusion(replace(draw.model, config={"sample": {**own, "batch_size": 5, "prompts": []}}))
    theirs(count=1)
    assert seen[-1].items() >= own.items() and not {"batch_size", "prompts"} & seen[-1].keys()
    theirs(count=1, steps=3, guidance=0.0)
    assert seen[-1].items() >= {**own, "steps": 3, "guidance": 0.0}.items()
    for config in ({}, {"sample": {}}, {"sample": None}, {"sample": {"steps": None}}):
        LatentDiffusion(replace(draw.model, config=config))(count=1)
        assert seen[-1] == DEFAULTS
    assert inspect.signature(sampling.generate).parameters["guidance"].default == DEFAULTS["guidance"]


def test_a_size_is_height_and_width(draw: LatentDiffusion) -> None:
    (picture,) = draw(labels=3, steps=1, size=(16, 12))
    assert (picture.height, picture.width) == (16, 12)
    with pytest.raises(UserError, match="size 15x12: tiny draws multiples of 2 pixels"):
        draw(labels=3, size=(15, 12))


def test_a_path_is_loaded_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"write LatentDiffusion.from_pretrained\('runs/mine'\)"):
        LatentDiffusion("runs/mine")
