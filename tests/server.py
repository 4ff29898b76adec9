"""A server on loopback for the tests of downloads, with the faults that real ones have."""

import contextlib
import http.server
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a request for /<behaviour>/<file name>; the server has the ``body`` of the file."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        behaviour = self.path.split("/")[1]
        getattr(self, behaviour)(self.server.body)

    def send_head(self, length, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def good(self, body):
        self.send_head(len(body))
        self.wfile.write(body)

    def redirect(self, body):
        self.send_response(302)
        self.send_header("Location", self.path.replace("/redirect/", "/good/"))
        self.end_headers()

    def missing(self, body):
        self.send_error(404)

    def html(self, body):
        page = b"<html>Down for maintenance</html>"
        self.send_head(len(page))
        self.wfile.write(page)

    def wrong(self, body):
        self.send_head(len(body))
        self.wfile.write(body[::-1])

    def cut(self, body):
        """Half of the file, then the connection ends."""
        self.send_head(len(body))
        self.wfile.write(body[:len(body) // 2])

    def silent(self, body):
        """A few bytes, then nothing until the test is over."""
        self.send_head(len(body))
        self.wfile.write(body[:100])
        self.wfile.flush()
        self.server.test_is_over.wait(60)

    def slow(self, body):
        """The whole file, in 20 pieces, for longer than the client would wait for one byte."""
        self.send_head(len(body))
        size = len(body) // 20 + 1
        for start in range(0, len(body), size):
            self.wfile.write(body[start:start + size])
            self.wfile.flush()
            self.server.test_is_over.wait(0.1)


@contextlib.contextmanager
def serve(body):
    """A server with a ``url`` and the ``requests`` that it got."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.requests = body, []
        server.test_is_over = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.test_is_over.set()
            server.shutdown()
