"""Take README's pictures of a running platform with headless Chromium.

Usage: make screenshots   (after make run; needs chromium on the PATH, or CHROMIUM=path)

That of the API under load comes last: Locust asks it for three minutes, at the end more than it
takes, so that some requests are shed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import Browser, FloatRect, Locator, Page, sync_playwright

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

from loadtest.__main__ import running  # noqa: E402
from loadtest.run import Load, Objective, run  # noqa: E402
from services import processes  # noqa: E402
from services.airflow import ADMIN, Airflow  # noqa: E402
from services.state import Secrets  # noqa: E402
from services.web import PAGE  # noqa: E402
from settings import settings  # noqa: E402
from ui.words import words  # noqa: E402

DAG_ID = "diabetes_data_processing"
PUBLISHED = (
    "diabetes_train",
    "diabetes_validation",
    "diabetes_test",
    "diabetes_excluded",
    "batch_info",
)
LOAD_USERS = 256
"""At the end of the ramp: twice as many as the service takes at once."""


def main() -> int:
    """Write the pictures to the folder given, and return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PROJECT_ROOT / "docs" / "images")
    help_of_load = "that Locust asks the API; 0: no picture of it"
    parser.add_argument("--load-seconds", type=int, default=180, help=help_of_load)
    arguments = parser.parse_args()
    chromium = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    if not chromium:
        sys.stderr.write("error: no chromium on the PATH; install it or set CHROMIUM to its path\n")
        return 1
    state = settings().state_dir
    servers = processes.find(state, "api-server")
    if not servers:
        sys.stderr.write("error: Airflow is not running; start it with make run\n")
        return 1
    password = Secrets(state)["admin"]
    airflow = Airflow(state, servers[0].environ(), password)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-background-networking", "--disable-component-update"],
        )
        _airflow_graph(browser, airflow, password, arguments.out / "airflow-graph.png")
        _dbt_lineage(browser, airflow.url, arguments.out / "dbt-lineage.png")
        uri = (state / "mlflow" / "url").read_text()
        _model_card(browser, uri, arguments.out / "model-card.png")
        port = processes.find(state, PAGE.name)[0].environ()[PAGE.port_variable]
        _page(browser, f"http://127.0.0.1:{port}", arguments.out)
        if arguments.load_seconds:
            _under_load(browser, arguments.load_seconds, arguments.out / "load-locust.png")
        browser.close()
    return 0


def _airflow_graph(browser: Browser, airflow: Airflow, password: str, picture: Path) -> None:
    """Picture of the last run's graph, with the groups of the pipeline opened."""
    url = airflow.url
    runs = airflow.call("GET", f"dags/{DAG_ID}/dagRuns", params={"order_by": "-start_date"})
    run_id = quote(runs["dag_runs"][0]["dag_run_id"], safe="")
    page = browser.new_page(viewport={"width": 3400, "height": 1000})
    page.goto(f"{url}/auth/login/")
    page.locator("input[name=username]").fill(ADMIN)
    page.locator("input[name=password]").fill(password)
    page.locator("button[type=submit]").click()
    page.wait_for_url(lambda address: "login" not in address)
    # As if a reader had opened these two groups by hand.
    page.evaluate(f"""localStorage.setItem('{DAG_ID}/open-groups', '["ingest", "transform"]')""")
    page.goto(f"{url}/dags/{DAG_ID}/runs/{run_id}")
    page.wait_for_load_state("networkidle")
    page.get_by_label("Show Graph").click()
    # Give the graph nearly the whole window, then let it find its size anew.
    border = page.locator("[data-panel-resize-handle-id], [role=separator]").first.bounding_box()
    if border:
        page.mouse.move(border["x"] + border["width"] / 2, border["y"] + 300)
        page.mouse.down()
        page.mouse.move(3300, border["y"] + 300, steps=10)
        page.mouse.up()
    page.wait_for_timeout(4000)
    boxes = [node.bounding_box() for node in page.locator(".react-flow__node").all()]
    seen = [box for box in boxes if box]
    left, top = min(box["x"] for box in seen), min(box["y"] for box in seen)
    right = max(box["x"] + box["width"] for box in seen)
    bottom = max(box["y"] + box["height"] for box in seen)
    page.screenshot(
        path=picture,
        clip={
            "x": left - 20,
            "y": top - 20,
            "width": right - left + 40,
            "height": bottom - top + 40,
        },
    )


def _dbt_lineage(browser: Browser, url: str, picture: Path) -> None:
    page: Page = browser.new_page(viewport={"width": 1700, "height": 520})
    shown = "%20".join(f"%2B{table}" for table in PUBLISHED)
    page.goto(f"{url}/cosmos/diabetes/dbt_docs_index.html#!/overview?g_v=1&g_i={shown}")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(4000)
    page.screenshot(path=picture)


def _model_card(browser: Browser, uri: str, picture: Path) -> None:
    """Picture of the curves and confusion matrices on the champion's card."""
    from training.actions import open_tracker
    from training.registry import CHALLENGER, CHAMPION, find_version

    client = open_tracker(uri, settings().state_dir).client()
    version = find_version(client, CHAMPION) or find_version(client, CHALLENGER)
    if version is None:
        raise SystemExit("error: no version is registered; run make run first")
    with tempfile.TemporaryDirectory() as folder:
        card = client.download_artifacts(version.run_id, "card/model_card.html", folder)
        page = browser.new_page(viewport={"width": 1150, "height": 900})
        page.goto(Path(card).as_uri())
        _across(page, page.locator("img").all()[:6], picture)


def _page(browser: Browser, url: str, folder: Path) -> None:
    """Pictures of a risk with its reasons, and of the page about the model."""
    text = words("en")
    page = browser.new_page(viewport={"width": 1280, "height": 1500})
    page.goto(url)
    page.get_by_role("button", name=text("example.high")).click()
    page.get_by_role("button", name=text("estimate")).click()
    page.get_by_text(text("reasons"), exact=True).wait_for()
    page.wait_for_timeout(2000)
    page.screenshot(path=folder / "page-encounter.png")
    page.get_by_role("link", name=text("nav.model")).click()
    page.get_by_text(text("model.calibration"), exact=True).wait_for()
    page.wait_for_timeout(2000)
    page.screenshot(path=folder / "page-model.png")


def _under_load(browser: Browser, seconds: int, picture: Path) -> None:
    """Picture of a ramp of users, as Locust's report draws it."""
    url = running(settings())
    load = Load(url=url, shape="ramp", users=LOAD_USERS, seconds=seconds)
    with tempfile.TemporaryDirectory() as report:
        found = run(load, Objective(), Path(report))
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto((Path(report) / "report.html").as_uri())
        page.wait_for_timeout(3000)
        _across(page, page.locator("canvas").all(), picture)
    sys.stdout.write(f"What it asked can be deleted from the database with\n  {found['forget']}\n")


def _across(page: Page, shown: list[Locator], picture: Path) -> None:
    """Picture of the page's whole width, from the first of what is shown to the last."""
    boxes = [box for each in shown if (box := each.bounding_box())]
    top = min(box["y"] for box in boxes) - 10
    bottom = max(box["y"] + box["height"] for box in boxes) + 10
    width = page.evaluate("window.innerWidth")
    clip: FloatRect = {"x": 0, "y": top, "width": width, "height": bottom - top}
    page.screenshot(path=picture, full_page=True, clip=clip)


if __name__ == "__main__":
    sys.exit(main())
