"""Which method wins where, on layers whose times can be counted by hand."""

import pytest

from blockprop.planning.cluster import Cluster, Link
from blockprop.planning.costs import Layer, Passes
from blockprop.planning.plan import METHODS, Setting, plan
from blockprop.studies.winners import draw, winners

BATCH = 8
SETTING = Setting(BATCH)


def layers(count, weight_bytes=4e6):
    """A second forward, two back; a megabyte at every cut."""
    passes = Passes(1.0, 2.0, 1.0, 2.0)
    return [Layer("layer", {BATCH: passes}, 0.0, 1e6 / BATCH, weight_bytes)] * count


def cluster(count, latency=0.0):
    return Cluster((1.0,) * count, Link(100.0, latency))


def test_all_methods_are_asked_at_every_bandwidth():
    """What is left out cannot win: the same as the fastest of all methods, first come first."""
    bandwidths = (0.5, 5.0, 1e4)
    found = winners(layers(8), cluster(4, latency=200.0), SETTING, bandwidths)
    for count, row in found.items():
        for bandwidth, (method, gain) in zip(bandwidths, row, strict=True):
            planned = Cluster((1.0,) * count, Link(bandwidth, 200.0))
            rates = {one.method: one.samples_per_second for one in plan(layers(8), planned, SETTING)}
            assert method == next(name for name in METHODS if rates[name] >= 0.99 * max(rates.values()))
            assert gain == pytest.approx(rates[method] / rates["one device"])


def test_over_a_link_that_carries_nothing_one_device_wins():
    [(method, gain)] = winners(layers(4), cluster(2), SETTING, [1e-6])[2]
    assert (method, gain) == ("one device", 1.0)


def test_over_a_fast_link_with_heavy_weights_every_device_counts():
    """Gradients of the weights' size take DDP minutes, messages of a megabyte nothing."""
    found = winners(layers(8, weight_bytes=1e12), cluster(4), SETTING, [1e6])
    for count, [(method, gain)] in found.items():
        assert method not in ("one device", "ddp")
        assert 0.9 * count < gain <= count * 1.2  # cached, a block does not take the gradient of its input


@pytest.mark.parametrize(
    ("devices", "counts"), [(1, []), (2, [2]), (6, [2, 4, 6]), (8, [2, 4, 8]), (128, [2, 4, 8, 16, 32, 64])]
)
def test_counts_are_powers_of_two_and_all(devices, counts):
    counts = [*counts, 128] if devices == 128 else counts
    assert list(winners(layers(devices), cluster(devices), SETTING, [100.0])) == counts


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    bandwidths = (1.0, 1e4)
    draw(winners(layers(4), cluster(4), SETTING, bandwidths), tmp_path / "one.png", "title", bandwidths)
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "one.svg"}
    assert "title" in (tmp_path / "one.svg").read_text()
