"""A newcomer's hour: clone, install, demo, page, fine-tune on twenty clips, evaluate, serve, push and pull, each timed.

    python tools/newcomer_hour.py --minutes 5    # results/newcomer-hour.json; needs chromium and the extra `dev`

Only commands of README.md and docs/ run, in a clone of the last commit with a home folder of its own. The clips are
drawn. tests/hub_server.py plays the Hugging Face Hub, where a newcomer would first `hf auth login`.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw

from dicode import VideoWriter
from dicode.provenance import read_result, write_result
from dicode.video.read import read_video

ROOT = Path(__file__).parents[1]
COLOURS = {"red": "#d62828", "orange": "#f08c14", "green": "#289646", "blue": "#285ad2", "purple": "#823caa"}
THINGS = {"fish": "swims to the right", "boat": "rocks on the water", "kite": "sways", "wheel": "turns"}
CLIP_S, FPS, SIZE = 4, 25, (320, 240)
PROMPT = "a purple kite sways"
PATIENCE_S = 120.0


def main() -> None:
    """Run every step in a new folder and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="of fine-tuning")
    parser.add_argument("--keep", type=Path, help="new folder to work in, kept; default: a temporary one")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/newcomer-hour.json"))
    asked = parser.parse_args()
    with TemporaryDirectory() as name:
        home = asked.keep or Path(name)
        newcomer = Newcomer(home)
        values = newcomer.hour(asked.minutes)
    write_result(asked.output, "a newcomer's hour", values, len(COLOURS) * len(THINGS), 0, shlex.join(sys.argv))
    print(f"{asked.output}: {sum(newcomer.seconds.values()) / 60:.1f} min")


class Newcomer:
    """Commands in a clone of this repository, with nothing but what they install themselves."""

    def __init__(self, home: Path) -> None:
        self.home, self.clone = home, home / "dicode"
        self.seconds: dict[str, float] = {}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "HF_"))}
        path = f"{self.clone}/.venv/bin:{os.environ['PATH']}"
        self.environment = {**kept, "HOME": str(home), "PATH": path, "NO_PROXY": "127.0.0.1"}

    def hour(self, minutes: float) -> dict[str, object]:
        """All steps; returns seconds by command, and what the model is like."""
        sys.path.append(str(ROOT / "tests"))
        from hub_server import FakeHub

        self.home.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(self.clone)], check=True)
        self.run("make demo")
        self.run("make install")
        pages = {"blocks": self.page("make serve", "a green cube falls from above, then it turns blue", 8000)}
        draw_clips(self.clone / "my_clips")
        self.run(f"dicode finetune my_clips/ -o my_model --minutes {minutes:g} --json finetuned.json")
        self.run(f"dicode generate '{PROMPT}' --model my_model -o kite.mp4 --sheet sheet.png")
        self.run("dicode evaluate my_model --cache my_model.work/cache --quick --report report.html")
        port = free_port()
        pages["my_model"] = self.page(f"dicode serve --model my_model blocks --port {port}", PROMPT, port)
        hub = FakeHub(self.home / "hub")
        try:  # its protocol of chunks is that of another server
            self.environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_nobody", "HF_HUB_DISABLE_XET": "1"}
            self.run("hf upload me/my_model my_model --private")
            self.run(f"dicode generate '{PROMPT}' --model me/my_model -o pulled.mp4")
        finally:
            hub.stop()
        own, pulled = (read_video(self.clone / name, None).frames for name in ("kite.mp4", "pulled.mp4"))
        assert np.array_equal(own, pulled), "the pulled model is another one"
        measured = {
            part: read_result(self.clone / f"results/my_model-quick-{part}.json")["values"]
            for part in ("generation", "reconstruction")
        }
        return {
            "seconds": self.seconds,
            "pages": pages,
            "finetuned": json.loads((self.clone / "finetuned.json").read_text())["values"],
            "text_control": measured["generation"]["text_control"],
            "reconstruction_psnr": measured["reconstruction"]["psnr"]["reconstruction"],
            "pulled_video_is_equal": True,
        }

    def run(self, command: str) -> None:
        """A command that must succeed."""
        print(f"$ {command}", flush=True)
        began_s = time.monotonic()
        subprocess.run(["bash", "-c", command], cwd=self.clone, env=self.environment, check=True)
        self.seconds[command] = time.monotonic() - began_s
        print(f"  {self.seconds[command]:.1f} s", flush=True)

    def page(self, command: str, prompt: str, port: int) -> dict[str, float]:
        """Serve, make a video on the page, and end with Ctrl-C: seconds until each is there."""
        from playwright.sync_api import sync_playwright

        print(f"$ {command}", flush=True)
        url, began_s = f"http://127.0.0.1:{port}", time.monotonic()
        words = shlex.split(command)
        serving = subprocess.Popen(words, cwd=self.clone, env=self.environment, process_group=0)
        try:
            wait_for_port(port, serving)
            taken = {"server": time.monotonic() - began_s}
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                page = browser.new_context(bypass_csp=True, viewport={"width": 1280, "height": 900}).new_page()
                page.set_default_timeout(1000 * PATIENCE_S)
                page.goto(url)
                page.wait_for_selector("#model option", state="attached")
                page.fill("#prompt", prompt)
                asked_s = time.monotonic()
                page.click("button.main")
                page.wait_for_function("document.querySelector('.stage video')?.readyState >= 2")
                taken["first_picture"] = time.monotonic() - asked_s
                page.wait_for_function("document.querySelector('#state').textContent.includes('numbers')")
                taken["whole_video"] = time.monotonic() - asked_s
                time.sleep(1)  # of scrolling
                page.screenshot(path=self.home / f"page-{port}.png")
                browser.close()
        finally:
            os.killpg(serving.pid, signal.SIGINT)
            serving.wait(PATIENCE_S)
        self.seconds[command] = taken["server"] + taken["whole_video"]
        print(f"  {taken}", flush=True)
        return taken


def draw_clips(folder: Path) -> None:
    """Four things in five colours, 4 s of 320×240 at 25 fps, and a caption beside each."""
    folder.mkdir()
    for thing, does in THINGS.items():
        for colour, paint in COLOURS.items():
            with VideoWriter(folder / f"{thing}-{colour}.mp4", FPS, {}) as writer:
                writer.write(np.stack([drawn(thing, paint, i / FPS) for i in range(CLIP_S * FPS)]))
            article = "an" if colour[0] in "aeiou" else "a"
            (folder / f"{thing}-{colour}.txt").write_text(f"{article} {colour} {thing} {does}\n")


def drawn(thing: str, paint: str, at_s: float) -> np.ndarray:
    """One frame."""
    image = Image.new("RGB", (640, 480), "white")
    draw, turn = ImageDraw.Draw(image), 2 * math.pi * at_s
    if thing == "fish":
        x, y = -60 + 190 * at_s, 240 + 20 * math.sin(turn)
        draw.ellipse((x - 70, y - 45, x + 70, y + 45), fill=paint)
        draw.polygon([(x - 60, y), (x - 120, y - 45), (x - 120, y + 45)], fill=paint)
    elif thing == "boat":
        angle = 0.25 * math.sin(turn / 2)
        c, s = math.cos(angle), math.sin(angle)
        hull, sail = [(-130, 0), (130, 0), (80, 70), (-80, 70)], [(0, -10), (0, -180), (100, -10)]
        draw.polygon([(320 + x * c - y * s, 280 + x * s + y * c) for x, y in hull], fill=paint)
        draw.polygon([(320 + x * c - y * s, 280 + x * s + y * c) for x, y in sail], fill="#5a5a5a")
        draw.rectangle((0, 335, 640, 480), fill="#96c8f0")
    elif thing == "kite":
        x, y = 320 + 150 * math.sin(turn / 2), 180 + 30 * math.cos(turn)
        draw.line([(320, 480), (x, y)], fill="#3c3c3c", width=4)
        draw.polygon([(x, y - 90), (x + 65, y), (x, y + 110), (x - 65, y)], fill=paint)
    else:
        draw.ellipse((180, 100, 460, 380), outline=paint, width=26)
        for spoke in range(6):
            angle = turn / 4 + spoke * math.pi / 3
            draw.line([(320, 240), (320 + 135 * math.cos(angle), 240 + 135 * math.sin(angle))], fill=paint, width=16)
    return np.asarray(image.resize(SIZE, Image.Resampling.LANCZOS))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_port(port: int, serving: "subprocess.Popen[bytes]") -> None:
    """Until something listens there. Raises `RuntimeError` where the process ends, or after some minutes."""
    until_s = time.monotonic() + 2 * PATIENCE_S
    while serving.poll() is None and time.monotonic() < until_s:
        with socket.socket() as own:
            if own.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens at port {port}")


if __name__ == "__main__":
    main()
