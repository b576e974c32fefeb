#!/usr/bin/env bash
# redis-server takes the end of a client's input as the end of the client: it closes the connection
# at once, and what it has not yet written of an answer is lost, without an error for the reader.
# Small answers hide it, because they are in the kernel's buffer by then: `printf 'PING\r\n'` into
# `nc -N` gets its PONG. A large one ends in its middle, though its client reads on. So a program
# that sends commands through a pipe must keep its end open until the last answer has come.
#
# Seen with Redis 7.0.15 (Debian 12). Needs redis-server and python3.
set -euo pipefail

redis-server --version
python3 - <<'PYTHON'
import os, socket, subprocess, tempfile, time

SIZE = 32 << 20

def answer(path, half_close):
    """Returns how many bytes a client receives of the answer to its GET."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(path)
        client.sendall(b"GET key\r\n")
        if half_close:
            client.shutdown(socket.SHUT_WR)
        received = 0
        while received < whole and (data := client.recv(1 << 20)):
            received += len(data)
        return received

with tempfile.TemporaryDirectory() as dir:
    path = dir + "/redis"
    redis = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", dir],
        stdout=subprocess.DEVNULL)
    try:
        while not os.path.exists(path):
            time.sleep(0.01)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b"*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$%d\r\n" % SIZE)
            client.sendall(b"x" * SIZE + b"\r\n")
            assert client.recv(100) == b"+OK\r\n"
        whole = SIZE + len(b"$%d\r\n\r\n" % SIZE)
        for half_close in False, True:
            received = answer(path, half_close)
            after = "and half-closes" if half_close else "and stays open"
            print(f"a client that asks {after} receives {received} of {whole} bytes")
            assert (received < whole) == half_close
    finally:
        redis.kill()
        redis.wait()
PYTHON
