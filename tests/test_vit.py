"""The ViT against known positions, against the one of Hugging Face, and against bad input."""

import math

import pytest
import torch
from transformers import ViTConfig, ViTModel

from mini_resdecay.reuse import effective_rank
from mini_resdecay.shortcuts import paths
from mini_resdecay.vit import (
    Attention,
    Classifier,
    ViT,
    attention_maps,
    export_plain,
    sincos_positions,
)


def small(**changes) -> ViT:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "dim": 16, "depth": 2, "heads": 4}
    return ViT(**(sizes | changes))


def test_positions_have_the_values_of_the_sheet():
    s, c = 0.841471, 0.540302
    low = [0.0, 0, 1, 1]
    one = [s, 0.01, c, 0.99995]
    expected = torch.tensor([[0.0] * 8, low + low, one + low, low + one, one + one])
    torch.testing.assert_close(sincos_positions(8, 2, 2), expected, atol=1e-5, rtol=0)
    wide = sincos_positions(16, 1, 2)[2, :4]
    torch.testing.assert_close(wide, torch.tensor([s, 0.099833, 0.01, 0.001]), atol=1e-6, rtol=0)


def test_every_position_of_a_patch_has_the_same_length():
    table = sincos_positions(192, 8, 8)
    torch.testing.assert_close(table[1:].square().sum(1), torch.full((64,), 96.0))
    assert table[1:].var(dim=1, correction=0).mean() == pytest.approx(0.2625, abs=1e-4)


def as_hugging_face(vit: ViT) -> ViTModel:
    """The same weights in `transformers`; q, k and v are rows of one matrix in ours."""
    shape = ViTConfig(
        image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, layer_norm_eps=1e-6, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = ViTModel(shape, add_pooling_layer=False).double().eval()
    ours = vit.state_dict()
    state = {
        "embeddings.cls_token": ours["stem.cls"],
        "embeddings.position_embeddings": ours["stem.positions"][None],
        "embeddings.patch_embeddings.projection.weight": ours["stem.embed.weight"].view(
            16, 3, 2, 2
        ),
        "embeddings.patch_embeddings.projection.bias": ours["stem.embed.bias"],
        "layernorm.weight": ours["norm.weight"],
        "layernorm.bias": ours["norm.bias"],
    }
    for kind in ("weight", "bias"):
        for i in range(2):
            qkv = ours[f"blocks.{2 * i}.branch.qkv.{kind}"].chunk(3)
            for letter, part in zip("qkv", qkv, strict=True):
                state[f"layers.{i}.attention.{letter}_proj.{kind}"] = part
            for name, key in (
                ("attention.o_proj", f"blocks.{2 * i}.branch.out"),
                ("layernorm_before", f"blocks.{2 * i}.norm"),
                ("layernorm_after", f"blocks.{2 * i + 1}.norm"),
                ("mlp.fc1", f"blocks.{2 * i + 1}.branch.inner"),
                ("mlp.fc2", f"blocks.{2 * i + 1}.branch.out"),
            ):
                state[f"layers.{i}.{name}.{kind}"] = ours[f"{key}.{kind}"]
    theirs.load_state_dict(state)
    for i, layer in enumerate(theirs.layers):  # one epsilon a net there, unless set by hand
        layer.layernorm_before.eps = vit.blocks[2 * i].norm.eps
        layer.layernorm_after.eps = vit.blocks[2 * i + 1].norm.eps
    theirs.layernorm.eps = vit.norm.eps
    return theirs


def perturbed(**changes) -> ViT:
    """In float64, with noise on every weight: else slips in norms and biases stay hidden."""
    vit = small(**changes).double()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit


def test_features_and_gradients_equal_hugging_face():
    vit = perturbed()
    theirs = as_hugging_face(vit)
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64) * 2 - 1
    expected = theirs(images).last_hidden_state
    found = vit(images)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(
        vit.stem.embed.weight.grad.view(16, 3, 2, 2),
        theirs.embeddings.patch_embeddings.projection.weight.grad,
        atol=1e-10,
        rtol=0,
    )


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=generator) * 2 - 1


@pytest.mark.parametrize("eps", [1e-6, 1e-2])  # with the large one an unscaled epsilon shows
@pytest.mark.parametrize("depth", [1, 4, 12])
def test_D04_exported_encoder_is_a_plain_one_with_the_same_features(depth, eps):
    vit = perturbed(depth=depth, alpha_min=0.6, eps=eps)
    expected = vit(pictures())
    plain = export_plain(vit)
    assert {type(block.rule).__name__ for block in plain.blocks} == {"Plain"}
    torch.testing.assert_close(plain(pictures()), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(vit(pictures()), expected, atol=0, rtol=0)  # left as it was
    again = export_plain(plain)
    torch.testing.assert_close(again(pictures()), expected, atol=1e-12, rtol=0)


def test_D04_exported_encoder_runs_in_hugging_face():
    vit = perturbed(alpha_min=0.3, eps=1e-3)
    theirs = as_hugging_face(export_plain(vit))
    found = theirs(pictures()).last_hidden_state
    torch.testing.assert_close(found, vit(pictures()), atol=1e-12, rtol=0)


def test_D04_gains_of_the_sheet_and_one_scale_without_a_final_norm():
    vit = perturbed(depth=4, alpha_min=0.6, final_norm=False)
    plain = export_plain(vit)
    gains = "1 1.060606 1.197458 1.445208 1.873418 2.622786 3.991196 6.651993"
    for block, old, gain in zip(plain.blocks, vit.blocks, gains.split(), strict=True):
        for kind in ("weight", "bias"):
            expected = float(gain) * old.branch.get_parameter(f"out.{kind}")
            found = block.branch.get_parameter(f"out.{kind}")
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    x, y = vit(pictures()), plain(pictures())
    torch.testing.assert_close(x, 0.1503308887 * y, rtol=1e-9, atol=1e-12)
    similar = torch.nn.functional.cosine_similarity(x, y, dim=-1)
    torch.testing.assert_close(similar, torch.ones_like(similar), rtol=0, atol=1e-12)


def test_D04_a_plain_vit_exports_to_itself():
    vit = perturbed()
    for old, new in zip(vit.parameters(), export_plain(vit).parameters(), strict=True):
        assert torch.equal(old, new) and old is not new


@pytest.mark.parametrize("shortcut", ["post-norm", "none"])
def test_other_rules_have_no_plain_export(shortcut):
    with pytest.raises(ValueError, match="vit must have plain or decayed shortcuts, got "):
        export_plain(small(shortcut=shortcut))


RANKS = {  # sheet D 1.7: after the last block, for these alpha_min; the input has rank 63.0
    4: (56.5, 52.7, 47.7, 40.8),
    6: (54.3, 47.3, 36.5, 25.1),
    12: (50.4, 31.5, 16.7, 13.2),
}


@pytest.mark.parametrize("depth", RANKS)
def test_D07_rank_falls_with_alpha_before_any_training(depth):
    found = torch.zeros(3, 4)
    for seed, row in enumerate(found):
        x = torch.randn(32, 17, 64, generator=torch.Generator().manual_seed(seed))
        assert effective_rank(x) == pytest.approx(63.0, abs=0.1)
        for i, alpha_min in enumerate((1.0, 0.8, 0.6, 0.4)):
            torch.manual_seed(seed)
            vit = ViT(8, 2, 64, depth, heads=4, alpha_min=alpha_min)
            with torch.no_grad():
                row[i] = effective_rank(torch.nn.Sequential(*vit.blocks)(x))
    mean = found.mean(0)
    assert (mean.diff() < 0).all()
    assert mean.tolist() == pytest.approx(RANKS[depth], rel=0.3)  # theirs are other draws
    assert mean[0].item() == pytest.approx(RANKS[depth][0], abs=1)


def test_attention_by_hand_equals_the_fused_one():
    """On a CPU bfloat16 takes a branch of its own; here both get the same rounded weights."""
    torch.manual_seed(0)
    attention = Attention(16, 4).bfloat16()
    x = torch.randn(3, 17, 16).bfloat16()
    by_hand = attention(x).float()
    fused = attention.float()(x.float())
    torch.testing.assert_close(by_hand, fused, atol=2e-2, rtol=0)
    assert (by_hand - fused).square().mean().sqrt() < 4e-3


def test_attention_weights_give_the_output_of_attention():
    torch.manual_seed(0)
    attention, x = Attention(16, heads=4).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    values = attention.qkv(x)[..., 32:].view(2, 5, 4, 4).transpose(1, 2)
    mixed = (attention.weights(x) @ values).transpose(1, 2).reshape(2, 5, 16)
    torch.testing.assert_close(attention.out(mixed), attention(x))


def test_a_net_without_attention_has_no_maps():
    with pytest.raises(ValueError, match="model must have Attention layers, got Linear"):
        attention_maps(torch.nn.Linear(2, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("shortcut", ["plain", "post-norm"])
def test_attention_maps_are_those_of_hugging_face(shortcut):
    vit, images = small(shortcut=shortcut).double(), torch.rand(3, 3, 8, 8, dtype=torch.float64)
    maps = attention_maps(vit, images)
    assert maps.shape == (3, 2, 4, 17, 17)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    assert not any(module._forward_pre_hooks for module in vit.modules())
    if shortcut == "plain":
        theirs = as_hugging_face(vit)
        theirs.set_attn_implementation("eager")
        expected = theirs(images, output_attentions=True).attentions
        torch.testing.assert_close(maps, torch.stack(expected, dim=1), atol=1e-6, rtol=0)


def test_kept_patches_are_embedded_with_their_own_positions():
    vit, images = small(), torch.rand(2, 3, 8, 8)
    keep = torch.tensor([[3, 0, 15], [7, 7, 1]])
    whole, part = vit.stem(images), vit.stem(images, keep)
    assert vit(images, keep).shape == (2, 4, 16)
    torch.testing.assert_close(part[:, :1], whole[:, :1])
    torch.testing.assert_close(part[0, 1:], whole[0, 1 + keep[0]])
    torch.testing.assert_close(part[1, 1:], whole[1, 1 + keep[1]])


def test_a_path_is_a_sub_layer_and_decays_with_depth():
    vit = small(depth=3, alpha_min=0.4)
    assert len(paths(vit)) == 6
    alphas = [block.rule.alpha for block in vit.blocks]
    assert alphas == pytest.approx([1.0, 0.88, 0.76, 0.64, 0.52, 0.4])


def test_zero_init_makes_every_branch_silent():
    vit, images = small(zero_init=True, final_norm=False), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(vit(images), vit.stem(images))
    assert all(not b.any() for n, b in vit.named_parameters() if n.endswith("bias"))


def test_classifier_reads_the_patches_alone():
    net = Classifier(small(), classes=5)
    images = torch.rand(2, 3, 8, 8)
    expected = net.head(net.vit(images)[:, 1:].mean(1))
    torch.testing.assert_close(net(images), expected)
    assert net(images).shape == (2, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "patch_size must divide image_size 8, got 3"),
        ({"patch_size": 0}, "patch_size must divide image_size 8, got 0"),
        ({"heads": 3}, "heads must divide dim 16, got 3"),
        ({"heads": 0}, "heads must divide dim 16, got 0"),
        ({"dim": 18, "heads": 2}, "dim must be a multiple of 4 above 0, got 18"),
        ({"dim": 0}, "dim must be a multiple of 4 above 0, got 0"),
        ({"dim": -4}, "dim must be a multiple of 4 above 0, got -4"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"mlp_ratio": 0}, "mlp_ratio must give 1 or more of 16 channels, got 0"),
        ({"mlp_ratio": 0.06}, "mlp_ratio must give 1 or more of 16 channels, got 0.06"),
        ({"mlp_ratio": math.nan}, "mlp_ratio must give 1 or more of 16 channels, got nan"),
        ({"eps": -1.0}, "eps must be 0 or more and finite, got -1.0"),
        ({"eps": math.nan}, "eps must be 0 or more and finite, got nan"),
        ({"depth": 0}, "depth must be a whole number, at least 1, got 0"),
        ({"alpha_min": 0.0}, r"alpha_min must lie in \(0, 1\], got 0.0"),
        ({"shortcut": "post-norm", "alpha_min": 0.5}, "alpha_min must be 1 for"),
        ({"shortcut": "decey"}, 'did you mean "decay"'),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 8, 8\], got \(1, 3, 10, 10\)"):
        small()(torch.rand(1, 3, 10, 10))
