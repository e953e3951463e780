"""The chat page in a real browser: Debian's Chromium, driven by Playwright."""

import shutil

import pytest
from scripted_engine import ScriptedEngine

from puna.tools.calculator import calculator

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> [x](javascript:alert(1))"
MARKDOWN = "# Wool\nIt is **warm** and `soft`.\n\n- one\n- two\n\n```python\nprint(1 < 2)\n```\n"


def script(request):
    last = request.dialog[-1]
    if last.role == "ipython":
        return f"It is {last.content}."
    if "12 *" in last.content:
        return '<|python_tag|>wolfram_alpha.call(query="12*(3+4)")'
    return {"long": "word " * 40, "evil": EVIL, "markdown": MARKDOWN}.get(last.content, f"You said: {last.content}")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield opened
        opened.close()


@pytest.fixture
def visit(serve, browser):
    """`visit()` opens the page of a new server; whatever the browser complains of fails the test at its end."""
    complaints, contexts = [], []

    def open_(*, expected: tuple[str, ...] = (), api_key=None, width=1100, **settings):
        server = serve(ScriptedEngine(script, pause_s=0.01, **settings), api_key=api_key, tools=[calculator()])
        contexts.append(browser.new_context(viewport={"width": width, "height": 760}))
        page = contexts[-1].new_page()
        page.server = server
        page.on("console", lambda m: complaints.append(m.text) if not any(e in m.text for e in expected) else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.set_default_timeout(60_000)
        page.goto(server.url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page, text):
    page.fill("#question", text)
    page.keyboard.press("Enter")


def answer(page):
    """The last answer, once it is complete."""
    page.wait_for_selector(".turn:last-child .foot")
    return page.locator(".assistant .body").last


def test_a_question_is_answered_over_several_turns_with_speed(visit):
    page = visit()
    page.wait_for_selector("text=4.2 million parameters")
    ask(page, "hello")
    assert answer(page).inner_text() == "You said: hello"
    assert "tokens/s" in page.locator(".figures").last.inner_text()
    ask(page, "again")
    page.wait_for_selector("text=You said: again")
    sent = page.server.engine.seen[-1].dialog
    assert [m.content for m in sent][1:] == ["hello", "You said: hello", "again"]
    assert "/ 2,048" in page.inner_text("#room")


def test_an_example_is_asked_by_a_click_and_a_tool_is_used_on_the_way(visit):
    page = visit()
    page.click("text=What is 12 * (3 + 4)?")
    page.wait_for_selector("text=It is 84.")
    assert "wolfram_alpha" in page.inner_text("#log") and "12*(3+4)" in page.inner_text("#log")
    assert [m.role for m in page.server.engine.seen[-1].dialog] == ["system", "user", "assistant", "ipython"]


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_can_be_stopped_and_regenerated(visit, how):
    page = visit()
    ask(page, "long")
    page.wait_for_selector("text=word word word")
    page.click("#send") if how == "button" else page.keyboard.press("Escape")
    page.wait_for_selector("text=stopped")
    assert page.server.engine.closed.wait(3)
    assert 0 < len(answer(page).inner_text()) < 195
    page.fill("#question", "")
    page.click("text=Regenerate")
    page.wait_for_selector("text=201 tokens")
    assert page.locator(".turn").count() == 2


def test_markup_from_the_model_is_text(visit):
    page = visit()
    ask(page, "evil")
    assert EVIL in answer(page).inner_text()
    assert page.title() == "tiny · Puna"
    assert page.locator("#log img, #log script, #log a").count() == 0


def test_markdown_is_drawn(visit):
    page = visit()
    ask(page, "markdown")
    body = answer(page)
    assert body.locator("h3").inner_text() == "Wool"
    assert body.locator("strong").inner_text() == "warm" and body.locator("p code").inner_text() == "soft"
    assert body.locator("li").all_inner_texts() == ["one", "two"]
    assert body.locator("pre").inner_text() == "print(1 < 2)"


def test_several_lines_settings_and_a_reload(visit):
    page = visit()
    page.click("#tune")
    page.fill("#system", "Be brief.")
    page.fill("#max_tokens", "9")
    page.locator("#temperature").fill("0")
    page.click("text=Done")
    page.fill("#question", "one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=cut at the length limit")
    request = page.server.engine.seen[-1]
    assert request.dialog[0].content.endswith("Be brief.") and request.dialog[-1].content == "one\ntwo"
    assert (request.sampling.max_tokens, request.sampling.temperature) == (9, 0)
    page.reload()
    page.wait_for_selector("text=cut at the length limit")
    page.click("#new")
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()


def test_a_full_context_is_explained_and_goes_on_without_the_oldest(visit):
    page = visit(expected=("400",), context=420)
    for number in range(3):
        ask(page, f"question {number} {'x' * 40}")
        page.wait_for_selector(f"text=You said: question {number}")
        answer(page)
    ask(page, f"question 3 {'x' * 40}")
    page.wait_for_selector("text=outgrown the model's context")
    page.click("text=Go on without the oldest")
    page.wait_for_selector("text=You said: question 3")
    page.wait_for_selector("text=no longer sees what is above")
    sent = [m.content.split()[1] for m in page.server.engine.seen[-1].dialog if m.role == "user"]
    assert sent == ["2", "3"]


def test_a_message_that_can_never_fit_is_explained(visit):
    page = visit(expected=("400",), context=200)
    ask(page, "x" * 300)
    page.wait_for_selector("text=too long for the model's context")
    page.click(".trouble button")
    assert page.locator("#welcome").is_visible()


def test_a_lost_server_is_explained(visit):
    page = visit(expected=("Failed to load", "net::"))
    page.wait_for_selector("#examples button")
    page.route("**/v1/**", lambda route: route.abort())
    ask(page, "hello")
    page.wait_for_selector("text=cannot be reached")
    page.unroute("**/v1/**")
    page.click("text=Try again")
    assert answer(page).inner_text() == "You said: hello"


def test_a_key_is_asked_for_and_then_used(visit):
    page = visit(expected=("401",), api_key="secret")
    page.click("text=Enter the key")
    page.fill("#key", "secret")
    page.click("text=Done")
    page.wait_for_selector("text=4.2 million parameters")
    ask(page, "hello")
    assert answer(page).inner_text() == "You said: hello"


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_nothing_is_wider_than_the_window(visit, width):
    page = visit(width=width)
    ask(page, "markdown")
    answer(page)
    ask(page, "w" * 200)
    page.wait_for_selector("text=You said: www")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('main').scrollWidth") <= width
