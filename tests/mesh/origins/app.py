"""A real Python server of one kind, whose app writes down each request that it sees: method, target, whether a sidecar
has marked it, and its body in hexadecimal. Usage: app.py KIND PORT FILE"""
import asyncio
import os
import sys

kind, port, seen = sys.argv[1], int(sys.argv[2]), sys.argv[3]
log = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def note(method, target, marks, body):
    os.write(log, f"{method} {target} {marks} {body.hex() or '-'}\n".encode())


def wsgi(environ, start_response):
    length = environ.get("CONTENT_LENGTH")
    # Without a length, only a server that says so has an end for the body.
    chunked = environ.get("wsgi.input_terminated") or environ.get("HTTP_TRANSFER_ENCODING")
    path = environ["PATH_INFO"]
    body = b""
    if not path.startswith("/ignore"):
        if length:
            body = environ["wsgi.input"].read(int(length))
        elif chunked:
            body = environ["wsgi.input"].read()
    marks = 1 if environ.get("HTTP_TRACEPARENT") else 0
    note(environ["REQUEST_METHOD"], path, marks, body)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["type"] != "http":
        return
    body, more = b"", not scope["path"].startswith("/ignore")
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    marks = sum(name == b"traceparent" for name, _ in scope["headers"])
    note(scope["method"], scope["path"], marks, body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def gunicorn():
    from gunicorn.app.base import BaseApplication

    class App(BaseApplication):
        def load_config(self):
            self.cfg.set("bind", f"0.0.0.0:{port}")
            self.cfg.set("worker_class", "gthread")
            self.cfg.set("threads", 4)
            self.cfg.set("keepalive", 30)

        def load(self):
            return wsgi

    App().run()


def waitress():
    from waitress import serve
    serve(wsgi, host="0.0.0.0", port=port)


def uvicorn():
    import uvicorn
    uvicorn.run(asgi, host="0.0.0.0", port=port, log_level="error")


def hypercorn():
    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    config = Config()
    config.bind = [f"0.0.0.0:{port}"]
    asyncio.run(serve(asgi, config))


def aiohttp():
    from aiohttp import web

    async def handle(request):
        body = b"" if request.path.startswith("/ignore") else await request.read()
        note(request.method, request.path, len(request.headers.getall("traceparent", [])), body)
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_route("*", "/{any:.*}", handle)
    web.run_app(app, host="0.0.0.0", port=port, print=None)


def tornado():
    from tornado import httpserver, ioloop, web

    class Handler(web.RequestHandler):
        SUPPORTED_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")

        def handle(self):
            body = b"" if self.request.path.startswith("/ignore") else self.request.body
            marks = len(self.request.headers.get_list("traceparent"))
            note(self.request.method, self.request.path, marks, body)
            self.finish("ok")

        get = head = post = put = delete = patch = options = trace = handle

    async def main():
        server = httpserver.HTTPServer(web.Application([(r".*", Handler)]))
        server.listen(port, "0.0.0.0")
        await asyncio.Event().wait()

    asyncio.run(main())


{"gunicorn": gunicorn, "waitress": waitress, "uvicorn": uvicorn, "hypercorn": hypercorn, "aiohttp": aiohttp,
 "tornado": tornado}[kind]()
