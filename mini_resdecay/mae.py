"""The masked autoencoder: hide most patches of an image, encode the rest, predict what is hidden.

`standard` is the architecture of arXiv 2111.06377. `paper` is the one of arXiv 2404.10947: long
skips carry states of the encoder to the decoder, which starts from positions alone. `bridge` is
this book's own: long skips, and the encoder's last state as in `standard`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from . import known, require
from .shortcuts import alpha_schedule, make_rules
from .vit import ViT, make_blocks, silence, sincos_positions, xavier


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, C, H, W] to patches [B, N, p * p * C], row by row, channels fastest."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify` for square images: [B, N, p * p * C] to [B, C, H, W]."""
    h, p = int(patches.shape[1] ** 0.5), patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=p)


def standardise(patches: Tensor) -> Tensor:
    """Each patch of [B, N, P] less its mean, over its deviation: sqrt(variance + 1e-6)."""
    mean, deviation = _level(patches)
    return (patches - mean) / deviation


def _level(patches: Tensor) -> tuple[Tensor, Tensor]:
    mean = patches.mean(-1, keepdim=True)
    squares = (patches - mean).square().sum(-1, keepdim=True)
    return mean, (squares / max(patches.shape[-1] - 1, 1) + 1e-6).sqrt()


def kept_patches(patches: int, mask_ratio: float) -> int:
    """How many patches stay: N - round(N * mask_ratio). Raises ValueError for none or all."""
    kept = patches - round(patches * mask_ratio) if 0 < mask_ratio < 1 else 0
    wanted = f"keep 1 to {patches - 1} of {patches} patches"
    require("mask_ratio", mask_ratio, 0 < kept < patches, wanted)
    return kept


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the patches with the least noise [B, N].

    Returns keep [B, K], their indices; mask [B, N], 1 = removed; restore [B, N], the place of
    each patch in the order of noise.
    """
    kept = kept_patches(noise.shape[1], mask_ratio)
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return shuffle[:, :kept], (restore >= kept).float(), restore


def masked_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error on removed patches alone: [B, N, P] twice and mask [B, N] to a scalar."""
    return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


def insert(tokens: Tensor, mask_token: Tensor, restore: Tensor) -> Tensor:
    """Kept tokens [B, 1 + K, D] back at their places, `mask_token` elsewhere: [B, 1 + N, D]."""
    table = torch.cat([tokens, mask_token.expand(len(tokens), -1, -1)], dim=1)
    places = F.pad(restore.clamp(max=tokens.shape[1] - 1) + 1, (1, 0))  # class token first
    return table[torch.arange(len(table), device=table.device)[:, None], places]


class LongSkip(nn.Module):
    """W_2 SiLU(W_1 [tap; y]): a state of the encoder [B, 1 + K, D], for the decoder [B, 1 + N, E].

    Removed patches get a mask token of the skip's own. W_1 meets the tap before it is spread over
    the image, where there are fewer tokens. Source: arXiv 2404.10947.
    """

    def __init__(self, dim: int, decoder_dim: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.inner = nn.Linear(dim + decoder_dim, decoder_dim)
        self.out = nn.Linear(decoder_dim, decoder_dim)

    def forward(self, tap: Tensor, y: Tensor, restore: Tensor) -> Tensor:
        for_tap, for_y = self.inner.weight.split([tap.shape[2], y.shape[2]], dim=1)
        seen = insert(F.linear(tap, for_tap), F.linear(self.mask_token, for_tap), restore)
        return self.out(F.silu(seen + F.linear(y, for_y, self.inner.bias)))


class Reconstruction(NamedTuple):
    """loss: scalar; pred: every patch as predicted [B, N, p * p * C]; mask [B, N], 1 = removed."""

    loss: Tensor
    pred: Tensor
    mask: Tensor


class MAE(nn.Module):
    """Masked autoencoder around `encoder`, with a plain decoder (alpha = 1) of its own.

    `mae(images)` takes floats [B, C, H, W]; `noise` [B, N] decides what is kept, and is drawn
    with `generator` unless given. A NaN in a pixel makes the loss NaN. `norm_pix` predicts
    patches of mean 0 and deviation 1.
    arch: "standard": a linear map of the encoder's output, one mask token. "paper": the decoder
    starts from positions alone, and before its first blocks a `LongSkip` adds the encoder's state
    after every second block, deepest first. "bridge": both. Encoders without final norm belong to
    "paper". Where the encoder starts with silent branches (`zero_init`), so do decoder, skips and
    head: the first prediction is 0. `taps` are the tapped blocks, shallow to deep; each tap is
    multiplied by its entry in `tap_scales` (1.0 unless set).
    Raises ValueError for an unknown arch, a mask ratio that keeps no patch or all, sizes that do
    not divide, and for "paper" and "bridge" an encoder of odd depth, for "paper" one with a norm.
    """

    positions: Tensor

    def __init__(
        self,
        encoder: ViT,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        arch: str = "standard",
    ) -> None:
        super().__init__()
        known("arch", arch, ("standard", "paper", "bridge"))
        depth, dim = len(encoder.blocks) // 2, encoder.stem.embed.out_features
        even, bare = depth % 2 == 0, isinstance(encoder.norm, nn.Identity)
        require("encoder depth", depth, even or arch == "standard", f'be even for arch="{arch}"')
        require("encoder", True, bare or arch != "paper", 'have final_norm=False for arch="paper"')
        require("decoder_depth", decoder_depth, decoder_depth >= 1, "be at least 1")
        require(
            "decoder_dim", decoder_dim, decoder_dim >= 4 and decoder_dim % 4 == 0,
            "be a multiple of 4 above 0",
        )  # fmt: skip
        require(
            "decoder_heads", decoder_heads, decoder_heads >= 1 and decoder_dim % decoder_heads == 0,
            f"divide decoder_dim {decoder_dim}",
        )  # fmt: skip
        self.encoder, self.arch = encoder, arch
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
        channels, side, _ = encoder.stem.shape
        pixels, rows = channels * encoder.stem.patch_size**2, side // encoder.stem.patch_size
        kept_patches(rows**2, mask_ratio)
        self.register_buffer("positions", sincos_positions(decoder_dim, rows, rows))
        self.embed = nn.Linear(decoder_dim if arch == "paper" else dim, decoder_dim)
        # In "paper" the decoder's class token, else its mask token.
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        rules = make_rules("plain", alpha_schedule(decoder_depth, 1.0))
        self.decoder = make_blocks(decoder_dim, decoder_heads, rules, encoder.eps)
        skips = 0 if arch == "standard" else min(depth // 2, decoder_depth)
        self.taps = tuple(range(depth + 1 - 2 * skips, depth, 2))
        self.tap_scales = (1.0,) * skips
        self.skips = nn.ModuleList(LongSkip(dim, decoder_dim) for _ in range(skips))
        self.norm = nn.LayerNorm(decoder_dim, eps=encoder.eps)
        self.head = nn.Linear(decoder_dim, pixels)
        for part in (self.embed, self.decoder, self.skips, self.head):
            part.apply(xavier)
        if encoder.zero_init:
            silence(self.decoder)
            for name in ("head", *(f"skips.{i}.out" for i in range(skips))):
                nn.init.zeros_(self.get_parameter(f"{name}.weight"))

    def forward(
        self, images: Tensor, noise: Tensor | None = None, generator: Generator | None = None
    ) -> Reconstruction:
        shape = len(images), len(self.positions) - 1
        if noise is None:
            device = generator.device if generator else images.device
            noise = torch.rand(shape, generator=generator, device=device)
        require("noise", list(noise.shape), noise.shape == shape, f"be [B, N] = {list(shape)}")
        keep, mask, restore = random_masking(noise.to(images.device), self.mask_ratio)
        pred = self.decode(*self.encode(images, keep), restore)
        target = patchify(images, self.encoder.stem.patch_size)
        target = standardise(target) if self.norm_pix else target
        return Reconstruction(masked_loss(pred, target, mask), pred, mask)

    def encode(self, images: Tensor, keep: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The encoder's output on kept patches [B, 1 + K, D], and the taps, shallow to deep."""
        states = [self.encoder.stem(images, keep)]
        for block in self.encoder.blocks:
            states.append(block(states[-1]))
        if len(self.tap_scales) != len(self.taps):
            raise ValueError(f"tap_scales must be one for each of taps {self.taps}")
        scaled = zip(self.taps, self.tap_scales, strict=True)
        taps = [states[2 * tap + 2] * scale for tap, scale in scaled]
        return self.encoder.norm(states[-1]), taps

    def decode(self, latent: Tensor, taps: list[Tensor], restore: Tensor) -> Tensor:
        """Predicted patches [B, N, p * p * C] from what `encode` returns."""
        if self.arch == "paper":
            start = torch.cat([self.token, self.positions[None, 1:]], dim=1)
            y = self.embed(start).to(start.dtype)  # the stream stays float32 under autocast
        else:
            y = insert(self.embed(latent), self.token, restore) + self.positions
        for k, block in enumerate(self.decoder):
            if k % 2 == 0 and k // 2 < len(taps):
                y = y + self.skips[k // 2](taps[-1 - k // 2], y, restore)
            y = block(y)
        return self.head(self.norm(y[:, 1:]))


@torch.no_grad()
def side_by_side(nets: Sequence[MAE], images: Tensor, noise: Tensor) -> Tensor:
    """What the nets see of each image, what each makes of it, and the image.

    Images [B, C, H, W] and noise [B, N] to pictures [B * (2 + nets), C, H, W]. Hidden patches are
    light grey, then as predicted. Nets of `norm_pix` predict neither the mean nor the deviation
    of a patch: both are taken from the image.
    """
    size = nets[0].encoder.stem.patch_size
    patches = patchify(images, size)
    mean, deviation = _level(patches)
    views = [torch.full_like(patches, 0.8)]
    for net in nets:
        _, pred, mask = net(images, noise)
        views.append(pred * deviation + mean if net.norm_pix else pred)
    hidden = mask[:, None, :, None] > 0  # the same for all: they are given the noise
    rows = torch.where(hidden, torch.stack([*views, patches], 1), patches[:, None])
    return unpatchify(rows.flatten(0, 1), size)


# ---- weights of others ----

# What a part of `MAE` is called by the original release, and by transformers 5.x and 4.x.
_OUTSIDE = {
    "encoder.stem.cls": "cls_token embeddings.cls_token",
    "encoder.stem.positions": "pos_embed embeddings.position_embeddings",
    "encoder.stem.embed": "patch_embed.proj embeddings.patch_embeddings.projection",
    "encoder.norm": "norm layernorm",
    "embed": "decoder_embed",
    "token": "mask_token",
    "positions": "decoder_pos_embed",
    "norm": "decoder_norm",
    "head": "decoder_pred",
}
_STACKS = {
    "encoder.blocks": ("blocks", "layers", "encoder.layer"),
    "decoder": ("decoder_blocks", "decoder_layers", "decoder_layers"),
}
_IN_BLOCK = (  # attention, MLP
    {
        "norm": ("norm1", "layernorm_before", "layernorm_before"),
        "branch.qkv": (
            "attn.qkv",
            "attention.q_proj attention.k_proj attention.v_proj",
            "attention.attention.query attention.attention.key attention.attention.value",
        ),
        "branch.out": ("attn.proj", "attention.o_proj", "attention.output.dense"),
    },
    {
        "norm": ("norm2", "layernorm_after", "layernorm_after"),
        "branch.inner": ("mlp.fc1", "mlp.fc1", "intermediate.dense"),
        "branch.out": ("mlp.fc2", "mlp.fc2", "output.dense"),
    },
)


def load_reference_weights(mae: MAE, state_dict: Mapping[str, Tensor]) -> None:
    """Copy weights and position tables of another MAE into `mae`, which must be "standard".

    Keys may be those of the original release or of Hugging Face (`ViTMAEForPreTraining`, 4.x and
    5.x). A state dict that holds an encoder alone fills the encoder alone. Raises ValueError that
    lists the keys that are unknown, missing or of another shape; nothing is copied then.
    """
    # Of the decoder's blocks `save_pretrained` of transformers 5.23 says "decoder_encoder.layer".
    given = {
        re.sub(r"^(vit|decoder)\.", "", key.replace("_encoder.layer.", "_layers.")): value
        for key, value in state_dict.items()
    }
    ours, found = mae.state_dict(), dict[str, Tensor]()
    for name, old in ours.items():
        for keys in _reference_keys(name):
            if all(key in given for key in keys):
                value = torch.cat([given.pop(key) for key in keys])  # rows of q, k and v
                flat = value.ndim != old.ndim and value.numel() == old.numel()  # kernels, tables
                found[name] = value.reshape(old.shape) if flat else value
    whole = any(not name.startswith("encoder.") for name in found)
    wrong = {
        "unknown": list(given),
        "missing": [n for n in ours if n not in found and (whole or n.startswith("encoder."))],
        "of another shape": [n for n in found if found[n].shape != ours[n].shape],
    }
    if any(wrong.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise ValueError(f"state_dict must hold the weights of this MAE; {listed}")
    mae.load_state_dict(found, strict=False)


def _reference_keys(name: str) -> list[list[str]]:
    """What others call a parameter of `MAE`; several keys are rows of one matrix here."""
    pattern = r"^((encoder\.blocks|decoder)\.(\d+)\.)?(.+?)(\.weight|\.bias)?$"
    [(_, stack, k, part, kind)] = re.findall(pattern, name)
    if not stack:
        return [[theirs + kind] for theirs in _OUTSIDE.get(part, "").split()]
    calls = zip(_STACKS[stack], _IN_BLOCK[int(k) % 2][part], strict=True)
    return [[f"{s}.{int(k) // 2}.{p}{kind}" for p in parts.split()] for s, parts in calls]
