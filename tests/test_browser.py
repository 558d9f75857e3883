"""What a reader sees: notebooks in JupyterLab and the panel in Voilà, driven in a real browser."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

MINUTE = 60_000


@pytest.fixture(scope="module")
def page():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(MINUTE)
        yield page
        browser.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(command, port, folder):
    """A server on this port, once it answers."""
    environment = os.environ | {
        "FCSE_RUNS": os.environ.get("FCSE_RUNS", str(folder / "runs")),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "OMP_NUM_THREADS": "2",
    }
    log = (folder / "server.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, env=environment, stdout=log, stderr=log
    )
    for _ in range(120):
        time.sleep(0.5)
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60)
            return server
        except OSError:
            assert server.poll() is None, (folder / "server.log").read_text()
    raise AssertionError((folder / "server.log").read_text())


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks, with every cell in the page and not in view only."""
    folder = tmp_path_factory.mktemp("lab")
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy(notebook, folder)
    settings = folder / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')
    port = free_port()
    options = ["--no-browser", "--allow-root", "--IdentityProvider.token=", f"--port={port}"]
    server = serve(["jupyterlab", *options, f"--ServerApp.root_dir={folder}"], port, folder)
    yield f"http://127.0.0.1:{port}/lab/tree"
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The ablation panel, served by Voilà."""
    folder = tmp_path_factory.mktemp("app")
    shutil.copy(NOTEBOOKS / "app_ablation.ipynb", folder)
    port = free_port()
    options = ["--no-browser", f"--port={port}"]
    server = serve(["voila", "app_ablation.ipynb", *options], port, folder)
    yield f"http://127.0.0.1:{port}/"
    server.terminate()
    server.wait()


def run_all(page, lab, name):
    """Open a notebook, run all its cells, wait for the last, and see no error."""
    page.goto(f"{lab}/{name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.get_by_text("Run", exact=True).first.click()
    page.get_by_text("Run All Cells", exact=True).first.click()
    prompts = page.locator(".jp-CodeCell .jp-InputArea-prompt")
    for _ in range(15 * 60):
        page.wait_for_timeout(1000)
        if all(re.search(r"\d", text) for text in prompts.all_inner_texts()):
            break
    else:
        raise AssertionError(f"not all cells ran: {prompts.all_inner_texts()}")
    errors = page.locator('.jp-OutputArea-output[data-mime-type*="error"]')
    assert errors.count() == 0, errors.first.inner_text()


def when_changed(page, read, before):
    """What `read` gives once it is something else than before."""
    for _ in range(300):
        page.wait_for_timeout(200)
        if (now := read()) != before:
            return now
    raise AssertionError("nothing changed within a minute")


def drive_ablation_panel(page):
    """Move a slider and choose a preset by keyboard and mouse: the picture follows each time."""
    picture = page.locator("img[alt*='logit' i]").last

    def source():
        return picture.get_attribute("src")

    first = source()
    slider = page.locator(".widget-slider", has_text="temperature τ").get_by_role("slider")
    slider.focus()
    slider.press("ArrowRight")
    moved = when_changed(page, source, first)
    page.get_by_role("button", name="hardness-weighted").click()
    when_changed(page, source, moved)


def train_and_stop(page, seed):
    """Start a run, see it step, stop it."""
    box = page.get_by_label("seed", exact=True)
    box.fill(seed)
    box.press("Tab")
    page.get_by_role("button", name="train this").click()
    page.get_by_text(re.compile(r"step \d+")).first.wait_for(timeout=3 * MINUTE)
    page.get_by_role("button", name="stop", exact=True).click()
    page.get_by_text(re.compile("Stopped after")).wait_for()


def test_picker_says_what_it_cannot_load(page, lab, tmp_path):
    run_all(page, lab, "01_train.ipynb")
    name = page.get_by_label("encoder", exact=True)
    name.fill("no/such-model")
    name.press("Enter")
    page.get_by_text(re.compile("'no/such-model' could not be loaded")).wait_for()
    page.screenshot(path=tmp_path / "picker.png")
    name.fill("minilm")
    name.press("Enter")
    page.get_by_text("minilm is picked: run the cells below again.").wait_for()


def test_ablation_panel_and_train_this(page, lab, tmp_path):
    run_all(page, lab, "02_ablate_modulation.ipynb")
    drive_ablation_panel(page)
    page.screenshot(path=tmp_path / "panel.png")
    train_and_stop(page, "8101")
    page.screenshot(path=tmp_path / "stopped.png")


def test_the_panel_as_a_web_app(page, app, tmp_path):
    page.goto(app)
    page.get_by_role("button", name="train this").wait_for(timeout=5 * MINUTE)
    assert page.locator(".jp-CodeCell .jp-InputArea:visible, .highlight:visible").count() == 0
    drive_ablation_panel(page)
    train_and_stop(page, "8102")
    page.screenshot(path=tmp_path / "app.png")


def test_seeds_and_intervals(page, lab, tmp_path):
    run_all(page, lab, "06_is_it_real.ipynb")
    assert page.get_by_text("seeds of each loss: 3 3").is_visible()
