"""Messages for a hub that cannot be reached or refuses: the reason, and the ways out.

No message shows a token, or the name and password of a proxy.
"""

from __future__ import annotations

import os
import re
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from safevlm.errors import HubError, InputError, StorageError
from safevlm.files.storage import refusal_to_write

if TYPE_CHECKING:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["Wanted", "bound_waiting", "hub_error", "hub_failures", "out_of_reach"]

SECONDS = 30.0
"""Without a word from the hub: after them it cannot be reached. By itself huggingface_hub waits for ever."""
PORTAL = 511
"""Network Authentication Required."""
PROXY = 407
NOT_A_HUBS = (KeyError, TypeError, AttributeError)
"""What huggingface_hub fails with on JSON that lacks what a hub states."""


class Wanted:
    """What was to be fetched: a repository, at a revision, and of it one file or all that is needed."""

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        filename: str | None = None,
        kind: Literal["model", "dataset"] = "model",
    ) -> None:
        self.repo_id, self.revision, self.kind = repo_id, revision, kind
        self.name = f"'{repo_id}'" + (f" at revision '{revision}'" if revision else "")
        if filename is not None:
            self.name = f"'{filename}' of {self.name}"

    @property
    def page(self) -> str:
        """The repository's page on the hub."""
        return f"{_endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo_id}"

    @property
    def ways_out(self) -> str:
        """What helps where the hub is out of reach."""
        dataset = self.kind == "dataset"
        revision = f" --revision {self.revision}" if self.revision else ""
        command = f"hf download {self.repo_id}{' --repo-type dataset' * dataset}{revision}"
        command += f" --local-dir {self.repo_id.rpartition('/')[2]}"
        return (
            f"Set HTTPS_PROXY or HF_ENDPOINT to an address that this machine can reach; or run `{command}` on another "
            f"machine, copy {'its image files' if dataset else 'that folder'} here and give "
            f"{'--images' if dataset else '--model'} FOLDER."
        )


def hub_failures() -> tuple[type[Exception], ...]:
    """Return everything huggingface_hub raises for a bad id, a refusal, a network, a proxy or a disk that fails.

    ValueError and ImportError come from httpx for a proxy that it cannot use, and for an answer that is no JSON;
    UnicodeError is one, for a token with letters that no token has. The last three are its own words for JSON that is
    not a hub's.
    """
    import httpx
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    network = (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError)
    return (*network, EntryNotFoundError, HFValidationError, *NOT_A_HUBS)


def bound_waiting() -> None:
    """Let no request to the hub wait longer than :data:`SECONDS` for a sign of life."""
    from huggingface_hub import get_session

    try:
        session = get_session()
    except hub_failures():  # a proxy or certificate file that cannot be used: reported by the request
        return
    if _bound not in session.event_hooks["request"]:
        session.event_hooks = {**session.event_hooks, "request": [*session.event_hooks["request"], _bound]}


def _bound(request: httpx.Request) -> None:
    given = request.extensions.get("timeout") or {}
    bounds = {step: given.get(step) or SECONDS for step in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": bounds}


def hub_error(error: Exception, wanted: Wanted, allowed: str) -> InputError:
    """Return the error to raise: what failed and what to do; ``allowed`` says what may be named instead."""
    from huggingface_hub import constants, errors

    root = _root(error)
    if isinstance(root, errors.HFValidationError):
        return HubError(f"'{wanted.repo_id}' is not a hub id. {allowed}")
    told = out_of_reach(error, wanted)
    if told is not None:
        return told
    cache, advice = Path(constants.HF_HUB_CACHE), "set HF_HOME to a folder that can be written to"
    full = refusal_to_write(root, cache, "", advice)
    if full is not None:
        return StorageError(full)
    return HubError(
        f"{wanted.name} could not be fetched from {_endpoint()} ({type(root).__name__}: {_first_line(root)}). "
        f"{wanted.ways_out}"
    )


def out_of_reach(error: Exception, wanted: Wanted) -> HubError | None:
    """Return the error for a hub that refuses or cannot be reached, None for any other failure."""
    from huggingface_hub import constants, errors

    root = _root(error)
    if constants.HF_HUB_OFFLINE:
        return HubError(
            f"{wanted.name} is not complete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids "
            "downloading it. Unset HF_HUB_OFFLINE once to fetch it, or give a folder."
        )
    if isinstance(root, errors.HfHubHTTPError) and root.response.status_code not in (PROXY, PORTAL):
        return HubError(_refusal(root, wanted))
    reason = _reason(root)
    if reason is None:
        return None
    return HubError(
        f"the hub {_endpoint()} cannot be reached{_proxy()} for {wanted.name} ({reason}). {wanted.ways_out}"
    )


def _root(error: Exception) -> Exception:
    """Return the exception that says most: below those that only say that something was not fetched."""
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) or type(error) is ConnectionError:
        cause = error.__cause__ or error.__context__
        if not isinstance(cause, (httpx.HTTPError, LocalEntryNotFoundError, ConnectionError)):
            break
        error = cause
    return error


def _refusal(refusal: HfHubHTTPError, wanted: Wanted) -> str:
    """Say what an HTTP status of the hub means for the user."""
    from huggingface_hub import errors

    if isinstance(refusal, errors.GatedRepoError):
        return (
            f"{wanted.name} is gated, and the hub refuses access. Accept its terms at {wanted.page}, then set "
            "HF_TOKEN to a token of that account (or run `hf auth login`)."
        )
    status = refusal.response.status_code
    if isinstance(refusal, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"the hub {_endpoint()} shows no {wanted.kind} {wanted.name}: it does not exist, or is private or gated "
            "and no valid token was sent. Check the spelling; if it is private, set HF_TOKEN or run `hf auth login`."
        )
    if isinstance(refusal, errors.RevisionNotFoundError):
        return (
            f"the hub has no such revision: {wanted.name}. A branch, a tag or a full commit hash is allowed; "
            f"see {wanted.page}/commits/main."
        )
    advice = {
        403: "Check that HF_TOKEN is valid and may read this model, and that no proxy refuses the hub. ",
        404: "Check that HF_ENDPOINT is the address of a hub. ",
        429: "There were too many requests: wait some minutes, or set HF_TOKEN. ",
    }.get(status, "Try again later. ")
    return f"the hub {_endpoint()} answered {status}{_proxy()} for {wanted.name}. {advice}{wanted.ways_out}"


def _reason(root: Exception) -> str | None:
    """Return why the hub cannot be reached; None for errors that are not about the network."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, LocalEntryNotFoundError

    text = _first_line(root)
    status = root.response.status_code if isinstance(root, HfHubHTTPError) else None
    if status == PROXY or (isinstance(root, httpx.ProxyError) and text.startswith(str(PROXY))):
        return "the proxy requires a name and password (407); give them as HTTPS_PROXY=http://NAME:PASSWORD@HOST:PORT"
    if isinstance(root, httpx.ProxyError):
        return f"the proxy refuses: {text}"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        why = text.partition("certificate verify failed:")[2].partition("(")[0].strip() or "unknown issuer"
        return f"its certificate is not trusted, {why}; behind a proxy that inspects TLS set SSL_CERT_FILE to its CA"
    if "[SSL" in text:
        return f"TLS fails, {text.partition(']')[2].partition('(')[0].strip()}; should the address begin with http://?"
    if isinstance(root, httpx.TimeoutException):
        return "no answer in time; a firewall may drop the packets"
    if isinstance(root, (httpx.UnsupportedProtocol, httpx.InvalidURL)):
        if _is_address(constants.ENDPOINT):
            return "the proxy's address is malformed; it should look like http://HOST:PORT"
        return "the address is malformed; it should look like https://huggingface.co"
    if re.search(r"Errno -\d|getaddrinfo|name resolution|nodename", text):
        return "its name cannot be resolved (DNS)"
    foreign = isinstance(root, (FileMetadataError, *NOT_A_HUBS)) or type(root).__name__ == "JSONDecodeError"
    if status == PORTAL or foreign:
        return "something else answered, such as the login page of a network or proxy"
    if isinstance(root, UnicodeError) or "header value" in text:
        return "HF_TOKEN contains characters that are not allowed in a token"
    certificates = os.environ.get("SSL_CERT_FILE")
    if certificates and "[X509" in text:
        return f"SSL_CERT_FILE names {certificates}, which holds no certificate"
    if isinstance(root, FileNotFoundError) and certificates and not Path(certificates).exists():
        return f"SSL_CERT_FILE names {certificates}, which does not exist"
    if isinstance(root, ImportError) and "SOCKS" in text:
        return "a SOCKS proxy needs another package: pip install 'httpx[socks]'"
    if isinstance(root, ValueError) and "proxy" in text.lower():
        return "the proxy's address begins with neither http:// nor https://"
    if isinstance(root, (httpx.HTTPError, LocalEntryNotFoundError, ConnectionError)):
        return (text.partition("] ")[2] or text).rstrip(".") or type(root).__name__
    return None


def _endpoint() -> str:
    from huggingface_hub import constants

    return _without_secrets(constants.ENDPOINT) or "''"


def _is_address(text: str) -> bool:
    import httpx

    try:
        return httpx.URL(text).scheme in ("http", "https")
    except httpx.InvalidURL:
        return False


def _proxy() -> str:
    """Say through which proxy the hub is asked, if through any."""
    from huggingface_hub import constants

    try:
        address = urlsplit(constants.ENDPOINT)
        bypassed = address.hostname is None or urllib.request.proxy_bypass(address.hostname)
    except ValueError:  # no address at all
        return ""
    proxies = urllib.request.getproxies()
    proxy = None if bypassed else proxies.get(address.scheme) or proxies.get("all")
    return f" through the proxy {_without_secrets(proxy)}" if proxy else ""


def _first_line(error: Exception) -> str:
    return _without_secrets(str(error)).partition("\n")[0]


def _without_secrets(text: str) -> str:
    """Leave out names and passwords of addresses, and tokens."""
    plain = re.sub(r"(\w+://)?[^\s'\"()]*@", r"\1", text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = os.environ.get(name)
        plain = plain.replace(token, "…") if token else plain
    return plain
