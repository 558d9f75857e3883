"""What panels share: a size read from afar, sliders with names, and pictures drawn fast."""

import io
from collections.abc import Iterable
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

_STYLE = """<style>
.fcse-panel {--jp-widgets-font-size: 16px; --jp-widgets-inline-height: 34px; font-size: 16px}
.fcse-panel .widget-html-content {font-size: 16px; line-height: 1.45}
.fcse-panel table {border-collapse: collapse; margin: 0.5em 0}
.fcse-panel th, .fcse-panel td {text-align: left; padding: 0.1em 1.2em 0.1em 0}
.fcse-panel .number {text-align: right}
</style>"""


class SliderNames(anywidget.AnyWidget):
    """Names the sliders of the page after their labels, for screen readers; shows nothing.

    ipywidgets puts the label beside a slider but ties the two together in no way."""

    _esm = """
    function nameAll() {
      for (const slider of document.querySelectorAll(".widget-slider")) {
        const name = slider.querySelector(".widget-label").textContent;
        for (const handle of slider.querySelectorAll("[role=slider]")) {
          handle.setAttribute("aria-label", name);
        }
      }
    }
    function render() {
      const observer = new MutationObserver(nameAll);
      observer.observe(document.body, { childList: true, subtree: true });
      nameAll();
      return () => observer.disconnect();
    }
    export default { render };
    """

    def __init__(self) -> None:
        super().__init__(layout={"display": "none"})


def labelled(label: str, label_width: str, width: str | None = None) -> dict[str, Any]:
    """What a control takes for a label of some width, and to be so wide with it."""
    style = {"description_width": label_width}
    return {"description": label, "style": style, "layout": {"width": width}}


def beside(*controls: widgets.Widget) -> widgets.HBox:
    """Widgets side by side, in as many lines as they need."""
    return widgets.HBox(controls, layout={"flex_flow": "row wrap"})


def panel(*rows: widgets.Widget) -> widgets.VBox:
    """Widgets one below the other, large enough to project."""
    box = widgets.VBox([widgets.HTML(_STYLE, layout={"display": "none"}), SliderNames(), *rows])
    box.add_class("fcse-panel")
    return box


def table(caption: str, heads: Iterable[str], rows: Iterable[str], look: str = "") -> str:
    """A table of HTML, its rows as they are, with attributes that say how it looks."""
    head = "".join(f"<th scope='col' style='text-align:left'>{each}</th>" for each in heads)
    return (
        f"<table {look}><caption style='text-align:left; padding:4px'>{caption}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def encode(canvas: FigureCanvasAgg) -> bytes:
    """What is drawn on a canvas, as PNG."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # A palette of 256 colours is enough for curves, smaller, and faster to write.
    picture = picture.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(buffer, "png", compress_level=1)
    return buffer.getvalue()
