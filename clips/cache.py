"""What is computed once: latents of clips and contexts of captions, kept under a hash of all they depend on.

The idea. The VAE and the text encoder are frozen, so a training that sees a clip a hundred times would compute the
same latent a hundred times, and Gemma alone needs more memory than many GPUs have. Both are computed once, before. The
danger of a cache is the stale file: other weights, another crop, a re-encoded clip, and the old latent is still found.
So a file's name is the hash of everything its content depends on: the clip's bytes, bucket, frame rate, start and the
VAE's weights, or the caption and the text encoder's weights, and FORMAT of frames.py. Change one and another file is
asked for. Each file also carries a hash of its own numbers; a damaged one is made anew.

The reference pictures are not kept: their augmentation is random, so they are encoded in the step.

paper:        the VAE and the text encoder are frozen (ST-DRC, arXiv 2606.02441); no word on caching.
our reading:  all of this file.
LTX-2.3:      a context is 1024 x 4096 numbers: 8.4 MB for each caption in bf16, twice that in float32.

Conventions. Files are written beside and renamed: any number of processes, on any number of machines, may fill one
folder, and a stop at any moment leaves only whole files. Worker `rank` of `world` makes items rank, rank + world, ...;
`wait` returns when every worker has called it, however long that takes (the barrier of a process group gives up after
minutes unless told otherwise); rank 0 of 1 and None = alone. The null prompt "" is a caption like others.

    latents = cache_latents(report.used, vae, vae.encode, "cache")
    x0 = torch.stack([latents[i] for i in latents.groups[report.used[0].bucket][:4]])    # (4, C, F', H, W)
    encode = lazy_encoder("ltx-2.3.safetensors", "gemma", "cuda")              # loads nothing until it is called
    contexts = cache_contexts(["a cat", ""], encode, "cache", text_key("ltx-2.3.safetensors", "gemma", "cache"))
    contexts["a cat"]()                                                        # (N, D)

Read next: dataset.py
"""

import argparse
import hashlib
import json
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from clips.frames import FORMAT, IMAGES, Bucket, Probe, Unusable, load_clip, probe
from clips.manifest import Report, Row, add_manifest_arguments, check_arguments, check_row, read_manifest, sort_rows
from common.cli import Parser, command
from common.files import parse_json, read_text
from ltx.checkpoint import load_weights, open_file, read_metadata, shapes_from
from ltx.offload import OFFLOADS

ABANDONED = 3600  # our reading: seconds; what nobody has written to for so long belongs to a process that was killed

# ------------------------------------------------------------ hashes


def content_hash(path: Path, known: dict[str, str]) -> str:
    """sha256 of all bytes; `known` remembers it by path, size and time of change, and is added to."""
    stamp = _stamp(path)
    if stamp not in known:
        with path.open("rb") as file:
            known[stamp] = hashlib.file_digest(file, "sha256").hexdigest()
    return known[stamp]


def _stamp(path):
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def weights_hash(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights, so that another VAE never finds this one's latents."""
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
    """What a context depends on beside its caption: Gemma's files, the checkpoint's extractor and connector, the type.

    No number goes through a model. 24 GB are read once: the hashes are remembered in the cache folder by path, size
    and time of change. With several workers rank 0 reads, the others wait and look up. dtype: of the computation.
    Raises ValueError when a file is missing or no checkpoint.
    """
    if rank and wait:
        wait()
    try:
        return _text_key(Path(checkpoint), Path(gemma_root), Path(folder), rank, dtype)
    except OSError as error:
        raise ValueError(f"expected to read {error.filename or gemma_root}, got {error.strerror}; check the file"
                         ) from None
    finally:
        if not rank and wait:
            wait()  # also after an error: the others must not wait for ever


def _text_key(checkpoint, gemma_root, folder, rank, dtype):
    from ltx.text import CONNECTOR_PREFIX, EXTRACTOR_PREFIX

    settings = read_metadata(checkpoint)["config"].get("transformer")
    files = [gemma_root / "config.json", gemma_root / "tokenizer.json", *sorted(gemma_root.glob("*.safetensors"))]
    if len(files) < 3 or not (files[0].is_file() and files[1].is_file()):
        raise ValueError(f"expected config.json, tokenizer.json and *.safetensors in {gemma_root}, got not all of "
                         "them; download the whole Gemma folder")
    files += gemma_root.glob("model.safetensors.index.json")  # it decides which of them are read
    known = _read_known(folder, "hashes")
    try:
        # Only the text part of the checkpoint: 46 GB of it are video and sound, and LoRAs or trainings change those.
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
    return _key(gemma=gemma, extractor_and_connector=known[stamp], transformer=settings, dtype=str(dtype))


def _read_known(folder, what):
    """All that any worker remembered; it only saves time. An entry names its file's state, so none contradict."""
    known = {}
    for path in sorted(folder.glob(f"{what}-*.json")):
        try:
            known |= parse_json(read_text(path))
        except (OSError, ValueError, TypeError):
            pass
    return known


def _write_known(folder, what, rank, known):
    if known == _read_known(folder, what):
        return
    try:
        _write_beside(folder / f"{what}-{rank}.json", json.dumps(known).encode())
    except ValueError:
        pass  # a folder that holds everything may be read-only


def _key(**settings):
    return hashlib.sha256(json.dumps({"format": FORMAT, **settings}, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------ files


def _write_beside(path, data):
    """Write, then rename. The number of a process would not do for the name beside: machines may share the folder."""
    beside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(data)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"expected to be able to write in {path.parent}, got {error.strerror}; make room or choose "
                         "another folder, and run the same again: what is whole is kept") from None


def _sweep(folder):
    for path in folder.glob(f"*.safetensors.{'?' * 16}.partial"):  # no other program's, in whatever folder this is
        try:
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
        except OSError:
            pass  # another process was faster


def _finite(tensor, what, source):
    if not tensor.isfinite().all():
        raise ValueError(f"expected finite numbers in the {what}, got NaN or infinity; the weights of the {source} are "
                         "damaged, download them again")
    return tensor


def _save(path, key, tensor):
    tensor = tensor.detach().cpu().contiguous()
    metadata = {"key": key, "sha256": hashlib.sha256(_bytes(tensor)).hexdigest()}
    _write_beside(path, safetensors.torch.save({"x": tensor}, metadata))


def _is_whole(path, key):
    try:
        with open_file(path) as file:
            found = file.metadata()
            return found["key"] == key and found["sha256"] == hashlib.sha256(_bytes(file.get_tensor("x"))).hexdigest()
    except (ValueError, KeyError, OSError):
        return False


def _load(path):
    with open_file(path) as file:
        return file.get_tensor("x")


# ------------------------------------------------------------ the check, remembered


def check_once(manifest: str | Path, buckets: Sequence[Bucket], frame_rate: float, allow_outside: bool,
               roots: Sequence[str | Path], folder: str | Path, rank: int = 0, world: int = 1,
               wait: Callable[[], object] | None = None) -> Report:
    """`clips.check` with a memory: what was decoded before, and has not changed since, is not decoded again.

    Ten thousand clips take an hour, and a training that goes on would spend it anew. Every worker decodes its share.
    Raises ValueError when the manifest is unreadable or the folder cannot be written.
    """
    folder, rows = Path(folder), read_manifest(manifest, allow_outside, roots)
    known = _read_known(folder, "probes")

    def look(path):
        try:
            stamp = _stamp(path)
        except OSError:
            return probe(path)  # says what is wrong
        if stamp not in known:
            try:
                found = probe(path)
                known[stamp] = [found.height, found.width, list(found.times), found.seconds]
            except Unusable as error:
                known[stamp] = [error.reason, error.detail]
        if len(known[stamp]) == 2:
            raise Unusable(*known[stamp])
        height, width, times, seconds = known[stamp]
        return Probe(height, width, tuple(times), seconds)

    def done(row):
        return check_row(row, buckets, frame_rate, look)

    _share(rows[rank::world], done, wait, "check", "row", rank, lambda: _write_known(folder, "probes", rank, known))
    known |= _read_known(folder, "probes")
    return sort_rows([done(row) for row in rows])


# ------------------------------------------------------------ latents and contexts


class CachedLatents:
    """Latents of rows, read when asked for. `latents[i]` is (C, F', H, W); `groups`: bucket -> its row indices."""

    def __init__(self, rows: Sequence[Row], paths: Sequence[Path]):
        self.rows, self.paths = list(rows), list(paths)
        self.groups: dict[Bucket, list[int]] = defaultdict(list)
        for i, row in enumerate(self.rows):
            self.groups[row.bucket].append(i)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return _load(self.paths[i])


@torch.no_grad()
def cache_latents(rows: Sequence[Row], vae: nn.Module, encode: Callable[[Tensor], Tensor], folder: str | Path,
                  rank: int = 0, world: int = 1, wait: Callable[[], object] | None = None) -> CachedLatents:
    """Latents of checked rows (`Report.used`), computed where the folder does not hold them yet.

    encode: (1, 3, F, h, w) -> (1, C, F', H, W), usually vae.encode; the clip is on the CPU, so move it inside where the
    VAE is elsewhere. vae is only hashed. Stop it at any moment and call it again; a damaged file is made anew. Worker
    `rank` of `world` makes its share, waits for the others and lists all. Raises Unusable with the row's number when a
    clip has changed since the check, ValueError when the folder cannot be written.
    """
    folder, weights = Path(folder), weights_hash(vae)
    known = _read_known(folder, "hashes")
    _sweep(folder)

    def make(row):
        path, key = _latent_path(row, folder, weights, known)
        if not _is_whole(path, key):
            latent = encode(_read_clip(row, known)[None])[0]
            _save(path, key, _finite(latent, f"latent of row {row.number} ({row.video.name})", "VAE"))

    _share(rows[rank::world], make, wait, "latents", "clip", rank, lambda: _write_known(folder, "hashes", rank, known))
    known |= _read_known(folder, "hashes")  # what the others found
    return CachedLatents(rows, _all_there([_latent_path(row, folder, weights, known)[0] for row in rows], world))


def _latent_path(row, folder, weights, known):
    try:
        content = content_hash(row.video, known)
    except OSError as error:
        raise Unusable("missing file", f"row {row.number}, {error}; check the manifest again") from None
    key = _key(content=content, picture=row.video.suffix.lower() in IMAGES, vae=weights, bucket=list(row.bucket),
               frame_rate=row.frame_rate, start=row.start)
    return folder / f"{key}.safetensors", key


def _read_clip(row, known):
    """The clip that was hashed: a file that is being replaced must not give its frames to the old hash."""
    before = content_hash(row.video, known)
    try:
        clip = load_clip(row.video, row.bucket, row.frame_rate, row.start)
        if content_hash(row.video, known) != before:
            raise Unusable("changed", f"{row.video.name} while it was read")
    except Unusable as error:
        raise Unusable(error.reason, f"row {row.number}, {error.detail}; check the manifest again") from None
    except OSError as error:
        raise Unusable("missing file", f"row {row.number}, {error}; check the manifest again") from None
    return clip


def _share(items, make, wait, title, unit, rank, last=lambda: None):
    """make(item) for this worker's items and last(), then wait for the others. An error is held back until then, so
    that they do not wait for ever; Ctrl-C is not: it reaches all of them."""
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
            raise ValueError(f"expected {path} from worker {i % world}, got no file; see what that worker says, and "
                             "that all use one folder")
    return paths


@torch.no_grad()
def cache_contexts(captions: Sequence[str], encode: Callable[[list[str]], Tensor], folder: str | Path, key: str,
                   rank: int = 0, world: int = 1, wait: Callable[[], object] | None = None
                   ) -> dict[str, Callable[[], Tensor]]:
    """Contexts of captions, each distinct one computed once: `contexts[caption]()` reads it, (N, D).

    encode: list of one caption -> (1, N, D). It is called only for a caption that is missing, so it may load the text
    encoder when it is first called (`lazy_encoder`), and a complete cache needs no encoder at all. key: whatever the
    context depends on beside the caption, see `text_key`. Resumable, damaged files, rank, world, wait and what raises:
    as in `cache_latents`.
    """
    folder, captions = Path(folder), list(dict.fromkeys(captions))
    paths = {caption: folder / f"{_key(caption=caption, encoder=key)}.safetensors" for caption in captions}
    _sweep(folder)

    def make(caption):
        if not _is_whole(paths[caption], paths[caption].stem):
            context = _finite(encode([caption])[0], f"context of {caption!r:.60}", "text model")
            _save(paths[caption], paths[caption].stem, context)

    _share(captions[rank::world], make, wait, "captions", "caption", rank)
    _all_there(list(paths.values()), world)
    return {caption: (lambda path=path: _load(path)) for caption, path in paths.items()}


def text_dtype(device: str | torch.device) -> torch.dtype:
    """As sample.py does by default: bf16 on a GPU (LTX-2.3), float32 on a CPU."""
    return torch.bfloat16 if str(device).startswith("cuda") else torch.float32


def lazy_encoder(checkpoint: str | Path, gemma_root: str | Path, device: str | torch.device = "cpu",
                 offload: str = "none") -> Callable[[list[str]], Tensor]:
    """captions -> contexts (B, N, D) in `text_dtype`. Loads the text encoder when it is first called, and keeps it.

    offload: where Gemma's layers wait, see gemma.load_gemma.
    """
    loaded = []

    def encode(captions):
        from ltx.text import TextEncoder

        if not loaded:
            dtype = text_dtype(device)
            loaded.append(TextEncoder.load(checkpoint, gemma_root, device, dtype, offload).eval())
        return loaded[0].encode(captions)

    return encode


def load_vae(checkpoint: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The checkpoint's VAE in float32, frozen. Raises ValueError when it has none."""
    from ltx.vae import VideoVAE

    config = read_metadata(checkpoint)["config"]
    if "vae" not in config:
        raise ValueError(f"expected 'vae' in the config of {checkpoint}, got none; use the full checkpoint")
    with shapes_from(checkpoint):
        vae = VideoVAE(config["vae"])
    return load_weights(vae, checkpoint, "vae.", torch.float32, device).eval().requires_grad_(False)


def _counting(encode, count):
    def counted(x):
        count.append(1)
        return encode(x)
    return counted


def _make_latents(args: argparse.Namespace) -> Report:
    vae, made = load_vae(args.checkpoint, args.device), []
    report = check_arguments(args, vae.time_scale, vae.space_scale, partial(check_once, folder=args.folder))
    latents = cache_latents(report.used, vae, _counting(lambda x: vae.encode(x.to(args.device)), made), args.folder)
    there = len(set(latents.paths)) - len(made)
    print(f"latents: {there} were there, {len(made)} made, in {args.folder}", flush=True)
    return report


def _make_contexts(args: argparse.Namespace, captions: list[str]) -> None:
    made, key = [], text_key(args.checkpoint, args.gemma_root, args.folder, dtype=text_dtype(args.device))
    encode = _counting(lazy_encoder(args.checkpoint, args.gemma_root, args.device, args.offload_text), made)
    contexts = cache_contexts(captions, encode, args.folder, key)
    print(f"contexts: {len(contexts) - len(made)} were there, {len(made)} made, in {args.folder}", flush=True)


def _check_device(name):
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        told = str(error).split("\n")[0]
        raise ValueError(f"expected a device of this machine, got {name} ({told}); use --device cpu") from None


def main(words: list[str] | None = None) -> int:
    """Exit status: 0 every row is cached, 1 some are not, 2 an argument or the disk is no good, 130 or 143 stopped."""
    p = Parser("clips.cache", description=__doc__.split("\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_manifest_arguments(p)
    p.add_argument("--checkpoint-path", dest="checkpoint", type=Path, required=True, default=argparse.SUPPRESS,
                   help="an LTX-2.3 checkpoint: VAE and text connector")
    p.add_argument("--gemma-root", type=Path, required=True, default=argparse.SUPPRESS, help="folder of Gemma 3")
    p.add_argument("--folder", type=Path, default=Path("cache"), help="where latents and contexts are kept")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="where VAE (float32) and text encoder (bf16 on a GPU, float32 on a CPU) run")
    p.add_argument("--offload-text", choices=OFFLOADS, default="none", help="where Gemma's layers wait, as in sample.py")
    args = p.parse_args(words)
    from ltx.text import check_text
    refused = []

    def work() -> None:
        _check_device(args.device)
        check_text(args.checkpoint, args.gemma_root)  # from headers alone: better now than after the latents
        report = _make_latents(args)  # the VAE is freed before Gemma is loaded
        refused.extend(report.refused)
        _make_contexts(args, ["", *(row.caption for row in report.used)])
    status = command("clips.cache", work, f"what is whole stays in {args.folder}, and the same command goes on")
    return status or int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
