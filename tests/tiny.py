"""A random checkpoint of LTX-2.3's form, small enough to run in a blink; it knows nothing.

    write_tiny(folder)  ->  folder/model.safetensors, folder/gemma/, folder/face.png
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn

from ltx.checkpoint import save_checkpoint
from ltx.gemma import GemmaConfig, GemmaTextModel, save_gemma
from ltx.text import CONNECTOR_PREFIX, EXTRACTOR_PREFIX, Connector, FeatureExtractor
from ltx.vae import VideoVAE
from model import TransformerConfig, VideoTransformer
from toy.vocabulary import train_bpe

BLOCKS = [["res_x", {"num_layers": 1}], ["compress_all_res", {"multiplier": 2}],
          ["res_x", {"num_layers": 1}], ["compress_time_res", {"multiplier": 1}],
          ["res_x", {"num_layers": 1}]]
VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 16, "patch_size": 4,
       "encoder_base_channels": 8, "decoder_base_channels": 8, "encoder_blocks": BLOCKS,
       "decoder_blocks": [[kind.removesuffix("_res"), value] for kind, value in BLOCKS]}
SIZES = TransformerConfig(in_channels=16, out_channels=16, num_layers=2, heads=4, head_dim=12,
                          theta=100.0, max_pos=(2, 128, 128))
CONNECTOR = {"connector_num_layers": 1, "connector_num_attention_heads": 4,
             "connector_attention_head_dim": 12, "connector_num_learnable_registers": 8,
             "connector_positional_embedding_max_pos": [32], "text_max_length": 32,
             "connector_apply_gated_attention": True, "connector_norm_output": True}
INFERENCE = {"width": 32, "height": 32, "num_frames": 5, "frame_rate": 8.0, "steps": 3,
             "text_scale": 3.0, "ref_scale": 2.0, "rescale": 0.0, "schedule_tokens": 48,
             "reference_psnr_floor": 60.0}
CAPTIONS = ["a person in a red shirt laughs", "a person in a blue shirt turns left in a park",
            "red and blue light"]


def config() -> dict:
    transformer = {**SIZES.to_checkpoint(), **CONNECTOR}
    return {"transformer": transformer, "vae": VAE, "inference": INFERENCE}


def livelier(module: nn.Module) -> nn.Module:
    """Move every tensor away from zero and one, so that each of them matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def parts(gemma_config: GemmaConfig) -> dict[str, nn.Module]:
    """Every module of the checkpoint under its prefix."""
    settings, states = config()["transformer"], gemma_config.num_hidden_layers + 1
    return {
        "model.diffusion_model.": VideoTransformer(SIZES),
        CONNECTOR_PREFIX: Connector(settings),
        EXTRACTOR_PREFIX: FeatureExtractor(settings, gemma_config.hidden_size, states),
        "vae.": VideoVAE(VAE),
    }


def write_tiny(folder: Path, seed: int = 0, metadata: dict[str, str] | None = None) -> Path:
    """Write checkpoint, text folder and a drawn face; the same seed gives the same weights."""
    torch.manual_seed(seed)
    tokenizer = train_bpe(CAPTIONS, 300)
    gemma_config = GemmaConfig(vocab_size=len(tokenizer["model"]["vocab"]), hidden_size=16,
                               intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                               num_key_value_heads=1, head_dim=8, sliding_window=16)
    tensors = {}
    for prefix, module in parts(gemma_config).items():
        tensors |= {prefix + name: tensor for name, tensor in livelier(module).state_dict().items()}
    metadata = {"reference_placement": "tass"} if metadata is None else metadata
    save_checkpoint(folder / "model.safetensors", tensors, config(), metadata)
    save_gemma(folder / "gemma", livelier(GemmaTextModel(gemma_config)), tokenizer)
    draw_face().save(folder / "face.png")
    return folder


def draw_face(size: int = 48, skin: str = "sandybrown") -> Image.Image:
    image = Image.new("RGB", (size, size), "steelblue")
    draw = ImageDraw.Draw(image)
    draw.ellipse([size // 4, size // 8, 3 * size // 4, 7 * size // 8], fill=skin)
    for x in (2 * size // 5, 3 * size // 5):
        draw.ellipse([x - 2, size // 3, x + 2, size // 3 + 4], fill="black")
    return image
