"""`python -m locret serve`: an OpenAI-compatible server whose contexts fit a budget."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from locret.commands.shared import (
    add_engine,
    add_model,
    argument,
    engine_settings,
    load,
    load_heads,
    whole,
)
from locret.policies import policy_in_words
from locret.quantities import parse_bytes

KEY_VARIABLE = "LOCRET_API_KEY"
NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
DAY = 24 * 60 * 60


def add_to(commands: Any) -> None:
    command = commands.add_parser("serve", help="serve a model to OpenAI's clients")
    add_model(command, first=True)
    add_engine(command)
    size = argument(parse_bytes)
    for name, kind, default, metavar, text in (
        ("--host", str, "127.0.0.1", "ADDRESS", "to listen at; 0.0.0.0 = every interface"),
        ("--port", _port, 8000, "N", "0 = any free one"),
        ("--name", str, None, "NAME", "what clients call the model; default: MODEL"),
        ("--contexts", Path, None, "FOLDER", "keep contexts there, so that a restart finds them"),
        ("--contexts-bytes", size, "16GiB", "SIZE", "of all contexts; who was asked last stays"),
        ("--contexts-memory", size, "4GiB", "SIZE", "of contexts on the device; others are loaded"),
        ("--ttl", whole(1), 7 * DAY, "SECONDS", "after which a context that nobody asks is gone"),
        ("--queue", whole(1), 64, "N", "requests that may wait; more are told to come again"),
        ("--batch", whole(1), 8, "N", "requests answered together"),
        ("--max-tokens", whole(1), 1024, "N", "of an answer whose request does not say"),
        ("--memory", size, None, "SIZE", "the device's; prompts that do not fit are refused"),
        ("--upload-limit", size, "64MiB", "SIZE", "of the body of a request"),
        ("--drain", whole(0), 60, "SECONDS", "that answers may go on after SIGTERM"),
    ):
        shown = text if default is None else f"{text} (default: {default})"
        command.add_argument(name, type=kind, default=default, metavar=metavar, help=shown)
    command.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"that clients must send; default: the environment's {KEY_VARIABLE}, else none. Other "
        "users of this machine can read a command line, so prefer the environment",
    )
    command.add_argument(
        "--ui",
        action=argparse.BooleanOptionalAction,
        default=importlib.util.find_spec("gradio") is not None,
        help="a page at /ui to drop texts on and ask them; default: where Gradio is installed",
    )
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Load the model and serve it until SIGTERM or Ctrl-C.

    Raises:
        ValueError: settings that cannot work together, or packages are missing.
        OSError: the port is taken, or the folder of the contexts cannot be written.
    """
    needed = (*NEEDED, "gradio") if given.ui else NEEDED
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "serve,ui" if given.ui else "serve"
        raise ValueError(
            f"packages are missing: {', '.join(missing)}; pip install 'locret[{extra}]'"
        )
    from locret.serve.logs import log_to_stderr
    from locret.serve.server import bound, serve

    key = given.api_key if given.api_key is not None else os.environ.get(KEY_VARIABLE)
    key = None if key is None else key.strip()  # as that of a client is
    if key == "":
        raise ValueError("the API key is empty; give one, or leave it out")
    log_to_stderr()
    with bound(given.host, given.port) as taken:  # before a model is loaded for minutes
        serve(_app(given, key), taken, given.drain)


def _app(given: argparse.Namespace, key: str | None) -> Any:
    """The application over a service that is not started yet."""
    from locret.engine.config import EngineConfig
    from locret.engine.engine import Engine
    from locret.serve.app import make_app
    from locret.serve.service import Service

    settings, heads = engine_settings(given), load_heads(given)
    policy = given.policy or ("locret" if heads else "full")
    EngineConfig.of(policy, heads.config if heads else None, **settings)
    contexts = _contexts(given)  # its folder too is looked at before a model is loaded
    loaded = load(given)
    chat = bool(loaded.tokenizer.chat_template)
    engine = Engine(
        loaded.model, policy_in_words(policy, loaded.tokenizer, chat), heads=heads, **settings
    )
    service = Service(
        engine,
        loaded.tokenizer,
        contexts=contexts,
        queue=given.queue,
        batch=given.batch,
        max_tokens=given.max_tokens,
        memory=_memory(loaded.model.device) if given.memory is None else given.memory,
    )
    return make_app(
        service,
        loaded.tokenizer,
        name=given.name or given.model,
        api_key=key,
        upload_limit=given.upload_limit,
        drain_seconds=given.drain,
        ui=given.ui,
    )


def _contexts(given: argparse.Namespace) -> Any:
    from locret.serve.contexts import Contexts

    most = given.contexts_bytes
    if given.contexts is None:  # without a folder all of them are on the device
        most = min(most, given.contexts_memory)
    return Contexts(given.contexts, most, given.ttl, given.contexts_memory)


def _memory(device: Any) -> int | None:
    """Bytes of the device, if it is a GPU: other programs share the memory of a CPU."""
    import torch

    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def _port(text: str) -> int:
    port = int(whole(0)(text))
    if port > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; expected 0 to 65535")
    return port
