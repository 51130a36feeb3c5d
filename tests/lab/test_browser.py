"""The page of `gradreg report` in headless Chromium: on a phone and on a desk, light and dark, under attack."""

import shutil

import pytest
from lab_folders import BASE, hostile_folder, replace, sweep_folder, train_folder

from gradreg.lab.figures import as_svg, panels
from gradreg.lab.page import Figure, Items, Page, Table, html, plain
from gradreg.lab.report.page import page

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)"
)

SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind, by name."""
    root = tmp_path_factory.mktemp("pages")
    sweep_folder(root / "sweep")
    hostile_folder(root / "<script>window.owned = true<")
    for seed in range(2):
        train_folder(root / "trains" / f"sgd {seed}", replace(BASE, seed=seed))
        train_folder(root / "trains" / f"sam {seed}", replace(BASE, seed=seed, method="SAM", rho=0.1))
    found = {"study": root / "study.html"}
    found["study"].write_text(html(study()), encoding="utf-8")
    for folder in [path for path in root.iterdir() if path.is_dir()]:
        path = folder / "report.html"
        path.write_text(page(folder), encoding="utf-8")
        found["hostile" if "script" in folder.name else folder.name] = path
    return found


@as_svg
def drawing(width, title):
    return panels([title], width, 3)[0]


def study():
    """A page of the builder: figures from narrow to wide, a wide table, and words that are too long for a phone."""
    hostile = "<script>window.owned = true</script><img src=x onerror='window.owned = true'>"
    widths = {"narrow": 3.0, "wide": 8.0, "widest": 11.0}
    rows = [(hostile, *["1.234 (1.000 to 1.500)"] * 9, "word " * 40)]
    figures = [Figure(name, drawing(width, hostile), plain(hostile)) for name, width in widths.items()]
    return Page(hostile, [plain(hostile), Items([plain("x" * 500)]), Table(hostile, ["a" * 30] * 11, rows), *figures])


@pytest.fixture
def visit(browser, pages):
    """Open a page in a window and a theme; afterwards the console must be empty."""

    def visit(name, size="desktop", theme="light"):
        width, height = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": theme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(pages[name].as_uri())
        return browser

    yield visit
    assert browser.get_log("browser") == []


COLUMN = """
const table = document.querySelector(".points table");
return [...table.tBodies].filter(b => !b.hidden).map(b => b.rows[0].cells[arguments[0]].textContent.trim());
"""
HEADINGS = 'return [...document.querySelectorAll(".points th")].map(th => th.textContent.trim());'


@pytest.mark.parametrize("name", ["sweep", "trains", "hostile", "study"])
@pytest.mark.parametrize("size", list(SIZES))
def test_the_page_never_scrolls_sideways_and_shows_its_figures(visit, name, size):
    browser = visit(name, size)
    width, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner == SIZES[size][0]
    boxes = browser.execute_script(
        'return [...document.querySelectorAll("figure svg, .bar svg")].map(s => {'
        "const box = s.getBoundingClientRect(); return [box.width, box.height]; })"
    )
    assert len(boxes) >= 3
    assert all(width > 40 and height > 30 for width, height in boxes)
    sizes = browser.execute_script(
        'return [...document.querySelectorAll("figure svg")].map(s => s.getScreenCTM().a * 9)'  # 9 pt of the figures
    )
    assert min(sizes) > 8  # so that the numbers can be read on a phone


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_figures_stand_out_from_the_page(visit, theme):
    browser = visit("sweep", theme=theme)
    paper, ink, axis = browser.execute_script(
        "const color = (node, name) => getComputedStyle(node)[name];"
        'return [color(document.body, "backgroundColor"), color(document.body, "color"),'
        ' color(document.querySelector(".curves svg text"), "fill")]'
    )
    assert (sum(channels(paper)) > 600) == (theme == "light")
    for text in (ink, axis):
        assert abs(sum(channels(text)) - sum(channels(paper))) > 400


def channels(color):
    return [int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3]]


@pytest.mark.parametrize(("name", "own_scripts"), [("hostile", 1), ("study", 0)])
def test_no_text_from_the_files_becomes_a_script(visit, name, own_scripts):
    browser = visit(name)
    assert browser.execute_script("return window.owned") is None
    assert browser.execute_script("return document.scripts.length") == own_scripts
    assert browser.execute_script('return document.querySelectorAll("img").length') == 0
    assert "<script>window.owned = true</script>" in browser.execute_script("return document.body.textContent")


def test_a_script_that_got_in_would_not_run(browser, pages, tmp_path):
    text = pages["sweep"].read_text(encoding="utf-8")
    path = tmp_path / "attacked.html"
    attack = "<script>window.owned = true</script><img src=x onerror='window.owned = true'>"
    path.write_text(text.replace("<header>", f"<header>{attack}", 1), encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.execute_script("return window.owned") is None
    assert "Content Security Policy" in " ".join(entry["message"] for entry in browser.get_log("browser"))


def test_sorting_by_click_and_by_keyboard(visit):
    from selenium.webdriver.common.keys import Keys

    browser = visit("sweep")
    headings = browser.execute_script(HEADINGS)
    gamma, loss = headings.index("γ"), headings.index("train loss")
    buttons = browser.find_elements("css selector", ".points th button")

    def sorted_by(column):
        shown = [float(value) for value in browser.execute_script(COLUMN, column) if value]
        return shown, browser.find_elements("css selector", ".points th")[column].get_attribute("aria-sort")

    buttons[gamma].click()
    shown, direction = sorted_by(gamma)
    assert (shown, direction) == (sorted(shown, reverse=True), "descending")
    assert browser.execute_script(COLUMN, gamma)[-1] == ""  # SGD has none and comes last, in both directions
    buttons[gamma].send_keys(Keys.ENTER)
    shown, direction = sorted_by(gamma)
    assert (shown, direction) == (sorted(shown), "ascending")
    assert browser.execute_script(COLUMN, gamma)[-1] == ""
    buttons[loss].send_keys(Keys.SPACE)
    shown, direction = sorted_by(loss)
    assert (shown, direction) == (sorted(shown, reverse=True), "descending")
    assert len(browser.find_elements("css selector", ".points th[aria-sort]")) == 1
    buttons[0].click()
    methods = browser.execute_script(COLUMN, 0)
    assert methods == sorted(methods)


def test_filters_and_opening_a_point(visit):
    browser = visit("sweep")
    said = browser.find_element("css selector", ".said")
    browser.find_element("css selector", ".points input").send_keys("γ 0.2, ε 0.3")
    assert len(browser.execute_script(COLUMN, 0)) == 2
    assert said.text.startswith("2 of 47 points")
    browser.find_element("css selector", '.points option[value="B-GR"]').click()
    (only,) = browser.execute_script(COLUMN, 0)
    assert only.endswith("B-GR")
    toggle = next(b for b in browser.find_elements("css selector", "button.open") if b.is_displayed())
    runs = browser.find_element("id", toggle.get_attribute("aria-controls"))
    assert not runs.is_displayed()
    toggle.click()
    assert toggle.get_attribute("aria-expanded") == "true"
    assert runs.is_displayed()
    assert runs.text.count("seed") == 3


def test_the_snippets_can_be_copied(visit):
    browser = visit("sweep")
    for button in browser.find_elements("css selector", "button[data-copies]"):
        button.click()
        browser.execute_async_script("setTimeout(arguments[0], 50)")
        assert button.text.startswith(("Copied", "Selected"))
    copied = browser.execute_script("return document.getElementById('s1-yaml').textContent")
    assert "method: F-GR" in copied


def test_without_script_it_is_a_plain_table(visit, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        visit("sweep")
        assert not browser.find_element("css selector", ".controls").is_displayed()
        runs = browser.find_elements("css selector", "tr.runs")
        assert len(runs) == 47
        assert runs[0].is_displayed()
        assert not browser.find_elements("css selector", "th button")
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
