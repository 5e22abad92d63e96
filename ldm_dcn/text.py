"""Prompts to token embeddings, with the text encoder of any CLIP from Hugging Face `transformers`.

An encoder is named by a hub id or a folder: a CLIP model, or a pipeline with `text_encoder/` and `tokenizer/` in it. Prompts are
cut or padded to its full length, and its last hidden state is what a U-Net's cross-attention sees. Weights are read as
safetensors only: nothing pickled is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError, one_line, quiet
from .files import only_variant
from .weights import DTYPES, hash_weights

# What a CLIP's config.json calls itself. Other encoders have other rules for padding and masks.
CLIP_MODELS = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
IGNORED_WHEN_COMPARED = ("spec", "dtype")  # the same weights may lie elsewhere; rounding is no other encoder
EMPTY = ""  # the prompt of the unconditional half of guidance


class TextEncoder:
    """A frozen CLIP text encoder and its tokenizer.

    spec     as the user named it
    length   T, tokens of every prompt, padding included
    width    D
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, spec: str, device: str | torch.device) -> None:
        self.spec = spec
        self.width = int(model.config.hidden_size)
        # some tokenizers say a length of 1e30, which means that they do not know
        self.length = min(int(tokenizer.model_max_length), int(model.config.max_position_embeddings))
        self.device = torch.device(device)
        self._sha256 = hash_weights(model)
        self._model = model.requires_grad_(False).eval().to(self.device)
        self._tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to embeddings (n, T, D) float32 on the CPU. Raises `UserError` where they are NaN or infinite."""
        if not prompts:
            return torch.empty(0, self.length, self.width)
        ids = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).input_ids
        with torch.autocast(self.device.type, enabled=False):  # as captions are cached, whoever asks
            tokens = self._model(input_ids=ids.to(self.device)).last_hidden_state
        tokens = tokens.to("cpu", torch.float32)
        if not bool(torch.isfinite(tokens).all()):
            raise UserError(f"text encoder {self.spec} gives NaN or infinity; look at its weights")
        return tokens

    def fingerprint(self) -> dict[str, Any]:
        """What a run must remember to give the same prompts the same embeddings: JSON-able."""
        vocabulary = json.dumps(sorted(self._tokenizer.get_vocab().items()))
        return {
            "spec": self.spec,
            "length": self.length,
            "width": self.width,
            "pad_token": self._tokenizer.pad_token,
            "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "dtype": str(next(self._model.parameters()).dtype).removeprefix("torch."),
            "sha256": self._sha256,
        }

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Raise `UserError`, naming the entry that differs, unless this is the encoder of `fingerprint`."""
        own = self.fingerprint()
        for key in own:
            if key not in IGNORED_WHEN_COMPARED and own[key] != fingerprint.get(key):
                raise UserError(
                    f"text encoder {self.spec} is not the one these captions were encoded with: its {key} is "
                    f"{own[key]!r}, theirs {fingerprint.get(key)!r}; use {fingerprint.get('spec')}, or encode again"
                )


def load_text_encoder(
    spec: str | os.PathLike[str], *, dtype: str = "float32", device: str | torch.device = "cpu"
) -> TextEncoder:
    """Load the text encoder that the folder or hub id `spec` names.

    Raises `UserError` naming what is missing, broken, of another kind, or would have to be unpickled.
    """
    spec = os.fspath(spec)
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"text encoder {spec} needs the package transformers; run `pip install -c constraints.txt transformers`"
        ) from None
    local = os.path.isdir(spec)
    if not local and (spec.count("/") != 1 or spec.startswith((".", "/"))):
        raise UserError(f"text encoder {spec!r} does not exist; give a folder or a hub id (owner/name)")
    what = f"text encoder {spec}" + ("" if local else " (no folder here, so a hub id)")
    try:
        with quiet(transformers.utils.logging):
            kind, model_folder, tokenizer_folder = _find(transformers, spec, local)
            if kind not in CLIP_MODELS:
                raise UserError(f"{what} is a {kind}; give one of {', '.join(CLIP_MODELS)}")
            model, report = transformers.CLIPTextModel.from_pretrained(
                spec,
                subfolder=model_folder,
                use_safetensors=True,
                local_files_only=local,
                output_loading_info=True,
                dtype=DTYPES[dtype],
                variant=only_variant(Path(spec, model_folder), "model") if local else None,
            )
            tokenizer = transformers.CLIPTokenizer.from_pretrained(
                spec, subfolder=tokenizer_folder, local_files_only=local
            )
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError, hub errors: all mean it cannot be had
        mend = (
            "it takes config.json, model.safetensors (never .bin) and the tokenizer's files; copy it again"
            if local
            else "check the name and the network, or download it elsewhere and give the folder"
        )
        raise UserError(f"{what} cannot be loaded ({one_line(error)}); {mend}") from error
    lacking = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if lacking:
        raise UserError(f"{what}: weights and config.json do not fit, first at {lacking[0]}; copy it again")
    _check_tokenizer(tokenizer, model.config.vocab_size, os.path.join(spec, tokenizer_folder), local, what)
    return TextEncoder(model, tokenizer, spec, device)


def _check_tokenizer(tokenizer: Any, vocab_size: int, folder: str, local: bool, what: str) -> None:
    """transformers makes an empty tokenizer, without a word, where the files are missing."""
    files = set(os.listdir(folder)) if local and os.path.isdir(folder) else set()
    if local and "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        raise UserError(
            f"{what} has no tokenizer.json, nor vocab.json and merges.txt, in {folder}; copy them there"
        )
    tokens = len(tokenizer.get_vocab())
    if not vocab_size / 2 < tokens <= vocab_size:
        raise UserError(
            f"{what}: its tokenizer knows {tokens} tokens and its model {vocab_size}; give the two that belong together"
        )


def _find(transformers: Any, spec: str, local: bool) -> tuple[str, str, str]:
    """The model's class by its config.json, and the subfolders of model and tokenizer: a pipeline's, or none."""
    for model_folder, tokenizer_folder in (("text_encoder", "tokenizer"), ("", "")):
        try:
            config, _ = transformers.PretrainedConfig.get_config_dict(
                spec, subfolder=model_folder, local_files_only=local
            )
        except Exception:
            # There is none, which the library says in several ways; of the last place it says it to the user.
            if model_folder:
                continue
            raise
        if config:
            return (config.get("architectures") or ["?"])[0], model_folder, tokenizer_folder
    raise OSError("it has no config.json")
