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
from fcse.widgets.pictures import SliderNames, beside, labelled, table

ROWS = 12
"""Negatives, and pairs, that a table shows."""
_LOOK = (
    "class='fcse-table' style='width:100%; line-height:1.3; margin-bottom:1em; text-align:left; "
    "vertical-align:top; font-size:14px'"
)


class NegativeExplorer:
    """Choose an anchor, move through training: its negatives are ranked and weighed anew.

    A weight is the pull dL_i/ds_ij of the anchor's own loss on one negative; the share beside it
    says how much of the pull on all its negatives that is. Likely false negatives carry a mark,
    and the batch's most likely ones stand in a list of their own.

    run, step, anchor: the controls. table, pairs: what is shown, for readers without a running
    kernel."""

    def __init__(
        self, runs: Mapping[str, TrainResult], sentences: Sequence[str], labels: Sequence[str]
    ) -> None:
        """Build the explorer of runs by their names over a batch and the articles it is from."""
        self._runs = runs
        self._batch = pd.DataFrame({"article": labels, "sentence": sentences}, dtype=object)
        self._sims: dict[tuple[str, int], Tensor] = {}
        self.run = widgets.Dropdown(options=list(runs), **labelled("encoder", "9em"))
        look = labelled("training step", "9em", "30em")
        self.step = widgets.SelectionSlider(options=self._steps(), continuous_update=False, **look)
        texts = self._batch.itertuples(name=None)
        options = [(f"{i} · {title} · {text}", i) for i, title, text in texts]
        self.anchor = widgets.Dropdown(options=options, **labelled("anchor", "9em", "100%"))
        self._tables = widgets.HTML()
        self.run.observe(self._change_run, names="value")
        for control in (self.step, self.anchor):
            control.observe(lambda _: self.redraw(), names="value")
        self.redraw()
        shown = [beside(self.run, self.step), self.anchor, self._tables, SliderNames()]
        self.widget = widgets.VBox(shown)

    def similarities(self, run: str, step: int) -> Tensor:
        """The batch's similarity matrix after a step of a run: (N, N) float32, computed once."""
        if (run, step) not in self._sims:
            encoder, config = self._runs[run].encoder_at(step), self._runs[run].config
            how = {"max_length": config.max_length, "seed": config.seed}
            sentences = list(self._batch["sentence"])
            self._sims[run, step] = analysis.batch_similarities(encoder, sentences, **how)
        return self._sims[run, step]

    @property
    def table(self) -> pd.DataFrame:
        """The negatives of the present choice, see `ranked`."""
        return self.ranked(self.run.value, self.step.value, self.anchor.value)

    def ranked(self, run: str, step: int, anchor: int) -> pd.DataFrame:
        """An anchor's negatives after a step of a run, most similar first.

        Columns as in `analysis.anchor_negatives`, and "article", "sentence", "false_negative"
        (whether the pair is a likely one)."""
        config, sim = self._runs[run].config, self.similarities(run, step)
        table = analysis.anchor_negatives(sim, anchor, compared(config.objective))
        found = analysis.likely_false_negatives(sim, self._batch["article"])
        partners = {*found["j"][found["i"] == anchor], *found["i"][found["j"] == anchor]}
        marked = table["negative"].isin(partners)
        return table.join(self._batch, on="negative").assign(false_negative=marked)

    @property
    def pairs(self) -> pd.DataFrame:
        """The batch's likely false negatives, as in `analysis.likely_false_negatives`.

        Columns "similarity", "article", "i", "sentence_i", "j", "sentence_j"."""
        sim = self.similarities(self.run.value, self.step.value)
        found = analysis.likely_false_negatives(sim, self._batch["article"])
        first = self._batch.rename(columns={"sentence": "sentence_i"})
        second = self._batch["sentence"].rename("sentence_j")
        found = found.join(first, on="i").join(second, on="j")
        return found[["similarity", "article", "i", "sentence_i", "j", "sentence_j"]]

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
        negatives = self.table
        losses = list(map(name_of, compared(self._runs[self.run.value].config.objective)))
        total = negatives[losses].abs().sum()
        rows = []
        for k, row in enumerate(negatives.head(ROWS).to_dict("records"), start=1):
            pulls = [_weight(row[loss], abs(row[loss]) / total[loss], loss) for loss in losses]
            mark = "⚑ likely" if row["false_negative"] else ""
            rows.append(
                f"<tr><td>{k}</td><td>{row['similarity']:.3f}</td>{''.join(pulls)}"
                f"<td style='white-space:nowrap'><b>{mark}</b></td><td>"
                f"{html.escape(row['article'])}</td><td>{html.escape(row['sentence'])}</td></tr>"
            )
        anchor = html.escape(self._batch["sentence"][self.anchor.value])
        heads = [f"pull, {html.escape(loss)}" for loss in losses]
        return table(
            f"Anchor {self.anchor.value} after step {self.step.value}: <b>{anchor}</b>"
            f"<br>Its {len(rows)} hardest of {len(negatives)} negatives; a bar is the negative's "
            "share of the pull on all of them.",
            ["rank", "similarity s", *heads, "false negative?", "article", "sentence"],
            rows,
            _LOOK,
        )

    def _pairs_html(self) -> str:
        pairs = self.pairs
        rows = [
            f"<tr><td>{row.similarity:.3f}</td><td>{html.escape(row.article)}</td>"
            f"<td>{row.i}</td><td>{html.escape(row.sentence_i)}</td>"
            f"<td>{row.j}</td><td>{html.escape(row.sentence_j)}</td></tr>"
            for row in pairs.head(ROWS).itertuples()
        ]
        return table(
            f"⚑ <b>{len(pairs)} likely false negatives</b> in this batch: pairs of one article "
            f"among the tenth of all pairs that is most alike; the first {len(rows)}.",
            ["similarity s", "article", "anchor", "sentence", "anchor", "sentence"],
            rows,
            _LOOK,
        )


def compared(objective: Any) -> list[Any]:
    """The three kinds of objective at a run's temperature, and its own where it is another."""
    temperature = analysis.plain(objective).temperature
    kinds = (InfoNCE, FocalInfoNCE, HardnessInfoNCE)
    found = [objective if kind is type(objective) else kind(temperature) for kind in kinds]
    return found if type(objective) in kinds else [*found, objective]


def _weight(pull: float, share: float, loss: str) -> str:
    """A cell with a pull, its share in percent, and a bar of that length in the loss's colour."""
    bar = f"linear-gradient(to right, {plots.style(loss).colour}55 {100 * share:.1f}%, #0000 0)"
    text = f"{pull:.2g} ({100 * share:.0f} %)"
    return f"<td style='background:{bar}; white-space:nowrap; padding-right:1em'>{text}</td>"
