"""Talks to ws_server.py: text, binary, large, ping, and an orderly close."""
import asyncio
import sys

import websockets


async def main():
    async with websockets.connect(sys.argv[1], max_size=None) as socket:
        for message in ["hello", b"\x00\x01", "x" * 1_000_000]:
            await socket.send(message)
            assert await socket.recv() == message
        await asyncio.wait_for(await socket.ping(), 5)
    assert socket.close_code == 1000, socket.close_code


asyncio.run(main())
print("all well")
