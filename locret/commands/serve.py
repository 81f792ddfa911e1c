"""`python -m locret serve`: an OpenAI-compatible server whose contexts fit a budget."""

import argparse
import functools
import importlib.util
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from locret.commands import shared
from locret.commands.shared import Flag, add_flags, argument, path_of, whole
from locret.quantities import parse_bytes
from locret.system import interrupts

KEY_VARIABLE = "LOCRET_API_KEY"
_SERVER = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
NEEDED = {"serve": _SERVER, "ray": (*_SERVER, "ray"), "ui": (*_SERVER, "gradio")}
"""Modules by the extra that brings them."""
DAY = 24 * 60 * 60
RAY_APPLICATION = "locret"
RAY_ANSWERS = 20.0
"""Seconds within which a Ray cluster must say how it is."""
REPLICAS = ("replicas", "cpus", "gpus")
"""Arguments that say what Ray starts."""


def add_to(commands: Any) -> None:
    command = commands.add_parser("serve", help="serve a model to OpenAI's clients")
    _add_settings(command)
    host: Flag = ("--host", str, "127.0.0.1", "ADDRESS", "to listen at; 0.0.0.0 = every interface")
    add_flags(command, [host, ("--port", _port, 8000, "N", "0 = any free one")])
    command.add_argument(
        "--ray", action="store_true", help="as replicas of a Ray cluster that share --contexts"
    )
    command.add_argument(
        "--ui",
        action=argparse.BooleanOptionalAction,
        default=importlib.util.find_spec("gradio") is not None,
        help="a page at /ui to drop texts on and ask them (not with --ray); default: where Gradio "
        "is installed",
    )
    command.set_defaults(run=run)


def _add_settings(command: argparse.ArgumentParser) -> None:
    """Arguments of the application, wherever it is served."""
    shared.add_model(command, first=True)
    shared.add_engine(command)
    size = argument(parse_bytes)
    flags: list[Flag] = [
        ("--name", str, None, "NAME", "what clients call the model; default: MODEL"),
        ("--contexts", path_of, None, "FOLDER", "keep contexts there, for a restart to find them"),
        ("--contexts-bytes", size, "16GiB", "SIZE", "of all contexts; who was asked last stays"),
        ("--contexts-memory", size, "4GiB", "SIZE", "of contexts on the device; others are loaded"),
        ("--ttl", whole(1), 7 * DAY, "SECONDS", "after which a context that nobody asks is gone"),
        ("--queue", whole(1), 64, "N", "requests that may wait; more are told to come again"),
        ("--batch", whole(1), 8, "N", "requests answered together"),
        ("--max-tokens", whole(1), 1024, "N", "of an answer whose request does not say"),
        ("--memory", size, None, "SIZE", "the device's; prompts that do not fit are refused"),
        ("--upload-limit", size, "64MiB", "SIZE", "of the body of a request"),
        ("--drain", whole(0), 60, "SECONDS", "that answers may go on after SIGTERM"),
    ]
    add_flags(command, flags)
    command.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"that clients must send; default: the environment's {KEY_VARIABLE}, else none. Other "
        "users of this machine can read a command line, so prefer the environment",
    )
    add_replicas(command)


def add_replicas(command: argparse.ArgumentParser) -> None:
    """`REPLICAS`."""
    flags: list[Flag] = [
        ("--replicas", whole(1), 1, "N", "with Ray: processes that answer"),
        ("--cpus", whole(1), 1, "N", "with Ray: cores of a replica"),
        ("--gpus", whole(0), None, "N", "with Ray: of a replica; default: 1 where there are any"),
    ]
    add_flags(command, flags)


def run(given: argparse.Namespace) -> None:
    """Load the model and serve it until SIGTERM or Ctrl-C."""
    check_installed("ray" if given.ray else "serve")
    if given.ui and not given.ray:
        check_installed("ui")
    from locret.serve.app import bound, make_server
    from locret.serve.replies import log_to_stderr

    log_to_stderr()
    if given.ray:
        _serve_with_ray(given)
        return
    key = _key(given)
    with bound(given.host, given.port) as taken:  # before a model is loaded for minutes
        make_server(_app(given, key, given.ui), given.drain).run(sockets=[taken])


def check_installed(extra: str) -> None:
    """Refuse to go on where packages of this extra are missing."""
    missing = [name for name in NEEDED[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"packages are missing: {', '.join(missing)}; pip install 'locret[{extra}]'"
        )


def _key(given: argparse.Namespace) -> str | None:
    """What clients must send; white space around it does not count, as in theirs."""
    key = given.api_key if given.api_key is not None else os.environ.get(KEY_VARIABLE)
    key = None if key is None else key.strip()  # as that of a client is
    if key == "":
        raise ValueError("the API key is empty; give one, or leave it out")
    return key


def _app(given: argparse.Namespace, key: str | None, ui: bool = False) -> Any:
    """The application over a service that is not started yet."""
    from locret.serve.app import make_app

    # The folder of contexts, too, is looked at before a model is loaded.
    service = make_service(given, shared.checked_engine(given), _contexts(given))
    return make_app(
        service,
        service.tokenizer,
        name=given.name or given.model,
        api_key=key,
        upload_limit=given.upload_limit,
        drain_seconds=given.drain,
        ui=ui,
    )


def make_service(given: argparse.Namespace, checked: shared.Checked, contexts: Any) -> Any:
    """The service over the model that is named, not started yet; `contexts` stores what is read."""
    from locret.serve.service import Service

    engine, tokenizer = shared.make_engine(given, checked)
    memory, device = given.memory, engine.model.device
    if memory is None and device.type == "cuda":  # other programs share the memory of a CPU
        import torch

        memory = torch.cuda.mem_get_info(device)[1]
    settings = {name: getattr(given, name) for name in ("queue", "batch", "max_tokens")}
    return Service(engine, tokenizer, contexts=contexts, memory=memory, **settings)


def _contexts(given: argparse.Namespace) -> Any:
    from locret.serve.contexts import Contexts

    most = given.contexts_bytes
    if given.contexts is None:  # without a folder all of them are on the device
        most = min(most, given.contexts_memory)
    return Contexts(given.contexts, most, given.ttl, given.contexts_memory)


def _port(text: str) -> int:
    port = int(whole(0)(text))
    if port > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; expected 0 to 65535")
    return port


# ---- many replicas -------------------------------------------------------------------------------


def ray_application(settings: Mapping[str, Any]) -> Any:
    """What `serve run locret.serve.ray_app:app` runs; settings are those of this command by name,
    such as {"model": MODEL, "max-tokens": 64}."""
    named = {name.replace("_", "-"): str(value) for name, value in settings.items()}
    if "model" not in named:
        raise ValueError("no model is named; give model=MODEL")
    parser = argparse.ArgumentParser(prog="locret.serve.ray_app:app")
    _add_settings(parser)
    words = [named.pop("model"), *(f"--{name}={value}" for name, value in named.items())]
    return _ray_application(parser.parse_args(words))


def _ray_application(given: argparse.Namespace) -> Any:
    from locret.serve.ray_app import application

    if given.contexts is None:
        raise ValueError("replicas share their contexts; give --contexts FOLDER, one for all")
    given.contexts = given.contexts.resolve()  # replicas have working folders of their own
    key = _key(given)
    shared.checked_engine(given)
    return application(
        functools.partial(_replica, given, key),
        api_key=key,
        gpus=gpus_of(given),
        drain_seconds=given.drain,
        **{name: getattr(given, name) for name in ("upload_limit", "replicas", "cpus", "queue")},
    )


def _replica(given: argparse.Namespace, key: str | None) -> Any:
    """The application of a replica, in its process."""
    from locret.serve.replies import log_to_stderr

    log_to_stderr()
    return _app(given, key)


def connect_to_ray() -> None:
    """Use the cluster of this machine, or start one of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tell nobody unless the user wants it
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    if "://" not in os.environ.get("RAY_ADDRESS", ""):  # Ray gives up on others by itself
        address = canonicalize_bootstrap_address(None)  # type: ignore[arg-type]
        if address is not None:
            _check_answers(address)
    ray.init(include_dashboard=False)


def _check_answers(address: str) -> None:
    """Ask a cluster from a process of its own: Ray would try for ever, deaf to signals."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=RAY_ANSWERS)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        raise ValueError(
            f"the Ray cluster at {address} does not answer; start it, or unset RAY_ADDRESS and run "
            "`ray stop`, which forgets it"
        ) from None


def gpus_of(given: argparse.Namespace) -> int:
    """GPUs of a replica, once Ray is connected to."""
    import ray

    if given.gpus is None:
        return int(given.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
    return int(given.gpus)


def _serve_with_ray(given: argparse.Namespace) -> None:
    """Serve with Ray until SIGTERM or Ctrl-C."""
    import ray
    from ray import serve

    from locret.serve.app import bound

    if given.port == 0:  # any other may be what Ray Serve listens at already
        with bound(given.host, 0) as taken:
            given.port = taken.getsockname()[1]
    connect_to_ray()
    try:
        application = _ray_application(given)
        serve.start(http_options={"host": given.host, "port": given.port})
        serve.run(application, name=RAY_APPLICATION)
        ended = threading.Event()
        with interrupts.handled_by(lambda *_: ended.set()):
            logging.getLogger("locret.serve").info(
                "serving at http://%s:%d", given.host, given.port
            )
            ended.wait()
    finally:
        serve.delete(RAY_APPLICATION)  # answers go on for a while
        if not serve.status().applications:
            serve.shutdown()
        ray.shutdown()
