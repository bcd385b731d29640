"""The numbers of the toy: how large its clips are, how large its model is, where both are kept.

The idea. The procedural world (toy/world.py) can draw any size. The bundled model was trained on
one: a second of 64 x 64 pixels, which two CPU cores can render, encode and learn from. The model
is LTX-2.3's own config with small numbers: same code, same file format, other numbers. The failure
this prevents: a size written down in five files, of which four are changed.

LTX-2.3:      the keys of the tables, 128 latent channels, the kinds of blocks in the VAE.
our reading:  every number else; ST-DRC (arXiv 2606.02441) starts from the real LTX-2.3.

Conventions. Sizes in pixels, frames per second; GRID counts latent frames, height and width under
the tiny VAE, which takes 4 frames and 8 x 8 pixels together, the first frame alone.

    latents = torch.zeros(GRID[0] * GRID[1] * GRID[2], 128)

Read next: toy/world.py
"""

from pathlib import Path

from ltx.gemma import GemmaConfig
from model import TransformerConfig

DATA, RUNS = Path("data"), Path("runs")            # in the folder one works in
WEIGHTS = Path("weights/tiny")                     # the bundled checkpoint
FRAMES, SIZE, FRAME_RATE = 9, 64, 8.0              # at 48 pixels the eyes would be 1-2 pixels wide
GRID = ((FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
CLIPS = 24_576                                     # every one shows another person

TINY_VAE = {
    "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3,
    "latent_channels": 128,  # as LTX-2.3: the best linear code gains 3 dB on 64 channels
    "patch_size": 4, "norm_layer": "pixel_norm", "latent_log_var": "uniform",
    "use_quant_conv": False, "causal_decoder": False, "timestep_conditioning": False,
    "normalize_latent_channels": False, "scaling_factor": 1.0,
    "encoder_base_channels": 32, "decoder_base_channels": 32, "spatial_padding_mode": "zeros",
    "encoder_blocks": [
        ["res_x", {"num_layers": 2}], ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}], ["compress_time_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 2}]],
    "decoder_blocks": [
        ["res_x", {"num_layers": 2}], ["compress_all", {"multiplier": 2}],
        ["res_x", {"num_layers": 3}], ["compress_time", {"multiplier": 1}],
        ["res_x", {"num_layers": 2}]],
}

# LTX's own theta of 10000 and (20 s, 2048, 2048) would waste most frequencies on these clips.
TINY_TRANSFORMER = TransformerConfig(
    in_channels=128, out_channels=128, num_layers=6, heads=4, head_dim=48,
    theta=100.0, max_pos=(2, 128, 128)).to_checkpoint() | {
        "connector_num_layers": 1, "connector_num_attention_heads": 4,
        "connector_attention_head_dim": 48, "connector_num_learnable_registers": 16,
        "connector_positional_embedding_max_pos": [64], "connector_apply_gated_attention": True,
        "connector_norm_output": True, "use_embeddings_connector": True,
        "text_encoder_norm_type": "per_token_rms", "text_max_length": 48}

TINY_GEMMA = GemmaConfig(
    vocab_size=512, hidden_size=96, intermediate_size=192, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=48, query_pre_attn_scalar=48.0,
    sliding_window=64)

# What sample.py uses when a flag is not given; a checkpoint without this entry gets LTX-2.3's own
# numbers. Scales and guide_every (1.93 calls a step) were chosen on people of the validation split:
# `python -m study.evaluate --split val --text-scale ...`, `python -m bench.fewer_calls`.
TINY_INFERENCE = {
    "width": SIZE, "height": SIZE, "num_frames": FRAMES, "frame_rate": FRAME_RATE, "steps": 15,
    "text_scale": 2.0, "ref_scale": 2.5, "rescale": 0.0, "guide_range": [0.2, 1.0],
    "guide_every": 2, "schedule_tokens": GRID[0] * GRID[1] * GRID[2]}

EXAMPLES = {"ada": 7, "ben": 15, "cleo": 18, "dan": 13}  # examples/: people of the test split
