"""Opens a site that inference.web wrote in this machine's browser; needs nothing but Python and, once, npm.

    python -m inference.web_open site

The site is served to this machine alone. A page that is opened as a file could not load its model.
"""

from __future__ import annotations

import os
import sys
import webbrowser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from inference.web_runtime import add_runtime
from rows.command_line import Command, run_program


PORT = 8765
HOSTS = ("127.0.0.1", "localhost")


class Handler(SimpleHTTPRequestHandler):
    """Serves files to pages of this machine: another site whose name leads here is refused."""

    protocol_version = "HTTP/1.1"
    # Not those of the machine, which may lack or change them.
    extensions_map = {
        ".bin": "application/octet-stream", ".css": "text/css", ".html": "text/html", ".js": "text/javascript",
        ".json": "application/json", ".mjs": "text/javascript", ".onnx": "application/octet-stream",
        ".svg": "image/svg+xml", ".wasm": "application/wasm", ".webp": "image/webp", "": "text/plain",
    }  # fmt: skip

    def send_head(self):
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in HOSTS:
            self.send_error(403, "Open it as http://127.0.0.1")
            return None
        return super().send_head()

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")  # a site that was written anew is seen
        super().end_headers()

    def log_message(self, *_) -> None:
        pass


def make_server(site: Path, port: int) -> ThreadingHTTPServer:
    """A server of a folder on 127.0.0.1, not yet running; port 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=os.fspath(site)))
    except OSError as error:
        raise OSError(f"port {port} cannot be opened ({error.strerror}): give another --port") from None
    server.daemon_threads = True
    return server


def serve(site: Path, port: int, opens: bool) -> None:
    """Serves a site until Ctrl-C, in the browser where `opens`."""
    with make_server(site, port) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"{address} shows {site}; Ctrl-C ends it", flush=True)
        if opens:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main(arguments: list[str] | None = None) -> None:
    parser = Command("inference.web_open", __doc__)
    parser.add_argument("site", type=Path, help="Folder that inference.web wrote.")
    parser.add_argument("--port", type=int, default=PORT, help="Port to serve at (default: %(default)s).")
    parser.add_flag("--no_browser", "Only serve: print the address and open no browser.")
    options = parser.parse_args(arguments)
    if not (options.site / "data" / "site.json").is_file():
        sys.exit(f"error: {options.site} is no site: write one with python -m inference.web")
    if not (options.site / "index.html").is_file():
        sys.exit(
            f"error: {options.site} holds a site's data alone: write the whole with python -m inference.web_page "
            f"{options.site} build/{options.site.resolve().name}, and open that"
        )
    add_runtime(options.site)
    serve(options.site, options.port, not options.no_browser)


if __name__ == "__main__":
    run_program(main)
