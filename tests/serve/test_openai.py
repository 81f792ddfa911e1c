"""The real client of OpenAI against a live server over a real model: answers are the engine's."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest
import torch

import locret
from locret.model.loading import load_model
from locret.serve.app import make_app
from locret.serve.contexts import Contexts
from locret.serve.fields import Prompts
from locret.serve.service import Service
from tests.serve.command import ROOT, Command
from tests.serve.live import running, until
from tests.serve.served import Served
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.slow

NAME, KEY = "embedded:smollm2", "a key"
ASKED = [{"role": "user", "content": "Name the capital of France."}]
STORY = (
    "The quiet otter of Uppsala collects stamps, and its favourite one is blue. " * 8
    + "The grey heron of Turku collects old maps, and lends them to nobody. " * 8
)
QUESTIONS = ("What does the otter collect?", "Who collects maps?")
GREEDY = {"model": NAME, "temperature": 0, "max_tokens": 12}
WINDOW = 8192


@pytest.fixture(scope="module")
def loaded():
    # In bfloat16 a batch rounds otherwise than one row, which may change a word.
    return load_model(NAME, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def engine(loaded):
    return locret.Engine(
        loaded.model, "keydiff", budget="4x", chunk_size=64, stabilizers=8, local_tokens=16
    )


@pytest.fixture(scope="module")
def service(engine, loaded):
    return Service(engine, loaded.tokenizer, contexts=Contexts())


@pytest.fixture(scope="module")
def expected(engine, loaded):
    """What the engine itself answers, asked before the service owns it."""
    prompts = Prompts(loaded.tokenizer)

    def answer(ids, **given):
        ids = torch.tensor([ids])
        out = engine.generate(ids, max_new_tokens=12, do_sample=False, **given)[0, ids.shape[1] :]
        return loaded.tokenizer.decode(out, skip_special_tokens=True)

    story = engine.prefill(torch.tensor([prompts.context([{"role": "user", "content": STORY}])]))
    untouched, found = story.snapshot(), {"plain": answer(prompts.chat(ASKED)[0])}
    for question in QUESTIONS:
        found[question] = answer(
            prompts.question([{"role": "user", "content": question}]), cache=story
        )
        story.restore(untouched)
    found["text"] = answer(prompts.completion("One, two, three,"))
    return found


@pytest.fixture(scope="module")
def url(expected, service, loaded):
    app = make_app(service, loaded.tokenizer, name=NAME, api_key=KEY)
    with running(app) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def context(client):
    """An uploaded story."""
    made = client.post("/contexts", body={"text": STORY}, cast_to=dict[str, object])
    assert made["tokens"] > 4 * made["units"] - 100 and made["bytes"] > 0
    return made


def chat(client, messages=ASKED, **given):
    return client.chat.completions.create(messages=messages, **(GREEDY | given))


def said(answer):
    return answer.choices[0].message.content


def test_a_context_and_a_question_are_the_text_of_one_prompt(loaded):
    prompts = Prompts(loaded.tokenizer)
    ids = prompts.context([{"role": "user", "content": STORY}])
    ids += prompts.question([{"role": "user", "content": QUESTIONS[0]}])
    turn = {"role": "user", "content": f"{STORY.strip()}\n\n{QUESTIONS[0]}"}
    text = loaded.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert loaded.tokenizer.decode(ids) == text


def test_a_plain_answer_is_the_engines(client, expected):
    found = chat(client)
    assert said(found) == expected["plain"]
    usage = found.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.units > 0 and usage.bytes > 0
    assert found.choices[0].finish_reason in ("stop", "length")


def test_a_stream_says_the_same(client, expected):
    stream = chat(client, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected["plain"]
    assert last.choices == [] and last.usage.completion_tokens > 0
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_a_completion_goes_on_with_a_text(client, expected):
    found = client.completions.create(prompt="One, two, three,", **GREEDY)
    assert found.choices[0].text == expected["text"]
    stream = client.completions.create(prompt="One, two, three,", stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected["text"]


def test_an_answer_ends_where_it_is_told_to(client, expected):
    found = chat(client, max_tokens=3)
    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 3
    word = expected["plain"].split()[2]
    found = chat(client, stop=[word])
    assert said(found) == expected["plain"].split(word)[0]
    assert found.choices[0].finish_reason == "stop"


def test_an_answer_goes_on_behind_its_end_where_it_is_told_to(client, expected):
    beyond = {"max_tokens": 20, "extra_body": {"ignore_eos": True}}
    ended, longer, stopped = (
        chat(client, **given) for given in ({"max_tokens": 20}, beyond, beyond | {"stop": "Paris"})
    )
    assert ended.usage.completion_tokens < longer.usage.completion_tokens == 20
    assert said(longer).startswith(expected["plain"])
    assert longer.choices[0].finish_reason == "length"
    assert said(stopped) == said(longer).partition("Paris")[0]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer(client):
    given = {"temperature": 1.5, "seed": 7, "max_tokens": 8}
    assert said(chat(client, **given)) == said(chat(client, **given))


def test_two_questions_about_one_context_are_the_engines(client, context, expected):
    for question in (*QUESTIONS, QUESTIONS[0]):
        messages = [{"role": "user", "content": question}]
        found = chat(client, messages, extra_body={"context": context["id"]})
        assert said(found) == expected[question]
        assert found.usage.prompt_tokens_details.cached_tokens == context["tokens"]


def test_clients_at_the_same_time_get_the_answers_of_their_own(client, context, expected):
    def ask(place):
        messages = [{"role": "user", "content": QUESTIONS[place % 2]}]
        return said(chat(client, messages, extra_body={"context": context["id"]}))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert found == [expected[QUESTIONS[place % 2]] for place in range(4)]


def test_a_repeated_beginning_is_read_once(client):
    messages = [{"role": "system", "content": STORY}, {"role": "user", "content": QUESTIONS[0]}]
    first, again = (chat(client, messages, max_tokens=4) for _ in range(2))
    assert said(first) == said(again)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens > 256


def test_mistakes_are_errors_of_the_client_library(client, url):
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        chat(openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0))
    with pytest.raises(openai.NotFoundError, match="no context") as found:
        chat(client, extra_body={"context": "ctx_" + "a" * 22})
    assert found.value.code == "context_not_found"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        chat(client, model="another")
    with pytest.raises(openai.BadRequestError, match="would fit") as found:
        chat(client, max_tokens=WINDOW)
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        chat(client, n=2)
    assert [model.id for model in client.models.list()] == [NAME]


def test_the_next_request_need_not_wait_for_a_stream_that_was_left(client, service):
    until(lambda: service.counts.running == 0)
    stream = chat(client, stream=True, max_tokens=2000, temperature=1.9)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    began = time.monotonic()
    chat(client, max_tokens=1)
    assert time.monotonic() - began < 10
    until(lambda: service.counts.running == service.counts.queued == 0, 5)


def test_a_reading_that_was_left_is_given_up(client, service, url):
    until(lambda: service.counts.running == 0)
    before = service.counts.cancelled
    headers = {"Authorization": f"Bearer {KEY}"}
    with pytest.raises(httpx.ReadTimeout):
        body = {"text": STORY * 5}
        httpx.post(f"{url}/v1/contexts", json=body, headers=headers, timeout=1)
    until(lambda: service.counts.cancelled == before + 1 and service.counts.running == 0, 5)


def test_the_documented_code_runs(url, capsys):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block.replace("http://127.0.0.1:8000", url).replace("KEY", KEY), names)  # noqa: S102
    assert "stamps" in capsys.readouterr().out


def test_transformers_chat_holds_a_conversation(url):
    said = "Name the capital of France.\nAnd of Sweden?\n!exit\n"
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", NAME, f"{url}/v1"]
    done = subprocess.run(
        [*command, "max_new_tokens=12", "do_sample=False"],
        input=said,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"HF_TOKEN": KEY},
    )
    assert "Paris" in done.stdout and "Stockholm" in done.stdout, done.stderr[-500:]


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tiny")
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=8192)
    model.save_pretrained(folder / "tiny")
    return folder


def test_sigterm_finishes_what_runs_and_contexts_survive(folder, monkeypatch):
    monkeypatch.setenv("LOCRET_API_KEY", "hidden")
    args = [folder / "tiny", "--policy", "keydiff", "--budget", "64", "--name", "tiny"]
    args += ["--device", "cpu", "--chunk-size", "32", "--stabilizers", "8", "--local-tokens", "8"]
    args += ["--contexts", folder / "contexts"]
    given = {"messages": ASKED, "temperature": 0, "max_tokens": 300}
    headers = {"Authorization": "Bearer hidden"}
    command = Command(*args)
    with httpx.Client(base_url=command.url, headers=headers, timeout=30) as client:
        made = client.post("/v1/contexts", json={"text": STORY}).json()
        given["context"] = made["id"]
        first = client.post("/v1/chat/completions", json=given).json()["choices"]
        with client.stream("POST", "/v1/chat/completions", json=given | {"stream": True}) as found:
            lines = found.iter_lines()
            next(lines)
            command.process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert '"finish_reason": "length"' in events[-2] or '"finish_reason": "stop"' in events[-2]
    _, logged = command.process.communicate(timeout=30)
    assert command.process.returncode == 0, logged
    assert "hidden" not in logged and "otter" not in logged and "Traceback" not in logged
    again = Served(*args)
    with httpx.Client(base_url=again.url, headers=headers, timeout=30) as client:
        assert client.post("/v1/chat/completions", json=given).json()["choices"] == first
        assert [each["id"] for each in client.get("/v1/contexts").json()["data"]] == [made["id"]]
    assert again.stop()[0] == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--port", "70000"], "not a port"),
        (["--ttl", "0"], "whole number of at least 1"),
        (["--upload-limit", "much"], "upload-limit"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(args, says, folder, capsys):
    with pytest.raises(SystemExit):
        locret_main(folder, *args)
    assert says in capsys.readouterr().err


def test_what_cannot_work_is_told_before_a_model_is_loaded(folder, capsys, monkeypatch):
    assert locret_main(folder, "--policy", "locret", "--port", "0") == 2
    assert "heads" in capsys.readouterr().err
    assert locret_main(folder, "--api-key", " ", "--port", "0") == 2
    assert "API key is empty" in capsys.readouterr().err


@pytest.fixture
def loggers(monkeypatch):
    """The command logs to a standard error that is closed when the test ends."""
    for name in ("locret.serve", "uvicorn"):
        logger = logging.getLogger(name)
        for attribute in ("handlers", "propagate", "level"):
            monkeypatch.setattr(logger, attribute, getattr(logger, attribute))


def test_a_port_that_is_taken_is_told(folder, capsys, loggers):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert locret_main(folder, "--port", str(other.getsockname()[1])) == 2
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err
    assert locret_main(folder, "--host", "no.such.host.invalid") == 2
    assert "cannot listen at no.such.host.invalid" in capsys.readouterr().err


def locret_main(folder, *args):
    from locret.cli import main

    return main(["serve", str(folder / "tiny"), *args])
