"""One app for gunicorn (wsgi) and for uvicorn (asgi): counts what it reads, or refuses before it reads."""


def wsgi(environ, start_response):
    if environ["PATH_INFO"] == "/refuse":
        start_response("413 Too Large", [("Content-Length", "2")])
        return [b"no"]
    read = 0
    while piece := environ["wsgi.input"].read(65536):
        read += len(piece)
    text = b"ok %d" % read
    start_response("200 OK", [("Content-Length", str(len(text)))])
    return [text]


async def asgi(scope, receive, send):
    if scope["type"] != "http":
        return
    status, text, read = 200, None, 0
    if scope["path"] == "/refuse":
        status, text = 413, b"no"
    while text is None:
        event = await receive()
        read += len(event.get("body", b""))
        if not event.get("more_body"):
            text = b"ok %d" % read
    headers = [(b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
