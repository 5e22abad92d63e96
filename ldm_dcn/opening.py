"""The opening of a run: new, or as its newest good checkpoint left it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from . import checkpoint, diffusion, ema, export, randomness, run_folder
from .arithmetic import ARITHMETIC
from .autoencoder import Autoencoder, load_autoencoder
from .batches import Batches
from .cache import LatentCache
from .changes import check_same_run
from .compiling import compile_unet, let_ddp_recompute
from .config import Config, ParameterGroup, TrainConfig, check_keys, flat
from .data import check_source
from .denoiser import Denoiser
from .errors import UserError
from .files import naming, replace_file
from .folders import discard, recover
from .latents import Latents, condition_of, open_latents
from .launch import start_accelerator
from .metrics import MetricsLog, check_trackers
from .parallel import check_sharding, shard
from .places import check_folder_place
from .pretrained import Pretrained, check_pretrained, check_text, load_pretrained, read_class_embedding
from .processes import peers_of
from .provenance import provenance
from .run import Run, Score, State
from .run_folder import run_lock
from .swap import apply_swap, plan_swap, swapped_sites
from .unet import build_unet, empty_twin, set_attention, swap_options

SMALL_NETWORK = 10**7  # parameters, of which one forward pass takes less than a second on a CPU
# Where things lie, which may differ between machines: what lies there is compared instead.
PLACES = ("run.", "data.source", "autoencoder.spec", "model.pretrained", "sample.")
FIRST_LOSS_SCALE = 2.0**16  # of fp16, as torch.amp's GradScaler


@contextmanager
def open_run(
    config: Config,
    allow_change: Sequence[str] = (),
    scorer: Score | None = None,
    other_data: bool = False,
) -> Iterator[Run]:
    """The run of `config`: new, or as its newest good checkpoint left it; with `other_data` whatever images it was trained on."""
    check_keys("--allow-change", allow_change)
    accelerator = start_accelerator()
    _check_settings(config.train, accelerator)
    main = accelerator.is_main_process
    with run_lock(config.folder) if main else nullcontext(), _tf32(config.train.tf32):
        last = _find_checkpoint(config, accelerator)
        tensors, facts = checkpoint.load(last) if last else ({}, {})
        allowed = [*allow_change, *(["data.source"] if other_data else [])]
        changes = check_same_run(facts["config"], config, str(config.folder), allowed) if facts else []
        run = _build(config, accelerator, facts)
        _check_alike(run)
        run.scorer = scorer
        run.peers = peers_of(accelerator, in_step=config.train.parallel != "ddp")
        if facts:
            changes += run.restore(tensors, facts, other_data)
        elif main:
            checkpoint.check_room(config.folder / "checkpoints", _bytes_to_save(run))
        if config.train.compile:
            compile_unet(run.denoiser.unet, config.train.compile_mode)
            if config.train.gradient_checkpointing and config.train.parallel == "ddp":
                let_ddp_recompute()
        if main:
            _write_down(run, tensors.get("ema"))
            run.metrics = MetricsLog(config.folder, run.state.step, config.train.trackers, config.resolved())
        del tensors
        _greet(run, last, changes)
        run.enter_phase()
        if main and not run.finished:
            run.bar = _progress_bar(run)
        try:
            with set_attention(run.denoiser.unet, config.train.attention):
                yield run
        finally:
            for batches in filter(None, (run.batches, run.held_out)):
                batches.close()
            if run.bar is not None:
                with suppress(OSError):
                    run.bar.close()
            if run.metrics is not None:
                run.metrics.close()
            if accelerator.num_processes > 1 and not sys.exc_info()[0]:
                accelerator.wait_for_everyone()  # nobody leaves while the main process still saves
                accelerator.end_training()


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """NVIDIA's TF32 for what is computed in fp32 inside; as it was before afterwards."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = allowed
    try:
        yield
    finally:
        for place, flag in zip(places, before, strict=True):
            place.allow_tf32 = flag


def _check_settings(settings: TrainConfig, accelerator: Accelerator) -> None:
    processes = accelerator.num_processes
    parts = processes * settings.gradient_accumulation
    if settings.batch_size % parts:
        below, above = settings.batch_size // parts * parts, -(-settings.batch_size // parts) * parts
        raise UserError(
            f"train.batch_size={settings.batch_size} cannot be shared by {processes} processes in "
            f"{settings.gradient_accumulation} accumulation steps; use {below or above} or {above}"
        )
    if settings.attention != "sdpa" and accelerator.device.type != "cuda":
        raise UserError(
            f"train.attention={settings.attention} needs a CUDA GPU, and there is none; use train.attention=sdpa"
        )
    if settings.attention == "flash" and settings.precision == "fp32":
        raise UserError(
            "train.attention=flash computes in 16 bits, and train.precision=fp32; set train.precision=bf16, or "
            "train.attention=sdpa"
        )
    if settings.parallel != "ddp" and (settings.match_steps or settings.new_only_steps):
        raise UserError(
            f"train.parallel={settings.parallel} cannot change what learns during a run (train.match_steps, "
            "train.new_only_steps); do those steps with train.parallel=ddp: a run may go on under the other"
        )
    if processes > 1:
        check_sharding(settings.parallel)


def _find_checkpoint(config: Config, accelerator: Accelerator) -> Path | None:
    """The main process clears up, checks and chooses; the others take its word."""
    answer: list[str | None] = [None]
    if accelerator.is_main_process:
        run_folder.check_names(config.folder)
        root = config.folder / "checkpoints"
        check_folder_place(root, "mend its permissions, or choose another run.dir")
        for place in run_folder.STEPS:
            checkpoint.sweep(config.folder / place)
        recover(config.folder / export.EXPORT)
        found = checkpoint.newest(root, lambda line: tqdm.write(line, file=sys.stderr))
        if found is None:
            run_folder.check_past(config.folder)
        answer = [str(found) if found else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    return Path(answer[0]) if answer[0] else None


def _check_alike(run: Run) -> None:
    """Raise `UserError`, in every process, where one was started with other settings or sees other data than the first."""
    if run.accelerator.num_processes == 1:
        return
    own = {key: value for key, value in flat(run.config.resolved()).items() if not key.startswith(PLACES)}
    own |= {
        "the data": run.identity,
        "the autoencoder's weights": run.autoencoder.fingerprint().get("sha256"),
    }
    first, *others = gather_object([own])
    for rank, other in enumerate(others, 1):
        if odd := [key for key in first if other.get(key) != first[key]]:
            raise UserError(
                f"process {rank} was started with other settings or files than process 0 ({odd[0]}: {first[odd[0]]!r} there, "
                f"{other.get(odd[0])!r} here); give all machines the same config, data and models"
            )


def _bytes_to_save(run: Run) -> int:
    """Of one checkpoint and the export: weights, AdamW's two moments, the averages, and the first of them again."""
    size = sum(p.numel() * p.element_size() for p in run.denoiser.parameters())
    return size * (1 + 2 + len(run.averages) + 1)


def _build(config: Config, accelerator: Accelerator, facts: dict[str, Any]) -> Run:
    data, settings, device = config.data, config.train, accelerator.device
    check_source(data.source)
    check_trackers(settings.trackers)
    autoencoder = load_autoencoder(
        config.autoencoder.spec,
        dtype=config.autoencoder.dtype,
        device=device,
        image_channels=data.image_channels,
    )
    if facts:
        autoencoder.check(facts["autoencoder"])
    randomness.fix_global(settings.seed, "weights", 0)
    pretrained, notes = None, []
    if config.model.pretrained is not None:
        pretrained = load_pretrained(config.model.pretrained)
        notes = check_pretrained(pretrained, config.diffusion.model_dump(), autoencoder)
    unet, originals = _build_unet(config, pretrained)
    latents, identity = open_latents(config, autoencoder, accelerator.is_main_process)
    # What diffusers draws by default; a preset's or a pretrained network's is that of other images.
    unet.register_to_config(sample_size=latents.latent_shape[-1])
    denoiser = Denoiser(unet, *condition_of(config, latents))
    embedding_is_new, further = _read_condition(denoiser, pretrained, latents)
    notes += further
    if 0 < latents.num_classes < denoiser.num_classes:
        notes.append(
            f"warning: data.num_classes={denoiser.num_classes}, and {data.source} has {latents.num_classes} classes: what is drawn of "
            "the others is never learnt"
        )
    if settings.new_only_steps and not embedding_is_new and not swapped_sites(unet):
        raise UserError(
            f"train.new_only_steps={settings.new_only_steps} and nothing of {pretrained.source} is new; set model.swap, or "
            "train.new_only_steps=0"
        )
    _check_fit(denoiser, autoencoder, latents)
    condition_is_read = _check_forward(denoiser, latents.latent_shape)
    denoiser.train().to(device=device)
    for old in originals.values():
        old.to(device=device, memory_format=torch.channels_last)
    if settings.parallel != "ddp" and accelerator.num_processes > 1:
        # It takes contiguous parameters only.
        shard(denoiser, settings.parallel, device, ARITHMETIC[settings.precision])
    else:
        denoiser.to(memory_format=torch.channels_last)
    if settings.ema == "constant":
        rules = [ema.Constant(settings.ema_decay)]
    else:
        rules = [ema.Power(width) for width in settings.ema_widths]
    optimizer = torch.optim.AdamW(
        _parameter_groups(denoiser, settings),
        lr=settings.lr,
        betas=settings.betas,
        fused=True,
    )
    schedule = diffusion.Schedule(**config.diffusion.model_dump())
    return Run(
        config=config,
        accelerator=accelerator,
        autoencoder=autoencoder,
        latents=latents,
        denoiser=denoiser,
        averages=[ema.EMA(denoiser, rule) for rule in rules],
        optimizer=optimizer,
        batches=Batches(config, schedule, latents, autoencoder, denoiser, accelerator),
        schedule=schedule,
        levels=tuple(level.to(device) for level in diffusion.levels(schedule)),
        state=State(loss_scale=FIRST_LOSS_SCALE if settings.precision == "fp16" else 1.0),
        originals=originals,
        held_out=_held_out(config, schedule, autoencoder, denoiser, accelerator),
        identity=identity,
        embedding_is_new=embedding_is_new,
        condition_is_read=condition_is_read,
        notes=notes,
    )


def _parameter_groups(denoiser: Denoiser, settings: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups: each of `train.parameter_groups`, and first the parameters that are in none of them."""
    rules = [ParameterGroup(match=""), *settings.parameter_groups]
    groups = [
        {
            "params": [],
            "lr_factor": rule.lr_factor,
            "weight_decay": settings.weight_decay if rule.weight_decay is None else rule.weight_decay,
        }
        for rule in rules
    ]
    for name, p in denoiser.named_parameters():
        found = (number for number, rule in enumerate(rules) if number and re.search(rule.match, name))
        groups[next(found, 0)]["params"].append(p)
    for rule, group in zip(rules[1:], groups[1:], strict=True):
        if not group["params"]:
            raise UserError(
                f"train.parameter_groups: no parameter is left whose name holds {rule.match!r}; names are such as "
                f"{next(iter(dict(denoiser.named_parameters())))}, and the first group that fits has them"
            )
    return [group for group in groups if group["params"]]


def _held_out(
    config: Config,
    schedule: diffusion.Schedule,
    autoencoder: Autoencoder,
    denoiser: Denoiser,
    accelerator: Accelerator,
) -> Batches | None:
    """The images that `train.validate_every` looks at, as one large batch in parts of the run's size."""
    settings = config.train
    if not settings.validate_every:
        return None
    times = -(-settings.validation_images // settings.batch_size)
    whole = {
        "batch_size": times * settings.batch_size,
        "gradient_accumulation": times * settings.gradient_accumulation,
        "label_dropout": 0.0,
        "stratified_times": True,
    }
    data = config.data.model_copy(update={"split": "held-out"})
    config = config.model_copy(update={"data": data, "train": settings.model_copy(update=whole)})
    # Of these images' colours the user has read: they are of the same source as those that are trained on.
    latents, _ = open_latents(config, autoencoder, accelerator.is_main_process, say_grey=False)
    return Batches(config, schedule, latents, autoencoder, denoiser, accelerator)


def _build_unet(
    config: Config, pretrained: Pretrained | None
) -> tuple[torch.nn.Module, dict[str, torch.nn.Module]]:
    """The U-Net, and the blocks that were swapped out of a pretrained one."""
    model, settings = config.model, config.train
    if pretrained is None:
        if settings.match_steps or settings.new_only_steps:
            raise UserError(
                "train.match_steps and train.new_only_steps are for a swapped pretrained U-Net; "
                "set model.pretrained, or both to 0"
            )
        return build_unet(model.preset or model.unet, swap=model.swap), {}
    unet = pretrained.unet
    if model.swap is None:
        if settings.match_steps:
            raise UserError(
                f"train.match_steps={settings.match_steps} and model.swap=null: no block is swapped that could match its old "
                "one; set model.swap, or train.match_steps=0"
            )
        return unet, {}
    if already := swapped_sites(unet):
        raise UserError(f"{model.pretrained} has {len(already)} DCNv4 sites already; set model.swap=null")
    plan = plan_swap(unet, **swap_options(model.swap))
    originals = {site.name: unet.get_submodule(site.name) for site in plan}
    return apply_swap(unet, plan), originals if settings.match_steps else {}


def _read_condition(
    denoiser: Denoiser, pretrained: Pretrained | None, latents: Latents | LatentCache
) -> tuple[bool, list[str]]:
    """Whether the class embedding is a new one, and what is to be said of the condition of a pretrained network."""
    if pretrained is None:
        return denoiser.class_embedding is not None, []
    if denoiser.class_embedding is None:
        return False, check_text(pretrained, latents.text.encoder)
    is_new, line = read_class_embedding(denoiser, pretrained)
    return is_new, [line]


def _check_fit(denoiser: Denoiser, autoencoder: Autoencoder, latents: Latents | LatentCache) -> None:
    unet, channels = denoiser.unet.config, autoencoder.latent_channels
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        raise UserError(
            f"the U-Net takes {unet.in_channels} and gives {unet.out_channels} channels, "
            f"the latents of autoencoder '{autoencoder.spec}' have {channels}; set model.unet.in_channels={channels} "
            f"model.unet.out_channels={channels}"
        )
    if isinstance(latents, Latents) and not torch.isfinite(latents.moments).all():
        raise UserError(
            f"the latents of autoencoder '{autoencoder.spec}' hold NaN or infinity; "
            "use autoencoder.dtype=float32"
        )


def _check_forward(denoiser: Denoiser, latent_shape: tuple[int, int, int]) -> bool:
    """One forward pass before the first step: diffusers checks a config where it is used. Whether the network reads its condition.

    A large network takes it on the meta device, without numbers and without time.
    """
    size = sum(p.numel() for p in denoiser.parameters())
    device = "cpu" if size < SMALL_NETWORK else "meta"
    shape = (2, *latent_shape)
    x, times = torch.zeros(shape, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    try:
        network = denoiser if device == "cpu" else _empty_denoiser(denoiser)
        with torch.random.fork_rng(devices=[]):
            tokens = network.tokens(network.null_condition(2)).detach().requires_grad_()
            output = network.denoise(x, times, tokens)
            (gradient,) = torch.autograd.grad(output.sum(), tokens, allow_unused=True)
        given = tuple(output.shape)
    except Exception as error:  # a bad value may surface as any kind of error
        raise UserError(
            f"the U-Net of this config cannot take latents of shape {shape[1:]}: {type(error).__name__}: {error}; "
            f"{_further_conditions(denoiser.unet.config) or 'mend model.unet'}"
        ) from error
    if given != shape:
        raise UserError(
            f"the U-Net of this config makes {given[1:]} of latents of shape {shape[1:]}; use a data.image_size that "
            "halves as often as model.unet does"
        )
    if gradient is None and denoiser.is_conditional:
        what = "captions" if denoiser.takes_text else f"{denoiser.num_classes} classes"
        without = "data.condition=labels data.num_classes=0" if denoiser.takes_text else "data.num_classes=0"
        raise UserError(
            f"this U-Net has no cross-attention, so it cannot learn {what}; name a block such as CrossAttnDownBlock2D in "
            f"model.unet.down_block_types, or train without: {without}"
        )
    return gradient is not None


def _further_conditions(unet: Mapping[str, Any]) -> str:
    """What else than times and cross-attention's tokens a U-Net of diffusers wants, as Stable Diffusion XL's does."""
    kinds = ("addition_embed_type", "class_embed_type", "num_class_embeds")
    wanted = [f"{kind}={unet[kind]}" for kind in kinds if unet.get(kind) is not None]
    if not wanted:
        return ""
    return (
        f"it wants a condition beside classes or captions ({', '.join(wanted)}), which this trainer does not give; the swap alone "
        "works on it (ldm_dcn.apply_swap)"
    )


def _empty_denoiser(denoiser: Denoiser) -> Denoiser:
    tokens = None if denoiser.empty_tokens is None else denoiser.empty_tokens.to("meta")
    unet = empty_twin(denoiser.unet)
    with torch.device("meta"):
        return Denoiser(unet, denoiser.num_classes, tokens)


def _write_down(run: Run, averaged: dict[str, torch.Tensor] | None) -> None:
    """config.yaml, a line in provenance.jsonl for every start, and the export of this step where another is there."""
    folder = run.config.folder
    text, path = run.config.to_yaml(), folder / "config.yaml"
    if not path.exists() or path.read_bytes() != text.encode():
        replace_file(path, text)
    path = folder / "provenance.jsonl"
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": run.state.step, **provenance()}) + "\n")
    if run.state.step and export.exported_step(folder) != run.state.step:
        run.export(averaged)
    for place in ("averages", export.EXPORTS):
        for step in checkpoint.saved_steps(folder / place):
            if step > run.state.step:  # these steps are taken again, perhaps otherwise
                discard(folder / place / f"step-{step}")


def _progress_bar(run: Run) -> tqdm:
    interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds; a log file needs fewer lines
    name = str(run.config.run.name)
    return tqdm(
        total=run.config.train.steps, initial=run.state.step, desc=name, unit="step", mininterval=interval
    )


def _greet(run: Run, last: Path | None, changes: list[str]) -> None:
    config = run.config
    parameters = sum(p.numel() for p in run.denoiser.parameters())
    sites = len(swapped_sites(run.denoiser.unet))
    processes = run.accelerator.num_processes
    what = "captioned images" if run.denoiser.takes_text else f"images of {run.denoiser.num_classes} classes"
    run.say(
        f"{config.folder}: {parameters / 1e6:.3f} M parameters{f', {sites} DCNv4 sites' if sites else ''}; "
        f"{len(run.latents)} {what}; "
        f"batch {config.train.batch_size} on {processes} x {run.accelerator.device.type}"
    )
    if last is None:
        for note in run.notes:
            run.say(note)
        if config.train.ema == "power" and not config.train.ema_snapshot_every:
            run.say(
                "train.ema=power without train.ema_snapshot_every: averages of other widths than its two cannot be made afterwards"
            )
    for change in changes:
        run.say(f"changed since the last checkpoint: {change}")
    if last:
        done = "; all steps are taken" if run.finished else ""
        run.say(f"going on from {last}{done}")
