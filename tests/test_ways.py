import torch

from blockprop.ways import norms, projected


def test_lengths_are_of_every_example():
    values = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(norms(values), torch.tensor([[[5.0]], [[0.0]]]))


def test_what_is_left_of_a_projection_is_across_the_slope():
    torch.manual_seed(0)
    way, slope = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    slope[2] = 0
    part = projected(way, slope)
    across = ((way - part) * slope).flatten(1).sum(1)
    torch.testing.assert_close(across, torch.zeros(4, dtype=torch.float64))
    assert not part[2].any()
    torch.testing.assert_close(projected(part, slope), part)
    torch.testing.assert_close((part / slope)[0], (part / slope)[0, 0, 0].expand(3, 2))
