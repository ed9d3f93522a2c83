"""Draw the picture of the README: similarity of layers before and after training, one seed."""

from pathlib import Path

from mini_resdecay import figures, reuse
from mini_resdecay.toy import seeded_nets, spiral, train_together

PICTURE = Path(__file__).resolve().parents[1] / "images" / "readme.png"
ALT = (
    "Two heat maps of linear CKA between layers 0 to 32 of a net trained on a spiral, at"
    " initialisation and after training, on one colour scale from 0 to 1."
)


def main() -> None:
    """Train configuration A (seed 0) and write the picture."""
    x, y = spiral()
    nets = seeded_nets([0], 32, 32)
    before = reuse.similarity_map(reuse.layer_features(nets[0], x))
    train_together(nets, x, y)
    after = reuse.similarity_map(reuse.layer_features(nets[0], x))
    PICTURE.parent.mkdir(exist_ok=True)
    with figures.frames() as shots:
        figures.heatmaps(
            {"at initialisation": before, "after training": after},
            alt=ALT, label="linear CKA", null=reuse.cka_null(400, 32, 32),
        )  # fmt: skip
    PICTURE.write_bytes(shots[0][0])


if __name__ == "__main__":
    main()
