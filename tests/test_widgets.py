"""The figure that moves: everything it needs is in its saved state, described frame by frame."""

import base64
import io
import re
import sys

import ipywidgets
import pytest
from ipywidgets.embed import dependency_state
from PIL import Image

from mini_resdecay.widgets import stepper


def png(grey: int, size: tuple[int, int] = (12, 8)) -> bytes:
    data = io.BytesIO()
    Image.new("L", size, grey).save(data, "PNG")
    return data.getvalue()


PNGS = [png(grey) for grey in (0, 120, 240)]
ALTS = ['black, "before" <training>', "grey, half way & on", "white, at the end"]
LABELS = ["step 0", "step 10", "step 100"]


def state_of(box) -> dict[str, list[dict]]:
    """The saved state that the static page reads: model name -> states, references by id."""
    models: dict[str, list[dict]] = {}
    for identity, model in dependency_state([box], drop_defaults=False).items():
        models.setdefault(model["model_name"], []).append(model["state"] | {"id": identity})
    return models


def test_slider_and_stack_are_joined_in_the_browser():
    models = state_of(stepper(PNGS, ALTS, LABELS, "training step"))
    (slider,), (stack,), (link,) = (
        models[name] for name in ("SelectionSliderModel", "StackModel", "LinkModel")
    )
    assert link["source"] == [f"IPY_MODEL_{slider['id']}", "index"]
    assert link["target"] == [f"IPY_MODEL_{stack['id']}", "selected_index"]
    assert slider["index"] == stack["selected_index"] == 0
    assert list(slider["_options_labels"]) == LABELS
    assert slider["description"] == "training step"
    assert slider["readout"]


def test_every_frame_is_its_picture_with_its_alt():
    models = state_of(stepper(PNGS, ALTS, LABELS, "training step"))
    (stack,) = models["StackModel"]
    pictures = {f"IPY_MODEL_{m['id']}": m["value"] for m in models["HTMLModel"]}
    values = [pictures[child] for child in stack["children"]]
    assert len(values) == 3
    for value, data in zip(values, PNGS, strict=True):
        source = re.search(r'src="data:image/png;base64,([^"]+)"', value)
        assert base64.b64decode(source[1]) == data
        assert 'width="12" height="8"' in value
        assert "max-width:100%" in value
    assert 'alt="black, &quot;before&quot; &lt;training&gt;"' in values[0]
    assert 'alt="grey, half way &amp; on"' in values[1]


def test_the_stack_follows_the_slider_frame_by_frame():
    slider, stack = stepper(PNGS, ALTS, LABELS, "training step").children
    assert len(stack.children) == len(slider.options) == 3
    slider.index = 2
    assert slider.value == 2
    assert slider.label == "step 100"


@pytest.mark.parametrize(
    "pngs, alts, labels, message",
    [
        (PNGS, ALTS[:2], LABELS, "equally many and at least 2, got 3, 2 and 3"),
        (PNGS, ALTS, LABELS[:1], "equally many and at least 2, got 3, 3 and 1"),
        (PNGS[:1], ALTS[:1], LABELS[:1], "equally many and at least 2, got 1, 1 and 1"),
        (
            [*PNGS[:2], png(9, (5, 5))],
            ALTS,
            LABELS,
            r"one size, got \[\(5, 5\), \(12, 8\)\] pixels",
        ),
        (PNGS, [*ALTS[:2], "  "], LABELS, "alts must each describe their frame, got '  '"),
    ],
)
def test_bad_input_is_named(pngs, alts, labels, message):
    with pytest.raises(ValueError, match=message):
        stepper(pngs, alts, labels, "training step")


def test_without_ipywidgets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="pip install ipywidgets"):
        stepper(PNGS, ALTS, LABELS, "training step")


def test_with_ipywidgets_7_a_kernel_turns_the_frames(monkeypatch):
    monkeypatch.delattr(ipywidgets, "Stack")
    slider, shown = stepper(PNGS, ALTS, LABELS, "training step").children
    assert "&lt;training&gt;" in shown.value
    slider.index = 2
    assert ALTS[2] in shown.value
    assert "&lt;training&gt;" not in shown.value
