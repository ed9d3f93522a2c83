"""One training loop for every net of the book, on `accelerate`; the step is passed in.

    state = make_state(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    step = loss_step(lambda state, batch: cross_entropy(state.model(batch[0]), batch[1]))
    fit(state, batches, step, log="run/log.jsonl", checkpoint="run")

The loop knows no model and no experiment. What a resumed run needs is in `TrainState`, and all
of it is stored: tensors as safetensors, everything else as JSON. Nothing is ever unpickled.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import recursively_apply, send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

from mini_resdecay import __version__

PRECISIONS = ("no", "fp16", "bf16")


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
    scheduler: LRScheduler | None = None
    ema: nn.Module | None = None
    ema_decay: float = 0.0
    ema_warmup: bool = True
    seed: int = 0
    step: int = 0
    seconds: float = 0.0
    recent: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Scales the loss in fp16; None in other precisions."""
        return self.accelerator.scaler


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_state(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    scheduler: LRScheduler | None = None,
    ema_decay: float | None = None,
    ema_warmup: bool = True,
    seed: int = 0,
    precision: str = "no",
    cpu: bool = False,
) -> TrainState:
    """Place a net and its optimiser on the device and gather what its training needs.

    `precision` is "no" (float32), "fp16" (with a gradient scaler) or "bf16"; `cpu` keeps off
    the GPU. A state made earlier with another precision or device cannot go on after this.
    `seed` is for the state's generator alone; see `seed_everything` for the rest.
    Raises ValueError for a precision that the device lacks or an EMA decay outside [0, 1).
    """
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
    check_precision(precision, cpu)
    ema = None if ema_decay is None else copy.deepcopy(model).eval().requires_grad_(False)
    # accelerate keeps one configuration a process; a notebook may want a second one.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # Said outright: without it, processes on a machine with no GPU would each train alone.
    cpu = cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    return TrainState(
        model,
        accelerator.prepare(model),
        optimizer,
        accelerator,
        torch.Generator().manual_seed(seed),
        scheduler=scheduler,
        ema=None if ema is None else ema.to(accelerator.device),
        ema_decay=ema_decay or 0.0,
        ema_warmup=ema_warmup,
        seed=seed,
    )


def check_precision(precision: str, cpu: bool = False) -> None:
    """Raise ValueError where this machine cannot train in `precision`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "no":
        return
    if cpu or not torch.cuda.is_available():
        raise ValueError(f"precision must be 'no' without a GPU, got {precision!r}")
    capability = torch.cuda.get_device_capability()
    if precision == "bf16" and capability < (8, 0):
        have = ".".join(map(str, capability))
        raise ValueError(
            f"precision 'bf16' needs compute capability 8.0, this GPU has {have}: use 'fp16'"
        )


def cosine_schedule(optimizer: Optimizer, steps: int, warmup: int = 0) -> LambdaLR:
    """Learning rate: a straight rise over `warmup` steps, then half a cosine down to 0.

    Raises ValueError unless 0 <= warmup < steps.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be in [0, steps = {steps}), got {warmup}")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup)))

    return LambdaLR(optimizer, factor)


def loss_step(
    loss_fn: Callable[[TrainState, Any], Any], clip: float | None = None
) -> Callable[[TrainState, Any], dict[str, Tensor]]:
    """Make the ordinary step: forward, backward, clip the gradient norm, update.

    `loss_fn(state, batch)` gives the loss, or a dict of scalars that holds "loss".
    """

    def step(state: TrainState, batch: Any) -> dict[str, Tensor]:
        state.optimizer.zero_grad(set_to_none=True)
        with state.accelerator.autocast():
            out = loss_fn(state, batch)
        metrics = out if isinstance(out, dict) else {"loss": out}
        state.accelerator.backward(metrics["loss"])
        update(state, clip)
        return {k: v.detach() if isinstance(v, Tensor) else v for k, v in metrics.items()}

    return step


def update(state: TrainState, clip: float | None = None) -> None:
    """Clip the norm of the gradients that are there, then take the optimiser's step."""
    if state.scaler is None:
        if clip is not None:
            nn.utils.clip_grad_norm_(state.net.parameters(), clip)
        state.optimizer.step()
        return
    state.scaler.unscale_(state.optimizer)  # clip the true gradients, not the scaled ones
    if clip is not None:
        nn.utils.clip_grad_norm_(state.net.parameters(), clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def fit(
    state: TrainState,
    batches: Sequence[Any],
    step: Callable[[TrainState, Any], dict[str, Any]],
    *,
    until: int | None = None,
    log: str | Path | None = None,
    every: int = 50,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    progress: bool | None = None,
    fingerprint: str = "",
) -> TrainState:
    """Take `step(state, batches[i])` for each i from `state.step` on; then scheduler and EMA.

    A step does forward, backward and update, and returns detached scalars. Each process takes
    its own rows of a batch (`rows`). A JSON line in `log` holds the mean over the last `every`
    steps; those lines are in `state.history` too. `checkpoint` is a folder: written each
    `checkpoint_every` steps, at the end, and on Ctrl-C or SIGTERM, which end the run after the
    step under way. `until` stops early; `progress` None shows a bar on a terminal only.
    Raises FloatingPointError, naming the step, when a metric is not finite.
    """
    end = len(batches) if until is None else min(until, len(batches))
    _check_start(state, end, every, checkpoint, checkpoint_every, fingerprint)
    start, device = time.perf_counter() - state.seconds, state.accelerator.device
    state.model.train()
    with ExitStack() as stack:
        lines = stack.enter_context(_open_log(state, log))
        stopped = stack.enter_context(_signals())
        hide = None if progress is None else not progress
        bar = stack.enter_context(tqdm(total=end, initial=state.step, disable=hide, delay=5))
        while state.step < end:
            batch = rows(state, send_to_device(batches[state.step], device))
            lr = state.optimizer.param_groups[0]["lr"]
            state.recent.append(step(state, batch))
            if state.scheduler is not None:
                state.scheduler.step()
            update_ema(state)
            state.step += 1
            state.seconds = time.perf_counter() - start
            bar.update()

            if state.step % every == 0 or state.step == len(batches):
                line = _log_line(state, lr, checkpoint)
                print(json.dumps(line), file=lines, flush=True)
                bar.set_postfix(loss=line.get("loss"))
            stop = _any_process(state, stopped)
            if checkpoint is not None and (
                state.step % checkpoint_every == 0 or state.step == end or stop
            ):
                settle(state, checkpoint)
                save_checkpoint(checkpoint, state, fingerprint)
            if stop:
                raise KeyboardInterrupt(f"stopped by signal {stop} after step {state.step}")
    settle(state, checkpoint)
    return state


def _check_start(
    state: TrainState, end: int, every: int, folder: Any, checkpoint_every: int, fingerprint: str
) -> None:
    """Refuse what would fail, or overwrite another experiment, only after hours."""
    for name, value in (("every", every), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if state.step > end:
        raise ValueError(f"state.step is {state.step}, but there are only {end} steps to take")
    here = next(state.net.parameters()).device.type
    if here != state.accelerator.device.type:
        raise ValueError(f"state is on {here}, but a later make_state asked for another device")
    if folder is not None and (Path(folder) / "checkpoint.json").exists():
        _check_fingerprint(_read_json(Path(folder)), fingerprint, Path(folder))


def rows(state: TrainState, batch: Any) -> Any:
    """This process's rows of a batch: every world-th one from its rank on.

    Anything nested of tensors. Noise or masks drawn for the whole batch with `state.generator`
    and then cut here are the same, row by row, however many processes there are.
    Raises ValueError where the rows do not divide evenly over the processes.
    """
    rank, world = state.accelerator.process_index, state.accelerator.num_processes

    def cut(x: Tensor) -> Tensor:
        if len(x) % world:
            raise ValueError(f"a batch of {len(x)} rows does not divide over {world} processes")
        return x[rank::world]

    return batch if world == 1 else recursively_apply(cut, batch)


def ema_decay_at(decay: float, n: int, warmup: bool = True) -> float:
    """Decay of update n = 0, 1, …: with warm-up min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + n) / (10 + n)) if warmup else decay


@torch.no_grad()
def update_ema(state: TrainState) -> None:
    """θ_ema ← d·θ_ema + (1 − d)·θ for parameters; buffers (running statistics) are copied."""
    if state.ema is None:
        return
    decay = ema_decay_at(state.ema_decay, state.step, state.ema_warmup)
    for mean, new in zip(state.ema.parameters(), state.net.parameters(), strict=True):
        mean.mul_(decay).add_(new, alpha=1 - decay)
    for kept, buffer in zip(state.ema.buffers(), state.net.buffers(), strict=True):
        kept.copy_(buffer)


def settle(state: TrainState, checkpoint: str | Path | None = None) -> None:
    """Turn the recent metrics into floats, averaged over the processes, and check them.

    Done once a log line, so that a GPU need not wait for the CPU at each step.
    Raises FloatingPointError, naming step and value, for one that is not finite.
    """
    first = state.step - len(state.recent) + 1
    for i, metrics in enumerate(state.recent):
        values = torch.tensor([float(v) for v in metrics.values()], dtype=torch.float64)
        if state.accelerator.num_processes > 1:
            values = state.accelerator.reduce(values.to(state.accelerator.device), "mean")
        state.recent[i] = dict(zip(metrics, values.tolist(), strict=True))
        for name, value in state.recent[i].items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {first + i}; it must be finite. Try a lower "
                    f"learning rate, clipping, or a warm-up. {_kept(checkpoint)}"
                )


def _log_line(state: TrainState, lr: float, checkpoint: Any) -> dict[str, float]:
    """Add to the history the mean of each metric over the steps since the last line."""
    settle(state, checkpoint)
    names = dict.fromkeys(name for metrics in state.recent for name in metrics)
    line: dict[str, float] = {
        "step": state.step,
        "seconds": round(state.seconds, 3),
        "seed": state.seed,
        "lr": float(lr),
    }
    for name in names:
        values = [metrics[name] for metrics in state.recent if name in metrics]
        line[name] = math.fsum(values) / len(values)
    state.recent.clear()
    state.history.append(line)
    return line


@contextmanager
def _open_log(state: TrainState, path: str | Path | None) -> Iterator[TextIO]:
    """Open the log with the lines up to `state.step` in it: no more after a resume, no fewer."""
    path = Path(os.devnull if path is None or not state.accelerator.is_main_process else path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(line) + "\n" for line in state.history)
        yield lines


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that the step under way is finished; the second one raises.

    Python lets only the main thread do this; elsewhere the list stays empty.
    """
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _any_process(state: TrainState, caught: list[int]) -> int:
    """The signal that any process caught, else 0: all must stop after the same step."""
    number = caught[0] if caught else 0
    if state.accelerator.num_processes == 1:
        return number
    mine = torch.tensor(float(number), device=state.accelerator.device)
    return int(state.accelerator.reduce(mine, "sum"))


# ---- checkpoints: `checkpoint.json` names the one tensor file that belongs to it ----


def save_checkpoint(folder: str | Path, state: TrainState, fingerprint: str = "") -> None:
    """Write the state so that training can go on from it, to the bit on a CPU.

    The new tensor file and the new `checkpoint.json` are complete on the disk before they take
    their names, and the old pair goes last: a kill or a full disk leaves the old one readable.
    Raises OSError, saying what was kept, if the disk does not take it.
    """
    if not state.accelerator.is_main_process:
        return
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    content = {
        "fingerprint": fingerprint,
        "step": state.step,
        "versions": {"mini_resdecay": __version__, "torch": str(torch.__version__)},
        "state": _pack(_tree(state), "", tensors),
    }
    temporary = folder / f"new-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)
        _sync(temporary)
        content["sha256"] = _file_hash(temporary)
        content["tensors"] = f"step-{state.step:08d}-{content['sha256'][:8]}.safetensors"
        os.replace(temporary, folder / content["tensors"])
        content["sha256_json"] = _json_hash(content)
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, folder / "checkpoint.json")
        _sync(folder)
    except Exception as error:  # safetensors reports a full disk with an error of its own
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(
            f"could not write the checkpoint of step {state.step}: {error}. {_kept(folder)}"
        ) from error
    for old in [*folder.glob("step-*.safetensors"), *folder.glob("new-*.tmp")]:
        if old.name != content["tensors"]:
            old.unlink(missing_ok=True)


def load_checkpoint(folder: str | Path, state: TrainState, fingerprint: str = "") -> TrainState:
    """Put a saved state into `state`, which was built the same way; nothing is unpickled.

    Raises FileNotFoundError if there is none, ValueError if it is of another experiment, cut or
    altered, or does not fit the model: then `state` is as it was.
    """
    folder = Path(folder)
    content = _read_json(folder)
    _check_fingerprint(content, fingerprint, folder)
    path = folder / content["tensors"]
    if not path.exists() or _file_hash(path) != content["sha256"]:
        raise ValueError(f"checkpoint {folder} is damaged: {path.name} is cut, altered or missing")
    tree = _unpack(content["state"], load_file(path))
    _check_fit(tree, _tree(state), folder)
    _restore(state, tree)
    return state


def _parts(state: TrainState) -> dict[str, Any]:
    """What has a `state_dict`, beside the optimiser; None where this run has none."""
    parts = {"model": state.net, "ema": state.ema, "scheduler": state.scheduler}
    return {**parts, "scaler": state.scaler}


def _tree(state: TrainState) -> dict[str, Any]:
    """All that a resumed run needs, as nested dicts and lists of tensors and numbers."""
    optimizer = state.optimizer.state_dict()
    optimizer["state"] = {str(k): v for k, v in optimizer["state"].items()}  # JSON keys are text
    names = ("seed", "step", "seconds", "recent", "history")
    return {
        **{k: None if v is None else dict(v.state_dict()) for k, v in _parts(state).items()},
        "optimizer": optimizer,
        "rng": _rng_state(),
        "generator": state.generator.get_state(),
        **{name: getattr(state, name) for name in names},
    }


def _restore(state: TrainState, tree: dict[str, Any]) -> None:
    """The inverse of `_tree`."""
    optimizer = dict(tree["optimizer"])
    optimizer["state"] = {int(k): v for k, v in optimizer["state"].items()}
    for new, now in zip(optimizer["param_groups"], state.optimizer.param_groups, strict=True):
        for name in new:  # JSON knows no tuples (Adam's betas)
            new[name] = tuple(new[name]) if isinstance(now.get(name), tuple) else new[name]
    state.optimizer.load_state_dict(optimizer)
    for name, part in _parts(state).items():
        if part is not None:
            part.load_state_dict(tree[name])
    _set_rng_state(tree["rng"])
    state.generator.set_state(tree["generator"])
    for name in ("seed", "step", "seconds", "recent", "history"):
        setattr(state, name, tree[name])


def _rng_state() -> dict[str, Any]:
    """Python, NumPy, torch, and the current GPU if there is one."""
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_rng_state(rng: dict[str, Any]) -> None:
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = rng["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def _pack(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested value into `tensors`; what is left is JSON."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu().clone().contiguous()  # a clone: tied weights share
        return {"$tensor": name}
    if isinstance(tree, dict):
        return {k: _pack(v, f"{name}/{k}", tensors) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_pack(v, f"{name}/{i}", tensors) for i, v in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{name} is a {type(tree).__name__}, which a checkpoint cannot hold")


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {"$tensor"}:
            return tensors[tree["$tensor"]]
        return {k: _unpack(v, tensors) for k, v in tree.items()}
    return [_unpack(v, tensors) for v in tree] if isinstance(tree, list) else tree


def _check_fit(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise ValueError, naming the tensors, where a saved state does not fit this one."""
    for part in ("model", "ema", "scheduler", "scaler"):
        if (saved[part] is None) != (now[part] is None):
            one = "this state" if saved[part] is None else "the checkpoint"
            raise ValueError(f"checkpoint {folder} does not fit: only {one} has a {part}")
    for part in ("model", "ema"):
        old, new = (_shapes(tree[part] or {}) for tree in (saved, now))
        wrong = [
            f"{name}: {old.get(name, 'missing')} in the checkpoint, {new.get(name, 'missing')} here"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        if wrong:
            raise ValueError(f"checkpoint {folder} does not fit the {part}: {'; '.join(wrong)}")
    had, has = ([len(g["params"]) for g in t["optimizer"]["param_groups"]] for t in (saved, now))
    if had != has:
        raise ValueError(
            f"checkpoint {folder} does not fit the optimizer: parameters per group are {had} in "
            f"the checkpoint, {has} here"
        )
    settings = [set(tree["optimizer"]["param_groups"][0]) for tree in (saved, now)]
    if settings[0] != settings[1]:
        odd = ", ".join(sorted(settings[0] ^ settings[1]))
        raise ValueError(f"checkpoint {folder} is of another optimizer: only one of them has {odd}")


def _shapes(weights: dict[str, Tensor]) -> dict[str, str]:
    return {name: str(list(tensor.shape)) for name, tensor in weights.items()}


def _check_fingerprint(content: dict[str, Any], fingerprint: str, folder: Path) -> None:
    if content["fingerprint"] != fingerprint:
        raise ValueError(
            f"checkpoint {folder} is of another experiment: its fingerprint is "
            f"{content['fingerprint']!r}, this one's is {fingerprint!r}; use another folder"
        )


def _read_json(folder: Path) -> dict[str, Any]:
    """`checkpoint.json`, known to be whole."""
    path = folder / "checkpoint.json"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint in {folder}: there is no checkpoint.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        whole = content.pop("sha256_json") == _json_hash(content)
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"checkpoint {folder} is damaged: checkpoint.json is cut or altered")
    return content


def _json_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until the disk has it, so that no name can point to half a file."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _kept(folder: str | Path | None) -> str:
    """What is still there, for an error message."""
    if folder is None:
        return "No checkpoint folder was given."
    try:
        return f"The checkpoint of step {_read_json(Path(folder))['step']} is kept in {folder}."
    except (OSError, ValueError):
        return f"There is no earlier checkpoint in {folder}."
