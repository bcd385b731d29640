"""The checkpoint file: one safetensors file whose header says which model it holds.

The idea. A safetensors file is a table of names, types, shapes and offsets, then the raw numbers.
Opening one costs no more than the table: the numbers are mapped into memory and fetched from disk
when somebody reads them. So a 46 GB file (video, sound, text connector, VAE) can be read for its
video part alone on a machine with less memory than that. The naive way, a model full of random
numbers and a whole file copied over them, would need the weights three times at once.

Each tensor gets a map of its own. Linux refuses one private map larger than the machine's memory,
and a map lives as long as any tensor in it: converting bf16 to float32 would keep every page.

LTX-2.3: the header carries a JSON text named "config" with the parts "transformer", "vae" and
  "scheduler", and a plain "model_version". Tensor names are those of our modules behind a prefix,
  which stands beside each class (VAE_PREFIX in ltx/vae.py, ...).
our reading: "reference_placement" in the header says where training put the reference tokens;
  ST-DRC (arXiv 2606.02441) does not say how its model is stored.

Conventions. dtype None keeps the stored type. Names that nobody asked for are never read, except a
float8 matrix's scale: the two are multiplied, in float32. A file of another kind is named in one
line; a pickle, which can run code, is never opened.

    with shapes_from(path):                                       # on the meta device, no memory
        vae = VideoVAE(read_metadata(path)["config"]["vae"])
    load_weights(vae, path, VAE_PREFIX, dtype=torch.bfloat16)     # VideoVAE.load does all this

Read next: ltx/wrong_file.py
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import atomic_write, one_line, parse_json
from ltx.wrong_file import SINGLE_FILE, describe, stranger

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
         "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
         "BOOL": torch.bool}  # fmt: skip
# LTX-2.3: in its own fp8 file x.weight is float8 and means x.weight * x.weight_scale, one number a
# matrix. Text models have one a row (compressed-tensors), older ComfyUI files the other name.
# Without any scale, as in ComfyUI's plain fp8 files, float8 is a plain cast and means itself.
FLOAT8_SCALES = ("weight_scale", "scale_weight")
UNREAD = ("input_scale", "scale_input", "comfy_quant")  # of activations, which are not rounded here
MOST_LAYERS = 1000  # our reading: LTX-2.3 and its Gemma have 48; a billion would be built for ever

SIZES = ("in_channels", "out_channels", "latent_channels", "encoder_base_channels", "patch_size",
         "decoder_base_channels", "num_attention_heads", "attention_head_dim", "multiplier",
         "connector_num_attention_heads", "connector_attention_head_dim", "text_max_length",
         "connector_num_learnable_registers", "width", "height", "num_frames", "steps",
         "schedule_tokens", "guide_every")  # fmt: skip
SCALES = ("text_scale", "ref_scale", "rescale", "stg_scale", "reference_psnr_floor")
POSITIVE = ("positional_embedding_theta", "norm_eps", "timestep_scale_multiplier", "frame_rate")
# Numbers of a config: type, smallest, largest; for a list also how many it holds (0: any number).
LIMITS = {
    **dict.fromkeys(("num_layers", "connector_num_layers"), (int, 1, MOST_LAYERS, None)),
    **dict.fromkeys(SIZES, (int, 1, 1e6, None)),
    **dict.fromkeys(SCALES, (float, 0, 1e9, None)),
    **dict.fromkeys(POSITIVE, (float, 1e-12, 1e9, None)),
    "positional_embedding_max_pos": (float, 1e-12, 1e9, 3),
    "connector_positional_embedding_max_pos": (float, 1, 1e9, 1),
    "guide_range": (float, 0, 1, 2),
    "stg_blocks": (int, 0, MOST_LAYERS, 0),
}


def refusal(expected: str, got: object, do: str = f"use {SINGLE_FILE}") -> ValueError:
    """An error of the form that every refusal here has."""
    return ValueError(f"expected {expected}, got {got}; {do}")


# ------------------------------------------------------------ reading


class Entry:
    """One row of a file's table: shape and type without reading a number."""

    def __init__(self, row: dict):
        self.shape, self.type = row["shape"], row["dtype"]
        self.begin, self.end = row["data_offsets"]

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        """The file's own word: "BF16", "F32", ..."""
        return self.type


class TensorFile:
    """An open safetensors file, with the method names of the safetensors library.

    A tensor on the CPU is a private map of its part of the file: nothing is read until it is used,
    writing to it does not reach the file, and it stays valid after the file is closed. Raises
    SafetensorError or OSError when it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, device: str | torch.device = "cpu"):
        # The library checks the table (types, gaps, overlaps, length); "np" keeps it from mapping.
        with safe_open(path, framework="np") as file:
            self._metadata = dict(file.metadata() or {})
        self.device, self.file = device, open(path, "rb")
        length = int.from_bytes(self.file.read(8), "little")
        table = parse_json(self.file.read(length))
        self.start = 8 + length  # offsets in the table count from here
        self.table = {name: Entry(row) for name, row in table.items() if name != "__metadata__"}

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()  # maps made before stay valid

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self.table)

    def get_slice(self, name: str) -> Entry:
        return self.table[name]

    def get_tensor(self, name: str) -> Tensor:
        entry = self.table[name]
        if entry.type not in TYPES:
            raise refusal(f"numbers of a usual type in {name}", entry.type, "use the bf16 file")
        dtype, count = TYPES[entry.type], math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype, device=self.device)
        begin = self.start + entry.begin
        page = begin - begin % mmap.ALLOCATIONGRANULARITY  # a map can only begin at a page
        length = self.start + entry.end - page
        area = mmap.mmap(self.file.fileno(), length, access=mmap.ACCESS_COPY, offset=page)
        tensor = torch.frombuffer(area, dtype=dtype, count=count, offset=begin - page)
        return tensor.view(entry.shape).to(self.device)


def open_file(path: str | os.PathLike, device: str | torch.device = "cpu") -> TensorFile:
    """Open a safetensors file; tensors will be made on `device`. Use it in a `with` statement.

    Raises ValueError with one line that says what stands at the path instead, and what to do.
    """
    try:
        if not Path(path).is_file():  # also keeps pipes and devices from being read
            raise FileNotFoundError(path)
        return TensorFile(path, device)
    except (SafetensorError, OSError) as error:
        thing = describe(Path(path), error)
        raise ValueError(f"expected a safetensors file, got {thing}") from error


def read_metadata(path: str | os.PathLike) -> dict:
    """Header of a checkpoint: "config" parsed from JSON, every other entry the string it is.

    Raises ValueError when the file is no safetensors file, has no config, or holds another model.
    """
    with open_file(path) as file:
        metadata, names = dict(file.metadata()), file.keys()
    if "config" in metadata:
        metadata["config"] = _parse_config(metadata["config"], path)
    if other := stranger(metadata, names):
        raise ValueError(f"expected an LTX-2.3 checkpoint at {path}, got {other}")
    if "config" not in metadata:
        got = one_line(sorted(metadata)) if metadata else "an empty header"
        raise refusal(f"a 'config' entry in the header of {path}", got)
    return metadata


def _parse_config(text: str, path: str | os.PathLike) -> dict:
    try:
        config = parse_json(text)
    except ValueError as error:
        raise refusal(f"JSON in 'config' of {path}", error, "the file is damaged") from error
    if not isinstance(config, dict):
        raise refusal(f"an object in 'config' of {path}", f"{config!r:.40}")
    for part in ("transformer", "vae", "inference"):
        if not isinstance(config.get(part, {}), dict):
            raise refusal(f"an object {part!r} in the config of {path}", "another")
        _check_numbers(config.get(part, {}), path)
    return config


def _check_numbers(config: dict, path: str | os.PathLike) -> None:
    """No number that modules are built from is absurd; whether it fits the tensors shows later."""
    for key, value in config.items():
        got = f"{value!r:.40}"
        if key in ("encoder_blocks", "decoder_blocks"):  # [["res_x", 4], ["compress_all", 2], ...]
            pairs = value if isinstance(value, list) else [None]
            if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                raise refusal(f"pairs in {key} in the config of {path}", got)
            for _, inside in pairs:
                inside = inside if isinstance(inside, dict) else {"num_layers": inside}
                _check_numbers(inside, path)
        elif key in LIMITS:
            kind, least, most, count = LIMITS[key]
            numbers = [value] if count is None else value if isinstance(value, list) else [None]
            right = all(type(n) in (int, kind) and least <= n <= most for n in numbers)  # NaN not
            if not right or (count and len(numbers) != count):
                wanted = "an integer" if kind is int else "a number"
                wanted += f", {count} times," if count else ""
                wanted += f" from {least:g} to {most:g} for {key}"
                raise refusal(f"{wanted} in the config of {path}", got)


@contextmanager
def shapes_from(path: str | os.PathLike) -> Iterator[None]:
    """Inside, modules are built from the config of `path` as shapes, without memory.

    What cannot be built is a ValueError of one line.
    """
    try:
        with torch.device("meta"):
            yield
    except KeyError as error:
        raise refusal(f"{one_line(error)} in the config of {path}", "none",
                      "use an LTX-2.3 checkpoint") from error
    except ValueError as error:
        raise ValueError(one_line(error, 500)) from error
    except (TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError,
            AssertionError) as error:
        got = f"what no model can be built from ({one_line(error)})"
        raise refusal(f"sizes in the config of {path}", got) from error


def check_weights(module: nn.Module, path: str | os.PathLike, prefix: str) -> None:
    """Everything load_weights would refuse, found from the table alone: no number is read.

    Raises ValueError naming the tensor when one is missing, misshapen or not floating-point.
    """
    with open_file(path) as file:
        _check(file, path, module.state_dict(), prefix)


def _check(file: TensorFile, path: str | os.PathLike, wanted: dict[str, Tensor],
           prefix: str) -> None:
    missing = [prefix + name for name in wanted if prefix + name not in file.table]
    metadata = {key: value for key, value in file.metadata().items() if key != "config"}
    if missing and (other := stranger(metadata, file.keys())):
        raise ValueError(f"expected tensor {missing[0]} in {path}, got {other}")
    check_table(file.table, wanted, prefix, path, SINGLE_FILE)


def check_table(table: dict[str, Entry], wanted: dict[str, Tensor], prefix: str, where: object,
                take: str) -> None:
    """Raise ValueError unless each prefix + <name wanted> is in a table, in its shape, and we know
    what its numbers mean. where: whose table, for messages; take: what to use instead."""
    shapes = {prefix + name: tuple(like.shape) for name, like in wanted.items()}
    beside = _beside([name for name in table if name.startswith(prefix)], shapes)
    missing = sorted((name for name in shapes if name not in table), key=lambda n: n not in beside)
    if missing:
        got = f"none ({len(missing)} of {len(shapes)} missing)"
        if others := beside.get(missing[0]):
            got = f"{others[0]}, numbers packed in another way"
        raise refusal(f"tensor {missing[0]} in {where}", got, f"download {take}")
    for name, shape in shapes.items():
        scale, rows = _scale_of(table, name), shape[:1]
        known = {f"{name.removesuffix('weight')}{end}" for end in UNREAD} | {scale}
        if unknown := [other for other in beside.get(name, ()) if other not in known]:
            raise refusal(f"{name} in {where} alone, or in float8 with one scale",
                          f"also {unknown[0]}", f"use {take}")
        if (found := tuple(table[name].get_shape())) != shape:
            raise refusal(f"{name} of shape {shape} in {where}", one_line(found),
                          "use a file whose config fits its tensors")
        if scale and tuple(table[scale].get_shape()) not in ((), (1,), (1, 1), rows, (*rows, 1)):
            raise refusal(f"one number, or one for each row, in {scale} of {where}",
                          f"shape {one_line(table[scale].get_shape())}", f"use {take}")
        for each in (name, scale) if scale else (name,):
            if not TYPES.get(kind := table[each].get_dtype(), torch.uint8).is_floating_point:
                raise refusal(f"floating-point numbers in {each} of {where}", kind, f"use {take}")
    scaled = {bool(_scale_of(table, name)): name for name, shape in shapes.items()
              if len(shape) == 2 and table[name].get_dtype().startswith("F8")}
    if len(scaled) == 2:
        raise refusal(f"a scale beside {scaled[False]} in {where} as beside {scaled[True]}", "none",
                      f"use {take}")


def _beside(stored: list[str], wanted: Container[str]) -> dict[str, list[str]]:
    """What else is stored of the modules whose x.weight is wanted: x.weight_scale, x.qweight,
    x.weight.absmax, ... by the name of that weight."""
    found: dict[str, list[str]] = {}
    for other in (name for name in stored if name not in wanted):
        parts = other.split(".")
        for end in range(1, len(parts)):
            weight = ".".join([*parts[:end], "weight"])
            if weight in wanted:
                found.setdefault(weight, []).append(other)
    return found


def _scale_of(table: dict[str, Entry], name: str) -> str | None:
    """The name of a float8 matrix's scale, if there is one."""
    row, stem = table[name], name.removesuffix("weight")
    if not row.get_dtype().startswith("F8") or len(row.get_shape()) != 2:
        return None
    return next((stem + end for end in FLOAT8_SCALES if stem + end in table), None)


def read_tensor(get: Callable[[str], Tensor], table: dict[str, Entry], name: str) -> Tensor:
    """What a checked tensor means: a float8 matrix (out, in) times its scale, float32; any other as
    it is stored. get(name) reads one."""
    tensor, scale = get(name), _scale_of(table, name)
    return tensor if scale is None else tensor.float() * get(scale).float().reshape(-1, 1)


def load_weights(
    module: nn.Module,
    path: str | os.PathLike,
    prefix: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> nn.Module:
    """Fill `module` (usually built on the meta device) from a checkpoint; returns the module.

    Reads exactly the names prefix + <name in the module>, one tensor at a time. What the module
    holds in float8 (ltx/offload.py) stays float8, whatever dtype says. change(name in the module,
    tensor) returns the tensor to use instead, before it is rounded to its final type: this is
    where ltx/lora.py fuses. Raises ValueError as check_weights, before anything is read.
    """
    wanted, state = module.state_dict(), {}
    with open_file(path, device) as file:
        _check(file, path, wanted, prefix)
        for name, like in wanted.items():
            tensor = read_tensor(file.get_tensor, file.table, prefix + name)
            final = like.dtype if like.dtype == torch.float8_e4m3fn else dtype or tensor.dtype
            state[name] = (tensor if change is None else change(name, tensor)).to(final)
    module.load_state_dict(state, strict=True, assign=True)
    return module


def finite(numbers: Tensor, source: str,
           do: str = "use --dtype float32, or download the weights again") -> Tensor:
    """Numbers as they are; a damaged file shows where it is used and not later, in the picture."""
    if not numbers.isfinite().all():
        raise refusal(f"finite numbers from {source}", "NaN or infinity", do)
    return numbers


# ------------------------------------------------------------ writing


def save_checkpoint(path: str | os.PathLike, tensors: dict[str, Tensor], config: dict,
                    metadata: dict[str, str] | None = None) -> None:
    """Write one file of LTX-2.3's form: named tensors, the config as JSON in the header.

    Raises ValueError for metadata that is no string, OSError when the disk is full.
    """
    header = {"config": json.dumps(config), "model_version": "2.3.0", **(metadata or {})}
    write_file(path, tensors, header)


def write_file(path: str | os.PathLike, tensors: dict[str, Tensor],
               metadata: dict[str, str]) -> None:
    """Any safetensors file, whole or not at all. Raises as save_checkpoint does."""
    wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
    if wrong:
        raise refusal("metadata strings", f"another type for {wrong[0]!r}", "convert it with str()")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, lambda p: save_file(tensors, p, metadata=metadata))


def save_changed(path: str | os.PathLike, base: str | os.PathLike, changed: dict[str, Tensor],
                 metadata: dict[str, str]) -> None:
    """A copy of the checkpoint `base`, some tensors changed, this metadata beside its config."""
    stems = tuple(name.removesuffix("weight") for name in changed if name.endswith(".weight"))
    gone = {*changed, *(stem + end for stem in stems for end in (*FLOAT8_SCALES, *UNREAD))}
    with open_file(base) as file:  # without the scales of float8 numbers that are replaced
        kept = {name: file.get_tensor(name) for name in file.keys() if name not in gone}
    save_checkpoint(path, kept | changed, read_metadata(base)["config"], metadata)
