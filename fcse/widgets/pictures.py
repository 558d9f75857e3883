"""What panels share: a size read from afar, and pictures with a text alternative."""

import base64
import html
import io
from collections.abc import Sequence

import ipywidgets as widgets
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

_STYLE = """<style>
.fcse-panel {--jp-widgets-font-size: 16px; --jp-widgets-inline-height: 34px; font-size: 16px}
.fcse-panel .widget-html-content {font-size: 16px; line-height: 1.45}
.fcse-panel table {border-collapse: collapse; margin: 0.5em 0}
.fcse-panel caption {text-align: left}
.fcse-panel th, .fcse-panel td {text-align: left; padding: 0.1em 1.2em 0.1em 0}
.fcse-panel .number {text-align: right}
</style>"""


def panel(rows: Sequence[widgets.Widget | Sequence[widgets.Widget]]) -> widgets.VBox:
    """Widgets one below the other, a sequence of them side by side; large enough to project."""
    boxes = [
        row
        if isinstance(row, widgets.Widget)
        else widgets.HBox(list(row), layout={"flex_flow": "row wrap"})
        for row in rows
    ]
    box = widgets.VBox([widgets.HTML(_STYLE, layout={"display": "none"}), *boxes])
    box.add_class("fcse-panel")
    return box


def encode(canvas: FigureCanvasAgg) -> bytes:
    """What is drawn on a canvas, as PNG."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # A palette of 256 colours is enough for curves, smaller, and faster to write.
    picture = picture.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def image(png: bytes, alt: str) -> str:
    """An HTML image that holds its own bytes and says in words what it shows.

    The Image of ipywidgets takes no text alternative.
    """
    data = base64.b64encode(png).decode()
    return (
        f'<img style="max-width: 100%; height: auto" alt="{html.escape(alt)}" '
        f'src="data:image/png;base64,{data}">'
    )
