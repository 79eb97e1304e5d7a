"""Draw docs/figures/masks.png, which shows one example of every mask.

Run `python docs/figures/masks.py` from the root of the repository.
"""

from pathlib import Path

import numpy as np

from attnlab import attention as a
from attnlab.inspect.figures import mask_grid

N = 16
DOCUMENTS = np.array([[1] * 5 + [2] * 8 + [3] * 3])
IMAGES = np.array([[0] * 2 + [1] * 5 + [0] * 3 + [2] * 4 + [0] * 2])
CONTINUATIONS = np.array([[0] * 6 + [1] * 4 + [2] * 3 + [3] * 3])
MARKERS = np.isin(np.arange(N), [2, 6, 11])[None]
CHOSEN = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]], bool)
PARENTS = (-1, 0, 0, 0, 1, 1, 2, 3, 4, 4)

MASKS = {
    "causal()": a.causal(),
    "window(4, 0)": a.window(4, 0),
    "window(2, 2)": a.window(2, 2),
    "dilated(2, 6, 6)": a.dilated(2, 6, 6),
    "strided(4)": a.strided(4),
    "sinks_and_window(2, 4)": a.sinks_and_window(2, 4),
    "prefix(6)": a.prefix(6),
    "key_lengths(11)": a.key_lengths(11),
    "chunked(5)": a.chunked(5),
    "block_causal(4)": a.block_causal(4),
    "block_diffusion(8, 2)": a.block_diffusion(8, 2),
    "segments(documents)": a.segments(DOCUMENTS),
    "causal() & segments(...)": a.causal() & a.segments(DOCUMENTS),
    "shared_prefix(ids)": a.shared_prefix(CONTINUATIONS),
    "islands(images)": a.islands(IMAGES),
    "media(markers, 5)": a.media(MARKERS, 5),
    "tree(parents, prefix=6)": a.tree(PARENTS, prefix=6),
    "global_tokens((0, 9))": a.global_tokens((0, 9)),
    "window(...) | global_tokens(...)": a.window(1, 1) | a.global_tokens((0, 9)),
    "bigbird(16, 2, random=1)": a.bigbird(N, size=2, random=1),
    "blocks(chosen, 4)": a.blocks(CHOSEN, 4),
    "neighbourhood(16, 5)": a.neighbourhood(N, 5),
    "neighbourhood(16, 3, 3)": a.neighbourhood(N, 3, dilation=3),
    "neighbourhood((4, 4), (3, 3))": a.neighbourhood((4, 4), (3, 3)),
    "sliding_tile((8, 4), (2, 2), ...)": a.sliding_tile((8, 4), (2, 2), (3, 1)),
}


def main():
    """Write the figure to the folder of this file."""
    sizes = {
        "media(markers, 5)": (N, 15),
        "tree(parents, prefix=6)": (10, N),
        "sliding_tile((8, 4), (2, 2), ...)": (32, 32),
    }
    drawn = {name: mask.materialize(*sizes.get(name, (N, N)))[0, 0] for name, mask in MASKS.items()}
    mask_grid(drawn).savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
