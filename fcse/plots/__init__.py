"""One function a figure: numbers in, Picture out; a loss has the same style everywhere."""

from fcse.plots.loss import (
    against,
    curve_families,
    joined,
    pull_by_decile,
    pull_curves,
    similarity_heatmap,
)
from fcse.plots.seeds import (
    along_training,
    beside_published,
    by_setting,
    differences,
    gains,
    over_seeds,
    scores,
    surface,
    training,
)
from fcse.plots.space import (
    OTHERS,
    describe_maps,
    describe_plane,
    group_colours,
    lines,
    maps,
    plane,
    similarity_distribution,
)
from fcse.plots.style import STYLE, Picture, image, line, make_folder, save, show, style
