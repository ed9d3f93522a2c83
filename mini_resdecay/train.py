"""One training loop for every net of the book, on `accelerate`; the step is passed in.

    state = make_state(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    step = loss_step(lambda state, batch: cross_entropy(state.model(batch[0]), batch[1]))
    fit(state, batches, step, log="run/log.jsonl", checkpoint="run")

The loop knows no model and no experiment. What a resumed run needs is in `TrainState`, and all
of it is stored: tensors as safetensors, everything else as JSON. Nothing is ever unpickled.
"""

import copy
import json
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import find_batch_size, send_to_device, slice_tensors
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from tqdm import tqdm

from . import known, require
from .data import sha256, write_whole

Step = Callable[["TrainState", Any], dict[str, Any]]
FIELDS = ("step", "seconds", "recent", "history")  # of a TrainState; JSON holds them


@dataclass
class TrainState:
    """Everything that changes while a net trains; make one with `make_state`.

    `recent` holds the metrics since the last log line, `history` the log lines so far,
    `generator` is for masks and noise: it is on the CPU and the same in every process.
    """

    net: nn.Module
    model: nn.Module  # the net, wrapped where there are several processes: call this one
    optimizer: Optimizer
    accelerator: Accelerator
    generator: torch.Generator
    scheduler: lr_scheduler.LRScheduler | None = None
    ema: nn.Module | None = None
    ema_decay: float = 0.0
    step: int = 0
    seconds: float = 0.0
    recent: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)


def make_state(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    scheduler: lr_scheduler.LRScheduler | None = None,
    ema_decay: float = 0.0,
    seed: int = 0,
    precision: str = "no",
    cpu: bool = False,
) -> TrainState:
    """Place a net and its optimiser on the device and gather what its training needs.

    `precision` is "no" (float32), "fp16" (with a gradient scaler), "bf16", or "half": fp16
    on GPUs without bf16, else bf16. `cpu` keeps off the GPU. A state made earlier with another
    precision or device cannot go on after this.
    An `ema_decay` of 0 means no EMA. `seed` is for the state's generator alone.
    Raises ValueError for a precision that the device lacks or an EMA decay outside [0, 1).
    """
    require("ema_decay", ema_decay, 0 <= ema_decay < 1, "be in [0, 1)")
    # Said outright: without it, processes on a machine with no GPU would each train alone.
    cpu = cpu or not torch.accelerator.is_available()
    precision = check_precision(precision, cpu)
    # accelerate keeps one configuration a process; a notebook may want a second one.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    model.to(accelerator.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False) if ema_decay else None
    prepared, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(seed)
    return TrainState(model, prepared, optimizer, accelerator, generator, scheduler, ema, ema_decay)


def check_precision(precision: str, cpu: bool = False) -> str:
    """The precision that "half" stands for here; others as they are, ValueError if not there."""
    modes = ["no", "bf16"]
    if torch.cuda.is_available() and not cpu:
        modes = ["no", "fp16", "bf16"][: 2 + (torch.cuda.get_device_capability() >= (8, 0))]
    return modes[-1] if precision == "half" else known("precision on this device", precision, modes)


def cosine_schedule(optimizer: Optimizer, steps: int, warmup: int = 0) -> lr_scheduler.LambdaLR:
    """Learning rate: a straight rise over `warmup` steps, then half a cosine down to 0.

    Raises ValueError unless 0 <= warmup < steps.
    """
    require("warmup", warmup, 0 <= warmup < steps, f"be in [0, steps = {steps})")

    def factor(step: int) -> float:
        part = min(1.0, (step - warmup) / (steps - warmup))
        return (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * part)

    return lr_scheduler.LambdaLR(optimizer, factor)


def loss_step(loss_fn: Callable[[TrainState, Any], Any], clip: float | None = None) -> Step:
    """Make the ordinary step: forward, backward, clip the gradient norm, update.

    `loss_fn(state, batch)` gives the loss, or a dict of scalars that holds "loss".
    """

    def step(state: TrainState, batch: Any) -> dict[str, Any]:
        state.optimizer.zero_grad()
        with state.accelerator.autocast():
            out = loss_fn(state, batch)
        metrics = out if isinstance(out, dict) else {"loss": out}
        state.accelerator.backward(metrics["loss"])
        if clip is not None:
            state.accelerator.clip_grad_norm_(state.net.parameters(), clip)
        state.optimizer.step()  # in fp16 accelerate skips it where gradients are infinite
        return {k: v.detach() if isinstance(v, Tensor) else v for k, v in metrics.items()}

    return step


def fit(
    state: TrainState,
    batches: Sequence[Any],
    step: Step,
    *,
    until: int | None = None,
    log: str | Path | None = None,
    every: int = 50,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    quiet: bool | None = None,
    fingerprint: str = "",
) -> TrainState:
    """Take `step(state, batches[i])` for each i from `state.step` on; then scheduler and EMA.

    A step does forward, backward and update, and returns detached scalars. Each process takes
    its own rows of a batch (`rows`). A JSON line in `log` holds the mean over the last `every`
    steps; those lines are in `state.history` too. `checkpoint` is a folder: written each
    `checkpoint_every` steps, at the end, and on Ctrl-C or SIGTERM, which end the run after the
    step under way. `until` stops early; for `quiet` see `bar`.
    Raises FloatingPointError, naming the step, when a metric is not finite; ValueError where
    `checkpoint` is of another experiment, that is, has another `fingerprint`.
    """
    if checkpoint is not None and (Path(checkpoint) / "checkpoint.json").exists():
        _read(Path(checkpoint), fingerprint)  # refuse now, not when it would be overwritten
    end = len(batches) if until is None else min(until, len(batches))
    start = time.perf_counter() - state.seconds
    state.model.train()
    with bar(total=end, initial=state.step, quiet=quiet) as shown, _signals() as caught:
        while state.step < end:
            batch = send_to_device(batches[state.step], state.accelerator.device)
            lr = state.optimizer.param_groups[0]["lr"]
            state.recent.append(step(state, rows(state, batch)))
            if state.scheduler is not None:
                state.scheduler.step()
            update_ema(state)
            state.step += 1
            state.seconds = time.perf_counter() - start
            shown.update()

            if state.step % every == 0 or state.step == len(batches):
                add_to_log(state, lr, log)
                shown.set_postfix(loss=state.history[-1].get("loss"), refresh=False)
            stop = _any_process(state.accelerator, caught)
            save = state.step % checkpoint_every == 0 or state.step == end or stop
            if save and checkpoint is not None:
                save_checkpoint(checkpoint, state, fingerprint)
            if stop:
                raise KeyboardInterrupt(f"stopped by a signal after step {state.step}")
    settle(state)
    return state


def bar(*what: Any, quiet: bool | None = None, **more: Any) -> Any:
    """The bar of `tqdm`, from the sixth second on; `quiet` None shows it where it can be seen.

    That is on a terminal, and in a notebook, whose stderr is none, unless TQDM_DISABLE is set.
    """
    noted = quiet is None and "ipykernel.zmqshell" in sys.modules  # a kernel alone imports it
    return tqdm(*what, **more, delay=5, **({"mininterval": 1} if noted else {"disable": quiet}))


def rows(state: TrainState, batch: Any) -> Any:
    """This process's rows of a batch: every world-th one from its rank on.

    Anything nested of tensors. Noise or masks drawn for the whole batch with `state.generator`
    and then cut here are the same, row by row, however many processes there are.
    Raises ValueError where the rows do not divide evenly over the processes.
    """
    rank, world = state.accelerator.process_index, state.accelerator.num_processes
    if world > 1 and (size := find_batch_size(batch)) % world:
        raise ValueError(f"a batch of {size} rows does not divide over {world} processes")
    return slice_tensors(batch, slice(rank, None, world)) if world > 1 else batch


def ema_decay_at(decay: float, n: int) -> float:
    """Decay of update n = 0, 1, … with warm-up: min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + n) / (10 + n))


@torch.no_grad()
def update_ema(state: TrainState) -> None:
    """θ_ema ← d·θ_ema + (1 − d)·θ for parameters; buffers (running statistics) are copied."""
    if state.ema is None:
        return
    decay = ema_decay_at(state.ema_decay, state.step)
    for mean, new in zip(state.ema.parameters(), state.net.parameters(), strict=True):
        mean.mul_(decay).add_(new, alpha=1 - decay)
    for kept, buffer in zip(state.ema.buffers(), state.net.buffers(), strict=True):
        kept.copy_(buffer)


def settle(state: TrainState) -> None:
    """Turn the recent metrics into floats, averaged over the processes, and check them.

    Done once a log line, so that a GPU need not wait for the CPU at each step.
    Raises FloatingPointError, naming step and value, for one that is not finite.
    """
    for i, metrics in enumerate(state.recent, state.step - len(state.recent) + 1):
        values = torch.tensor([float(v) for v in metrics.values()], dtype=torch.float64)
        if state.accelerator.num_processes > 1:
            values = state.accelerator.reduce(values.to(state.accelerator.device), "mean")
        for name, value in zip(metrics, values.tolist(), strict=True):
            metrics[name] = value
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {i}, which is not saved")


def add_to_log(state: TrainState, lr: float, path: str | Path | None) -> None:
    """Move the recent metrics to the history, as their mean, and write it: one JSON line each.

    The file is the history, no more and no less, so that a resumed run repeats no line.
    """
    settle(state)
    line = {"step": state.step, "seconds": round(state.seconds, 3), "lr": lr}
    for name in dict.fromkeys(name for metrics in state.recent for name in metrics):
        line[name] = float(np.mean([m[name] for m in state.recent if name in m]))
    state.recent.clear()
    state.history.append(line)
    if path is not None and state.accelerator.is_main_process:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("".join(json.dumps(line) + "\n" for line in state.history))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that the step under way is finished; the second one raises."""
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _any_process(accelerator: Accelerator, caught: list[int]) -> bool:
    """Whether any process caught a signal: all must stop after the same step."""
    if caught:
        accelerator.set_trigger()
    return accelerator.check_trigger() if accelerator.num_processes > 1 else bool(caught)


# ---- checkpoints: `checkpoint.json`, and the one tensor file that it names; both are hashed ----


def save_checkpoint(folder: str | Path, state: TrainState, fingerprint: str = "") -> None:
    """Write the state so that training can go on from it, to the bit on a CPU.

    The new tensor file, then the new `checkpoint.json` are complete on the disk before they take
    their names, and the old pair goes last: a kill or a full disk leaves the old one readable.
    Raises OSError if the disk does not take it, FloatingPointError if a metric is not finite.
    """
    settle(state)
    if not state.accelerator.is_main_process:
        return
    tensors: dict[str, Tensor] = {}

    def plain(x: Any) -> Any:
        """JSON for a tensor, by its number in the other file, or for a NumPy array."""
        if not isinstance(x, Tensor):
            return x.tolist()
        tensors[name := str(len(tensors))] = x.detach().cpu().clone().contiguous()
        return {"$tensor": name}

    tree: dict[str, Any] = {name: getattr(state, name) for name in FIELDS}
    tree["parts"] = {name: get() for name, (get, _) in _parts(state).items()}
    tree["fingerprint"] = fingerprint
    content = json.loads(json.dumps(tree, default=plain))
    data, folder = safetensors.torch.save(tensors), Path(folder)
    content["tensors"] = f"step-{state.step:08d}-{sha256(data)}.safetensors"
    content["sha256"] = sha256(json.dumps(content).encode())
    write_whole(folder / content["tensors"], data)
    write_whole(folder / "checkpoint.json", json.dumps(content).encode())
    old = {*folder.glob("step-*"), *folder.glob("checkpoint.json.*")}
    for file in old - {folder / content["tensors"]}:
        file.unlink()


def load_checkpoint(folder: str | Path, state: TrainState, fingerprint: str = "") -> TrainState:
    """Put a saved state into `state`, which was built the same way; nothing is unpickled.

    Raises FileNotFoundError if there is none; ValueError if it is of another experiment, cut or
    altered, and `state` is as it was; what torch raises where it does not fit the net.
    """
    tree, parts = _read(Path(folder), fingerprint), _parts(state)
    saved = tree["parts"]
    if odd := (saved.keys() ^ parts.keys()) - {"cuda"}:
        raise ValueError(f"checkpoint {folder} does not fit: only one of the two has {odd}")
    # JSON keys are text
    saved["optimizer"]["state"] = {int(k): v for k, v in saved["optimizer"]["state"].items()}
    for name in sorted(saved.keys() & parts.keys()):
        parts[name][1](saved[name])
    vars(state).update({name: tree[name] for name in FIELDS})
    return state


def _parts(state: TrainState) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """What else a run consists of: how to read it, and how to put it back."""
    owners: dict[str, Any] = {"model": state.net, "ema": state.ema, "optimizer": state.optimizer}
    owners |= {"scheduler": state.scheduler, "scaler": state.accelerator.scaler}
    parts = {k: (v.state_dict, v.load_state_dict) for k, v in owners.items() if v is not None}
    parts["generator"] = (state.generator.get_state, state.generator.set_state)
    parts["torch"] = (torch.get_rng_state, torch.set_rng_state)
    parts["numpy"] = (lambda: np.random.get_state(legacy=False), np.random.set_state)
    parts["python"] = (random.getstate, lambda s: random.setstate((s[0], tuple(s[1]), s[2])))
    if torch.cuda.is_available():
        parts["cuda"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    return parts


def _read(folder: Path, fingerprint: str) -> dict[str, Any]:
    """What `save_checkpoint` wrote, known to be whole and of this experiment."""
    text = (folder / "checkpoint.json").read_bytes()
    try:
        content = json.loads(text)
        data = (folder / content["tensors"]).read_bytes()
        told, name = content.pop("sha256"), content["tensors"]
        if told != sha256(json.dumps(content).encode()) or sha256(data) not in name:
            raise ValueError("its hash is another one")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {folder} is damaged, cut or altered: {error!r}") from error
    if (found := content["fingerprint"]) != fingerprint:
        raise ValueError(f"{folder} is of another experiment: {found!r}, not {fingerprint!r}")
    tensors = safetensors.torch.load(data)
    return json.loads(text, object_hook=lambda d: tensors[d["$tensor"]] if "$tensor" in d else d)
