"""Which method wins, over bandwidth and the number of devices: by the planner."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from blockprop.experiments.plan import TITLES
from blockprop.planning.cluster import Cluster
from blockprop.planning.costs import Layer
from blockprop.planning.plan import METHODS, SYNCHRONOUS, Setting, no_faster, plan
from blockprop.studies.drawing import figure_of, save

__all__ = ["BANDWIDTHS", "draw", "winners"]

BANDWIDTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5)
"""Mbit/s of the picture."""


def winners(
    layers: Sequence[Layer], cluster: Cluster, setting: Setting, bandwidths: Sequence[float] = BANDWIDTHS
) -> dict[int, list[tuple[str, float]]]:
    """Which method wins, and by how much over one device, for K = 2, 4, 8, ... and every bandwidth.

    The speeds of fewer devices are the first of the cluster's. Ties within one percent go to the method that comes
    first in `METHODS`, which is the plainer one. From 128 devices on, every second power of two.
    """
    powers = range(1, 11) if len(cluster) < 128 else (1, 2, 3, 4, 5, 6, 8, 10)
    counts = [2**power for power in powers if 2**power <= len(cluster)]
    counts += [len(cluster)] * (len(cluster) > 1 and len(cluster) not in counts)
    found: dict[int, list[tuple[str, float]]] = {}
    for count in counts:
        found[count] = []
        for bandwidth in bandwidths:
            link = replace(cluster.link, bandwidth=bandwidth)
            planned = replace(cluster, speeds=cluster.speeds[:count], link=link)
            rows = plan(layers, planned, setting, [name for name in METHODS if name not in SYNCHRONOUS])
            if no_faster(layers, planned, setting) > max(row.samples_per_second for row in rows):
                rows = plan(layers, planned, setting, SYNCHRONOUS) + rows
            rows.sort(key=lambda row: METHODS.index(row.method))
            best = max(row.samples_per_second for row in rows)
            first = next(row for row in rows if row.samples_per_second >= 0.99 * best)
            found[count].append((first.method, first.samples_per_second / rows[0].samples_per_second))
    return found


def draw(
    found: dict[int, list[tuple[str, float]]], path: Path, title: str, bandwidths: Sequence[float] = BANDWIDTHS
) -> None:
    """The picture of `winners`: a field for every K and bandwidth, with the gain over one device in it.

    Args:
        found: what `winners` gave.
        path: of the PNG and the SVG, without its ending or with one.
        title: above it.
        bandwidths: as for `winners`.
    """
    from matplotlib.colors import ListedColormap  # noqa: PLC0415 - optional
    from matplotlib.patches import Patch  # noqa: PLC0415 - optional

    colours = dict(
        zip(
            METHODS,
            ("#d9d9d9", "#fdd49e", "#c7e9c0", "#a1d99b", "#74c476", "#c6dbef", "#9ecae1", "#6baed6", "#b39ddb"),
            strict=True,
        )
    )
    fields = [[METHODS.index(method) for method, _ in row] for row in found.values()]
    width, height = 2.5 + 0.62 * len(bandwidths), 1.9 + 0.42 * len(found)
    figure, (axes,) = figure_of(title, 1, 1, width=width, height=height)
    axes.imshow(
        fields,
        cmap=ListedColormap(list(colours.values())),
        vmin=0,
        vmax=len(METHODS) - 1,
        origin="lower",
        aspect="auto",
    )
    for y, row in enumerate(found.values()):
        for x, (_, gain) in enumerate(row):
            axes.text(x, y, f"{gain:.3g}" if gain < 99.5 else f"{gain:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(bandwidths)), [f"{each:,.0f}" for each in bandwidths])
    axes.set_yticks(range(len(found)), [str(count) for count in found])
    axes.set_xlabel("bandwidth of a link, Mbit/s")
    axes.set_ylabel("devices, K")
    axes.set_title("the fastest method, and × one device", fontsize=9)
    shown = sorted({index for row in fields for index in row})
    handles = [Patch(color=colours[METHODS[index]], label=TITLES[METHODS[index]]) for index in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
