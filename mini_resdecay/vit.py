"""A vision transformer from parts: patches, attention, MLP, and the `Residual` of every net.

Each block of the usual description is two `Residual`s here, attention and MLP, so that paths and
factors are counted by sub-layer. Source: arXiv 2010.11929; positions and names as in 2111.06377.
"""

import copy
import math
from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from . import require
from .shortcuts import Decay, Plain, Residual, alpha_schedule, fold_gains, make_rules, paths


def sincos_positions(dim: int, rows: int, columns: int) -> Tensor:
    """Fixed positions [1 + rows * columns, dim]: zeros for the class token, then row by row.

    The first half of the channels tells the column, the second the row, each as the sines, then
    the cosines of dim / 4 frequencies. Raises ValueError if dim is no multiple of 4.
    """
    require("dim", dim, dim >= 4 and dim % 4 == 0, "be a multiple of 4 above 0")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (column, row)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim), table.float()])


class Stem(nn.Module):
    """Images [B, C, H, W] to tokens [B, 1 + N, D]: linear patches with positions, class token.

    With `keep` [B, K], indices of patches, only those are embedded: [B, 1 + K, D].
    """

    def __init__(self, image_size: int, patch_size: int, dim: int, channels: int) -> None:
        super().__init__()
        if not 1 <= patch_size <= image_size or image_size % patch_size:
            raise ValueError(f"patch_size must divide image_size {image_size}, got {patch_size}")
        require("channels", channels, channels >= 1, "be at least 1")
        self.shape, self.patch_size = (channels, image_size, image_size), patch_size
        side = image_size // patch_size
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(dim, side, side))
        self.embed = nn.Linear(channels * patch_size**2, dim)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, dim))

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        require(
            "images", tuple(images.shape), images.shape[1:] == self.shape,
            "be [B, {}, {}, {}]".format(*self.shape),
        )  # fmt: skip
        patches = rearrange(
            images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size
        )
        places = self.positions[1:]
        if keep is not None:
            patches, places = patches.take_along_dim(keep[..., None], 1), places[keep]
        cls = repeat(self.cls + self.positions[0], "1 1 d -> b 1 d", b=len(images))
        return torch.cat([cls, self.embed(patches) + places], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention: [B, N, D] to the same shape."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        require("heads", heads, heads >= 1 and dim % heads == 0, f"divide dim {dim}")
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.by_head(x)
        if q.is_cpu and q.dtype == torch.bfloat16:  # there the fused one's backward is slow
            mixed = _attention(q, k) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))

    def by_head(self, x: Tensor) -> Tensor:
        """Queries, keys and values of every head: [3, B, heads, N, D / heads]."""
        return rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)

    def weights(self, x: Tensor) -> Tensor:
        """How much of token j goes into token i, [B, heads, N, N]; the sum over j is 1."""
        q, k, _ = self.by_head(x)
        return _attention(q, k)


def _attention(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


class MLP(nn.Sequential):
    """Two linear layers with GELU between, on each token alone: [B, N, D] to the same shape."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.act, self.out = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)


def make_blocks(
    dim: int, heads: int, rules: Sequence[nn.Module], eps: float = 1e-6, mlp_ratio: float = 4
) -> nn.ModuleList:
    """One pre-norm `Residual` a rule: attention and MLP in turn."""
    hidden = mlp_ratio * dim
    require("mlp_ratio", mlp_ratio, 1 <= hidden < math.inf, f"give 1 or more of {dim} channels")
    require("eps", eps, 0 <= eps < math.inf, "be 0 or more and finite")
    return nn.ModuleList(
        Residual(
            MLP(dim, int(hidden)) if k % 2 else Attention(dim, heads),
            nn.LayerNorm(dim, eps=eps),
            rule,
        )
        for k, rule in enumerate(rules)
    )


class ViT(nn.Module):
    """`depth` blocks of attention and MLP over image patches: [B, C, H, W] to [B, 1 + N, D].

    `alpha_min` < 1 makes the shortcut decay, sub-layer by sub-layer, along the schedule `kind`.
    `zero_init` starts every branch at zero. Xavier-uniform weights, zero biases.
    Raises ValueError for sizes that do not divide or are not above 0, a negative `eps`, and a
    shortcut that cannot use `alpha_min`.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        channels: int = 3,
        shortcut: str = "plain",
        alpha_min: float = 1.0,
        zero_init: bool = False,
        final_norm: bool = True,
        eps: float = 1e-6,
        mlp_ratio: float = 4,
        kind: str = "linear",
    ) -> None:
        super().__init__()
        rules = make_rules(shortcut, alpha_schedule(depth, alpha_min, kind))
        self.stem = Stem(image_size, patch_size, dim, channels)
        self.blocks = make_blocks(dim, heads, rules, eps, mlp_ratio)
        self.norm = nn.LayerNorm(dim, eps=eps) if final_norm else nn.Identity()
        self.eps, self.zero_init = eps, zero_init
        self.apply(xavier)
        if zero_init:
            silence(self)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.stem(images, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Classifier(nn.Module):
    """A linear head on the mean of the patch tokens of `vit`: [B, C, H, W] to logits."""

    def __init__(self, vit: ViT, classes: int) -> None:
        super().__init__()
        self.vit, self.head = vit, nn.Linear(vit.stem.embed.out_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.vit(images)[:, 1:].mean(1))


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> Tensor:
    """Attention weights of all layers and heads of a net, [B, layers, heads, 1 + N, 1 + N].

    Raises ValueError for a net without attention.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    require("model", type(model).__name__, len(layers) > 0, "have Attention layers")
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.append(layer.weights(args[0])))
        for layer in layers
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen, dim=1)


def export_plain(vit: ViT) -> ViT:
    """A plain ViT with the features of a decayed one, up to one global scale that norms remove.

    Its gains are folded into weights and norms by `fold_gains`. A final norm gives the same
    features. Without one they are `vit`'s divided by the product of all factors: the same to a
    norm, to cosine similarity and to kNN. `vit` itself is left as it is.
    Raises ValueError for rules other than "plain" and "decay".
    """
    plain, alphas = copy.deepcopy(vit), []
    for block in paths(plain):
        if not isinstance(block.rule, Plain | Decay):
            raise ValueError(f"vit must have plain or decayed shortcuts, got {block.rule}")
        alphas.append(getattr(block.rule, "alpha", 1.0))
        block.rule = Plain()
    fold_gains(plain, alphas)
    return plain


def silence(net: nn.Module) -> None:
    """Set the output weights of every branch to zero: at first the net only passes on its input."""
    for block in paths(net):
        nn.init.zeros_(block.branch.get_parameter("out.weight"))


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for a linear layer, nothing for another module."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
