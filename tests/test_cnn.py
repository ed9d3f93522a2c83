"""The residual CNN: shapes, sizes by hand, blocks and masks."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mini_resdecay.cnn import ResidualCNN
from mini_resdecay.shortcuts import SHORTCUTS, Residual, alpha_schedule, path_mask, paths


def cnn(seed: int = 0, channels: int = 3, classes: int = 10, **kwargs: object) -> ResidualCNN:
    torch.manual_seed(seed)
    return ResidualCNN(channels, classes, **kwargs)


def images(n: int = 2, channels: int = 3, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=generator) * 2 - 1


SMALL = {"widths": (8, 16), "blocks": 2}


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 17)])
def test_logits_have_one_row_an_image(channels, size):
    logits = cnn(channels=channels, classes=7)(images(3, channels, size))
    assert logits.shape == (3, 7) and logits.isfinite().all()


@pytest.mark.parametrize(
    ("channels", "classes", "widths", "blocks"),
    [(1, 10, (16, 32, 64), 3), (3, 10, (32, 64, 128), 3), (3, 4, (8,), 1)],
)
def test_parameter_count_by_hand(channels, classes, widths, blocks):
    stem = 9 * channels * widths[0]
    block = sum(2 * 9 * w * w + 2 * 2 * w for w in widths)  # two convolutions, two group norms
    down = sum(9 * a * b for a, b in itertools.pairwise(widths))
    head = 2 * widths[-1] + widths[-1] * classes + classes
    model = cnn(channels=channels, classes=classes, widths=widths, blocks=blocks)
    assert sum(p.numel() for p in model.parameters()) == stem + blocks * block + down + head


def test_blocks_are_the_paths_in_order():
    model = cnn()
    assert len(model.blocks) == 9
    assert all(isinstance(block, Residual) for block in model.blocks)
    assert paths(model) == list(model.blocks)


def test_order_of_paths_is_the_order_of_the_forward_pass():
    model, called = cnn(**SMALL), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, *_: called.append(module))
    model(images())
    assert called == paths(model)


def test_images_shrink_by_two_between_stages_and_keep_their_size_inside():
    model, shapes = cnn(), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, x, out: shapes.append((x[0].shape, out.shape)))
    model(images(1, size=32))
    assert all(before == after for before, after in shapes)
    assert [tuple(after[1:]) for _, after in shapes] == (
        [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    )


def test_down_sampling_is_always_on():
    """With all paths off, stem, strided convolutions and head still work and have gradients."""
    model = cnn(**SMALL)
    with path_mask(model, torch.zeros(4)):
        model(images()).square().sum().backward()
    inside = {id(p) for block in model.blocks for p in block.parameters()}
    outside = [p for p in model.parameters() if id(p) not in inside]
    assert len(outside) >= 5
    assert all(p.grad.norm() > 0 for p in outside)
    for block in model.blocks:
        for p in block.parameters():
            assert p.grad is not None and torch.count_nonzero(p.grad).item() == 0


def test_masks_switch_single_blocks():
    model, x = cnn(**SMALL), images()
    bare = model(x)
    with path_mask(model, torch.ones(4)):
        assert torch.equal(model(x), bare)
    for path in range(4):
        mask = torch.ones(4)
        mask[path] = 0
        with path_mask(model, mask):
            assert not torch.allclose(model(x), bare, atol=1e-6)
    assert torch.equal(model(x), bare)


@pytest.mark.parametrize("shortcut", sorted(SHORTCUTS))
def test_blocks_are_their_formulas_and_leave_their_input_alone(shortcut):
    """A branch that works in place would change the state that the shortcut carries."""
    model = cnn(shortcut=shortcut, **SMALL)
    block, x = model.blocks[0], images(2, 8, 6)
    keep = x.clone()
    out = block(x)
    assert torch.equal(x, keep)
    branch, norm = block.branch, block.norm
    expected = {
        "plain": lambda: keep + branch(norm(keep)),
        "decay": lambda: keep + branch(norm(keep)),
        "learned": lambda: keep + branch(norm(keep)),
        "identity-drop": lambda: keep + branch(norm(keep)),
        "scaled-sum": lambda: 0.5**0.5 * (keep + branch(norm(keep))),
        "branch-scaled": lambda: keep + 0.5**0.5 * branch(norm(keep)),
        "post-norm": lambda: norm(keep + branch(keep.clone())),
        "none": lambda: branch(norm(keep)),
    }
    assert torch.allclose(out, expected[shortcut](), atol=1e-6)


def test_branch_sees_group_norm_relu_convolution_twice():
    model = cnn(**SMALL)
    block, x = model.blocks[0], images(2, 8, 6)
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert [c.weight.shape for c in convolutions] == [(8, 8, 3, 3)] * 2
    h = x
    for convolution in convolutions:  # at initialisation the norms' weights are 1 and 0
        h = F.conv2d(F.relu(F.group_norm(h, 8)), convolution.weight, convolution.bias, padding=1)
    assert torch.allclose(block(x), x + h, atol=1e-5)


def test_decay_runs_over_the_whole_depth():
    model, plain = cnn(alpha_min=0.5), cnn()
    for alpha, block, twin in zip(
        alpha_schedule(9, 0.5, per="block"), model.blocks, plain.blocks, strict=True
    ):
        x = images(1, block.norm.num_channels, 5)
        assert torch.allclose(block(x), twin(x) - (1 - alpha) * x, atol=1e-6)


def test_an_image_does_not_feel_its_batch():
    model, x = cnn(**SMALL), images(4)
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-5)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_few_steps_learn_four_images():
    model, x, y = cnn(classes=4, **SMALL), images(4, size=8), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x).argmax(1) == y).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"widths": ()}, r"widths must .*got \(\)"),
        ({"widths": (12,)}, r"widths must .*multiples of 8.*12"),
        ({"widths": (0, 8)}, r"widths must .*0"),
        ({"alpha_min": 0.0}, r"alpha_min must .*\(0, 1\]"),
        ({"shortcut": "plian"}, r'shortcut .*"plian".*did you mean "plain"'),
        ({"shortcut": "post-norm", "alpha_min": 0.5}, "alpha_min .*post-norm"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
    ],
)
def test_impossible_nets_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        cnn(**kwargs)
