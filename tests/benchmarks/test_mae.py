"""One training step of the MAE against that of Hugging Face, forward to AdamW.

64 x 64 images, patch 8, encoder 192 x 12, decoder 128 x 4, batch 64. Targets: 2.0 times as fast as
Hugging Face in its defaults (float32), 2.5 times compiled; compiled, 1.05 times as fast as Hugging
Face compiled with our settings (bfloat16 autocast, attention by hand, fused AdamW); no more memory.
Each round takes one step of every net, and the median of the rounds' ratios is judged, with room
for a busy machine. Two threads on a quiet machine; on a busy one they would mostly wait for each
other, so there it is the processor time of one.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from turns import ratio, seconds

from mini_resdecay.mae import MAE
from mini_resdecay.vit import ViT

BATCH, ROUNDS, WARM_UP = 64, 7, 3  # three to warm up and compile
Step = Callable[[], None]


def hugging_face(attention: str | None = None) -> torch.nn.Module:
    shape = ViTMAEConfig(
        image_size=64, patch_size=8, hidden_size=192, num_hidden_layers=12, num_attention_heads=4,
        intermediate_size=768, decoder_hidden_size=128, decoder_num_hidden_layers=4,
        decoder_num_attention_heads=4, decoder_intermediate_size=512, norm_pix_loss=True,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    if attention:
        shape._attn_implementation = attention
    torch.manual_seed(0)
    return ViTMAEForPreTraining(shape)


def ours(arch: str = "standard") -> torch.nn.Module:
    torch.manual_seed(0)
    return MAE(ViT(64, 8, 192, 12, 4, final_norm=arch != "paper"), 128, 4, 4, arch=arch)


def training(net: torch.nn.Module, tuned: bool = True, compiled: bool = False) -> Step:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=tuned)
    images = torch.randn(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    run = torch.compile(net) if compiled else net

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=tuned):
            loss = run(images).loss
        loss.backward()
        optimizer.step()

    return step


NETS: dict[str, Callable[[], Step]] = {
    "Hugging Face": lambda: training(hugging_face(), tuned=False),
    "Hugging Face tuned": lambda: training(hugging_face("eager")),
    "Hugging Face tuned, compiled": lambda: training(hugging_face("eager"), compiled=True),
    "ours": lambda: training(ours()),
    "ours, compiled": lambda: training(ours(), compiled=True),
    "ours, paper": lambda: training(ours("paper")),
}


def steps(*names: str) -> dict[str, Step]:
    return {name: NETS[name]() for name in names}


@pytest.mark.benchmark
def test_a_step_takes_half_the_time_of_hugging_face(few_threads, capsys, at_least):
    works = steps("Hugging Face", "Hugging Face tuned", "ours", "ours, paper")
    with capsys.disabled():
        times = seconds(works, ROUNDS, WARM_UP)
        faster = ratio(times["Hugging Face"], times["ours"])
        paper = ratio(times["Hugging Face"], times["ours, paper"])
        print(f"  {faster:.2f} times as fast (target 2.0); with long skips {paper:.2f}")
    at_least(faster, 1.7)


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_is_faster_still(few_threads, capsys, at_least, tool_missing):
    if not (shutil.which("g++") or shutil.which("clang++")):
        tool_missing("torch.compile needs a C++ compiler")
    works = steps("Hugging Face", "Hugging Face tuned, compiled", "ours, compiled")
    with capsys.disabled():
        times = seconds(works, ROUNDS, WARM_UP)
        faster = ratio(times["Hugging Face"], times["ours, compiled"])
        tuned = ratio(times["Hugging Face tuned, compiled"], times["ours, compiled"])
        print(f"  {faster:.2f} times as fast (target 2.5), {tuned:.2f} as tuned (target 1.05)")
    at_least(faster, 2.1)
    at_least(tuned, 0.97)


def peak_mb(name: str) -> float:
    """The most memory that three steps need, beyond what the imports took, in a process alone."""
    return float(
        subprocess.run(
            [sys.executable, __file__, name], capture_output=True, text=True, check=True
        ).stdout.split()[-1]
    )


@pytest.mark.benchmark
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read on Linux")
def test_a_step_needs_no_more_memory(capsys):
    peaks = {name: peak_mb(name) for name in ("Hugging Face", "Hugging Face tuned", "ours")}
    with capsys.disabled():
        print(f"\npeak memory of three steps, MB: {peaks}")
    assert peaks["ours"] <= 1.02 * min(peaks.values())


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    before = resident("VmRSS:")
    chosen = NETS[sys.argv[1]]()
    for _ in range(3):
        chosen()
    print(round(resident("VmHWM:") - before))
