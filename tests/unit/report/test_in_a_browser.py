"""The report as a browser shows it: from disk, no request, no error; tabs, zoom and reading by mouse and keyboard."""

from pathlib import Path

import pytest

from amclip_ds.report.page import write_report
from tests.unit.report.browser import Browser, needs_chromium
from tests.unit.report.runs import eventful, long

pytestmark = needs_chromium
SHOWN = (
    "[...document.querySelectorAll('.panel')].filter(p => p.offsetParent).map(p => p.querySelector('h2').textContent)"
)
VIEW = "document.querySelector('#run0-loss svg.NONE, #run0-loss .area > svg').getAttribute('viewBox')"
WIDE = "document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report([eventful(folder / "run")], folder / "report.html")
    return folder / "report.html"


def test_tabs_zoom_and_reading(file: Path, tmp_path: Path) -> None:
    with Browser(file) as page:
        assert page.value(SHOWN) == ["Overview"]
        page.value("document.querySelector('[role=tab]').focus()")
        page.press("ArrowRight")
        assert page.value(SHOWN) == ["Curves"] and page.value("document.activeElement.textContent") == "Curves"

        whole = page.value(VIEW)
        page.value("document.querySelector('#run0-loss .area').focus()")
        page.press("End")
        assert page.value("document.querySelector('#run0-loss .reading').textContent").startswith("step 100: 5.4")
        page.press("+", "+")
        assert page.value(VIEW) != whole, "plus zooms"
        other = page.value("document.querySelector('#run0-lr .area > svg').getAttribute('viewBox')")
        assert other.split()[0::2] == page.value(VIEW).split()[0::2], "the other curves show the same steps"
        page.press("0", "0")
        assert page.value(VIEW) == whole

        page.value("document.querySelector('#run0-loss').scrollIntoView()")
        box = page.value(
            "(r => [r.left, r.right, r.top])(document.querySelector('#run0-loss .area').getBoundingClientRect())"
        )
        page.drag(box[0] + (box[1] - box[0]) / 2, box[1] - 2, box[2] + 50)
        left, _, width, _ = map(float, page.value(VIEW).split())
        assert 4900 < left < 5100 and 4800 < width < 5100, "what is dragged over is shown"
        ticks = page.value("[...document.querySelectorAll('#run0-loss .xs span')].map(s => +s.textContent)")
        assert min(ticks) >= 50 and max(ticks) <= 100, "the axis follows"
        page.value("document.querySelector('#run0-terms .toggle').click()")
        assert page.value("document.querySelectorAll('#run0-terms .line.off').length") == 1

        page.value("document.querySelector('#run0-tab2').click()")
        page.value("document.querySelector('[data-kind=incident]').click()")
        assert page.value("[...document.querySelectorAll('tr.incident')].every(row => row.hidden)")
        page.value("document.querySelector('#run0-tab7').click()")
        page.value(
            "s => 0, (s => { s.value = 'optim.lr'; s.dispatchEvent(new Event('input')) })"
            "(document.querySelector('.search'))"
        )
        rows = page.value("[...document.querySelectorAll('#run0-settings tbody tr')].filter(r => !r.hidden).length")
        assert 1 <= rows <= 3
        assert page.errors == []
        assert all(url.startswith(("file:", "data:")) for url in page.requests), page.requests


DRAWN = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
LABELS = (
    "[...document.querySelectorAll('.xs')].filter(e => e.offsetParent).map(e => [...e.children].map("
    "s => (r => [r.left, r.right])(s.getBoundingClientRect())))"
)
CUT = """[...document.querySelectorAll('th')].filter(e => e.offsetParent && e.firstChild).filter(e => {
  const range = document.createRange(), text = e.firstChild;
  return [...text.data.matchAll(/\\S+/g)].some(word => {
    range.setStart(text, word.index);
    range.setEnd(text, word.index + word[0].length);
    return range.getClientRects().length > 1;
  });
}).map(e => e.textContent)"""


@pytest.mark.parametrize("width", [1200, 400])
def test_the_steps_of_an_axis_are_apart_and_no_head_is_broken(width: int, tmp_path: Path) -> None:
    """Of a run with numbers of six digits, at the first sight of each part."""
    write_report([long(tmp_path / "run", every=1000)], tmp_path / "report.html")
    with Browser(tmp_path / "report.html", width, 800) as page:
        for tab in (0, 1, 3):
            page.value(f"document.querySelector('#run0-tab{tab}').click()")
            page.ask("Runtime.evaluate", expression=DRAWN, awaitPromise=True)
            for axis in page.value(LABELS):
                assert len(axis) >= 2 and all(left[1] + 2 < right[0] for left, right in zip(axis, axis[1:])), axis
            assert page.value(CUT) == []
        assert page.errors == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_is_wider_than_the_screen(file: Path, width: int, dark: bool) -> None:
    with Browser(file, width, 800, dark=dark) as page:
        for tab in range(8):
            page.value(f"document.querySelector('#run0-tab{tab}').click()")
            assert page.value(WIDE) <= width, tab
        ground = page.value("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(21, 23, 26)") == dark and page.errors == []


def test_without_scripts_and_on_paper_everything_is_there(file: Path) -> None:
    with Browser(file, script=False) as page:
        pdf = page.pdf()
        assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    with Browser(file) as page:
        page.ask("Emulation.setEmulatedMedia", media="print")
        assert len(page.value(SHOWN)) == 8, "on paper no part is hidden behind a tab"
        assert page.errors == []


def test_every_control_has_a_name_and_every_table_a_head(file: Path) -> None:
    with Browser(file) as page:
        assert (
            page.value(
                "[...document.querySelectorAll('button, input')].filter(e => !(e.textContent.trim() || "
                "e.getAttribute('aria-label') || e.closest('label'))).length"
            )
            == 0
        )
        assert page.value("[...document.querySelectorAll('table')].every(t => t.querySelector('th[scope=col]'))")
        assert page.value("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0 && e.ariaLabel)")
        assert page.value("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == page.value(
            "document.querySelectorAll('[id]').length"
        ), "no id twice"
