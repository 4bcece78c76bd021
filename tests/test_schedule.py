"""The schedule as data: what goes when, the presets, files of schedules, and what has become of one in a run."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from lnfree_interp.finetune.progress import (
    Progress,
    advance,
    latest_step,
    learning_rate_factor,
    least_step,
    length,
    observe,
    removed,
    rolled_back,
    state_of,
)
from lnfree_interp.schedule import KINDS, PRESETS, TREATMENTS, RemovalSchedule

# -- the schedule -----------------------------------------------------------------------------------------

#         layers, steps, tokens, lr, min lr, warm-up, aux, gaps of ln_2, qk, v, starts of ln_2, qk, v, ln_f
PUBLISHED = {
    "small": (12, 300, 524_288, 6e-4, 3e-4, 25, 0.1, (2, 2, 3), (20, 44, 68, 104)),
    "medium": (24, 500, 518_144, 6e-4, 3e-4, 10, 0.1, (2, 2, 3), (20, 68, 116, 188)),
    "large": (36, 600, 516_096, 3e-4, 4e-5, 15, 0.03, (4, 4, 6), (30, 174, 318, 534)),
    "xl": (48, 800, 516_096, 1e-4, 2e-5, 20, 0.01, (4, 4, 6), (50, 242, 434, 722)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_ones(name):
    n_layer, steps, tokens, lr, min_lr, warmup, aux, gaps, starts = PUBLISHED[name]
    schedule = RemovalSchedule.preset(name)
    assert (schedule.steps, schedule.tokens_per_step, schedule.warmup_steps) == (steps, tokens, warmup)
    assert (schedule.learning_rate, schedule.min_learning_rate) == (lr, min_lr)
    assert (schedule.auxiliary_weight, schedule.momentum) == (aux, 0.9)
    assert (schedule.weight_decay, schedule.max_grad_norm, schedule.block_size) == (0.01, 1.0, 1024)
    events = schedule.events(n_layer)
    assert len(events) == 3 * n_layer + 3
    for kind, start, gap in zip(KINDS, starts, (*gaps, None), strict=True):
        at = [(e.layer, e.step) for e in events if e.site == kind]
        layers = [None] if kind == "ln_f" else range(n_layer)
        assert at == [(layer, start + (gap * layer if gap else 0)) for layer in layers]
    assert [e[:2] for e in events[-2:]] == [(starts[3] + 2, "eot"), (starts[3] + 12, "position0")]


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(PRESETS)),
    n_layer=st.integers(1, 12),
    factor=st.floats(0.1, 4),
    order=st.sampled_from([KINDS, ("ln_f", "ln_2", "qk", "v"), ("v", "qk", "ln_2", "ln_f")]),
    by=st.sampled_from(["kind", "layer"]),
    layers=st.sampled_from(["forward", "backward"]),
    massive=st.sampled_from([None, 1.5, 4]),
)
def test_every_site_goes_once_in_every_order(name, n_layer, factor, order, by, layers, massive):
    schedule = replace(RemovalSchedule.preset(name), order=order, by=by, layers=layers, massive=massive)
    schedule = schedule.scaled(max(40, round(schedule.steps * factor)))
    events = schedule.events(n_layer)
    assert [e.step for e in events] == sorted(e.step for e in events)
    assert events[0].step >= 1 and events[-1].step < schedule.steps
    sites = [e[1:] for e in events]
    treatments = TREATMENTS if massive else TREATMENTS[:2]
    assert len(set(sites)) == len(sites) == 3 * n_layer + 1 + len(treatments)
    assert sites[3 * n_layer + 1 :] == [(treatment, None) for treatment in treatments]
    first, last = (0, n_layer - 1) if layers == "forward" else (n_layer - 1, 0)
    assert [layer for kind, layer in sites if kind == "v"][:: max(1, n_layer - 1)] == [first, last][:n_layer]
    if by == "kind":
        assert [k for k, layer in sites if layer in (0, None)][:4] == list(order)
    state = schedule.state(0, n_layer)
    assert not state.frozen and state.eot and state.position0 and state.auxiliary
    assert state.massive == (massive is not None)
    for step in sorted({e.step for e in events}):
        before, state = schedule.state(step - 1, n_layer), schedule.state(step, n_layer)
        assert before.frozen <= state.frozen and before != state
        on = any(getattr(state, treatment) for treatment in TREATMENTS)
        assert state.auxiliary == on, "the auxiliary loss ends with the last treatment"
    assert len(state.frozen) == 3 * n_layer + 1 and not (state.eot or state.position0 or state.massive)
    table = schedule.table(n_layer)
    assert list(table.columns) == ["step", "site", "layer"] and len(table) == len(events)


def test_vanilla_removes_nothing():
    schedule = RemovalSchedule.preset("small").vanilla()
    assert schedule.events(12) == []
    state = schedule.state(299, 12)
    assert not (state.frozen or state.position0 or state.eot or state.massive or state.auxiliary)
    assert "vanilla" in schedule.describe(12)
    smollm2 = RemovalSchedule.preset("smollm2-135m")
    assert smollm2.vanilla() == replace(smollm2, massive=None).vanilla(), "no control has a class of massive tokens"


def test_schedules_that_are_none_are_refused():
    small = RemovalSchedule.preset("small")
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        RemovalSchedule.preset("huge")
    with pytest.raises(ValueError, match="not before the end of its 300 steps"):
        small.events(48)
    for changes, message in (
        ({"start": 0}, "start is 0"),
        ({"order": ("qk", "v")}, "order"),
        ({"by": "head"}, "by is 'head'"),
        ({"layers": "up"}, "layers is 'up'"),
        ({"tokens_per_step": 1000}, "no multiple"),
        ({"gaps": {"ln_2": 1}}, "gaps"),
        ({"min_learning_rate": 1.0}, "learning rate"),
        ({"by": "layer", "order": ("qk", "ln_f", "v", "ln_2")}, "first or last"),
        ({"massive": 1}, "massive is 1, not a number above 1"),
        ({"massive": -4.0}, "massive is -4.0, not a number above 1"),
        ({"massive": math.inf}, "massive is inf, not a number above 1"),
        ({"massive": math.nan}, "massive is nan, not a number above 1"),
        ({"massive_gap": -1}, "massive_gap is -1, not a number of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(small, **changes)
    assert RemovalSchedule(**json.loads(json.dumps(asdict(small)))) == small


def test_summary_and_description_name_what_is_frozen():
    small = RemovalSchedule.preset("small")
    assert small.state(50, 12).summary(12) == "ln_2 12/12  qk 4/12  v 0/12  ln_f -  eot on  position0 on"
    assert small.state(299, 12).summary(12) == "ln_2 12/12  qk 12/12  v 12/12  ln_f frozen"
    assert "step 20 to 42" in small.describe(12) and "until step 116" in small.describe(12)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(PRESETS)),
    n_layer=st.integers(1, 12),
    gap=st.integers(0, 10) | st.floats(0, 10),
    massive=st.floats(1.001, 99),
    pace=st.sampled_from(["fixed", "adaptive"]),
    factor=st.floats(0.5, 3),
)
def test_massive_tokens_are_one_more_treatment_and_change_nothing_else(name, n_layer, gap, massive, pace, factor):
    without = replace(RemovalSchedule.preset(name), massive=None, pace=pace)
    schedule = replace(without, massive=massive, massive_gap=gap)
    planned, plain = schedule.events(n_layer), without.events(n_layer)
    assert planned[:-1] == plain == replace(without, massive_gap=gap).events(n_layer)
    assert planned[-1][1:] == ("massive", None)
    assert 0 <= planned[-1].step - plain[-1].step - gap + 1 <= 2, "a gap later, rounded down"
    last = planned[-1].step
    for step in {0, schedule.start, plain[-1].step, last - 1, last, schedule.steps - 1} - {-1}:
        state, other = schedule.state(step, n_layer), without.state(step, n_layer)
        assert state.massive == (step < last) and not other.massive
        assert (state.frozen, state.position0, state.eot) == (other.frozen, other.position0, other.eot)
        assert state.summary(n_layer).endswith("  massive on") == (step < last)
        assert state.auxiliary == (step < last), "on until the last treatment has ended"
    steps = max(60, round(schedule.steps * factor))
    assert schedule.scaled(steps).massive == massive
    assert schedule.scaled(steps).massive_gap == pytest.approx(gap * steps / schedule.steps)
    said = schedule.describe(n_layer).split("\n")
    assert f"  massive treatment off   step {last} (of tokens from {massive:g} times the average std on)" in said
    assert "massive" not in without.describe(n_layer) and schedule.table(n_layer).site.iloc[-1] == "massive"
    progress = advance(replace(schedule, pace="fixed"), Progress(), schedule.steps, n_layer)
    assert progress.happened == tuple(planned)
    assert removed(progress).endswith(f"massive treatment off at step {last}")


def test_the_presets_that_know_of_massive_tokens():
    """Only where their cost has been measured."""
    assert {name: preset.massive for name, preset in PRESETS.items() if preset.massive} == {"smollm2-135m": 4}
    events = RemovalSchedule.preset("smollm2-135m").events(30)
    assert [event[:2] for event in events[-3:]] == [(232, "eot"), (242, "position0"), (252, "massive")]


LAYERS = {"pythia-70m": 6, "pythia-160m": 12, "pythia-410m": 24, "pythia-1b": 16, "pythia-1.4b": 24}
LAYERS |= {"smollm2-135m": 30, "tiny": 4, "small": 12, "medium": 24, "large": 36, "xl": 48}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_time_after_the_last_event(name):
    schedule = RemovalSchedule.preset(name)
    last = schedule.events(LAYERS[name])[-1].step
    assert last < 0.93 * schedule.steps
    assert schedule.tokens_per_step % schedule.block_size == 0
    assert schedule.adaptive().events(LAYERS[name])[-1].step == last


# -- files ------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(sorted(PRESETS)), pace=st.sampled_from(["fixed", "adaptive"]), steps=st.integers(60, 900))
def test_a_schedule_comes_back_from_its_file(tmp_path_factory, name, pace, steps):
    path = tmp_path_factory.mktemp("schedule") / "schedule.json"
    schedule = replace(RemovalSchedule.preset(name).scaled(steps), pace=pace)
    schedule.to_json(path)
    assert RemovalSchedule.from_json(path) == schedule
    assert [p.name for p in path.parent.iterdir()] == ["schedule.json"]


def test_a_wrong_field_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # the schedule's own checks, not the tests'
    path = tmp_path / "schedule.json"
    whole = asdict(RemovalSchedule.preset("small"))
    for changes, message in (
        ({"step": 3}, "there is no field 'step'; there are steps, start, gaps"),
        ({"steps": "many"}, "steps is 'many', not a whole number"),
        ({"steps": 2.5}, "steps is 2.5, not a whole number"),
        ({"steps": True}, "steps is True, not a whole number"),
        ({"patience": "long"}, "patience is 'long', not a whole number or null"),
        ({"gaps": [1, 2]}, "gaps is \\[1, 2\\], not an object of a number for each of ln_2, qk, v, ln_f"),
        ({"gaps": {"ln_2": 1}}, "gaps .* one per kind is needed"),
        ({"order": "qk"}, "order is 'qk', not a list of strings"),
        ({"pace": "slow"}, "pace is 'slow', not 'fixed' or 'adaptive'"),
        ({"smoothing": 1}, "smoothing is 1, not at least 0 and below 1"),
        ({"margin": -1}, "margin is -1, not a number of at least 0"),
        ({"learning_rate": None}, "learning_rate is None, not a number"),
        ({"massive": "4"}, "massive is '4', not a number or null"),
        ({"massive": True}, "massive is True, not a number or null"),
        ({"massive": 0.5}, "massive is 0.5, not a number above 1"),
        ({"massive_gap": None}, "massive_gap is None, not a number"),
    ):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(ValueError, match=f"^schedule .*schedule.json: {message}") as error:
            RemovalSchedule.from_json(path)
        assert "\n" not in str(error.value)
    path.write_text(json.dumps({k: v for k, v in whole.items() if not k.startswith("massive")}))
    assert RemovalSchedule.from_json(path) == RemovalSchedule.preset("small"), "of a version that did not know them"
    path.write_text(json.dumps({k: v for k, v in whole.items() if k not in ("steps", "momentum")}))
    with pytest.raises(ValueError, match="steps is missing"):
        RemovalSchedule.from_json(path)
    for text, message in (("{", "is no JSON"), ("[]", "no JSON object of fields"), ("[" * 100_000, "is no JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            RemovalSchedule.from_json(path)
    with pytest.raises(ValueError, match=r"cannot read schedule .*absent\.json: No such file"):
        RemovalSchedule.from_json(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="cannot write"):
        RemovalSchedule.preset("small").to_json(tmp_path / "absent" / "schedule.json")


# -- what becomes of it -----------------------------------------------------------------------------------


ANY = {
    "name": st.sampled_from(["small", "tiny", "pythia-1b", "smollm2-135m"]),
    "n_layer": st.integers(1, 12),
    "by": st.sampled_from(["kind", "layer"]),
    "layers": st.sampled_from(["forward", "backward"]),
    "factor": st.floats(0.1, 2),
}


def drawn(name, n_layer, by, layers, factor) -> RemovalSchedule:
    schedule = replace(RemovalSchedule.preset(name), by=by, layers=layers)
    return schedule.scaled(max(40, round(schedule.steps * factor)))


@settings(max_examples=10, deadline=None)
@given(**ANY, until=st.sampled_from([None, 30]))
def test_a_fixed_schedule_is_followed_to_the_step(n_layer, until, **kwargs):
    schedule = replace(drawn(n_layer=n_layer, **kwargs), auxiliary_until=until)
    progress = Progress()
    for step in range(schedule.steps + 1):
        progress = advance(schedule, progress, step, n_layer)
        assert state_of(schedule, progress, step, n_layer) == schedule.state(step, n_layer)
        if step % 13 == 0:
            assert advance(schedule, Progress(), step, n_layer) == progress, "whether asked at every step or once"
            assert length(schedule, progress, n_layer) == schedule.steps
    assert progress == Progress(tuple(schedule.events(n_layer)))
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress


@settings(max_examples=25, deadline=None)
@given(**ANY, at=st.integers(0, 100), failed_after=st.integers(0, 60), wait=st.integers(1, 300))
def test_a_rollback_makes_the_rest_wait_and_the_run_longer_by_as_much(n_layer, at, failed_after, wait, **kwargs):
    schedule = drawn(n_layer=n_layer, **kwargs)
    good = advance(schedule, Progress(), at, n_layer)
    failed = advance(schedule, good, at + failed_after, n_layer)
    planned = schedule.events(n_layer)
    back = rolled_back(schedule, good, failed, wait, n_layer)
    assert back.happened == good.happened and back.rollbacks == 1
    end, progress = length(schedule, back, n_layer), back
    for step in range(at, end + 1):
        progress = advance(schedule, progress, step, n_layer)
        assert length(schedule, progress, n_layer) == end, "said from the start"
    assert [event[1:] for event in progress.happened] == [event[1:] for event in planned]
    if len(good.happened) == len(planned):
        assert progress.happened == good.happened and end == schedule.steps
        return
    i = len(good.happened)
    assert progress.happened[i].step == planned[i].step + wait, "as much later as it waits"
    late = {now.step - then.step for now, then in zip(progress.happened[i:], planned[i:], strict=True)}
    assert late == {wait}, "and all that follow keep their gaps"
    last = planned[-1].step + wait
    assert end == (schedule.steps if last < schedule.steps else schedule.steps + wait)
    assert last < end


def rates(schedule, n_layer, steps, progress=None):
    if progress is None:
        known = [Progress()]
        for step in range(steps):
            known.append(advance(schedule, known[-1], step, n_layer))
        progress = known[1:].__getitem__
    return [learning_rate_factor(schedule, progress(step), step, n_layer) for step in range(steps)]


@pytest.mark.parametrize("name", ["small", "xl", "tiny"])
def test_the_learning_rate_is_the_usual_cosine_and_stays_at_its_minimum(name):
    schedule, n_layer = RemovalSchedule.preset(name), LAYERS[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.learning_rate)
    usual = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        schedule.warmup_steps,
        schedule.steps,
        scheduler_specific_kwargs={"min_lr": schedule.min_learning_rate},
    )
    ours = rates(schedule, n_layer, schedule.steps + 50)
    for step in range(schedule.steps):
        assert ours[step] * schedule.learning_rate == pytest.approx(usual.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        usual.step()
    floor = schedule.min_learning_rate / schedule.learning_rate
    assert ours[schedule.steps :] == pytest.approx([floor] * 50)
    assert rates(schedule.vanilla(), n_layer, schedule.steps) == ours[: schedule.steps]


def run_adaptive(schedule, n_layer, excess):
    """The steps of a run whose difference to the control in step i after an event is excess(i)."""
    progress, since, seen = Progress(), 0, []
    step = 0
    while step < length(schedule, progress, n_layer):
        step += 1
        before = len(progress.happened)
        progress = observe(schedule, progress, excess(since) if progress.happened else 0.0)
        progress = advance(schedule, progress, step, n_layer)
        since = 0 if len(progress.happened) > before else since + 1
        seen.append(progress)
    return progress, seen


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(["small", "tiny"]), n_layer=st.integers(1, 6), half=st.floats(0.3, 30))
def test_an_adaptive_schedule_waits_until_the_loss_is_back(name, n_layer, half):
    schedule = RemovalSchedule.preset(name).adaptive(smoothing=0.0, margin=0.1)
    planned = schedule.events(n_layer)
    progress, seen = run_adaptive(schedule, n_layer, lambda i: 0.8 * 0.5 ** (i / half))
    assert [event[1:] for event in progress.happened] == [event[1:] for event in planned]
    needed = math.ceil(3 * half) + 1  # 0.8 -> 0.1, seen one step later than it was run
    for (a, b), (c, d) in zip(pairwise(progress.happened), pairwise(planned), strict=True):
        assert b.step - a.step >= max(1, d.step - c.step), "gaps are least distances"
    steps = [b.step - a.step for a, b in pairwise(progress.happened)]
    shares = [latest_step(schedule, p, n_layer) for p in seen if 0 < len(p.happened) < len(planned)]
    assert all(p.happened[-1].step <= schedule.steps - schedule.settle for p in seen if p.happened)
    assert len(seen) == progress.happened[-1].step + schedule.settle <= schedule.steps
    if max(shares) and all(step < schedule.steps // len(planned) // 2 for step in (needed, max(steps))):
        gaps = [max(1, b.step - a.step, needed) for a, b in pairwise(planned)]
        assert steps == gaps, "as soon as it is back"


def test_a_loss_that_never_comes_back_waits_its_even_share():
    schedule, n_layer = replace(RemovalSchedule.preset("tiny"), steps=600).adaptive(), 4
    progress, _ = run_adaptive(schedule, n_layer, lambda i: 1.0)
    assert progress.happened[-1].step <= 600 - schedule.settle
    assert progress.happened[-1].step > 550, "all of the time is used"
    short, _ = run_adaptive(replace(schedule, patience=9), n_layer, lambda i: 1.0)
    gaps = [b.step - a.step for a, b in pairwise(short.happened)]
    planned = [b.step - a.step for a, b in pairwise(schedule.events(4))]
    assert gaps == [max(9, gap) for gap in planned]


def test_the_smoothed_excess_begins_anew_at_each_event():
    schedule = RemovalSchedule.preset("tiny").adaptive(smoothing=0.5)
    progress = observe(schedule, observe(schedule, Progress(), 1.0), 0.0)
    assert progress.excess == 0.5
    progress = advance(schedule, progress, 40, 4)
    assert progress.happened[-1].step == 40 and progress.excess is None
    assert observe(schedule, progress, 2.0).excess == 2.0
    back = observe(schedule, progress, 0.01)
    assert advance(schedule, back, 47, 4) == back, "back, but its gap is not over"
    assert len(advance(schedule, back, 48, 4).happened) == 2
    assert advance(schedule, observe(schedule, progress, 1.0), 48, 4).happened == progress.happened
    assert advance(schedule, observe(schedule, progress, math.nan), 48, 4).happened == progress.happened


def test_an_adaptive_run_ends_with_a_line_to_the_least_learning_rate():
    schedule, n_layer = RemovalSchedule.preset("tiny").adaptive(settle=10), 4
    progress, seen = run_adaptive(schedule, n_layer, lambda i: 0.0)
    end = progress.happened[-1].step
    assert end == schedule.events(n_layer)[-1].step and len(seen) == end + 10
    ours = rates(schedule, n_layer, end + 11, lambda step: seen[max(0, step - 1)])
    usual = rates(replace(schedule, pace="fixed"), n_layer, end + 1)
    assert ours[: end + 1] == usual
    assert ours[end + 10] == pytest.approx(schedule.min_learning_rate / schedule.learning_rate)
    falls = [a - b for a, b in zip(ours[end:], ours[end + 1 :])]
    assert falls == pytest.approx([falls[0]] * 10) and falls[0] > 0


def test_an_adaptive_schedule_waits_after_a_rollback_and_is_as_long_as_it_takes():
    schedule, n_layer = RemovalSchedule.preset("tiny").adaptive(), 4
    good = advance(schedule, Progress(), 40, n_layer)
    failed = advance(schedule, observe(schedule, good, 0.0), 50, n_layer)
    assert len(failed.happened) == 2
    back = rolled_back(schedule, good, failed, 20, n_layer)
    assert least_step(schedule, back, n_layer) == 70 and back.excess is None
    assert advance(schedule, observe(schedule, back, 0.0), 69, n_layer).happened == good.happened
    far = rolled_back(schedule, good, failed, 2000, n_layer)
    last = schedule.events(n_layer)[-1].step - schedule.events(n_layer)[1].step + 2050
    assert length(schedule, far, n_layer) == last + schedule.settle
    with pytest.raises(ValueError, match="20 more to settle do not fit into its 200 steps"):
        replace(schedule, steps=200).events(n_layer)


def test_what_was_removed_in_a_line():
    assert removed(Progress()) == "nothing"
    small = RemovalSchedule.preset("small")
    assert removed(advance(small, Progress(), 50, 12)) == "ln_2 0-11 at steps 20-42, qk 0-3 at steps 44-50"
    line = removed(advance(small, Progress(), 200, 12))
    assert line.endswith("ln_f at step 104, eot treatment off at step 106, position0 treatment off at step 116")
