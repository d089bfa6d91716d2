"""Every method on networks whose times can be counted by hand."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble, _add_send_recv

from blockprop.planning.cluster import Cluster, Link
from blockprop.planning.costs import Layer, Passes
from blockprop.planning.events import Message, Ordered, Step, Task, simulate
from blockprop.planning.methods import Block, folded, lock_step, questions
from blockprop.planning.plan import METHODS, SYNCHRONOUS, Setting, all_reduce, no_faster, plan
from blockprop.schedules import pipelined

FAST = Link(1e9)
BATCH = 8


def layer(forward=1.0, backward=2.0, weights=2.0, update=0.0, output=1.0, weight_bytes=4.0):
    """Seconds for a whole batch, in proportion for parts; backward for the weights alone costs as much as for both."""
    inputs = backward / 2
    return Layer("layer", {BATCH: Passes(forward, backward, inputs, weights)}, update, output, weight_bytes)


def seconds(layers, cluster, method, cut=None, **setting):
    """Of a batch."""
    (found,) = plan(layers, cluster, Setting(BATCH, **setting), [method], cut)
    return BATCH / found.samples_per_second


def alike(count, link=FAST):
    return Cluster((1.0,) * count, link)


@pytest.mark.parametrize(("blocks", "parts"), [(2, 1), (2, 4), (4, 2), (4, 8), (8, 4)])
@pytest.mark.parametrize("method", ["gpipe", "1f1b"])
def test_bubbles(method, blocks, parts):
    """3 s a layer, all blocks alike: a share of (K - 1) / (M + K - 1) of the time is lost."""
    (found,) = plan([layer()] * blocks, alike(blocks), Setting(BATCH, microbatches=parts), [method])
    bubble = (blocks - 1) / (parts + blocks - 1)
    assert found.busy == pytest.approx([1 - bubble] * blocks, abs=1e-4)
    assert BATCH / found.samples_per_second == pytest.approx(3 / (1 - bubble), rel=1e-4)


def test_zero_bubble_fills_the_bubble():
    """Two blocks, two microbatches, half a second a pass: the devices wait for one forward and one input gradient."""
    spent = {name: seconds([layer()] * 2, alike(2), name, microbatches=2) for name in ("1f1b", "zero bubble")}
    assert spent["1f1b"] == pytest.approx(4.5, rel=1e-4)
    assert spent["zero bubble"] == pytest.approx(3.5, rel=1e-4)


def test_zero_bubble_in_a_v_if_there_are_layers_enough():
    (found,) = plan([layer()] * 8, alike(2), Setting(BATCH), ["zero bubble"])
    assert found.cut == (0, 2, 4, 6)
    (found,) = plan([layer()] * 3, alike(2), Setting(BATCH), ["zero bubble"])
    assert len(found.cut) == 2


def test_lock_step_takes_what_its_slowest_block_takes():
    """Four passes below, three at the top."""
    assert seconds([layer()] * 2, alike(2), "blockprop lock-step") == pytest.approx(4, rel=1e-4)
    assert seconds([layer()] * 7, alike(2), "blockprop lock-step") == pytest.approx(12, rel=1e-4)
    (found,) = plan([layer()] * 7, alike(2), Setting(BATCH), ["blockprop lock-step"])
    assert found.cut == (0, 3)
    assert found.busy == pytest.approx([1.0, 1.0], rel=1e-4)


@pytest.mark.parametrize(("latency", "expected"), [(1500, 12), (5000, (6 * 17 + 5 * 14) / 11)])
def test_lock_step_evaluates_again_while_a_message_is_on_its_way(latency, expected):
    """Both blocks take 12 s, of which the lower one has 3 s to do before it needs feedback: that is 1.5 s each way.

    With 5 s each way every second tick waits for them, 17 s, and the next one for 3 s less: of eleven, six.
    """
    link = Link(1e9, latency=latency)
    assert seconds([layer()] * 7, alike(2, link), "blockprop lock-step") == pytest.approx(expected, rel=1e-4)


def test_a_message_of_lock_step_is_part_of_the_tick_where_nothing_is_evaluated_again():
    """Both blocks take 12 s, and wait for a message of 5 s."""
    link = Link(1e9, latency=5000)
    assert seconds([layer()] * 8, alike(2, link), "blockprop stashed") == pytest.approx(17, rel=1e-4)


def test_free_running_hides_latency_that_lock_step_waits_for():
    link = Link(1e9, latency=5000)
    assert seconds([layer()] * 7, alike(2, link), "blockprop free-running", in_flight=3) == pytest.approx(12, rel=0.02)


@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_what_may_be_on_its_way_bounds_free_running(blocks):
    """A block of 4 s (the top of 3) hears of an output after 2 x 50 s a link; with two for each link on their way."""
    layers, cluster = [layer()] * blocks, alike(blocks, Link(1e9, latency=50_000))
    links = blocks - 1
    round_trip = links * (2 * 50 + 4) + 3  # one goes up through all forward passes, and down through all backward ones
    expected = round_trip / (2 * links)
    found = seconds(layers, cluster, "blockprop free-running", cut=list(range(blocks)), in_flight=2)
    assert found == pytest.approx(expected, rel=0.05)


def test_where_no_update_follows_a_microbatch_goes_up_before_feedback_is_learnt_from():
    """The upper block has 3 s of a batch, and waits for the lower one's next forward pass, of 1/16 s.

    After the last of eight it waits for the backward pass as well, of 1/8 s; of a whole batch for 1 s and 1/2 s.
    """
    layers = [layer(0.5, 1.0), layer()]
    for parts, expected in ((8, 3 + 8 / 16 + 1 / 8), (1, 3 + 1 + 1 / 2)):
        found = seconds(layers, alike(2), "blockprop free-running", cut=[0, 1], parts=parts, in_flight=1)
        assert found == pytest.approx(expected, rel=1e-3)


def test_feedback_goes_down_before_the_update():
    """Two round trips of 100 s hide the top's update, of 5 s, and not the first block's, after which it forwards."""
    cluster = alike(2, Link(1e9, latency=50_000))
    plain, updating = (
        seconds([layer(update=update)] * 2, cluster, "blockprop free-running", cut=[0, 1]) for update in (0.0, 5.0)
    )
    assert updating - plain == pytest.approx(5 / 2, rel=0.02)


@pytest.mark.parametrize("method", ["blockprop free-running", "blockprop lock-step", "blockprop cached"])
def test_a_slow_link_is_the_limit(method):
    """8 examples of 1 Mbit at 1 Mbit/s are 8 s a batch."""
    layers = [layer(0.1, 0.2, 0.2, output=125_000.0)] * 2
    found = seconds(layers, alike(2, Link(1)), method, in_flight=3)
    assert found >= 7.99
    if method != "blockprop lock-step":
        assert found == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize("policy", ["lock-step", "free-running"])
def test_half_of_two_microbatches_have_a_second_forward_pass(policy):
    """At the cut (0, 1) the lower block has 3.5 s of a batch in ticks of half a batch, the upper one 3."""
    found = seconds([layer()] * 2, alike(2), f"blockprop {policy}", cut=[0, 1], parts=2)
    assert found == pytest.approx(3.5 * seconds([layer()] * 2, alike(2), "blockprop stashed", parts=2) / 3, rel=0.05)


def test_stashed_weights_spare_the_second_forward_pass():
    """Three passes on either side: 3 s for a layer, and an even cut."""
    assert seconds([layer()] * 2, alike(2), "blockprop stashed") == pytest.approx(3, rel=1e-4)
    (found,) = plan([layer()] * 8, alike(2), Setting(BATCH), ["blockprop stashed"])
    assert found.cut == (0, 4)


@pytest.mark.parametrize("refresh", [1, 2, 4])
def test_cached_has_three_passes_at_every_visit(refresh):
    assert seconds([layer()] * 2, alike(2), "blockprop cached", refresh=refresh) == pytest.approx(3, rel=0.01)


def test_cached_spares_the_gradient_in_a_blocks_input():
    """Its weights' gradient alone takes 1 s: 2 s a batch at the bottom, always; at the top 3 s with feedback."""
    layers = [layer(weights=1.0)] * 2
    assert seconds(layers, alike(2), "blockprop cached", refresh=2) == pytest.approx((3 + 2) / 2, rel=0.01)


def test_ddp_moves_twice_the_weights_and_overlaps_none_of_the_last_bucket():
    """Half the batch each: 3 s of 6; 1 MB of gradients in all, 8 s at 1 Mbit/s: 2 (R - 1) / R of it is all of it."""
    layers = [layer(weight_bytes=500_000.0)] * 2
    assert seconds(layers, alike(2, Link(1)), "ddp") == pytest.approx(3 + 8, rel=1e-6)
    assert seconds(layers, alike(2), "ddp") == pytest.approx(3, rel=1e-3)


def test_ddp_sends_and_receives_with_the_processor():
    """1 MB of gradients out and in at 250 ms a MB; of four devices each sends and receives half as much again."""
    layers = [layer(weight_bytes=1_000_000.0)]
    link = Link(1e9, copying=250.0)
    assert seconds(layers, alike(2, link), "ddp") == pytest.approx(1.5 + 0.5, rel=1e-3)
    assert seconds(layers, alike(4, link), "ddp") == pytest.approx(0.75 + 0.75, rel=1e-3)


def test_an_all_reduce_of_two_devices_goes_both_ways_at_once_and_a_longer_ring_one_way():
    near, shared = Link(8), Link(8, duplex=0.5)
    assert all_reduce(4e6, 2, shared) == pytest.approx(2 * all_reduce(4e6, 2, near))
    assert all_reduce(4e6, 4, shared) == all_reduce(4e6, 4, near)


@pytest.mark.parametrize("segments", [2, 3, 8])
@pytest.mark.parametrize("latency", [0, 20, 900])
def test_two_devices_pass_on_segments_as_gloo_does(segments, latency):
    """Each has two on their way, and asks for another one when the first of them is there; summed up, then shared."""
    link = Link(8 * 1.048576, latency)  # 1 MiB/s

    def steps(other):
        for batch in itertools.count():
            for n in range(segments + 2):
                if n >= 2:
                    yield Step(((batch, n - 2),), Task(0.0, (), n == segments + 1))
                if n < segments:
                    yield Step((), Task(0.0, (Message(other, (batch, n), 2**20, asked=True),), asks=((batch, n),)))

    run = simulate([Ordered(steps(1)), Ordered(steps(0))], Cluster((1.0, 1.0), link), 4)
    assert 2 * (run.ends[0][3] - run.ends[0][2]) == pytest.approx(all_reduce(2 * segments * 2**20, 2, link))


def test_many_devices_do_not_go_round_a_ring_of_long_latencies():
    link = Link(1000, 20)
    assert all_reduce(1e6, 1024, link) == pytest.approx(2 * 0.008 + 20 * 0.02, rel=0.01)
    assert all_reduce(1e9, 8, Link(1000, 0.01)) == pytest.approx(2 * 7 / 8 * 8, rel=0.01)


def test_ddp_waits_for_the_slowest_and_leaves_devices_without_an_example_alone():
    layers = [layer()] * 4
    assert seconds(layers, Cluster((1.0, 0.5), FAST), "ddp") == pytest.approx(12, rel=1e-3)
    (found,) = plan([layer()] * 16, alike(16), Setting(BATCH), ["ddp"])
    assert found.busy == pytest.approx([1.0] * 8 + [0.0] * 8, abs=1e-3)


def test_a_device_alone_is_the_fastest():
    assert seconds([layer()] * 2, Cluster((1.0, 3.0), FAST), "one device") == pytest.approx(2)


def test_a_given_cut_is_taken():
    assert seconds([layer()] * 4, alike(2), "blockprop lock-step", cut=[0, 1]) == pytest.approx(9, rel=1e-4)


def test_one_block_is_one_device_with_every_method():
    layers = [layer(weights=1.5, update=0.25)] * 3
    alone = seconds(layers, alike(1), "one device")
    assert alone == pytest.approx(9 - 0.5 + 0.75)
    for method in METHODS[1:]:
        assert seconds(layers, alike(1), method, microbatches=1, refresh=1) == pytest.approx(alone), method


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("one device", "ddp")])
def test_a_thousand_devices(method):
    (found,) = plan([layer()] * 1024, alike(1024), Setting(BATCH, microbatches=1, in_flight=1), [method])
    assert len(found.busy) == 1024
    if method.startswith("blockprop"):
        assert BATCH / found.samples_per_second < 10
    else:
        passes = 2 if method == "zero bubble" else 3  # on the way: the weights' gradients are not waited for
        assert BATCH / found.samples_per_second == pytest.approx(passes * 1024, rel=0.01)


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_lock_step_does_in_every_tick_what_the_schedule_says(count, parts, again):
    """Each block's work in each tick of a full pipeline, in its order; a digit for forward, backward, update, copy."""
    blocks = [Block(1.0, 10.0, 0.0, 0.0, 100.0, 8.0, copied=1000.0)] * count
    fill = 2 * (count - 1) + parts * math.ceil(2 * count / parts)
    scheduled = [[[] for _ in range(count)] for _ in range(fill + parts)]
    updates, sent = [0] * (count + 1), {}
    for work, tick in zip(scheduled, pipelined(count, microbatches=parts), strict=False):
        for k, kind, number in tick:
            if kind == "update":
                updates[k] += 1
                work[k - 1].append(100)
            elif kind == "forward":
                sent[k, number] = updates[k]
                work[k - 1].append(1 + 1000 * (k < count and not again and 100 in work[k - 1]))
            else:
                work[k - 1] += [1] * (again and sent[k, number] != updates[k]) + [10]
    for k, program in enumerate(lock_step(blocks, parts, again=again)):
        top = k == count - 1
        for tick in range(parts):
            program.receive(("up", tick - 1))
            program.receive(("down", tick - 1))
            planned = [seconds for _ in range(2 if top else 4) if (seconds := program.next().seconds)]
            expected = scheduled[fill + tick][k]
            assert planned == ([sum(expected[:2]), *expected[2:]] if top else expected)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(blocks=st.integers(1, 5), parts=st.integers(1, 4), bandwidth=st.floats(0.1, 100), latency=st.floats(0, 900))
def test_no_synchronous_method_is_faster_than_its_bound(blocks, parts, bandwidth, latency):
    layers, cluster = [layer(output=9000.0)] * 10, alike(blocks, Link(bandwidth, latency))
    setting = Setting(BATCH, microbatches=parts)
    bound = no_faster(layers, cluster, setting)
    assert all(each.samples_per_second <= bound * 1.0001 for each in plan(layers, cluster, setting, SYNCHRONOUS))


POSITIVE = st.floats(0.05, 5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    costs=st.lists(st.tuples(POSITIVE, POSITIVE), min_size=4, max_size=7),
    blocks=st.integers(1, 4),
    bandwidth=st.floats(0.01, 100),
    method=st.sampled_from(METHODS),
)
def test_more_bandwidth_is_not_slower_and_nobody_is_busier_than_busy(costs, blocks, bandwidth, method):
    """At one cut: with another bandwidth a method may choose another one."""
    layers = [layer(f, b, b, 0.1, output=9000.0, weight_bytes=20_000.0) for f, b in costs]
    cut = None if method in ("one device", "ddp", "zero bubble") else list(range(blocks))
    setting = Setting(BATCH, microbatches=2)
    rates = []
    for times in (1, 10):
        (found,) = plan(layers, alike(blocks, Link(times * bandwidth, 3.0, 1.0)), setting, [method], cut)
        assert all(0 <= share <= 1 for share in found.busy)
        assert len(found.busy) == blocks
        rates.append(found.samples_per_second)
    # a device that decides by what has come may now and then decide for worse
    assert rates[1] >= rates[0] * (0.9 if method == "zero bubble" else 0.999)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Setting(0), "batch size is 0; expected a whole number of at least 1"),
        (lambda: Setting(8, microbatches=9), "cannot cut 8 examples into 9 microbatches; expected at most 8"),
        (lambda: Setting(8, refresh=0), "refresh is 0; expected"),
        (lambda: plan([layer()], alike(1), Setting(8), ["zero"]), "unknown method 'zero'; expected one of one device"),
        (lambda: plan([layer()], alike(2), Setting(8)), "cannot cut 1 layer into 2 blocks"),
        (lambda: plan([layer()] * 3, alike(2), Setting(8), ["gpipe"], [0]), "the cut makes 1 blocks; expected 2"),
        (lambda: plan([layer()] * 3, alike(2), Setting(8), ["gpipe"], [1, 2]), "expected rising numbers of layers"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 9])
def test_the_order_of_zbv_is_that_of_torch(devices, microbatches):
    theirs = zbv(devices, microbatches)
    for k in range(devices):
        done, ours = Counter(), []
        for kind, half in folded(k, devices, microbatches):
            ours.append((kind, 2 * devices - 1 - k if half else k, done[kind, half]))
            done[kind, half] += 1
        assert [one for one in ours if one[2] < microbatches] == [words(one) for one in theirs[k]]


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 9])
def test_zbv_asks_for_messages_where_torch_does(devices, microbatches):
    theirs = zbv(devices, microbatches)
    home = [*range(devices), *reversed(range(devices))]
    found = questions([[words(one) for one in theirs[k]] for k in range(devices)], home)
    wanted = _add_send_recv(theirs, home.__getitem__, 2 * devices)
    for k in range(devices):
        asked, passes = [], []
        for one in wanted[k]:
            name = one.computation_type.name
            if name.startswith("RECV"):
                asked.append(("F" if name == "RECV_F" else "I", one.stage_index, one.microbatch_index))
            elif not name.startswith("SEND"):
                passes.append(asked)
                asked = []
        assert found[k] == passes
        assert not asked


def zbv(devices, microbatches):
    """By device, the passes of torch's schedule."""
    made = ScheduleZBVZeroBubble.__new__(ScheduleZBVZeroBubble)
    made.pp_group_size, made.num_stages, made._n_microbatches = devices, 2 * devices, microbatches
    return {k: [one for one in made._calculate_single_rank_operations(k) if one is not None] for k in range(devices)}


def words(action):
    names = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    return names[action.computation_type.name], action.stage_index, action.microbatch_index
