"""Programs with habits of raw TCP: resets, urgent bytes, many small writes, both speaking at once, SMTP.

tcp_habits.py serve PORT FILE: the first line of a client says what to do; FILE gets a line on how it ended.
tcp_habits.py smtp PORT FILE: a server that speaks first; FILE gets each message.
tcp_habits.py <what> HOST PORT: a client; prints what it saw.
"""

import os
import smtplib
import socket
import statistics
import struct
import sys
import threading
import time

SIZE = 300_000


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def how_it_ends(connection):
    try:
        while connection.recv(65536):
            pass
        return "end"
    except ConnectionResetError:
        return "reset"


def exactly(connection, n):
    got = b""
    while len(got) < n:
        more = connection.recv(n - len(got))
        if not more:
            raise EOFError(f"{len(got)} of {n}")
        got += more
    return got


def listening(port):
    both = socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    while True:
        yield both.accept()[0]


def say(path, text):
    with open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")


def serve(port, path):
    def habit(connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked = b""
        while not asked.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte:
                return
            asked += byte
        what = asked.decode().strip()
        if what == "reset-me":
            reset(connection)
        elif what == "watch":
            connection.sendall(b"ok\n")
            say(path, how_it_ends(connection))
        elif what == "urgent":
            say(path, exactly(connection, 5).decode())
            connection.sendall(b"12")
            connection.send(b"!", socket.MSG_OOB)
            connection.sendall(b"34")
            connection.close()
        elif what == "pairs":
            while connection.recv(1) and connection.recv(1):
                connection.sendall(b".")

    for connection in listening(port):
        threading.Thread(target=habit, args=[connection], daemon=True).start()


def at_once_server(port, path):
    def both(connection):
        thread = threading.Thread(target=connection.sendall, args=[b"s" * SIZE])
        thread.start()
        exactly(connection, SIZE)
        thread.join()
        connection.close()

    for connection in listening(port):
        threading.Thread(target=both, args=[connection], daemon=True).start()


def smtp_server(port, path):
    def speak(connection):
        file = connection.makefile("rwb")

        def answer(text):
            file.write(text.encode() + b"\r\n")
            file.flush()

        answer("220 mail.example ESMTP")
        while line := file.readline():
            command = line.split(b" ")[0].strip().upper()
            if command == b"DATA":
                answer("354 go on")
                body = b""
                while (more := file.readline()) != b".\r\n":
                    body += more
                say(path, body.decode().strip().splitlines()[-1])
                answer("250 taken")
            elif command == b"QUIT":
                answer("221 bye")
                break
            else:
                answer("250 ok")
        file.close()
        connection.close()

    for connection in listening(port):
        threading.Thread(target=speak, args=[connection], daemon=True).start()


def client(what, host, port):
    if what == "smtp-send":
        with smtplib.SMTP(host, int(port), timeout=10) as smtp:
            smtp.sendmail("a@mail.example", ["b@mail.example"], "Subject: x\r\n\r\nthe last line")
        return "sent"
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if what == "at-once":
        thread = threading.Thread(target=connection.sendall, args=[b"c" * SIZE])
        thread.start()
        assert exactly(connection, SIZE) == b"s" * SIZE
        thread.join()
        return "both"
    if what == "reset-me":
        connection.sendall(b"reset-me\n")
        return how_it_ends(connection)
    if what in ("reset-it", "stay"):
        connection.sendall(b"watch\n")
        exactly(connection, 3)
        if what == "reset-it":
            reset(connection)
            return "did"
        print("talking", flush=True)
        connection.settimeout(None)
        return how_it_ends(connection)
    if what == "urgent":
        connection.sendall(b"urgent\nab")
        connection.send(b"?", socket.MSG_OOB)
        connection.sendall(b"cd")
        return exactly(connection, 5).decode()
    if what == "pairs":
        connection.sendall(b"pairs\n")
        took = []
        for _ in range(60):
            started = time.monotonic()
            connection.send(b"a")
            connection.send(b"b")
            exactly(connection, 1)
            took.append(time.monotonic() - started)
        return f"{statistics.median(took) * 1000:.3f}"
    raise SystemExit(f"unknown: {what}")


SERVERS = {"serve": serve, "smtp": smtp_server, "at-once-server": at_once_server}

if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    if mode in SERVERS:
        SERVERS[mode](*rest)
    else:
        print(client(mode, *rest), flush=True)
        os._exit(0)
