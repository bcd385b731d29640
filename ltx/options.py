"""What a user may ask of sample.py: its flags, their defaults, and what is refused or warned of.

The idea. sample.py is the pipeline; here is everything around it that a student need not read: the
flags (those of LTX-2.3's own programs have LTX's names), where a number comes from that was not
given (the checkpoint, else LTX-2.3's official one), and what cannot be meant.

LTX-2.3:     the names and the official numbers.
paper:       nothing of this (ST-DRC, arXiv 2606.02441, gives no interface).
our reading: PRESETS, for public weights that were trained in another way than the paper's.

    args = build_parser().parse_args()
    resolve_numbers(args, read_inference(config, path))
    check_numbers(args, num_layers=48)                                    # makes args.guidance

Read next: clips/pictures.py
"""

import argparse
import re
import string
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn

from common.cli import DEVICES, Parser, check_ranges, find_device, warn
from common.files import one_line
from guidance import ORDERS
from ltx.load import INFERENCE, guidance_from, known_phrases, trained_placement
from ltx.offload import OFFLOADS
from model import DISTILLED_SIGMAS
from rope import PLACEMENTS

TINY = Path(__file__).resolve().parents[1] / "weights" / "tiny"
LTX23_FLAGS = ("--checkpoint-path ltx-2.3-22b-dev.safetensors "
               "--gemma-root gemma-3-12b-it-qat-q4_0-unquantized")
EXAMPLES = f"""
examples:
  python sample.py --ref examples/ada.png --prompt "a person in a red shirt laughs at the beach"
  python sample.py --ref face.jpg --prompt "A woman of about 60 laughs in the rain." \\
      {LTX23_FLAGS} --lora st-drc.safetensors
  python sample.py --plan     what the real model needs, and which card holds it
"""
# How weights that are not ours want to be asked; a flag that is given wins over each. our reading:
# LTX-Best-Face-ID as its own nodes run it (ComfyUI-BFSNodes, ltx_identity_overlap.py). They advise
# text 3 to 5 and reference 2 to 4 and name no best pair, so the middle of both stands here.
PRESETS = {
    "none": {"canvas": "letterbox"},
    "best-face-id": {"placement": "overlap_phase", "order": "two_deltas", "text_scale": 4.0,
                     "ref_scale": 3.0, "canvas": "crop", "prefix": "ref_t2v:"},
}
RANGES = {"height": (1, 10**6), "width": (1, 10**6), "num_frames": (1, 10**8),
          "frame_rate": (1, 240), "num_inference_steps": (1, 10_000), "text_scale": (0, 1000),
          "ref_scale": (0, 1000), "rescale": (0, 1), "stg_scale": (0, 1000),
          "guide_range": (0, 1), "seed": (0, 2**63 - 1), "loop_seconds": (0, 600)}


def build_parser() -> Parser:
    """Flags whose default is None take the checkpoint's number, else LTX-2.3's."""
    parser = Parser("sample.py", description="A face and a prompt in, a video of that person out.",
                    epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    add = parser.add_argument
    known = {k: f"(default: the checkpoint's, else {v})" for k, v in INFERENCE.items()}
    add("--ref", type=Path, metavar="PICTURE", help="the face, any format and size (required)")
    add("--prompt", help="what happens, beginning with a description of the person (required)")
    add("--batch", type=Path, metavar="JSON",
        help="instead of both: a list of {img, prompt}, a video for each")
    add("--output-folder", type=Path, metavar="FOLDER",
        help="of --batch: 1.mp4, 2.mp4, ...; what is there is not made again")
    add("--negative-prompt", default="", help="what to steer away from (default: empty)")
    add("--checkpoint-path", type=Path, default=TINY / "model.safetensors",
        help="LTX-2.3 file (default: the bundled one)")
    add("--gemma-root", type=Path, default=TINY / "gemma",
        help="folder of the text model (default: the bundled one)")
    add("--lora", nargs="+", action="append", default=[], metavar=("PATH", "STRENGTH"),
        help="LoRA file and strength, 1 if left out; give it again for another (default: none)")
    add("--output-path", type=Path, default=Path("out.mp4"),
        help="(default: %(default)s; .png and .json beside it)")
    add("--seed", type=int, default=0,
        help="of a batch's first case; each next one has one more (default: %(default)s)")
    add("--preset", choices=PRESETS,
        help="how public weights want to be asked (default: by the LoRA's name, else none)")
    add("--canvas", choices=("letterbox", "crop"),
        help="the whole picture on white, or its middle (default: the preset's, else letterbox)")
    add("--height", type=int, help=f"pixels {known['height']}")
    add("--width", type=int, help=f"pixels {known['width']}")
    add("--num-frames", type=int, help=known["num_frames"])
    add("--frame-rate", type=float, help=f"frames per second, 1 to 240 {known['frame_rate']}")
    add("--loop-seconds", type=float, default=3.0,
        help="a shorter video is written again and again, whole and forwards, until the file lasts "
             "so long; 0 = once (default: %(default)s)")
    add("--num-inference-steps", type=int, help=known["steps"])
    add("--text-scale", type=float, help=f"1 = prompt not amplified {known['text_scale']}")
    add("--ref-scale", type=float,
        help=f"1 = face not amplified, 0 = no face (order text_first) {known['ref_scale']}")
    add("--order", choices=ORDERS,
        help=f"how the streams are summed (default: the preset's, else {ORDERS[0]}; two_deltas for "
             "a LoRA that names no placement)")
    add("--rescale", type=float, help=f"0 = off, 0.7 calms burnt colours {known['rescale']}")
    add("--guide-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help=f"noise levels at which all streams are run {known['guide_range']}")
    add("--guide-every", type=int,
        help=f"run all streams every so many steps only {known['guide_every']}")
    add("--stg-scale", type=float,
        help=f"perturbed stream, LTX-2.3 uses 1, 0 = off {known['stg_scale']}")
    add("--stg-blocks", type=int, nargs="+", metavar="BLOCK",
        help=f"what it perturbs {known['stg_blocks']}")
    add("--distilled", action="store_true",
        help="distilled weights: 8 fixed steps, one stream, no scales (default: off)")
    add("--placement", choices=sorted(PLACEMENTS),
        help="reference positions, also against the weights' (default: as trained, else tass)")
    add("--offload", choices=OFFLOADS, default="none",
        help="where layers wait for their turn (default: %(default)s)")
    add("--offload-text", choices=OFFLOADS, help="the same for the text model (default: --offload)")
    add("--quantization", choices=("none", "fp8-cast"), default="none",
        help="fp8-cast: one byte per number of the transformer's matrices (default: %(default)s)")
    add("--device", choices=DEVICES, default="auto", help="(default: CUDA where it is, else cpu)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="(default: bfloat16 on CUDA, else float32)")
    add("--dry-run", action="store_true", help="check everything, print the settings, stop")
    add("--plan", action="store_true", help="print what fits on which card, and why; loads nothing")
    add("--tflops", type=float, help="for --plan: what the card reaches (default: measured there)")
    return parser


def recognise(loras: list[tuple[str, float]]) -> str:
    """The preset that a LoRA's file name tells, as Best_FaceID_v1.0_LoRA.safetensors does."""
    names = [re.sub("[^a-z]", "", Path(path).stem.lower()) for path, _ in loras]
    return next((preset for preset in PRESETS if preset != "none" for name in names
                 if preset.replace("-", "") in name), "none")


def resolve_preset(args: argparse.Namespace, trained: str | None) -> None:
    """Preset, order of guidance and canvas, as far as no flag gave them; trained: what the headers
    say of the placement, which is said by weights that were trained here and no others."""
    if args.preset is None:
        args.preset = recognise(args.lora) if trained is None else "none"
        if args.preset != "none":
            print(f"note: {args.preset} by the LoRA's name: "
                  + ", ".join(f"{name} {value}" for name, value in PRESETS[args.preset].items())
                  + ", where no flag says otherwise; --preset none for none of it")
    for name, value in PRESETS[args.preset].items():
        if name != "prefix" and getattr(args, name) is None:
            setattr(args, name, value)
    if args.order is None:  # see guidance.py: what is published for LTX sums its streams so
        args.order = "two_deltas" if args.lora and trained is None else ORDERS[0]


def prefixed(prompt: str, preset: str) -> str:
    """The prompt as the preset's weights read it: they were trained with a word in front."""
    prefix = PRESETS[preset].get("prefix", "")
    return prompt if prompt.lstrip().startswith(prefix) else f"{prefix} {prompt}"


def resolve_placement(args: argparse.Namespace, transformer: nn.Module) -> None:
    """The reference lies where it lay in training, unless the user says otherwise; and the preset.
    """
    trained, notes = trained_placement(args.checkpoint_path, args.lora, transformer)
    print(*(f"note: {note}\n" for note in notes), sep="", end="")
    resolve_preset(args, trained)
    if trained is None and args.preset == "none":
        warn("neither checkpoint nor LoRA says that it was trained with references; the face may "
             "be ignored")
    elif trained is not None and args.placement not in (None, trained):
        warn(f"these weights were trained with --placement {trained}; {args.placement} as asked")
    args.placement = args.placement or trained or "tass"


def resolve_numbers(args: argparse.Namespace, defaults: dict) -> None:
    """Numbers that were not given."""
    if args.distilled:
        if args.num_inference_steps not in (None, len(DISTILLED_SIGMAS) - 1):
            raise ValueError(f"expected {len(DISTILLED_SIGMAS) - 1} steps with --distilled, got "
                             f"{args.num_inference_steps}; leave --num-inference-steps out")
        # LTX-2.3: these weights give the guided result in one pass; guidance would apply it twice
        one = {"text_scale": 1.0, "ref_scale": 1.0, "rescale": 0.0, "stg_scale": 0.0,
               "guide_range": [0.0, 1.0], "guide_every": 1}
        vars(args).update(one)
        defaults = defaults | {"steps": len(DISTILLED_SIGMAS) - 1}
        print("note: --distilled runs one stream; --text-scale, --ref-scale, --rescale and "
              "--stg-scale have no effect")
    if args.num_inference_steps is None:
        args.num_inference_steps = defaults["steps"]
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def check_numbers(args: argparse.Namespace, num_layers: int) -> None:
    """What cannot be meant, and then args.guidance."""
    check_ranges(args, RANGES)
    args.guidance = guidance_from(vars(args), args.order)
    wrong = [block for block in args.stg_blocks if not 0 <= block < num_layers]
    if args.stg_scale and wrong:
        raise ValueError(f"expected --stg-blocks between 0 and {num_layers - 1}, got {wrong[0]}; "
                         "choose another")


def resolve_machine(args: argparse.Namespace) -> None:
    """Device and number type, with the reason for each."""
    asked = {name: getattr(args, name) != "auto" for name in ("device", "dtype")}
    args.device = find_device(args.device)
    if args.device == "mps" and args.quantization != "none":
        raise ValueError(f"expected --quantization none on mps, which has no float8, got "
                         f"{args.quantization}; leave it out")
    if not asked["dtype"]:
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    args.torch_dtype = getattr(torch, args.dtype)
    print(f"device  {args.device} ({'asked for' if asked['device'] else 'found'})")
    print(f"dtype   {args.dtype} ({'asked for' if asked['dtype'] else 'usual on this device'})")
    more = ", one more for each case" if args.batch else ""
    print(f"seed    {args.seed} (noise drawn on the CPU{more})")


def warn_of_surprises(args: argparse.Namespace, config: dict, defaults: dict, limit: float) -> None:
    """What works, but not as one might hope."""
    if not any(char.isprintable() and not char.isspace() for char in args.prompt):
        warn("the prompt is empty or nothing that can be read: the model shows what it likes")
    if any("\ud800" <= char <= "\udfff" for char in args.prompt + args.negative_prompt):
        warn("a prompt holds bytes that are no text, each is read as '?'")
    warn_of_words(f"{args.prompt} {args.negative_prompt}",
                  known_phrases(args.checkpoint_path, args.lora))
    sizes = ("height", "width", "num_frames")  # LTX-2.3 knows many sizes, its config names none
    if "inference" in config and any(getattr(args, name) != defaults[name] for name in sizes):
        warn(f"this checkpoint was trained at {defaults['width']}x{defaults['height']}, "
             f"{defaults['num_frames']} frames; at another size its videos fall apart")
    # paper: TASS lays the reference beyond the video, up to twice its size. LTX-2.3: max_pos.
    if (side := max(args.height, args.width)) * 2 > limit:
        warn(f"a side of {side} px puts reference positions beyond the trained {limit} px; stay "
             f"within {limit // 2} px")


def warn_of_words(prompt: str, phrases: list[str] | None) -> None:
    """One line for the words that no caption held: a small model takes them for others."""
    if not phrases:  # LTX-2.3 has read whatever there is
        return
    known = {word: phrase for phrase in reversed(phrases) for word in phrase.split()}
    words = [word.strip(string.punctuation) for word in one_line(prompt, len(prompt)).split()]
    unknown = [word for word in dict.fromkeys(words) if word and word not in known][:10]
    near = [known[get_close_matches(word.lower(), known, 1, cutoff=0)[0]] for word in unknown]
    if unknown:
        told = one_line(", ".join(unknown)), one_line(", ".join(dict.fromkeys(near)))
        warn(f"these weights never read: {told[0]}; the nearest phrases that they know: {told[1]}")
