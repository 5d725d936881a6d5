"""The report as a user opens it: headless Chromium, each category shows its picture."""

import json
import shutil
import time

import pytest

from tests.workflow.conftest import SMALL, copy_project

pytestmark = pytest.mark.browser

# Pictures that a reader finds, by category and subcategory.
PICTURES = {
    ("Attention heads", "Similarity"): 3,
    ("Attention heads", "Merging"): 6,
    ("Attention heads", "Cost"): 1,
    ("FFN channels", "Pruning"): 1,
    ("FFN channels", "Transport"): 1,
    ("FFN channels", "Transport plan"): 1,
    ("Translator heads", "Translator"): 1,
    ("Translator heads", "Quality"): 2,
    ("Parallel branches", "branch"): 2,
    ("Parallel branches", "heads"): 5,
    ("Gradients", "model_generated, two_sided"): 6,
}


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    workflow = copy_project(tmp_path_factory.mktemp("report") / ".")
    workflow.configure(SMALL)
    workflow.run("--cores", "2", timeout=1800)
    workflow.run("--report", "report.html")
    return workflow.folder / "report.html"


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    from selenium import webdriver

    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.fail("chromium and chromedriver are needed (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1500,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield driver
    driver.quit()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    pytest.fail("the page did not show it in time")


def visible(browser, text, exact=True):
    """The innermost visible elements that show a text."""
    test = f"normalize-space(text())={json.dumps(text)}"
    if not exact:
        test = f"contains(text(), {json.dumps(text)})"
    return [e for e in browser.find_elements("xpath", f"//*[{test}]") if e.is_displayed()]


def open_category(browser, report, category):
    """Click on a category in the menu."""
    browser.get(report.as_uri())
    wait_for(lambda: visible(browser, category))[0].click()


def test_each_category_shows_its_pictures_and_nothing_is_broken(report, browser):
    open_category(browser, report, "FFN channels")
    results = browser.execute_script("return results")
    categories = browser.execute_script("return categories")
    assert {category for category, _ in PICTURES} <= set(categories)
    pictures = {path: entry for path, entry in results.items() if path.endswith(".png")}
    assert len(pictures) == sum(PICTURES.values())
    for path, entry in pictures.items():
        size = browser.execute_async_script(
            "const done = arguments[arguments.length - 1], picture = new Image();"
            "picture.onload = () => done([picture.naturalWidth, picture.naturalHeight]);"
            "picture.onerror = () => done(null); picture.src = arguments[0];",
            entry["data_uri"],
        )
        assert size and min(size) > 100, f"{path} is no picture"
        assert entry["caption"], f"{path} has no caption"
        assert "System Message" not in entry["caption"], f"the caption of {path} is broken"
        labels = entry["labels"]
        own = {labels.get(name) for name in ("checkpoint", "translator", "ablation")}
        assert own & {"tiny", "phrases", "branch", "heads"}
    assert sum(path.endswith("table.html") for path in results) == 3
    severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert severe == []


@pytest.mark.parametrize(("category", "subcategory"), PICTURES)
def test_a_reader_clicks_through_to_a_picture(report, browser, category, subcategory):
    open_category(browser, report, category)
    wait_for(lambda: visible(browser, subcategory))[0].click()
    eyes = "//a[@iconname='eye']"
    count = len(wait_for(lambda: browser.find_elements("xpath", eyes)))
    pictures = 0
    for place in range(count):
        link = browser.find_elements("xpath", eyes)[place]
        if link.get_attribute("download"):
            continue  # a table to save
        browser.execute_script("arguments[0].click()", link)
        pictures += wait_for(lambda: shown(browser)) == "picture"
    browser.save_screenshot(str(report.with_name(f"{subcategory}.png")))
    assert pictures == PICTURES[category, subcategory]


def shown(browser):
    """What the page's content is now: a loaded picture, a page of its own, or nothing yet."""
    for image in browser.find_elements("xpath", "//img[@id='img-content'] | //main//img | //img"):
        if image.is_displayed() and int(image.get_property("naturalWidth") or 0) > 100:
            return "picture"
    frames = browser.find_elements("xpath", "//iframe")
    return "page" if any(frame.is_displayed() for frame in frames) else None


def test_the_gates_of_a_run_play_beside_their_map(report, browser):
    open_category(browser, report, "Translator heads")
    wait_for(lambda: visible(browser, "Gated runs"))[0].click()
    eyes = "//a[@iconname='eye']"
    links = wait_for(lambda: browser.find_elements("xpath", eyes))
    assert len(links) == 3  # gated runs; the toggle "translations" shows their other pages
    browser.execute_script("arguments[0].click()", links[0])
    frames = "//iframe"
    frame = wait_for(
        lambda: [f for f in browser.find_elements("xpath", frames) if f.is_displayed()]
    )
    browser.switch_to.frame(frame[0])
    try:
        film, still = wait_for(lambda: browser.find_elements("css selector", ".row figure img"))[:2]
        assert film.get_attribute("src").startswith("data:image/gif")
        first = wait_for(lambda: film.screenshot_as_png)
        wait_for(lambda: film.screenshot_as_png != first)  # another frame is on the screen
        assert abs(film.rect["y"] - still.rect["y"]) < 200 and film.rect["x"] != still.rect["x"]
        assert int(still.get_property("naturalWidth")) > 300
    finally:
        browser.switch_to.default_content()
        browser.save_screenshot(str(report.with_name("gates.png")))
