"""The built site opened from its files, in headless Chromium without a network: formulas, search, what is copied."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
pytest.importorskip("mkdocs", reason="needs mkdocs")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

ROOT = Path(__file__).parents[1]
FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "no-first-run",
    "disable-background-networking",
    "disable-dev-shm-usage",
    "host-resolver-rules=MAP * ~NOTFOUND",
)
SEARCHED = {"install": "install.html", "migrate": "migrate.html", "notebook": "install.html", "SAM": "migrate.html"}

FORMULAS = """
return {
  shown: document.querySelectorAll(".arithmatex .katex").length,
  all: document.querySelectorAll(".arithmatex").length,
  wrong: document.querySelectorAll(".katex-error").length,
  fonts: [...document.fonts].filter((font) => font.status === "error").length,
  elsewhere: performance.getEntriesByType("resource").map((r) => r.name).filter((name) => name.startsWith("http")),
  wide: document.documentElement.scrollWidth - window.innerWidth,
};
"""
LISTEN = """
window.copied = null;
document.addEventListener("copy", () => {
  window.copied = document.activeElement.value || getSelection().toString();  // a field that the theme makes for it
});
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def until(browser, script, *arguments):
    """What a script answers as soon as it is something. Generous: a machine may be busy."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 120).until(lambda driver: driver.execute_script(script, *arguments))


def copied(browser, kind):
    """What the button of the first block of this kind copies."""
    block = f".language-{kind}"
    until(browser, f"return document.querySelector('{block} [data-clipboard-target]') !== null")
    browser.execute_script(LISTEN)
    button = browser.find_element("css selector", f"{block} [data-clipboard-target]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    return until(browser, "return window.copied")


def test_it_works_from_its_files(site, browser):
    # Formulas, with the fonts that lie beside them, on a phone and on a desk; nothing comes from elsewhere.
    for width in (390, 1280):
        browser.set_window_size(width, 900)
        for page in ("theory.html", "api.html", "tutorial.html", "migrate.html", "index.html"):
            browser.get((site / page).as_uri())
            found = until(browser, FORMULAS)
            assert found["shown"] == found["all"], page
            assert (found["all"] > 10) == (page in ("theory.html", "api.html")), page
            assert (found["wrong"], found["fonts"], found["elsewhere"]) == (0, 0, []), page
            assert found["wide"] <= 0, f"{page} scrolls sideways at {width}"

    # Search, from an index that is a script.
    for word, page in SEARCHED.items():
        browser.get((site / "index.html").as_uri() + f"?q={word}")
        first = (
            "return [...document.querySelectorAll('.md-search-result__link')].map((link) => link.href.split('?')[0])"
        )
        results = until(browser, f"const found = (() => {{ {first} }})(); return found.length ? found : null")
        pages = list(dict.fromkeys(Path(result.split("#")[0]).name for result in results))
        assert page in pages[:4], (word, pages)

    # What the copy button takes: of a doctest its code, of a script all of it.
    browser.get((site / "cheap.html").as_uri())
    code = copied(browser, "pycon")
    assert code.startswith("import torch\n")
    assert ">>>" not in code
    compile(code, "copied", "exec")
    browser.get((site / "tutorial.html").as_uri())
    assert copied(browser, "python").startswith("import torch\n")

    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
