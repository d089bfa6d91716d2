import torch

from blockprop.data.augment import CropAndFlip
from blockprop.data.normalise import Normalise


def test_normalise_works_channel_by_channel_and_leaves_its_input_alone():
    images = torch.tensor([0, 255, 51, 102], dtype=torch.uint8).view(1, 2, 1, 2)
    kept = images.clone()
    normal = Normalise(mean=(0.5, 0.2), std=(0.5, 0.1))(images)
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal.flatten(), torch.tensor([-1.0, 1.0, 0.0, 2.0]))
    assert torch.equal(images, kept)


def test_normalise_leaves_float_images_alone_too():
    images = torch.full((1, 1, 2, 2), 255.0)
    Normalise()(images)
    assert torch.equal(images, torch.full((1, 1, 2, 2), 255.0))


def test_crop_and_flip_is_a_padded_crop_that_may_be_mirrored():
    images = torch.randint(1, 256, (64, 3, 5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    changed = CropAndFlip(padding=2)(images, torch.Generator().manual_seed(1))
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    seen = set()
    for before, after in zip(images, changed, strict=True):
        padded = torch.nn.functional.pad(before, [2] * 4)
        crops = {
            (top, left, mirrored): padded[:, top : top + 5, left : left + 6].flip([2] if mirrored else [])
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
        }
        (found,) = [key for key, crop in crops.items() if torch.equal(crop, after)]
        seen.add(found)
    assert len({key[0] for key in seen}) == len({key[1] for key in seen}) == 5
    assert {key[2] for key in seen} == {False, True}


def test_crop_and_flip_draws_from_the_given_generator_only():
    images = torch.rand(8, 1, 6, 6)
    first = CropAndFlip()(images, torch.Generator().manual_seed(5))
    torch.rand(1)
    assert torch.equal(first, CropAndFlip()(images, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, CropAndFlip()(images, torch.Generator().manual_seed(6)))
