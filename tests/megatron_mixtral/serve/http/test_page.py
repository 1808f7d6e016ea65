"""The chat page in a real Chromium: by keyboard alone, on a phone's screen, in the dark, against a real server."""

import re
import shutil

import pytest
import small_server

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="the page's test drives Chromium by playwright")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install --no-install-recommends chromium"
)


@pytest.fixture(scope="module")
def running(plain_server):
    return plain_server


@pytest.fixture(scope="module")
def browser():
    playwright.expect.set_options(timeout=15_000)
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


@pytest.fixture
def visit(running, browser):
    """Open the page as a visitor with these traits; what the page's console complains about fails the test."""
    contexts, complaints = [], []

    def open_page(url=running.url, **traits):
        context = browser.new_context(**traits)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda m: complaints.append(m.text) if m.type == "error" and "400" not in m.text else None
        )
        page.goto(url + "/")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page, question):
    page.keyboard.type(question)
    page.keyboard.press("Enter")


def answers(page):
    return page.locator("article.assistant div").all_inner_texts()


def until_answered(page):
    page.locator("#send").wait_for(state="visible")


def test_a_conversation_by_keyboard_alone(visit, running):
    page = visit()
    playwright.expect(page.locator("#model")).to_have_text("tiny")
    settings = {"temperature": "0", "max_tokens": "8"}
    page.keyboard.press("Shift+Tab")  # from the question, which has the focus, back to Settings
    page.keyboard.press("Enter")
    for name, value in settings.items():
        page.locator(f"#{name}").fill(value)
    page.locator("#question").focus()
    ask(page, "Hello")
    until_answered(page)
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 8}
    said = running.client().post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert page.locator("article.assistant div").first.text_content() == said
    assert "8 tokens" in page.locator("article.assistant footer").first.inner_text()
    page.keyboard.press("ArrowUp")
    playwright.expect(page.locator("#question")).to_have_value("Hello")
    page.locator("#question").fill("")
    ask(page, "And now?")
    until_answered(page)
    assert len(answers(page)) == 2
    page.reload()
    assert page.locator("#temperature").input_value() == "0"
    assert answers(page) == []


def test_words_come_as_they_are_made_and_escape_stops_them(visit, running):
    page = visit()
    ask(page, "Tell me everything")
    playwright.expect(page.locator("article.assistant div")).to_have_text(re.compile(r"[\s\S]{20}"))
    assert page.locator("#stopping").is_visible()
    assert running.metric("requests_running") == 1
    page.keyboard.press("Escape")
    assert running.until(lambda: running.metric("requests_running") == 0, 5) < 1
    until_answered(page)
    assert "stopped" in page.locator("article.assistant footer").inner_text()


@pytest.mark.parametrize("words", [r"[\s\S]{20}", ""], ids=["amid an answer", "before its first word"])
def test_a_new_conversation_forgets_the_one_that_is_still_answered(visit, words):
    page = visit()
    ask(page, "Tell me everything")
    if words:
        playwright.expect(page.locator("article.assistant div")).to_have_text(re.compile(words))
    page.get_by_role("button", name="New").click()
    until_answered(page)
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Hi")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "Hi"}]
    page.keyboard.press("Escape")
    until_answered(page)


def test_a_system_prompt_and_a_stop_string_are_sent(visit):
    page = visit()
    page.get_by_role("button", name="Settings").click()
    page.locator("#system").fill("Be brief.")
    page.locator("#stop").fill("STOP\\n")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.locator("#question").fill("Hi")
        page.keyboard.press("Enter")
    body = sent.value.post_data_json
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert body["stop"] == "STOP\n"
    page.keyboard.press("Escape")
    until_answered(page)


def test_what_the_server_refuses_is_shown_and_what_is_wrong_is_not_sent(visit):
    page = visit()
    page.locator("#question").fill("word " * 400)
    page.keyboard.press("Enter")
    playwright.expect(page.locator("article.problem div")).to_contain_text("context is 256")
    playwright.expect(page.locator("#question")).to_have_value("word " * 399 + "word")  # to be made shorter
    playwright.expect(page.locator("article.problem div")).to_be_in_viewport(ratio=1)
    page.locator("#question").fill("")
    page.get_by_role("button", name="Settings").click()
    page.locator("#temperature").fill("9")
    page.locator("#question").focus()
    ask(page, "Hi")
    assert answers(page) == []


def test_markup_in_words_stays_words(visit):
    page = visit()
    ask(page, "<img src=x onerror=\"document.title='owned'\"><b>bold</b>")
    page.keyboard.press("Escape")
    until_answered(page)
    assert "<b>bold</b>" in page.locator("article.user div").inner_text()
    assert page.locator("article b, article img").count() == 0
    assert page.title() == "tiny"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_in_either_light(visit, scheme):
    page = visit(viewport={"width": 360, "height": 640}, color_scheme=scheme, has_touch=True, is_mobile=True)
    page.get_by_role("button", name="Settings").tap()
    ask(page, "x" * 300)
    page.keyboard.press("Escape")
    until_answered(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for button in ("New", "Settings", "Send"):
        box = page.get_by_role("button", name=button, exact=True).bounding_box()
        assert box["height"] >= 40
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 640
    text, back = page.evaluate("['color', 'backgroundColor'].map(n => getComputedStyle(document.body)[n])")
    assert (lightness(back) > lightness(text)) == (scheme == "light")
    assert abs(lightness(back) - lightness(text)) > 150


def lightness(colour):
    return sum(int(part) for part in colour[4:-1].split(",")) / 3


def test_a_browser_gives_the_key_as_a_password(served_model, tmp_path, visit, browser):
    with small_server.server(tmp_path, served_model[1], env={"MIXLAUNCH_API_KEY": "k"}) as guarded:
        page = visit(guarded.url, http_credentials={"username": "me", "password": "k"})
        playwright.expect(page.locator("#model")).to_have_text("tiny")
        ask(page, "Hi")
        playwright.expect(page.locator("article.assistant div")).to_have_text(re.compile(r"[\s\S]"))
        page.keyboard.press("Escape")
        until_answered(page)
