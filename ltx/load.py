"""From files to models that are ready to run, and everything that can be refused before that.

The idea. A checkpoint of 46 GB takes minutes to read, so whatever can be wrong is found from the
headers first: that every tensor is there in the right shape, that the text model belongs to it,
that the LoRAs fit, that the size of the video fits the VAE and the machine. Only then is anything
loaded. One owner for each: how a transformer comes from its file (LoRAs fused while reading, in
one byte a number, streamed) stands here alone, for sampling and for evaluation.

LTX-2.3:     the official defaults of sizes, steps and text scale.
our reading: the default reference scale; ST-DRC (arXiv 2606.02441) gives no numbers.

    vae = VideoVAE.load(path, "cpu", torch.float32)
    transformer = load_transformer(path, "cuda", torch.bfloat16, [("st-drc.safetensors", 1.0)])

Read next: ltx/options.py
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from common.files import one_line, parse_json
from guidance import Guidance
from ltx import plan
from ltx.checkpoint import check_weights, open_file, read_metadata, refusal, shapes_from
from ltx.lora import lora_changes, read_lora
from ltx.offload import cast_linears, load_streamed
from ltx.text import check_text
from ltx.vae import VAE_PREFIX, VideoVAE
from model import TRANSFORMER_PREFIX, TransformerConfig, VideoTransformer
from rope import Layout, reference_grid

# LTX-2.3: the official defaults. ref_scale is ours: with text 3 less shows too little of the face
# (docs/results.md, on the bundled weights). config["inference"] of a checkpoint replaces any of
# them. guide_range and guide_every are Guidance.interval and .every.
INFERENCE = {"width": 768, "height": 512, "num_frames": 121, "frame_rate": 24.0, "steps": 30,
             "text_scale": 3.0, "ref_scale": 3.0, "rescale": 0.0, "stg_scale": 0.0,
             "stg_blocks": [28], "guide_range": [0.0, 1.0], "guide_every": 1,
             "schedule_tokens": 4096, "reference_psnr_floor": None}


def read_inference(config: dict, path: str | os.PathLike) -> dict:
    """INFERENCE with what the checkpoint says; ValueError unless each is a number, or some."""
    defaults = {**INFERENCE, **config.get("inference", {})}
    for name, official in INFERENCE.items():
        numbers = defaults[name] if isinstance(official, list) else [defaults[name]]
        if numbers == [None] and official is None:
            continue
        good = isinstance(numbers, list) and numbers
        good = good and all(type(number) in (int, float) for number in numbers)
        if not good or (name == "guide_range" and len(numbers) != 2):
            raise ValueError(f"expected a number for {name} under 'inference' in the config of "
                             f"{path}, got {defaults[name]!r:.40}; use another checkpoint")
    return defaults


def guidance_from(numbers: dict, order: str = "text_first") -> Guidance:
    """The part of INFERENCE's numbers that guides."""
    return Guidance(numbers["text_scale"], numbers["ref_scale"], order, numbers["rescale"],
                    numbers["stg_scale"], tuple(numbers["stg_blocks"]),
                    tuple(numbers["guide_range"]), numbers["guide_every"])


def layout_from(numbers: dict, vae: VideoVAE, placement: str = "tass") -> Layout:
    """The latent grid of a video of these sizes. Raises ValueError for one that the VAE has not."""
    for name, step, offset in (("height", vae.space_scale, 0), ("width", vae.space_scale, 0),
                               ("num_frames", vae.time_scale, 1)):
        value = numbers[name]
        # the largest legal size that is not above
        lower = max((value - offset) // step, 1 - offset) * step + offset
        if value != lower:
            rule = f"a multiple of {step}" if offset == 0 else f"{step}*k + {offset}"
            near = f"{lower}" if value < lower else f"{lower} or {lower + step}"
            raise ValueError(f"expected --{name.replace('_', '-')} to be {rule}, got {value}; "
                             f"use {near}")
    frames = (numbers["num_frames"] - 1) // vae.time_scale + 1
    rows, columns = numbers["height"] // vae.space_scale, numbers["width"] // vae.space_scale
    return Layout(frames, rows, columns, numbers["frame_rate"], vae.time_scale, vae.space_scale,
                  placement)


def empty_transformer(path: str | os.PathLike) -> VideoTransformer:
    """The transformer of a checkpoint on the meta device: shapes, no numbers."""
    config = read_metadata(path)["config"]
    with shapes_from(path):
        return VideoTransformer(TransformerConfig.from_checkpoint(config["transformer"]))


def check_parts(path: str | os.PathLike, gemma_root: str | os.PathLike
                ) -> tuple[VideoTransformer, VideoVAE]:
    """Transformer and VAE as shapes. Every tensor that will be read is there, and the text model
    belongs to the checkpoint; else ValueError."""
    for name in ("config.json", "tokenizer.json"):
        if not (Path(gemma_root) / name).is_file():
            raise ValueError(f"expected {name} in the Gemma folder {gemma_root}, got none; check "
                             "--gemma-root")
    transformer = empty_transformer(path)
    with shapes_from(path):
        vae = VideoVAE(read_metadata(path)["config"]["vae"])
    check_weights(transformer, path, TRANSFORMER_PREFIX)
    check_weights(vae, path, VAE_PREFIX)
    check_text(path, gemma_root)
    return transformer, vae


def trained_placement(path: str | os.PathLike, loras: Sequence[tuple[str, float]],
                      transformer: VideoTransformer) -> tuple[str | None, list[str]]:
    """Where the reference lay when these weights were trained, None if nobody says; and notes.

    The last of the LoRAs that says something counts, else the checkpoint. Raises ValueError for a
    LoRA that does not fit, or when two of them disagree.
    """
    said, notes = {}, []
    for lora_path, _ in loras:
        try:
            lora = read_lora(lora_path, transformer)
        except ValueError as error:  # what to do about it is another matter than for a checkpoint
            told = str(error).rpartition("; ")[0] or error
            raise ValueError(f"{told}; check --lora {lora_path}") from error
        if lora.audio_keys:
            notes.append(f"{lora_path} also holds {lora.audio_keys} tensors of the audio half, "
                         "which is left out here")
        if "reference_placement" in lora.metadata:
            said[lora_path] = lora.metadata["reference_placement"]
    metadata = read_metadata(path)
    if not said and "reference_placement" in metadata:
        said[path] = metadata["reference_placement"]
    for placement in said.values():
        reference_grid(1, 1, 1, placement)  # complains about a name it does not know
    if len(set(said.values())) > 1:
        told = ", ".join(f"{name}: {placement}" for name, placement in said.items())
        raise ValueError(f"expected LoRAs trained with one placement, got {told}; "
                         "leave one out")
    return next(iter(said.values()), None), notes


def known_phrases(path: str | os.PathLike, loras: Sequence[tuple[str, float]]) -> list[str] | None:
    """What the captions of all trainings of these weights were made of, as the headers say; None
    when one of them says nothing. Raises ValueError for what is no list of texts."""
    phrases = []
    for file_path in (path, *(lora_path for lora_path, _ in loras)):
        with open_file(file_path) as file:
            told = file.metadata().get("known_phrases")
        if told is None:
            return None
        try:
            found = parse_json(told)
        except ValueError:
            found = None
        if not isinstance(found, list) or not all(isinstance(phrase, str) for phrase in found):
            raise refusal(f"a list of texts as 'known_phrases' in the header of {file_path}",
                          one_line(told, 40), "the file is damaged")
        phrases += found
    return phrases


def machine_memory() -> float:
    """Bytes of the computer's memory; without bound on Windows, where Python does not tell."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(config: dict, vae: VideoVAE, layout: Layout, dtype: torch.dtype, device: str
                 ) -> None:
    """Refuse a size that cannot fit before anything of it is allocated: the system would kill us
    without a word."""
    there = machine_memory()
    if device == "cuda":
        there = torch.cuda.get_device_properties(0).total_memory
    least = plan.least_bytes(config, vae, (layout.F, layout.H, layout.W), dtype)
    part = max(least, key=least.get)
    if least[part] > there:
        raise ValueError(f"expected a size that fits, got {layout.W * vae.space_scale}x"
                         f"{layout.H * vae.space_scale}, {(layout.F - 1) * vae.time_scale + 1} "
                         f"frames: to {part} would take at least {plan.short(least[part], 'B')}, "
                         f"this machine has {plan.short(there, 'B')}; lower --width, --height or "
                         "--num-frames")


def load_transformer(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    quantization: str = "none",
    offload: str = "none",
) -> VideoTransformer:
    """The transformer with its LoRAs, for sampling.

    LoRAs are fused while loading: before rounding to float8, and again and again where blocks are
    read from disk in every step. quantization "fp8-cast": one byte per number of the blocks'
    matrices; offload "cpu", "disk": where blocks wait for their turn (ltx/offload.py).
    """
    transformer = empty_transformer(path)
    change = lora_changes(transformer, loras)
    if quantization == "fp8-cast":
        cast_linears(transformer.transformer_blocks)
    load_streamed(transformer, "transformer_blocks", path, TRANSFORMER_PREFIX, dtype, device,
                  offload, change)
    return transformer.eval()
