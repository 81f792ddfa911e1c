"""What the server says over HTTP: to friends, to hostile clients, and when a client leaves."""

import json
import logging
import socket

import httpx2 as httpx
import pytest

from locret.serve.app import make_app
from locret.serve.fields import Prompts
from locret.serve.replies import JsonLines
from locret.serve.requests import Failed, QueueFull, RepeatsContext, TooLong, UnknownContext
from tests.serve.fake import ID, FakeService
from tests.serve.live import running, until
from tests.tiny_tokenizer import tiny_tokenizer

CHAT, TEXT, CONTEXTS = "/v1/chat/completions", "/v1/completions", "/v1/contexts"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
LIMIT = 2**20
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def url_and_service():
    service = FakeService()
    app = make_app(service, TOKENIZER, name="tiny", api_key="secret", upload_limit=LIMIT)
    with running(app) as url:
        yield url, service


@pytest.fixture
def service(url_and_service):
    service = url_and_service[1]
    service.__init__()
    return service


@pytest.fixture
def client(url_and_service, service):
    headers = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=url_and_service[0], headers=headers, timeout=20) as client:
        yield client


def text_of(ids):
    return TOKENIZER.decode(ids)


def error_of(response, status):
    """The message of an error, which is one sentence in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
    assert "Traceback" not in response.text
    return error["message"]


# ---- answers -------------------------------------------------------------------------------------


def test_a_chat_is_answered_in_openais_form(client, service):
    given = {"max_completion_tokens": 9, "seed": 4, "stop": "x", "ignore_eos": True}
    body = client.post(CHAT, json=HELLO | given).json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "It is."}
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert (usage["total_tokens"], usage["units"], usage["bytes"]) == (9, 5, 99)
    (ask,) = service.asked
    assert text_of(ask.prompt) == "<|user|>Hello<|end|><|assistant|>"
    assert (ask.max_tokens, ask.temperature, ask.seed, ask.stop) == (9, 1.0, 4, ("x",))
    assert ask.ignore_eos


def test_all_messages_but_the_last_are_shared(client, service):
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO["messages"]]
    client.post(CHAT, json={"messages": messages})
    (ask,) = service.asked
    assert text_of(ask.prompt[: ask.shared]) == "<|system|>Be brief.<|end|>"
    assert Prompts(TOKENIZER).chat(HELLO["messages"])[1] == 0


def test_a_stream_is_chunks_and_then_done(client):
    given = HELLO | {"stream": True, "stream_options": {"include_usage": True}}
    found = client.post(CHAT, json=given)
    assert found.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks.pop()["usage"]["completion_tokens"] == 2
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert deltas == ["", "It ", "is.", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("prompt", ["One otter", ["One otter"], TOKENIZER("One otter").input_ids])
def test_a_text_goes_on(prompt, client, service):
    found = client.post(TEXT, json={"prompt": prompt, "temperature": 0}).json()
    assert found["object"] == "text_completion"
    assert found["choices"][0]["text"] == "It is."
    (ask,) = service.asked
    assert (text_of(ask.prompt), ask.max_tokens, ask.temperature) == ("One otter", 16, 0)


def test_what_transformers_chat_says_is_obeyed(client, service):
    config = json.dumps({"max_new_tokens": 5, "do_sample": False, "temperature": 0.7})
    client.post(CHAT, json=HELLO | {"generation_config": config, "max_tokens": None})
    assert (service.asked[0].max_tokens, service.asked[0].temperature) == (5, 0)
    assert '"ready"' in client.post("/load_model", json={"model": "tiny"}).text


# ---- contexts ------------------------------------------------------------------------------------


def test_a_context_and_its_question_are_one_prompt(client, service):
    made = client.post(CONTEXTS, json={"text": "  A quiet otter.\n"}).json()
    assert made["id"] == ID and (made["units"], made["bytes"]) == (4, 100)
    question = {"messages": [{"role": "user", "content": "Who?"}], "context": ID}
    client.post(CHAT, json=question)
    (ask,) = service.asked
    whole = Prompts(TOKENIZER).chat([{"role": "user", "content": "A quiet otter.\n\nWho?"}])[0]
    assert text_of(service.read_ids[0] + ask.prompt) == text_of(whole)
    assert (ask.context, ask.shared) == (ID, 0)


def test_later_turns_follow_the_question(client, service):
    turns = [("user", "Who?"), ("assistant", "An otter."), ("user", "Where?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    client.post(CHAT, json={"messages": messages, "context": ID})
    assert text_of(service.asked[0].prompt) == (
        "\n\nWho?<|end|><|assistant|>An otter.<|end|><|user|>Where?<|end|><|assistant|>"
    )


def test_a_context_of_messages_ends_in_the_users_turn(client, service):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Text."}]
    assert client.post(CONTEXTS, json={"messages": messages}).status_code == 200
    assert text_of(service.read_ids[0]) == "<|system|>Be brief.<|end|><|user|>Text."


def test_a_file_is_a_context(client, service):
    content = "\ufeffZwölf\r\nBoxkämpfer".encode()
    assert client.post(CONTEXTS, files={"file": ("a.txt", content)}).status_code == 200
    assert text_of(service.read_ids[0]) == "<|user|>Zwölf\nBoxkämpfer"


def test_contexts_are_listed_and_deleted(client, service):
    client.post(CONTEXTS, json={"text": "Some text."})
    assert [each["id"] for each in client.get(CONTEXTS).json()["data"]] == [ID]
    assert client.get(f"{CONTEXTS}/{ID}").json()["tokens"] == len(service.read_ids[0])
    assert client.delete(f"{CONTEXTS}/{ID}").json()["deleted"]
    assert "no such context" in error_of(client.get(f"{CONTEXTS}/{ID}"), 404)
    error_of(client.delete(f"{CONTEXTS}/{ID}"), 404)


# ---- refusals ------------------------------------------------------------------------------------

BODIES = {
    "nothing": (CHAT, b"", "not JSON"),
    "half": (CHAT, b'{"messages": [', "not JSON"),
    "a list": (CHAT, b"[]", "not an object"),
    "a number": (CHAT, b"17", "not an object"),
    "not utf-8": (CHAT, b'{"messages": "\xff"}', "not UTF-8"),
    "nan": (CHAT, b'{"temperature": NaN}', "not JSON"),
    "a number of 10,000 digits": (CHAT, b'{"seed": ' + b"1" * 10_000 + b"}", "not JSON"),
    "a deep list": (CHAT, b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested"),
    "a deep object": (CHAT, b'{"a":' * 200 + b"1" + b"}" * 200, "nested"),
    "too much": (CHAT, b" " * (LIMIT + 1), "larger than 1.0 MiB"),
    "latin-1 file": (CONTEXTS, b'{"text": "caf\xe9"}', "not UTF-8"),
}
FIELDS = {
    "null character": (CHAT, {"messages": [{"role": "user", "content": "a\0b"}]}, "null"),
    "null in a key": (TEXT, {"prompt": "a", "b\0": 1}, "null"),
    "half a pair": (TEXT, {"prompt": "a\ud800"}, "surrogate"),
    "no messages": (CHAT, {}, "messages: field required"),
    "empty messages": (CHAT, {"messages": []}, "messages: list should have at least 1"),
    "messages of text": (CHAT, {"messages": ["Hello"]}, "messages.0"),
    "unknown role": (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
    "an image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "not text",
    ),
    "content of a number": (CHAT, {"messages": [{"role": "user", "content": 5}]}, "neither"),
    "10,000 stop strings": (CHAT, HELLO | {"stop": ["a"] * 10_000}, "stop: list should have at"),
    "a long stop string": (CHAT, HELLO | {"stop": "a" * 513}, "stop.0: string should have at"),
    "an empty stop string": (CHAT, HELLO | {"stop": ""}, "stop.0: string should have at"),
    "no tokens": (CHAT, HELLO | {"max_tokens": 0}, "max_tokens: input should be greater"),
    "tokens in words": (CHAT, HELLO | {"max_tokens": "many"}, "max_tokens: input should be"),
    "hot": (CHAT, HELLO | {"temperature": 2.5}, "temperature: input should be less"),
    "cold": (CHAT, HELLO | {"temperature": -1}, "temperature: input should be greater"),
    "top_p": (CHAT, HELLO | {"top_p": 0}, "top_p: input should be greater"),
    "seed": (CHAT, HELLO | {"seed": 2**64}, "seed: input should be less"),
    "ignore_eos in words": (CHAT, HELLO | {"ignore_eos": "true"}, "ignore_eos: input should be"),
    "ignore_eos in a number": (TEXT, {"prompt": "a", "ignore_eos": 1}, "ignore_eos: input should"),
    "ignore_eos in a stream": (CHAT, HELLO | {"ignore_eos": [], "stream": True}, "ignore_eos: "),
    "n": (CHAT, HELLO | {"n": 2}, "n is not supported"),
    "tools": (CHAT, HELLO | {"tools": [{"type": "function"}]}, "tools is not supported"),
    "logprobs": (CHAT, HELLO | {"logprobs": True}, "logprobs is not supported"),
    "logprobs of none": (TEXT, {"prompt": "Hello", "logprobs": 0}, "logprobs is not supported"),
    "a json answer": (CHAT, HELLO | {"response_format": {"type": "json_object"}}, "not supported"),
    "two prompts": (TEXT, {"prompt": ["a", "b"]}, "2 prompts"),
    "empty prompt": (TEXT, {"prompt": ""}, "nothing in it"),
    "strange tokens": (TEXT, {"prompt": [1, 10**9]}, "token id"),
    "negative tokens": (TEXT, {"prompt": [-1]}, "token id"),
    "tokens that are true": (TEXT, {"prompt": [True]}, "not a text or a list of token ids"),
    "neither text nor messages": (CONTEXTS, {}, "either text or messages"),
    "both": (CONTEXTS, {"text": "a", "messages": HELLO["messages"]}, "either text or messages"),
    "an empty context": (CONTEXTS, {"text": " \n"}, "no text"),
    "an assistant's context": (
        CONTEXTS,
        {"messages": [{"role": "assistant", "content": "a"}]},
        "expected the user's",
    ),
    "a system message about a context": (
        CHAT,
        {"context": ID, "messages": [{"role": "system", "content": "a"}]},
        "belong in the context",
    ),
    "a strange generation_config": (CHAT, HELLO | {"generation_config": "{"}, "not JSON"),
}


@pytest.mark.parametrize("name", [*BODIES, *FIELDS])
def test_a_malformed_request_is_refused_in_a_sentence(name, client, service):
    if name in BODIES:
        path, body, says = BODIES[name]
    else:
        path, fields, says = FIELDS[name]
        body = json.dumps(fields).encode()
    found = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert says in error_of(found, 413 if name == "too much" else 400)
    assert service.asked == [] and service.read_ids == []
    assert client.get("/health").status_code == 200


MULTIPART = {
    "no boundary": ("multipart/form-data", b"abc", "boundary"),
    "no end": ("multipart/form-data; boundary=x", b"--x\r\nabc", "multipart"),
    "no name": (
        "multipart/form-data; boundary=x",
        b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
        "name",
    ),
    "no file": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\na\r\n--x--\r\n',
        "no file",
    ),
    "empty": ("multipart/form-data; boundary=x", b"", "multipart"),
    "strange charset": (
        "multipart/form-data; boundary=x; charset=undefined",
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--x--\r\n',
        "charset",
    ),
}


@pytest.mark.parametrize("name", MULTIPART)
def test_a_malformed_upload_is_refused(name, client):
    kind, body, says = MULTIPART[name]
    found = client.post(CONTEXTS, content=body, headers={"Content-Type": kind})
    assert says in error_of(found, 400)


@pytest.mark.parametrize("content", [b"caf\xe9", b"a\0b", b"\xed\xa0\x80", b""])
def test_a_file_that_is_no_text_is_refused(content, client):
    error_of(client.post(CONTEXTS, files={"file": ("../../etc/passwd", content)}), 400)


def test_too_many_files_are_refused(client):
    files = [("file", ("a.txt", b"a")), ("file", ("b.txt", b"b"))]
    error_of(client.post(CONTEXTS, files=files), 400)


def test_a_huge_upload_is_refused_before_it_is_sent(client, url_and_service):
    host, port = url_and_service[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/contexts HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1073741824\r\n\r\n"
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_headers_are_refused_where_they_become_too_long(url_and_service):
    host, port = url_and_service[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 2**17)
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_an_upload_of_unknown_length_is_refused_where_it_becomes_too_long(client):
    def sent():
        for _ in range(64):
            yield b" " * 2**16

    try:
        found = client.post(CONTEXTS, content=sent(), headers={"Content-Type": "application/json"})
    except (httpx.WriteError, httpx.ReadError):
        return  # the server closes a connection that goes on sending
    error_of(found, 413)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_what_a_web_page_may_send_unasked_is_refused(kind, client, service):
    headers = {} if kind is None else {"Content-Type": kind}
    found = client.post(CHAT, content=json.dumps(HELLO).encode(), headers=headers)
    assert "send Content-Type: application/json" in error_of(found, 415)
    assert service.asked == []


PATHS = [
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%00",
    "a" * 3000,
    "..%2e",
    "%ff",
    "~",
    "a%0ab",
]


@pytest.mark.parametrize("id", PATHS)
def test_a_strange_id_of_a_context_is_not_found(id, client):
    for method in ("GET", "DELETE"):
        error_of(client.request(method, f"{CONTEXTS}/{id}"), 404)


@pytest.mark.parametrize("id", ["", "/", "ctx_////", "ctx_%2F%2F", "%2F", "..%2F..", f"{ID}/"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_slashes_are_no_way_around_an_id(id, method, client):
    client.post(CONTEXTS, json={"text": "Some text."})
    answer = client.request(method, f"{CONTEXTS}/{id}")
    assert "no such context" in error_of(answer, 404)
    assert answer.json()["error"]["code"] == "context_not_found"
    assert client.get(f"{CONTEXTS}/{ID}").status_code == 200


@pytest.mark.parametrize("path", ["/health/", "/metrics/", f"{CHAT}/", "/v1/", "//", "/v1/nope"])
def test_a_slash_too_many_leads_nowhere(path, client):
    for method in ("GET", "POST"):
        answer = client.request(method, path)
        assert "nothing at this address" in error_of(answer, 404)
        assert "location" not in answer.headers


@pytest.mark.parametrize("name", ["", "/", "tiny/", "a%2Fb"])
def test_a_strange_name_of_a_model_is_not_found(name, client):
    answer = client.get(f"/v1/models/{name}")
    assert "is not served here; ask for 'tiny'" in error_of(answer, 404)


def test_unknown_paths_and_methods(client):
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get("/docs"), 404)
    error_of(client.put(CHAT, json={}), 405)


def test_errors_of_the_service_have_a_status_each(client, service, caplog):
    service.error = QueueFull("64 requests wait already", 2.5)
    found = client.post(CHAT, json=HELLO)
    assert "64 requests" in error_of(found, 429) and found.headers["retry-after"] == "3"
    service.error = TooLong("9,000 tokens are too many; 8,192 fit")
    found = client.post(CHAT, json=HELLO)
    assert "8,192 fit" in error_of(found, 400)
    assert found.json()["error"]["code"] == "context_length_exceeded"
    service.error = RuntimeError("secrets of the prompt")
    assert "secrets" not in error_of(client.post(CHAT, json=HELLO), 500)


def test_what_a_client_can_mend_is_not_a_failure(client, service):
    for error, status in ((UnknownContext("it is gone"), 404), (RepeatsContext("only more"), 400)):
        service.fails = error
        assert str(error) in error_of(client.post(CHAT, json=HELLO), status)
        found = client.post(CHAT, json=HELLO | {"stream": True}).text
        assert str(error) in found and '"invalid_request_error"' in found


def test_a_failure_within_a_stream_is_an_event_of_it(client, service):
    service.fails = Failed("out of memory")
    found = client.post(CHAT, json=HELLO | {"stream": True}).text
    assert '"server_error"' in found and "[DONE]" in found
    error_of(client.post(CHAT, json=HELLO), 500)


def test_why_a_context_was_not_read_is_told(client, service):
    service.fails = Failed("the request failed: no room")
    assert "no room" in error_of(client.post(CONTEXTS, json={"text": "Some text."}), 500)


# ---- keys, operators -----------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "Bearer wrong", "secret", "Basic secret", "Bearer sécret"])
def test_without_the_key_nothing_is_answered(given, client):
    headers = {"Authorization": "" if given is None else given.encode()}
    for path in ("/v1/models", CONTEXTS, "/metrics"):
        error_of(client.get(path, headers=headers), 401)
    error_of(client.post(CHAT, json=HELLO, headers=headers), 401)
    for path in ("/health", "/ready"):
        assert client.get(path, headers=headers).status_code == 200


def test_a_server_that_is_not_ready_says_so(client, service):
    service.ready = False
    error_of(client.get("/ready"), 503)


def test_metrics(client):
    client.post(CHAT, json=HELLO)
    found = client.get("/metrics").text
    for name in ("queue_requests", "answered_total", "units"):
        assert f"\nlocret_{name} 1.0" in found
    assert "locret_first_token_seconds_count" in found


def test_another_model_is_not_served(client):
    error_of(client.post(CHAT, json=HELLO | {"model": "other"}), 404)
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"


def test_a_request_is_one_line_of_json_without_its_text(client, caplog):
    with caplog.at_level(logging.INFO, "locret.serve"):
        client.post(CHAT, json=HELLO | {"user": "Somebody"}, params={"q": "private"})
        until(lambda: caplog.records)
    line = JsonLines().format(caplog.records[-1])
    found = json.loads(line)
    assert (found["path"], found["status"], found["completion_tokens"]) == (CHAT, 200, 2)
    assert not any(word in line for word in ("Hello", "Somebody", "private", "It is"))


# ---- clients that leave --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_cancelled_when_its_client_leaves(stream, client, service):
    service.ends = False
    if stream:
        with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as found:
            next(found.iter_text())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=HELLO, timeout=0.3)
    until(lambda: service.cancelled)


def test_reading_is_cancelled_when_its_client_leaves(client, service):
    service.ends = False
    with pytest.raises(httpx.ReadTimeout):
        client.post(CONTEXTS, json={"text": "Some text."}, timeout=0.3)
    until(lambda: service.cancelled)
