"""A plan's prediction as text and as a picture."""

import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_mosaic.cli import main
from megatron_mosaic.errors import LayoutError, PlanError
from megatron_mosaic.layout.plan import Plan
from megatron_mosaic.model.shipped import load_model
from megatron_mosaic.model.tokens import Distribution
from megatron_mosaic.model.workload import Workload, draw_masks
from megatron_mosaic.report.figure import draw_plan
from megatron_mosaic.report.lanes import describe_lanes, quotas
from megatron_mosaic.report.mask_figure import draw_mask, rank_of_tiles
from megatron_mosaic.report.prediction import predicted_timeline, read_prediction
from megatron_mosaic.report.terminal import describe
from megatron_mosaic.report.timeline import draw_timelines
from megatron_mosaic.report.units import gib, seconds
from megatron_mosaic.schedule.graph import RankKind, Stage
from megatron_mosaic.schedule.simulate import PassTimes
from megatron_mosaic.tokens.assign import assign
from megatron_mosaic.tokens.tiles import KERNEL_TILE
from tests.planner.problems import language, model
from tests.report.plans import (
    BASELINE_NOTES,
    LANES,
    LAYOUT_NOTE,
    PLAN,
    PREDICTED,
    compared_plan,
    lanes_plan,
)

KIND_0 = RankKind((Stage("language", 0), Stage("vision", 0)), (0,))


def plan_with(predicted=PREDICTED):
    return Plan.loads(PLAN + predicted, where="plan.yaml")


def test_terminal_shows_times_beside_the_baseline_and_memory():
    # 10 GiB are an eighth of the capacity. 100 columns less "ranks 0-1  " and "   30.0 GiB  38%"
    # leave 72 for a bar: 9 for every 10 GiB.
    assert describe(read_prediction(plan_with()), width=100).splitlines() == [
        "step 2.00 s, 1.50 times as fast as the baseline, TP2 PP2: 3.00 s",
        "                               plan            baseline",
        "compute               1.00 s  50.0%       2.00 s  66.7%",
        "communication         200 ms  10.0%       500 ms  16.7%",
        "bubble                700 ms  35.0%       500 ms  16.7%",
        "sync                   60 ms   3.0%       0.00 s   0.0%",
        "optimizer              40 ms   2.0%       0.00 s   0.0%",
        "",
        "memory of 80.0 GiB: █ weights ▓ gradients ▒ optimizer ░ activations : working = buffers",
        f"ranks 0-1  {'█' * 9}{'▓' * 18}{'·' * 45}   30.0 GiB  38%",
        f"ranks 2-3  {'█' * 27}{'▒' * 9}{'░' * 9}{'·' * 27}   50.0 GiB  62%",
    ]


def test_terminal_shows_what_there_is():
    assert describe(read_prediction(plan_with("predicted: {step_s: 0.05}\n"))) == "step 50 ms"
    assert describe(read_prediction(plan_with(""))) == ""


def test_timeline_has_the_predicted_times():
    plan = plan_with()

    timeline = predicted_timeline(plan, read_prediction(plan))

    # vF0 1 s, transfer 1 s, F0 on both stages 2 s, B0 4 s, transfer 1 s, vB0 1 s.
    spans = list(timeline.spans(timeline.program.kinds[0]))
    first_backward = next(span for span in spans if span.task.kind == "B")
    assert (first_backward.start_s, first_backward.end_s) == (9.0, 10.0)


def test_timeline_without_prediction_takes_the_example_times_of_every_microbatch():
    source = PLAN.replace("kind: 1f1b", "kind: colocated, encoder_group: 2")
    plan = Plan.loads(source, where="plan.yaml")

    timeline = predicted_timeline(plan, read_prediction(plan))

    first, *_ = timeline.spans(timeline.program.kinds[0])
    assert (first.task.microbatches, first.end_s) == ((0, 1), 2.0)


def test_prediction_reads_times_of_all_stages():
    prediction = read_prediction(plan_with())

    assert prediction.tasks_s[Stage("language", 1)] == PassTimes(1.0, 2.0)
    assert prediction.transfers_s == {"vision.0 -> language.0": 1.0}


def test_prediction_without_a_stage_has_no_times():
    predicted = PREDICTED.replace("    language.1: [1.0, 2.0]\n", "")

    assert read_prediction(plan_with(predicted)).tasks_s == {}


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        ("step_s: 2.0", "step_s: soon", r"predicted\.step_s='soon' must be a number >= 0; plan"),
        (
            "bubble_s: 0.7",
            "bubble: 0.7",
            r"breakdown\.bubble=0\.7 must be one of compute_s, imb",
        ),
        ("weights: 1", "weight: 1", r"predicted\.memory_bytes\[0\]\.weight=1.* must be one of we"),
        ("[1.0, 1.0]", "[1.0]", r"predicted\.tasks_s\.vision\.0=\[1\.0\] must be the times of a"),
        ("[1.0, 1.0]", "[1.0, -1.0]", r"predicted\.tasks_s\.vision\.0=-1\.0 must be a number >= 0"),
        ("capacity_bytes: 85899345920", "capacity_bytes: .nan", r"capacity_bytes=nan must be a"),
    ],
)
def test_prediction_of_another_form_is_refused(change, to, message):
    with pytest.raises(PlanError, match=message):
        read_prediction(plan_with(PREDICTED.replace(change, to)))


@pytest.mark.parametrize("predicted", [PREDICTED, ""])
def test_picture_is_drawn(predicted, tmp_path):
    path = tmp_path / "plan.png"

    draw_plan(plan_with(predicted), path)

    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_text_of_a_plan_is_no_formula_in_a_picture(tmp_path):
    path = tmp_path / "plan.png"

    draw_plan(plan_with(PREDICTED.replace("TP2 PP2", r"'$\\frac{x$'")), path)

    assert path.read_bytes().startswith(b"\x89PNG")


def test_picture_has_the_homogeneous_layouts_step_below_the_plans(tmp_path):
    plan = compared_plan()

    draw_plan(plan, tmp_path / "plan.svg")

    text = (tmp_path / "plan.svg").read_text()
    assert "Tasks of one step of the best homogeneous layout (TP2 PP2)" in text


def test_timeline_has_a_bar_for_every_task_and_a_row_for_every_kind_of_rank():
    plan = plan_with()
    figure = Figure(layout="constrained")

    draw_timelines(
        figure, {"": predicted_timeline(plan, read_prediction(plan))}, predicted=True, quotas={}
    )

    axes = figure.axes[0]
    bars = [path for bars in axes.collections for path in bars.get_paths()]
    assert len(bars) == 24  # three rows of four microbatches forward and backward
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "ranks 0-1  vision.0",
        "rank 2  language.0",
        "rank 3  language.1",
    ]


def test_timeline_has_a_row_for_every_lane_and_names_its_quota():
    plan = lanes_plan()
    figure = Figure(layout="constrained")

    draw_timelines(
        figure,
        {"": predicted_timeline(plan, read_prediction(plan))},
        predicted=True,
        quotas=quotas(plan),
    )

    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "rank 0  vision.0",
        "language.0",
        "rank 1  vision.0",
        "language.1",
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "vision forward (32 SMs)",
        "vision backward (32 SMs)",
        "language forward",
        "language backward",
    ]


def test_timeline_of_lanes_has_the_times_under_quotas_and_the_slowdown():
    timeline = predicted_timeline(lanes_plan(), read_prediction(lanes_plan()))

    # Rank 0 runs vF1 from 2 s on in 2 s, beside F0 from 3 to 4 s: 1 + 1 / 1.5 s are done by then.
    first = {str(span.task): (span.start_s, span.end_s) for span in timeline.spans(KIND_0)}
    assert first["F0 vision.0"] == (0.0, 2.0)
    assert first["F1 vision.0"] == pytest.approx((2.0, 4 + 1 / 3))
    assert first["F0 language.0"] == (3.0, 4.0)


def test_lanes_are_told_in_a_line_for_ranks_that_share_the_same():
    assert describe_lanes(lanes_plan()) == (
        "ranks 0-1: at the same time language (all SMs), vision (32 SMs)"
    )
    assert describe_lanes(plan_with()) == ""


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        ("[1.5, 1.0]", "[1.5]", r"\.slowdown\.F vision\.0 \+ F language\.0=\[1\.5\] must be a li"),
        (
            "[1.5, 1.0]",
            "[0.5, 1.0]",
            r"language\.0=\[0\.5, 1\.0\] must be numbers >= 1; plan",
        ),
        ("[2.0, 2.0]", "[2.0]", r"predicted\.lanes\.tasks_s\.vision\.0=\[2\.0\] must be the times"),
    ],
)
def test_lanes_of_another_form_are_refused(change, to, message):
    with pytest.raises(PlanError, match=message):
        read_prediction(lanes_plan(PREDICTED + LANES.replace(change, to)))


def test_timeline_of_many_stages_keeps_every_module():
    source = PLAN.replace("world_size: 4", "world_size: 42").replace("ranks: 2-3", "ranks: 2-41")
    plan = Plan.loads(
        source.replace("pipeline_model_parallel_size: 2", "pipeline_model_parallel_size: 40"),
        where="plan.yaml",
    )
    figure = Figure(layout="constrained")

    draw_timelines(
        figure, {"": predicted_timeline(plan, read_prediction(plan))}, predicted=False, quotas={}
    )

    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 20
    assert labels[0] == "ranks 0-1  vision.0"
    assert labels[-1] == "rank 41  language.39"
    assert (
        "21 kinds of ranks left out"
        in figure.axes[0].get_title(loc="left") + figure.axes[0].get_title()
    )


def test_show_prints_the_prediction_and_writes_a_picture(tmp_path, capsys):
    plan, picture = tmp_path / "plan.yaml", tmp_path / "plan.png"
    plan.write_text(PLAN + PREDICTED)

    status = main(["show", str(plan), "-o", str(picture)])

    printed = capsys.readouterr().out
    assert status == 0
    assert "rank 3     language.1  F0 B0 F1 B1 F2 B2 F3 B3" in printed
    assert "1.50 times as fast as the baseline" in printed
    assert picture.exists()


@pytest.mark.parametrize(
    ("output", "predicted", "message"),
    [
        (
            "plan.gif",
            PREDICTED,
            r"--output=.*plan\.gif must end with \.html, \.json, \.png, \.svg, \.pdf; rename",
        ),
        ("no/plan.png", PREDICTED, r"--output=.*plan\.png must be in a folder that exists; make"),
        ("plan.png", "predicted: {step_s: []}\n", r"plan\.yaml: predicted\.step_s=\[\] must be a"),
    ],
)
def test_show_refuses_in_one_line(output, predicted, message, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN + predicted)

    status = main(["show", str(plan), "-o", str(tmp_path / output)])

    error = capsys.readouterr().err
    assert status == 2
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("change", "to", "message"),
    [
        ("vision: {ranks: 0-1, tensor", "audio: {ranks: 0-1, tensor", r"edges: .*vision"),
        ("kind: colocated", "kind: fast", r"schedule: kind='fast' must be one of"),
        ("step_s: 3.0", "step_s: soon", r"predicted\.step_s='soon' must be a number >= 0"),
    ],
)
def test_show_names_what_is_wrong_with_the_homogeneous_plan(change, to, message, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        PLAN + PREDICTED.replace(LAYOUT_NOTE, LAYOUT_NOTE + BASELINE_NOTES.replace(change, to))
    )

    status = main(["show", str(plan)])

    error = capsys.readouterr().err
    assert status == 2
    assert len(error.splitlines()) == 1
    assert re.search(rf"plan\.yaml: predicted\.baseline.*{message}", error)


@pytest.mark.parametrize("output", [[], ["-o", "plan.png"]])
def test_show_refuses_a_trace_where_none_is_shown(output, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)

    status = main(["show", str(plan), "--trace", "steps", *output])

    error = capsys.readouterr().err
    assert status == 2
    assert re.search(r"--trace=steps must go with --output that ends with \.html or \.json", error)


@pytest.mark.parametrize(
    ("value_s", "expected"),
    [(0.0, "0.00 s"), (0.00123, "1.23 ms"), (0.5, "500 ms"), (1.0, "1.00 s"), (12.34, "12.3 s")],
)
def test_seconds_have_three_digits(value_s, expected):
    assert seconds(value_s) == expected


def test_gib_are_binary():
    assert gib(3 * 2**30) == "3.0 GiB"


MASKED = """
format: 1
world_size: 4
global_batch_size: 4
micro_batch_size: 1
modules:
  language: {ranks: 0-3, context_parallel_size: 4, attention: {mask: multimodal_packed}}
schedule: {kind: no_pipelining}
"""


def packed_language():
    text = replace(
        language(tokens=4096),
        mask="multimodal_packed",
        tokens_per_document=Distribution.constant(1024),
    )
    return model(language=text)


def test_picture_of_a_mask_has_the_tiles_of_every_rank(tmp_path):
    path = tmp_path / "mask.png"
    draw_mask(Plan.loads(MASKED, where="plan.yaml"), packed_language(), path)
    assert path.stat().st_size > 10_000

    # Four documents of 8 rows of tiles have 8 * 9 / 2 = 36 each; ranks 0 and 1 of zigzag the first
    # and the last one and so on: every rank one half of two documents.
    (mask,) = draw_masks(Workload.of(packed_language()), count=1)
    tiles = rank_of_tiles(mask, assign(mask, cp=4, method="zigzag", tile=KERNEL_TILE))
    assert tiles.shape == (32, 32)
    counts = np.bincount(tiles[np.isfinite(tiles)].astype(int))
    # The first half of a document has 10 tiles, the second one 26.
    assert counts.tolist() == [36, 36, 36, 36]


def test_picture_of_a_mask_needs_one_in_plan_and_model(tmp_path):
    plan = Plan.loads(MASKED.replace("multimodal_packed", "prefix_lm"), where="plan.yaml")

    with pytest.raises(LayoutError, match="mask=prefix_lm must be that of model small=multimodal"):
        draw_mask(plan, packed_language(), tmp_path / "mask.png")
    plan = Plan.loads(MASKED, where="plan.yaml")
    with pytest.raises(LayoutError, match="7b: language: mask=absent must name a mask"):
        draw_mask(plan, load_model("llava-1.5-7b"), tmp_path / "mask.png")
    plan = replace(plan, modules={"language": replace(plan.language, attention=None)})
    with pytest.raises(LayoutError, match="language: attention=absent must name a mask"):
        draw_mask(plan, packed_language(), tmp_path / "mask.png")
    path = tmp_path / "plan.yaml"
    path.write_text(MASKED)
    assert main(["show", str(path), "--mask", "llava-1.5-7b", "-o", str(tmp_path / "a.html")]) == 2
