"""The loop, its checkpoints, and what must never go wrong in them."""

import copy
import errno
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import nn
from torch.nn.functional import cross_entropy

from mini_resdecay import data, experiments, train
from mini_resdecay.train import (
    TrainState,
    cosine_schedule,
    ema_decay_at,
    fit,
    load_checkpoint,
    loss_step,
    make_state,
    rows,
    save_checkpoint,
    update_ema,
)

ROOT = Path(__file__).parents[1]
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95)),
}


def small_state(optimizer: str = "adamw", steps: int = 6, seed: int = 3) -> TrainState:
    """A net with dropout and running statistics, a schedule and an EMA: all that can go wrong."""
    set_seed(seed)
    net = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)
    )
    made = OPTIMIZERS[optimizer](net.parameters())
    schedule = cosine_schedule(made, steps, warmup=2)
    return make_state(net, made, scheduler=schedule, ema_decay=0.9, seed=seed)


def small_batches(steps: int = 6, size: int = 12) -> list:
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 5, generator=draw), torch.randint(3, (size,), generator=draw))
        for _ in range(steps)
    ]


def noisy_loss(state: TrainState, batch: tuple) -> dict:
    """A loss that draws from every generator that a run may use."""
    x, y = batch
    noise = torch.randn(x.shape, generator=state.generator)
    scale = random.random() + float(np.random.rand())
    loss = cross_entropy(state.model(x + 0.1 * scale * noise), y)
    return {"loss": loss, "scale": scale}


STEP = loss_step(noisy_loss, clip=1.0)


def linear_state(lr: float = 0.1, **more: object) -> TrainState:
    """One weight, started at 0: what a step does to it can be written down."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    return make_state(net, torch.optim.SGD(net.parameters(), lr=lr), **more)


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Net, EMA, optimiser and what each generator would draw next."""
    found = {f"net {k}": v for k, v in state.net.state_dict().items()}
    found |= {f"ema {k}": v for k, v in state.ema.state_dict().items()}
    for i, held in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {i} {k}": torch.as_tensor(v) for k, v in held.items()}
    found["lr"] = torch.tensor(state.optimizer.param_groups[0]["lr"], dtype=torch.float64)
    found["next lr"] = torch.tensor(state.scheduler.get_last_lr(), dtype=torch.float64)
    found["torch"] = torch.rand(3)
    found["generator"] = torch.rand(3, generator=state.generator)
    found["numpy"] = torch.from_numpy(np.random.rand(3))
    found["python"] = torch.tensor([random.random(), random.gauss()], dtype=torch.float64)
    return found


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- resume ----


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_resume_is_bit_exact(tmp_path: Path, optimizer: str, cut: int) -> None:
    batches = small_batches()
    whole = fit(small_state(optimizer), batches, STEP, every=2)
    expected = everything(whole)
    fit(small_state(optimizer), batches, STEP, every=2, until=cut, checkpoint=tmp_path)
    set_seed(99)
    resumed = load_checkpoint(tmp_path, small_state(optimizer, seed=4))
    assert resumed.step == cut
    fit(resumed, batches, STEP, every=2)
    assert_same(everything(resumed), expected)
    seen, again = ([{**x, "seconds": 0} for x in s.history] for s in (whole, resumed))
    assert seen == again


def test_loading_restores_every_generator(tmp_path: Path) -> None:
    state = fit(small_state(), small_batches(), STEP, until=3)
    random.gauss()  # leaves half a pair in hand, which is state too
    save_checkpoint(tmp_path, state)
    expected = everything(state)
    other = small_state(seed=8)
    set_seed(1234)
    assert_same(everything(load_checkpoint(tmp_path, other)), expected)


def test_seconds_go_on_after_a_resume(tmp_path: Path) -> None:
    state = small_state()
    state.seconds = 1000.0
    save_checkpoint(tmp_path, state)
    resumed = fit(load_checkpoint(tmp_path, small_state()), small_batches(), STEP)
    assert 1000 < resumed.seconds < 2000


def test_log_has_each_line_once_after_a_resume(tmp_path: Path) -> None:
    log, batches = tmp_path / "log.jsonl", small_batches(10)
    kept = {"checkpoint": tmp_path / "c", "checkpoint_every": 3, "log": log, "every": 2}
    with pytest.raises(ZeroDivisionError):  # dies in step 9: checkpoint of 6, log up to 8
        fit(small_state(), batches, failing_at(8, lambda: 1 // 0), **kept)
    assert [line["step"] for line in lines_of(log)] == [2, 4, 6, 8]
    fit(load_checkpoint(tmp_path / "c", small_state()), batches, STEP, **kept)
    assert [line["step"] for line in lines_of(log)] == [2, 4, 6, 8, 10]


def test_log_line_is_the_mean_since_the_last(tmp_path: Path) -> None:
    values = [1.0, 2.0, 6.0, 10.0, 20.0]
    state = linear_state(lr=0.5)
    fit(state, values, lambda s, b: {"loss": torch.tensor(b)}, log=tmp_path / "l", every=3)
    found = [{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(tmp_path / "l")]
    assert found == [
        {"step": 3, "lr": 0.5, "loss": 3.0},
        {"step": 5, "lr": 0.5, "loss": 15.0},
    ]
    assert lines_of(tmp_path / "l") == state.history


def test_log_is_flushed_line_by_line(tmp_path: Path) -> None:
    log, seen = tmp_path / "log", []

    def step(state: TrainState, batch: int) -> dict:
        seen.append(len(lines_of(log)) if log.exists() else 0)
        return {"loss": 0.0}

    fit(linear_state(), range(4), step, log=log, every=1)
    assert seen == [0, 1, 2, 3]


def test_until_stops_early_and_goes_on() -> None:
    state, taken = linear_state(), []
    for until in (2, 2, 5, 100):
        fit(state, range(6), lambda s, b: taken.append(b) or {"loss": 0.0}, until=until)
    assert taken == [0, 1, 2, 3, 4, 5]


# ---- EMA, schedule, clipping ----


def test_R38_ema_of_one_step() -> None:
    state = linear_state(ema_decay=0.999)
    nn.init.constant_(state.net.weight, 1.0)
    nn.init.constant_(state.ema.weight, 2.0)
    state.step = 10_000  # after the warm-up
    update_ema(state)
    assert state.ema.weight.item() == pytest.approx(0.999 * 2 + 0.001 * 1, abs=1e-6)


def test_D16_ema_warm_up() -> None:
    found = [ema_decay_at(0.9999, n) for n in (0, 9, 99, 999)]
    assert found == pytest.approx([0.1, 0.5263158, 0.9174312, 0.9910803], abs=5e-8)
    assert ema_decay_at(0.9999, 89_989) < 0.9999 == ema_decay_at(0.9999, 89_990)


def test_ema_equals_a_hand_loop() -> None:
    state = small_state()
    mean = {k: v.clone() for k, v in state.net.state_dict().items()}
    for n in range(6):
        fit(state, small_batches(), STEP, until=n + 1)
        d = min(0.9, (1 + n) / (10 + n))
        for name, new in state.net.named_parameters():
            mean[name] = d * mean[name] + (1 - d) * new.detach()
    statistics = dict(state.net.named_buffers())
    for name, value in state.ema.state_dict().items():
        torch.testing.assert_close(value, statistics.get(name, mean[name]), rtol=1e-6, atol=1e-7)
    assert not any(p.requires_grad for p in state.ema.parameters())


def test_cosine_schedule_known_values() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, found = cosine_schedule(optimizer, 6, warmup=2), []
    for _ in range(7):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    high, low = 1 + math.sqrt(0.5), 1 - math.sqrt(0.5)
    assert found == pytest.approx([1.0, 2.0, 2.0, high, 1.0, low, 0.0], abs=1e-12)


def test_cosine_schedule_equals_torch_without_warm_up() -> None:
    made = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3) for _ in range(2)]
    ours = cosine_schedule(made[0], 9)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(made[1], 9)
    for _ in range(9):
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), abs=1e-12)
        for optimizer, schedule in zip(made, (ours, theirs), strict=True):
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("warmup", [-1, 6, 7])
def test_cosine_schedule_refuses_a_warm_up_without_end(warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=rf"warmup must be in \[0, steps = 6\), got {warmup}"):
        cosine_schedule(optimizer, 6, warmup)


@pytest.mark.parametrize(("clip", "moved"), [(None, 3.0), (5.0, 3.0), (0.5, 0.5)])
def test_gradient_clipping(clip: float | None, moved: float) -> None:
    state = linear_state(lr=1.0)
    fit(state, [torch.full((4, 1), 3.0)], loss_step(lambda s, x: s.model(x).mean(), clip))
    assert abs(state.net.weight.item()) == pytest.approx(moved, abs=1e-5)


def scaled_state(scale: float) -> TrainState:
    return scaled(linear_state(lr=1.0), scale, growth_interval=2)


def scaled(state: TrainState, scale: float, growth_interval: int = 2000) -> TrainState:
    """What accelerate makes of fp16 on a GPU, with a gradient scaler of the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    accelerator = state.accelerator
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = scaler
    state.optimizer = AcceleratedOptimizer(state.optimizer.optimizer, scaler=scaler)
    accelerator._optimizers = [state.optimizer]
    return state


def test_scaled_gradients_are_clipped_at_their_true_size(tmp_path: Path) -> None:
    step = loss_step(lambda s, x: s.model(x).mean(), clip=0.5)
    batches = [torch.full((4, 1), 3.0)] * 4
    state = fit(scaled_state(1024.0), batches, step, until=3, checkpoint=tmp_path)
    assert state.net.weight.item() == pytest.approx(-1.5, abs=1e-3)
    assert state.accelerator.scaler.get_scale() == 2048.0  # grown once, after two steps
    with pytest.raises(ValueError, match="only one of the two has {'scaler'}"):
        load_checkpoint(tmp_path, linear_state(lr=1.0))
    other = fit(load_checkpoint(tmp_path, scaled_state(8.0)), batches, step)
    assert other.accelerator.scaler.get_scale() == 4096.0


def test_a_step_with_infinite_gradients_is_skipped() -> None:
    state = scaled_state(1024.0)
    step = loss_step(lambda s, x: s.model(x).sum() * torch.tensor(math.inf), clip=0.5)
    step(state, torch.ones(1, 1))
    assert state.net.weight.item() == 0.0
    assert state.accelerator.scaler.get_scale() == 512.0


def test_a_denoiser_trains_in_fp16_as_on_a_t4() -> None:
    """As far as a CPU can rehearse it: autocast to fp16, scaled gradients, mean weights."""
    changes = ["patch=8", "dim=16", "depth=2", "heads=2", "images=96", "batch=16", "lr=0.01"]
    one = experiments.get("diffusion-cifar10-plain")
    recipe = experiments.recipe_of(one, "t4", [*changes, "epochs=2"])
    assert recipe.precision == "half"  # fp16 on a T4: see `check_precision`
    recipe, losses = replace(recipe, precision="no"), {}
    for kind in (torch.float32, torch.float16):
        images, seen = data.shapes(96, 96)[0], []
        state, batches, step = experiments._diffusion_training(recipe, 0, images, cpu=True)
        if kind == torch.float16:
            scaled(state, 2.0**16)
        before = copy.deepcopy(state.ema)
        state.net.head.register_forward_hook(lambda net, x, y, seen=seen: seen.append(y.dtype))
        fit(state, batches, step, every=1, quiet=True)
        losses[kind] = [line["loss"] for line in state.history]
        assert set(seen) == {kind} and len(losses[kind]) == 10
        assert {weight.dtype for weight in state.net.parameters()} == {torch.float32}
        assert not torch.equal(state.ema.head.weight, before.head.weight)
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], abs=5e-3)
    assert losses[torch.float16] != losses[torch.float32]
    assert state.accelerator.scaler.get_scale() == 2.0**16  # no step was skipped


# ---- what stops a run ----


def failing_at(fails: int, failure) -> object:
    """The ordinary step, but `failure()` comes at the end of step `fails` (from 0)."""

    def step(state: TrainState, batch: tuple) -> dict:
        metrics = STEP(state, batch)
        if state.step == fails:
            metrics = {**metrics, **(failure() or {})}
        return metrics

    return step


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_is_named_and_the_last_checkpoint_kept(tmp_path: Path, bad: float) -> None:
    step = failing_at(2, lambda: {"loss": torch.tensor(bad)})  # seen when step 4 is to be saved
    with pytest.raises(FloatingPointError, match=rf"loss is {bad} at step 3, which is not saved"):
        fit(small_state(), small_batches(), step, checkpoint=tmp_path, checkpoint_every=2)
    assert load_checkpoint(tmp_path, small_state()).step == 2


def test_non_finite_loss_is_found_without_log_or_checkpoint() -> None:
    with pytest.raises(FloatingPointError, match="loss is nan at step 2"):
        fit(small_state(), small_batches(), failing_at(1, lambda: {"loss": math.nan}), until=3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_raises(tmp_path: Path, number: int) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    whole = fit(small_state(), small_batches(), STEP, every=2)
    step = failing_at(2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt, match="after step 3"):
        fit(small_state(), small_batches(), step, every=2, checkpoint=tmp_path)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    resumed = load_checkpoint(tmp_path, small_state())
    assert resumed.step == 3
    fit(resumed, small_batches(), STEP, every=2)
    for a, b in zip(whole.net.parameters(), resumed.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal must leave the step")

    with pytest.raises(KeyboardInterrupt):
        fit(small_state(), small_batches(), failing_at(2, twice), checkpoint=tmp_path)
    assert list(tmp_path.iterdir()) == []  # a step cut in half is not worth keeping


def test_no_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    fit(linear_state(), range(3), lambda s, b: {"loss": 0.0})
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("kernel", "quiet", "seen"),
    [
        (False, None, False),
        (True, None, True),  # a notebook's stderr is no terminal, and yet it is watched
        (True, True, False),
        (False, False, True),
    ],
)
def test_the_bar_is_shown_where_it_can_be_seen_or_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kernel, quiet, seen
) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel.zmqshell", raising=False)
    if kernel:
        monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", SimpleNamespace())
    fit(linear_state(), range(3), lambda s, b: {"loss": 0.5}, quiet=quiet, every=1)
    assert capsys.readouterr().err == ""  # not in the first five seconds
    real, asked = train.tqdm, []
    at_once = {"delay": 0}
    monkeypatch.setattr(train, "tqdm", lambda **k: asked.append(k) or real(**k | at_once))
    fit(linear_state(), range(3), lambda s, b: {"loss": 0.5}, quiet=quiet, every=1)
    shown = capsys.readouterr().err
    assert ("3/3" in shown and "loss=0.5" in shown) == seen == bool(shown)
    assert asked[0]["delay"] == 5


# ---- checkpoints ----


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from mini_resdecay import train
from test_train import MOMENTS, STEP, small_batches, small_state

def run_until(place, call, late, folder):
    real, calls = getattr(os, place), []

    def die(*arguments):
        calls.append(1)
        if len(calls) == call and late:
            real(*arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(os, place, die)
    train.fit(small_state(), small_batches(), STEP, checkpoint=folder, checkpoint_every=2)

train.torch.set_num_threads(1)  # a fork has no worker threads
train.fit(small_state(), small_batches(), STEP)  # what torch loads late is loaded once
for i, moment in enumerate(MOMENTS):
    child = os.fork()
    if child == 0:
        run_until(*moment, {folder!r} + f"/{{i}}")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

# Each checkpoint is two syncs and two renames; the second one's are killed here, before or after
# the call.
MOMENTS = [
    (place, call, late)
    for place in ("fsync", "replace")
    for call in (3, 4)
    for late in (False, True)
]


def test_kill_at_any_moment_of_a_write(tmp_path: Path) -> None:
    script = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stdout.split() == [str(-signal.SIGKILL)] * len(MOMENTS), ended.stderr
    for i, (place, call, late) in enumerate(MOMENTS):
        folder = tmp_path / str(i)
        renamed = (place, call, late) == ("replace", 4, True)
        state = load_checkpoint(folder, small_state())
        assert state.step == (4 if renamed else 2)
        fit(state, small_batches(), STEP, checkpoint=folder)
        # nothing of the killed write is left behind
        assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
        assert len(list(folder.iterdir())) == 2
        assert load_checkpoint(folder, small_state()).step == 6


def full(*arguments: object, **named: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["os.fsync", "os.replace", "Path.write_bytes"])
def test_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    fit(small_state(), small_batches(), STEP, until=2, checkpoint=tmp_path)
    state = load_checkpoint(tmp_path, small_state())
    with monkeypatch.context() as patch:
        patch.setattr(f"mini_resdecay.data.{place}", full)
        with pytest.raises(OSError, match="No space left on device"):
            fit(state, small_batches(), STEP, until=4, checkpoint=tmp_path)
    assert load_checkpoint(tmp_path, small_state()).step == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_only_one_checkpoint_stays(tmp_path: Path) -> None:
    fit(small_state(), small_batches(), STEP, checkpoint=tmp_path, checkpoint_every=1)
    names = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert names == ["checkpoint.json", "step"]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif how == "gone":
        path.unlink()
    elif how == "byte":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:  # another number in the JSON
        path.write_text(path.read_text().replace('"step": 2,', '"step": 3,', 1))


@pytest.mark.parametrize(
    ("file", "how"),
    [("step-*", "cut"), ("step-*", "byte"), ("step-*", "gone")]
    + [("*.json", "cut"), ("*.json", "byte"), ("*.json", "number")],
)
def test_damaged_checkpoint_is_refused(tmp_path: Path, file: str, how: str) -> None:
    fit(small_state(), small_batches(), STEP, until=2, checkpoint=tmp_path)
    damage(next(tmp_path.glob(file)), how)
    before = everything(small_state())
    state = small_state()
    with pytest.raises(ValueError, match="checkpoint .* is damaged, cut or altered"):
        load_checkpoint(tmp_path, state)
    assert_same(everything(state), before)


def test_every_byte_of_the_json_counts(tmp_path: Path) -> None:
    fit(linear_state(), range(2), lambda s, b: {"loss": 0.5}, checkpoint=tmp_path)
    path = tmp_path / "checkpoint.json"
    good, silent = path.read_bytes(), []
    for i in range(0, len(good), 97):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        try:
            load_checkpoint(tmp_path, linear_state())
            silent.append(i)
        except ValueError as error:
            assert "damaged" in str(error)
    # white space changed to other white space would be no harm; ^ 1 makes "!" of " "
    assert silent == []


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint.json"):
        load_checkpoint(tmp_path, small_state())


def test_checkpoint_of_another_experiment(tmp_path: Path) -> None:
    fit(small_state(), small_batches(), STEP, until=2, checkpoint=tmp_path, fingerprint="decay-7f")
    message = "of another experiment: 'decay-7f', not 'plain-03'"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, small_state(), "plain-03")
    with pytest.raises(ValueError, match=message):  # nor is it overwritten
        fit(small_state(), small_batches(), STEP, checkpoint=tmp_path, fingerprint="plain-03")
    assert load_checkpoint(tmp_path, small_state(), "decay-7f").step == 2


def test_checkpoint_of_another_net_names_what_differs(tmp_path: Path) -> None:
    fit(small_state(), small_batches(), STEP, until=2, checkpoint=tmp_path)
    state = small_state()
    state.net[0] = nn.Linear(5, 9)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight: .*\[8, 5\].*\[9, 5\]"):
        load_checkpoint(tmp_path, state)


def test_checkpoint_of_another_set_up(tmp_path: Path) -> None:
    fit(small_state(), small_batches(), STEP, until=2, checkpoint=tmp_path)
    state = small_state()
    state.ema = None
    with pytest.raises(ValueError, match="does not fit: only one of the two has {'ema'}"):
        load_checkpoint(tmp_path, state)


def test_a_checkpoint_of_a_gpu_loads_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train._parts
    gpu = {"cuda": (lambda: torch.zeros(16, dtype=torch.uint8), print)}
    monkeypatch.setattr(train, "_parts", lambda state: real(state) | gpu)
    fit(small_state(), small_batches(), STEP, until=2, checkpoint=tmp_path)
    monkeypatch.setattr(train, "_parts", real)
    assert load_checkpoint(tmp_path, small_state()).step == 2


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **named: object) -> None:
        pytest.fail("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, never)
    fit(small_state(), small_batches(), STEP, until=2, checkpoint=tmp_path)
    assert load_checkpoint(tmp_path, small_state()).step == 2
    kinds = {path.suffix for path in tmp_path.iterdir()}
    assert kinds == {".json", ".safetensors"}


def test_tied_weights_are_stored(tmp_path: Path) -> None:
    def tied() -> TrainState:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[1].weight = net[0].weight
        return make_state(net, torch.optim.SGD(net.parameters()))

    state = tied()
    save_checkpoint(tmp_path, state)
    loaded = load_checkpoint(tmp_path, tied())
    assert torch.equal(loaded.net[0].weight, state.net[0].weight)
    assert loaded.net[1].weight is loaded.net[0].weight


# ---- state, precision, processes ----


def test_generator_is_apart_from_the_global_one() -> None:
    state = linear_state(seed=1234)
    kept = torch.get_rng_state()
    drawn = (torch.rand(6, generator=state.generator) >= 0.5).int().tolist()
    assert drawn == [0, 0, 0, 0, 0, 1]  # R22: seed 1234
    assert torch.equal(torch.get_rng_state(), kept)


def test_a_net_is_trained_in_train_mode() -> None:
    state, modes = linear_state(), []
    state.net.eval()
    fit(state, range(1), lambda s, b: modes.append(s.model.training) or {"loss": 0.0})
    assert modes == [True]


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2])
def test_ema_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"ema_decay must be in \[0, 1\), got {decay}"):
        linear_state(ema_decay=decay)


def test_precision_that_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = 'precision on this device must be one of no, bf16, got "fp16"'
    with pytest.raises(ValueError, match=wanted):
        linear_state(precision="fp16", cpu=True)
    assert linear_state(precision="bf16", cpu=True).accelerator.mixed_precision == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match='must be one of no, fp16, got "bf16"'):
        train.check_precision("bf16")
    train.check_precision("fp16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    train.check_precision("bf16")
    with pytest.raises(ValueError, match='must be one of no, fp16, bf16, got "fp8"'):
        train.check_precision("fp8")


def test_rows_of_each_process() -> None:
    def state(rank: int, world: int) -> TrainState:
        copied = copy.copy(linear_state())
        copied.accelerator = SimpleNamespace(process_index=rank, num_processes=world)
        return copied

    batch = (torch.arange(6), {"y": torch.arange(12).reshape(6, 2)})
    cut = [rows(state(rank, 3), batch) for rank in range(3)]
    assert [x.tolist() for x, _ in cut] == [[0, 3], [1, 4], [2, 5]]
    assert cut[1][1]["y"].tolist() == [[2, 3], [8, 9]]
    assert rows(state(0, 1), batch) is batch
    with pytest.raises(ValueError, match="a batch of 6 rows does not divide over 4 processes"):
        rows(state(0, 4), batch)


PROCESSES = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from safetensors.torch import save_file
from test_train import process_run
state = process_run({folder!r})
save_file(state.net.state_dict(), {folder!r} + f"/rank{{state.accelerator.process_index}}.out")
state.accelerator.wait_for_everyone()
os._exit(0)  # torch takes its time to unload, and there is nothing left to do
"""


def process_run(folder: str) -> TrainState:
    """Six steps with noise, clipping, EMA, log and checkpoint; the same for any process count."""
    set_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    state = make_state(net, optimizer, ema_decay=0.9)

    def loss(state: TrainState, batch: tuple) -> torch.Tensor:
        x, y = batch
        size = len(x) * state.accelerator.num_processes
        noise = rows(state, torch.randn(size, 5, generator=state.generator))
        return cross_entropy(state.model(x + 0.1 * noise), y)

    kept = {"log": folder + "/log", "every": 2, "checkpoint": folder, "checkpoint_every": 3}
    return fit(state, small_batches(), loss_step(loss, clip=0.5), **kept)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(
    tmp_path: Path, launch: Callable[..., str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    expected = process_run(str(one))
    script = tmp_path / "run.py"
    script.write_text(PROCESSES.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(two)))
    launch(script, tmp_path)
    found = [safetensors.torch.load_file(two / f"rank{rank}.out") for rank in (0, 1)]
    for name, value in expected.net.state_dict().items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-6)
    for a, b in zip(lines_of(one / "log"), lines_of(two / "log"), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    state = make_state(expected.net, torch.optim.SGD(expected.net.parameters()), ema_decay=0.9)
    assert load_checkpoint(two, state).step == 6
