"""What Python's clients do with uploads: kept connections, chunks, Expect, and answers that come before the end."""

import asyncio
import http.client
import sys

import aiohttp

SIZE = 3_000_000
BODY = b"x" * SIZE


def pieces():
    for at in range(0, SIZE, 50_000):
        yield BODY[at : at + 50_000]


def with_http_client(address):
    connection = http.client.HTTPConnection(address, timeout=20)
    for body in (BODY, pieces(), b"", BODY):
        chunked = not isinstance(body, bytes)
        length = SIZE if chunked else len(body)
        connection.request("POST", "/", body=body, encode_chunked=chunked)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"ok %d" % length), (address, answer.status)
    # Sends all of it before it looks.
    for body in (BODY, pieces()):
        connection = http.client.HTTPConnection(address, timeout=20)
        connection.request("POST", "/refuse", body=body, encode_chunked=not isinstance(body, bytes))
        answer = connection.getresponse()
        assert (answer.status, answer.read().strip()) == (413, b"no"), (address, answer.status)


async def with_aiohttp(address):
    async def streamed():
        for piece in pieces():
            yield piece

    async with aiohttp.ClientSession() as session:
        for expects in (True, False):
            for body in (BODY, streamed()):
                async with session.post(f"http://{address}/", data=body, expect100=expects) as answer:
                    text = await answer.text()
                    assert (answer.status, text) == (200, f"ok {SIZE}"), (address, answer.status, text)
            async with session.post(f"http://{address}/refuse", data=BODY, expect100=expects) as answer:
                assert (answer.status, (await answer.text()).strip()) == (413, "no"), address


for address in sys.argv[1:]:
    with_http_client(address)
    asyncio.run(with_aiohttp(address))
print("all well")
