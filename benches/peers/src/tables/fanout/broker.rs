//! The brokers, and the little of their protocols that a publisher and a subscriber need.

use std::fs;
use std::path::Path;

use anyhow::Result;
use tokio::net::TcpStream;

use crate::load::{self, ask};
use crate::server::{Running, Server, free_port};

/// The byte that each message contains exactly once, and that nothing else from a broker contains.
pub(super) const MARK: u8 = b'~';

/// The most bytes that a broker holds for a subscriber that does not read. mosquitto has a limit of
/// 256 messages instead.
pub(super) const MOST_UNREAD: usize = 256 * 1024;

/// As many connections as the largest form has, and some more.
const MOST_CONNECTIONS: &str = "20000";

pub(super) struct Broker {
    pub(super) server: Server,
    pub(super) protocol: Protocol,
}

/// Returns the brokers that are installed, redis first, and a note about the others.
pub(super) fn installed(dir: &Path) -> Result<(Vec<Broker>, String)> {
    let mut brokers = Vec::new();
    let mut missing = String::new();
    let mut add = |name: &str, protocol, args: &dyn Fn(u16, Server) -> Result<Server>| {
        let port = free_port()?;
        match Server::installed(name, port)? {
            Some(server) => brokers.push(Broker {
                server: args(port, server)?,
                protocol,
            }),
            None => missing += &format!(" {name} is not installed."),
        }
        anyhow::Ok(())
    };
    add("redis-server", Protocol::Redis, &|port, server| {
        let unread = format!("pubsub {MOST_UNREAD} 0 0");
        let args = [
            ["--bind", "127.0.0.1"],
            ["--protected-mode", "no"],
            ["--port", &port.to_string()],
            ["--maxclients", MOST_CONNECTIONS],
            ["--save", ""],
            ["--appendonly", "no"],
            ["--client-output-buffer-limit", &unread],
        ];
        Ok(args.as_flattened().iter().fold(server, Server::arg))
    })?;
    add("nats-server", Protocol::Nats, &|port, server| {
        let config = dir.join("nats.conf");
        let text = format!(
            "listen: \"127.0.0.1:{port}\"\nlog_file: \"/dev/null\"\nmax_payload: 65536\n\
             max_pending: {MOST_UNREAD}\n"
        );
        fs::write(&config, text)?;
        Ok(server.arg("-c").arg(config))
    })?;
    add("mosquitto", Protocol::Mqtt, &|port, server| {
        let config = dir.join("mosquitto.conf");
        let text = format!(
            "listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n\
             max_queued_messages 256\nlog_type none\n"
        );
        fs::write(&config, text)?;
        Ok(server.arg("-c").arg(config))
    })?;
    let redis = Server::example("redis")?
        .arg("--max-connections")
        .arg(MOST_CONNECTIONS)
        .arg("--max-unread")
        .arg(MOST_UNREAD.to_string())
        .named("**tower-tcp**");
    let second = brokers.len().min(1);
    brokers.insert(
        second,
        Broker {
            server: redis,
            protocol: Protocol::Redis,
        },
    );
    Ok((brokers, missing))
}

#[derive(Clone, Copy)]
pub(super) enum Protocol {
    Redis,
    Nats,
    Mqtt,
}

impl Protocol {
    /// Connects as a client that has subscribed to nothing.
    pub(super) async fn connect(self, server: &Running, number: u32) -> Result<TcpStream> {
        let mut stream = load::connect(server, number).await?;
        stream.set_nodelay(true)?;
        let (hello, answer): (&[u8], &[u8]) = match self {
            Self::Redis => (b"PING\r\n", b"+PONG\r\n"),
            Self::Nats => (b"CONNECT {\"verbose\":false}\r\nPING\r\n", b"PONG\r\n"),
            // MQTT 3.1.1, a clean session, no keep-alive, no name.
            Self::Mqtt => (
                b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00",
                b"\x20\x02\x00\x00",
            ),
        };
        ask(&mut stream, hello, answer).await?;
        Ok(stream)
    }

    /// Connects as a subscriber.
    pub(super) async fn subscribe(self, server: &Running, number: u32) -> Result<TcpStream> {
        let mut stream = self.connect(server, number).await?;
        let (subscribe, answer): (&[u8], &[u8]) = match self {
            Self::Redis => (
                b"*2\r\n$9\r\nSUBSCRIBE\r\n$2\r\nch\r\n",
                b"*3\r\n$9\r\nsubscribe\r\n$2\r\nch\r\n:1\r\n",
            ),
            Self::Nats => (b"SUB ch 1\r\nPING\r\n", b"PONG\r\n"),
            Self::Mqtt => (b"\x82\x07\x00\x01\x00\x02ch\x00", b"\x90\x03\x00\x01\x00"),
        };
        ask(&mut stream, subscribe, answer).await?;
        Ok(stream)
    }

    /// Returns the request that publishes a message of this many bytes.
    pub(super) fn publish(self, bytes: usize) -> Vec<u8> {
        let mut message = vec![b'x'; bytes];
        message[0] = MARK;
        let (head, tail): (_, &[u8]) = match self {
            Self::Redis => (
                format!("*3\r\n$7\r\nPUBLISH\r\n$2\r\nch\r\n${bytes}\r\n").into_bytes(),
                b"\r\n",
            ),
            Self::Nats => (format!("PUB ch {bytes}\r\n").into_bytes(), b"\r\n"),
            Self::Mqtt => {
                let mut head = vec![0x30];
                let mut rest = b"\0\x02ch".len() + bytes;
                while rest >= 0x80 {
                    head.push((rest % 0x80) as u8 | 0x80);
                    rest /= 0x80;
                }
                head.push(rest as u8);
                head.extend_from_slice(b"\0\x02ch");
                (head, b"")
            }
        };
        [&head[..], &message, tail].concat()
    }
}
