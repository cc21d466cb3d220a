"""Fetches uv's wheel from a package index and puts its program into a directory; needs nothing but Python itself.

A base image need not have pip. Only a file whose sha256 is in the lock is ever taken.

Run as: python3 fetch_uv.py INDEX LOCK DIRECTORY
"""

import base64
import hashlib
import html.parser
import io
import platform
import re
import sys
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

TIMEOUT = 120


class Links(html.parser.HTMLParser):
    """Collects the addresses that a page of the simple index (PEP 503) links to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        """Called for every tag."""
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def request_of(address, headers):
    """A request; a name and password in the address go where urllib wants them."""
    parts = urllib.parse.urlsplit(address)
    credentials, _, host = parts.netloc.rpartition("@")
    if credentials:
        given = urllib.parse.unquote(credentials).encode()
        headers = {**headers, "Authorization": "Basic " + base64.b64encode(given).decode()}
    return urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host)), headers=headers)


def main(index, lock, directory):
    """Raises SystemExit with one line where there is no such file."""
    text = Path(lock).read_text("utf-8")
    version, hashes = re.search(r"^uv==(\S+)", text, re.M).group(1), set(re.findall(r"sha256:([0-9a-f]{64})", text))
    page = index.rstrip("/") + "/uv/"
    with urllib.request.urlopen(request_of(page, {"Accept": "text/html"}), timeout=TIMEOUT) as answer:
        links = Links()
        links.feed(answer.read().decode("utf-8"))
    wheel = re.compile(rf"uv-{re.escape(version)}-py3-none-manylinux[^/]*_{platform.machine()}\.whl$")
    for link in links.found:
        address = urllib.parse.urljoin(page, link)
        if not wheel.search(urllib.parse.urlsplit(address).path):
            continue
        with urllib.request.urlopen(request_of(address, {}), timeout=TIMEOUT) as answer:
            content = answer.read()
        if hashlib.sha256(content).hexdigest() not in hashes:
            sys.exit(f"fetch_uv: {link} is not what {lock} says (sha256)")
        archive = zipfile.ZipFile(io.BytesIO(content))
        name = next(name for name in archive.namelist() if name.endswith("/scripts/uv"))
        target = Path(directory) / "uv"
        target.write_bytes(archive.read(name))
        target.chmod(0o755)
        return
    sys.exit(f"fetch_uv: the index has no wheel of uv {version} for {platform.machine()}: is it a complete mirror?")


if __name__ == "__main__":
    main(*sys.argv[1:])
