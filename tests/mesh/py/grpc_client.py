"""Calls the server of grpc_server.py through whatever lies between, and checks what a client sees."""
import sys
import time

import grpc

options = [("grpc.max_receive_message_length", 32 << 20), ("grpc.max_send_message_length", 32 << 20)]
channel = grpc.insecure_channel(sys.argv[1], options=options)
grpc.channel_ready_future(channel).result(timeout=10)

unary = channel.unary_unary("/test.Echo/Unary")
response, call = unary.with_call(b"hello", metadata=(("mine", "kept"),), timeout=5)
assert response == b"unary:hello", response
assert dict(call.trailing_metadata())["seen"] == "kept", call.trailing_metadata()

try:
    unary(b"fail", timeout=5)
    raise SystemExit("an error status was lost")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error
    assert error.details() == "as asked", error

begun = time.monotonic()
try:
    unary(b"slow", timeout=0.5)
    raise SystemExit("a deadline was lost")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
assert time.monotonic() - begun < 2

big = b"x" * (16 << 20)
assert unary(big, timeout=20) == b"unary:" + big

stream = channel.unary_stream("/test.Echo/ServerStream")
assert [int(n) for n in stream(b"1000", timeout=10)] == list(range(1000))

total = channel.stream_unary("/test.Echo/ClientStream")
assert total((b"%d" % n for n in range(1000)), timeout=10) == b"499500"

bidi = channel.stream_stream("/test.Echo/Bidi")
asked = []


def one_by_one():
    for n in range(50):
        asked.append(n)
        yield b"%d" % n


answers = bidi(one_by_one(), timeout=10)
for n, answer in enumerate(answers):
    assert answer == b"echo:%d" % n, answer
assert n == 49

missing = channel.unary_unary("/test.Echo/NoSuchMethod")
try:
    missing(b"", timeout=5)
    raise SystemExit("an unknown method was answered")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED, error
print("all well")
