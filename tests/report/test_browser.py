"""The page in a real browser: Chromium shows every chart, in both themes, at both widths, and asks for nothing else.

``tox -e browser`` says how Chromium is installed.
"""

import json
import shutil
from functools import partial

import pytest

from tests.pages import HOSTILE, report

pytest.importorskip("altair", reason="the page needs the extra: pip install '.[report]'")
pytest.importorskip("vl_convert", reason="the page needs the extra: pip install '.[report]'")
pytest.importorskip("selenium", reason="selenium is not installed: tox -e browser")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from lowmem.report.page import render_report_html
from lowmem.report.theme import DARK, LIGHT

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WIDTHS = {"phone": 360, "desk": 1280}
THEMES = {"light": LIGHT, "dark": DARK}
CHARTS = 9


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed: tox -e browser says how")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pages")
    for name, content in {"plain": report(), "hostile": report(HOSTILE)}.items():
        (directory / f"{name}.html").write_text(render_report_html(content), encoding="utf8")
    return directory


@pytest.fixture(params=[(theme, width) for theme in THEMES for width in WIDTHS], ids="-".join)
def view(request, browser, pages):
    """Open the page in a theme at a width, and return both with what the browser logged of it."""
    theme, width = request.param
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what was logged before
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    size = {"width": WIDTHS[width], "height": 800, "deviceScaleFactor": 1, "mobile": width == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((pages / "plain.html").as_uri())
    return THEMES[theme], WIDTHS[width], browser


def requests(browser):
    """Return the addresses that the browser asked for, but the page itself."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("file:", "data:", "about:"))]


def rgb(colour):
    return "rgb({}, {}, {})".format(*(int(colour[at : at + 2], 16) for at in (1, 3, 5)))


def boxes(browser, selector):
    script = """return [...document.querySelectorAll(arguments[0])].map(e => {
        const box = e.getBoundingClientRect();
        return {left: box.left, right: box.right, width: box.width, height: box.height};
    }).filter(box => box.width > 0 && box.height > 0)"""
    return browser.execute_script(script, selector)


def test_no_errors_and_no_requests(view):
    _, _, browser = view
    assert browser.get_log("browser") == []
    assert requests(browser) == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_every_chart_is_visible_and_nothing_is_wider_than_the_screen(view):
    _, width, browser = view
    charts = boxes(browser, "figure .chart svg")
    assert len(charts) == CHARTS
    for chart in charts:
        assert chart["left"] >= 0
        assert chart["right"] <= width
        assert chart["width"] >= 240  # two thirds of a phone
        assert chart["height"] >= 40
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_no_text_of_a_chart_is_cut_off_or_too_small(view):
    _, width, browser = view
    texts = boxes(browser, "figure .chart svg text")
    assert len(texts) > 50
    assert all(text["left"] >= 0 and text["right"] <= width for text in texts)
    assert min(text["height"] for text in texts) >= 10


def test_names_beside_bars_do_not_overlap_the_bars(view):
    _, _, browser = view
    script = """return [...document.querySelectorAll('.chart svg')].filter(e => e.getBoundingClientRect().width)
        .flatMap(e => [...e.querySelectorAll('.role-axis-label text')].map(t => t.getBoundingClientRect()))
        .map(b => [b.left, b.top, b.right, b.bottom])"""
    labels = browser.execute_script(script)
    for number, (left, top, right, bottom) in enumerate(labels):
        for other in labels[number + 1 :]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] + 3 or other[3] <= top + 3
            assert apart, (left, top, right, bottom, other)


def test_the_theme_reaches_page_and_charts(view):
    theme, _, browser = view
    script = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
    style = partial(browser.execute_script, script)
    assert style("body", "background-color") == rgb(theme["page"])
    assert style("body", "color") == rgb(theme["ink"])
    fills = browser.execute_script(
        "return [...document.querySelectorAll('.chart .mark-rect path')].map(e => getComputedStyle(e).fill)"
    )
    assert rgb(theme["grey"]) in fills
    assert rgb(theme["panel"]) in fills


def test_the_keyboard_reaches_the_content_and_opens_a_table(view):
    _, _, browser = view
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "skip"
    assert browser.switch_to.active_element.rect["x"] >= 0
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.switch_to.active_element.get_attribute("id") == "main"
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.tag_name == "summary"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert boxes(browser, "details[open] table")


def test_hostile_names_run_nothing(browser, pages):
    browser.get((pages / "hostile.html").as_uri())
    assert browser.get_log("browser") == []
    assert HOSTILE in browser.find_element(By.TAG_NAME, "h1").text
    assert browser.execute_script("return document.scripts.length") == 0
