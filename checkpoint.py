"""The checkpoint file: one safetensors file whose header says which model it holds.

A safetensors file is a table of names, types, shapes and offsets, then the raw numbers. Opening one costs nothing
but the table: the numbers are mapped into memory and fetched from disk when somebody reads them. So a 46 GB file
(video, sound, vocoder, text connector, VAE) can be read for its video part alone on a machine with less memory than the
file has bytes. The naive way, building a model full of random numbers and copying a whole file over them, would need
the weights three times at once.

LTX-2.3: the header carries a JSON text named "config" with the parts "transformer", "vae" and "scheduler", and a plain
  "model_version". Tensor names are those of the module trees in model.py, vae.py and text.py behind a prefix.
our reading: none. ST-DRC (arXiv 2606.02441) trains this model and does not change its file; what training adds to the
  header is where the reference tokens were placed ("reference_placement").

Conventions. dtype None keeps the stored type. Names that nobody asked for are never read.

    config = TransformerConfig.from_checkpoint(read_metadata(path)["config"]["transformer"])
    with torch.device("meta"):                       # shapes only, no memory
        model = VideoTransformer(config)
    load_weights(model, path, "model.diffusion_model.", dtype=torch.bfloat16)

Read next: model.py
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def open_file(path: str | os.PathLike, device: str = "cpu"):
    if not Path(path).is_file():
        raise ValueError(f"expected a safetensors file, got no file at {path}; check the path")
    try:
        return safe_open(path, framework="pt", device=device)
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got {path} ({error}); check the download") from error


def read_metadata(path: str | os.PathLike) -> dict:
    """Header of a checkpoint: "config" parsed from JSON, every other entry the string it is.

    LTX-2.3: config has the parts "transformer", "vae", "scheduler"; "model_version" is a plain string.
    Raises ValueError when the file is not a safetensors file or has no config.
    """
    with open_file(path) as file:
        metadata = dict(file.metadata() or {})
    if "config" not in metadata:
        raise ValueError(f"expected a 'config' entry in the header of {path}, got {sorted(metadata)}; use a checkpoint")
    try:
        metadata["config"] = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in 'config' of {path}, got {error}; the file is damaged") from error
    return metadata


def load_weights(
    module: nn.Module,
    path: str | os.PathLike,
    prefix: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> nn.Module:
    """Fill `module` (usually built on the meta device) from a checkpoint; returns the module.

    Reads exactly the names prefix + <name in the module>, one tensor at a time; everything else in the file (audio
    branch, vocoder) is never touched. dtype None keeps the stored dtype; a parameter that the module holds in float8
    (see memory.py) stays float8. change(name in the module, tensor) returns the tensor to use instead, before it is
    rounded to its final type: this is where lora.py fuses.
    Raises ValueError naming the tensor when one is missing or has another shape.
    """
    wanted = module.state_dict()
    with open_file(path, str(device)) as file:
        stored = set(file.keys())
        missing = [prefix + name for name in wanted if prefix + name not in stored]
        if missing:
            raise ValueError(f"expected tensor {missing[0]} in {path}, got {len(missing)} missing; check the version")
        state = {}
        for name, like in wanted.items():
            shape, found = tuple(like.shape), tuple(file.get_slice(prefix + name).get_shape())
            if found != shape:
                raise ValueError(f"expected {prefix + name} of shape {shape}, got {found}; check the config")
            tensor = file.get_tensor(prefix + name)
            final = like.dtype if like.dtype == torch.float8_e4m3fn else dtype or tensor.dtype
            state[name] = (tensor if change is None else change(name, tensor)).to(final)
    module.load_state_dict(state, strict=True, assign=True)
    return module


def save_checkpoint(
    path: str | os.PathLike, tensors: dict[str, Tensor], config: dict, metadata: dict[str, str] | None = None
) -> None:
    """Write one file of the form LTX-2.3 uses: named tensors, the config as JSON in the header.

    The file is written beside its place and moved there at the end, so an interrupted run leaves no half file.
    Extra metadata must be strings. Raises ValueError otherwise.
    """
    write_file(path, tensors, {"config": json.dumps(config), "model_version": "2.3.0", **(metadata or {})})


def write_file(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"expected metadata strings, got another type for {wrong[0]!r}; convert it with str()")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata=metadata)
    os.replace(beside, path)
