# SPDX-License-Identifier: Apache-2.0
"""What a URL names, brought to a temporary file whole, within limits on size, time and place."""

import http.client
import io
import ipaddress
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit, urlunsplit


CHUNK_BYTES = 2**18
ATTEMPTS = 3
FIRST_PAUSE = 0.5  # seconds before the second attempt; twice as long before each further one
TEMPORARY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
DEFAULT_PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that stand for IPv4 ones (RFC 6052)
# The same by rules of a network's own (RFC 8215), and in a form that is no longer used (RFC 4291).
NEVER_PUBLIC = (ipaddress.ip_network("64:ff9b:1::/48"), ipaddress.ip_network("::/96"))


@dataclass(frozen=True)
class SourceLimits:
    """
    What may be opened as a video, and how much of it is taken. A server that opens what its users name sets them as
    `video_processor.source_limits`.

    Args:
        max_bytes (`int`): Greatest size of a file, a download, a pipe or a `data:` URL.
        max_seconds (`float`): Longest time that a download or the reading of a pipe may take in all.
        timeout (`float`): Longest wait for a connection and for the next byte, in seconds.
        allow_local (`bool`): Whether paths and `file://` URLs may be opened.
        media_root (`str`, *optional*):
            The only folder whose files may be opened; relative paths are relative to it. Links out of it and pipes are
            refused.
        allow_private (`bool`):
            Whether a URL may lead to an address that is not public, such as `127.0.0.1` or `10.0.0.1`. If not,
            proxies are not used, as the address behind them is not known.
        allowed_hosts (`frozenset[str]`, *optional*): The only hosts that a URL may lead to, redirects included.
        private_hosts (`frozenset[str]`):
            Hosts that a URL may lead to although their addresses are not public, without `allow_private`.
    """

    max_bytes: int = 2**36
    max_seconds: float = 3600.0
    timeout: float = 60.0
    allow_local: bool = True
    allow_private: bool = True
    allowed_hosts: frozenset[str] | None = None
    media_root: str | None = None
    private_hosts: frozenset[str] = frozenset()

    def check_url(self, url: str):
        """Raises a `ValueError` for a URL that is not http or https, or leads to a host that is not allowed."""
        parts = urlsplit(url)
        if parts.scheme.lower() not in DEFAULT_PORTS:
            raise ValueError(f"it leads to {url!r}, and only http and https are followed")
        if self.allowed_hosts is not None and parts.hostname not in self.allowed_hosts:
            raise ValueError(f"the host {parts.hostname!r} is not among the allowed ones")

    def check_address(self, host: str, address: str):
        """Raises a `ValueError` for a host with an IP address that is not public, if private ones are not allowed."""
        is_allowed = self.allow_private or host.lower() in self.private_hosts
        if not is_allowed and not is_public(address):
            # Which address that is would tell of the network behind this machine.
            raise ValueError("it leads to an address that is not public")


def is_public(address: str) -> bool:
    """Whether an IP address, or the IPv4 address that an IPv6 one stands for, is one host of the public Internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in NAT64:
            inner = ipaddress.IPv4Address(ip.packed[-4:])
        if any(ip in network for network in NEVER_PUBLIC):
            return False
        ip = inner or ip
    return ip.is_global and not ip.is_multicast


class Copied:
    """Counts what is copied from a source into a temporary file. Past a limit it raises a `ValueError`."""

    def __init__(self, limits: SourceLimits):
        self.limits, self.deadline = limits, time.monotonic() + limits.max_seconds

    def check_size(self, num_bytes: int):
        if num_bytes > self.limits.max_bytes:
            raise ValueError(f"it is larger than {self.limits.max_bytes:,} bytes, the limit (`max_bytes`)")

    def copy(self, read: Callable[[int], bytes], file: BinaryIO):
        """Appends what `read` gives until its end."""
        while chunk := read(CHUNK_BYTES):
            self.check_size(file.tell() + len(chunk))
            file.write(chunk)
            self.check_time()

    def check_time(self):
        if time.monotonic() > self.deadline:
            raise ValueError(f"it took longer than {self.limits.max_seconds:g} seconds, the limit (`max_seconds`)")


def quote_url(url: str) -> str:
    """A URL as HTTP takes it: spaces and non-ASCII letters are quoted; what is quoted already stays."""
    parts = urlsplit(url)
    netloc = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (quote(part, safe="/%:=&?~#+!$,;'@()*[]") for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, netloc, path, query, ""))


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https alone, at their own ports or at that of the host that redirects."""

    def __init__(self, limits: SourceLimits):
        self.limits = limits

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        newurl = urljoin(req.full_url, newurl)
        self.limits.check_url(newurl)
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        same_place = (old.hostname, old.port) == (new.hostname, new.port)
        if not same_place and new.port not in (None, DEFAULT_PORTS[new.scheme.lower()]):
            raise ValueError(f"it is redirected to another port, {newurl!r}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class TimedReader(io.RawIOBase):
    """
    Reads a connection within the time of a download, which the wait for the next byte alone does not bound: a server
    may send its headers, or the lengths of chunks, byte by byte.

    Args:
        connection (`socket.socket`): The connection.
        copied ([`Copied`]): The download.
    """

    def __init__(self, connection: socket.socket, copied: Copied):
        self.connection, self.copied = connection, copied
        self.raw = connection.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        self.copied.check_time()
        remaining = self.copied.deadline - time.monotonic()
        self.connection.settimeout(min(self.copied.limits.timeout, max(remaining, 0.001)))
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


def connection_class(base: Any, limits: SourceLimits, copied: Copied | None) -> Any:
    """
    A class of connections that are not even begun to an address that is not allowed, and end when the time of a
    download is over.
    """

    class Response(http.client.HTTPResponse):
        def __init__(self, sock, *args, **kwargs):
            super().__init__(sock, *args, **kwargs)
            if copied is not None:
                self.fp.close()
                self.fp = io.BufferedReader(TimedReader(sock, copied))

    def connect_to_checked(address, timeout, source_address):
        host, port = address
        addresses = [str(place[0]) for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for each in addresses:
            limits.check_address(host, each)
        # To what was checked: a name that is looked up again may lead elsewhere by then.
        for each in addresses[:-1]:
            try:
                return socket.create_connection((each, port), timeout, source_address)
            except OSError:
                continue
        return socket.create_connection((addresses[-1], port), timeout, source_address)

    class CheckedConnection(base):
        response_class = Response

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._create_connection = connect_to_checked

    return CheckedConnection


def make_opener(limits: SourceLimits, copied: Copied | None) -> urllib.request.OpenerDirector:
    """Opens http and https URLs, and nothing else."""

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req):
            return self.do_open(connection_class(http.client.HTTPConnection, limits, copied), req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req):
            connection = connection_class(http.client.HTTPSConnection, limits, copied)
            return self.do_open(connection, req, context=self._context)  # type: ignore[attr-defined]

    opener = urllib.request.OpenerDirector()
    handlers = [Http(), Https(), urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor()]
    if limits.allow_private:
        handlers.append(urllib.request.ProxyHandler())
    for handler in (*handlers, Redirects(limits)):
        opener.add_handler(handler)
    return opener


def open_url(
    url: str,
    limits: SourceLimits,
    headers: dict[str, str] | None = None,
    method: str = "GET",
    copied: Copied | None = None,
) -> http.client.HTTPResponse:
    """
    Opens an http or https URL, to be read for as long as `copied` may take; without it for any time. Raises an
    `OSError`, `HTTPException` or `ValueError` if that fails.
    """
    limits.check_url(url)
    headers = {"User-Agent": "transformers-vamba", **(headers or {})}
    request = urllib.request.Request(quote_url(url), headers=headers, method=method)
    return make_opener(limits, copied).open(request, timeout=limits.timeout)


def is_temporary(error: Exception) -> bool:
    """Whether a second attempt may succeed."""
    if isinstance(error, HTTPError):
        return error.code in TEMPORARY_STATUSES
    if isinstance(error, URLError):
        error = error.reason
    return isinstance(error, (ConnectionError, TimeoutError, http.client.IncompleteRead))


def find_validator(headers: Message) -> str | None:
    """
    The ETag or the date of a URL's content, if it changes whenever a byte of that does: a weak ETag may not, nor may a
    date of the second in which the content was sent, as further changes in it have the same (RFC 9110, 8.8).
    """
    tag, date = headers["ETag"], headers["Last-Modified"]
    if tag and not tag.startswith("W/"):
        return tag
    try:
        age = parsedate_to_datetime(headers["Date"]) - parsedate_to_datetime(date)
    except (TypeError, ValueError):  # one of them is missing or no date
        return None
    return date if age.total_seconds() >= 1 else None


class PartialDownload:
    """A download into `file`. If it breaks off, a further attempt goes on from there."""

    def __init__(self, url: str, file: BinaryIO, copied: Copied):
        self.url, self.file, self.copied = url, file, copied
        self.validator: str | None = None  # the ETag or date of what is there, so that two versions are never joined
        self.num_missing: int | None = None

    def go_on(self):
        """
        Appends what is missing, or begins anew if the server does not go on from there.

        Raises:
            `IncompleteRead`: when the body ends before its stated length.
        """
        start = self.file.tell()
        headers = {}
        if start and self.validator:
            headers = {"Range": f"bytes={start}-", "If-Range": self.validator}
        with open_url(self.url, self.copied.limits, headers, copied=self.copied) as response:
            if response.status != 206 or not (response.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
                self.file.seek(0)
                self.file.truncate()
            self.validator = find_validator(response.headers)
            self.copied.check_size(self.file.tell() + (response.length or 0))
            try:
                self.copied.copy(response.read1, self.file)
            finally:
                self.num_missing = response.length
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)

    def describe(self, error: Exception) -> str:
        """What is wrong, for people."""
        if self.num_missing:
            size = self.file.tell()
            return f"the download ended after {size:,} of {size + self.num_missing:,} bytes ({error})"
        if isinstance(error, http.client.IncompleteRead):
            return f"the download ended early, after {self.file.tell():,} bytes"
        return str(error)


@contextmanager
def download(url: str, limits: SourceLimits) -> Iterator[BinaryIO]:
    """
    Brings an http or https URL to a temporary file. What breaks off is gone on with, `ATTEMPTS` times in all.

    Raises:
        `OSError`, `HTTPException`, `ValueError`: when it cannot be had whole, or is past the limits.
    """
    with download_version(url, limits) as (file, _):
        yield file


@contextmanager
def download_version(url: str, limits: SourceLimits) -> Iterator[tuple[BinaryIO, str | None]]:
    """
    As [`download`], with the ETag or the date by which [`is_unchanged`] knows this version; `None` without either.

    Raises:
        `OSError`, `HTTPException`, `ValueError`: when it cannot be had whole, or is past the limits.
    """
    copied = Copied(limits)
    with TemporaryFile() as file:
        partial = PartialDownload(url, file, copied)
        for attempt in range(ATTEMPTS):
            try:
                partial.go_on()
                break
            except (OSError, http.client.HTTPException) as error:
                if not is_temporary(error) or attempt == ATTEMPTS - 1:
                    raise ValueError(partial.describe(error)) from error
                copied.check_time()
                time.sleep(FIRST_PAUSE * 2**attempt)
        yield file, partial.validator


def is_unchanged(url: str, version: str, limits: SourceLimits) -> bool:
    """Whether a URL still has the content of a version that [`download_version`] gave."""
    is_tag = version.startswith('"')
    headers, method = ({"If-None-Match": version}, "GET") if is_tag else ({}, "HEAD")
    try:
        with open_url(url, limits, headers, method, Copied(limits)) as response:
            # Dates are compared here: a file that was replaced by an older one counts as unchanged for many servers.
            return not is_tag and find_validator(response.headers) == version
    except HTTPError as error:
        return error.code == 304
    except (OSError, http.client.HTTPException):
        return False  # the download says what is wrong, and tries again
