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
COPIED = """
const code = document.querySelector(arguments[0]);
code.setAttribute("data-md-copying", "");  // what the theme's button does before it reads the text
const text = code.innerText;
code.removeAttribute("data-md-copying");
return text;
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
    browser.get((site / "index.html").as_uri())
    code = browser.execute_script(COPIED, ".language-pycon code")
    assert code.startswith("import torch\n")
    assert ">>>" not in code
    assert "True" not in code
    compile(code, "copied", "exec")
    browser.get((site / "tutorial.html").as_uri())
    assert browser.execute_script(COPIED, ".language-python code").startswith("import torch\n")

    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
