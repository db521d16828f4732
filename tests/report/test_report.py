"""Reports: the numbers against a plain twin, the files, and the page as Chromium renders it."""

import json
import re
import shutil
import subprocess
from html import unescape

import numpy as np
import pytest

from hf_moecal import report
from hf_moecal.report.routing import by_configuration, collect_routing, expert_load, fragile


def make_table(n=400, *, temperature=1.0, classes=2, seed=0, routing=True):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, classes))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probs = np.exp(logits / temperature)
    table = {
        "id": np.arange(n),
        "label": (true.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1),
        "probs": probs / probs.sum(axis=1, keepdims=True),
        "group": np.where(np.arange(n) % 3 == 0, "tweets", "movie"),
        "hard": rng.random(n) < 0.3,
    }
    if routing:
        table |= {"routing_entropy": rng.random(n), "disagreement": rng.random(n), "regret": rng.random(n),
                  "expert_ids": rng.integers(0, 4, (n, 2)),
                  "text": np.array([f"a <b>sentence</b> & {i}" for i in range(n)])}  # fmt: skip
    return table


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    tables = {"ERM | raw": make_table(temperature=0.5), "Robust": make_table(temperature=1.3)}
    hard = {"Robust": make_table(temperature=0.8, routing=False)}
    path = report.write_report(tables, folder, title="A <title>", hard="hard", hard_routed=hard)
    return path, tables


def test_a_second_report_leaves_no_picture_of_the_first(tmp_path):
    first, second = make_table(), {**make_table(routing=False), "group": ["reviews"] * 400}
    report.write_report({"a": first}, tmp_path, title="first")
    (tmp_path / "reliability_mine.png").write_bytes(b"a user's own")
    assert (tmp_path / "reliability_movie.png").is_file() and list(tmp_path.glob("gap_by_*.png"))
    report.write_report({"a": second}, tmp_path, title="second")
    assert {path.name for path in tmp_path.glob("*.png")} == {"reliability_reviews.png", "reliability_mine.png"}


def test_bins_against_a_plain_loop():
    table = make_table(classes=5)
    data = report.reliability(table, bins=10)
    confidence, right = table["probs"].max(axis=1), table["probs"].argmax(axis=1) == table["label"]
    for i in range(10):
        mine = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        assert data["count"][i] == mine.sum()
        if mine.any():
            assert data["accuracy"][i] == pytest.approx(right[mine].mean())
            assert data["confidence"][i] == pytest.approx(confidence[mine].mean())
            assert data["low"][i] <= data["accuracy"][i] <= data["high"][i]
        else:
            assert data["accuracy"][i] is data["low"][i] is None
    json.dumps(data, allow_nan=False)


def test_band_of_many_rows_is_that_of_resampled_rows():
    table = make_table(5000)
    data = report.reliability(table, bins=5)
    confidence, right = table["probs"].max(axis=1), table["probs"].argmax(axis=1) == table["label"]
    rng, drawn = np.random.default_rng(1), []
    for _ in range(500):
        rows = rng.integers(0, 5000, 5000)
        mine = confidence[rows] > 0.8
        drawn.append(right[rows][mine].mean())
    assert [data["low"][4], data["high"][4]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.003)


def test_a_bin_of_few_cases_gets_a_wide_band():
    data = report.reliability({"label": [0, 0, 1], "probs": [[0.95, 0.05], [0.75, 0.25], [0.25, 0.75]]}, bins=10)
    assert data["accuracy"][9] == 1 and data["low"][9] < 0.5 and data["high"][9] == 1


def test_logs_without_probabilities_have_no_likelihood():
    table = {"label": [0, 1, -100], "prediction": [0, 0, 1], "confidence": [0.9, 0.6, 0.8]}
    scores = report.reliability(table)["scores"]
    assert scores["n"] == 2 and scores["nll"] is None and scores["signed_gap"] == pytest.approx(0.25)


def test_files_and_figures(written):
    path, tables = written
    metrics = json.loads((path.parent / "metrics.json").read_text())
    wanted = [(s, u, m) for u in ("all", "hard") for s in ("tweets", "movie") for m in tables]
    assert [(r["set"], r["subset"], r["method"]) for r in metrics["rows"]] == wanted
    table, row = tables["Robust"], metrics["rows"][-1]
    mine = (table["group"] == "movie") & table["hard"]
    right = table["probs"][mine].argmax(axis=1) == table["label"][mine]
    assert row["n"] == mine.sum() and row["accuracy"] == pytest.approx(right.mean())
    assert row["nll"] == pytest.approx(-np.log(table["probs"][mine, table["label"][mine]]).mean())
    assert row["signed_gap"] == pytest.approx(table["probs"][mine].max(axis=1).mean() - right.mean())
    text = path.read_text()
    pictures = re.findall(r"\]\((\S+\.png)\)", text)
    assert len(pictures) == 6 and all((path.parent / name).stat().st_size > 10_000 for name in pictures)
    for line in text.splitlines():  # every row has as many cells as the head, whatever a method is called
        if line.startswith("| ERM"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 9
    assert not list(path.parent.glob("*.partial"))


def test_terminal_table(written):
    metrics = json.loads((written[0].parent / "metrics.json").read_text())
    lines = report.format_table(metrics).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("*" in line for line in lines) >= 5 and "movie, hard subset" in lines


def test_an_empty_hard_subset_is_shown_as_such(tmp_path):
    table = make_table(60)
    table["hard"] = table["hard"] & (table["group"] == "movie")
    path = report.write_report({"m": table}, tmp_path, title="t", hard="hard")
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert [row["n"] for row in rows if (row["set"], row["subset"]) == ("tweets", "hard")] == [0]
    assert "| m | – | – |" in path.read_text()


def test_configuration_parts_against_a_plain_loop():
    table = make_table(500)
    parts = by_configuration(table, "disagreement")
    order = np.argsort(table["disagreement"])
    residual = table["probs"].max(axis=1) - (table["probs"].argmax(axis=1) == table["label"])
    assert [part["n"] for part in parts] == [100] * 5
    assert [part["gap"] for part in parts] == pytest.approx([residual[o].mean() for o in np.array_split(order, 5)])
    assert len(by_configuration({**table, "disagreement": np.zeros(500)}, "disagreement")) == 1


def test_expert_load_and_fragile_examples():
    table = make_table(300)
    load = expert_load(table)
    tweets = table["expert_ids"][table["group"] == "tweets"]
    assert load["tweets"] == pytest.approx([(tweets == k).mean() for k in range(4)])
    worst = fragile(table, examples=5)
    assert len(worst) == 5 and all(row["prediction"] != row["label"] for row in worst)
    table["disagreement"][worst[3]["id"]] = table["regret"][worst[3]["id"]] = 2
    table["probs"][worst[3]["id"]] = np.eye(2)[worst[3]["prediction"]]
    assert fragile(table, examples=1)[0]["id"] == worst[3]["id"]


def test_errors():
    with pytest.raises(ValueError, match="at least one|needs at least one"):
        report.collect({}, title="t")
    with pytest.raises(ValueError, match="no column 'agreement_low'"):
        report.collect({"m": make_table(20)}, title="t", hard="agreement_low")
    with pytest.raises(ValueError, match="No row .* has a label"):
        report.reliability({"label": [-100], "probs": [[0.5, 0.5]]})
    with pytest.raises(ValueError, match="not among the methods"):
        collect_routing({"m": make_table(20)}, hard_routed={"other": make_table(20)})


def test_the_page_needs_nothing_else_and_escapes(written):
    page = (written[0].parent / "report.html").read_text()
    assert not re.search(r"<script|<link|@import|url\((?!#)|(?:src|href)=\"(?!#)", page)
    assert "A &lt;title&gt;" in page and "a &lt;b&gt;sentence&lt;/b&gt; &amp;" in page
    assert "#0072b2" not in page.split("</style>")[1]  # colours follow the style sheet, also in the dark
    for section in ("Reliability diagrams", "routing configuration", "Hard against soft", "Expert load", "fragile"):
        assert section in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    references = set(re.findall(r"#([\w-]+)[)\"]", page.split("</style>")[1]))
    assert references <= set(ids)
    identical = {i for i in ids if ids.count(i) > 1}  # clip paths and markers are named by their content
    assert all(re.match(r"[pm][0-9a-f]{8,}", i) for i in identical)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found (apt-get install chromium)")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)
# Run inside the page: text that overlaps other text of its figure or leaves it, and contrast below WCAG's 4.5.
_CHECK = """
<script>
const faults = [];
const light = c => { const v = c.map(x => { x /= 255; return x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4; });
  return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
const rgb = s => s.match(/[\\d.]+/g).slice(0, 3).map(Number);
const paper = rgb(getComputedStyle(document.body).backgroundColor);
const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
  return (x + .05) / (y + .05); };
if (document.documentElement.scrollWidth > innerWidth + 1) faults.push("page scrolls sideways");
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect(), name = svg.getAttribute("aria-label");
  if (frame.width < 100 || frame.height < 40) faults.push(name + ": not drawn");
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect(), t]);
  texts.forEach(([text, box, node], i) => {
    if (box.left < frame.left - 1 || box.right > frame.right + 1 ||
        box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
      faults.push(name + ": cut " + text);
    for (const [other, b] of texts.slice(i + 1))
      if (box.left < b.right - 1 && b.left < box.right - 1 &&
          box.top < b.bottom - 1.5 && b.top < box.bottom - 1.5)
        faults.push(name + ": " + text + " overlaps " + other);
    if (!name.startsWith("Expert load") && contrast(rgb(getComputedStyle(node).fill), paper) < 4.5)
      faults.push(name + ": contrast of " + text);
  });
}
for (const node of document.querySelectorAll("p, td, th, h1, h2, h3, figcaption"))
  if (contrast(rgb(getComputedStyle(node).color), paper) < 4.5)
    faults.push("contrast of " + node.textContent.slice(0, 40));
document.title = "faults:" + JSON.stringify(faults);
</script>
"""


def rendered_faults(page, folder, width):
    """What [`_CHECK`] finds when Chromium shows the page in a window of this width."""
    (folder / "page.html").write_text(page.replace("</body>", _CHECK + "</body>"))
    frame = folder / "frame.html"  # a frame gives the width of a phone, which a headless window cannot have
    size = f'width="{width}" height="3000"'
    frame.write_text(f'<iframe src="page.html" {size} onload="document.title=frames[0].document.title"></iframe>')
    flags = [*_FLAGS.split(), "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}"]
    more = ["--window-size=1400,3100", "--virtual-time-budget=4000", "--dump-dom", frame.as_uri()]
    dom = subprocess.run([CHROMIUM, *flags, *more], capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>faults:(.*?)</title>", dom, re.S)
    assert found, dom[:500]
    return json.loads(unescape(found.group(1)))


@needs_chromium
@pytest.mark.parametrize(
    ("width", "dark"), [(1100, False), (1100, True), (390, False)], ids=["light", "dark", "phone"]
)
def test_the_page_as_rendered(written, tmp_path, width, dark):
    """No text overlaps, is cut, or is faint; the page never scrolls sideways; every figure is drawn."""
    page = (written[0].parent / "report.html").read_text()
    if dark:  # headless Chromium has no switch for the scheme that the style sheet sees
        page = page.replace("(prefers-color-scheme: dark)", "(min-width: 1px)")
    assert rendered_faults(page, tmp_path, width) == []


@needs_chromium
@pytest.mark.parametrize(
    ("style", "fault"),
    [
        ("svg text { font-size: 26px !important }", "overlaps"),
        ("svg text { font-size: 60px !important }", "cut"),
        ("p { color: #999 !important }", "contrast"),
        ("svg text { fill: #aaa !important }", "contrast"),
        ("h1 { width: 3000px }", "sideways"),
        ("svg { width: 50px !important }", "not drawn"),
    ],
)
def test_the_check_sees_faults(written, tmp_path, style, fault):
    page = (written[0].parent / "report.html").read_text().replace("</style>", style + "</style>")
    assert any(fault in found for found in rendered_faults(page, tmp_path, 1100))


@needs_chromium
def test_the_page_prints(written, tmp_path):
    pdf = tmp_path / "report.pdf"
    flags = [*_FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={pdf}"]
    subprocess.run([CHROMIUM, *flags, (written[0].parent / "report.html").as_uri()], timeout=120, check=True,
                   capture_output=True)  # fmt: skip
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
    assert 3 <= pages <= 12


def test_weights_count_as_rows_that_are_there_so_often():
    table, times = make_table(60, routing=False), np.arange(60) % 4
    repeated = {name: np.repeat(values, times, axis=0) for name, values in table.items()}
    weighted, other = (
        {row["set"]: row for row in report.collect({"one": rows}, title="", bins=5)["rows"]}
        for rows in ({**table, "sample_weight": times.astype(float)}, repeated)
    )
    for name in other:
        for figure in ("accuracy", "confidence", "ece", "nll", "brier", "signed_gap"):
            assert weighted[name][figure] == pytest.approx(other[name][figure], abs=1e-12), figure
        mine, theirs = (rows[name]["diagram"]["accuracy"] for rows in (weighted, other))
        assert [x for x in mine if x is not None] == pytest.approx([x for x in theirs if x is not None])
