"""The API key that clients must send, where a server has one."""

import hmac

from fastapi import Request

from locret.serve.errors import Refused


def check_key(request: Request, api_key: str | None) -> None:
    """
    Raises:
        Refused: the request does not come with the key; None = it needs none.
    """
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not is_key(given, api_key):
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        challenge = {"WWW-Authenticate": "Bearer"}
        raise Refused(401, message, "invalid_api_key", challenge)


def is_key(given: str, api_key: str) -> bool:
    """Whether somebody gave the key; takes as long whatever is given."""
    return hmac.compare_digest(given.strip().encode(), api_key.encode())
