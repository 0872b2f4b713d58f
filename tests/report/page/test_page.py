"""The sweep's page in a real browser: table, filters, plot, runs, comparison, and no network."""

from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import launched, opened

from moe_lab.files import PAGE
from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.report.figures import DEFAULT_VALUES, FIGURES, figure_text
from moe_lab.report.frame import read_reports
from moe_lab.report.page import page
from moe_lab.report.page.columns import _format, axes
from moe_lab.report.page.page import write_page
from moe_lab.report.report import read_report, write_report
from moe_lab.types import UserError

HOSTILE = '</script><img src=x onerror="alert(1)"><script>alert(2)</script><!-- <b>&amp;'
# One red point, as small as a PNG can be.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGP4z8DwHwAFAAH/iZk9HQAAAABJRU5ErkJg"
    "gg=="
)
NUM_RUNS, FAILED, RUNNING, BARE = 12, 4, 7, 11


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


def figures(variant: str, loss: float, share: float) -> dict[str, Any]:
    found = {
        "parameters": int(16_375_728_128 * share),
        "parameter_ratio": share,
        "bytes": int(32_751_456_256 * share),
        "stock": share == 1,
        "eval/arc/acc_norm": 0.62 - loss / 3,
        "eval/average": 0.7025 - loss / 2,
        "eval/routing/top_k": 6.0,
        "kl": loss,
        "prefill_speedup": 2 - share,
        "checkpoint": f"outputs/store/{variant}/checkpoint",
    }
    return {f"{variant}/{key}": value for key, value in found.items()}


def write_run(root: Path, number: int, random_: random.Random) -> None:
    """One run's folder: every third by each metric; one failed, one running, one a bare report."""
    folder = root / str(number)
    folder.mkdir(parents=True)
    metric, share = ("reap", "ean", "frequency")[number % 3], (0.9, 0.75, 0.5)[number // 3 % 3]
    one: dict[str, Any] = {"status": "ok", "error": None, "model": "tiny", "method": "prune"}
    one |= {"metric": metric, "ratio": round(1 - share, 3), "prune/replacement": "nothing"}
    one |= {"seed": number // 6, "commit": f"{'abc123' * 6}abcd", "sweep": "s", "job": HOSTILE}
    one |= {"fingerprint/model": "530238ea716d", "seconds/plan": 12.25, "cached/plan": number > 0}
    if number == FAILED:
        one |= {"status": "failed", "error": f"ValueError: {HOSTILE}\nsecond line"}
    elif number == RUNNING:
        one |= {"status": "running"}
    else:
        one |= figures("dense", 0.0, 1.0)
        loss = (1.1 - share) * random_.uniform(0.5, 1.5)
        one |= figures("compressed", loss, share) | figures("finetuned", loss / 2, share)
    write_report(folder, one)
    if number not in (FAILED, RUNNING, BARE):
        write_details(folder, metric, one["ratio"])


def write_details(folder: Path, metric: str, ratio: float) -> None:
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(f"method: prune\nnote: '{HOSTILE}'\n")
    (folder / ".hydra" / "hydra.yaml").write_text(
        "hydra:\n  mode: MULTIRUN\n  runtime:\n    config_sources:\n"
        "    - path: own conf\n      schema: file\n      provider: command-line\n"
    )
    overrides = ["+tiny=criteria", f"metric={metric}", "'calibration.files=[a b.jsonl]'"]
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {one}\n" for one in overrides))
    (folder / "run.log").write_text(
        "".join(f"10:00 run {folder.name} step {step}\n" for step in range(500))
    )
    kept = list(range(8))[int(8 * ratio) :]
    scores = [0.123456789 * (expert + 1) for expert in range(8)]
    edits = [
        {"index": 1, "name": "layers.1.mlp", "edit": "prune", "kept": kept, "scores": scores},
        {"index": 2, "name": "layers.2.mlp", "edit": "condense", "experts": [5, 2],
         "gates": [0.25, 0.125], "shared_gate": 1.0, "divergence": [0.3, 0.2, 0.1]},
        {"index": 3, "name": "layers.3.mlp", "edit": "merge", "kept": [0, 4],
         "groups": [[0, 1, 2, 3], [4, 5, 6, 7]], "weights": [[0.25] * 4] * 2},
        {"index": 4, "name": "layers.4.mlp", "edit": "drop_layer", "scores": [0.5]},
    ]  # fmt: skip
    plan = {"statistics": "intact model", "layer_order": [2, 1], "layer_divergence": [0.1, 0.3]}
    (folder / "plan.json").write_text(json.dumps(plan | {"searched": [], "layers": edits}))
    rows = [f"{layer},{expert},10,{0.5 + expert}" for layer in (1, 2) for expert in range(8)]
    (folder / "usage.csv").write_text("\n".join(["layer,expert,tokens,usage", *rows]))
    curve = [
        {"phase": "experts", "step": step, "tokens": 9 * step, "loss": 3 - step / 10}
        for step in range(9)
    ]
    curve[-1]["validation_loss"] = float("nan")
    (folder / "curve.jsonl").write_text("\n".join(map(json.dumps, curve)) + '\n{"phase": "exp')
    (folder / "diagnosis").mkdir()
    (folder / "diagnosis" / "usage.png").write_bytes(PNG)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweeps") / "criteria & more"
    random_ = random.Random(0)
    for number in range(NUM_RUNS):
        write_run(root, number, random_)
    (root / "plots").mkdir()
    (root / "plots" / "accuracy.png").write_bytes(PNG)
    (root / "table.md").write_text("| |")
    write_page(root)
    return root


@pytest.fixture
def shown(browser: Any, sweep: Path) -> Iterator[Any]:
    with opened(browser, sweep / PAGE, viewport={"width": 1280, "height": 900}) as found:
        yield found


def runs_of(shown: Any) -> list[str]:
    """The runs in the table, from top to bottom."""
    return shown.eval_on_selector_all(".runs tbody tr", "rows => rows.map(row => row.dataset.run)")


def column_of(shown: Any, key: str) -> list[str]:
    return shown.evaluate(
        """key => {
          const heads = [...document.querySelectorAll('.runs thead th')];
          const place = heads.findIndex((head) => head.dataset.key === key);
          return [...document.querySelectorAll('.runs tbody tr')]
            .map((row) => row.children[place].textContent);
        }""",
        key,
    )


def go(shown: Any, address: str) -> None:
    shown.evaluate("address => { location.hash = address }", address)
    shown.wait_for_selector("#other-view h1")


def test_the_head_and_the_table_tell_the_sweep(shown: Any, sweep: Path) -> None:
    assert shown.title() == shown.inner_text("h1") == sweep.name
    facts = shown.inner_text("#facts")
    assert "10 of 12 runs ok" in facts and "2 failed or unfinished" in facts
    assert "abc123abc123" in facts
    assert shown.get_attribute("#facts a", "href") == "./table.md"
    assert runs_of(shown) == [str(number) for number in range(NUM_RUNS)]
    keys = shown.eval_on_selector_all("th[data-key]", "heads => heads.map(h => h.dataset.key)")
    expected = ["run", "status", "metric", "ratio", "seed"]
    assert keys == [
        *expected,
        *(
            key
            for key in DEFAULT_VALUES
            if not any(word in key for word in ("memory", "decode", "vllm", "quantized"))
        ),
    ]
    assert "it has not ended" in column_of(shown, "status")[RUNNING]
    assert "second line" in column_of(shown, "status")[FAILED]
    assert shown.locator(".gallery img").count() == 1


def test_cells_are_as_in_the_reports_own_tables(shown: Any, sweep: Path) -> None:
    frame = read_reports(sweep)
    for key in (key for key in DEFAULT_VALUES if key in frame):
        assert column_of(shown, key) == [figure_text(key, value) for value in frame[key]]


KEYS = "eval/average kl parameters bytes prefill_speedup eval/x/acc stock eval/routing/top_k other"


def test_the_page_writes_numbers_as_python_does(shown: Any) -> None:
    random_ = random.Random(1)
    numbers = [0.0, 1.0, 0.7025, 0.0625, 999.949, 999.95, 1e6, 2.5, -0.25, 123456.7]
    numbers += [random_.uniform(-1, 1) * 10 ** random_.randint(-4, 5) for _ in range(200)]
    for key in KEYS.split():
        given = {"numbers": numbers, "format": _format(key)}
        code = "({numbers, format}) => numbers.map((one) => shown(one, format))"
        assert shown.evaluate(code, given) == [figure_text(key, number) for number in numbers]


def test_a_click_on_a_head_sorts(shown: Any, sweep: Path) -> None:
    frame = read_reports(sweep)
    key = "compressed/kl"
    there = frame[key].dropna()
    missing = [name for name in frame.index if name not in there.index]
    head = shown.locator(f'th[data-key="{key}"]')
    assert head.get_attribute("aria-sort") == "none"
    for order, descending in (("ascending", False), ("descending", True)):
        head.locator("button").click()
        expected = sorted(there.index, key=there.get, reverse=descending)
        assert runs_of(shown) == [*expected, *missing]
        assert head.get_attribute("aria-sort") == order
    shown.locator('th[data-key="run"] button').click()  # 10 after 9
    assert runs_of(shown) == [str(number) for number in range(NUM_RUNS)]
    shown.locator('th[data-key="metric"] button').press("Enter")
    assert column_of(shown, "metric") == sorted(column_of(shown, "metric"))


FILTERS: dict[str, Callable[[Any], bool]] = {
    "metric=reap": lambda one: one["metric"] == "reap",
    "metric!=reap ratio=0.5": lambda one: one["metric"] != "reap" and one["ratio"] == 0.5,
    "FREQUENCY": lambda one: one["metric"] == "frequency",
    "compressed/kl<0.2": lambda one: (one["compressed/kl"] or 9) < 0.2,
    "finetuned/eval/average>60%": lambda one: (one["finetuned/eval/average"] or 0) > 0.6,
    "ratio>=0.25": lambda one: one["ratio"] >= 0.25,
    "status=failed": lambda one: one["status"] == "failed",
    '"second line"': lambda one: "second line" in (one["error"] or ""),
}


def test_the_filter_takes_words_and_comparisons(shown: Any, sweep: Path) -> None:
    frame = read_reports(sweep)
    for text, wanted in FILTERS.items():
        shown.fill("#filter", text)
        expected = [name for name, one in frame.iterrows() if wanted(one)]
        assert 0 < len(expected) < NUM_RUNS
        assert runs_of(shown) == expected, text
        assert shown.inner_text("#count") == f"{len(expected)} of {NUM_RUNS} runs"


def test_selects_filter_and_columns_can_be_chosen(shown: Any, sweep: Path) -> None:
    frame = read_reports(sweep)
    shown.get_by_label("metric", exact=True).select_option("ean")
    shown.get_by_label("seed", exact=True).select_option("1")
    wanted = frame[(frame["metric"] == "ean") & (frame["seed"] == 1)]
    assert runs_of(shown) == list(wanted.index)
    shown.fill("#filter", "nothing=1")
    assert "no key is named nothing" in shown.inner_text("#count")
    shown.get_by_text("columns", exact=True).click()
    shown.locator('[data-column="compressed/parameters"]').check()
    expected = [figure_text("parameters", value) for value in wanted["compressed/parameters"]]
    assert column_of(shown, "compressed/parameters") == expected
    boxes = shown.locator("[data-column]").count()
    assert boxes == len(frame.columns) - 1  # status is always there


def test_a_link_opens_a_run_and_back_returns(shown: Any) -> None:
    shown.fill("#filter", "metric=reap")
    shown.click('.runs tr[data-run="3"] a')
    shown.wait_for_selector("#other-view h1")
    assert shown.inner_text("h1:visible") == "Run 3" and shown.title().startswith("Run 3")
    text = shown.inner_text("#other-view")
    for expected in ("6 of 8, without 0 1", "shared 1", "0+1+2+3", "drop_layer", "intact model",
                     "git checkout abc123", "530238ea716d", "12.2 s"):  # fmt: skip
        assert expected in text
    command = (
        "python run.py --config-dir 'own conf' +tiny=criteria metric=reap "
        "'calibration.files=[a b.jsonl]' hydra.mode=RUN"
    )
    assert command in text
    shown.get_by_text("composed config").click()
    shown.get_by_text("log", exact=True).click()
    shown.locator("pre", has_text="step 499").wait_for()  # which is built when it is opened
    texts = " ".join(shown.locator("pre").all_inner_texts())
    assert HOSTILE in texts and "step 499" in texts
    assert "step 199\n" not in texts  # the last 300 lines
    assert shown.locator("svg.heat").count() == 2 and shown.locator("#curve svg").count() == 1
    assert shown.locator("#other-view img").count() == 1
    assert shown.get_attribute("text=plan.json", "href") == "./3/plan.json"
    shown.go_back()
    shown.wait_for_selector("#other-view", state="hidden")
    assert runs_of(shown) == ["0", "3", "6", "9"]  # as it was left


def test_differences_to_dense(shown: Any, sweep: Path) -> None:
    one = read_report(sweep / "3")
    go(shown, "#run=3")
    row = shown.locator("tr", has=shown.get_by_text("average accuracy", exact=True))
    points = 100 * (one["compressed/eval/average"] - one["dense/eval/average"])
    expected = f"{figure_text('eval/average', one['compressed/eval/average'])} (−{abs(points):.1f})"
    assert row.locator("td").nth(1).inner_text() == expected
    row = shown.locator("tr", has=shown.get_by_text("parameters", exact=True))
    assert row.locator("td").nth(1).inner_text() == "12.3 B (−25.0 %)"


def test_a_run_with_nothing_but_a_report(shown: Any) -> None:
    for number in (RUNNING, BARE, FAILED):
        go(shown, f"#run={number}")
        shown.get_by_text(f"Run {number}", exact=True).wait_for()
        text = shown.inner_text("#other-view")
        assert "no plan" in text and "neither config nor log" in text
    assert HOSTILE in text


def test_a_wrong_address_is_told(shown: Any) -> None:
    for address in ("#run=99", "#compare=1", "#run=%E0%A4%A"):
        go(shown, address)
        shown.wait_for_function(
            "document.querySelector('#other-view h1').textContent.includes('no such run')"
        )


def test_two_ticked_runs_are_compared(shown: Any, sweep: Path) -> None:
    for number in (5, 0, 3):  # a third takes the first one's place
        shown.check(f'.runs tr[data-run="{number}"] input')
    assert not shown.is_checked('.runs tr[data-run="5"] input')
    shown.click("#compare a")
    shown.wait_for_selector("#other-view h1")
    assert shown.inner_text("h1:visible") == "Runs 0 and 3"
    assert shown.evaluate("location.hash") == "#compare=0,3"
    settings = shown.get_by_role("region", name="settings that differ").inner_text()
    assert re.findall(r"^(\S+)\t", settings, re.MULTILINE) == ["setting", "ratio"]
    one, other = (read_report(sweep / name) for name in "03")
    row = shown.locator("tr", has=shown.get_by_text("KL to dense, nats per token (compressed)"))
    change = other["compressed/kl"] - one["compressed/kl"]
    assert row.locator("td").nth(2).inner_text() == f"{change:+.4f}".replace("-", "−")
    plans = shown.get_by_role("region", name="plans by layer").locator("tbody tr")
    assert plans.nth(0).inner_text().split("\t")[3:] == ["2 3 4 5 6 7", "0 1", "–", "75 %"]
    assert plans.nth(1).inner_text().split("\t")[3:] == ["5 2", "–", "–", "100 %"]
    assert shown.locator("svg.heat").count() == 4


def points_of(shown: Any, variant: str | None = None) -> list[dict[str, str]]:
    only = f'[data-variant="{variant}"]' if variant else ':not([data-variant="dense"])'
    return shown.eval_on_selector_all(f".point{only}", "nodes => nodes.map(n => ({...n.dataset}))")


def front(points: list[tuple[float, float]], high_x: bool, high_y: bool) -> list[bool]:
    """Which points no other one dominates, by comparing all pairs."""
    signs = (1 if high_x else -1, 1 if high_y else -1)
    scored = [(signs[0] * x, signs[1] * y) for x, y in points]
    return [not any(a >= x and b >= y and (a > x or b > y) for a, b in scored) for x, y in scored]


AXES = (
    ("parameter_ratio", "eval/average", False, True),
    ("prefill_speedup", "kl", True, False),
    ("bytes", "eval/arc/acc_norm", False, True),
)


def test_the_plot_has_the_points_and_their_front(shown: Any, sweep: Path) -> None:
    shown.fill("#filter", "metric!=ean")
    frame = read_reports(sweep)
    frame = frame[(frame["metric"] != "ean") & (frame["status"] == "ok")]
    for x, y, high_x, high_y in AXES:
        shown.get_by_label("x", exact=True).select_option(x)
        shown.get_by_label("y", exact=True).select_option(y)
        expected = [
            (name, variant, one[f"{variant}/{x}"], one[f"{variant}/{y}"])
            for name, one in frame.iterrows()
            for variant in ("compressed", "finetuned")
        ]
        found = points_of(shown)
        told = [(one["run"], one["variant"], float(one["x"]), float(one["y"])) for one in found]
        assert sorted(told) == sorted(expected)
        best = front([(x, y) for _, _, x, y in told], high_x, high_y)
        assert [one["front"] == "true" for one in found] == best
        assert shown.locator("path.front").count() == 2  # the line and its legend
        assert len(points_of(shown, "dense")) == 1


def test_the_plot_proposes_the_axes_that_python_names(shown: Any) -> None:
    options = "nodes => nodes.map((node) => [node.value, node.textContent])"
    x = shown.eval_on_selector_all("#pareto-choices select[aria-label=x] option", options)
    y = shown.eval_on_selector_all("#pareto-choices select[aria-label=y] option", options)
    known = axes()
    there = set(figures("dense", 0.0, 1.0)) | {"dense/ratio"}
    costs = [name for name in known["costs"] if f"dense/{name}" in there]
    qualities = [name for name, _ in y]
    assert [name for name, _ in x] == [*costs, "seed", *qualities]
    assert not set(qualities) & set(costs) and "kl" in qualities
    assert all(known["titles"].get(name, name) == text for name, text in [*x, *y])


def test_no_script_has_figures_of_its_own() -> None:
    for name in page.SCRIPTS:
        script = (Path(page.__file__).parent / f"{name}.js").read_text(encoding="utf-8")
        quoted = set(re.findall(r"""["'`/]([\w/]+)["'`]""", script))
        # A format's kind, and an element of HTML.
        assert quoted & {figure.name for figure in FIGURES} <= {"bytes", "form"}, name


def test_the_front_keeps_equal_points_and_drops_beaten_ones(shown: Any) -> None:
    random_ = random.Random(2)
    points = [(random_.randint(0, 9), random_.randint(0, 9)) for _ in range(60)]
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        code = """([points, a, b]) => {
          const given = points.map(([x, y]) => ({ x, y }));
          const front = paretoFront(given, a, b);
          return given.map((point) => front.includes(point));
        }"""
        found = shown.evaluate(code, [points, *signs])
        assert found == front(points, signs[0] > 0, signs[1] > 0)


def test_a_point_tells_and_opens_its_run(shown: Any) -> None:
    point = shown.locator('.point[data-run="8"][data-variant="compressed"]')
    point.focus()
    assert "run 8 · compressed" in shown.inner_text("#tip")
    assert "metric=frequency" in shown.inner_text("#tip")
    point.blur()
    assert shown.is_hidden("#tip")
    point.hover(force=True)
    assert shown.is_visible("#tip")
    point.click(force=True)
    shown.wait_for_selector("#other-view h1")
    assert re.fullmatch(r"Run \d+", shown.inner_text("h1:visible"))
    shown.go_back()
    shown.locator('.point[tabindex="0"]').focus()
    shown.keyboard.press("ArrowRight")
    run = shown.evaluate("document.activeElement.dataset.run")
    shown.keyboard.press("Enter")
    shown.wait_for_selector("#other-view h1")
    assert shown.inner_text("h1:visible") == f"Run {run}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser: Any, sweep: Path, scheme: str) -> None:
    size = {"width": 390, "height": 844}
    with opened(browser, sweep / PAGE, viewport=size, color_scheme=scheme) as shown:
        for address in ("", "#run=3", f"#run={FAILED}", "#compare=0,3"):
            if address:
                go(shown, address)
            wide = shown.evaluate("document.scrollingElement.scrollWidth - innerWidth")
            assert wide <= 0, address


def test_equal_texts_and_pictures_lie_in_the_page_once(sweep: Path) -> None:
    text = (sweep / PAGE).read_text()
    assert text.count('id="picture-') == 1
    assert text.count("</script>") == text.count("<script")
    assert HOSTILE not in text and "onerror" in text
    first = write_page(sweep).read_bytes()
    assert write_page(sweep).read_bytes() == first  # nothing of the moment


def test_pictures_beyond_the_cap_are_links(
    browser: Any, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (sweep / PAGE).read_bytes()
    monkeypatch.setattr(page, "PICTURE_BYTES", 10)
    write_page(sweep, "other title")
    with opened(browser, sweep / PAGE) as shown:
        assert shown.title() == "other title"
        assert shown.get_attribute("text=accuracy.png", "href") == "./plots/accuracy.png"
    (sweep / PAGE).write_bytes(before)


def test_a_single_run_and_an_empty_folder(browser: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no"):
        write_page(tmp_path)
    write_report(tmp_path, {"status": "ok", "model": "tiny", "seed": 0, "dense/kl": 0.0})
    with opened(browser, write_page(tmp_path)) as shown:
        assert runs_of(shown) == ["."]
        go(shown, "#run=.")
        assert shown.inner_text("h1:visible") == "Run ."


def test_a_plan_by_which_hidden_units_go_shows_widths(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    write_report(tmp_path / "0", {"status": "ok", "model": "tiny", "method": "prune"})
    edits = (
        NarrowExperts(0, "a", widths=(3,), scores=(2.0, 1.0)),
        NarrowExperts(1, "b", widths=(4, 0), scores=(2.0, 0.0)),
    )
    (tmp_path / "0" / "plan.json").write_text(Plan(edits).to_text())
    with opened(browser, write_page(tmp_path), "#run=0") as shown:
        shown.wait_for_selector(".map")
        titles = shown.locator(".map h3").all_inner_texts()
        assert titles == ["Hidden units that stay", "Scores of the hidden units, summed by expert"]
        assert shown.locator("svg.heat path.gone, svg.heat path.kept").count() == 0
        told = shown.inner_text("body")
        assert "narrow to 3" in told and "narrow to 0 to 4" in told
        assert "removed" not in told


def test_a_thousand_runs_are_laid_out_as_they_are_looked_at(browser: Any, tmp_path: Path) -> None:
    """How fast that is, experiments/bench/thousand_reports.py measures."""
    random_ = random.Random(3)
    for number in range(1000):
        write_run(tmp_path, number, random_)
    with opened(browser, write_page(tmp_path)) as shown:
        first = runs_of(shown)
        assert 50 <= len(first) < 1000
        click = shown.locator('th[data-key="compressed/kl"] button').click
        click()
        ascending = runs_of(shown)
        assert ascending != first
        # Not by the mouse: to bring the button into view lays out more rows, which moves it.
        shown.get_by_text("show the other").evaluate("button => button.click()")
        assert len(runs_of(shown)) == 1000 and runs_of(shown)[: len(ascending)] == ascending
