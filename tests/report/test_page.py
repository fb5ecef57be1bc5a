"""The report's page, in a browser: what a person sees, points at and presses."""

import json
from dataclasses import replace

import pytest

from megatron_mosaic.cli import main
from megatron_mosaic.report.page import write_page
from tests.report import browser
from tests.report.plans import (
    PLAN,
    PREDICTED,
    TASK_BYTES,
    compared_plan,
    filled_plan,
    lanes_plan,
    large_compared_plan,
    small_plan,
    write_trace,
)

RIGHT = 64  # pixels beside the rows
# vF0 1 s, transfer 1 s, F0 on both stages 2 s; then language.1 works without a gap but before F3:
# vF3 waits for vB0, so F3 is a second late. 4 * 3 - 1 + 1 s, B3 2 s, transfer 1 s, vB3 1 s.
STEP_S = 4 + 12 + 2 + 1 + 1
ONCE_S = 0.06 + 0.04


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.started(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_page(small_plan(), folder / "small.html", name="plan.yaml")
    write_page(large_compared_plan(), folder / "large.html", name="large.yaml")
    write_page(small_plan(""), folder / "bare.html", name="bare.yaml")
    write_page(compared_plan(), folder / "compared.html", name="plan.yaml")
    write_trace(small_plan(), folder / "trace", slower=1.25)
    write_page(small_plan(), folder / "traced.html", name="plan.yaml", trace=folder / "trace")
    return folder


@pytest.fixture
def small(window, pages):
    window.open(pages / "small.html")
    window.settle()
    return window


def visible_s(page):
    """First and last second of the visible span."""
    begin, end = page.text("#range").removesuffix(" s").split(" s – ")
    return float(begin), float(end)


def corner(page):
    """Place of the timeline's canvas in the window, and its width."""
    return page.script(
        "document.getElementById('scroll').scrollIntoView();"
        "const box = document.getElementById('rows').getBoundingClientRect();"
        "return [box.left, box.top, box.width]"
    )


def place(page, *, row, at_s, within=0.5):
    """Place in the window of a time on a row, for the whole step is visible."""
    left, top, width = corner(page)
    labels, rows, whole_s = page.script(
        "const {left, places, whole} = document.getElementById('rows').dataset;"
        "return [Number(left), JSON.parse(places), Number(whole) / 1e6]"
    )
    x = left + labels + at_s / whole_s * (width - labels - RIGHT)
    row_top, row_height = rows[row]
    return x, top + row_top + within * row_height


def tip(page):
    lines = page.script(
        "const tip = document.getElementById('tip'); if (tip.hidden) return null;"
        "return [['', tip.querySelector('b').textContent],"
        " ...[...tip.querySelectorAll('tr')].map((row) =>"
        " [...row.cells].map((cell) => cell.textContent))]"
    )
    return None if lines is None else dict(lines)


@pytest.mark.parametrize("name", ["small", "large", "bare", "compared", "traced"])
def test_page_opens_without_a_message_or_a_request(name, window, pages):
    window.log("browser")
    window.open(pages / f"{name}.html")
    window.settle()

    assert window.log("browser") == []
    page = (pages / f"{name}.html").as_uri()
    messages = [json.loads(entry["message"])["message"] for entry in window.log("performance")]
    requests = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = [each["request"]["url"] for each in requests if each["documentURL"] == page]
    assert [url for url in urls if not url.startswith("data:")] == [page]


def test_page_says_what_the_plan_gains(small):
    assert small.text("h1") == "vision + language on 4 ranks"
    assert small.text("#summary").startswith(
        "A step takes 2.00\u00a0s, 1.50 times as fast as under"
    )
    assert "fullest GPU50.0 GiB" in small.text("#numbers")


@pytest.mark.parametrize(
    ("row", "at_s", "expected"),
    [
        (
            0,
            0.5,
            {"": "F0 vision.0", "forward": "microbatch 0", "on": "ranks 0–1", "takes": "1.00 s"},
        ),
        (
            1,
            2.5,
            {
                "": "F0 language.0",
                "waited": "2.00 s for F0 vision.0 on ranks 0–1, 1.00 s of it for the transfer",
            },
        ),
        (1, 1.0, {"": "waiting for input of F0 language.0"}),
        (2, 5.0, {"": "B0 language.1", "backward": "microbatch 0", "runs": "4.00 s to 6.00 s"}),
    ],
)
def test_hover_tells_of_the_task_under_the_pointer(row, at_s, expected, small):
    small.move(*place(small, row=row, at_s=at_s))

    shown = tip(small)

    assert shown is not None
    assert {name: shown.get(name) for name in expected} == expected


def test_tip_goes_with_the_pointer(small):
    small.move(*place(small, row=0, at_s=0.5))
    small.move(5, 5)

    assert tip(small) is None


def test_wheel_zooms_around_the_pointer(small):
    assert visible_s(small) == (0.0, pytest.approx(STEP_S + ONCE_S, abs=0.1))

    small.wheel(*place(small, row=1, at_s=10.0), by=-300)

    begin, end = visible_s(small)
    # A turn by 300 makes the span e^-0.75 = 0.47 as long, and leaves 10 s where it was.
    assert end - begin == pytest.approx(0.472 * (STEP_S + ONCE_S), rel=0.01)
    assert (10.0 - begin) / (end - begin) == pytest.approx(10.0 / (STEP_S + ONCE_S), abs=0.01)


def test_drag_moves_and_double_click_shows_all(small):
    small.click("#in")
    before = visible_s(small)
    small.drag(place(small, row=1, at_s=10.0), place(small, row=1, at_s=8.0))
    after = visible_s(small)
    small.click("#all")

    # Zoomed in twice, two seconds of the whole are one of the visible span.
    assert after[0] - before[0] == pytest.approx(1.0, abs=0.05)
    assert visible_s(small)[0] == 0.0


def test_keys_zoom_move_and_go_from_task_to_task(small):
    small.script("document.getElementById('scroll').focus()")
    for key in ("+", "+", "\ue014"):  # the right arrow
        small.press(key)
    begin, end = visible_s(small)
    assert end - begin == pytest.approx((STEP_S + ONCE_S) / 4, abs=0.05)
    assert begin == pytest.approx((0.375 + 0.05) * (STEP_S + ONCE_S), abs=0.05)

    for key in ("0", "\ue013", "\ue013", "\ue015", "n", "n"):  # up to the first row, one down
        small.press(key)
    assert tip(small)[""] == "F1 language.0"
    assert small.text("#spoken").startswith("F1 language.0, forward microbatch 1")


def test_memory_of_a_row_is_what_stays_and_what_its_live_tasks_hold(small):
    # language.1 has weights 30, optimizer 10 GiB and between its passes 10 GiB of a task.
    small.script("document.getElementById('scroll').focus()")
    for key in ("\ue015", "\ue015"):
        small.press(key)
    x, _ = place(small, row=2, at_s=5.0)
    top, height = small.script(
        "document.getElementById('memory').scrollIntoView({block: 'center'});"
        "const box = document.getElementById('memory').getBoundingClientRect();"
        "return [box.top, box.height]"
    )
    small.move(x, top + height / 2)

    shown = tip(small)
    assert shown[""] == "50.0 GiB at 5.00 s"
    assert shown["activations of language"] == "10.0 GiB"
    assert small.text("#memory-title") == "Memory of a GPU of rank 3"


def test_step_of_the_homogeneous_layout_stands_below_the_plans(window, pages):
    window.open(pages / "compared.html")
    window.settle()

    # The fourth row is of ranks 0 and 1 in the homogeneous layout, where F0 of vision takes 2 s.
    window.move(*place(window, row=3, at_s=1.0))

    shown = tip(window)
    assert (shown[""], shown["on"], shown["takes"]) == ("F0 vision.0", "ranks 0–1", "2.00 s")


def test_layouts_are_shown_together_or_one_alone(window, pages):
    window.open(pages / "compared.html")
    window.settle()
    rows = "return JSON.parse(document.getElementById('rows').dataset.places).length"

    counts = []
    for choice in ("all", "0", "1"):
        window.click(f"#layouts [data-choice='{choice}']")
        counts.append(window.script(rows))

    # Three kinds of ranks, and the two stages of the homogeneous layout.
    assert counts == [5, 3, 2]


def test_page_of_one_layout_offers_no_choice_of_layouts(small):
    assert small.script("return getComputedStyle(document.getElementById('layouts')).display") == (
        "none"
    )


def test_measured_tasks_stand_below_the_simulated_ones(window, pages):
    window.open(pages / "traced.html")
    window.settle()

    # vision is on ranks 0 and 1, each with a row of its own.
    window.move(*place(window, row=1, at_s=0.6, within=0.75))

    shown = tip(window)
    assert (shown[""], shown["on"]) == ("F0 vision.0", "rank 1")
    assert (shown["measured"], shown["simulated"]) == ("0.00 s to 1.25 s", "0.00 s to 1.00 s")
    assert "measured +25.0%" in window.text("#numbers")


def test_durations_of_tasks_stand_beside_the_predicted_ones(window, pages):
    window.open(pages / "traced.html")

    cells = window.script(
        "return [...document.querySelectorAll('#durations tbody tr')].map((row) =>"
        " [...row.cells].map((cell) => cell.textContent))"
    )

    assert cells[1] == ["language.0", "1.00 s", "1.25 s", "+25.0%", "2.00 s", "2.50 s", "+25.0%"]


def test_page_follows_the_systems_colours_and_the_button(small):
    paper = "return getComputedStyle(document.documentElement).backgroundColor"
    small.prefer("dark")
    dark = small.script(paper)
    small.click("#theme")
    light = small.script(paper)
    small.prefer("light")

    assert (dark, light) == ("rgb(20, 24, 27)", "rgb(255, 255, 255)")


def test_critical_path_is_drawn_on_demand(small):
    before = small.screenshot()
    small.click("#chain")

    assert small.script("return document.getElementById('chain').ariaPressed") == "true"
    assert small.screenshot() != before


def test_page_of_4096_ranks_is_small_and_folds_equal_ranks(window, pages):
    assert (pages / "large.html").stat().st_size < 3_000_000

    window.open(pages / "large.html")
    window.settle()
    window.move(*place(window, row=0, at_s=1.0))

    assert tip(window)["on"] == "ranks 0–127"
    # 32 stages of each layout.
    assert window.script("return JSON.parse(rows.dataset.places).length") == 64


def test_page_without_a_prediction_says_that_durations_are_an_example(window, pages):
    window.open(pages / "bare.html")

    assert window.text("#source").startswith("Durations are an example")
    assert window.script("return document.getElementById('peaks-section').hidden") is True


def test_replicas_that_run_apart_have_times_of_their_own(window, tmp_path):
    write_page(filled_plan(), tmp_path / "page.html", name="plan.yaml")
    window.open(tmp_path / "page.html")
    window.settle()

    # The first language stage starts as soon as it can; the second one has to wait for it.
    first = {}
    for row in (0, 1):
        window.script("document.getElementById('scroll').focus()")
        for key in ("\ue013", "\ue013", *(["\ue015"] * row), "n", "n"):
            window.press(key)
        first[row] = tip(window)[""]

    assert first == {0: "F0 language.0", 1: "F1 vision.0"}


EVIL = """</script><script>document.title='evil'</script><b id="evil">"&'</b>"""


def test_lanes_of_a_rank_have_rows_and_its_memory_is_that_of_all(window, tmp_path):
    write_page(lanes_plan(), tmp_path / "lanes.html", name="lanes.yaml")
    window.open(tmp_path / "lanes.html")
    window.settle()

    found = []
    for row in range(4):
        window.move(*place(window, row=row, at_s=6.0))
        found.append((tip(window)[""], tip(window)["on"]))
    # At 6 s vision is in its third task on both ranks; rank 0 runs F1, rank 1 the first backward.
    assert found == [
        ("F2 vision.0", "rank 0"),
        ("F1 language.0", "rank 0"),
        ("F2 vision.0", "rank 1"),
        ("B0 language.1", "rank 1"),
    ]
    assert "vision forward (32 SMs)" in window.text("#legend")

    window.click("#rows")
    x, _ = place(window, row=0, at_s=6.0)
    top, height = window.script(
        "document.getElementById('memory').scrollIntoView({block: 'center'});"
        "const box = document.getElementById('memory').getBoundingClientRect();"
        "return [box.top, box.height]"
    )
    window.move(x, top + height / 2)
    # Three tasks of vision of 1 GiB each, and two of language of 5.
    shown = tip(window)
    assert (shown["activations of vision"], shown["activations of language"]) == (
        "3.0 GiB",
        "10.0 GiB",
    )


def test_text_of_a_plan_is_never_markup(window, tmp_path):
    plan = compared_plan()
    vision = replace(plan.modules["vision"], trainable=(EVIL,))
    baseline = {**plan.predicted["baseline"], "layout": EVIL}
    predicted = {**plan.predicted, "baseline": baseline}
    plan = replace(plan, modules={**plan.modules, "vision": vision}, predicted=predicted)
    write_page(plan, tmp_path / "page.html", name=EVIL)
    window.log("browser")
    window.open(tmp_path / "page.html")
    window.settle()

    assert window.text("#name") == EVIL
    assert EVIL in window.text("#plan")
    assert EVIL in window.text("#breakdown")
    assert window.script("return document.getElementById('evil')") is None
    assert window.script("return document.title") == f"{EVIL}: vision + language on 4 ranks"
    assert window.log("browser") == []


def test_show_writes_the_page(tmp_path, window):
    plan, output = tmp_path / "plan.yaml", tmp_path / "report.html"
    plan.write_text(PLAN + PREDICTED + TASK_BYTES)

    status = main(["show", str(plan), "-o", str(output)])

    window.open(output)
    assert status == 0
    assert window.text("#name") == "plan.yaml"
