"""A frozen list of one-line faults, and whether the tests notice each of them.

A suite is worth what it catches. Every row of MUTANTS is a mistake that somebody could make in one line; the command
makes it in a copy of the repository, runs the tests that should notice, and prints which one did. A fault that
survives is a hole in the suite: write the test, do not touch the row. Not collected by pytest: it takes minutes.

    python tests/mutants.py                 all of them, two at a time
    python tests/mutants.py rope losses     those whose file or text contains a word
    python tests/mutants.py --check         only that every row still fits its file

Hardware: CPU. Run it after deleting or rewriting a test.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds for the tests of one fault; one that hangs is noticed, too


class Mutant(NamedTuple):
    file: str
    before: str  # stands exactly once in the file
    after: str
    tests: str   # what pytest is given: files, or single tests, separated by blanks


LOADING, VAE, TILING = "tests/test_loading.py", "tests/test_vae.py", "tests/test_tiling.py"
OFFLOAD, PLAN, FAST_CPU = "tests/test_offload.py", "tests/test_plan.py", "tests/test_fast_cpu.py"
MUTANTS: list[Mutant] = [
    # ltx: checkpoint, wrong_file, vae, tiling, offload, plan, fast_cpu
    Mutant("ltx/checkpoint.py", "self.start = 8 + length", "self.start = length", LOADING),
    Mutant("ltx/checkpoint.py", "offset=begin - page)", "offset=0)", LOADING),
    Mutant("ltx/checkpoint.py", "else dtype or tensor.dtype", "else dtype or like.dtype", LOADING),
    Mutant("ltx/checkpoint.py", "if (found := tuple(entry.get_shape())) != shape:",
           "if len(found := tuple(entry.get_shape())) != len(shape):", LOADING),
    Mutant("ltx/checkpoint.py", "_check(file, path, wanted, prefix)\n        for", "for", LOADING),
    Mutant("ltx/checkpoint.py", "type(n) in (int, kind) and", "isinstance(n, (int, kind)) and",
           LOADING),
    Mutant("ltx/checkpoint.py", "(count and len(numbers) != count)", "not numbers", LOADING),
    Mutant("ltx/checkpoint.py", 'torch.device("meta")', 'torch.device("cpu")', LOADING),
    Mutant("ltx/checkpoint.py", "if name not in changed}", "if name in changed}", LOADING),
    Mutant("ltx/wrong_file.py", "size >= whole:\n        return", "size > whole:\n        return",
           LOADING),
    Mutant("ltx/wrong_file.py", "release < (1, 0)", "release < (0, 9)", LOADING),
    Mutant("ltx/wrong_file.py", "elder and not sound", "elder and sound", LOADING),
    Mutant("ltx/wrong_file.py", "settings.get(key, value) != value", "settings.get(key) != value",
           LOADING),
    Mutant("ltx/wrong_file.py", "not config and names and all(", "not config and names and any(",
           LOADING),
    Mutant("ltx/vae.py", "permute(0, 1, 3, 5, 7, 2, 4, 6)", "permute(0, 1, 5, 3, 7, 2, 4, 6)", VAE),
    Mutant("ltx/vae.py", "[first, first, x] if causal", "[first, x, last] if causal", VAE),
    Mutant("ltx/vae.py", "x[:, :, 1:] if self", "x[:, :, :-1] if self", VAE),
    Mutant("ltx/vae.py", "length.square() / x.shape[1]", "length.square()", VAE),
    Mutant("ltx/vae.py", 'block_list(config["decoder_blocks"])[::-1]',
           'block_list(config["decoder_blocks"])', VAE),
    Mutant("ltx/vae.py", "return x[:, :-1]", "return x[:, 1:]", VAE),
    Mutant("ltx/vae.py", "latent * std + mean", "(latent + mean) * std", VAE),
    Mutant("ltx/vae.py", "F - (F - 1) % self.time_scale", "F - F % self.time_scale", VAE),
    Mutant("ltx/vae.py", "cell - max(1, reach)", "cell - reach", VAE),
    Mutant("ltx/vae.py", "VAE_PREFIX, dtype, device)", "VAE_PREFIX, None, device)", VAE),
    Mutant("ltx/vae.py", "-10 * torch.log10", "-20 * torch.log10", VAE),
    Mutant("ltx/tiling.py", "range(0, length - overlap,", "range(0, length,", TILING),
    Mutant("ltx/tiling.py", "(a - 1, b, left + 1, right) if a", "(a - 1, b, left, right) if a",
           TILING),
    Mutant("ltx/tiling.py", "(k + 1) / (tile.left + 1)", "k / (tile.left + 1)", TILING),
    Mutant("ltx/tiling.py", "math.ceil(overlap / scale)", "round(overlap / scale)", TILING),
    Mutant("ltx/tiling.py", "size * side / max(H, W)", "size * side / min(H, W)", TILING),
    Mutant("ltx/tiling.py", "frames[:, :, done:].clone()", "frames[:, :, done:]", TILING),
    Mutant("ltx/tiling.py", "frames[:, :, : held.shape[2]] += held", "pass", TILING),
    Mutant("ltx/tiling.py", "if asked and size <= shared:", "if asked and size < shared:", TILING),
    Mutant("ltx/tiling.py", "@torch.no_grad()", "@torch.enable_grad()", TILING),
    Mutant("ltx/offload.py", 'block.to("meta")', "pass", OFFLOAD),
    Mutant("ltx/offload.py", "yield self.slots[i % 2]", "yield self.slots[0]", OFFLOAD),
    Mutant("ltx/offload.py", "compute.wait_stream(self.side)\n                if", "if", OFFLOAD),
    Mutant("ltx/offload.py", "self.side.wait_stream(compute)", "pass", OFFLOAD),
    Mutant("ltx/offload.py", "compute.wait_stream(self.side)\n\n", "pass\n\n", OFFLOAD),
    Mutant("ltx/offload.py", "            cast_linears(child)", "            pass", OFFLOAD),
    Mutant("ltx/offload.py", "changed(stem + name, tensor)", "changed(name, tensor)", OFFLOAD),
    Mutant("ltx/offload.py", "check_weights(model, path, prefix)  # now", "pass  # now", OFFLOAD),
    Mutant("ltx/offload.py", "self.blocks, self.slots = blocks, []",
           "self.blocks, self.slots = nn.ModuleList(blocks), []", OFFLOAD),
    Mutant("ltx/plan.py", '"K * 4*n*n*D"', '"K * 4*n*N*D"', PLAN),
    Mutant("ltx/plan.py", "2 * weights[name] // sizes", "weights[name] // sizes", PLAN),
    Mutant("ltx/plan.py", "made.keys() - given.keys()", "made.keys()", PLAN),
    Mutant("ltx/plan.py", "count(False), L + R: reads_reference.count(True)",
           "count(True), L + R: reads_reference.count(False)", PLAN),
    Mutant("ltx/plan.py", "frame if tiled else frame *", "frame if not tiled else frame *", PLAN),
    Mutant("ltx/plan.py", '"yes" if untiled <= card', '"yes" if tiled <= card', PLAN),
    Mutant("ltx/plan.py", "- 1).bit_length()", ").bit_length()", PLAN),
    Mutant("ltx/fast_cpu.py", "torch.is_grad_enabled() or", "False or", FAST_CPU),
    Mutant("ltx/fast_cpu.py", 'torch.is_autocast_enabled("cpu")', "False", FAST_CPU),
    Mutant("ltx/fast_cpu.py", "scores.softmax(-1)", "scores.softmax(-2)", FAST_CPU),
    Mutant("ltx/fast_cpu.py", "or attn_mask is not None or", "or", FAST_CPU),
    Mutant("ltx/fast_cpu.py", "bias, padding, stride, dilation", "bias, stride, padding, dilation",
           FAST_CPU),
    Mutant("ltx/fast_cpu.py", "32 or not torch.backends.mkldnn.enabled:", "32:", FAST_CPU),
    # ltx: the text half and LoRA; toy/vocabulary.py
    Mutant("ltx/tokenizer.py", "sorted(added, key=len, reverse=True)",
           "sorted(added, key=len)", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "heapq.heappush(heap, (rank, i,",
           "heapq.heappush(heap, (-rank, i,", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "offer(before[i], i)", "offer(i, i)", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "*self.raw_ids(text.strip())]",
           "*self.raw_ids(text)]", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "self.encode(text)[:length]",
           "self.encode(text)[-length:]", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "[self.pad] * padding + ids",
           "ids + [self.pad] * padding", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", ' or not model.get("byte_fallback")', "", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "if pair[0] + pair[1] not in vocab:",
           "if False:", "tests/test_tokenizer.py"),
    Mutant("toy/vocabulary.py", "(-pairs[p], p)", "(-pairs[p],)", "tests/test_tokenizer.py"),
    Mutant("toy/vocabulary.py", "pairs[pair] += words[word]",
           "pairs[pair] += 1", "tests/test_tokenizer.py"),
    Mutant("toy/vocabulary.py", "pairs[pair] < 2", "pairs[pair] < 1", "tests/test_tokenizer.py"),
    Mutant("toy/vocabulary.py", "parts[i : i + 2] =",
           "parts[i : i + 1] =", "tests/test_tokenizer.py"),
    Mutant("ltx/gemma.py", "(1 + self.weight.float())",
           "self.weight.float()", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "(key > query - window)",
           "(key >= query - window)", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "(mask[:, None, :] > 0)",
           "(mask[:, :, None] > 0)", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "k.repeat_interleave(self.groups, dim=1)",
           "k.repeat(1, self.groups, 1, 1)", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "config.query_pre_attn_scalar**-0.5",
           "config.head_dim**-0.5", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "SLIDING: _angles(N, config.head_dim, config.local_theta,",
           "SLIDING: _angles(N, config.head_dim, config.global_theta,", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "(-pair / hd) / factor)",
           "(-pair / hd) * factor)", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "states[-1] = self.norm(x)", "states[-1] = x", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "torch.tensor(config.hidden_size**0.5, dtype=x.dtype,",
           "torch.tensor(config.hidden_size**0.5,", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "if (i + 1) % pattern else",
           "if i % pattern else", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "0 < value <= most", "0 <= value <= most", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "if (config.get(key) or value) != value:",
           "if False:", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "if want != (got := tuple(row.get_shape())):",
           "if len(want) != len(got := tuple(row.get_shape())):", "tests/test_gemma.py"),
    Mutant("ltx/text.py", "(dim / gemma_hidden) ** 0.5",
           "(gemma_hidden / dim) ** 0.5", "tests/test_text.py"),
    Mutant("ltx/text.py", "torch.stack(states, dim=-1)",
           "torch.stack(states, dim=-2)", "tests/test_text.py"),
    Mutant("ltx/text.py", "torch.where(mask[..., None] > 0, flat, torch.zeros_like(flat))",
           "flat", "tests/test_text.py"),
    Mutant("ltx/text.py", "descending=True, stable=True",
           "descending=False, stable=True", "tests/test_text.py"),
    Mutant("ltx/text.py", "registers.repeat(N // count, 1)",
           "registers.repeat_interleave(N // count, 0)", "tests/test_text.py"),
    Mutant("ltx/text.py", "< real.sum(1, keepdim=True)",
           "<= real.sum(1, keepdim=True)", "tests/test_text.py"),
    Mutant("ltx/text.py", "    if length % registers:", "    if False:", "tests/test_text.py"),
    Mutant("ltx/text.py", "(last := max(tokenizer.pieces)) >= sizes",
           "(last := max(tokenizer.pieces)) > sizes", "tests/test_text.py"),
    Mutant("ltx/text.py", "if type(prompts) is str:", "if False:", "tests/test_text.py"),
    Mutant("ltx/text.py", "[len(tokenizer.encode(prompt)) for",
           "[length for", "tests/test_text.py"),
    Mutant("ltx/lora.py", "torch.zeros(linear.out_features, rank), alpha / rank)",
           "torch.ones(linear.out_features, rank), alpha / rank)", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "    model.requires_grad_(False)\n", "", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "= B * layer.scale", "= B", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "weight.to(torch.float32, copy=True)",
           "weight.to(torch.float32)", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "A.to(total), alpha=scale)", "A.to(total))", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "_fused(weight, [(A, B, strength * scale)])",
           "_fused(weight, [(A, B, strength)])", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "append((A, B, strength * scale))",
           "append((A, B, strength))", "tests/test_lora.py"),
    Mutant("ltx/lora.py", " or not math.isfinite(number):", ":", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "1.0 if alpha is None else alpha / rank",
           "1.0 if alpha is None else alpha", "tests/test_lora.py"),
    Mutant("ltx/lora.py", '{"prompt_adaln_single": "prompt_adaln", "adaln_single": "time_embed",',
           '{"adaln_single": "time_embed", "prompt_adaln_single": "prompt_adaln",',
           "tests/test_lora.py"),
    Mutant("ltx/lora.py", "    if unknown:", "    if False:", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "                if part in parts:",
           "                if False:", "tests/test_lora.py"),
    Mutant("ltx/lora.py", '("audio", "a2v_ca", "v2a_ca")', '("audio",)', "tests/test_lora.py"),
    # study/figures: what the pictures say
    Mutant("study/figures.py", '" + s_R (v_R - v_0)"', '" + s_R (v_0 - v_R)"',
           "tests/test_figures.py::test_the_formula_under_an_order_is_its_sum"),
    Mutant("study/figures.py", '((1, "v_0", "v_R"), (0, "v_R", "v_RT"))',
           '((1, "v_0", "v_T"), (0, "v_T", "v_RT"))',
           "tests/test_figures.py::test_the_streams_beside_the_arrows_are_those_that_are_run"),
    Mutant("study/figures.py", "world.ACTIONS[action]", "world.ACTIONS[action - 1]",
           "tests/test_figures.py::test_the_two_words_under_a_person_are_the_prompts"),
    Mutant("study/figures.py", "text_scale=text, ref_scale=ref", "text_scale=ref, ref_scale=text",
           "tests/test_figures.py::test_the_grid_of_scales_asks_for_all_pairs_of_one_prompt"),
    Mutant("study/figures.py", "v_hat = loss.add_noise(x0, noise, s), noise - other",
           "v_hat = loss.add_noise(x0, noise, s), noise - x0",
           "tests/test_figures.py::test_a_wrong_face_costs_more_on_the_face_than_in_the_plain_loss"),
    Mutant("study/figures.py", 'models().config["inference"] | scales',
           'models().config["inference"]', "tests/test_figures.py"),
    Mutant("study/figures.py", "append_images=others, loop=0", "append_images=others, loop=1",
           "tests/test_figures.py::test_the_animation_has_the_clips_frames_and_repeats_for_ever"),
    # clips: frames, manifest, cache, and the example detector
    Mutant("clips/frames.py", "(bucket.frames - 1) % time_scale", "bucket.frames % time_scale",
           "tests/test_frames.py::test_bucket_texts_are_read_and_bad_ones_refused"),
    Mutant("clips/frames.py", "<= MAX_ENLARGE]", "<= 1]", "tests/test_frames.py"),
    Mutant("clips/frames.py", "abs(math.log(b.height / b.width) - shape)",
           "math.log(b.height / b.width) - shape", "tests/test_frames.py"),
    Mutant("clips/frames.py", "scale = max(bucket.height", "scale = min(bucket.height",
           "tests/test_frames.py"),
    Mutant("clips/frames.py", "crop.top :, crop.left :", "crop.left :, crop.top :",
           "tests/test_frames.py"),
    Mutant("clips/frames.py", ", antialias=True", "", "tests/test_frames.py"),
    Mutant("clips/frames.py", "round(self.source.rotation / 90) % 4",
           "-round(self.source.rotation / 90) % 4", "tests/test_frames.py"),
    Mutant("clips/frames.py", '"ITU709" if unsaid else None', "None", "tests/test_frames.py"),
    Mutant("clips/frames.py", "ImageOps.exif_transpose(image)", "image.copy()",
           "tests/test_frames.py"),
    Mutant("clips/frames.py", '{"protocol_whitelist": "none"}', "{}", "tests/test_frames.py"),
    Mutant("clips/frames.py", "frame.width * aspect", "frame.width", "tests/test_frames.py"),
    Mutant("clips/frames.py", "stream.frames > count", "stream.frames < count",
           "tests/test_manifest.py"),
    Mutant("clips/frames.py", "key_met = key_met or frame.key_frame", "key_met = True",
           "tests/test_frames.py"),
    Mutant("clips/frames.py", "for back in (0.0, 2.0)", "for back in (0.0,)",
           "tests/test_frames.py"),
    Mutant("clips/frames.py", "max(0, index - 1) : index + 2", "index : index + 2",
           "tests/test_frames.py"),
    Mutant("clips/frames.py", "self.seconds * frame_rate + ROUNDING", "self.seconds * frame_rate",
           "tests/test_frames.py"),
    Mutant("clips/frames.py", "<= time - target + TIE", "<= time - target", "tests/test_frames.py"),
    Mutant("clips/frames.py", "1 if last.time == 0 else (last.end", "(last.end",
           "tests/test_frames.py"),
    Mutant("clips/manifest.py", "(boxes[:, 2:] > boxes[:, :2]).all()",
           "(boxes[:, 2:] > boxes[:, :2]).any()", "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "crop.columns / faces.size[1], crop.rows / faces.size[0]",
           "crop.columns / faces.size[0], crop.rows / faces.size[1]", "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "scale.repeat(2) - shift.repeat(2)",
           "scale.repeat(2) + shift.repeat(2)", "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "gap <= 0.5 / faces.frame_rate", "gap <= 1 / faces.frame_rate",
           "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "kept >= 0.5 * area", "kept > 0 * area", "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "(x < x1)", "(x < x1 - 1)", "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "range(own[0], own[-1] + 1)", "range(own[0], own[-1])",
           "tests/test_manifest.py"),
    Mutant("clips/manifest.py", 'lines = enumerate(text.split("\\n"), 1)',
           'lines = enumerate(text.split("\\n"))', "tests/test_manifest.py"),
    Mutant("clips/manifest.py", 'text["caption"].strip()', 'text["caption"]',
           "tests/test_manifest.py"),
    Mutant("clips/manifest.py", 'if ".." in Path(name).parts', 'if Path(name).parts[0] == ".."',
           "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "path.is_relative_to(folder)", "str(path).startswith(str(folder))",
           "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "size[0] / size[1] * seen[1] / seen[0]",
           "size[0] / size[1] * seen[0] / seen[1]", "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "if row.identity and other.identity", "if other.identity",
           "tests/test_manifest.py"),
    Mutant("clips/manifest.py", " and other.video != row.video", "", "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "if k not in own", "if k in own", "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "picture.width / face.size[1], picture.height / face.size[0]",
           "face.size[1] / picture.width, face.size[0] / picture.height", "tests/test_manifest.py"),
    Mutant("clips/manifest.py", "choice = seen or indices", "choice = indices",
           "tests/test_manifest.py"),
    Mutant("clips/manifest.py", '"nothing was written") or int(bool(refused))',
           '"nothing was written")', "tests/test_manifest.py"),
    Mutant("clips/cache.py", " {status.st_mtime_ns}", "", "tests/test_cache.py"),
    Mutant("clips/cache.py", ", vae=weights", "", "tests/test_cache.py"),
    Mutant("clips/cache.py", ", start=row.start", "", "tests/test_cache.py"),
    Mutant("clips/cache.py", "_key(caption=caption, encoder=key)", "_key(caption=caption)",
           "tests/test_cache.py"),
    Mutant("clips/cache.py", "(EXTRACTOR_PREFIX, CONNECTOR_PREFIX)", "(EXTRACTOR_PREFIX,)",
           "tests/test_cache.py"),
    Mutant("clips/cache.py", "if rank and wait:", "if wait:", "tests/test_cache.py"),
    Mutant("clips/cache.py", 'f"{what}-{rank}.json"', 'f"{what}-0.json"', "tests/test_cache.py"),
    Mutant("clips/cache.py", 'found["key"] == path.stem and ', "", "tests/test_cache.py"),
    Mutant("clips/cache.py", ' and found["sha256"] == hashlib.sha256(data).hexdigest()', "",
           "tests/test_cache.py"),
    Mutant("clips/cache.py", "if not tensor.isfinite().all():", "if tensor.isinf().any():",
           "tests/test_cache.py"),
    Mutant("clips/cache.py", "_share(rows[rank::world], make,", "_share(rows[rank:], make,",
           "tests/test_cache.py"),
    Mutant("clips/cache.py", "        problem = error\n", "        raise error\n",
           "tests/test_cache.py"),
    Mutant("clips/cache.py", "found.height, found.width, list(", "found.width, found.height, list(",
           "tests/test_cache.py"),
    Mutant("clips/cache.py", "known[stamp] = [error.reason, error.detail]", "raise",
           "tests/test_cache.py"),
    Mutant("clips/cache.py", "if content_hash(row.video, known) != before:", "if not before:",
           "tests/test_cache.py"),
    Mutant("clips/cache.py", "ABANDONED = 3600", "ABANDONED = 0", "tests/test_cache.py"),
    Mutant("clips/cache.py", '["", *(row.caption', "[*(row.caption", "tests/test_cache.py"),
    Mutant("examples/make_faces.py", "points += x + 0.5, y + 0.5", "points += x, y",
           "tests/test_manifest.py"),
    Mutant("examples/make_faces.py", ", reverse=True", "", "tests/test_manifest.py"),
    Mutant("examples/make_faces.py", '"t": time - first', '"t": time', "tests/test_manifest.py"),
    Mutant("examples/make_faces.py", '"size": size[::-1], "frames"', '"size": size, "frames"',
           "tests/test_manifest.py"),
    Mutant("examples/make_faces.py", ".rotate(frame.rotation, expand=True)", "",
           "tests/test_manifest.py"),
    # common/seeds
    Mutant("common/seeds.py", "repr(numbers)", "repr(sorted(map(str, numbers)))",
           "tests/test_seeds.py"),
    Mutant("common/seeds.py", "repr(numbers)", "repr(numbers[-2:])", "tests/test_seeds.py"),
    Mutant("common/seeds.py", "random.Random(repr(numbers)).getrandbits(63)", "abs(hash(numbers))",
           "tests/test_seeds.py"),
    # clips: dataset, face, video
    Mutant("clips/dataset.py", "f.name: v[start:stop]", "f.name: v[start:]",
           "tests/test_dataset.py"),
    Mutant("clips/dataset.py", '"contexts": batch.context,', "", "tests/test_dataset.py"),
    Mutant("clips/dataset.py", 'seeded(self.seed, "order", epoch)', 'seeded(self.seed, "order")',
           "tests/test_dataset.py"),
    Mutant("clips/dataset.py", 'seeded(self.seed, "order", epoch)', 'seeded("order", epoch)',
           "tests/test_dataset.py"),
    Mutant("clips/dataset.py", "-(-self.size // len(order))", "self.size // len(order)",
           "tests/test_dataset.py"),
    Mutant("clips/dataset.py", "range(0, last + 1, self.size)", "range(0, last, self.size)",
           "tests/test_dataset.py"),
    Mutant("clips/dataset.py", "sum(max(1, len(group) // size)", "sum((len(group) // size)",
           "tests/test_dataset.py"),
    Mutant("clips/dataset.py", "torch.randperm(len(batches), generator=g).tolist()",
           "range(len(batches))", "tests/test_dataset.py"),
    Mutant("clips/dataset.py", "range(rank * size, len(indices), world_size * size)",
           "range(rank, len(indices), world_size)", "tests/test_dataset.py"),
    Mutant("clips/dataset.py", "row.frame_rate, row.start)", "row.frame_rate)",
           "tests/test_dataset.py"),
    Mutant("clips/dataset.py", "min(bucket.height / h, bucket.width / w)",
           "max(bucket.height / h, bucket.width / w)", "tests/test_dataset.py"),
    Mutant("clips/dataset.py", "[bucket.width - w * scale, bucket.height - h * scale]",
           "[bucket.height - h * scale, bucket.width - w * scale]", "tests/test_dataset.py"),
    Mutant("clips/dataset.py", "drawn.landmarks * scale + corner", "drawn.landmarks * scale",
           "tests/test_dataset.py"),
    Mutant("clips/dataset.py", "h, w = rows[0].bucket.height, rows[0].bucket.width",
           "w, h = rows[0].bucket.height, rows[0].bucket.width", "tests/test_dataset.py"),
    Mutant("clips/dataset.py", "(path.name, row.caption, str", "(path.name, str",
           "tests/test_dataset.py"),
    Mutant("clips/face.py", "self.conv1(self.bn1(x))", "self.conv1(x)", "tests/test_face.py"),
    Mutant("clips/face.py", "nnf.normalize(x.float(), dim=1)", "nnf.normalize(x.float(), dim=0)",
           "tests/test_face.py"),
    Mutant("clips/face.py", "16 * isqrt(flat // widths[-1])", "112", "tests/test_face.py"),
    Mutant("clips/face.py", r"((module|backbone)\.)+", r"((module|backbone)\.)?",
           "tests/test_face.py"),
    Mutant("clips/face.py", "if missing or extra:", "if missing:", "tests/test_face.py"),
    Mutant("clips/face.py", "torch.tensor(TEMPLATE) + 0.5", "torch.tensor(TEMPLATE)",
           "tests/test_face.py"),
    Mutant("clips/face.py", "b = (px * qy - py * qx)", "b = (py * qx - px * qy)",
           "tests/test_face.py"),
    Mutant("clips/face.py", "length >= MIN_SPREAD**2", "length > 0", "tests/test_face.py"),
    Mutant("clips/face.py", ">= MIN_FIT * spread", "> 0 * spread", "tests/test_face.py"),
    Mutant("clips/face.py", "x * 2 / w - 1, y * 2 / h - 1", "x * 2 / h - 1, y * 2 / w - 1",
           "tests/test_face.py"),
    Mutant("clips/face.py", "align_corners=False)", "align_corners=True)", "tests/test_face.py"),
    Mutant("clips/face.py", 'padding_mode="border"', 'padding_mode="zeros"', "tests/test_face.py"),
    Mutant("clips/face.py", "square(boxes[~known])", "boxes[~known]", "tests/test_face.py"),
    Mutant("clips/face.py", "torch.maximum(x1 - x0", "torch.minimum(x1 - x0",
           "tests/test_face.py"),
    Mutant("clips/video.py", "frames.clamp(-1, 1)", "frames", "tests/test_video.py"),
    Mutant("clips/video.py", "Fraction(self.frame_rate).limit_denominator(1001)",
           "Fraction(round(self.frame_rate))", "tests/test_video.py"),
    Mutant("clips/video.py", 'dst_color_range="MPEG"', 'dst_color_range="JPEG"',
           "tests/test_video.py"),
    Mutant("clips/video.py", "thread_count = 1", "thread_count = 2", "tests/test_video.py"),
    Mutant("clips/video.py", "self.container.mux(self.stream.encode())", "pass",
           "tests/test_video.py"),
    Mutant("clips/video.py", "np.linspace(0, num_frames - 1,", "np.linspace(0, num_frames,",
           "tests/test_video.py"),
    Mutant("clips/video.py", "list(row), dim=2) for row in rows], dim=1)",
           "list(row), dim=1) for row in rows], dim=2)", "tests/test_video.py"),
    Mutant("clips/video.py", "LONG_SIDE // max(height, width)", "LONG_SIDE // min(height, width)",
           "tests/test_video.py"),
    Mutant("clips/video.py", "to(torch.float32, copy=True)", "to(torch.float32)",
           "tests/test_video.py"),
    Mutant("clips/video.py", "        del run  #", "        pass  #", "tests/test_video.py"),
    Mutant("clips/video.py", "if count != num_frames:", "if count < num_frames:",
           "tests/test_video.py"),
    Mutant("clips/video.py", "for temporary in hidden:", "for temporary in hidden[:1]:",
           "tests/test_video.py"),
    Mutant("clips/video.py", "if count in places:", "if True:", "tests/test_video.py"),
    # toy: clips and their sizes
    Mutant("toy/config.py", "(FRAMES - 1) // 4 + 1", "FRAMES // 4", "tests/test_toy_clips.py"),
    Mutant("toy/config.py", "9, 64, 8.0", "9, 64, 24.0", "tests/test_toy_clips.py"),
    Mutant("toy/config.py", "9, 64, 8.0", "9, 48, 8.0", "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", "seeded(world.SPLIT_SEEDS[split], i)",
           "seeded(world.SPLIT_SEEDS[split], i - start)", "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", "seeded(world.SPLIT_SEEDS[split], i)", "seeded(i)",
           "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", "((light, world.LIGHTS), (shirt, world.SHIRTS),",
           "((shirt, world.SHIRTS), (light, world.LIGHTS),", "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", "world.action_poses(action[None], FRAMES, g)",
           "world.action_poses(action[None], FRAMES, generators[0])", "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", "self.contexts[self.context_row[-1]]", "self.contexts[0]",
           "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", 'self.contexts[self.context_row[clips["caption"]]]',
           'self.contexts[clips["caption"]]', "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", 'zip(clips["person"], clips["setting"]',
           'zip(clips["person"].roll(1, 0), clips["setting"]', "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", '"person": self.rows["person"][rows]', '"person": self.rows["person"]',
           "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", 'clip_rows("val", 0, count)', 'clip_rows("train", 0, count)',
           "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", 'device == "cpu" and (DATA', 'device == "cpu" or (DATA',
           "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", "patchify(vae.encode(video))", "patchify(vae.encode(video * 0.5 + 0.5))",
           "tests/test_toy_clips.py"),
    Mutant("toy/clips.py", '}, fresh"', '}"', "tests/test_toy_clips.py"),
    # study
    Mutant("toy/head.py", "{\"turns left\": -yaw", "{\"turns left\": yaw", "tests/test_scores.py"),
    Mutant("toy/head.py", "y[:, 1:] * y.new_tensor(POSE_SPREAD)", "y[:, 1:]",
           "tests/test_scores.py"),
    Mutant("study/scores.py", "torch.where(found, 0.0, torch.inf)",
           "torch.where(found, torch.inf, 0.0)", "tests/test_scores.py"),
    Mutant("study/scores.py", "embed_clips(eval_encoder, video) * seen[..., None]",
           "embed_clips(eval_encoder, video)", "tests/test_scores.py"),
    Mutant("study/scores.py", "own[:, :2].mean(1) - own[:, 3:].mean(1)",
           "own[:, 3:].mean(1) - own[:, :2].mean(1)", "tests/test_scores.py"),
    Mutant("study/scores.py", "torch.where(asked[:, i] == ref[:, i], torch.nan, leak)", "leak",
           "tests/test_scores.py"),
    Mutant("study/scores.py", "(moved & (share >= 0.5))", "moved", "tests/test_scores.py"),
    Mutant("study/scores.py", "free[:, 1:] & free[:, :-1]", "free[:, 1:] | free[:, :-1]",
           "tests/test_scores.py"),
    Mutant("study/scores.py", ".abs() / 2).mean(1)", ".abs()).mean(1)", "tests/test_scores.py"),
    Mutant("study/scores.py", "start[:, column] -= offset", "start[:, column] += offset",
           "tests/test_scores.py"),
    Mutant("study/scores.py", "(table.sum(1) - own)", "table.sum(1)", "tests/test_scores.py"),
    Mutant("study/scores.py", "B.trace() - 2 * cross", "B.trace() - cross", "tests/test_scores.py"),
    Mutant("study/scores.py", "STUDENT[n - 2] if", "STUDENT[n - 1] if", "tests/test_scores.py"),
    Mutant("study/scores.py", "values[~values.isnan()]", "values.nan_to_num()",
           "tests/test_scores.py"),
    Mutant("study/results.py", "found = [x - y for", "found = [y - x for", "tests/test_results.py"),
    Mutant("study/results.py", "else 3), abs(mean) > half", "else 3), mean > half",
           "tests/test_results.py"),
    Mutant("study/results.py", "difference(records[seed], base[seed], name)",
           "difference(records[seed], next(iter(base.values())), name)", "tests/test_results.py"),
    Mutant("study/results.py", "(100, 1, \" %\") if", "(1, 3, \"\") if", "tests/test_results.py"),
    Mutant("study/results.py", "if before.get(key) != settings[key]:", "if key not in before:",
           "tests/test_results.py"),
    Mutant("study/results.py", "for r in found) / 3600", "for r in found) / 60",
           "tests/test_results.py"),
    Mutant("study/results.py", "{found[at][1]:.3f} / {found[at][0]", "{found[at][0]:.3f} / {found[at][1]",
           "tests/test_results.py"),
    Mutant("study/evaluate.py", "\"ref_pose\": data[\"ref_pose\"][first]}",
           "\"ref_pose\": data[\"ref_pose\"]}", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "world.draw_settings(people, g), torch.rand(people, generator=g)",
           "torch.rand(people, generator=g)", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "args.dtype, args.seed, *(content_hash",
           "args.dtype, *(content_hash", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "(\"*.py\", \"ltx/*.py\",", "(\"*.py\",", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "if not path.exists():", "if True:", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "None if name == \"no reference\" else tokens", "tokens",
           "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "swapped = with_person(data, (data[\"who\"] + 1)",
           "swapped = with_person(data, (data[\"who\"] + 0)", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "(data[\"who\"] + people // 2)", "(data[\"who\"])",
           "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "cosine = torch.where(marks.isnan(), box, marks)", "cosine = box",
           "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", ".nan_to_num(0)", "", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "mean().item() / 2]", "mean().item()]", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "str(value).removeprefix(f\"{HERE}/\")", "str(value)",
           "tests/test_evaluate.py"),
    Mutant("study/ablate.py", "\"default\" if self.part == \"guidance\" else self.variant",
           "self.variant", "tests/test_ablate.py"),
    Mutant("study/ablate.py", "flags.items() if value is not None", "flags.items() if value",
           "tests/test_ablate.py"),
    Mutant("study/ablate.py", "**DEFAULT | changed)", "**DEFAULT)", "tests/test_ablate.py"),
    Mutant("study/ablate.py", "\"drop_both\": 0.0, \"drop_text\": 0.1", "\"drop_both\": 0.0",
           "tests/test_ablate.py"),
    Mutant("study/ablate.py", "args.jobs and not (training and todo[0].part == \"guidance\"):",
           "args.jobs:", "tests/test_ablate.py"),
    Mutant("study/ablate.py", "if child.returncode == 0 and more:", "if more:",
           "tests/test_ablate.py"),
    Mutant("study/ablate.py", "child.terminate()", "child.kill()", "tests/test_ablate.py"),
    Mutant("study/ablate.py", "tasks if not task.result(args.folder).exists()]", "tasks]",
           "tests/test_ablate.py"),
    Mutant("study/ablate.py", "for state in folder.glob(\"state-*.safetensors\")",
           "for state in folder.glob(\"*.safetensors\")", "tests/test_ablate.py"),
    # common
    Mutant("common/files.py", "        write(temporary)\n        os.replace(temporary, path)",
           "        write(path)", "tests/test_files.py"),
    Mutant("common/files.py", 'f".{path.stem[:60]}.', 'f"{path.stem[:60]}.', "tests/test_files.py"),
    Mutant("common/files.py", "        temporary.unlink(missing_ok=True)", "        pass",
           "tests/test_files.py"),
    Mutant("common/files.py", "st_mtime >= seconds", "st_mtime <= seconds", "tests/test_files.py"),
    Mutant("common/files.py", "in range(JSON_DEPTH):", "in range(JSON_DEPTH + 1):",
           "tests/test_files.py"),
    Mutant("common/files.py", "if not path.is_file():", "if path.is_dir():", "tests/test_files.py"),
    Mutant("common/cli.py", "not low <= value <= high", "(value < low or value > high)",
           "tests/test_cli.py"),
    Mutant("common/cli.py", "if os.path.lexists(p))", "if p.is_dir())", "tests/test_cli.py"),
    Mutant("common/cli.py", "signalled.args[0] if signalled.args else signal.SIGINT",
           "signal.SIGINT", "tests/test_cli.py"),
    Mutant("common/cli.py", "            signal.signal(number, handler)", "            pass",
           "tests/test_cli.py"),
    Mutant("common/cli.py", "raise  # a mistake of ours", "pass  # a mistake of ours",
           "tests/test_cli.py"),
    Mutant("common/cli.py", "    sys.unraisablehook = hook", "    pass", "tests/test_cli.py"),
]


def misfit(mutant: Mutant) -> str:
    """What is wrong with a row, or nothing."""
    path = ROOT / mutant.file
    if not path.exists():
        return f"{mutant.file} does not exist"
    count = path.read_text(encoding="utf-8").count(mutant.before)
    if count != 1:
        return f"{mutant.before!r} stands {count} times in {mutant.file}"
    gone = [t for t in mutant.tests.split() if not (ROOT / t.partition("::")[0]).exists()]
    return f"no such test file: {gone[0]}" if gone else ""


def killer(mutant: Mutant) -> str:
    """The test that noticed, or "" when the fault survived."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for path in ROOT.iterdir():
            if path.name in ("weights", "examples", "docs"):
                (folder / path.name).symlink_to(path)
            elif path.is_dir() and not path.name.startswith(".") and path.name not in ("runs", "data"):
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.is_file():
                shutil.copy(path, folder)
        linked = folder / Path(mutant.file).parts[0]
        if linked.is_symlink():  # a fault must not reach the original
            linked.unlink()
            shutil.copytree(ROOT / linked.name, linked)
        target = folder / mutant.file
        text = target.read_text(encoding="utf-8")
        target.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider",
                   *mutant.tests.split()]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
        except subprocess.TimeoutExpired:
            return f"(over {LIMIT} s)"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if done.returncode not in (0, 1, 2) or (done.returncode and not found):
        return f"(pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-200:]!r})"
    return found[1] if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only rows whose file, text or tests contain one of them")
    parser.add_argument("--check", action="store_true", help="run nothing, see whether the rows fit the files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.words or any(w in " ".join(m) for w in args.words)]
    if wrong := [told for m in chosen if (told := misfit(m))]:
        print(*wrong, sep="\n")
        return 2
    if args.check:
        print(f"{len(chosen)} faults fit their files")
        return 0
    start, survived = time.time(), 0
    print("| file | instead of | stands | noticed by |\n|---|---|---|---|")
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, test in zip(chosen, pool.map(killer, chosen), strict=True):
            survived += not test
            cells = (" ".join(text.split()).replace("|", "/") for text in mutant[1:3])
            print(f"| {mutant.file} | `" + "` | `".join(cells) + f"` | {test or 'NOBODY'} |", flush=True)
    print(f"\n{len(chosen)} faults, {len(chosen) - survived} killed, {survived} survived, {time.time() - start:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
