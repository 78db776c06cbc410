"""Checks of the servers: W&B and the model hub. No torch."""

import netrc
import os
import re
from http.client import HTTPException
from pathlib import Path
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from trainer.doctor.check import FAILURE, OK, WARNING, Check, Options, judge

# W&B's own servers, since its version 0.31 and before: `wandb login` writes one of them down.
WANDB_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")
NET_SECONDS = 4  # that a server may take between two bytes


def _status(url: str, token: str | None = None) -> int | None:
    """Return the HTTP status that a server answers; None where it cannot be reached."""
    # Not urllib's own opener: it follows redirections, and takes the token to another server.
    opener = OpenerDirector()
    for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    try:
        request = Request(url, method="HEAD")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        with opener.open(request, timeout=NET_SECONDS) as answer:
            return answer.status
    except (OSError, ValueError, HTTPException):
        return None


def logged_in() -> bool:
    """Return whether W&B's API key is known.

    It is in the environment, or in ~/.netrc, where `wandb login` writes it under the server's name.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "").split("://")[-1].split("/")[0]
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(name in known for name in ([host] if host else WANDB_HOSTS))


def wandb(options: Options) -> Check:
    mode = os.environ.get("WANDB_MODE", "online")
    if mode in ("disabled", "offline"):
        return Check(OK, f"WANDB_MODE={mode}")
    url = os.environ.get("WANDB_BASE_URL") or f"https://{WANDB_HOSTS[0]}"
    if _status(url) is None:
        return Check(
            WARNING,
            f"{url} cannot be reached",
            "network: without it runs are recorded offline, and wandb sync uploads them",
            "export WANDB_MODE=offline",
        )
    key = "there" if logged_in() else "not there"
    return judge(key == "there", f"{url} answers, a key is {key}", "a key", "wandb login")


def hub(options: Options) -> Check:
    from huggingface_hub import constants, get_token

    token, url = get_token(), constants.ENDPOINT
    with_token = "a token is there" if token else "no token"
    name = options.model if options.model and not Path(options.model).exists() else None
    if name and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Check(
            FAILURE,
            f"--model {name} is no directory here and no ORG/NAME",
            "a model's directory, or ORG/NAME",
            "hf models ls --search NAME",
        )
    status = _status(f"{url}/{name}/resolve/main/config.json" if name else url, token)
    if status is None or status >= 500 or status == 429:
        answer = f"answers {status}" if status else "cannot be reached"
        return Check(
            WARNING,
            f"{url} {answer}, {with_token}",
            "network, or a model in a local directory",
            "download the model elsewhere and give its directory: --model_name_or_path DIR",
        )
    if name and status in (401, 403):
        return Check(
            FAILURE,
            f"{name} is gated, private or not there, and this account may not read it "
            f"({with_token})",
            "its licence accepted, and a token",
            f"accept it on {url}/{name}, then: hf auth login",
        )
    if name and status == 404:
        return Check(
            FAILURE,
            f"{url} has no {name} ({with_token})",
            "org/model",
            "hf models ls --search NAME",
        )
    readable = f", {name} can be read" if name else ""
    return Check(OK, f"{url} answers, {with_token}{readable}")


CHECKS = [wandb, hub]
