"""The masked autoencoder against sheet D (1.3, 2.1, 2.3) and against that of Hugging Face."""

import math
import re

import pytest
import torch
from einops import repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mini_resdecay.mae import (
    MAE,
    LongSkip,
    insert,
    kept_patches,
    load_reference_weights,
    masked_loss,
    patchify,
    random_masking,
    side_by_side,
    standardise,
    unpatchify,
)
from mini_resdecay.shortcuts import (
    alpha_schedule,
    decay_groups,
    fold_gains,
    gain_groups,
    paths,
)
from mini_resdecay.vit import ViT

ARCHS = ("standard", "paper", "bridge")


def small(
    arch="standard", decoder=(8, 2, 2), mask_ratio=0.75, norm_pix=True, double=True, **changes
) -> MAE:
    """Encoder 16 x 4, 16 patches of 2 x 2 x 3 values, in float64."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "dim": 16, "depth": 4, "heads": 4}
    vit = ViT(**({"final_norm": arch != "paper"} | sizes | changes))
    mae = MAE(vit, *decoder, mask_ratio=mask_ratio, norm_pix=norm_pix, arch=arch)
    return mae.double() if double else mae


def perturbed(net: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Noise on every weight: else slips in norms, biases and silent branches stay hidden."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(std * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return net


def pictures(n=3, channels=3, side=8, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, channels, side, side, generator=generator, dtype=dtype) * 2 - 1


def noises(n=3, patches=16, seed=2) -> torch.Tensor:
    return torch.rand(n, patches, generator=torch.Generator().manual_seed(seed))


# ---- masking, patches, targets, loss ----


def test_D13_patchify_known_answer():
    images = torch.arange(32.0).view(1, 2, 4, 4)
    patches = patchify(images, 2)
    assert patches[0, 0].tolist() == [0, 16, 1, 17, 4, 20, 5, 21]
    assert patches[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]


@given(p=st.integers(1, 4), side=st.integers(1, 4), channels=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_D13_unpatchify_is_the_inverse(p, side, channels):
    images = torch.rand(2, channels, p * side, p * side)
    assert torch.equal(unpatchify(patchify(images, p), p), images)


def test_D13_standardised_patch_known_answer():
    expected = torch.tensor([-1.16189466, -0.38729822, 0.38729822, 1.16189466])
    torch.testing.assert_close(standardise(torch.arange(4.0)), expected, atol=1e-6, rtol=0)
    assert not standardise(torch.full((2, 3, 12), 0.7, dtype=torch.float64)).abs().gt(1e-9).any()
    assert standardise(torch.rand(2, 3, 1)).abs().max() == 0  # a patch that is one number


def test_D13_masking_known_answer():
    keep, mask, restore = random_masking(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), 0.5)
    assert keep.tolist() == [[1, 3]]
    assert mask.tolist() == [[1, 0, 1, 0]]
    assert restore.tolist() == [[3, 0, 2, 1]]


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(100, 0.9, 10), (10, 0.9, 1), (20, 0.85, 3), (196, 0.75, 49)]
)
def test_D13_kept_patches_are_rounded_not_cut(patches, ratio, kept):
    assert kept_patches(patches, ratio) == kept


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.01, 0.99, -0.5, 1.5, math.nan, math.inf])
def test_a_ratio_that_keeps_none_or_all_is_an_error(ratio):
    with pytest.raises(ValueError, match=rf"mask_ratio must keep 1 to 15 of 16.*got {ratio}"):
        random_masking(noises(), ratio)
    with pytest.raises(ValueError, match="mask_ratio"):
        small(mask_ratio=ratio)


def test_D13_the_loss_looks_at_removed_patches_alone():
    pred = torch.rand(2, 4, 6, requires_grad=True)
    target, mask = torch.rand(2, 4, 6), torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]])
    loss = masked_loss(pred, target, mask)
    removed = mask.bool()
    assert loss.item() == pytest.approx(((pred - target)[removed] ** 2).mean().item(), rel=1e-6)
    loss.backward()
    assert not pred.grad[~removed].any()
    assert pred.grad[removed].all()
    shifted = pred.detach() + 9 * (1 - mask)[..., None]
    assert torch.equal(masked_loss(shifted, target, mask), loss.detach())


@pytest.mark.parametrize("arch", ARCHS)
def test_D13_prediction_and_loss_agree_with_the_mask(arch):
    mae = perturbed(small(arch))
    out = mae(pictures(), noises())
    assert out.pred.shape == (3, 16, 12)
    assert out.mask.sum(1).tolist() == [12, 12, 12]
    patches = patchify(pictures(), 2)
    target = (patches - patches.mean(-1, True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = ((out.pred - target)[out.mask.bool()] ** 2).mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (slope,) = torch.autograd.grad(out.loss, out.pred)
    assert not slope[out.mask == 0].any()
    plain = perturbed(small(arch, norm_pix=False))(pictures(), noises())
    expected = ((plain.pred - patches)[out.mask.bool()] ** 2).mean()
    assert plain.loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("arch", ARCHS)
def test_D13_nothing_leaks_from_removed_pixels(arch):
    mae = perturbed(small(arch))
    out = mae(pictures(), noises())
    hidden = unpatchify(repeat(out.mask, "b n -> b n p", p=12), 2).bool()
    other = torch.where(hidden, -pictures(), pictures())
    assert torch.equal(mae(other, noises()).pred, out.pred)
    seen = torch.where(hidden, pictures(), -pictures())
    assert not torch.equal(mae(seen, noises()).pred, out.pred)


@given(
    p=st.integers(1, 3),
    side=st.integers(2, 4),
    channels=st.integers(1, 3),
    ratio=st.floats(0.05, 0.95),
    arch=st.sampled_from(ARCHS),
)
@settings(max_examples=25, deadline=None)
def test_any_legal_size_and_ratio(p, side, channels, ratio, arch):
    n, sizes = side**2, {"image_size": p * side, "patch_size": p, "channels": channels}
    sizes |= {"dim": 4, "heads": 1, "depth": 2}
    removed = round(n * ratio)
    if not 0 < removed < n:
        with pytest.raises(ValueError, match="mask_ratio"):
            small(arch, (4, 1, 1), ratio, **sizes)
        return
    mae = small(arch, (4, 1, 1), ratio, **sizes)
    images, noise = pictures(2, channels, p * side), noises(2, n)
    out = mae(images, noise)
    assert out.pred.shape == (2, n, p * p * channels)
    assert out.mask.sum(1).tolist() == [removed] * 2
    for row, bits in zip(noise, out.mask.bool(), strict=True):
        assert row[~bits].max() <= row[bits].min()
    assert out.loss.isfinite()


def test_tokens_come_back_to_their_places():
    tokens, noise = torch.rand(2, 3, 5), noises(2, 6)
    keep, mask, restore = random_masking(noise, 4 / 6)
    whole = insert(tokens, torch.full((1, 1, 5), 7.0), restore)
    assert torch.equal(whole[:, 0], tokens[:, 0])
    assert (whole[:, 1:][mask.bool()] == 7).all()
    for row, index, found in zip(tokens, keep, whole[:, 1:], strict=True):
        assert torch.equal(found[index], row[1:])


# ---- the standard architecture: that of Hugging Face ----


def hugging_face(**changes) -> ViTMAEForPreTraining:
    """Random weights everywhere, the position tables too, in float64."""
    shape = ViTMAEConfig(
        image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, decoder_hidden_size=8, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2, decoder_intermediate_size=32, mask_ratio=0.75,
        layer_norm_eps=1e-6, norm_pix_loss=True, qkv_bias=True, hidden_act="gelu",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes,
    )  # fmt: skip
    torch.manual_seed(3)
    return perturbed(ViTMAEForPreTraining(shape).double())


def test_D12_standard_equals_hugging_face_with_every_gradient():
    theirs, ours = hugging_face(), small(depth=2)
    load_reference_weights(ours, theirs.state_dict())
    expected, found = theirs(pictures(), noise=noises()), ours(pictures(), noises())
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.pred, expected.logits, atol=1e-12, rtol=0)
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-13)
    found.loss.backward()
    expected.loss.backward()
    slopes = small(depth=2)  # their gradients under our names
    frozen = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    named = dict(theirs.named_parameters())
    assert {name for name, weight in named.items() if weight.grad is None} == frozen
    load_reference_weights(slopes, {n: w if n in frozen else w.grad for n, w in named.items()})
    for (name, weight), slope in zip(ours.named_parameters(), slopes.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, slope, atol=1e-11, rtol=0, msg=name)
    # The position tables are copied, not made: here they are random.
    assert torch.equal(ours.positions, theirs.decoder.decoder_pos_embed[0])


def as_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys of transformers 5.x as in the release of the MAE paper: q, k and v in one matrix."""
    out: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        key = re.sub(r"^(vit|decoder)\.", "", key)
        for old, new in (
            ("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("decoder_layers", "decoder_blocks"), ("layers.", "blocks."),
            ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("layernorm", "norm"),
            ("attention.o_proj", "attn.proj"),
        ):  # fmt: skip
            key = key.replace(old, new)
        if "q_proj" in key:
            letters = [next(k for k in state if _same_part(k, key, z)) for z in "qkv"]
            value = torch.cat([state[k] for k in letters])
            key = key.replace("attention.q_proj", "attn.qkv")
        if not re.search("[kv]_proj", key):
            out[key] = value
    return out


def _same_part(key: str, renamed: str, letter: str) -> bool:
    """Whether `key` is the q, k or v of the block and stack of `renamed`."""
    number, kind = re.search(r"blocks\.(\d+)\..*\.(\w+)$", renamed).groups()
    stack = "decoder.decoder_layers" if renamed.startswith("decoder") else "vit.layers"
    return key == f"{stack}.{number}.attention.{letter}_proj.{kind}"


def test_weights_load_under_every_name(tmp_path):
    theirs, image = hugging_face(), (pictures(), noises())
    expected = theirs(image[0], noise=image[1]).loss.item()
    theirs.save_pretrained(tmp_path)  # the names of 4.x, but for the decoder's
    saved = load_file(tmp_path / "model.safetensors")
    old = {k.replace("decoder_encoder.layer", "decoder_layers"): v for k, v in saved.items()}
    assert "decoder.decoder_layers.1.attention.attention.query.weight" in old
    original = as_original(theirs.state_dict())
    assert {"blocks.1.attn.qkv.bias", "decoder_blocks.0.mlp.fc1.weight", "mask_token"} < set(
        original
    )
    for state in (theirs.state_dict(), saved, old, original):
        ours = small(depth=2)
        load_reference_weights(ours, state)
        assert ours(*image).loss.item() == pytest.approx(expected, abs=1e-12)


def test_an_encoder_alone_fills_the_encoder_alone():
    theirs, ours = hugging_face(), small(depth=2)
    before = ours.head.weight.clone()
    load_reference_weights(ours, theirs.vit.state_dict())
    expected = theirs.vit(pictures(), noise=noises()).last_hidden_state
    keep = random_masking(noises(), 0.75)[0]
    torch.testing.assert_close(ours.encoder(pictures(), keep), expected, atol=1e-12, rtol=0)
    assert torch.equal(ours.head.weight, before)


def test_keys_that_do_not_fit_are_named_and_nothing_is_copied():
    state, ours = hugging_face().state_dict(), small(depth=2)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    state["classifier.weight"] = torch.rand(3)
    state["vit.layernorm.bias"] = torch.rand(7)
    del state["vit.layers.1.attention.k_proj.weight"], state["decoder.decoder_pred.bias"]
    with pytest.raises(ValueError, match="must hold the weights of this MAE") as error:
        load_reference_weights(ours, state)
    message = str(error.value)
    for part in (
        "unknown: layers.1.attention.q_proj.weight, layers.1.attention.v_proj.weight, classifier",
        "missing: encoder.blocks.2.branch.qkv.weight, head.bias",
        "of another shape: encoder.norm.bias",
    ):
        assert part in message
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    with pytest.raises(ValueError, match=r"missing: .*skips\.0\.mask_token"):
        load_reference_weights(small("bridge", depth=2), hugging_face().state_dict())
    with pytest.raises(ValueError, match=r"missing: encoder\.stem\.cls"):
        load_reference_weights(ours, {})


# ---- zero initialisation ----


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("p", "channels", "loss"), [(3, 3, 0.962963), (4, 3, 0.979167)])
def test_D08_first_loss_is_that_of_predicting_zero(arch, p, channels, loss):
    mae = small(arch, image_size=4 * p, patch_size=p, zero_init=True, alpha_min=0.6)
    out = mae(pictures(side=4 * p), noises())
    assert not out.pred.any()
    assert out.loss.item() == pytest.approx(loss, abs=2e-5)  # 1e-6 in the target's root


def test_D08_constant_patches_count_for_nothing():
    mae, images = small(zero_init=True), pictures()
    images[:, :, :, :4] = 0.3
    out = mae(images, noises())
    share = out.mask.view(3, 4, 4)[:, :, 2:].sum() / out.mask.sum()
    assert out.loss.item() == pytest.approx(11 / 12 * share.item(), abs=2e-5)


def test_D08_encoder_passes_on_its_input_times_the_product():
    mae = small("paper", zero_init=True, alpha_min=0.6)
    keep = random_masking(noises(), 0.75)[0]
    latent, _ = mae.encode(pictures(), keep)
    start = mae.encoder.stem(pictures(), keep)
    torch.testing.assert_close(latent, 0.1503308887 * start, atol=1e-10, rtol=0)


def test_without_zero_init_no_part_is_silent():
    for arch in ARCHS:
        weights = dict(small(arch).named_parameters())
        assert all(w.any() for n, w in weights.items() if n.endswith(".weight")), arch


def first_step(name: str) -> int:
    """Sheet D 2.3: at which step a parameter of the paper's MAE first has a gradient."""
    if name.startswith("head"):
        return 1
    if re.match(r"norm|embed|decoder\.\d+\.branch\.out|skips\.\d+\.out", name):
        return 2
    if re.match(r"encoder\.blocks\.\d+\.(norm|branch\.(qkv|inner))", name):
        return 4
    return 3


def test_D09_first_gradients_of_the_paper():
    mae = small("paper", decoder=(8, 3, 2), zero_init=True, alpha_min=0.6)
    optimizer, first = torch.optim.AdamW(mae.parameters(), lr=1e-2), {}
    for step in range(1, 5):
        optimizer.zero_grad()
        mae(pictures(), noises(seed=step)).loss.backward()
        for name, weight in mae.named_parameters():
            if weight.grad is not None and weight.grad.any():
                first.setdefault(name, step)
        optimizer.step()
    assert first == {name: first_step(name) for name, _ in mae.named_parameters()}
    assert set(first.values()) == {1, 2, 3, 4}


# ---- long skips ----


@pytest.mark.parametrize(
    ("depth", "shares"),
    [(12, (0.898948, 0.600724, 0.291405, 0.099787, 0.023333, 0.003578)), (4, (0.691939, 0.150331))],
)
def test_D10_scale_of_the_taps_at_the_start(depth, shares):
    mae = small("paper", (8, 6, 2), depth=depth, zero_init=True, alpha_min=0.6)
    assert mae.taps == tuple(range(1, depth, 2))
    keep = random_masking(noises(), 0.75)[0]
    start, (_, taps) = mae.encoder.stem(pictures(), keep), mae.encode(pictures(), keep)
    for tap, share in zip(taps, shares, strict=True):
        # Six decimals, and the sheet's first one for depth 4 is a product of rounded factors.
        torch.testing.assert_close(tap, share * start, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ["paper", "bridge"])
def test_D10_as_many_taps_as_the_decoder_takes_the_deepest(arch):
    assert small("standard").taps == ()
    with torch.device("meta"):
        large = ViT(224, 16, 1024, 24, 16, final_norm=False)
        mae = MAE(large, 512, 8, 16, arch=arch)
    assert mae.taps == (9, 11, 13, 15, 17, 19, 21, 23)
    assert len(mae.skips) == len(mae.tap_scales) == 8
    assert small(arch, (8, 1, 2)).taps == (3,)
    assert small(arch, (8, 3, 2)).taps == (1, 3)


@pytest.mark.parametrize("arch", ["paper", "bridge"])
def test_D10_skips_as_the_sheet_writes_them(arch):
    """Deepest first, before decoder blocks 0 and 1; [tap; y] in this order; own mask tokens."""
    mae, events, states = perturbed(small(arch, (8, 3, 2))), [], {}

    def watch(name):
        def hook(module, arguments, out):
            events.append(name)
            states[name] = (*arguments, out)

        return hook

    for k, block in enumerate(mae.encoder.blocks):
        block.register_forward_hook(watch(f"encoder {k}"))
    for k, block in enumerate(mae.decoder):
        block.register_forward_hook(watch(f"decoder {k}"))
    for i, skip in enumerate(mae.skips):
        skip.register_forward_hook(watch(f"skip {i}"))
    mae(pictures(), noises())
    order = ["skip 0", "decoder 0", "decoder 1", "skip 1", *(f"decoder {k}" for k in range(2, 6))]
    assert events == [*(f"encoder {k}" for k in range(8)), *order]
    keep = random_masking(noises(), 0.75)[0]
    for i, deep in enumerate((7, 3)):
        tap, y, _, added = states[f"skip {i}"]
        assert torch.equal(tap, states[f"encoder {deep}"][-1])
        skip, y = mae.skips[i], y.expand(3, -1, -1)
        whole = skip.mask_token.expand(3, 17, -1).clone()
        whole[:, 0] = tap[:, 0]
        for b in range(3):
            whole[b, 1 + keep[b]] = tap[b, 1:]
        inner = torch.cat([whole, y], dim=-1) @ skip.inner.weight.T + skip.inner.bias
        expected = (inner * inner.sigmoid()) @ skip.out.weight.T + skip.out.bias
        torch.testing.assert_close(added, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(states[f"decoder {2 * i}"][0], y + added, atol=1e-15, rtol=0)
    assert not torch.equal(mae.skips[0].mask_token, mae.skips[1].mask_token)


def test_D10_taps_can_be_scaled():
    mae, scaled = perturbed(small("paper")), perturbed(small("paper"))
    keep = random_masking(noises(), 0.75)[0]
    scaled.tap_scales = (2.0, 0.5)
    (latent, taps), (same, others) = mae.encode(pictures(), keep), scaled.encode(pictures(), keep)
    assert torch.equal(latent, same)
    assert torch.equal(others[0], 2 * taps[0]) and torch.equal(others[1], 0.5 * taps[1])
    assert not torch.equal(scaled(pictures(), noises()).pred, mae(pictures(), noises()).pred)


def trained(mae: MAE, groups: list) -> torch.Tensor:
    """Losses of 60 steps of AdamW; eps is the sheet's: with a small one rounding grows."""
    optimizer, losses = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4), []
    for step in range(60):
        optimizer.zero_grad()
        loss = mae(pictures(), noises(seed=step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("arch", ["standard", "paper"])
def test_D03_a_decayed_autoencoder_is_learning_rates_and_scaled_taps(arch):
    alphas, rates = alpha_schedule(4, 0.6), {"lr": 1e-2, "weight_decay": 0.05}
    decayed, *plain = (small(arch, zero_init=True, alpha_min=a) for a in (0.6, 1.0, 1.0, 1.0))
    for mae in plain:
        fold_gains(mae.encoder, alphas)  # which is silent: of it only the norms' epsilons change
        mae.tap_scales = tuple(math.prod(alphas[: 2 * tap + 2]) for tap in mae.taps)
    both, without_rates, without_taps = plain
    without_taps.tap_scales = (1.0,) * len(mae.taps)
    expected = trained(decayed, decay_groups(decayed, **rates))

    def gap(mae, groups):
        return (trained(mae, groups) - expected).abs().max().item()

    def grouped(mae):
        return gain_groups(mae, alphas, **rates, eps=1e-4, within=mae.encoder)

    assert expected[-1] < 0.9 * expected[0]
    assert gap(both, grouped(both)) < 1e-9
    assert gap(without_rates, decay_groups(without_rates, **rates)) > 1e-4
    assert arch == "standard" or gap(without_taps, grouped(without_taps)) > 1e-4


def test_D11_decoder_of_the_paper_sees_the_encoder_through_skips_alone():
    mae = perturbed(small("paper"))
    seen = mae(pictures(), noises()).pred
    with torch.no_grad():
        for skip in mae.skips:
            skip.out.weight.zero_()
    blind = mae(pictures(), noises()).pred
    assert not torch.equal(seen, blind)
    assert torch.equal(mae(-pictures(), noises()).pred, blind)
    assert torch.equal(mae(pictures(), noises(seed=9)).pred, blind)
    torch.testing.assert_close(blind[0], blind[1], atol=1e-15, rtol=0)


def test_D11_bridge_sees_the_bottleneck_without_skips_too():
    mae = perturbed(small("bridge"))
    with torch.no_grad():
        for skip in mae.skips:
            skip.out.weight.zero_()
    blind = mae(pictures(), noises()).pred
    assert not torch.equal(mae(-pictures(), noises()).pred, blind)


# ---- the whole net ----


@pytest.mark.parametrize(("arch", "count"), [("paper", 117_038_848), ("standard", 111_655_680)])
def test_parameters_of_vit_base(arch, count):
    with torch.device("meta"):
        vit = ViT(224, 16, 768, 12, 12, final_norm=arch != "paper", zero_init=True)
        mae = MAE(vit, 512, 8, 16, arch=arch)
    assert sum(weight.numel() for weight in mae.parameters()) == count
    assert sum(table.numel() for table in mae.buffers()) == 252_160
    for skip in mae.skips:
        assert sum(weight.numel() for weight in skip.parameters()) == 919_296
    assert len(mae.skips) == (6 if arch == "paper" else 0)


@pytest.mark.parametrize("arch", ARCHS)
def test_D14_weights_and_tokens_decay_biases_norms_and_tables_do_not(arch):
    mae = small(arch)
    names = {weight: name for name, weight in mae.named_parameters()}
    kept, free = sorted(decay_groups(mae, 1e-3, 0.05), key=lambda group: -group["weight_decay"])
    decayed = {names[weight] for weight in kept["params"]}
    tokens = {name for name in decayed if name.endswith(("cls", "token"))}
    assert len(tokens) == 2 + len(mae.skips)
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed - tokens)
    left = {names[weight] for weight in free["params"]}
    assert all(name.endswith(".bias") or "norm" in name for name in left)
    assert decayed | left == set(names.values()) and "positions" not in str(names.values())


@pytest.mark.parametrize("arch", ARCHS)
def test_D21_the_decoder_does_not_decay_and_the_ramp_spans_the_encoder(arch):
    mae = small(arch, (8, 3, 2), alpha_min=0.6)
    found = [block.rule.alpha for block in mae.encoder.blocks]
    assert found == list(alpha_schedule(4, 0.6))
    assert found[-1] == pytest.approx(0.6)
    assert [type(block.rule).__name__ for block in mae.decoder] == ["Plain"] * 6
    assert paths(mae) == [*mae.encoder.blocks, *mae.decoder]


def test_D22_the_same_seed_gives_the_same_masks_and_loss():
    mae = small(double=False)
    images = pictures(dtype=torch.float32)

    def run(seed):
        return mae(images, generator=torch.Generator().manual_seed(seed))

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first.mask, again.mask) and torch.equal(first.loss, again.loss)
    assert not torch.equal(first.mask, other.mask)
    drawn = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mae(images, drawn).loss, first.loss)
    torch.manual_seed(0)
    assert torch.equal(mae(images).mask, first.mask)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_stream_stays_float32_under_autocast(arch):
    mae = perturbed(small(arch, (8, 3, 2), double=False, alpha_min=0.6))
    images, kinds = pictures(dtype=torch.float32), []
    exact = mae(images, noises())
    for block in paths(mae):
        block.register_forward_hook(lambda m, x, y: kinds.append((x[0].dtype, y.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        rough = mae(images, noises())
    assert set(kinds) == {(torch.float32, torch.float32)} and len(kinds) == 14
    assert rough.loss.dtype == torch.float32
    assert rough.loss.item() == pytest.approx(exact.loss.item(), rel=2e-2)
    rough.loss.backward()
    slopes = [weight.grad for weight in mae.parameters() if weight.grad is not None]
    mae.zero_grad()
    exact.loss.backward()
    pairs = zip(slopes, [w.grad for w in mae.parameters() if w.grad is not None], strict=True)
    assert all((a - b).norm() <= 0.1 * b.norm() + 1e-3 for a, b in pairs)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_side_by_side_shows_what_is_seen_what_is_made_of_it_and_the_image(norm_pix):
    images, noise = pictures(2), torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    silent = small("paper", zero_init=True, norm_pix=norm_pix)  # predicts 0
    exact = small("paper", zero_init=True, norm_pix=norm_pix)
    patches = patchify(images, 2)
    target = standardise(patches) if norm_pix else patches
    exact.decode = lambda *_: target
    views = side_by_side([silent, exact], images, noise).view(2, 4, 3, 8, 8)
    hidden = random_masking(noise, 0.75)[1][..., None] > 0
    level = patches.mean(-1, keepdim=True) if norm_pix else torch.zeros(1, dtype=torch.float64)
    for view, expected in zip(views.unbind(1), (0.8, level, patches, patches), strict=True):
        wanted = torch.where(hidden, torch.as_tensor(expected, dtype=torch.float64), patches)
        assert patchify(view, 2).allclose(wanted, atol=1e-12)


def test_a_nan_in_any_pixel_is_a_nan_in_the_loss():
    mae = small()
    for place in range(64):  # kept or removed: `fit` stops at such a loss
        images = pictures(1)
        images.view(1, 3, 64)[0, 1, place] = math.nan
        assert mae(images, noises(1)).loss.isnan()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "papers"}, 'arch must be .*got "papers"; did you mean "paper"'),
        ({"arch": "paper", "depth": 3}, 'encoder depth must be even for arch="paper", got 3'),
        ({"arch": "bridge", "depth": 3}, 'encoder depth must be even for arch="bridge", got 3'),
        ({"arch": "paper", "final_norm": True}, 'final_norm=False for arch="paper", got True'),
        ({"decoder": (8, 0, 2)}, "decoder_depth must be at least 1, got 0"),
        ({"decoder": (8, 2, 3)}, "decoder_heads must divide decoder_dim 8, got 3"),
        ({"decoder": (8, 2, 0)}, "decoder_heads must divide decoder_dim 8, got 0"),
        ({"decoder": (6, 2, 2)}, "decoder_dim must be a multiple of 4 above 0, got 6"),
        ({"decoder": (0, 2, 2)}, "decoder_dim must be a multiple of 4 above 0, got 0"),
    ],
)
def test_what_does_not_go_together_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_wrong_inputs_are_named():
    mae = small()
    with pytest.raises(ValueError, match=r"noise must be \[B, N\] = \[3, 16\], got \[3, 15\]"):
        mae(pictures(), noises(3, 15))
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 8, 8\], got \(3, 3, 10, 10\)"):
        mae(pictures(side=10))
    mae = small("paper")
    mae.tap_scales = (1.0,)
    with pytest.raises(ValueError, match="tap_scales must be one for each of taps"):
        mae(pictures())


def test_a_skip_has_a_mask_token_of_the_encoders_width():
    skip = LongSkip(16, 8)
    assert skip.mask_token.shape == (1, 1, 16)
    assert skip.inner.weight.shape == (8, 24)
