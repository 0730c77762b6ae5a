"""The page of `dicode serve` in Chromium. Without browser or Playwright it is left out, but where CI asks for it."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import Served, picture, served, wait_for

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
def server(tmp_path: Path, tiny_model: Path) -> Server:
    return Server(tmp_path, models_of([str(tiny_model)]), Store(tmp_path))


@pytest.fixture
def address(server: Server) -> Iterator[str]:
    with served(server) as address:
        yield address


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_context(bypass_csp=True).new_page()  # `wait_for_function` evaluates text
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
    page.fill("#prompt", "a spark")
    page.fill("#seconds", "3")  # prompts change at key frames: two clips
    page.click("#add-shot")
    page.fill("#shots li:nth-child(2) input[type=text]", "it grows")
    page.fill("#shots li:nth-child(2) input[type=range]", "2")
    page.click("[aria-label='Shot 2 earlier']")
    page.click("button.main")
    finished(page)
    own = shown(page)
    assert [(shot["prompt"], shot["seconds"]) for shot in own["request"]["shots"]] == [("it grows", 2), ("a spark", 4)]
    page.wait_for_function("document.querySelectorAll('#shots li:nth-child(2) .strip div').length == 2")
    assert page.locator("#shots li:nth-child(1) .strip div").count() == 1
    widths = [page.locator(f"#shots li:nth-child({i})").bounding_box()["width"] for i in (1, 2)]
    assert widths[1] > widths[0]  # as long as it lasts
    page.click("[aria-label='Remove shot 1']")
    assert page.input_value("#prompt") == "a spark" and page.locator("#shots li").count() == 0
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
    page.click("summary")
    make(page, "a spark", "2")
    finished(page)
    page.click("#reopen")
    page.set_input_files("#first", {"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    page.click("#add-shot")
    page.fill("#shots li:nth-child(2) input[type=text]", "it grows")
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


def test_all_settings_come_back_with_images_and_rerolled_clips(page: Any, address: str) -> None:
    page.set_input_files("#first", {"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_selector("#first-drop + img")
    page.click("summary")
    page.fill("#s-steps", "2")
    make(page, "a spark", "4")
    finished(page)
    own = other_shown(page, "text=This clip alone >> nth=1")
    page.reload()
    finished(page)
    page.click("#reopen")
    assert "its first image" in page.inner_text("#base") and "clip 2 with seed" in page.inner_text("#base")
    page.fill("#s-steps", "3")
    again = other_shown(page, "button.main")
    different = {name for name, value in again["request"].items() if value != own["request"][name]}
    assert different == {"steps", "remixed_from_video_id"}
    page.click("#unbase")
    page.click("#four")
    page.wait_for_function("document.querySelectorAll('.stage video').length == 4")
    newest = page.evaluate("fetch('/v1/videos?limit=1').then((r) => r.json())")["data"][0]["request"]
    assert newest["given"] == [] and newest["reroll_from"] is None


def test_what_is_copied_makes_the_same_video(page: Any, address: str, tmp_path: Path) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])

    def copied(kind: str) -> str:
        page.click(f"[data-copy={kind}]")
        page.wait_for_function("document.querySelector('#state').textContent == 'Copied.'")
        text = page.evaluate("navigator.clipboard.readText()")
        page.evaluate("document.querySelector('#state').textContent = ''")
        return text

    def newest() -> dict[str, Any]:
        request = page.evaluate("fetch('/v1/videos?limit=1').then((r) => r.json())")["data"][0]["request"]
        return {name: value for name, value in request.items() if name != "remixed_from_video_id"}

    page.click("summary")
    page.fill("#s-steps", "2")
    page.fill("#prompt", "it's")
    page.fill("#seconds", "2")
    page.click("#add-shot")
    page.fill("#shots li:nth-child(2) input[type=text]", "it grows")
    page.click("button.main")
    finished(page)
    first = other_shown(page, "text=Again from here >> nth=1")["request"]
    first = {name: value for name, value in first.items() if name != "remixed_from_video_id"}
    (tmp_path / "a.py").write_text(copied("python"))
    subprocess.run([sys.executable, "-W", "ignore", "a.py"], cwd=tmp_path, check=True)
    assert newest() == first and (tmp_path / "video.mp4").stat().st_size
    command = shlex.split(copied("cli").replace("-o video.mp4", "-o cli.mp4"))
    assert command[0] == "dicode"
    model = {"tiny": str(next(iter(tmp_path.parent.glob("models*/tiny"))))}
    command = [sys.executable, "-m", *(model.get(word, word) for word in command)]
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert len(read_video(tmp_path / "cli.mp4", None).frames) == 32
    if shutil.which("curl"):
        subprocess.run(["sh", "-c", copied("curl")], check=True, capture_output=True)
        assert newest() == first
    page.goto(f"{address}/")
    page.set_input_files("#first", {"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    make(page, "a spark", "2")
    finished(page)
    with_image = newest()
    (tmp_path / "first.png").write_bytes(picture())
    (tmp_path / "a.py").write_text(copied("python"))
    subprocess.run([sys.executable, "-W", "ignore", "a.py"], cwd=tmp_path, check=True)
    assert newest() == with_image and with_image["given"] == ["image"]
    other_shown(page, "#extend")
    extended = newest()
    (tmp_path / "a.py").write_text(copied("python"))
    subprocess.run([sys.executable, "-W", "ignore", "a.py"], cwd=tmp_path, check=True)
    assert newest() == extended and extended["given"] == ["continued"]


def test_the_queue_is_watched_while_it_moves(page: Any, address: str) -> None:
    make_live = {"prompt": "a", "live": True, "seconds": 60, "steps": 1}
    first, second = (httpx.post(f"{address}/v1/videos", json=own).json()["id"] for own in (make_live, {"prompt": "b"}))
    make(page, "a spark", "2")
    page.wait_for_function("document.querySelector('#state').textContent.startsWith('Waiting; 1 before it')")
    httpx.post(f"{address}/v1/videos/{second}/cancel")
    page.wait_for_function("document.querySelector('#state').textContent.startsWith('Next in the queue')")
    page.click("#cancel")
    page.wait_for_function("document.querySelector('#state').textContent == 'Cancelled.'")
    assert page.is_hidden("#cancel")
    httpx.post(f"{address}/v1/videos/{first}/cancel")


def test_videos_that_wait_keep_no_connection(page: Any, address: str) -> None:
    live = httpx.post(f"{address}/v1/videos", json={"prompt": "a", "live": True, "seconds": 120, "steps": 1}).json()[
        "id"
    ]
    pages = [page, page.context.new_page(), page.context.new_page()]
    for own in pages[:2]:  # a browser has six connections to a server
        own.goto(address)
        own.wait_for_selector("#model option", state="attached")
        own.fill("#prompt", "a spark")
        own.click("#four")
        own.wait_for_function("document.querySelectorAll('.stage video').length == 4")
    pages[2].goto(address, timeout=20_000)
    pages[2].wait_for_selector("#model option", state="attached", timeout=20_000)
    for video in httpx.get(f"{address}/v1/videos").json()["data"]:
        httpx.post(f"{address}/v1/videos/{video['id']}/cancel")
    assert httpx.get(f"{address}/v1/videos/{live}").json()["status"] in ("in_progress", "failed")


def test_a_video_whose_worker_died_is_shown_whole(page: Any, address: str, server: Server) -> None:
    make(page, "a spark", "16")
    page.wait_for_function("document.querySelector('.stage video')?.readyState >= 2")
    server.store.release(worker="here")  # as when it was killed: the job begins anew
    finished(page)
    page.wait_for_function("Math.abs(document.querySelector('.stage video').duration - 16) < 0.3")


def test_another_video_ends_the_stream_of_the_one_before(page: Any, address: str) -> None:
    page.fill("#prompt", "a spark")
    page.click("#live")
    page.wait_for_function("document.querySelector('.stage video')?.readyState >= 2")
    ended: list[str] = []
    page.on("requestfailed", lambda request: ended.append(request.url))
    live = page.evaluate("location.hash.slice(1)")
    page.evaluate("location.hash = ''")
    make(page, "another", "2")
    page.wait_for_function("document.querySelectorAll('.stage video').length == 1")
    page.wait_for_timeout(500)
    assert any(url.endswith(f"{live}/stream") for url in ended)
    httpx.post(f"{address}/v1/videos/{live}/direct", json={"end": True})
    finished(page)
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#delete")
    page.wait_for_function("document.querySelector('#state').textContent == 'Deleted.'")
    assert page.is_hidden("#actions")


def test_a_page_whose_server_is_begun_again_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    with Served(tiny_model, tmp_path / "serve") as own, browsers.sync_playwright() as playwright:
        process = own.begin()
        wait_for(own.ready)
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(bypass_csp=True)
        page.goto(f"http://127.0.0.1:{own.port}")
        page.wait_for_selector("#model option", state="attached")
        page.click("summary")
        page.fill("#s-steps", "40")
        make(page, "a spark", "16")
        page.wait_for_function("document.querySelector('.stage video')?.readyState >= 2", timeout=PATIENCE_MS)
        process.kill()
        page.wait_for_function("document.querySelector('#state').textContent.includes('does not answer')")
        own.begin()
        page.wait_for_function("document.querySelector('#state').textContent.includes('numbers')", timeout=PATIENCE_MS)
        page.wait_for_function("Math.abs(document.querySelector('.stage video').duration - 16) < 0.3")
        browser.close()


def test_an_api_key_of_any_characters_is_asked_for_once(tmp_path: Path, tiny_model: Path) -> None:
    key, asked = "a/b+c=;%ü", list[str]()
    server = Server(tmp_path, models_of([str(tiny_model)]), Store(tmp_path), api_key=key)
    with served(server) as address, browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page()
        page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept(key)))
        page.goto(address)
        page.wait_for_selector("#model option", state="attached")
        browser.close()
    assert len(asked) == 1


def test_a_file_that_is_dropped_beside_its_place_does_not_leave_the_page(page: Any) -> None:
    prevented = "new DragEvent('drop', {bubbles: true, cancelable: true})"
    assert page.evaluate(f"!document.querySelector('h1').dispatchEvent({prevented})")


def test_videos_of_reduced_motion_do_not_loop(page: Any) -> None:
    for motion, loops in (("reduce", False), ("no-preference", True)):
        page.emulate_media(reduced_motion=motion)
        make(page, "a spark", "2")
        finished(page)  # the second time perhaps at once, by the first video's line
        page.wait_for_function(f"document.querySelector('.stage video').loop === {str(loops).lower()}")


def test_every_control_is_reached_by_keyboard(page: Any) -> None:
    page.keyboard.press("Tab")
    page.keyboard.type("a spark")  # the prompt is first
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('button.main')"):
            break
    page.fill("#seconds", "2")
    page.focus("button.main")
    page.keyboard.press("Enter")
    finished(page)
    page.wait_for_selector("#frames button")
    assert "a spark" in shown(page)["prompt"]
    page.evaluate("document.activeElement.blur()")
    page.evaluate(
        "window.reached = new Set(); addEventListener('focusin', (event) => window.reached.add(event.target))"
    )
    for _ in range(80):
        page.keyboard.press("Tab")
    missed = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea, a, summary, video')]"
        ".filter((own) => own.checkVisibility() && !own.disabled && !reached.has(own)).map((own) => own.outerHTML)"
    )
    assert missed == []
