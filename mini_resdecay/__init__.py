"""Residual shortcuts, and what they do to the features of deep nets.

The code behind the book. One idea a file; a file imports only from files above it in this list,
so it can be read from top to bottom:

    data         image sets as uint8 tensors, seeded batches, augmentation of whole batches
    shortcuts    the heart: alpha schedules, path masks and `Residual`, the one block of every net
    toy          the spiral and the linear residual net
    vit          a vision transformer from parts
    cnn          a small residual CNN
    mae          the masked autoencoder in three architectures
    uvit         the U-shaped denoiser: long skips, and decay over its whole depth
    diffusion    noise schedules, the loss, samplers for any callable
    droppath     the two-stage ResidualDroppath step and its control arms
    train        one training loop for everything; the step is passed in
    evaluate     how good features are: neighbours, linear probe, fine-tuning; Fréchet distance
    reuse        the diagnosis: similarity maps, effective rank, skip-one-block, probes by layer
    results      recorded runs: written, checked, compared, opened
    figures      arrays in, picture out, with alt text
    widgets      figures that move without a kernel
    checks       answers to exercises: right, or the name of the mistake
    experiments  named experiments with their source, expectation and cost
    __main__     the command line: `python -m mini_resdecay list`
"""

import difflib
from collections.abc import Collection

__version__ = "0.1.0"
REPO = "https://github.com/mini-resdecay/mini-resdecay"


def known(argument: str, value: str, allowed: Collection[str]) -> str:
    """`value` if it is allowed; else a ValueError that lists what is, and the nearest name."""
    if value in allowed:
        return value
    names = [name for name in allowed if name]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    listed = ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])}, …"
    raise ValueError(f'{argument} must be one of {listed}, got "{value}"{hint}')


def require(argument: str, value: object, fits: object, wanted: str) -> None:
    """A ValueError that says "{argument} must {wanted}, got {value}", unless `fits`."""
    if not fits:
        raise ValueError(f"{argument} must {wanted}, got {value}")
