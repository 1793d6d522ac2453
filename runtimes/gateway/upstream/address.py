"""An upstream's address, looked at before anything is served: is it one, and does HTTP answer there?"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl

import httpx

from safevlm.errors import InputError

__all__ = ["check_speaks_http", "trusted", "upstream_address"]

PROBE_SECONDS = 5.0
PORTS = {"http": 80, "https": 443}
EXAMPLE = "http://127.0.0.1:8000/v1"

_log = logging.getLogger(__name__)


def upstream_address(url: str) -> httpx.URL:
    """Return a base URL without a slash at its end. Raises InputError where it is not an address and nothing more."""
    try:
        parsed = httpx.URL(url.rstrip("/"))
        host = parsed.raw_host.decode("ascii")
        host.encode("idna")  # as the resolver does: no empty label, none of more than 63 letters
    except (httpx.InvalidURL, ValueError) as error:
        raise InputError(f"--upstream is not a URL ({error}). Give one such as {EXAMPLE}.") from None
    more = parsed.userinfo or parsed.query or parsed.fragment
    if parsed.scheme not in PORTS or not host or more or not 0 < _port(parsed) < 65536:
        raise InputError(
            "--upstream must be an http(s) address without user name, password, query or fragment, such as "
            f"{EXAMPLE}. A key goes into the environment variable of --upstream-key-env, or --upstream-key-file."
        )
    return parsed


def trusted(url: httpx.URL) -> ssl.SSLContext | bool:
    """Return the authorities that sign an https server's certificate: those of ``SSL_CERT_FILE`` where that is set.

    Raises InputError where they cannot be read.
    """
    if url.scheme != "https":
        return True
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        raise InputError(
            f"the certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read ({error.strerror or error})."
        ) from error


def check_speaks_http(url: str) -> None:
    """Raise InputError where something answers at an address, but no HTTP; warn where nothing answers yet."""
    parsed = upstream_address(url)
    refused = InputError(
        f"--upstream {url} does not speak {parsed.scheme.upper()}. "
        f"Give the base URL of an OpenAI-compatible server, such as {EXAMPLE}."
    )
    try:
        said = _first_bytes(parsed)
    except ssl.SSLCertVerificationError as error:
        raise InputError(
            f"--upstream {url}: its certificate is not trusted ({error.verify_message}). "
            "Name the file with its authority's certificate in the environment variable SSL_CERT_FILE."
        ) from error
    except ssl.SSLEOFError:  # as a proxy does whose server is not up
        said = b""
    except ssl.SSLError as error:
        raise refused from error
    except OSError:
        said = b""
    if not b"HTTP/".startswith(said[:5]):  # a part of it, or nothing, says nothing yet
        raise refused
    if not said:
        _log.warning("--upstream %s does not answer yet", url)
    elif said.split(b" ")[1:2] == [b"404"]:
        _log.warning("--upstream %s has no /models: most servers' base URL ends in /v1", url)


def _first_bytes(url: httpx.URL) -> bytes:
    """Return the first bytes that a server answers; none where it closes."""
    host, context = url.raw_host.decode("ascii"), trusted(url)
    path = url.raw_path.decode("ascii").rstrip("/")
    with contextlib.ExitStack() as held:
        server = held.enter_context(socket.create_connection((host.strip("[]"), _port(url)), PROBE_SECONDS))
        if isinstance(context, ssl.SSLContext):
            server = held.enter_context(context.wrap_socket(server, server_hostname=host.strip("[]")))
        head = f"GET {path}/models HTTP/1.1\r\nHost: {url.netloc.decode('ascii')}\r\nConnection: close\r\n\r\n"
        server.sendall(head.encode("ascii"))
        return server.recv(64)


def _port(url: httpx.URL) -> int:
    return PORTS.get(url.scheme, 0) if url.port is None else url.port
