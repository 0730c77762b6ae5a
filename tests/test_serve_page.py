"""The page of `dicode serve` in Chromium. Without browser or Playwright it is left out, but where CI asks for it."""

import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import served

from dicode.serve.request import models_of
from dicode.serve.server import Server
from dicode.serve.store import Store
from dicode.video.read import read_video
from dicode.video.write import VideoWriter

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if os.environ.get("DICODE_BROWSER"):  # it has to be there
    browsers: Any = importlib.import_module("playwright.sync_api")
    checks: Any = importlib.import_module("axe_playwright_python.sync_playwright")
else:
    browsers = pytest.importorskip("playwright.sync_api", reason="no Playwright")
    checks = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe")
    if BROWSER is None:
        pytest.skip("no Chromium", allow_module_level=True)

PAGE = Path(__file__).parents[1] / "dicode/serve/page"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PATIENCE_MS = 90_000
MOST_BYTES = 200_000


@pytest.fixture
def address(tmp_path: Path, tiny_model: Path) -> Iterator[str]:
    server = Server(tmp_path, models_of([str(tiny_model)]), Store(tmp_path))
    with served(server) as address:
        yield address


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(bypass_csp=True)  # `wait_for_function` evaluates text
        page.set_default_timeout(PATIENCE_MS)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("response", lambda response: faults.append(response.url) if response.status >= 500 else None)
        page.goto(address)
        page.wait_for_function("document.querySelectorAll('#model option').length > 0")
        yield page
        browser.close()
        assert not faults


def finished(page: Any) -> None:
    page.wait_for_function("document.querySelector('#state').textContent.includes('numbers')")


def make(page: Any, prompt: str, seconds: str) -> None:
    page.fill("#prompt", prompt)
    page.fill("#seconds", seconds)
    page.click("button.main")


def shown(page: Any) -> dict[str, Any]:
    """The video on the page, as the API has it."""
    return page.evaluate("fetch('/v1/videos/' + location.hash.slice(1)).then((r) => r.json())")


def other_shown(page: Any, button: str) -> dict[str, Any]:
    """The video that a button makes of the one on the page."""
    before = page.evaluate("location.hash")
    page.click(button)
    page.wait_for_function(f"location.hash != '{before}'")
    finished(page)
    return shown(page)


def test_a_video_appears_while_it_is_rendered(page: Any) -> None:
    make(page, "a spark", "16")
    page.wait_for_function("document.querySelector('.stage video')?.readyState >= 2")
    assert "Rendering" in page.inner_text("#state") or "numbers" in page.inner_text("#state")
    finished(page)
    page.wait_for_function("document.querySelectorAll('#frames li').length == 9")
    assert page.evaluate("document.querySelector('.stage video').error") is None
    page.wait_for_function("document.querySelectorAll('#gallery img').length == 1")


def test_again_from_here_extending_and_reopening(page: Any, address: str) -> None:
    make(page, "a spark", "4")
    finished(page)
    first = page.evaluate("location.hash")
    own = other_shown(page, "text=Again from here >> nth=1")
    assert own["request"]["reroll_from"] == 1
    page.fill("#more", "it goes on")
    other_shown(page, "#extend")
    page.goto(f"{address}/{first}")
    page.reload()
    finished(page)
    page.fill("#prompt", "something else")
    page.click("#reopen")
    assert page.input_value("#prompt") == "a spark"


def test_storyboards_variations_and_errors(page: Any) -> None:
    page.click("#add-shot")
    page.fill("#shots input[type=text]", "it grows")
    page.fill("#shots input[type=range]", "4")
    make(page, "a spark", "2")
    finished(page)
    own = shown(page)
    assert [(shot["prompt"], shot["seconds"]) for shot in own["request"]["shots"]] == [("a spark", 2), ("it grows", 4)]
    page.click("[aria-label='Remove shot 2']")
    page.click("#four")
    page.wait_for_function("document.querySelectorAll('.stage video').length == 4")
    page.fill("#seconds", "600")
    page.click("button.main")
    page.wait_for_function("document.querySelector('#error').textContent.includes('seconds')")


def test_a_live_video_is_directed(page: Any) -> None:
    page.fill("#prompt", "a spark")
    page.click("#live")
    page.wait_for_function("document.querySelector('.stage video')?.readyState >= 2")
    page.wait_for_function("!document.querySelector('#direct').hidden")
    page.fill("#more", "it grows")
    page.press("#more", "Enter")
    page.wait_for_function("document.querySelector('#more').value == ''")
    events = "fetch('/v1/videos/' + location.hash.slice(1)).then((r) => r.json())"
    assert page.evaluate(events)["status"] == "in_progress"
    page.click("#end")
    finished(page)
    assert page.evaluate(events)["status"] == "completed"


def test_keys_and_names(page: Any) -> None:
    make(page, "a spark", "2")
    finished(page)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_function("!document.querySelector('.stage video').paused")
    page.keyboard.press(" ")
    page.wait_for_function("document.querySelector('.stage video').paused")
    before = page.evaluate("document.querySelector('.stage video').currentTime")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"document.querySelector('.stage video').currentTime != {before}")
    nameless = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button, video')]"
        ".filter((own) => !own.labels?.length && !own.ariaLabel && !own.textContent.trim()).map((own) => own.outerHTML)"
    )
    assert nameless == []


def test_what_a_model_cannot_do_is_not_offered(tmp_path: Path, tiny_model: Path) -> None:
    models = models_of([str(tiny_model), "blocks"])
    with served(Server(tmp_path, models, Store(tmp_path))) as address, browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#model option[value=blocks]", state="attached")
        assert page.is_visible("#loop-label") and page.is_visible("#last-drop") and page.is_hidden("#actions")
        page.select_option("#model", "blocks")
        assert page.is_hidden("#loop-label") and page.is_hidden("#last-drop")
        browser.close()


def test_the_page_keeps_to_its_own_content_security_policy(address: str) -> None:
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page, said = browser.new_page(), list[str]()
        page.on("console", lambda message: said.append(message.text))
        page.goto(address)
        page.wait_for_selector("#model option", state="attached")
        make(page, "a spark", "4")
        page.wait_for_selector("#frames li:nth-child(3)", timeout=PATIENCE_MS)
        page.wait_for_selector("#gallery img")
        browser.close()
    assert not said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, scheme: str) -> None:
    axe = checks.Axe()
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.click("#add-shot")
    page.fill("#shots input[type=text]", "it grows")
    page.click("summary")
    make(page, "a spark", "2")
    finished(page)
    page.wait_for_selector("#gallery img")
    found = axe.run(page)
    assert found.violations_count == 0, found.generate_report()


def test_nothing_is_wider_than_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    make(page, "a spark", "2")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_page_is_small_and_loads_nothing_from_elsewhere() -> None:
    files: dict[str, Any] = {path.name: path.read_text() for path in PAGE.iterdir()}
    assert sum(len(text.encode()) for text in files.values()) < MOST_BYTES
    assert not [name for name, text in files.items() if "https://" in text or "//cdn" in text]


def test_one_clip_again_and_a_video_beside_its_reconstruction(page: Any, tmp_path: Path) -> None:
    make(page, "a spark", "4")
    finished(page)
    own = other_shown(page, "text=This clip alone >> nth=0")
    assert (own["request"]["reroll_from"], own["request"]["reroll_clips"]) == (0, 1)
    with VideoWriter(tmp_path / "own.mp4") as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (32, 32, 32, 3), np.uint8))
    page.set_input_files("#own", tmp_path / "own.mp4")
    page.wait_for_function("document.querySelector('#state').textContent.startsWith('Left what was given')")
    page.wait_for_function("document.querySelectorAll('.both video').length == 2")
    page.fill(".stage input[type=range]", "20")
    assert "80%" in page.evaluate("document.querySelectorAll('.both video')[1].style.clipPath")
    page.wait_for_function("[...document.querySelectorAll('.both video')].every((own) => own.readyState >= 2)")
    with page.expect_download() as download:
        page.click("#gif")
    assert len(read_video(download.value.path(), None).frames) == 32
