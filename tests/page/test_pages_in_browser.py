"""The pages in a browser: nothing is fetched, nothing complains, and keys and clicks do it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lazymerge.page.plan_page import write_plan_page
from lazymerge.page.report_document import ReportDocument, ReportTensor, Series
from lazymerge.page.report_page import write_report_page

from browsing import Tab, browser, find_browser
from page_plans import LAYERS, small_plan, tensors

PROGRAM = find_browser()

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no chromium (Debian: apt-get install chromium), nor LAZYMERGE_CHROMIUM"
)

PHONE = 360
FOCUSED = "document.activeElement.getAttribute('aria-label')"
PANEL = "document.querySelector('#tensor').textContent"

ROWS = [[second / 2, second << 8, second << 7, 90_000_000 + second] for second in range(40)]
MANIFEST = {
    "timeline": {
        "columns": ["seconds", "bytes_read", "bytes_written", "resident_bytes"],
        "rows": ROWS,
    }
}


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    assert PROGRAM is not None
    with browser(PROGRAM) as opened:
        yield opened


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_plan_page(small_plan(folder), folder / "plan.html", MANIFEST)
    return folder / "plan.html"


HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(1)</script>"


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    numbers = [
        ReportTensor(name, tensor.numel(), {"delta norm of B": 0.1 + place, "cosine to C": None})
        for place, (name, tensor) in enumerate(tensors().items())
    ]
    numbers.append(ReportTensor(HOSTILE, 1, {"cosine to C": -0.5}))
    series = (Series("delta norm of B"), Series("cosine to C", "low"))
    report = ReportDocument(HOSTILE, ("a", HOSTILE, "c"), "a", series, tuple(numbers), (HOSTILE,))
    write_report_page(report, path, MANIFEST)
    return path


def opened(tab: Tab, path: Path, **options: int) -> None:
    """Opens a page, which must ask for no other file and complain of nothing."""
    tab.complaints.clear()
    tab.requests.clear()
    tab.open(path, **options)
    assert tab.requests == [path.resolve().as_uri()]
    assert tab.complaints == []


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, 1280])
def test_pages_open(
    tab: Tab, plan_file: Path, report_file: Path, width: int, is_dark: bool
) -> None:
    for path in (plan_file, report_file):
        opened(tab, path, width=width, dark=is_dark)
        assert tab.ask("document.documentElement.scrollWidth") <= width
        ground = tab.ask("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 24, 28)" if is_dark else "rgb(255, 255, 255)")
        assert tab.ask("document.querySelectorAll('.chart canvas').length") >= 2
        assert tab.ask("document.images.length") == 0


def test_clicks_lead_to_a_tensor(tab: Tab, plan_file: Path) -> None:
    opened(tab, plan_file)
    layer = "[...document.querySelectorAll('.node.layer')][2]"
    assert tab.ask("document.querySelector('.node.stack').getAttribute('aria-expanded')") == "true"
    tab.click(layer)
    tab.click("[...document.querySelectorAll('.node.part')].at(-1)")
    tab.click(
        "[...document.querySelectorAll('.node.tensor')].find(e => /up_proj/.test(e.ariaLabel))"
    )
    told = tab.ask(PANEL)
    assert "model.layers.2.mlp.experts.0.up_proj.weight" in told
    for word in ("One of 3", "Read A", "Read B", "Read C", "BF16 16 × 8", "sign_consensus"):
        assert word in told
    assert "Reduce magnitude_thresholds" in told
    assert "weight 0.25, density 0.5" in told
    assert "bytes " in told
    assert "model-0000" in told
    tab.ask("document.querySelector('#tensor select').selectedIndex = 2")
    tab.ask("document.querySelector('#tensor select').dispatchEvent(new Event('change'))")
    assert "experts.2.up_proj" in tab.ask("document.querySelector('#tensor-name').textContent")
    assert tab.complaints == []


def test_search_and_keys_lead_to_a_tensor(tab: Tab, plan_file: Path) -> None:
    opened(tab, plan_file)
    tab.ask("document.querySelector('#search').focus()")
    tab.press(*"3 q_proj")
    assert tab.ask("document.querySelectorAll('#found li').length") == 1
    tab.press("ArrowDown", "Enter")
    assert "model.layers.3.self_attn.q_proj.weight" in tab.ask(PANEL)
    assert tab.ask(FOCUSED) == "self_attn.q_proj.weight, one tensor"
    tab.press("Escape")
    assert tab.ask("document.activeElement.getAttribute('aria-expanded')") == "false"
    tab.press("ArrowLeft")
    assert str(tab.ask(FOCUSED)).startswith("model.layers.3,")
    tab.press("ArrowLeft", "ArrowDown", "Enter")
    assert str(tab.ask(FOCUSED)).startswith("model.layers.4,")
    assert tab.ask("document.activeElement.getAttribute('aria-expanded')") == "true"
    tab.press("Home", "+", "-", "0")
    assert tab.ask(FOCUSED) == "lm_head.weight, one tensor"
    assert tab.complaints == []


def test_the_whole_page_can_be_tabbed_through(tab: Tab, plan_file: Path) -> None:
    opened(tab, plan_file)
    reached = set()
    for _ in range(40):
        tab.press("Tab")
        reached.add(
            tab.ask(
                "(e => e.id || e.className.baseVal || (e.tagName === 'TD' ? 'cell' : "
                "e.className))(document.activeElement)"
            )
        )
    assert {"theme", "search", "cell", "chart"} <= reached
    assert any(str(name).startswith("node") for name in reached)


def test_the_map_tells_its_values(tab: Tab, plan_file: Path) -> None:
    opened(tab, plan_file)
    rows = tab.ask("[...document.querySelectorAll('.heat tbody th')].map(e => e.textContent)")
    assert sorted(rows) == ["Binput_layernorm", "Bmlp", "Bself_attn"]
    first = f"[...document.querySelectorAll('.heat tbody tr')][{rows.index('Bself_attn')}]"
    tab.click(f"{first}.querySelector('td')")
    said = "document.activeElement.closest('.grid-of').querySelector('.readout').textContent"
    assert tab.ask(said) == "weight of B, layer 0, self_attn: 0"
    tab.press("ArrowRight")
    assert tab.ask(said) == "weight of B, layer 1, self_attn: 0.25"
    tab.press("End")
    assert tab.ask(said) == f"weight of B, layer {LAYERS - 1}, self_attn: 1"
    assert tab.ask(FOCUSED) == tab.ask(said)


def test_charts_tell_their_values(tab: Tab, plan_file: Path) -> None:
    opened(tab, plan_file)
    tab.ask("document.querySelector('#memory .chart').focus()")
    tab.press("ArrowRight", "ArrowRight")
    said = tab.ask("document.querySelector('#memory .readout').textContent")
    assert "reserved" in said
    assert "measured 85.8 MiB" in said


def test_the_theme_can_be_chosen(tab: Tab, plan_file: Path) -> None:
    opened(tab, plan_file, dark=True)
    for theme in ("light", "dark", "auto"):
        tab.click("document.querySelector('#theme')")
        assert tab.ask("document.documentElement.dataset.theme") == theme
        ground = tab.ask("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if theme == "light" else "rgb(20, 24, 28)")
    assert tab.complaints == []


def test_a_report(tab: Tab, report_file: Path) -> None:
    opened(tab, report_file)
    assert tab.ask("document.querySelectorAll('#drawings .chart').length") == 3
    assert HOSTILE in tab.ask("document.querySelector('h1').textContent")
    assert HOSTILE in tab.ask("document.querySelector('#outliers').textContent")
    tab.click("document.querySelector('#drawings .heat td')")
    listed = "[...document.querySelectorAll('#listed tbody code')].map(e => e.textContent)"
    assert tab.ask(listed) == ["model.layers.0.self_attn.q_proj.weight"]
    tab.ask("document.querySelector('#series').selectedIndex = 1")
    tab.ask("document.querySelector('#series').dispatchEvent(new Event('change'))")
    assert "No tensor in layers" in tab.ask("document.querySelector('#drawings').textContent")
    assert tab.complaints == []
