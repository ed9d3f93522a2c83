"""U-ViT: a transformer that takes time, class and noisy patches as tokens, with long skips.

Its blocks are those of the ViT; decay runs over all of them, from the first to the last. Nothing
here knows a noise schedule. Source: arXiv 2209.12152.
"""

import torch
from torch import Tensor, nn

from . import require
from .mae import patchify, unpatchify
from .shortcuts import alpha_schedule, make_rules, paths
from .vit import make_blocks, silence, xavier


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Times [B] to [B, dim]: cosines, then sines, of dim / 2 frequencies from 1 towards 1e-4.

    Raises ValueError for an odd dim.
    """
    require("dim", dim, dim % 2 == 0, "be even")
    power = torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    angle = t[:, None] * 10000.0**-power
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Tokens(nn.Module):
    """Noisy images [B, C, H, W], times [B], classes [B] to tokens [B, E + N, D].

    The E = `extra` first ones are the class, where there are classes, and the time. A class of -1,
    or none at all, is the null class that guidance needs.
    """

    def __init__(
        self, image_size: int, patch_size: int, dim: int, channels: int, classes: int | None
    ) -> None:
        super().__init__()
        divides = 1 <= patch_size <= image_size and image_size % patch_size == 0
        require("patch_size", patch_size, divides, f"divide image_size {image_size}")
        require("dim", dim, dim >= 2 and dim % 2 == 0, "be even and at least 2")
        require("channels", channels, channels >= 1, "be at least 1")
        require("classes", classes, classes is None or classes >= 1, "be None or at least 1")
        self.shape, self.patch_size = (channels, image_size, image_size), patch_size
        self.classes, self.extra = classes or 0, 1 + bool(classes)
        self.embed = nn.Linear(channels * patch_size**2, dim)
        self.label = nn.Embedding(classes + 1, dim) if classes else None
        tokens = self.extra + (image_size // patch_size) ** 2
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, dim), std=0.02))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        expected = ", ".join(map(str, self.shape))
        require("x", tuple(x.shape), x.shape[1:] == self.shape, f"be [B, {expected}]")
        require("x", x.dtype, x.is_floating_point(), "be floats (data.to_float)")
        require("t", list(t.shape), t.shape == x.shape[:1], f"be [B] = [{len(x)}]")
        time = time_embedding(t, self.positions.shape[1]).to(self.positions.dtype)
        tokens = [time[:, None], self.embed(patchify(x, self.patch_size))]
        if self.label is not None:
            y = torch.full_like(t, -1, dtype=torch.int64) if y is None else self._checked(y, len(x))
            tokens.insert(0, self.label(torch.where(y < 0, self.classes, y))[:, None])
        elif y is not None:
            raise ValueError("y must be None for a net without classes")
        return torch.cat(tokens, dim=1) + self.positions

    def _checked(self, y: Tensor, rows: int) -> Tensor:
        # On a GPU to look at the values would be to wait for them.
        inside = y.is_cuda or not ((y < -1) | (y >= self.classes)).any()
        if y.shape != (rows,) or y.dtype != torch.int64 or not inside:
            wanted = f"int64 [{rows}] in 0…{self.classes - 1}, or -1 for no class"
            raise ValueError(f"y must be {wanted}, got {y.dtype} {list(y.shape)}: {y[:8].tolist()}")
        return y


class UViT(nn.Module):
    """A denoiser of depth / 2 blocks in, one in the middle, depth / 2 out: `uvit(x, t, y=None)`.

    x: noisy images [B, C, H, W]; t: times [B]; y: classes, int64 [B], -1 for none. Gives what the
    loss asks for, [B, C, H, W]. With `long_skips`, what block k of the way in gave joins the input
    of block k from the end: `Linear([x; tap])`, before its shortcuts, which so weaken it too.
    `alpha_min` < 1 makes the shortcut decay over all 2 * (depth + 1) sub-layers, along the schedule
    `kind`. `zero_init` starts branches and head at zero. Each tap, shallow to deep, is multiplied
    by its entry in `tap_scales` (1.0 unless set). `stem` (see `Tokens`) and `blocks` are what
    `reuse.layer_features(uvit, x_t, t)` reads: one call a noise level.
    Raises ValueError for sizes that do not divide, an odd depth or dim, a shortcut that cannot use
    `alpha_min`, and for `tap_scales` of another number.
    Differs from the source: Xavier-uniform weights, and eps 1e-6 where that has 1e-5, which damps
    the last layers of a small decayed net.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        channels: int = 3,
        classes: int | None = None,
        shortcut: str = "plain",
        alpha_min: float = 1.0,
        long_skips: bool = True,
        zero_init: bool = False,
        eps: float = 1e-6,
        kind: str = "linear",
    ) -> None:
        super().__init__()
        require("depth", depth, depth >= 2 and depth % 2 == 0, "be even and at least 2")
        rules = make_rules(shortcut, alpha_schedule(depth + 1, alpha_min, kind))
        self.stem = Tokens(image_size, patch_size, dim, channels, classes)
        self.blocks = make_blocks(dim, heads, rules, eps)
        self.skips = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = nn.Linear(dim, channels * patch_size**2)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.apply(xavier)
        if not long_skips:  # drawn all the same, so that a seed gives all else the same weights
            self.skips = nn.ModuleList()
        self.tap_scales = (1.0,) * len(self.skips)
        for block in paths(self)[::2]:  # as in the source
            block.branch.get_submodule("qkv").register_parameter("bias", None)
        if zero_init:
            silence(self)
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        given, wanted = len(self.tap_scales), len(self.skips)
        require("tap_scales", given, given == wanted, f"be {wanted}, one for each long skip")
        tokens, taps = self.stem(x, t, y), list[Tensor]()
        blocks = list(zip(self.blocks[::2], self.blocks[1::2], strict=True))
        first_out = len(blocks) - len(self.skips)
        for k, (attention, mlp) in enumerate(blocks):
            if k >= first_out:
                tap = taps.pop() * self.tap_scales[first_out - 1 - k]
                joined = torch.cat([tokens, tap], dim=-1)
                # The stream stays float32 under autocast.
                tokens = self.skips[k - first_out](joined).to(tokens.dtype)
            tokens = mlp(attention(tokens))
            if k < len(self.skips):
                taps.append(tokens)
        patches = self.head(self.norm(tokens[:, self.stem.extra :]))
        return self.smooth(unpatchify(patches, self.stem.patch_size))
