"""One HTML page about runs, with everything in it: `python -m eval.report RUN [RUN ...]`.

    python -m eval.report runs/digits_dcn runs/digits_unet
    python -m eval.report runs/digits_dcn runs/digits_unet --scores fid.json --throughput speed.json profile.json \\
        --operators operators.json --out report
    python -m eval.report --study study.json                 from results alone, without the runs

Sample grids and offset maps are drawn on the fly, a few images from the same seeds for all runs; losses come from the run
folders. Scores and times come from the JSON of eval.fid, eval.throughput (also --profile), eval.operators, eval.ablations and
eval.study; scores, where no file is given, from what eval.fid kept in the run folders. What has no such file is called not measured. The page opens in a browser without a server or a network.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ldm_dcn.errors import Parser, UserError, exit_on_user_error
from ldm_dcn.files import replacing
from ldm_dcn.places import check_folder_place
from ldm_dcn.sampling import SAMPLERS

from ..environment import environment
from ..score_files import files_of
from . import ablations, grids, looks, networks, operators, scores, speed, studies, training
from .drawing import DEFAULT_LAYERS, Drawing, Watching
from .inputs import Files, Run, open_runs, read_files
from .markup import Markup, joined, tag
from .page import page

PAGE = "index.html"
RESULTS = (
    "--scores",
    "--throughput",
    "--operators",
    "--study",
    "--ablations",
)  # options that change no picture
MOST_ROWS = 5  # of a sample grid, where --labels is not given


def build(
    runs: Sequence[Run],
    folder: Path,
    *,
    drawing: Drawing,
    watching: Watching,
    files: Files,
    command: str,
    drawn_by: str,
) -> Path:
    """Write the page and its PNGs to `folder`; returns the page.

    command   that made the whole page
    drawn_by  the same without what does not change the pictures, for their captions
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = _file_keys([run.name for run in runs])
    pictures = [folder / f"samples_{keys[run.name]}.png" for run in runs]

    def drawn(run: Run, picture: Path) -> tuple[tuple[object, ...], Markup, Markup]:
        """All that takes the network, which is let go of before the next one is loaded."""
        model = run.model.load()
        looking = looks.looks(run, model, drawing, watching, folder, keys[run.name], drawn_by)
        maps = joined(tag("h3", run.name), looking)
        return networks.row(run, model), grids.grid(run, model, drawing, picture), maps

    parts = [drawn(run, picture) for run, picture in zip(runs, pictures, strict=True)]
    rows, drawn_grids, maps = zip(*parts, strict=True) if parts else ((), (), ())
    of_runs = [
        ("runs", "Runs, parameters and MACs", networks.runs_table(rows, drawn_by)),
        ("samples", "Samples", grids.samples(runs, drawn_grids, pictures, drawing, drawn_by)),
        ("offsets", "Where DCNv4 looks", joined(*maps)),
        ("curves", "Training", training.curves(runs)),
    ] if runs else []  # fmt: skip
    choices = (
        [("ablations", "What each choice costs", ablations.ablations(files.ablations))]
        if files.ablations
        else []
    )
    contents = [
        *([("studies", "Studies", studies.studies(files.studies))] if files.studies else []),
        *of_runs,
        ("scores", "Scores", scores.scores(runs, files.scores)),
        ("quality", "Quality against speed", scores.quality(list(files.scores.values()))),
        ("speed", "Speed and size", speed.speed(files.throughput)),
        ("operators", "The operator beside its peers", operators.operators(files.operators)),
        *choices,
    ]
    about = environment()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    footer = joined(
        tag("p", "Made with ", tag("code", command)),
        tag("p", f"{versions}, Python {about['python']}; {about['gpu'] or about['cpu']}."),
    )
    introduction = tag(
        "p",
        "Every number stands with what it depends on, or is called not measured. Captions name the command that made a figure.",
    )
    names = [run.name for run in runs] or [path.stem for path in files.studies]
    title = " and ".join(names) if len(names) < 3 else f"{len(names)} runs"
    file = folder / PAGE
    with replacing(file) as new:
        new.write(page(f"Report: {title}", introduction, contents, footer).encode())
    return file


def _file_keys(names: Sequence[str]) -> dict[str, str]:
    """A name for files and anchors, for each run."""
    keys: dict[str, str] = {}
    for name in names:
        key = re.sub(r"[^\w.=-]+", "_", name).strip("_.") or "run"
        keys[name] = key if key not in keys.values() else f"{key}_{len(keys)}"
    return keys


def _drawing(options: argparse.Namespace, runs: Sequence[Run]) -> Drawing:
    if options.sampler not in SAMPLERS:
        raise UserError(f"sampler '{options.sampler}' is unknown; use one of {', '.join(SAMPLERS)}")
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: sampling takes at least one step")
    classes = {run.name: run.model.num_classes for run in runs if run.model.num_classes}
    labels = options.labels or list(range(min([MOST_ROWS, *classes.values()])))
    for name, known in classes.items():
        for label in labels:
            if not 0 <= label < known:
                raise UserError(
                    f"label {label} does not exist: {name} knows {known} classes, 0 to {known - 1}"
                )
    if min(options.seeds) < 0:
        raise UserError(f"seed {min(options.seeds)} is negative; use 0 or more")
    return Drawing(
        labels,
        options.seeds,
        options.prompts or [""],
        options.text_encoder,
        options.sampler,
        options.steps,
        options.guidance,
    )


def _watching(options: argparse.Namespace) -> Watching:
    positions = []
    for text in options.positions:
        match = re.fullmatch(r"(\d*\.?\d+),(\d*\.?\d+)", text)
        if not match or not all(0 <= float(share) < 1 for share in match.groups()):
            raise UserError(
                f"--positions {text}: write ACROSS,DOWN as shares from 0 to below 1, such as 0.5,0.5"
            )
        positions.append((float(match[1]), float(match[2])))
    for pattern in options.layers or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"--layers {pattern} is no regular expression: {error}") from None
    if options.moments < 1:
        raise UserError(f"--moments {options.moments}: look at one step at least")
    return Watching(DEFAULT_LAYERS, options.layers or (), options.moments, positions)


def _parser() -> Parser:
    parser = Parser(prog="python -m eval.report", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run or export folder, or hub id")
    parser.add_argument(
        "--study", type=Path, nargs="+", default=[], metavar="JSON", help="of eval.study; needs no RUN"
    )
    parser.add_argument(
        "--scores", type=Path, nargs="+", default=[], metavar="JSON", help="of eval.fid (default: what it kept in the folders of the runs)",
    )  # fmt: skip
    parser.add_argument(
        "--throughput", type=Path, nargs="+", default=[], metavar="JSON", help="of eval.throughput"
    )
    parser.add_argument(
        "--operators", type=Path, nargs="+", default=[], metavar="JSON", help="of eval.operators"
    )
    parser.add_argument(
        "--ablations", type=Path, nargs="+", default=[], metavar="JSON", help="of eval.ablations"
    )
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="default: report/")
    parser.add_argument(
        "--labels", type=int, nargs="+", metavar="L", help=f"rows of a grid (default: the first {MOST_ROWS})"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(range(5)), metavar="S", help="columns (default: 0 to 4)"
    )
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="rows, for models trained on captions")
    parser.add_argument("--sampler", default="dpm++", help=f"{', '.join(SAMPLERS)} (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.5, help="1 is none (default: %(default)s)")
    parser.add_argument(
        "--layers", nargs="+", metavar="REGEX",
        help=f"DCNv4 layers whose maps are drawn, by name (default: {DEFAULT_LAYERS} over the depth)",
    )  # fmt: skip
    parser.add_argument(
        "--moments", type=int, default=4, help="sampling steps at which maps are drawn (default: %(default)s)"
    )
    parser.add_argument(
        "--positions", nargs="+", default=["0.5,0.5", "0.25,0.3"], metavar="ACROSS,DOWN",
        help="where the kernels stand, as shares of the image (default: 0.5,0.5 0.25,0.3)",
    )  # fmt: skip
    parser.add_argument("--autoencoder", metavar="SPEC", help="where it lies, when not where the runs had it")
    parser.add_argument("--text-encoder", metavar="SPEC", help="likewise")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="such as cuda:1 (default: %(default)s)",
    )
    return parser


def _command(arguments: Sequence[str]) -> str:
    return f"python -m eval.report {shlex.join(arguments)}"


def _without(arguments: Sequence[str], *names: str) -> list[str]:
    """`arguments` without these options and their values; written --option=value or abbreviated, they stay."""
    kept, skipping = [], False
    for argument in arguments:
        skipping = argument in names or (skipping and not argument.startswith("-"))
        if not skipping:
            kept.append(argument)
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    with exit_on_user_error():
        check_folder_place(options.out, "give another --out")
        if not math.isfinite(options.guidance) or options.guidance < 0:
            raise UserError(
                f"guidance {options.guidance}: guidance must be finite and not negative; 1 is none"
            )
        watching = _watching(options)
        # Before the runs, whose loading may take long.
        if not options.runs and not options.study and not options.ablations:
            raise UserError("there is nothing to report; give a run folder, or --study JSON")
        kept: dict[bytes, Path] = {}
        for file in (file for run in options.runs for file in files_of(run)):
            kept.setdefault(file.read_bytes(), file)  # the table of several runs lies with each of them
        files = read_files(
            options.scores or list(kept.values()),
            options.throughput,
            options.operators,
            options.study,
            options.ablations,
        )
        runs = open_runs(options.runs, device=options.device, autoencoder=options.autoencoder)
        file = build(
            runs,
            options.out,
            drawing=_drawing(options, runs),
            watching=watching,
            files=files,
            command=_command(given),
            drawn_by=_command(_without(given, *RESULTS, "--out")),
        )
        # Those of an earlier report may lie there too; captions name this one's.
        text = file.read_text(encoding="utf-8")
        pictures = sum(picture.name in text for picture in options.out.glob("*.png"))
        beside = f"; {pictures} PNG file{'s' * (pictures > 1)} beside it" if pictures else ""
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, open it in a browser{beside}")


if __name__ == "__main__":
    main()
