#!/usr/bin/env bash
# `curl --limit-rate 20K` does not read 20 kB a second from its socket. It reads a burst as fast as it
# comes, and then nothing, until the average is back at the limit. A server on the same machine sees
# a peer that takes megabytes at once and after that no byte for half a minute or more, while its
# receive queue holds bytes. For a server with a write timeout that peer hangs, so this is no test of
# a peer that reads slowly but steadily.
#
# Seen with curl 7.88.1 (Debian 12), Linux, over loopback. Needs curl and python3; takes 40 s.
set -euo pipefail

curl --version | head -n 1
python3 - <<'PYTHON'
import socket, subprocess, threading, time

def queued(port):
    """Returns the bytes that the client's system has received and the client has not read."""
    for line in open("/proc/net/tcp").readlines()[1:]:
        _, local, _, state, queues = line.split()[:5]
        if int(local.split(":")[1], 16) == port and state == "01":
            return int(queues.split(":")[1], 16)

def serve(listener, client):
    conn, peer = listener.accept()
    client.append(peer[1])
    conn.recv(65536)
    try:
        conn.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 12000000\r\n\r\n" + bytes(12_000_000))
    except OSError:
        pass

listener = socket.create_server(("127.0.0.1", 0))
client = []
threading.Thread(target=serve, args=(listener, client), daemon=True).start()
url = "http://127.0.0.1:%d/" % listener.getsockname()[1]
curl = subprocess.Popen(["curl", "-s", "--limit-rate", "20K", "-o", "/dev/null", url])

longest, still, before = 0, 0, None
for _ in range(40):
    time.sleep(1)
    now = queued(client[0])
    still = still + 1 if now and now == before else 0
    longest, before = max(longest, still), now
curl.kill()
print("with bytes in its receive queue, curl read none of them for %d s" % longest)
assert longest >= 15, "it reads steadily now"
PYTHON
