"""Milliseconds from a moved slider to the new picture, against drawing the whole figure again.

python benchmarks/panel_redraw.py
"""

import io
import statistics
import time

import numpy as np

from fcse import analysis
from fcse.data import load_corpus
from fcse.encoder import SentenceEncoder
from fcse.widgets import AblationPanel

ROUNDS = 20


def main() -> None:
    sentences = load_corpus("wiki-mini")
    batch = sentences[:: len(sentences) // 64][:64]
    encoder = SentenceEncoder.from_pretrained("minilm")
    panel = AblationPanel(analysis.batch_similarities(encoder, batch))
    figure = panel._canvas.figure
    redraw, whole = [], []
    for m in np.linspace(-0.4, 0.9, ROUNDS):
        panel.m.value = m
        redraw.append(panel.seconds)
        started = time.perf_counter()
        figure.savefig(io.BytesIO(), format="png")
        whole.append(time.perf_counter() - started)
    ratios = [w / r for w, r in zip(whole, redraw, strict=True)]
    print(
        f"redraw       {1000 * statistics.median(redraw):6.1f} ms (worst {1000 * max(redraw):.1f})"
    )
    print(f"whole figure {1000 * statistics.median(whole):6.1f} ms")
    print(
        f"ratio        {statistics.median(ratios):6.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
    )


if __name__ == "__main__":
    main()
