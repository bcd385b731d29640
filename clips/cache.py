"""What is computed once: latents of clips and contexts of captions, named by all they depend on.

The idea. The VAE and the text encoder are frozen, so a training that sees a clip a hundred times
would compute the same latent a hundred times, and Gemma alone needs more memory than many GPUs
have. Both are computed once, before. The danger of a cache is the stale file: other weights,
another crop, a re-encoded clip, and the old latent is still found. So a file's name is the hash of
all it depends on: the clip's bytes, bucket, frame rate, start and the VAE's weights, or the caption
and the text encoder's weights. Change one and another file is asked for. Each file also carries a
hash of its own numbers; a damaged one is made anew. Reference pictures are not kept: their
augmentation is random, so they are encoded in the step.

paper:        VAE and text encoder are frozen (ST-DRC, arXiv 2606.02441); no word on caching.
our reading:  all of this file.
LTX-2.3:      a context is 1024 x 4096 numbers: 8.4 MB a caption in bf16, twice that in float32.

Conventions. Any number of processes, on any number of machines, may fill one folder. Worker `rank`
of `world` makes items rank, rank + world, ...; `wait` returns when every worker has called it,
however long that takes; rank 0 of 1 and None = alone. The null prompt "" is a caption like others.

    python -m clips.cache clips/manifest.jsonl --checkpoint-path ltx.safetensors --gemma-root gemma

    latents = cache_latents(report.used, vae, vae.encode, "cache")     # latents[0] (C, F', H, W)
    encode = lazy_encoder("ltx.safetensors", "gemma")                  # loads nothing yet
    key = text_key("ltx.safetensors", "gemma", "cache")
    context = cache_contexts(["a cat", ""], encode, "cache", key)["a cat"]()            # (N, D)

Read next: clips/dataset.py
"""

import argparse
import functools
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from clips.container import IMAGES
from clips.frames import FORMAT, Bucket, Probe, Unusable, load_clip, probe
from clips.manifest import Report, Row, add_manifest_arguments, check_arguments, check_row
from common.cli import Parser, command
from common.files import atomic_write, parse_json, read_text, sweep
from ltx.checkpoint import TensorFile, open_file, read_metadata
from ltx.offload import OFFLOADS
from ltx.text import CONNECTOR_PREFIX, EXTRACTOR_PREFIX, TextEncoder, check_text
from ltx.vae import VideoVAE

SAMPLE = 4096     # our reading: bytes; three for each tensor are 70 MB of LTX-2.3's 46 GB
ABANDONED = 3600  # our reading: seconds; what nobody wrote to for so long is a killed process's

# ------------------------------------------------------------ hashes


def content_hash(path: Path, known: dict[str, str]) -> str:
    """What a file holds, wherever it lies: sha256 of all bytes. Of weights, which would take
    minutes, of the header and of three samples of each tensor: one flipped bit may go unseen.

    known: those found before, by path, size and time of change.
    """
    stamp = _stamp(path)
    if stamp not in known:
        with path.open("rb") as file:
            try:
                with TensorFile(path) as weights:
                    start, rows = weights.start, weights.table.values()
            except SafetensorError:  # any other file
                digest = hashlib.file_digest(file, "sha256")
            else:
                digest = hashlib.sha256(file.read(start))
                for row in sorted(rows, key=lambda row: row.begin):
                    for place in (row.begin, (row.begin + row.end) // 2, row.end - SAMPLE):
                        file.seek(start + max(place, row.begin))
                        digest.update(file.read(SAMPLE))
        known[stamp] = digest.hexdigest()
    return known[stamp]


def identity(path: Path) -> str:
    """The content of a file, or of those that are read of a text model's folder; 16 digits."""
    files = _text_files(path) if path.is_dir() else [path]
    told = "".join(content_hash(file, {}) for file in files)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _text_files(folder):
    named = [folder / "config.json", folder / "tokenizer.json"]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not all(path.is_file() for path in named):
        raise ValueError(f"expected config.json, tokenizer.json and *.safetensors in {folder}, "
                         "got not all of them; download the whole Gemma folder")
    # the index decides which weights are read
    return [*named, *weights, *folder.glob("model.safetensors.index.json")]


def _stamp(path):
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def weights_hash(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights: another VAE has other latents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest, name, tensor):
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(_bytes(tensor))


def _bytes(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def text_key(checkpoint: str | Path, gemma_root: str | Path, folder: str | Path, rank: int = 0,
             wait: Callable[[], object] | None = None, dtype: torch.dtype = torch.float32) -> str:
    """What a context depends on beside its caption: Gemma, extractor, connector, and the type.

    10 GB are read once: the cache folder remembers the hashes. With several workers rank 0 reads,
    the others wait and look up. Raises ValueError when a file is missing or no checkpoint.
    """
    if rank and wait:
        wait()
    try:
        return _text_key(Path(checkpoint), Path(gemma_root), Path(folder), rank, dtype)
    except OSError as error:
        raise ValueError(f"expected to read {error.filename or gemma_root}, got {error.strerror}; "
                         "check the file") from None
    finally:
        if not rank and wait:
            wait()  # also after an error: the others must not wait for ever


def _text_key(checkpoint, gemma_root, folder, rank, dtype):
    settings = read_metadata(checkpoint)["config"].get("transformer")
    files = _text_files(gemma_root)
    known = _read_known(folder, "hashes")
    try:
        # Only the text part: 46 GB are video and sound, and LoRAs or trainings change those.
        stamp = f"text of {_stamp(checkpoint)}"
        if stamp not in known:
            digest = hashlib.sha256()
            with open_file(checkpoint) as file:
                for name in sorted(file.keys()):
                    if name.startswith((EXTRACTOR_PREFIX, CONNECTOR_PREFIX)):
                        _add(digest, name, file.get_tensor(name))
            known[stamp] = digest.hexdigest()
        bar = tqdm(files, desc="hashing text files", unit="file", disable=True if rank else None)
        gemma = {path.name: content_hash(path, known) for path in bar}
    finally:
        _write_known(folder, "hashes", rank, known)
    return _key(gemma=gemma, extractor_and_connector=known[stamp], transformer=settings,
                dtype=str(dtype))


def _key(**settings):
    text = json.dumps({"format": FORMAT, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------ files


def _read_known(folder, what):
    """All that any worker remembered. An entry names its file's state, so none contradict."""
    known = {}
    for path in sorted(folder.glob(f"{what}-*.json")):
        try:
            known |= parse_json(read_text(path))
        except (OSError, ValueError, TypeError):
            pass
    return known


def _write_known(folder, what, rank, known):
    if known.items() <= _read_known(folder, what).items():  # others may have written meanwhile
        return
    try:
        _write(folder / f"{what}-{rank}.json", json.dumps(known).encode())
    except ValueError:
        pass  # a folder that holds everything may be read-only


def _write(path, data):
    try:
        atomic_write(path, lambda temporary: temporary.write_bytes(data))
    except OSError as error:
        raise ValueError(f"expected to be able to write in {path.parent}, got {error.strerror}; "
                         "make room or choose another folder, and run the same again: what is "
                         "whole is kept") from None


def _save(path, tensor, what, source):
    if not tensor.isfinite().all():
        raise ValueError(f"expected finite numbers in the {what}, got NaN or infinity; the weights "
                         f"of the {source} are damaged, download them again")
    tensor = tensor.detach().cpu().contiguous()
    metadata = {"key": path.stem, "sha256": hashlib.sha256(_bytes(tensor)).hexdigest()}
    _write(path, safetensors.torch.save({"x": tensor}, metadata))


def _is_intact(path):
    try:
        with open_file(path) as file:
            found, data = file.metadata(), _bytes(file.get_tensor("x"))
        return found["key"] == path.stem and found["sha256"] == hashlib.sha256(data).hexdigest()
    except (ValueError, KeyError, OSError):
        return False


def _load(path):
    with open_file(path) as file:
        return file.get_tensor("x")


def _share(items, make, wait, title, unit, rank, last=lambda: None):
    """make(item) for this worker's items and last(), then wait for the others. An error is held
    back until then, so that they do not wait for ever; Ctrl-C is not: it reaches all of them."""
    problem = None
    try:
        for item in tqdm(items, desc=title, unit=unit, disable=True if rank else None):
            make(item)
    except Exception as error:
        problem = error
    finally:
        last()
    if wait is not None:
        wait()
    if problem is not None:
        raise problem


def _all_there(paths, world):
    for i, path in enumerate(paths):
        if not path.is_file():
            raise ValueError(f"expected {path} from worker {i % world}, got no file; see what that "
                             "worker says, and that all use one folder")
    return paths


# ------------------------------------------------------------ the check, remembered


def check_once(rows: Sequence[Row], buckets: Sequence[Bucket], frame_rate: float,
               folder: str | Path, rank: int = 0, world: int = 1,
               wait: Callable[[], object] | None = None) -> Report:
    """`manifest.check_rows` with a memory: clips that have not changed are not decoded again.

    Ten thousand clips take an hour, and a training that goes on would spend it anew. Every worker
    decodes its share. Raises ValueError when the folder cannot be written.
    """
    folder = Path(folder)
    known = _read_known(folder, "probes")

    def look(path):
        try:
            stamp = f"{FORMAT} {_stamp(path)}"
        except OSError:
            return probe(path)  # says what is wrong
        if stamp not in known:
            try:
                found = probe(path)
                known[stamp] = [found.height, found.width, list(found.times), found.seconds,
                                found.beyond_srgb]
            except Unusable as error:
                known[stamp] = [error.reason, error.detail]
        if len(known[stamp]) == 2:
            raise Unusable(*known[stamp])
        height, width, times, *rest = known[stamp]
        return Probe(height, width, tuple(times), *rest)

    def done(row):
        return check_row(row, buckets, frame_rate, look)

    _share(rows[rank::world], done, wait, "check", "row", rank,
           lambda: _write_known(folder, "probes", rank, known))
    known |= _read_known(folder, "probes")
    return Report([done(row) for row in rows])


# ------------------------------------------------------------ latents and contexts


class CachedLatents:
    """Latents of rows, read when asked for: `latents[i]` is (C, F', H, W).
    groups: bucket -> its row indices; known: as in content_hash, also of references and faces."""

    def __init__(self, rows: Sequence[Row], paths: Sequence[Path],
                 known: dict[str, str] | None = None):
        self.rows, self.paths, self.known = list(rows), list(paths), known or {}
        self.groups: dict[Bucket, list[int]] = defaultdict(list)
        for i, row in enumerate(self.rows):
            self.groups[row.bucket].append(i)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return _load(self.paths[i])


@torch.no_grad()
def cache_latents(rows: Sequence[Row], vae: nn.Module, encode: Callable[[Tensor], Tensor],
                  folder: str | Path, rank: int = 0, world: int = 1,
                  wait: Callable[[], object] | None = None) -> CachedLatents:
    """Latents of checked rows (`Report.used`), computed where the folder does not hold them yet.

    encode: (1, 3, F, h, w) on the CPU -> (1, C, F', H, W), usually vae.encode; vae is only hashed.
    Stop it at any moment and call it again. Each worker makes its share and lists all. Raises
    Unusable with the row's number when a clip has changed since the check, ValueError when the
    folder cannot be written.
    """
    folder, weights = Path(folder), weights_hash(vae)
    known = _read_known(folder, "hashes")
    sweep(folder, ABANDONED)

    def make(row):
        path = _latent_path(row, folder, weights, known)
        with _row_named(row):
            for beside in filter(None, (row.reference, row.faces)):
                content_hash(beside, known)
        if not _is_intact(path):
            latent = encode(_read_clip(row, known)[None])[0]
            _save(path, latent, f"latent of row {row.number} ({row.video.name})", "VAE")

    _share(rows[rank::world], make, wait, "latents", "clip", rank,
           lambda: _write_known(folder, "hashes", rank, known))
    known |= _read_known(folder, "hashes")  # what the others found
    paths = [_latent_path(row, folder, weights, known) for row in rows]
    return CachedLatents(rows, _all_there(paths, world), known)


@contextmanager
def _row_named(row):
    """An error inside says which row it belongs to."""
    try:
        yield
    except (Unusable, OSError) as error:
        reason, detail = getattr(error, "reason", "missing file"), getattr(error, "detail", error)
        told = f"row {row.number}, {detail}; check the manifest again"
        raise Unusable(reason, told) from None


def _latent_path(row, folder, weights, known):
    with _row_named(row):
        content = content_hash(row.video, known)
    picture = row.video.suffix.lower() in IMAGES
    key = _key(content=content, picture=picture, vae=weights, bucket=list(row.bucket),
               frame_rate=row.frame_rate, start=row.start)
    return folder / f"{key}.safetensors"


def _read_clip(row, known):
    """The clip that was hashed: a file that is just being replaced must not pass as the old one."""
    with _row_named(row):
        before = content_hash(row.video, known)
        clip = load_clip(row.video, row.bucket, row.frame_rate, row.start)
        if content_hash(row.video, known) != before:
            raise Unusable("changed", f"{row.video.name} while it was read")
    return clip


@torch.no_grad()
def cache_contexts(captions: Sequence[str], encode: Callable[[list[str]], Tensor],
                   folder: str | Path, key: str, rank: int = 0, world: int = 1,
                   wait: Callable[[], object] | None = None) -> dict[str, Callable[[], Tensor]]:
    """Contexts of captions, each distinct one computed once: `contexts[caption]()` reads (N, D).

    encode: list of one caption -> (1, N, D), called only for a caption that is missing: with
    `lazy_encoder` a complete cache loads no text encoder at all. key: see `text_key`. Resuming,
    rank, world, wait and what raises: as in `cache_latents`.
    """
    folder, captions = Path(folder), list(dict.fromkeys(captions))
    paths = {caption: folder / f"{_key(caption=caption, encoder=key)}.safetensors"
             for caption in captions}
    sweep(folder, ABANDONED)

    def make(caption):
        if not _is_intact(paths[caption]):
            context = encode([caption])[0]
            _save(paths[caption], context, f"context of {caption!r:.60}", "text model")

    _share(captions[rank::world], make, wait, "captions", "caption", rank)
    _all_there(list(paths.values()), world)
    return {caption: functools.partial(_load, path) for caption, path in paths.items()}


def text_dtype(device: str | torch.device) -> torch.dtype:
    """As sample.py does by default: bf16 on a GPU (LTX-2.3), float32 on a CPU."""
    return torch.bfloat16 if str(device).startswith("cuda") else torch.float32


def lazy_encoder(checkpoint: str | Path, gemma_root: str | Path, device: str | torch.device = "cpu",
                 offload: str = "none") -> Callable[[list[str]], Tensor]:
    """captions -> contexts (B, N, D) in `text_dtype`; the encoder is loaded at the first call.

    offload: where Gemma's layers wait, see ltx.gemma.load_gemma.
    """

    @functools.cache
    def encoder():
        dtype = text_dtype(device)
        return TextEncoder.load(checkpoint, gemma_root, device, dtype, offload).eval()

    return lambda captions: encoder().encode(captions)


# ------------------------------------------------------------ command line


def _counting(encode, made):
    def counted(what):
        made.append(1)
        return encode(what)
    return counted


def _make_latents(args):
    vae, made = VideoVAE.load(args.checkpoint, args.device, torch.float32), []
    once = functools.partial(check_once, folder=args.folder)
    report = check_arguments(args, vae.time_scale, vae.space_scale, once)
    encode = _counting(lambda clip: vae.encode(clip.to(args.device)), made)
    there = len(set(cache_latents(report.used, vae, encode, args.folder).paths)) - len(made)
    print(f"latents: {there} were there, {len(made)} made, in {args.folder}", flush=True)
    return report


def _make_contexts(args, captions):
    key = text_key(args.checkpoint, args.gemma_root, args.folder, dtype=text_dtype(args.device))
    encode = lazy_encoder(args.checkpoint, args.gemma_root, args.device, args.offload_text)
    made = []
    there = len(cache_contexts(captions, _counting(encode, made), args.folder, key)) - len(made)
    print(f"contexts: {there} were there, {len(made)} made, in {args.folder}", flush=True)


def _check_device(name):
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        told = str(error).split("\n")[0]
        raise ValueError(f"expected a device of this machine, got {name} ({told}); "
                         "use --device cpu") from None


def main(words: list[str] | None = None) -> int:
    """Exit status: 0 every row is cached, 1 some are not, 2 a setting or the disk is no good."""
    p = Parser("clips.cache", description=__doc__.split("\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_manifest_arguments(p)
    add, given = p.add_argument, {"type": Path, "required": True, "default": argparse.SUPPRESS}
    add("--checkpoint-path", dest="checkpoint", **given, help="LTX-2.3: VAE and text connector")
    add("--gemma-root", **given, help="folder of Gemma 3")
    add("--folder", type=Path, default=Path("cache"), help="where latents and contexts are kept")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="where VAE (float32) and text encoder (bf16 on a GPU, float32 on a CPU) run")
    add("--offload-text", choices=OFFLOADS, default="none",
        help="where Gemma's layers wait, as in sample.py")
    args = p.parse_args(words)
    refused = []

    def work() -> None:
        _check_device(args.device)
        check_text(args.checkpoint, args.gemma_root)  # from headers alone: better now than later
        report = _make_latents(args)  # the VAE is freed before Gemma is loaded
        refused.extend(report.refused)
        _make_contexts(args, ["", *(row.caption for row in report.used)])

    stopped = f"what is whole stays in {args.folder}, and the same command goes on"
    return command("clips.cache", work, stopped) or int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
