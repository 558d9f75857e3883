"""The negatives of one anchor: who they are, how each loss pulls on them, and as training goes."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import pandas as pd
from torch import Tensor

from fcse import analysis, plots
from fcse.objectives import FocalInfoNCE, HardnessInfoNCE, InfoNCE
from fcse.objectives import name as name_of
from fcse.training import TrainResult
from fcse.widgets.pictures import SliderNames

ROWS = 12
"""Negatives, and pairs, that a table shows."""


class NegativeExplorer:
    """Choose an anchor, move through training: its negatives are ranked and weighed anew.

    A weight is the pull dL_i/ds_ij of the anchor's own loss on one negative; the share beside it
    says how much of the pull on all its negatives that is. Likely false negatives carry a mark,
    and the batch's most likely ones stand in a list of their own.

    Attributes:
        widget: what a notebook displays.
        run, step, anchor: the controls; setting `.value` redraws.
        table: the ranked negatives as a DataFrame, for readers without a running kernel.
        pairs: the batch's likely false negatives as a DataFrame, see there.
    """

    def __init__(
        self, runs: Mapping[str, TrainResult], sentences: Sequence[str], labels: Sequence[str]
    ) -> None:
        """Build the explorer.

        Args:
            runs: name -> run, as of `study.embedded.pick_runs`.
            sentences: the batch, N sentences.
            labels: the article that each comes from.
        """
        self._runs, self._sentences, self._labels = runs, list(sentences), list(labels)
        self._sims: dict[tuple[str, int], Tensor] = {}
        wide = {"style": {"description_width": "9em"}, "layout": {"width": "100%"}}
        self.run = widgets.Dropdown(
            options=list(runs),
            description="encoder",
            style={"description_width": "9em"},
        )
        self.step = widgets.SelectionSlider(
            options=self._steps(),
            description="training step",
            continuous_update=False,
            style={"description_width": "9em"},
            layout={"width": "30em"},
        )
        texts = zip(self._labels, self._sentences, strict=True)
        self.anchor = widgets.Dropdown(
            options=[(f"{i} · {title} · {text}", i) for i, (title, text) in enumerate(texts)],
            description="anchor",
            **wide,
        )
        self._tables = widgets.HTML()
        self.run.observe(self._change_run, names="value")
        for control in (self.step, self.anchor):
            control.observe(lambda _: self.redraw(), names="value")
        self.redraw()
        top = widgets.HBox([self.run, self.step], layout={"flex_flow": "row wrap"})
        self.widget = widgets.VBox([top, self.anchor, self._tables, SliderNames()])

    def similarities(self, run: str, step: int) -> Tensor:
        """The batch's similarity matrix after a step of a run: (N, N) float32, computed once."""
        if (run, step) not in self._sims:
            chosen = self._runs[run]
            self._sims[run, step] = analysis.batch_similarities(
                chosen.encoder_at(step),
                self._sentences,
                chosen.config.max_length,
                chosen.config.seed,
            )
        return self._sims[run, step]

    @property
    def table(self) -> pd.DataFrame:
        """The negatives of the present choice, see `ranked`."""
        return self.ranked(self.run.value, self.step.value, self.anchor.value)

    def ranked(self, run: str, step: int, anchor: int) -> pd.DataFrame:
        """An anchor's negatives after a step of a run, most similar first.

        Columns as in `analysis.anchor_negatives`, and "article", "sentence", "false_negative"
        (whether the pair is a likely one).
        """
        config, sim = self._runs[run].config, self.similarities(run, step)
        table = analysis.anchor_negatives(sim, anchor, compared(config.objective))
        found = analysis.likely_false_negatives(sim, self._labels)
        partners = {*found["j"][found["i"] == anchor], *found["i"][found["j"] == anchor]}
        return table.assign(
            article=[self._labels[j] for j in table["negative"]],
            sentence=[self._sentences[j] for j in table["negative"]],
            false_negative=table["negative"].isin(partners),
        )

    @property
    def pairs(self) -> pd.DataFrame:
        """The batch's likely false negatives, as in `analysis.likely_false_negatives`.

        Columns "similarity", "article", "i", "sentence_i", "j", "sentence_j".
        """
        sim = self.similarities(self.run.value, self.step.value)
        found = analysis.likely_false_negatives(sim, self._labels)
        return pd.DataFrame(
            {
                "similarity": found["similarity"],
                "article": [self._labels[i] for i in found["i"]],
                "i": found["i"],
                "sentence_i": [self._sentences[i] for i in found["i"]],
                "j": found["j"],
                "sentence_j": [self._sentences[j] for j in found["j"]],
            }
        )

    def redraw(self) -> None:
        """Bring both tables in line with the controls."""
        self._tables.value = self._negatives_html() + self._pairs_html()

    def _steps(self) -> list[int]:
        return self._runs[self.run.value].steps

    def _change_run(self, _: dict) -> None:
        step = self.step.value
        self.step.options = self._steps()
        self.step.value = step if step in self._steps() else self._steps()[-1]
        self.redraw()

    def _negatives_html(self) -> str:
        table = self.table
        losses = list(map(name_of, compared(self._runs[self.run.value].config.objective)))
        shares = {loss: table[loss].abs() / table[loss].abs().sum() for loss in losses}
        rows = []
        for k, row in enumerate(table.head(ROWS).to_dict("records")):
            cells = [f"<td>{k + 1}</td><td>{row['similarity']:.3f}</td>"]
            cells += [_weight(row[loss], shares[loss][k], loss) for loss in losses]
            mark = "⚑ likely" if row["false_negative"] else ""
            cells.append(f"<td style='white-space:nowrap'><b>{mark}</b></td>")
            cells.append(f"<td>{html.escape(row['article'])}</td>")
            cells.append(f"<td>{html.escape(row['sentence'])}</td>")
            rows.append("<tr>" + "".join(cells) + "</tr>")
        anchor = html.escape(self._sentences[self.anchor.value])
        return _table(
            f"Anchor {self.anchor.value} after step {self.step.value}: <b>{anchor}</b>"
            f"<br>Its {min(ROWS, len(table))} hardest of {len(table)} negatives; a bar is the "
            "negative's share of the pull on all of them.",
            [
                "rank",
                "similarity s",
                *(f"pull, {html.escape(loss)}" for loss in losses),
                "false negative?",
                "article",
                "sentence",
            ],
            rows,
        )

    def _pairs_html(self) -> str:
        pairs = self.pairs
        rows = [
            f"<tr><td>{row.similarity:.3f}</td>"
            f"<td>{html.escape(row.article)}</td>"
            f"<td>{row.i}</td><td>{html.escape(row.sentence_i)}</td>"
            f"<td>{row.j}</td><td>{html.escape(row.sentence_j)}</td></tr>"
            for row in pairs.head(ROWS).itertuples()
        ]
        return _table(
            f"⚑ <b>{len(pairs)} likely false negatives</b> in this batch: pairs of one article "
            f"among the tenth of all pairs that is most alike; the first {len(rows)}.",
            ["similarity s", "article", "anchor", "sentence", "anchor", "sentence"],
            rows,
        )


def compared(objective: Any) -> list[Any]:
    """The three kinds of objective at a run's temperature, and its own where it is another."""
    temperature = analysis.plain(objective).temperature
    kinds = [kind(temperature) for kind in (InfoNCE, FocalInfoNCE, HardnessInfoNCE)]
    same = [type(each) is type(objective) for each in kinds]
    kinds = [objective if here else each for each, here in zip(kinds, same, strict=True)]
    return kinds if any(same) else [*kinds, objective]


def _weight(pull: float, share: float, loss: str) -> str:
    """A cell with a pull, its share in percent, and a bar of that length in the loss's colour."""
    bar = f"linear-gradient(to right, {plots.style(loss).colour}55 {100 * share:.1f}%, #0000 0)"
    text = f"{pull:.2g} ({100 * share:.0f} %)"
    return f"<td style='background:{bar}; white-space:nowrap; padding-right:1em'>{text}</td>"


def _table(caption: str, columns: list[str], rows: list[str]) -> str:
    head = "".join(f"<th scope='col' style='text-align:left'>{column}</th>" for column in columns)
    return (
        "<table class='fcse-table' style='width:100%; line-height:1.3; margin-bottom:1em; "
        "text-align:left; vertical-align:top; font-size:14px'>"
        f"<caption style='text-align:left; padding:4px'>{caption}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
