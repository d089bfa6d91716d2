import pytest

from blockprop.data import NAMES, load


@pytest.mark.parametrize("name", ["", "imagenet", "MNIST", "text"])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match="unknown dataset") as caught:
        load(name)
    assert all(known in str(caught.value) for known in NAMES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion-mnist", "shakespeare", "some/text"])
def test_augmentation_is_refused_where_there_is_none(name):
    with pytest.raises(ValueError, match=f"{name} has no augmentation"):
        load(name, augment=True)


def test_no_augmentation_may_be_asked_of_any_dataset():
    assert load("digits", augment=False).train.augment is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("validation", [-0.1, 1.0, float("nan")])
def test_validation_out_of_range_is_refused_before_anything_is_read(tmp_path, name, validation):
    if name == "shakespeare":
        (tmp_path / "tinyshakespeare").mkdir()
        (tmp_path / "tinyshakespeare" / "input.txt").write_text("ab" * 2000)
    with pytest.raises(ValueError, match="validation is"):
        load(name, tmp_path, validation=validation)
