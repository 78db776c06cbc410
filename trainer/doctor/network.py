"""The doctor's checks of the world outside: W&B, the model hub, the clock. No torch."""

import http.client
import netrc
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

OK, WARNING, FAILURE = "ok", "warning", "failure"
WANDB_HOSTS = (
    "api.forge.coreweave.com",
    "api.wandb.ai",
)  # W&B's own, since its 0.31 and before: which one `wandb login` writes down
NET_SECONDS = 4  # that a server may take between two bytes


@dataclass
class Check:
    """One finding. status: ok, warning (a run would be slower, or lack something) or failure (it would not start or not be right)."""

    name: str
    status: str
    found: str
    needed: str = ""
    fix: str = ""


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None


def _ask(url, token=None):
    """(status or None, Date header or None). A redirection is an answer: followed, it would take the token to another server."""
    request = urllib.request.Request(
        url, method="HEAD", headers={"Authorization": f"Bearer {token}"} if token else {}
    )
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=NET_SECONDS) as answer:
            return answer.status, answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Date")
    except (OSError, ValueError, http.client.HTTPException):
        return None, None


def logged_in():
    """True with W&B's API key in the environment or in ~/.netrc, where `wandb login` leaves it under the server's name."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    given = os.environ.get("WANDB_BASE_URL", "").split("://")[-1].split("/")[0]
    try:
        return not {given}.union(() if given else WANDB_HOSTS).isdisjoint(
            netrc.netrc(os.environ.get("NETRC")).hosts
        )
    except (OSError, netrc.NetrcParseError):
        return False


def wandb(options):
    mode = os.environ.get("WANDB_MODE", "online")
    if mode in ("disabled", "offline"):
        return Check("wandb", OK, f"WANDB_MODE={mode}")
    known = logged_in()
    url = os.environ.get("WANDB_BASE_URL") or f"https://{WANDB_HOSTS[0]}"
    status, _ = _ask(url)
    if status is None:
        return Check(
            "wandb",
            WARNING,
            f"{url} cannot be reached",
            "network: without it runs are recorded offline, and wandb sync uploads them",
            "export WANDB_MODE=offline",
        )
    return Check(
        "wandb",
        OK if known else WARNING,
        f"{url} answers, a key is {'there' if known else 'not there'}",
        "a key",
        "" if known else "wandb login",
    )


def hub(options):
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if not token:
        path = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "token"
        token = path.read_text(errors="replace").strip() if path.is_file() else None
    token = token and "".join(token.split())
    have = "a token is there" if token else "no token"
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    name = options.model if options.model and not Path(options.model).exists() else None
    if name and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Check(
            "hub",
            FAILURE,
            f"--model {name} is no directory here and no ORG/NAME",
            "a model's directory, or ORG/NAME",
            "hf models ls --search NAME",
        )
    status, _ = _ask(f"{url}/{name}/resolve/main/config.json" if name else url, token)
    if status is None or status >= 500 or status == 429:
        return Check(
            "hub",
            WARNING,
            f"{url} {f'answers {status}' if status else 'cannot be reached'}, {have}",
            "network, or a model in a local directory",
            "download the model elsewhere and give its directory: --model_name_or_path DIR",
        )
    if name and status in (401, 403):
        return Check(
            "hub",
            FAILURE,
            f"{name} is gated, private or not there, and this account may not read it ({have})",
            "its licence accepted, and a token",
            f"accept it on {url}/{name}, then: hf auth login",
        )
    if name and status == 404:
        return Check(
            "hub",
            FAILURE,
            f"{url} has no {name} ({have})",
            "org/model",
            "hf models ls --search NAME",
        )
    return Check("hub", OK, f"{url} answers, {have}" + (f", {name} can be read" if name else ""))


def clock(options):
    from email.utils import parsedate_to_datetime

    year = time.gmtime().tm_year
    for url in (os.environ.get("HF_ENDPOINT", "https://huggingface.co"), "https://pypi.org"):
        _, date = _ask(url)
        if date:
            off = abs(time.time() - parsedate_to_datetime(date).timestamp())
            return Check(
                "clock",
                OK if off < 60 else FAILURE,
                f"{off:.0f} s off {url}",
                "less than 60 s: certificates and S3 signatures",
                "" if off < 60 else "timedatectl set-ntp true",
            )
    return Check(
        "clock",
        OK if 2025 <= year < 2040 else FAILURE,
        f"the year {year}; no server to compare with",
        "",
        "" if 2025 <= year < 2040 else "timedatectl set-ntp true",
    )
