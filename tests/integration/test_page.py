"""The page against the real API: Streamlit's own test runner, then a browser."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import requests
from playwright.sync_api import Browser, Page, expect, sync_playwright
from streamlit.testing.v1 import AppTest

from services import processes
from settings import PROJECT_ROOT, settings
from ui import parts
from ui.words import words

APP = PROJECT_ROOT / "ui" / "app.py"
OUTPUT = Path(os.environ.get("DIABETES_TEST_OUTPUT") or PROJECT_ROOT / ".run" / "test-output")
NOBODY = "http://127.0.0.1:9"
DESKTOP, PHONE = (1280, 900), (390, 844)
ENGLISH, SPANISH = words("en"), words("es")


class Running(Protocol):
    """What the fixture `api` gives."""

    url: str


@pytest.fixture
def talks_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    settings.cache_clear()
    parts._about.clear()
    yield monkeypatch
    settings.cache_clear()
    parts._about.clear()


@pytest.fixture
def app(api: Running, talks_to: pytest.MonkeyPatch) -> AppTest:
    """The page as a user finds it who opens it."""
    talks_to.setenv("DIABETES_API_URL", api.url)
    opened = AppTest.from_file(APP, default_timeout=60).run()
    assert not opened.exception
    return opened


def press(app: AppTest, key: str) -> None:
    app.button(key=key).click().run()
    assert not app.exception


def estimated(app: AppTest, example: str) -> float:
    press(app, f"example_{example}")
    press(app, "estimate")
    return float(app.metric[0].value.removesuffix("\N{NBSP}%").replace(",", "."))


def said(app: AppTest) -> str:
    shown = (app.markdown, app.error, app.warning, app.info, app.caption, app.text)
    return "\n".join(element.value for kind in shown for element in kind)


class TestEncounter:
    def test_examples_come_out_in_their_order(self, app: AppTest) -> None:
        low, middle, high = (estimated(app, name) for name in ("low", "middle", "high"))
        assert low < middle < high

    def test_reasons_are_in_words(self, app: AppTest) -> None:
        estimated(app, "high")
        assert ENGLISH("reasons") in [header.value for header in app.header]
        assert "It raises the risk" in said(app)

    def test_language_changes_everything_but_what_was_typed(self, app: AppTest) -> None:
        estimated(app, "high")
        app.text_input(key="field_diag_1").set_value("250.83").run()
        app.radio(key="language").set_value("es").run()
        assert not app.exception
        assert app.selectbox(key="field_gender").value == "Female"
        assert "Mujer" in app.selectbox(key="field_gender").options
        assert app.text_input(key="field_diag_1").value == "250.83"
        assert app.number_input(key="field_number_inpatient").value == 4
        assert app.title[0].value == SPANISH("encounter.title")
        assert "Sube el riesgo" in said(app)
        assert SPANISH("stale") in said(app)
        assert app.query_params["lang"] in ("es", ["es"])

    def test_values_outlive_a_look_at_another_page(self, app: AppTest) -> None:
        press(app, "example_high")
        app.switch_page("model.py").run()
        app.switch_page("encounter.py").run()
        assert app.selectbox(key="field_gender").value == "Female"
        assert app.number_input(key="field_number_inpatient").value == 4

    def test_language_of_the_address(self, api: Running, talks_to: pytest.MonkeyPatch) -> None:
        talks_to.setenv("DIABETES_API_URL", api.url)
        app = AppTest.from_file(APP, default_timeout=60)
        app.query_params["lang"] = "es"
        assert app.run().title[0].value == SPANISH("encounter.title")

    def test_alert_rate_asks_anew(self, app: AppTest) -> None:
        estimated(app, "high")
        before = said(app)
        app.radio(key=parts.ALERT_RATE).set_value(0.1).run()
        assert not app.exception
        assert said(app) != before
        assert app.metric

    @pytest.mark.parametrize(("code", "key"), [("11", "died"), ("13", "hospice")])
    def test_stay_that_is_excluded(self, app: AppTest, code: str, key: str) -> None:
        press(app, "example_high")
        app.selectbox(key="field_discharge_disposition_id").set_value(code)
        press(app, "estimate")
        assert ENGLISH(f"excluded.{key}") in said(app)
        assert not app.metric

    def test_wrong_field_is_marked(self, app: AppTest) -> None:
        app.text_input(key="field_diag_2").set_value("heart")
        press(app, "estimate")
        messages = [error.value for error in app.error]
        assert ENGLISH("invalid.form") in messages
        assert f"**Second diagnosis:** {ENGLISH('invalid.icd9')}" in messages

    def test_medicines_sum_themselves_up(self, app: AppTest) -> None:
        app.selectbox(key="field_insulin").set_value("Up").run()
        assert app.selectbox(key="field_diabetesMed").value == "Yes"
        assert app.selectbox(key="field_change").value == "Ch"

    def test_nothing_known_at_all(self, app: AppTest) -> None:
        for kind in (app.selectbox, app.number_input):
            for widget in kind:
                widget.set_value(None)
        press(app, "estimate")
        assert app.metric[0].value.endswith("%")


class TestBatch:
    def test_file_with_a_broken_row(self, app: AppTest) -> None:
        app.switch_page("batch.py").run()
        text = "encounter_id,age,number_inpatient,discharge_disposition_id\n"
        text += "1,[70-80),9,3\n2,[10-20),0,1\n3,old,0,1\n4,[70-80),0,11\n"
        app.file_uploader(key="batch_file").set_value(("some.csv", text.encode(), "text/csv")).run()
        press(app, "batch_start")
        shown = {metric.label: metric.value for metric in app.metric}
        assert shown[ENGLISH("batch.rows")] == "4"
        assert shown[ENGLISH("batch.broken")] == "1"
        assert shown[ENGLISH("batch.excluded")] == "1"
        assert "Row 3: age" in said(app)
        assert len(app.dataframe[0].value) == 4

    def test_header_that_is_wrong(self, app: AppTest) -> None:
        app.switch_page("batch.py").run()
        file = ("some.csv", b"name\nJane\n", "text/csv")
        app.file_uploader(key="batch_file").set_value(file).run()
        press(app, "batch_start")
        assert ENGLISH("problem.input") in said(app)
        assert not app.metric


class TestModel:
    @pytest.mark.parametrize("language", ["en", "es"])
    def test_page(self, app: AppTest, api: Running, language: str) -> None:
        known = words(language)
        app.radio(key="language").set_value(language).run()
        app.switch_page("model.py").run()
        assert not app.exception
        version = requests.get(f"{api.url}/v1/model", timeout=30).json()["version"]
        assert app.metric[0].value == str(version)
        headers = [header.value for header in app.header]
        assert {known("model.metrics"), known("model.policy"), known("model.gates")} <= {*headers}


@pytest.mark.parametrize("page", ["encounter", "batch", "model"])
def test_every_page_says_what_it_is_not(app: AppTest, page: str) -> None:
    app.switch_page(f"{page}.py").run()
    assert ENGLISH("notice") in said(app)


def test_api_away_and_back(api: Running, talks_to: pytest.MonkeyPatch) -> None:
    talks_to.setenv("DIABETES_API_URL", NOBODY)
    app = AppTest.from_file(APP, default_timeout=60).run()
    assert not app.exception
    assert ENGLISH("problem.away") in said(app)
    assert NOBODY in said(app)
    talks_to.setenv("DIABETES_API_URL", api.url)
    settings.cache_clear()
    press(app, "retry")
    assert app.button(key="estimate")


@pytest.fixture(scope="module")
def page_url(api: Running) -> Iterator[str]:
    """`python -m ui` in a process of its own, in a folder that is not the repository's."""
    port = processes.free_port(56500)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ui"],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(PROJECT_ROOT),
                "DIABETES_API_URL": api.url,
                "DIABETES_UI_PORT": str(port),
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_for(url, process)
            yield url
        finally:
            process.terminate()
            process.wait(30)
        log.seek(0)
        assert "Traceback" not in log.read()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(f"{url}/_stcore/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.2)
    raise AssertionError("the page did not start")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        options = ["--no-sandbox"]  # tests also run as root, in containers
        chromium = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=options
        )
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Browser, page_url: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A browser's page of the size that the test asks for; it has to stay without any error."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    errors: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request",
        lambda r: errors.append(r.url) if not r.url.startswith((page_url, "data:", "blob:")) else 0,
    )
    page.goto(page_url)
    expect(page.get_by_role("button", name=ENGLISH("estimate"))).to_be_visible(timeout=60_000)
    yield page
    page.close()
    assert errors == []


def go_to(page: Page, name: str) -> None:
    link = page.get_by_role("link", name=ENGLISH(f"nav.{name}"))
    if not link.is_visible() or page.viewport_size == {"width": PHONE[0], "height": PHONE[1]}:
        page.get_by_test_id("stExpandSidebarButton").click()
    link.click()
    if page.viewport_size == {"width": PHONE[0], "height": PHONE[1]}:
        page.get_by_test_id("stSidebarCollapseButton").get_by_role("button").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(ENGLISH(f"{name}.title"))


def quiet(page: Page) -> None:
    """Wait until Streamlit has drawn all there is."""
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")
    page.wait_for_timeout(1_000)  # a chart is drawn by the browser after that


def assert_fits(page: Page) -> None:
    widths = page.evaluate(
        "[document.documentElement, document.querySelector('[data-testid=stMain]')]"
        ".map(e => e.scrollWidth - e.clientWidth)"
    )
    assert widths == [0, 0]


def assert_inputs_have_names(page: Page) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, select')]
        .filter(e => e.type !== 'hidden')
        .filter(e => !(e.getAttribute('aria-label') || e.labels?.length
            || e.getAttribute('aria-labelledby')))
        .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert unnamed == []


def picture(page: Page, name: str) -> None:
    """A picture of the whole page; Streamlit scrolls inside it, so it is made as tall."""
    size = page.viewport_size
    assert size is not None
    tall = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": size["width"], "height": tall + 10})
    quiet(page)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=OUTPUT / f"page_{name}_{size['width']}.png")
    page.set_viewport_size(size)


@pytest.mark.parametrize("opened", [DESKTOP, PHONE], indirect=True, ids=["desktop", "phone"])
class TestInTheBrowser:
    def test_encounter(self, opened: Page) -> None:
        opened.get_by_role("button", name=ENGLISH("example.high")).click()
        expect(
            opened.get_by_role("textbox", name=ENGLISH.field("diag_1"), exact=True)
        ).to_have_value("428")
        opened.get_by_role("button", name=ENGLISH("estimate")).click()
        expect(opened.get_by_test_id("stMetricValue")).to_contain_text("%")
        expect(opened.get_by_test_id("stVegaLiteChart").locator("canvas, svg")).to_be_visible()
        quiet(opened)
        assert_fits(opened)
        assert_inputs_have_names(opened)
        picture(opened, "encounter")

    def test_model(self, opened: Page) -> None:
        go_to(opened, "model")
        expect(opened.get_by_test_id("stTable").nth(1)).to_be_visible()
        quiet(opened)
        assert_fits(opened)
        picture(opened, "model")

    def test_batch(self, opened: Page, page_url: str) -> None:
        go_to(opened, "batch")
        with opened.expect_download() as download:
            opened.get_by_role("button", name=ENGLISH("batch.example")).click()
        example = download.value.path()
        opened.locator("input[type=file]").set_input_files(
            {"name": "example.csv", "mimeType": "text/csv", "buffer": example.read_bytes()}
        )
        opened.get_by_role("button", name=ENGLISH("batch.start")).click()
        with opened.expect_download() as download:
            opened.get_by_role("button", name=ENGLISH("batch.download")).click()
        answers = list(csv.DictReader(io.StringIO(download.value.path().read_text())))
        assert len(answers) == len(example.read_text().splitlines()) - 1
        assert not any(answer["error"] for answer in answers)
        quiet(opened)
        assert_fits(opened)
        assert_inputs_have_names(opened)


@pytest.mark.parametrize("opened", [DESKTOP], indirect=True, ids=["desktop"])
def test_switching_the_language_keeps_what_was_typed(opened: Page) -> None:
    opened.get_by_role("button", name=ENGLISH("example.high")).click()
    diagnosis = opened.get_by_role("textbox", name=ENGLISH.field("diag_1"), exact=True)
    expect(diagnosis).to_have_value("428")
    diagnosis.fill("414")
    opened.get_by_text(SPANISH.all["language"]).click()
    expect(opened.get_by_role("heading", level=1)).to_have_text(SPANISH("encounter.title"))
    expect(opened.get_by_role("textbox", name=SPANISH.field("diag_1"), exact=True)).to_have_value(
        "414"
    )
    gender = opened.get_by_role("combobox", name=SPANISH.field("gender"))
    expect(gender).to_have_value(SPANISH.value("gender", "Female"))
    expect(opened.locator("html")).to_have_attribute("lang", "es")
    quiet(opened)
