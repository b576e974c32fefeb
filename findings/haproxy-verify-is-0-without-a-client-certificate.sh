#!/usr/bin/env bash
# The specification of the PROXY protocol says that the field `verify` of the TLV for TLS is zero if
# the client presented a certificate and it was verified, and else non-zero. HAProxy sends zero for a
# client without a certificate, too. So a receiver that takes zero alone for a verified client admits
# everybody. It must also look at the flags of the same TLV, which say whether there was one.
#
# Seen with HAProxy 2.6.12 (Debian 12). Needs haproxy, openssl and python3.
set -euo pipefail
export PATH="$PATH:/usr/sbin"

haproxy -v | head -n 1
dir=$(mktemp -d)
trap 'rm -r "$dir"' EXIT
openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=a.test -days 1 \
    -keyout "$dir/key" -out "$dir/cert" 2>/dev/null
cat "$dir/cert" "$dir/key" >"$dir/pem"

python3 - "$dir" <<'PYTHON'
import socket, ssl, subprocess, sys, time

dir = sys.argv[1]

def ssl_tlv(*certificate):
    """Returns flags and `verify` of a client, with or without a certificate."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as free:
        server.settimeout(10)
        free.bind(("127.0.0.1", 0))
        front = free.getsockname()
        free.close()
        with open(dir + "/haproxy.cfg", "w") as file:
            file.write(f"""
defaults
  mode tcp
  timeout connect 5s
  timeout client 5s
  timeout server 5s
listen tls
  bind 127.0.0.1:{front[1]} ssl crt {dir}/pem ca-file {dir}/cert verify optional
  server s 127.0.0.1:{server.getsockname()[1]} send-proxy-v2-ssl
""")
        haproxy = subprocess.Popen(["haproxy", "-db", "-q", "-f", dir + "/haproxy.cfg"])
        try:
            context = ssl.create_default_context(cafile=dir + "/cert")
            context.check_hostname = False
            if certificate:
                context.load_cert_chain(*certificate)
            for _ in range(500):
                try:
                    plain = socket.create_connection(front)
                    break
                except OSError:
                    time.sleep(0.01)
            client = context.wrap_socket(plain)
            client.sendall(b"hello\n")
            connection, _ = server.accept()
            connection.settimeout(10)
            data = b""
            while not data.endswith(b"hello\n"):
                data += connection.recv(1000)
            # Behind 16 bytes, two addresses and ports of IPv4: type 0x20, length, flags, verify.
            tlv = data[16 + 12:]
            assert tlv[0] == 0x20
            return tlv[3], int.from_bytes(tlv[4:8], "big")
        finally:
            haproxy.kill()
            haproxy.wait()

none = ssl_tlv()
print("without a certificate: flags %#x, verify %d" % none)
some = ssl_tlv(dir + "/cert", dir + "/key")
print("with a certificate that verifies: flags %#x, verify %d" % some)
assert some == (0x7, 0)
assert none == (0x1, 0), "it follows the specification now"
PYTHON
