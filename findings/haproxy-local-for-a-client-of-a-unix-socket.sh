#!/usr/bin/env bash
# HAProxy sends `LOCAL` in a PROXY header of version 2 not only with its health checks, but also for
# each client of a Unix socket, with the TLVs that it is configured to send. So a receiver must serve
# connections with `LOCAL` as any other, and must not leave them out of a log or close them as checks.
# Version 1 says `UNKNOWN` for the same client.
#
# Seen with HAProxy 2.6.12 (Debian 12). Needs haproxy and python3.
set -euo pipefail
export PATH="$PATH:/usr/sbin"

haproxy -v | head -n 1
python3 - <<'PYTHON'
import os, socket, subprocess, tempfile, time

def received(options):
    """Returns what a server behind HAProxy receives from a client of HAProxy's Unix socket."""
    with tempfile.TemporaryDirectory() as dir, socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        front, config = dir + "/front", dir + "/haproxy.cfg"
        with open(config, "w") as file:
            file.write(f"""
defaults
  mode tcp
  timeout connect 5s
  timeout client 5s
  timeout server 5s
listen lines
  bind unix@{front}
  unique-id-format an-id
  server s 127.0.0.1:{server.getsockname()[1]} {options}
""")
        haproxy = subprocess.Popen(["haproxy", "-db", "-q", "-f", config])
        try:
            while not os.path.exists(front):
                time.sleep(0.01)
            client = socket.socket(socket.AF_UNIX)
            client.connect(front)
            client.sendall(b"hello\n")
            connection, _ = server.accept()
            connection.settimeout(10)
            data = b""
            while not data.endswith(b"hello\n"):
                data += connection.recv(1000)
            return data
        finally:
            haproxy.kill()
            haproxy.wait()

line = received("send-proxy")
print("version 1:", line)
assert line == b"PROXY UNKNOWN\r\nhello\n"

header = received("send-proxy-v2 proxy-v2-options unique-id")
print("version 2:", header)
assert header[12] == 0x20, "the command is no longer LOCAL"
assert b"an-id" in header
PYTHON
