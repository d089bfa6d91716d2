"""The gluing cache: what goes in comes out again, within its dtype's rounding, and within its limit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockprop.cache import GluingCache
from blockprop.checkpoint import load_state, save_state

IDS = torch.tensor([8, 0, 3])
SHAPES = [(4,), (2, 3)]


def filled(examples: int = 10, ids=IDS, **settings) -> GluingCache:
    cache = GluingCache(examples, **settings)
    cache.fit(SHAPES)
    for link, shape in enumerate(SHAPES):
        cache.write(link, ids, torch.randn(len(ids), *shape), torch.randn(len(ids), *shape), step=5)
    return cache


@pytest.mark.parametrize("mapped", [False, True])
def test_what_goes_in_comes_out_of_its_own_link_and_example(tmp_path, mapped):
    cache = GluingCache(10, path=tmp_path if mapped else None)
    cache.fit(SHAPES)
    anchors, directions = [torch.randn(3, *s) for s in SHAPES], [torch.randn(3, *s) for s in SHAPES]
    for link in (0, 1):
        cache.write(link, IDS, anchors[link], directions[link], step=0)
    order = torch.tensor([2, 0, 1])
    for link in (0, 1):
        entries = cache.read(link, IDS[order])
        assert torch.equal(entries.anchor, anchors[link][order])
        assert torch.equal(entries.direction, directions[link][order])


def test_ages():
    cache = GluingCache(10)
    assert cache.visits(IDS).tolist() == [[-1, -1, -1]]
    cache = filled()
    cache.visit(torch.tensor([0, 3]))
    cache.visit(torch.tensor([3]))
    assert cache.visits(torch.tensor([8, 0, 3, 1])).tolist() == [[0, 1, 2, -1]] * 2
    cache.write(1, torch.tensor([3]), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), step=9)
    assert cache.visits(torch.tensor([3])).tolist() == [[2], [0]]
    assert cache.written(torch.tensor([3, 8, 1])).tolist() == [[5, 5, -1], [9, 5, -1]]


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6), min_size=1, max_size=4),
    exponents=st.lists(st.integers(-25, 15), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
)
def test_each_example_is_rounded_on_its_own_scale(values, exponents, dtype):
    """However small an example beside the others of its batch, and the displacement beside the anchor."""
    given_ = torch.tensor(values) * 10.0 ** torch.tensor(exponents[: len(values)])[:, None]
    ids = torch.arange(len(values))
    cache = GluingCache(4, dtype=dtype)
    cache.fit([(6,)])
    cache.write(0, ids, 1e6 + torch.rand(len(values), 6), given_, step=0)
    error = (cache.read(0, ids).direction - given_).abs()
    largest = given_.abs().amax(1, keepdim=True)
    bound = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.int8: 0.5001 / 127}[dtype] * largest
    assert (error <= bound + 1e-37).all()
    assert (cache.read(0, ids).direction.dtype, cache.read(0, ids).anchor.dtype) == (torch.float32,) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_mapped_and_in_memory_hold_the_same_numbers(tmp_path, dtype):
    caches = []
    for path in (None, tmp_path / "new" / "folder"):
        torch.manual_seed(1)
        caches.append(filled(path=path, dtype=dtype))
    for link in (0, 1):
        for one, other in zip(*(cache.read(link, IDS) for cache in caches), strict=True):
            assert torch.equal(one, other)


def test_mapped_files_leave_nothing_behind(tmp_path):
    cache = filled(path=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert cache.read(0, IDS).anchor.any()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 10 * 104), (torch.bfloat16, 640), (torch.int8, 600)])
def test_the_size_is_known_and_refused_before_anything_is_allocated(dtype, size):
    assert GluingCache(10, dtype=dtype).size(SHAPES) == size
    GluingCache(10, dtype=dtype, limit=size).fit(SHAPES)
    cache = GluingCache(10, dtype=dtype, limit=size - 1)
    with pytest.raises(ValueError, match=r"needs .*(kB|bytes) for 10 examples and may take .*--cache PATH") as refused:
        cache.fit(SHAPES)
    assert "\n" not in str(refused.value)
    assert cache.shapes is None


def test_by_default_it_takes_no_more_than_half_of_what_is_free(tmp_path):
    for path in (None, tmp_path):
        with pytest.raises(ValueError, match="may take"):
            GluingCache(10**9, path=path).fit([(10**6,)])


def test_shapes_may_not_change():
    cache = filled()
    cache.fit(SHAPES)
    with pytest.raises(ValueError, match="expected examples of one shape"):
        cache.fit([(4,), (2, 5)])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "needs the examples' numbers"),
        ([1, 2], "expected an int64 tensor"),
        (torch.tensor([1.0, 2.0]), "expected an int64 tensor"),
        (torch.tensor([True, False]), "expected an int64 tensor"),
        (torch.tensor([1, 2, 3]), "3 ids with 2 examples"),
        (torch.tensor([1, 10]), "expected numbers from 0 to 9"),
        (torch.tensor([-1, 1]), "ids run from -1"),
        (torch.tensor([4, 4]), "id 4 is in the batch more than once"),
    ],
)
def test_ids_that_cannot_be_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        GluingCache(10).check(ids, 2)


def test_ids_of_any_whole_type_and_order_will_do():
    assert GluingCache(10).check(torch.tensor([9, 0, 4], dtype=torch.int16), 3).tolist() == [9, 0, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("saved_in", "loaded_in"), [("memory", "memory"), ("folder", "memory"), ("memory", "folder")])
def test_a_checkpoint_holds_all_of_it(tmp_path, dtype, saved_in, loaded_in):
    paths = {"memory": None, "folder": tmp_path / "cache"}
    cache = filled(path=paths[saved_in], dtype=dtype)
    cache.visit(IDS[:1])
    save_state(tmp_path / "state.safetensors", cache.state_dict())
    other = GluingCache(10, path=paths[loaded_in], dtype=dtype)
    other.load_state_dict(load_state(tmp_path / "state.safetensors"))
    everyone = torch.arange(10)
    assert torch.equal(other.visits(everyone), cache.visits(everyone))
    assert torch.equal(other.written(everyone), cache.written(everyone))
    for link in (0, 1):
        for one, same in zip(cache.read(link, everyone), other.read(link, everyone), strict=True):
            assert torch.equal(one, same)


def test_mapped_entries_beyond_the_snapshots_size_are_missing_after_a_resume(tmp_path):
    cache = filled(path=tmp_path / "cache", snapshot=100)
    save_state(tmp_path / "state.safetensors", cache.state_dict())
    assert (tmp_path / "state.safetensors").stat().st_size < 1000
    other = filled(path=tmp_path / "cache")
    other.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert (other.visits(torch.arange(10)) == -1).all()


def test_a_state_from_before_the_first_step_empties_the_cache():
    cache = filled()
    cache.load_state_dict(GluingCache(10).state_dict())
    assert (cache.visits(IDS) == -1).all()


def test_the_state_of_another_cache_is_refused():
    for other in (GluingCache(11), GluingCache(10, dtype=torch.int8)):
        with pytest.raises(ValueError, match="expected the same data and settings"):
            other.load_state_dict(filled().state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": 0}, "number of examples is 0"),
        ({"examples": 2.5}, "number of examples is 2.5"),
        ({"dtype": torch.int64}, "expected one of float32, bfloat16, int8"),
        ({"limit": -1}, "cache limit is -1"),
        ({"snapshot": 1.5}, "cache snapshot is 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GluingCache(**{"examples": 10, **settings})


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is no folder for the cache"):
        GluingCache(10, path=tmp_path / "file")
