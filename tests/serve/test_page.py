"""The page at /ui: through its callbacks, and in a browser where there is one."""

import asyncio
import contextlib
import importlib.util
import re
import shutil

import httpx2 as httpx
import pytest
import torch

from locret import cli
from locret.serve.app import make_app
from locret.serve.contexts import Contexts
from locret.serve.fields import Prompts
from locret.serve.page import passage, shares_of, strip, words
from tests.serve.command import ROOT
from tests.serve.live import running

gr = pytest.importorskip("gradio")
from locret.serve.page import ALL, Page  # noqa: E402

KEY = "a key"
TEXT = "One of the special numbers is <b>naïve</b> 漢字 ${1+1} {{value}}. " * 3
QUESTION = "Which number is it?"
PAUSE = 500
"""Milliseconds between two acts in a browser: Gradio may lose what is sent in the moment it
closes the stream of what was before."""


@pytest.fixture
def app(make, tokenizer):
    service = make(contexts=Contexts(), max_tokens=8)
    return make_app(service, tokenizer, name="tiny", api_key=KEY, upload_limit=2000, ui=True)


@pytest.fixture
def page(app):
    app.state.server.service.start()
    return Page(app.state.server)


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    return str(tmp_path / "book.txt")


def said_by(callback):
    """All that a callback yields."""

    async def collected():
        return [each async for each in callback]

    return asyncio.run(collected())


@pytest.fixture
def answer_expected(expected, twin, tokenizer):
    """What the engine alone answers about the text."""
    prompts = Prompts(tokenizer)
    context = twin.prefill(torch.tensor([prompts.context([{"role": "user", "content": TEXT}])]))
    return expected(prompts.question([{"role": "user", "content": QUESTION}]), context)


def test_read_asked_and_looked_at(page, book, answer_expected):
    progress, id = said_by(page.read([book]))[-1]
    tokens = page.server.service.contexts.info(id).tokens
    assert f"{tokens:,} of {tokens:,} tokens read" in progress
    *_, (answer, usage) = said_by(page.ask(QUESTION, id))
    assert answer == answer_expected
    assert f"{tokens:,} of them read before; 8 of answer" in usage
    taken, layers, heads = page.opened(id)
    assert "full cache" in taken and id in taken
    assert layers["choices"][-1] == ("layer 1", 1) and len(heads["choices"]) == 3
    everywhere, shown = page.look(id, ALL, ALL, 0)
    assert everywhere.count("<i ") == tokens and "&lt;b&gt;" not in shown  # a token each
    assert re.sub("<[^>]+>", "", shown).count("漢字 ${1+1} {{value}}.") == 3
    assert page.look(id, 1, 0, 100) != (everywhere, shown)


def test_several_files_are_told_by_their_names(page, tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(f"# {name[0]}\r\n")
    ids = page._ids_of([str(tmp_path / "a.py"), str(tmp_path / "b.py")])
    text = page.server.prompts.tokenizer.decode(ids)
    assert text.endswith("a.py:\n# a\n\n\nb.py:\n# b")


@pytest.mark.parametrize(
    ("content", "says"), [(b"\xff", "not UTF-8"), (b" ", "no text"), (b"x" * 3000, "larger than")]
)
def test_files_that_cannot_be_read_are_told(page, tmp_path, content, says):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(gr.Error, match=says):
        said_by(page.read([str(tmp_path / "x")]))


def test_a_context_that_is_not_there_is_told(page):
    with pytest.raises(gr.Error, match="drop a text first"):
        said_by(page.ask(QUESTION, None))
    with pytest.raises(gr.Error, match="no context of this id"):
        page.look("ctx_" + 22 * "x", ALL, ALL, 0)
    assert page.look(None, ALL, ALL, 0) == ("", "")


def test_who_leaves_the_page_gives_the_reading_up(page, book):
    async def leave():
        reading = page.read([book])
        async with contextlib.aclosing(reading):
            await anext(reading)

    asyncio.run(leave())
    assert page.server.service.counts.cancelled + page.server.service.counts.read == 1


# ---- what is still held --------------------------------------------------------------------------


def test_shares_are_those_of_the_source_positions(twin, ids):
    cache = twin.prefill(torch.tensor([ids(60)]))
    rows = [layer.source_positions[0] for layer in cache.layers]
    for token, share in enumerate(shares_of(cache).tolist()):
        holding = [token in positions.tolist() for row in rows for positions in row]
        assert share == pytest.approx(sum(holding) / len(holding))
    one = shares_of(cache, layer=1, head=0)
    assert one.nonzero().flatten().tolist() == rows[1][0].tolist() and set(one.tolist()) == {0, 1}


def test_a_strip_has_a_cell_for_equally_many_tokens():
    shares = torch.cat([torch.ones(500), torch.zeros(500)])
    shown = passage(1000, 1.0)
    assert shown == range(600, 1000) and passage(30, 0.5) == range(30)
    cells = strip(shares, shown).split("<i ")[1:]
    assert len(cells) == 200 and "tokens 1 to 5: 100% held" in cells[0]
    assert [cell for cell in cells if "shown" in cell] == cells[120:]
    assert "--share:0.00" in cells[-1]


def test_words_are_whole_characters_and_no_markup(tokenizer):
    text = "<b>漢</b>"
    tokens = tokenizer(text)["input_ids"]
    made = words(tokenizer, tokens, [1.0] * len(tokens))
    assert "�" not in made and "<b>" not in made
    assert re.sub("<[^>]+>", "", made) == "&lt;b&gt;漢&lt;/b&gt;"


# ---- served --------------------------------------------------------------------------------------


def test_the_page_asks_for_the_key(app):
    with running(app) as url, httpx.Client(base_url=url, follow_redirects=True) as client:
        assert client.get("/").url.path == client.get("/ui").url.path == "/ui/"
        for path in ("config", "gradio_api/info"):
            assert client.get(f"/ui/{path}").status_code == 401
        upload = {"files": ("x.txt", b"x")}
        assert client.post("/ui/gradio_api/upload", files=upload).status_code == 401
        join = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert client.post("/ui/gradio_api/queue/join", json=join).status_code == 401
        wrong, right = ({"username": "me", "password": each} for each in ("no key", KEY))
        assert client.post("/ui/login", data=wrong).status_code == 400
        assert client.post("/ui/login", data=right).status_code == 200
        assert client.get("/ui/config").json()["title"] == "Locret"
        assert client.get("/v1/models").status_code == 401  # a cookie is no key there


def test_a_file_in_a_space_serves_the_page(monkeypatch):
    docs = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```py\n(.*?)```", docs, flags=re.DOTALL)
    given = []
    monkeypatch.setattr(cli, "main", given.append)
    exec(code, {})  # noqa: S102
    parsed = cli._parsed(given[0])
    assert (parsed.ui, parsed.host, parsed.port) == (True, "0.0.0.0", 7860)
    assert len(code.splitlines()) == 5


def test_a_page_without_gradio_is_refused(monkeypatch):
    given, real = cli._parsed(["serve", "a-model", "--ui"]), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gradio" else real(name)
    )
    with pytest.raises(ValueError, match=r"missing: gradio; pip install 'locret\[ui\]'"):
        given.run(given)
    assert not cli._parsed(["serve", "a-model"]).ui


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    flags = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    with api.sync_playwright() as driver:
        found = driver.chromium.launch(
            executable_path=chromium, args=[f"--{flag}" for flag in flags.split()]
        )
        yield found
        found.close()


def test_in_a_browser(app, book, browser, answer_expected):
    with running(app) as url:
        page = browser.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill(KEY)
        page.get_by_role("button", name="Login").click()
        page.set_input_files("#files input[type=file]", book)
        page.wait_for_selector("#words span")
        assert page.inner_text("#words").count("<b>naïve</b> 漢字 ${1+1} {{value}}.") == 3
        everywhere = page.inner_html("#strip")
        page.wait_for_timeout(PAUSE)
        page.click("#layer input")
        page.get_by_role("option", name="layer 1").click()
        changed = "before => document.querySelector('#strip').innerHTML != before"
        page.wait_for_function(changed, arg=everywhere)
        page.wait_for_timeout(PAUSE)
        page.fill("#question textarea", QUESTION)
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('#usage').innerText.includes('of answer')")
        assert page.input_value("#answer textarea") == answer_expected
        assert "full cache" in page.inner_text("#taken")
        assert asked and all(each.startswith((url, "data:", "blob:")) for each in asked)
