"""The numbers of the toy: how large its clips are, and where they are kept.

The idea. The procedural world (toy/world.py) can draw any size. The bundled model was trained on
one: a second of 64 x 64 pixels, which two CPU cores can render, encode and learn from. The failure
this prevents: a size written down in five files, of which four are changed.

our reading: all of it; ST-DRC (arXiv 2606.02441) trains LTX-2.3 on videos of people.

Conventions. Sizes in pixels, frames per second; GRID counts latent frames, height and width under
the tiny VAE, which takes 4 frames and 8 x 8 pixels together, the first frame alone.

    latents = torch.zeros(GRID[0] * GRID[1] * GRID[2], 128)

Read next: toy/world.py
"""

from pathlib import Path

DATA = Path("data")                                # rendered clips; in the folder one works in
FRAMES, SIZE, FRAME_RATE = 9, 64, 8.0              # at 48 pixels the eyes would be 1-2 pixels wide
GRID = ((FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
CLIPS = 24_576                                     # every one shows another person
