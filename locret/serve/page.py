"""The page at /ui: drop texts, watch them being read, ask, see which words are still held.

Gradio (extra `ui`) within the server's application. It reads and asks through the same service as
the endpoints, and loads nothing from other servers.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from anyio import to_thread
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.quantities import format_bytes
from locret.serve.fields import BETWEEN, check_text, file_text, too_large
from locret.serve.replies import Refused, refusal_of
from locret.serve.requests import Ask, ContextInfo, Piece, TextOf

PATH = "/ui"
ALL = -1
"""Stands for every layer, or every head, in a menu."""
LOOK = 0.2
"""Seconds between two looks at how far a text was read."""
HELD = "### What is still held\nThe darker, the more KV heads hold it; point at it for the share."
KEPT = 600  # seconds that a dropped file stays on disk; its text is read at once
WELCOME = "The password is this server's API key; the name may be any."
CELLS = 200
"""Most cells of a strip."""
PASSAGE = 400
"""Tokens of a passage."""
CSS = """
.strip { display: flex; height: 48px; border: 1px solid currentColor; }
.strip i { flex: 1; background: rgb(249 115 22 / var(--share)); }
.strip i.shown { box-shadow: inset 0 -5px currentColor; }
.words { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; }
.words span { background: rgb(249 115 22 / var(--share)); }
.bytes { display: grid; grid-template-columns: auto 1fr auto; gap: 6px 12px; align-items: center; }
.bytes b { background: rgb(249 115 22); height: 14px; min-width: 2px; }
.bytes b.full { background: gray; }
"""


class Page:
    """What the page does, with what the endpoints share (`locret.serve.app.Server`)."""

    def __init__(self, server: Any) -> None:
        self.server = server

    async def read(self, paths: Sequence[str] | None) -> AsyncIterator[tuple[str, str | None]]:
        """Read the dropped files as one context: how far it is, and in the end its id. Raises
        gr.Error: says why it was not read."""
        with _told():
            ids = await to_thread.run_sync(self._ids_of, paths or [])
            reading = await to_thread.run_sync(self.server.service.read, ids)
            try:
                while not reading.closed:
                    yield _progress(reading.done, len(ids)), None
                    await asyncio.sleep(LOOK)
                info = await reading.aresult()
            finally:
                reading.cancel()
            yield _progress(info.tokens, info.tokens), info.id

    async def ask(self, question: str, id: str | None) -> AsyncIterator[tuple[str, str]]:
        """Ask the context: the answer so far, and in the end what it took. Raises gr.Error: says
        why there is no answer."""
        with _told():
            if id is None:
                raise Refused(400, "drop a text first, and wait until it is read")
            prompt = await to_thread.run_sync(self._question, question)
            answer = await to_thread.run_sync(self.server.service.ask, Ask(prompt, context=id))
            text = ""
            try:
                async for each in answer.aevents():
                    if isinstance(each, Piece):
                        text += each.text
                        yield text, ""
                    else:
                        yield text, _usage(each.usage)
            finally:
                answer.cancel()

    def opened(self, id: str | None) -> tuple[str, Any, Any]:
        """What a context takes, and what there is of it to look at. Raises gr.Error: it is not
        there any more."""
        with _told():
            cache = self._cache(id)
            info = self.server.service.contexts.info(id)
        heads = len(cache.layers[0].source_positions[0])
        return (
            _bytes(info, cache.report()["full_cache_bytes"]),
            gr.update(choices=_choices("layer", len(cache.layers)), value=ALL),
            gr.update(choices=_choices("head", heads), value=ALL),
        )

    def look(self, id: str | None, layer: int, head: int, place: float) -> tuple[str, str]:
        """Which words are still held: the strip, and the passage at `place`, in percent. Raises
        gr.Error: the context is not there any more."""
        if id is None:
            return "", ""
        with _told():
            cache = self._cache(id)
        chosen = (None if which == ALL else which for which in (layer, head))
        shares = shares_of(cache, *chosen)
        shown = passage(cache.seen, place / 100)
        assert cache.token_ids is not None
        both = (x[shown.start : shown.stop].tolist() for x in (cache.token_ids[0], shares))
        return strip(shares, shown), words(self.server.prompts.tokenizer, *both)

    def _cache(self, id: str | None) -> RetainedCache:
        service = self.server.service
        cache: RetainedCache = service.contexts.get(id, service.engine.model)
        return cache

    def _ids_of(self, paths: Sequence[str]) -> list[int]:
        files = [Path(path) for path in paths]
        if sum(file.stat().st_size for file in files) > self.server.upload_limit:
            raise too_large("the files are", self.server.upload_limit)
        texts = [file_text(file.read_bytes()) for file in files]
        if len(texts) > 1:
            texts = [f"{file.name}:\n{text}" for file, text in zip(files, texts, strict=True)]
        ids: list[int] = self.server.prompts.context(
            [{"role": "user", "content": BETWEEN.join(texts)}]
        )
        return ids

    def _question(self, question: str) -> list[int]:
        check_text(question)
        prompts = self.server.prompts
        if prompts.tokenizer.chat_template:
            found: list[int] = prompts.question([{"role": "user", "content": question}])
        else:
            found = prompts.completion(BETWEEN + question, follows=True)
        return found


def mount(app: FastAPI, auth: Callable[[str, str], bool] | None) -> None:
    """Let an application of `make_app` have the page, and lead there from its root, and where the
    slash behind its name is missing. The page asks for the name and password that `auth` takes, if
    there is one."""
    server = app.state.server

    @app.get("/")
    @app.get(PATH)
    async def root() -> RedirectResponse:
        return RedirectResponse(PATH.removeprefix("/") + "/")

    gr.mount_gradio_app(
        app,
        _blocks(Page(server)),
        path=PATH,
        auth=auth,
        auth_message=WELCOME,
        max_file_size=server.upload_limit,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        css=CSS,
    )
    mounted: Any = app.routes[-1]
    server.page = mounted.app


def _blocks(page: Page) -> gr.Blocks:
    with gr.Blocks(
        title="Locret", analytics_enabled=False, delete_cache=(KEPT, KEPT), fill_width=True
    ) as blocks:
        gr.Markdown("# Locret\nA long text, read once, in a fraction of its cache.")
        id = gr.State(None)
        with gr.Row():
            files, progress, taken = _document()
            question, answer, usage, asking, stop = _conversation()
        gr.Markdown(HELD)
        menus = _menus()
        strip, words = gr.HTML(elem_id="strip"), gr.HTML(elem_id="words")

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        looking: dict[str, Any] = {"fn": page.look, "inputs": [id, *menus], **quiet}
        looking["outputs"] = [strip, words]
        reading = files.upload(page.read, files, [progress, id], **quiet)
        opening = reading.success(page.opened, id, [taken, *menus[:2]], **quiet)
        opening.success(**looking)
        for menu in menus:
            menu.input(**looking)
        answering = gr.on(
            [asking.click, question.submit], page.ask, [question, id], [answer, usage], **quiet
        )
        stop.click(None, cancels=[reading, answering], **quiet)
    # The service has a queue of its own, which says when it is full.
    return blocks.queue(default_concurrency_limit=None, api_open=False)


def _document() -> tuple[gr.File, gr.HTML, gr.HTML]:
    with gr.Column():
        label = "A book, or files of code"
        files = gr.File(label=label, file_count="multiple", elem_id="files")
        return files, gr.HTML(elem_id="progress"), gr.HTML(elem_id="taken")


def _conversation() -> tuple[gr.Textbox, gr.Textbox, gr.HTML, gr.Button, gr.Button]:
    with gr.Column():
        question = gr.Textbox(label="Question", elem_id="question")
        with gr.Row():
            asking, stop = gr.Button("Ask", variant="primary"), gr.Button("Stop")
        answer = gr.Textbox(label="Answer", lines=6, interactive=False, elem_id="answer")
        return question, answer, gr.HTML(elem_id="usage"), asking, stop


def _menus() -> tuple[gr.Dropdown, gr.Dropdown, gr.Slider]:
    with gr.Row():
        return (
            gr.Dropdown(_choices("layer", 0), value=ALL, label="Layer", elem_id="layer"),
            gr.Dropdown(_choices("head", 0), value=ALL, label="KV head", elem_id="head"),
            gr.Slider(0, 100, 0, step=0.1, label="Place in the text, %", elem_id="place"),
        )


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tell the reader of the page what went wrong, in one sentence."""
    try:
        yield
    except Exception as error:
        raise gr.Error(escape(refusal_of(error).message), print_exception=False) from error


def _choices(what: str, count: int) -> list[tuple[str, int]]:
    return [(f"all {what}s", ALL), *((f"{what} {i}", i) for i in range(count))]


def _progress(done: int, total: int) -> str:
    return (
        f'<progress value="{done}" max="{total}" style="width:100%"></progress>'
        f"{done:,} of {total:,} tokens read"
    )


def _bytes(info: ContextInfo, full: int) -> str:
    bars = (("full cache", "full", full), ("this cache", "ours", info.bytes))
    most = max(full, info.bytes)
    rows = [
        f'<span>{label}</span><b class="{kind}" style="width:{size / most:.1%}"></b>'
        f"<span>{format_bytes(size)}</span>"
        for label, kind, size in bars
    ]
    return (
        f'<div class="bytes">{"".join(rows)}</div>'
        f"{info.units:,} of {info.tokens:,} tokens in a KV head on average, as context {info.id}"
    )


def _usage(usage: Any) -> str:
    return (
        f"{usage.prompt_tokens:,} tokens of prompt, {usage.cached_tokens:,} of them read before; "
        f"{usage.completion_tokens:,} of answer; in the end {format_bytes(usage.bytes)}"
    )


# ---- what is still held --------------------------------------------------------------------------


def shares_of(cache: RetainedCache, layer: int | None = None, head: int | None = None) -> Tensor:
    """What share of the KV heads holds each token that was read: [seen] float32 on the CPU, 0 to 1.

    Args:
        cache: of one row.
        layer: of the heads; None = every layer.
        head: of every such layer; None = all heads.
    """
    layers = cache.layers if layer is None else [cache.layers[layer]]
    heads = [one.source_positions[0] for one in layers]
    chosen = [p for of_layer in heads for p in (of_layer if head is None else [of_layer[head]])]
    counts = torch.zeros(cache.seen)
    for positions in chosen:
        counts[positions.cpu()] += 1
    return counts / len(chosen)


def passage(seen: int, place: float) -> range:
    """The tokens of a passage of a text of `seen` tokens; place 0 is the text's beginning, 1 its
    end."""
    first = round(place * max(seen - PASSAGE, 0))
    return range(first, min(first + PASSAGE, seen))


def strip(shares: Tensor, shown: range) -> str:
    """The whole text as a strip of cells: the darker, the more of it is held (`shares_of`). `shown`
    are the tokens of the passage below it."""
    bounds = torch.linspace(0, len(shares), min(CELLS, len(shares)) + 1).long().tolist()
    cells = [
        f"<i {_colour(share := shares[a:b].mean().item())}{' class=shown' * (a in shown)} "
        f'title="tokens {a + 1:,} to {b:,}: {share:.0%} held"></i>'
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return f'<div class="strip">{"".join(cells)}</div>'


def words(tokenizer: Any, tokens: Sequence[int], shares: Sequence[float]) -> str:
    """The words of one passage, each the darker, the more heads hold it (`shares_of`)."""
    spans = [
        f'<span {_colour(share)} title="{share:.0%} held">{escape(text)}</span>'
        for text, share in _pieces(tokenizer, tokens, shares)
        if text
    ]
    return f'<div class="words">{"".join(spans)}</div>'


def _pieces(
    tokenizer: Any, tokens: Sequence[int], shares: Sequence[float]
) -> Iterator[tuple[str, float]]:
    """Texts of whole characters, and the share of the token that completes each."""
    text = TextOf(tokenizer)
    for token, share in zip(tokens, shares, strict=True):
        yield text.add(token), share
    yield text.end(), shares[-1]


def _colour(share: float) -> str:
    return f'style="--share:{share**0.5:.2f}"'  # the root, because an eighth shall be seen too
