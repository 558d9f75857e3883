"""Maps of the same sentences side by side: what is selected in one is selected in all."""

import html
from collections.abc import Mapping, Sequence

import ipywidgets as widgets
import jscatter
import numpy as np
import pandas as pd

from fcse import plots
from fcse.widgets.pictures import beside, labelled

ROWS = 25
"""Selected sentences that are listed."""


class MapExplorer:
    """Scatter plots with a sentence on hover, linked by selection, and a list of what is selected.

    A lasso (the toolbar's second button, or a long press) selects points; so do the two controls
    above the maps, which a keyboard reaches: a group, or a word that the sentence holds. Below the
    maps stands in words what they show.

    group, word: the controls. scatters: name of a map -> its `jscatter.Scatter`."""

    def __init__(
        self,
        maps: Mapping[str, np.ndarray],
        sentences: Sequence[str],
        labels: Sequence[str],
        groups: Sequence[str],
    ) -> None:
        """Build the explorer of maps by their titles, as of `analysis.aligned_maps`.

        labels: what each sentence belongs to, such as its article. groups: at most eight labels
        that get a colour; all others are grey."""
        self._table = pd.DataFrame({"sentence": sentences, "article": labels})
        group = self._table["article"].where(self._table["article"].isin(groups), plots.OTHERS)
        colours = plots.group_colours(groups)
        self._table["group"] = pd.Categorical(group, [*colours])
        # Grey points lie beneath, wherever they come in the corpus.
        order = np.argsort(self._table["group"] != plots.OTHERS, kind="stable")
        placed = {t: self._table.assign(x=xy[:, 0], y=xy[:, 1]) for t, xy in maps.items()}
        points = {"size": 4, "opacity": 0.7, "opacity_by": None, "opacity_unselected": 0.15}
        self.scatters = {t: jscatter.Scatter("x", "y", data=x, **points) for t, x in placed.items()}
        hover = {"properties": ["article"], "preview": "sentence", "preview_text_lines": 8}
        for scatter in self.scatters.values():
            scatter.color(by="group", map=colours, selected="black").order(by=order).axes(False)
            scatter.tooltip(True, histograms=False, size="medium", **hover)
        self._first = next(iter(self.scatters.values())).widget
        self.group = widgets.Dropdown(options=["", *colours], **labelled("select a group", "9em"))
        look = labelled("select by word", "9em")
        self.word = widgets.Text(placeholder="and press Enter", continuous_update=False, **look)
        self._list = widgets.HTML()
        self.group.observe(self._select_group, names="value")
        self.word.observe(self._select_word, names="value")
        titled = [(scatter, title) for title, scatter in self.scatters.items()]
        sync = {"sync_view": True, "sync_selection": True, "sync_hover": True}
        plane = jscatter.compose(titled, row_height=420, **sync)
        self._first.observe(lambda _: self._show(), names="selection")
        self._show()
        marks = [
            f"<span style='color:{colour}; font-size:150%'>●</span> {html.escape(name)}"
            for name, colour in colours.items()
        ]
        legend = widgets.HTML(" &nbsp; ".join(marks))
        shown = pd.concat(table.assign(encoder=title) for title, table in placed.items())
        said = widgets.HTML(html.escape(plots.describe_maps(shown, groups)))
        self.widget = widgets.VBox([beside(self.group, self.word), legend, plane, said, self._list])

    @property
    def selection(self) -> np.ndarray:
        """Rows of the selected sentences, ascending: (k,) int."""
        chosen = self._first.selection
        return np.sort(np.asarray([] if chosen is None else chosen, dtype=int))

    def select(self, rows: Sequence[int] | np.ndarray) -> None:
        """Select sentences by their rows, in every map."""
        self._first.selection = np.asarray(rows, dtype=np.uint32)

    @property
    def selected(self) -> pd.DataFrame:
        """The selected sentences: columns "article", "sentence"."""
        return self._table.loc[self.selection, ["article", "sentence"]]

    def _select_group(self, change: dict) -> None:
        self.select(np.flatnonzero(self._table["group"] == change["new"]))

    def _select_word(self, change: dict) -> None:
        found = self._table["sentence"].str.contains(change["new"], case=False, regex=False)
        self.select(np.flatnonzero(found) if change["new"] else [])

    def _show(self) -> None:
        selected = self.selected
        rows = "".join(
            f"<tr><td style='vertical-align:top; white-space:nowrap; padding-right:1em'>"
            f"{html.escape(row.article)}</td><td>{html.escape(row.sentence)}</td></tr>"
            for row in selected.head(ROWS).itertuples()
        )
        shown = f", the first {ROWS}" if len(selected) > ROWS else ""
        count = f"{len(selected)} of {len(self._table)} sentences selected"
        self._list.value = (
            "<div style='max-height:22em; overflow:auto; line-height:1.4' tabindex='0'>"
            f"<table><caption style='text-align:left'><b role='status'>{count}</b>{shown}</caption>"
            f"<tbody>{rows}</tbody></table></div>"
        )
