"""What only a browser shows: notebooks in JupyterLab, the panel in Voilà, what is pressed there.

A notebook runs up to its last widget here, on the runs in FCSE_RUNS where those are there; nbval
runs each as a whole.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# Once more where it fails: a browser is a machine of its own, and the summary says that it was.
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
    pytest.mark.flaky(reruns=1),
]

LAST = {
    "01_train": "picker.widget",
    "02_ablate_modulation": "training.widget",
    "04_alignment_uniformity": "TrajectoryPlane(path).widget",
    "05_umap": "explorer.widget",
    "06_is_it_real": 'print("seeds of each loss:"',
}
"""Notebook -> what stands in the last cell that it runs here; all of the others are run."""

MINUTE = 60_000
# Scatter widgets draw with WebGL, in software where there is no GPU.
FLAGS = [
    "--no-sandbox",
    "--use-gl=swiftshader",
    "--enable-webgl",
    "--ignore-gpu-blocklist",
    "--enable-unsafe-swiftshader",
]


@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
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
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
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
def server(tmp_path_factory):
    """JupyterLab on the notebooks without outputs, and as they are stored in a folder beside.

    Every cell is in the page, not only those in view.
    """
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, folder / "stored")
    for path in NOTEBOOKS.glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        if path.stem in LAST:
            (last,) = (i for i, cell in enumerate(notebook.cells) if LAST[path.stem] in cell.source)
            del notebook.cells[last + 1 :]
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
                # Two maps of the sentences are what is clicked on, whatever their number.
                cell.source = cell.source.replace("POINTS = 1200", "POINTS = 400")
        nbformat.write(notebook, folder / path.name)
    settings = folder / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')
    port = free_port()
    options = ["--no-browser", "--allow-root", f"--port={port}", f"--ServerApp.root_dir={folder}"]
    options += ["--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
    server = serve(["jupyterlab", *options], port, folder)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture
def lab(server):
    """Where JupyterLab opens notebooks; no kernel outlives the test."""
    yield f"{server}/lab/tree"
    for session in json.load(urllib.request.urlopen(f"{server}/api/sessions")):
        end = urllib.request.Request(f"{server}/api/sessions/{session['id']}", method="DELETE")
        urllib.request.urlopen(end)


@pytest.fixture
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


def has_kernel(lab):
    """Whether a kernel idles to which a page has connected.

    Before that JupyterLab calls a notebook idle too, and asks for a kernel when told to run it.
    """
    sessions = json.load(urllib.request.urlopen(urljoin(lab, "/api/sessions")))
    kernels = [session["kernel"] for session in sessions]
    return any(k["execution_state"] == "idle" and k["connections"] for k in kernels)


def open_notebook(page, lab, name):
    page.goto(f"{lab}/{name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")


def run_all(page, lab, name):
    """Open a notebook, run all its cells, wait for the last; no error, no picture without words."""
    open_notebook(page, lab, name)
    when_changed(page, lambda: has_kernel(lab), before=False)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")
    prompts = page.locator(".jp-CodeCell .jp-InputArea-prompt")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    for _ in range(15 * 60 * 5):
        page.wait_for_timeout(200)
        if all(re.search(r"\d", text) for text in prompts.all_inner_texts()):
            break
    else:
        raise AssertionError(f"not all cells ran: {prompts.all_inner_texts()}")
    errors = page.locator('.jp-OutputArea-output[data-mime-type*="error"]')
    assert errors.count() == 0, errors.first.inner_text()
    assert pictures(page) > 0


def pictures(page):
    """How many pictures the page shows; each is drawn and has words."""
    found = page.locator(".jp-OutputArea-output img").all()
    for picture in found:
        assert picture.get_attribute("alt")
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    return len(found)


def when_changed(page, read, before):
    """What `read` gives once it is something else than before."""
    for _ in range(300):
        page.wait_for_timeout(200)
        if (now := read()) != before:
            return now
    raise AssertionError("nothing changed within a minute")


def settled(page, read):
    """What `read` gives once it has given the same for a second."""
    seen = [read()]
    for _ in range(300):
        page.wait_for_timeout(200)
        seen.append(read())
        if len(seen) > 5 and all(each == seen[-1] for each in seen[-6:]):
            return seen[-1]
    raise AssertionError("still changing after a minute")


def drive_ablation_panel(page):
    """Move a slider and choose a preset by keyboard and mouse: the picture follows each time."""
    picture = page.locator(".fcse-panel img[alt*='logit' i]")

    def source():
        return picture.get_attribute("src")

    first = source()
    slider = page.get_by_role("slider", name="temperature τ")
    slider.focus()
    slider.press("ArrowRight")
    moved = when_changed(page, source, first)
    page.get_by_role("button", name="Hardness-InfoNCE").click()
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


def drop_a_corpus(page, folder):
    """Choose a file with bytes that are no text, and one that is: both are answered."""
    button = page.get_by_role("button", name="upload a text file")
    for content, answer in (
        (b"a line\nbad \xff\xfe\n", re.compile(r"is not UTF-8 \(line 2\)")),
        (b"a line\nanother line\n", "mine.txt is the corpus now."),
    ):
        (folder / "mine.txt").write_bytes(content)
        with page.expect_file_chooser() as chooser:
            button.click()
        chooser.value.set_files(folder / "mine.txt")
        page.get_by_text(answer).wait_for()
    corpus = page.get_by_label("corpus", exact=True)
    corpus.fill("wiki-mini")
    corpus.press("Tab")


def test_stored_outputs_show(page, lab):
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        outputs = [o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", [])]
        stored = sum("image/png" in output.get("data", {}) for output in outputs)
        open_notebook(page, lab, f"stored/{path.name}")
        images = page.locator(".jp-OutputArea-output img")
        when_changed(page, lambda: images.count() < stored, True)  # noqa: B023
        assert pictures(page) == stored > 0, path.name


def test_picker_says_what_it_cannot_load(page, lab, tmp_path):
    run_all(page, lab, "01_train.ipynb")
    name = page.get_by_label("encoder", exact=True)
    name.fill("no/such-model")
    name.press("Enter")
    page.get_by_text(re.compile("'no/such-model' could not be loaded")).wait_for()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/run.json").write_bytes(b"\xff no record")
    name.fill(str(tmp_path / "broken"))
    name.press("Enter")
    page.get_by_text(re.compile("run.json.*stays picked")).wait_for()
    page.screenshot(path=tmp_path / "picker.png")
    name.fill("minilm")
    name.press("Enter")
    page.get_by_text("minilm is picked: run the cells below again.").wait_for()


def test_ablation_panel_and_train_this(page, lab, tmp_path):
    run_all(page, lab, "02_ablate_modulation.ipynb")
    drive_ablation_panel(page)
    page.screenshot(path=tmp_path / "panel.png")
    drop_a_corpus(page, tmp_path)
    train_and_stop(page, "8101")
    page.screenshot(path=tmp_path / "stopped.png")


def test_the_panel_as_a_web_app(page, app, tmp_path):
    page.goto(app)
    page.get_by_role("button", name="train this").wait_for(timeout=5 * MINUTE)
    assert page.locator(".jp-CodeCell .jp-InputArea:visible, .highlight:visible").count() == 0
    drive_ablation_panel(page)
    train_and_stop(page, "8102")
    page.screenshot(path=tmp_path / "app.png")


def test_negatives_follow_anchor_and_step(page, lab, tmp_path):
    run_all(page, lab, "03_hard_negatives.ipynb")
    table = page.locator("table.fcse-table").first
    anchor = page.get_by_label("anchor", exact=True)
    first = table.inner_text()
    anchor.select_option(index=9)
    chosen = when_changed(page, table.inner_text, first)
    slider = page.get_by_role("slider", name="training step")
    slider.focus()
    slider.press("ArrowRight" if slider.get_attribute("aria-valuenow") == "0.0" else "ArrowLeft")
    when_changed(page, table.inner_text, chosen)
    page.screenshot(path=tmp_path / "negatives.png")


def test_plane_follows_its_weight(page, lab, tmp_path):
    run_all(page, lab, "04_alignment_uniformity.ipynb")
    explorer = page.locator(".widget-vbox").filter(has=page.locator("canvas")).last
    explorer.scroll_into_view_if_needed()
    before = settled(page, explorer.locator("canvas").last.screenshot)
    slider = explorer.get_by_role("slider", name="weight of uniformity w")
    slider.focus()
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    when_changed(page, lambda: explorer.locator("canvas").last.screenshot(), before)
    page.screenshot(path=tmp_path / "plane.png")


def test_maps_select_together(page, lab, tmp_path):
    run_all(page, lab, "05_umap.ipynb")
    selected = page.locator("caption", has_text="sentences selected").first
    page.get_by_label("select a group", exact=True).select_option(index=1)
    page.get_by_text(re.compile(r"[1-9]\d* of [\d,]+ sentences selected")).first.wait_for()
    first = selected.inner_text()
    word = page.get_by_label("select by word", exact=True)
    word.fill("war")
    word.press("Enter")
    when_changed(page, selected.inner_text, first)
    page.screenshot(path=tmp_path / "maps.png")


def test_seeds_and_intervals(page, lab, tmp_path):
    run_all(page, lab, "06_is_it_real.ipynb")
    assert page.get_by_text("seeds of each loss: 3 3").is_visible()
    folder = page.get_by_label("folder", exact=True)
    folder.fill(str(tmp_path / "nowhere"))
    folder.press("Enter")
    page.get_by_text(re.compile("no folder of runs at .*stays picked")).wait_for()
    page.screenshot(path=tmp_path / "seeds.png")
