"""
The page in a real browser: Debian's Chromium without a window, driven by selenium, uses a server
whose models are tiny. Skipped, with the reason, where there is no Chromium.
"""
import contextlib
import json
import shutil
import time

import pytest

pytest.importorskip("uvicorn", reason="the server needs it: pip install starlette uvicorn")
selenium = pytest.importorskip("selenium", reason="it drives the browser: pip install selenium")

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from test_serve import EVIL, running, serve_models, tiny_engine

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("no browser: apt-get install chromium chromium-driver", allow_module_level=True)
NAMES = ("a-base", "b-sft")


class Slow:
    """Steps that take a moment while `seconds` is set, so that a reply can be stopped."""

    def __init__(self, scheduler):
        self.take_step = scheduler.step
        self.seconds = 0

    def __call__(self):
        time.sleep(self.seconds)
        return self.take_step()


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    engines = {name: tiny_engine(tokenizer, 256, seed) for seed, name in enumerate(NAMES, 4)}
    server = serve_models(folder, engines)
    for scheduler in server.dispatcher.schedulers.values():
        scheduler.step = Slow(scheduler)
    rows = [dict(step=i, loss=8 - i / 9, val_loss=8.0 - i / 8) for i in range(50)]
    rows += [dict(step=0, sample=EVIL), dict(step=49, sample="The end.")]
    (folder / "b-sft" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield server
    server.dispatcher.stop()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage",
                 "window-size=1400,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    except WebDriverException as error:
        pytest.skip(f"Chromium does not start: {error.msg}")
    yield driver
    driver.quit()


class Page:
    """What a user does on the page."""

    def __init__(self, browser, port):
        self.browser = browser
        browser.get(f"http://127.0.0.1:{port}/")
        browser.execute_script("localStorage.clear(); location.hash = ''; localStorage.setItem("
                               "'chat-settings', JSON.stringify({max_tokens: 24}))")
        browser.refresh()
        browser.execute_script("window.steal = () => { window.stolen = 1 }")
        self.until(lambda: self.all("#models .chip"))

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector, text=None):
        """The last element that matches, and has the text."""
        return [e for e in self.all(selector) if text is None or e.text == text][-1]

    def texts(self, selector):
        """The texts of elements, read at one moment, since the page may redraw."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def until(self, condition, seconds=15):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(WebDriverException, IndexError):
                if condition():
                    return
            time.sleep(0.02)
        raise AssertionError(self.browser.get_log("browser"))

    def ask(self, text, wait=True):
        self.one("#question").send_keys(text, Keys.ENTER)
        self.until(lambda: self.texts(".asked .text")[-1] == text)
        if wait:
            self.until(lambda: self.one("#send").text == "Send")

    def set(self, selector, value):
        """Moves a slider."""
        self.browser.execute_script(
            "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'))",
            selector, value)

    def errors(self):
        return [entry["message"] for entry in self.browser.get_log("browser")
                if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def port(server):
    with running(server) as port:
        yield port


@pytest.fixture
def page(browser, port):
    browser.get_log("browser")
    page = Page(browser, port)
    yield page
    assert page.errors() == [] and browser.execute_script("return window.stolen") in (0, None)
    assert browser.execute_script("return document.querySelectorAll('main img, main script')"
                                  ".length") == 0


def test_a_reply_streams_and_can_be_stopped(page, server):
    step = server.dispatcher.schedulers["b-sft"].step
    step.seconds = 0.1
    page.ask("Tell me <b>all</b>", wait=False)
    page.until(lambda: page.texts(".reply .body")[0].strip())
    first = page.texts(".reply .body")[0]
    page.until(lambda: len(page.texts(".reply .body")[0]) > len(first))
    page.one("#send", "Stop").click()
    page.until(lambda: "Stopped." in page.texts(".reply .body")[0])
    step.seconds = 0
    page.until(lambda: server.dispatcher.schedulers["b-sft"].running == 0)


def test_a_reply_is_regenerated_and_the_old_one_kept(page):
    page.ask("Hi")
    before = page.texts(".reply .body")[0]
    page.one(".reply button", "Regenerate").click()
    page.until(lambda: "2 of 2" in page.texts(".reply .acts")[0])
    assert page.texts(".reply .body")[0] != before
    page.one(".reply button", "‹").click()
    page.until(lambda: page.texts(".reply .body")[0] == before)


def test_behind_it_are_the_tokens_and_the_roads_not_taken(page, tokenizer):
    page.ask("Hi")
    page.one(".asked button", "Behind it").click()
    here = page.texts("#behind .message.here .tok")
    assert here[0] == f"<|im_start|>{tokenizer.special['<|im_start|>']}"
    ids = tokenizer.render([dict(role="user", content="Hi")])[0][1:]
    assert "".join(here) == "".join(tokenizer.decode([i]) + str(i) for i in ids)
    page.all("#behind button.tok")[2].click()
    page.until(lambda: len(page.all("#behind .bar")) >= 10)
    kept = page.texts("#behind button.tok")[:2]
    other = page.one("#behind button.bar:not(.drawn)")
    label = other.find_element(By.CSS_SELECTOR, ".label").text
    other.click()
    page.until(lambda: "2 of 2" in page.texts(".reply .acts")[0] and page.all("#behind .forked"))
    assert page.texts("#behind button.tok")[:2] == kept
    assert label.replace("·", "") in page.texts("#behind .forked")[0]


def test_stages_answer_side_by_side(page):
    page.one(".chip[data-model='a-base']").click()
    page.ask("Who are you?")
    assert page.texts(".reply .badge") == ["base", "SFT"]
    assert len(page.all(".reply .text.document")) == 1 and page.all(".replies.several")


def test_a_question_is_edited_and_a_chat_is_found_again(page):
    page.ask("First")
    page.ask("Second")
    page.all(".asked button")[0].click()
    box = page.one("#question")
    assert box.get_attribute("value") == "First" and not page.all(".turn")
    box.clear()
    page.ask("Other")
    page.browser.refresh()
    page.until(lambda: page.all(".history .open"))
    page.all(".history .open")[0].click()
    assert page.texts(".asked .text") == ["Other"] and page.texts(".reply .body")[0]


def test_old_chats_lose_their_roads_when_the_browser_is_full(page):
    page.ask("First")
    page.browser.execute_script("localStorage.setItem('x', 'y'.repeat(5 * 1024 * 1024 - 30000))")
    for n in range(4):
        page.one("#new-chat").click()
        page.ask(f"Question {n}")
    kept = page.browser.execute_script("return chats.map(one => [one.title, tokensOf(one).filter("
                                       "token => token.top).length > 0])")
    stored = page.browser.execute_script("return JSON.parse(localStorage.chats).length")
    assert kept[0] == ["Question 3", True] and stored == len(kept) and not kept[-1][1]


def test_what_people_and_models_write_is_text(page):
    page.one("#models button", "Settings").click()
    page.one("#system").send_keys(EVIL)
    page.ask(EVIL)
    page.one(".reply button", "Behind it").click()
    page.until(lambda: page.all("#behind .message"))
    assert page.texts(".asked .text") == [EVIL] and EVIL[:60] in page.texts(".history .open")[0]
    page.browser.execute_script("location.hash = 'tokens'")
    page.one("#tokens-text").send_keys(EVIL)
    page.until(lambda: EVIL in page.texts("#cuts .flow")[0])
    page.browser.execute_script("location.hash = 'training'")
    page.set("#run", "b-sft")
    page.until(lambda: page.texts("#sample-step") == ["after step 49"])
    page.set("#sample-at", 0)
    assert page.texts("#samples .sample") == [EVIL]


def test_damaged_or_wicked_history_is_harmless(page, port):
    wicked = [dict(title=EVIL, system=EVIL, models=[EVIL], id=EVIL, turns=[dict(
        text=EVIL, replies={EVIL: dict(at=0, variants=[dict(tokens=[dict(
            t=[EVIL, EVIL, EVIL, False], text=EVIL)], error=EVIL, prompt=[])])})]),
              dict(title=3), None]
    page.browser.execute_script("localStorage.setItem('chats', arguments[0])", json.dumps(wicked))
    page.browser.refresh()
    page.until(lambda: page.all(".history .open"))
    page.all(".history .open")[0].click()
    assert page.texts(".reply .who span") == [EVIL] and EVIL in page.texts(".reply .body")[0]
    page.one(".reply button", "Behind it").click()
    assert page.texts("#behind .tok")[0].startswith("<script>")


def test_a_document_is_continued_and_its_bars_follow_the_temperature(page):
    page.browser.execute_script("location.hash = 'document'")
    page.until(lambda: page.all("#next-bars .bar"))
    before = page.texts("#next-bars .pct")[0]
    page.set("#document-settings-temperature", 0)
    page.until(lambda: page.texts("#next-bars .pct") == ["100 %"])
    page.set("#document-settings-temperature", 2)
    page.until(lambda: page.texts("#next-bars .pct")[0] not in (before, "100 %"))
    page.set("#document-settings-max_tokens", 8)
    page.one("#continue").click()
    page.until(lambda: page.one("#undo").is_enabled())
    assert len(page.one("#document-text").get_attribute("value")) > len("This function returns")
    page.one("#undo").click()
    page.one("#ten").click()
    page.until(lambda: page.one("#ten").is_enabled() and len(page.all("#continuations p")) == 10)
    assert len(set(page.texts("#continuations p"))) > 5


def test_answers_are_ranked_with_mouse_and_keyboard(page, server):
    page.browser.execute_script("location.hash = 'rank'")
    page.set("#rank-settings-max_tokens", 8)
    page.one("#rank-prompt").send_keys("Say")
    page.one("#rank-write").click()
    page.until(lambda: page.one("#rank-save").is_displayed())
    a, b, c, d = page.texts("#ranking .text")
    page.all("#ranking .handle")[0].send_keys(Keys.ARROW_DOWN)
    assert page.texts("#ranking .text") == [b, a, c, d]
    handles = page.all("#ranking .handle")
    ActionChains(page.browser).drag_and_drop(handles[3], handles[0]).perform()
    page.until(lambda: page.texts("#ranking .text")[0] == d)
    order = page.texts("#ranking .text")
    page.one("#rank-save").click()
    page.until(lambda: "Saved" in page.one("#rank-status").text)
    saved = json.loads(server.preferences.read_text("utf-8").splitlines()[-1])
    assert saved == dict(prompt="Say", ranking=order)


def test_a_run_that_trains_is_drawn_as_it_goes(page, server):
    page.browser.execute_script("location.hash = 'training'")
    page.set("#run", "b-sft")
    page.until(lambda: page.all("#curves svg path"))
    with open(server.models["b-sft"].run / "log.jsonl", "a") as file:
        file.write(json.dumps(dict(step=60, loss=2.0)) + "\n")
    page.until(lambda: page.texts("#run-note") == ["step 60"] and page.one("#live").is_displayed())


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(page, width):
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.ask("Hi")
    page.one(".reply button", "Behind it").click()
    for view in ("chat", "document", "tokens", "training", "rank"):
        page.browser.execute_script(f"location.hash = '{view}'")
        time.sleep(0.1)
        assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
