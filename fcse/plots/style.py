"""What all figures share: a loss has the same colour, marker and dash everywhere."""

import base64
import html
import io
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fcse.errors import writing

Dash = str | tuple[int, tuple[int, ...]]


class Style(NamedTuple):
    """How a loss or an encoder is drawn; marker and dash repeat the colour, for print in grey."""

    colour: str
    marker: str
    dash: Dash = "-"


# Okabe & Ito's palette, and Tol's muted one for methods: distinct for the colour blind.
STYLES: dict[str, Style] = {
    "untrained": Style("#7F7F7F", "s", ":"),
    "chosen encoder": Style("#000000", "*", ":"),
    "InfoNCE": Style("#0072B2", "o", "--"),
    "Focal-InfoNCE": Style("#D55E00", "D"),
    "Focal-InfoNCE (modulate=positive)": Style("#009E73", "^", "-."),
    "Focal-InfoNCE (modulate=negative)": Style("#CC79A7", "v", "-."),
    "Focal-InfoNCE (stop_gradient=True)": Style("#56B4E9", "P", (0, (5, 1, 1, 1, 1, 1))),
    "Hardness-InfoNCE": Style("#E69F00", "X", (0, (1, 1))),
}
"""Name of a loss -> its style."""

METHODS: dict[str, Style] = {
    "SSCL": Style("#332288", "<", (0, (6, 2))),
    "CARDS": Style("#117733", ">", (0, (6, 2))),
    "DiffCSE": Style("#882255", "p", (0, (6, 2))),
    "AdapACSE": Style("#999933", "d", (0, (6, 2))),
    "IFND": Style("#AA4499", "h", (0, (6, 2))),
    "Core-tuning": Style("#661100", "8", (0, (6, 2))),
    "PNR": Style("#DDCC77", "$P$", (0, (6, 2))),
    "SparseCSE after StarK's scoring": Style("#44AA99", "$S$", (0, (6, 2))),
    "IFTCL after the abstract": Style("#225555", "$\\delta$", (0, (6, 2))),
    "DebCSE after the abstract": Style("#666633", "$e$", (0, (6, 2))),
    "FedRCL": Style("#CC6677", "$F$", (0, (6, 2))),
    "temperature schedule": Style("#88CCEE", "$\\tau$", (0, (6, 2))),
}
"""Method that is added to an objective -> its style."""

_SEVERAL = Style("#000000", "H", (0, (6, 2)))
_OTHERS = ("#44AA99", "#DDCC77", "#BBCC33", "#CC6677", "#6699CC", "#994455", "#997700", "#004488")


def style(name: str) -> Style:
    """The style of a loss by its name.

    One with a method has the method's, several methods are black, a known objective with other
    parameters keeps its colour; any other loss has one of eight colours, by its name."""
    if name in STYLES:
        return STYLES[name]
    *before, last = name.split(" + ")
    if len(before) > 1:
        return _SEVERAL
    label = last.partition(" (")[0]
    number = zlib.crc32(label.encode())
    other = Style(_OTHERS[number % len(_OTHERS)], "sv^<>"[number % 5], (0, (3, 1)))
    return (METHODS if before else STYLES).get(label, other)


def line(name: str) -> dict[str, Any]:
    """The arguments of a line that stands for a loss."""
    return {"color": style(name).colour, "label": name, "linestyle": style(name).dash}


def point(name: str) -> dict[str, Any]:
    """The arguments of a marker that stands for a loss."""
    return {"color": style(name).colour, "marker": style(name).marker}


STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "fcse",
}


class Picture(Figure):
    """A figure that says in words what it shows, in a notebook too."""

    alt = ""
    """The text alternative."""

    @plt.rc_context(STYLE)
    def _ipython_display_(self) -> None:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi="figure")
        show(buffer.getvalue(), self.alt)


def show(png: bytes, alt: str) -> None:
    """Display a PNG with its text alternative in a notebook.

    JupyterLab's own element for a PNG takes no text alternative, so HTML goes with it; the PNG as
    such is for converters to print."""
    from IPython.display import display

    data = {"text/plain": "<Picture>", "text/html": image(png, alt)}
    data["image/png"] = base64.b64encode(png).decode()
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)


def image(png: bytes, alt: str) -> str:
    """An HTML image that holds its own bytes and says in words what it shows."""
    data = base64.b64encode(png).decode()
    return (
        f'<img style="max-width: 100%; height: auto" alt="{html.escape(alt)}" '
        f'src="data:image/png;base64,{data}">'
    )


def by(table: pd.DataFrame, column: str) -> list[tuple[Any, pd.DataFrame]]:
    """Each value of a column with its rows, in the order of the table."""
    return list(table.groupby(column, sort=False))


def ends(values: pd.Series, form: str) -> str:
    """The first and the last of some values, as text."""
    return f"{values.iloc[0]:{form}} to {values.iloc[-1]:{form}}"


def new_axes(
    columns: int = 1, width: float = 5.0, height: float = 3.6
) -> tuple[Picture, list[Axes]]:
    """A picture with plots side by side, each so many inches wide and high."""
    how = {"figsize": (width * columns, height), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(1, columns, FigureClass=Picture, **how)
    plt.close(figure)  # shown once, where it is returned, not a second time by the notebook
    return figure, list(axes[0])


def make_folder(folder: Path) -> None:
    """Make the folder that figures go to, or raise an `InputError`."""
    with writing(f"figures folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)


@plt.rc_context(STYLE)
def save(figure: Picture, table: pd.DataFrame, path: Path) -> None:
    """Write a figure as PNG and SVG, and the numbers behind it as CSV with six significant digits.

    Both pictures carry the text alternative: PNG as its description, SVG as its title, which a
    browser reads out. path: folder and name without suffix. InputError: they cannot be written."""
    make_folder(path.parent)
    with writing(f"figure {path}"):
        figure.savefig(path.with_suffix(".png"), metadata={"Description": figure.alt})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Title": figure.alt})
        table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
