"""U-ViT against the sheet (3.1, D16, D21), blocks of torch wired by hand, and bad input."""

import copy
import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from mini_resdecay.data import load, to_float
from mini_resdecay.diffusion import Diffusion
from mini_resdecay.evaluate import knn_accuracy, linear_probe
from mini_resdecay.reuse import layer_features
from mini_resdecay.shortcuts import alpha_schedule, effective_alpha, fold_gains, path_mask, paths
from mini_resdecay.train import fit, loss_step, make_state
from mini_resdecay.uvit import UViT, time_embedding


def small(double: bool = True, std: float = 0.1, **changes) -> UViT:
    """16 patches of 2 x 2 x 3 values, 5 blocks, in float64, with noise on every weight."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "dim": 16, "depth": 4, "heads": 4}
    net = UViT(**(sizes | changes))
    net = net.double() if double else net
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(std * torch.randn_like(weight))
    return net


def inputs(n: int = 3, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, times and classes."""
    x = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1)).double()
    return x, torch.tensor([0, 37, 999])[:n], torch.tensor([2, 0, 4])[:n]


# ---- known answers ----


def test_D16_time_embedding():
    expected = "-.839072 .540302 .995004 .999950 -.544021 .841471 .099833 .010000"
    expected = torch.tensor([[float(value) for value in expected.split()]])
    found = time_embedding(torch.tensor([10]), 8)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    t = torch.arange(0, 1000, 7)
    theirs = get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(time_embedding(t, 64), theirs, atol=1e-4, rtol=0)


def test_as_many_parameters_as_the_published_net_for_cifar10():
    with torch.device("meta"):
        net = UViT(32, 2, 512, 12, 8)
        fewer = UViT(32, 2, 512, 12, 8, long_skips=False)
        more = UViT(32, 2, 512, 12, 8, classes=10)
    counts = [sum(weight.numel() for weight in n.parameters()) for n in (net, fewer, more)]
    assert counts[0] == 44_255_328
    assert counts[0] - counts[1] == 6 * (2 * 512 * 512 + 512)
    assert counts[2] - counts[0] == 11 * 512 + 512  # ten classes and none; one more position


@pytest.mark.parametrize(("alpha_min", "product"), [(0.6, 2.24e-3), (0.7, 1.26e-2), (0.8, 6.1e-2)])
def test_D21_the_ramp_spans_all_sub_layers_and_ends_at_alpha_min(alpha_min, product):
    with torch.device("meta"):
        net = UViT(32, 2, 512, 12, 8, alpha_min=alpha_min)
    alphas = [block.rule.alpha for block in paths(net)]
    assert alphas == pytest.approx(torch.linspace(1, alpha_min, 26).tolist(), abs=1e-6)
    assert alphas[-1] == pytest.approx(alpha_min, abs=1e-12)
    assert effective_alpha(alphas) == pytest.approx(product, rel=5e-3)


# ---- the net ----


def by_hand(net: UViT, x: Tensor, t: Tensor, y: Tensor | None, skips: bool) -> Tensor:
    """The same weights in layers of torch, wired as the sheet writes it."""
    p, dim = net.stem.patch_size, net.stem.embed.out_features
    kernel = net.stem.embed.weight.view(dim, p, p, 3).permute(0, 3, 1, 2)
    patches = F.conv2d(x, kernel, net.stem.embed.bias, stride=p).flatten(2).transpose(1, 2)
    time = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0).double()
    extra = [time] if y is None else [net.stem.label.weight[y], time]
    z = torch.cat([*(token[:, None] for token in extra), patches], 1) + net.stem.positions
    layers = []
    for attention, mlp in zip(net.blocks[::2], net.blocks[1::2], strict=True):
        layer = nn.TransformerEncoderLayer(
            dim, 4, 4 * dim, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
        ).double()
        state = {"in_proj_weight": attention.branch.qkv.weight, "in_proj_bias": torch.zeros(48)}
        state = {f"self_attn.{name}": value for name, value in state.items()}
        for kind in ("weight", "bias"):
            for name, part in {
                "self_attn.out_proj": attention.branch.out,
                "linear1": mlp.branch.inner,
                "linear2": mlp.branch.out,
                "norm1": attention.norm,
                "norm2": mlp.norm,
            }.items():
                state[f"{name}.{kind}"] = getattr(part, kind)
        layer.load_state_dict(state)
        layers.append(layer)
    one = layers[0](z)
    two = layers[1](one)
    z = layers[2](two)
    for layer, tap, k in ((layers[3], two, 0), (layers[4], one, 1)):
        if skips:
            z = F.linear(torch.cat([z, tap], -1), net.skips[k].weight, net.skips[k].bias)
        z = layer(z)
    z = F.layer_norm(z, (dim,), net.norm.weight, net.norm.bias, 1e-6)[:, len(extra) :]
    pixels = (z @ net.head.weight.T + net.head.bias).view(len(x), 4, 4, p, p, 3)
    image = pixels.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
    return F.conv2d(image, net.smooth.weight, net.smooth.bias, padding=1)


@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize("long_skips", [True, False])
def test_output_is_that_of_torch_layers_wired_by_hand(classes, long_skips):
    net, (x, t, y) = small(classes=classes, long_skips=long_skips), inputs()
    y = None if classes is None else y
    found = net(x, t, y)
    assert found.shape == x.shape
    # Both time embeddings are float32, and round t = 999 differently.
    expected = by_hand(net, x, t, y, long_skips)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(found[:1], expected[:1], atol=1e-12, rtol=0)


def test_taps_come_back_last_in_first_out():
    net, events, states = small(), [], {}

    def watch(name):
        def hook(module, arguments, out):
            events.append(name)
            states[name] = (*arguments, out)

        return hook

    for k, block in enumerate(net.blocks):
        block.register_forward_hook(watch(f"block {k}"))
    for k, skip in enumerate(net.skips):
        skip.register_forward_hook(watch(f"skip {k}"))
    net(*inputs()[:2])
    blocks = [f"block {k}" for k in range(10)]
    assert events == [*blocks[:6], "skip 0", *blocks[6:8], "skip 1", *blocks[8:]]
    for skip, before, tap in (("skip 0", "block 5", "block 3"), ("skip 1", "block 7", "block 1")):
        joined, _ = states[skip]
        expected = torch.cat([states[before][-1], states[tap][-1]], dim=-1)
        assert torch.equal(joined, expected)


def test_taps_can_be_scaled():
    """A tap twice as loud is a join whose weights for it are twice as large."""
    (x, t, _), loud, heavy = inputs(), small(), small()
    assert loud.tap_scales == (1.0, 1.0) and small(long_skips=False).tap_scales == ()
    loud.tap_scales = (2.0, 0.5)
    assert not torch.allclose(loud(x, t), heavy(x, t), atol=1e-2)
    with torch.no_grad():
        for skip, scale in zip(heavy.skips, (0.5, 2.0), strict=True):  # the deepest joins first
            skip.weight[:, 16:] *= scale
    torch.testing.assert_close(loud(x, t), heavy(x, t), atol=1e-12, rtol=0)
    loud.tap_scales = (2.0,)
    with pytest.raises(ValueError, match="tap_scales must be 2, one for each long skip"):
        loud(x, t)


def test_alpha_1_is_the_plain_net_and_other_rules_have_their_name():
    x, t, _ = inputs()
    assert torch.equal(small(shortcut="decay")(x, t), small()(x, t))
    assert not torch.allclose(small(alpha_min=0.5)(x, t), small()(x, t), atol=1e-2)
    for shortcut, name in (("scaled-sum", "ScaledSum"), ("learned", "Learned")):
        rules = {type(block.rule).__name__ for block in paths(small(shortcut=shortcut))}
        assert rules == {name}


@pytest.mark.parametrize("long_skips", [True, False])
def test_D03_decay_is_gains_that_rise_and_scaled_taps(long_skips):
    """Fold the gains as in any pre-norm net; the taps' columns then carry what decay took."""
    decayed = small(alpha_min=0.4, long_skips=long_skips, eps=1e-2)
    alphas = alpha_schedule(5, 0.4)
    plain = small(long_skips=long_skips, eps=1e-2)
    plain.load_state_dict(decayed.state_dict())
    fold_gains(plain, alphas)
    kept = [math.prod(alphas[:k]) for k in range(11)]
    with torch.no_grad():
        for k, skip in enumerate(plain.skips):
            stream, tap = kept[2 * (3 + k)], kept[2 * (2 - k)]
            skip.weight[:, 16:] *= tap / stream
            skip.bias /= stream
    x, t, _ = inputs()
    torch.testing.assert_close(plain(x, t), decayed(x, t), atol=1e-11, rtol=0)


def test_zero_init_starts_with_silent_branches_and_a_flat_prediction():
    net, (x, t, _) = small(std=0.0, zero_init=True, alpha_min=0.3, long_skips=False), inputs()
    stem, *states = layer_features(net, x, t)
    for state, share in zip(
        states, [math.prod(alpha_schedule(5, 0.3)[: k + 1]) for k in range(10)], strict=True
    ):
        torch.testing.assert_close(state, share * stem, atol=1e-12, rtol=0)
    expected = net.smooth.bias.view(1, 3, 1, 1).expand_as(x)
    torch.testing.assert_close(net(x, t), expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize("classes", [None, 5])
def test_a_seed_gives_nets_without_long_skips_the_same_weights(classes):
    with_skips, without = (small(False, 0.0, classes=classes, long_skips=k) for k in (True, False))
    all_weights, weights = with_skips.state_dict(), without.state_dict()
    assert all_weights.keys() - weights.keys() == {
        f"skips.{k}.{name}" for k in range(2) for name in ("weight", "bias")
    }
    assert all(torch.equal(all_weights[name], value) for name, value in weights.items())


def test_every_weight_learns():
    net, (x, t, y) = small(classes=5), inputs()
    net(x, t, y).square().sum().backward()
    assert [name for name, weight in net.named_parameters() if not weight.grad.any()] == []


# ---- time and class ----


def test_time_and_class_matter_and_no_class_is_a_class_of_its_own():
    net, (x, t, y) = small(classes=5), inputs()
    out = net(x, t, y)
    assert not torch.allclose(net(x, t.flip(0), y)[0], out[0], atol=1e-3)
    assert not torch.allclose(net(x, t, (y + 1) % 5), out, atol=1e-3)
    none = net(x, t)
    assert torch.equal(net(x, t, torch.full((3,), -1)), none)
    for label in range(5):
        assert not torch.allclose(net(x, t, torch.full((3,), label)), none, atol=1e-3)
    mixed = net(x, t, torch.tensor([2, -1, 4]))
    torch.testing.assert_close(mixed[[0, 2]], out[[0, 2]], atol=1e-12, rtol=0)
    torch.testing.assert_close(mixed[1], none[1], atol=1e-12, rtol=0)


def test_D15_loss_sampler_and_guidance_take_the_net():
    net, diffusion, (x, _, y) = small(False, classes=5), Diffusion(50, target="v"), inputs()
    assert diffusion.loss(net, x.float(), y).isfinite()
    generator = torch.Generator().manual_seed(0)
    for guidance in (1.0, 2.0):
        found = diffusion.sample(
            net, (3, 3, 8, 8), "ddim", 5, y=y, guidance=guidance, clip=1.0, generator=generator
        )
        assert found.abs().max() <= 1


# ---- with the rest of the package ----


def test_features_by_layer_and_noise_level_go_to_neighbours_and_probe():
    part = load("digits", "train").subset(120, 0)
    images, labels = to_float(part.images), part.labels
    torch.manual_seed(0)
    net, diffusion = UViT(8, 2, 32, 2, 4, channels=1, classes=10), Diffusion()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found, read = {}, {}
    for level in (10, 990):
        t = torch.full((len(images),), level)
        layers = layer_features(net, diffusion.q_sample(images, t, noise), t, batch=50)
        assert [tuple(x.shape) for x in layers] == [(120, 18, 32)] * 7
        x = layers[-1][:, net.stem.extra :].flatten(1)
        found[level] = knn_accuracy(x[:80], labels[:80], x[80:], labels[80:], k=5)
        read[level] = linear_probe(x[:80], labels[:80], x[80:], labels[80:], steps=50).accuracy
    assert found[10] > 0.3 > found[990] and read[10] > 0.3 > read[990]


def test_a_path_mask_switches_branches_off():
    net, (x, t, _) = small(long_skips=False), inputs()
    assert len(paths(net)) == 10
    with path_mask(net, [0.0] * 10):
        stem, *states = layer_features(net, x, t)
    assert all(torch.equal(state, stem) for state in states)


def test_the_stream_stays_float32_under_autocast():
    net, (x, t, _) = small(False), inputs()
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x.float(), t)
    assert set(seen) == {torch.float32}
    full = net(x.float(), t)
    assert (half - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("changes", [{}, {"alpha_min": 0.3, "zero_init": True}])
def test_a_small_one_learns_and_its_mean_weights_sample(changes):
    part, diffusion = load("digits", "train"), Diffusion(100, "cosine")
    images, labels = to_float(part.images), part.labels
    torch.manual_seed(0)
    net = UViT(8, 2, 32, 2, 4, channels=1, classes=10, **changes)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    state = make_state(net, optimizer, ema_decay=0.99, cpu=True)
    step = loss_step(lambda s, b: diffusion.loss(s.model, *b, generator=s.generator))
    batches = [(images[k::20], labels[k::20]) for k in range(20)] * 4
    fit(state, batches, step, every=10, quiet=True)
    assert state.history[-1]["loss"] < 0.75 * min(1.0, state.history[0]["loss"])
    y = torch.arange(10)
    generator = torch.Generator().manual_seed(1)
    made = diffusion.sample(
        state.ema, (10, 1, 8, 8), "ddim", 10, y=y, guidance=1.5, clip=1.0, generator=generator
    )
    assert made.shape == (10, 1, 8, 8) and made.isfinite().all()
    # Digits are dark at their left edge: noise is not.
    assert made[..., 0].mean() < -0.2


def test_a_copy_computes_the_same():
    net, (x, t, y) = small(classes=5), inputs()
    assert torch.equal(copy.deepcopy(net)(x, t, y), net(x, t, y))


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "patch_size must divide image_size 8, got 3"),
        ({"patch_size": 0}, "patch_size must divide image_size 8, got 0"),
        ({"depth": 3}, "depth must be even and at least 2, got 3"),
        ({"depth": 0}, "depth must be even and at least 2, got 0"),
        ({"heads": 3}, "heads must divide dim 16, got 3"),
        ({"dim": 0}, "dim must be even and at least 2, got 0"),
        ({"dim": 15, "heads": 3}, "dim must be even and at least 2, got 15"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"eps": -1.0}, "eps must be 0 or more and finite, got -1.0"),
        ({"classes": 0}, "classes must be None or at least 1, got 0"),
        ({"alpha_min": 0.0}, r"alpha_min must lie in \(0, 1\], got 0.0"),
        ({"shortcut": "scaled-sum", "alpha_min": 0.5}, "alpha_min must be 1 for"),
        ({"shortcut": "decey"}, 'did you mean "decay"'),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 3, 9, 9)}, r"x must be \[B, 3, 8, 8\], got \(3, 3, 9, 9\)"),
        ({"x": torch.zeros(3, 3, 8, 8).byte()}, r"x must be floats \(data.to_float\), got"),
        ({"t": torch.tensor(3)}, r"t must be \[B\] = \[3\], got \[\]"),
        ({"t": torch.tensor([3])}, r"t must be \[B\] = \[3\], got \[1\]"),
        ({"y": torch.tensor([0, 1])}, r"y must be int64 \[3\] in 0…4, or -1 for no class.*\[2\]"),
        ({"y": torch.tensor([0, 1, 5])}, r"y must be int64 \[3\] in 0…4.*\[0, 1, 5\]"),
        ({"y": torch.tensor([0, -2, 4])}, r"y must be int64 \[3\] in 0…4.*\[0, -2, 4\]"),
        ({"y": torch.zeros(3)}, "y must be int64.*got torch.float32"),
    ],
)
def test_bad_input_is_named(changes, message):
    x, t, y = inputs()
    with pytest.raises(ValueError, match=message):
        small(False, classes=5)(**({"x": x.float(), "t": t, "y": y} | changes))


def test_classes_of_a_net_without_and_an_odd_width_are_named():
    with pytest.raises(ValueError, match="y must be None for a net without classes"):
        small()(*inputs())
    with pytest.raises(ValueError, match="dim must be even, got 15"):
        time_embedding(torch.tensor([3]), 15)
