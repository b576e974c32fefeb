#!/usr/bin/env bash
# An agent check may answer with a percentage, by which a server tells HAProxy its load. HAProxy
# takes that share of the configured weight and rounds down to a whole number. The default weight
# is 1, so any answer below 100% makes it 0, which is the same as `drain`: a server that says "99%"
# gets no new connections at all. The check is passed, and the server is `UP`. With `weight 100` the
# percentage means what it says.
#
# Seen with HAProxy 2.6.12 (Debian 12). Needs haproxy and python3.
set -euo pipefail
export PATH="$PATH:/usr/sbin"

haproxy -v | head -n 1
python3 - <<'PYTHON'
import csv, io, os, socket, subprocess, tempfile, threading, time

def served(server, answer):
    """Answers each connection, and closes it."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.sendall(answer)

def weight(options):
    """Returns state and weight of a server whose agent says 99%, and what its client receives."""
    with (tempfile.TemporaryDirectory() as dir,
          socket.create_server(("127.0.0.1", 0)) as lines,
          socket.create_server(("127.0.0.1", 0)) as agent):
        threading.Thread(target=served, args=(lines, b"hello\n"), daemon=True).start()
        threading.Thread(target=served, args=(agent, b"up 99%\n"), daemon=True).start()
        admin, config = dir + "/admin", dir + "/haproxy.cfg"
        with open(config, "w") as file:
            file.write(f"""
global
  stats socket {admin}
defaults
  mode tcp
  timeout connect 5s
  timeout client 5s
  timeout server 5s
  timeout check 5s
listen lines
  bind unix@{dir}/front
  server s 127.0.0.1:{lines.getsockname()[1]} check agent-check agent-inter 50ms \\
    agent-port {agent.getsockname()[1]} {options}
""".replace("\\\n", ""))
        haproxy = subprocess.Popen(["haproxy", "-db", "-q", "-f", config])
        try:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                time.sleep(0.05)
                if not os.path.exists(admin):
                    continue
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(admin)
                    client.sendall(b"show stat\n")
                    table = b""
                    while data := client.recv(65536):
                        table += data
                rows = csv.DictReader(io.StringIO(table.decode().removeprefix("# ")))
                row = next(row for row in rows if row["svname"] == "s")
                if row["agent_status"] == "L7OK" and row["check_status"] == "L4OK":
                    with socket.socket(socket.AF_UNIX) as client:
                        client.settimeout(10)
                        client.connect(dir + "/front")
                        return row["status"], int(row["weight"]), client.recv(100)
            raise SystemExit("no check was passed in ten seconds")
        finally:
            haproxy.kill()
            haproxy.wait()

for options, *expected in ("", "UP", 0, b""), ("weight 100", "UP", 99, b"hello\n"):
    status, share, line = weight(options)
    of = options or "the default weight"
    print(f"99% of {of}: {status}, weight {share}, a client got {line}")
    assert [status, share, line] == expected
PYTHON
