"""The report: what it says, that it is well-formed and loads nothing, and how a real browser shows it."""

import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from project_imports import ROOT

from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.flow import convert
from gptoss_nf4.report.chart import BOTTOM, HEIGHT, TOP, Series, bar_chart, line_chart, number_text
from gptoss_nf4.report.facts import Facts, gather
from gptoss_nf4.report.page import charts, page
from gptoss_nf4.report.series import plotted
from gptoss_nf4.source.model import Model
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.digests import write_digests
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import write_json

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "br", "hr", "img", "input", "link"}
LAYERS, CHARTS = 2, 6
SMOKE = {
    "model": "tiny",
    "dtype": "float16",
    "engine": "cpu",
    "positions": 3,
    "top1_agreement": 2 / 3,
    "worst_logprob_difference": 0.75,
    "generations": [{"prompt": "2 + 2 =", "text": "</td><script>alert(1)</script> \x16 ☃", "distinct_tokens": 9}],
}
POSITIONS = [
    {"prompt": "2 + 2 =", "position": position, "difference": difference, "same_choice": same}
    for position, difference, same in ((1, 0.25, True), (2, 0.75, False), (3, 0.5, True))
]
BENCHMARK = {
    "model": "tiny",
    "dtype": "float16",
    "engine": "gpu",
    "load_seconds": 4.25,
    "peak_host_bytes": 3054604288,
    "peak_gpu_bytes": 21e9,
    "input_tokens": 64,
    "output_tokens": 32,
    "batches": [
        {
            "batch": batch,
            "output_tokens_per_second": speed,
            "median_time_to_first_token_ms": 90.5,
            "median_time_per_output_token_ms": 23.75,
        }
        for batch, speed in ((1, 41.5), (4, 98.25), (8, 223.5))
    ],
}


@pytest.fixture(scope="module")
def converted_project(tmp_path_factory) -> Path:
    """The embedded model converted and proved; no other metrics. Do not write into it."""
    root = tmp_path_factory.mktemp("report")
    artifacts = Artifacts(root / "artifacts/tiny")
    found = convert(Model(name="tiny", kind="embedded"), artifacts, RequantOptions(), "float16")
    write_json(root / "metrics/exactness.json", {"model": "tiny", "mode": "exact", "dtype": "float16"} | found)
    write_digests(artifacts.checkpoint, artifacts.digest_list)
    return root


@pytest.fixture
def project(converted_project, tmp_path) -> Path:
    return Path(shutil.copytree(converted_project, tmp_path / "project"))


def facts_of(project: Path, adapters: tuple[str, ...] = ()) -> Facts:
    return gather(Artifacts(project / "artifacts/tiny"), project / "metrics", LAYERS, list(adapters))


def complete(project: Path) -> Facts:
    """As after every stage, with adapters, one of them left out by smoke-adapter."""
    artifacts = Artifacts(project / "artifacts/tiny")
    scaling = {"residual_scale": 2**-6, "became_subnormal": 881, "largest_relative_error": 3.05e-07}
    dtypes = {"dtype": "float16", "source_dtypes": {"BF16": 49}, "cast_values": 141656, "scaling": scaling}
    write_json(project / "metrics/dtypes.json", {"model": "tiny", **dtypes, "overflow": 0, "underflow": 0, "non_finite": 0})
    write_json(project / "metrics/smoke.json", SMOKE)
    write_json(project / "metrics/benchmark.json", BENCHMARK)
    write_json(artifacts.logprobs, POSITIONS)
    for layer in range(LAYERS):
        write_json(artifacts.seconds("requant", layer), {"seconds": 1.5 + layer})
    write_json(artifacts.seconds("prove"), {"seconds": 7.25})
    for name in ("mine", "theirs"):
        modules = {"model.layers.0.self_attn.q_proj": {"relative_size": 0.125}, "other": {"relative_size": None}}
        about = {"base": {"statement": "trained on this base"}, "modules": modules, "largest_rank": 16}
        write_json(artifacts.adapter(name), {"name": name, **about})
    compared = {"positions": 3, "top1_agreement": 1.0, "worst_logprob_difference": 0.0625}
    write_json(project / "metrics/adapters/mine.json", {"model": "tiny", "adapter": compared, "base": compared})
    write_json(project / "metrics/adapters/theirs.json", {"model": "tiny", "left_out": "adapters belong elsewhere"})
    return facts_of(project, ("mine", "theirs"))


class Read(HTMLParser):
    """A page's elements and text. It fails where an element is not closed, or by another's end."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        return len([a for t, a in self.elements if t == tag and attributes.items() <= a.items()])

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


# What it says


def test_a_complete_report_tells_what_the_stages_found(project):
    facts = complete(project)
    assert facts.missing == []
    read = Read(page(facts))
    exactness = read_json_object(project / "metrics/exactness.json")
    for told in (
        f"Proved exact. {exactness['compared']:,} values of {exactness['source_tensors']} tensors",
        "0 are different",
        "embedded model, written by this project",
        "unknown: the source names none",
        "141,656",
        "66.67 %",  # equal first choices
        "98.25",  # tokens per second
        "21.00 GB",
        "trained on this base",
        "adapters belong elsewhere",
        "7.25",
        *facts.digests.values(),
    ):
        assert told in read.words, told
    assert "What is missing here" not in read.words
    assert read.count("figure") == CHARTS
    assert read.count("circle") >= len(POSITIONS)


def test_a_report_of_a_few_stages_says_what_is_missing(project):
    facts = facts_of(project, ("mine",))
    read = Read(page(facts))
    stages = [part.stage for part in facts.missing]
    assert stages == ["normalize", "smoke", "benchmark", "adapter@mine", "smoke-adapter@mine"]
    assert all(f"Run dvc repro {stage} ." in read.words for stage in stages)
    assert "Proved exact." in read.words
    nothing = gather(Artifacts(project / "artifacts/none"), project / "nowhere", LAYERS, [])
    assert "Not proved yet." in Read(page(nothing)).words
    assert next(part.stage for part in nothing.missing) == "fetch"
    assert plotted([], [], [], [], None) == {name: [] for name in ("seconds", "size", "absmax", "logprobs", "speed")}


def test_of_nothing_all_is_missing_and_each_names_its_stage(tmp_path):
    facts = gather(Artifacts(tmp_path / "artifacts/tiny"), tmp_path / "metrics", LAYERS, ["mine"])
    assert [(each.what, each.stage) for each in facts.missing] == [
        ("The source", "fetch"),
        ("Size and absmax of each layer", "requant"),
        ("The dtypes", "normalize"),
        ("The settings of the result", "assemble"),
        ("The proof", "prove"),
        ("The comparison with transformers", "smoke"),
        ("The speed", "benchmark"),
        ("What adapter mine changes", "adapter@mine"),
        ("Adapter mine compared with PEFT", "smoke-adapter@mine"),
    ]


def test_a_proof_of_other_settings_is_missing(project):
    """The result was assembled anew since: its config.json is another."""
    complete(project)
    config = project / "artifacts/tiny/checkpoint/config.json"
    config.write_text(config.read_text().replace('"float16"', '"bfloat16"'))
    facts = facts_of(project, ("mine", "theirs"))
    assert not facts.proved
    assert [(each.what, each.stage) for each in facts.missing] == [("The proof of what is here now", "prove")]


def test_metrics_of_another_model_are_missing(project):
    complete(project)
    write_json(project / "metrics/smoke.json", SMOKE | {"model": "gpt_oss_20b"})
    facts = facts_of(project)
    assert facts.smoke is None
    assert facts.positions == []
    assert "smoke" in [part.stage for part in facts.missing]


def test_a_failed_proof_is_told(project):
    exactness = read_json_object(project / "metrics/exactness.json") | {"different": 3}
    write_json(project / "metrics/exactness.json", exactness)
    (project / "artifacts/tiny/checkpoint.sha256").unlink()
    facts = facts_of(project)
    assert not facts.proved
    assert "The proof failed." in Read(page(facts)).words


def test_numbers_are_those_of_the_files(project):
    facts = facts_of(project)
    checkpoint = Checkpoint(project / "artifacts/tiny/checkpoint")
    absmax = checkpoint.torch("model.layers.1.mlp.experts.w2.weight.absmax").double()
    (point,) = [p for p in facts.absmax if p["layer"] == 1 and p["series"] == "mlp.experts.w2"]
    assert point["mean"] == pytest.approx(float(absmax.mean()), rel=1e-9)
    assert (point["smallest"], point["largest"]) == (float(absmax.min()), float(absmax.max()))
    sizes = sum(info.bytes for name, info in checkpoint.tensors.items() if info.file.name == "layer-0.safetensors")
    assert sum(p["megabytes"] for p in facts.sizes if p["layer"] == 0) == pytest.approx(sizes / 1e6)


# Strangers' names, and what it loads


def test_names_are_text_and_nothing_is_loaded(project):
    hostile = '"><script>alert("x")</script><img src=http://example.com/x onerror=alert(1)>'
    facts = complete(project)
    manifest = facts.manifest | {"source": {"kind": "local", "path": hostile}, "notes": [hostile], "layout": hostile}
    html = page(replace(facts, name=hostile, manifest=manifest))
    read = Read(html)
    assert read.count("script") == read.count("img") == read.count("link") == read.count("iframe") == 0
    assert escape(hostile).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in html
    loading = {"src", "href", "srcset", "action", "data", "poster", "style"}
    assert not [a for _, attributes in read.elements for a in attributes if a in loading or a.startswith("on")]
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import|http", style)


def test_it_can_be_read_without_eyes(project):
    """Each chart has a name, its content in words and as a table; headings follow one another; ids are unique."""
    read = Read(page(complete(project)))
    ids = [a["id"] for _, a in read.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in (e for e in read.elements if e[0] == "svg" and e[1].get("role") == "img"):
        assert set(attributes["aria-labelledby"].split()) <= set(ids)
    assert read.count("svg", role="img") == read.count("desc") == read.count("figure") == CHARTS
    assert read.count("html", lang="en") == read.count("h1") == read.count("main") == 1
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    assert read.count("table") == read.count("caption")


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(c * 2 for c in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast_in_light_in_dark_and_on_paper():
    """WCAG 2.2: 4.5 for text. The series, which are lines, would need 3."""
    css = (ROOT / "gptoss_nf4/report/templates/page.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(schemes) == 3
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", scheme))
        for ground in ("paper", "box"):
            light = luminance(colours[ground])
            for name in colours.keys() - {"paper", "box", "line"}:
                high, low = sorted((light, luminance(colours[name])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


# Charts


def test_every_chart_says_what_it_shows(project):
    said = {chart.key: (chart.title, chart.x_label, chart.y_label) for chart in charts(complete(project)).values()}
    assert said == {
        "sizes": ("Size by layer", "layer", "MB"),
        "absmax-mean": ("Mean absmax by layer", "layer", "mean absmax"),
        "absmax-largest": ("Largest absmax by layer", "layer", "largest absmax"),
        "seconds": ("Seconds by layer", "layer", "seconds"),
        "positions": ("Difference in log-probability by position", "token", "largest difference"),
        "speed": ("Output tokens per second by requests in flight", "requests in flight", "tokens per second"),
    }


def test_series_beyond_the_styles_begin_again_with_the_first():
    series = [Series(str(number), ((0, number), (1, number))) for number in range(8)]
    for chart in (bar_chart("k", "t", "x", "y", series), line_chart("k", "t", "x", "y", series)):
        assert [each.style for each in chart.drawn] == [0, 1, 2, 3, 4, 5, 0, 1]
        assert [each.name for each in chart.drawn] == [each.name for each in series]


def test_bars_are_named_by_their_place():
    for count, every in ((3, 1), (12, 1), (13, 2), (36, 3)):
        chart = bar_chart("k", "t", "x", "y", [Series("s", tuple((place, 1) for place in range(count)))])
        assert [tick.text for tick in chart.x_ticks] == [str(place) for place in range(0, count, every)]
        middles = [bar.left + bar.width / 2 for bar in chart.drawn[0].bars]
        assert [tick.at for tick in chart.x_ticks] == pytest.approx(middles[::every], abs=0.02)


def test_bars_stand_on_one_another_and_on_the_axis():
    chart = bar_chart("k", "t", "layer", "MB", [Series("a", ((0, 1.0), (1, 2.0))), Series("b", ((0, 3.0), (1, 2.0)))])
    (a0, a1), (b0, b1) = (series.bars for series in chart.drawn)
    assert a0.top + a0.height == a1.top + a1.height == HEIGHT - BOTTOM
    assert b0.top + b0.height == pytest.approx(a0.top)
    assert b0.height == pytest.approx(3 * a0.height, abs=0.05)
    assert b0.top == pytest.approx(b1.top) == pytest.approx(TOP)
    assert chart.rows == (("0", "1", "3"), ("1", "2", "2"))


def test_a_bar_that_is_not_there_takes_no_room():
    chart = bar_chart("k", "t", "layer", "MB", [Series("a", ((0, 1.0),)), Series("b", ((0, 3.0), (1, 4.0)))])
    (_, b1) = chart.drawn[1].bars
    assert b1.top == pytest.approx(TOP)
    assert b1.top + b1.height == pytest.approx(HEIGHT - BOTTOM)
    assert chart.rows == (("0", "1", "3"), ("1", "", "4"))


@pytest.mark.parametrize(
    ("points", "x_ticks"),
    [
        (((0, 1.0), (1, 2.0)), ["0", "1"]),
        (((0, 0.0),), ["0"]),
        (((1, 5.0), (4, 9.0), (8, 2.0)), ["2", "4", "6", "8"]),
        (((0.5, 1e-9), (0.75, 3e-9)), ["0.5", "0.55", "0.6", "0.65", "0.7", "0.75"]),
    ],
)
def test_axes_have_round_values_and_hold_every_point(points, x_ticks):
    chart = line_chart("k", "t", "x", "y", [Series("a", points)])
    assert [tick.text for tick in chart.x_ticks] == x_ticks
    assert all(TOP <= y <= HEIGHT - BOTTOM for x, y in chart.drawn[0].points)
    heights = [tick.at for tick in chart.y_ticks]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == len(heights)


def test_an_axis_of_nothing_but_zeros_has_a_length():
    chart = line_chart("k", "t", "x", "y", [Series("a", ((0, 0.0),))])
    assert [tick.text for tick in chart.y_ticks] == ["0", "0.2"]


def test_without_numbers_there_is_no_chart():
    assert line_chart("k", "t", "x", "y", []) is None
    assert line_chart("k", "t", "x", "y", [Series("a", ((1, float("nan")),))]) is None
    assert bar_chart("k", "t", "x", "y", [Series("a", ())]) is None
    assert (number_text(1234567), number_text(0.123456), number_text(3.0)) == ("1,234,567", "0.1235", "3")


# In a browser


def shown(html: str, directory: Path, width: int, *flags: str) -> dict:
    """What chromium measures of the page in a window `width` pixels wide; it can reach no network."""
    frame = directory / "frame.html"
    script = """
    <script>addEventListener("load", () => {
      const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
      const box = e => e.getBoundingClientRect();
      document.body.textContent = JSON.stringify({
        overflow: root.scrollWidth - root.clientWidth,
        background: getComputedStyle(page.body).backgroundColor,
        charts: [...page.querySelectorAll("figure .scroll > svg")].map(e => [box(e).width, box(e).height]),
        font: Math.min(...[...page.querySelectorAll("svg text")].map(e => box(e).height)),
        outside: [...page.querySelectorAll("figure svg[role=img] :is(circle, rect, text)")].filter(e => {
          const inner = box(e), outer = box(e.closest("svg"));
          return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
        }).length,
        requests: page.defaultView.performance.getEntriesByType("resource").length,
      });
    })</script>"""
    frame.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body><iframe style="width:{width}px;height:2000px;border:0" '
        f'srcdoc="{escape(html)}"></iframe>{script}'
    )
    profile = f"--user-data-dir={directory / 'profile'}"
    alone = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", profile, *flags]
    command = [CHROMIUM, *alone, "--virtual-time-budget=3000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<body>(\{.*\})</body>", done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return dict(json.loads(found[1]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [360, 1000])
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(project, tmp_path, width):
    found = shown(page(complete(project)), tmp_path, width)
    assert found["overflow"] == 0, "the page itself must not scroll sideways"
    assert len(found["charts"]) == CHARTS
    assert all(chart_width > 300 and height > 150 for chart_width, height in found["charts"])
    assert found["font"] >= 8
    assert found["outside"] == 0
    assert found["requests"] == 0
    assert found["background"] == "rgb(255, 255, 255)"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_shows_it_in_dark(project, tmp_path):
    found = shown(page(complete(project)), tmp_path, 1000, "--blink-settings=preferredColorScheme=0")
    assert found["background"] == "rgb(21, 24, 28)"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_prints_it(project, tmp_path):
    file, printed = tmp_path / "report.html", tmp_path / "report.pdf"
    file.write_text(page(complete(project)))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", profile, f"--print-to-pdf={printed}", file.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pages = len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes()))
    assert 2 <= pages <= 12
