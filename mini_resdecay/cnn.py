"""A small residual net for images, in the pre-activation form of arXiv 1603.05027."""

from collections.abc import Sequence

from torch import Tensor, nn

from . import require
from .shortcuts import Residual, alpha_schedule, make_rules

GROUPS = 8


def branch(dim: int) -> nn.Module:
    """Two 3x3 convolutions, each behind GroupNorm and ReLU: [B, D, H, W] to the same shape."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        nn.GroupNorm(GROUPS, dim),
        nn.ReLU(inplace=True),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
    )


class ResidualCNN(nn.Module):
    """`blocks` residual blocks a stage, one stage a width: [B, C, H, W] in [-1, 1] to logits.

    The convolutions that halve the image between stages stand outside the blocks: they are never
    switched off, so that every shortcut is the identity. GroupNorm keeps no running statistics,
    which masks would spoil.
    Raises ValueError for widths that are no multiples of 8, and for counts below 1.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 3,
        shortcut: str = "plain",
        alpha_min: float = 1.0,
    ) -> None:
        super().__init__()
        if any(width < GROUPS or width % GROUPS for width in widths) or not widths:
            raise ValueError(f"widths must be multiples of {GROUPS}, got {tuple(widths)}")
        for name, count in (("channels", channels), ("classes", classes), ("blocks", blocks)):
            require(name, count, count >= 1, "be at least 1")
        alphas = alpha_schedule(len(widths) * blocks, alpha_min, per="block")
        rules = iter(make_rules(shortcut, alphas))
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.blocks, self.down = nn.ModuleList(), nn.ModuleDict()
        for stage, width in enumerate(widths):
            if stage:
                self.down[str(len(self.blocks))] = nn.Conv2d(
                    widths[stage - 1], width, 3, stride=2, padding=1, bias=False
                )
            self.blocks.extend(
                Residual(branch(width), nn.GroupNorm(GROUPS, width), next(rules))
                for _ in range(blocks)
            )
        self.norm = nn.GroupNorm(GROUPS, widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for i, block in enumerate(self.blocks):
            if str(i) in self.down:
                h = self.down[str(i)](h)
            h = block(h)
        return self.head(self.norm(h).relu().mean((2, 3)))
