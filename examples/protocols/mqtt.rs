//! An MQTT 3.1.1 broker, for clients with clean sessions.
//!
//! ```sh
//! cd examples/protocols
//! cargo run --example mqtt &
//! mosquitto_sub -t 'house/+/heat' -v &
//! mosquitto_pub -t house/kitchen/heat -m 21 -q 1
//! ```
//!
//! Messages are delivered at most once, as each SUBACK states. A PUBLISH with `QoS 1` is
//! acknowledged, and one with `QoS 2` ends its connection. A client of another version of MQTT,
//! such as 5, is told so. A slow subscriber misses messages, and is closed if it takes nothing for
//! 30 s. Retained messages, wildcards, last wills and keepalives are supported. A session ends with
//! its connection, even if its client requests a longer one: `session present` is never set.
//!
//! Each topic filter has its own group of subscribers, so a message that matches several filters of
//! a client is sent to this client once for each filter, as the standard allows.

use std::collections::HashSet;
use std::convert::Infallible;
use std::future::ready;
use std::io;
use std::num::NonZero;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use clap::Parser;
use lru::LruCache;
use mqtt_proto::v3::{Connack, Connect, ConnectReturnCode, Packet, Publish, Suback};
use mqtt_proto::v3::{Subscribe, SubscribeReturnCode};
use mqtt_proto::{Error, Protocol, QosPid, TopicName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{Decoder, Encoder};
use tower::service_fn;
use tower_tcp::pipeline::{Limits, Session, SessionService};
use tower_tcp::registry::{Groups, Registry, SlowPeer};
use tower_tcp::{BoxError, ConnectionEnded, ConnectionService, EndReason};
use tower_tcp::{Peer, Pipeline, Reply, Server, signal};

/// The maximum size of a packet in bytes. It also bounds the size of each retained message.
const MAX_PACKET: usize = 64 * 1024;
/// The maximum number of retained messages. One more evicts the message that was retained least
/// recently.
const MAX_RETAINED: NonZero<usize> = NonZero::new(1024).expect("it is not zero");
/// The maximum number of filters of a client.
const MAX_FILTERS: usize = 64;
/// The maximum length of a filter or of a client's name, in bytes.
const MAX_NAME: usize = 256;
/// The time for which a client without a keepalive may be silent. Without a limit, the connections
/// of a machine that has vanished would stay open forever.
const IDLE: Duration = Duration::from_secs(60 * 60);
const SLOW: SlowPeer = SlowPeer::CloseAfter(Duration::from_secs(30));

/// A message broker for MQTT 3.1.1.
#[derive(Parser)]
struct Args {
    /// Address to listen on: `host:port` or `unix:/path`; can be repeated.
    #[arg(long, default_value = "127.0.0.1:1883")]
    listen: Vec<String>,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let server = Server::builder()
        .listen_all(Args::parse().listen)
        .bind()
        .await?;
    signal::install(&server.handle())?;
    for address in server.handle().local_addrs() {
        println!("listening on {address}");
    }
    println!("{}", server.serve(stack()).await?);
    Ok(())
}

/// Serves one broker to all connections.
pub(crate) fn stack<Io>() -> impl ConnectionService<Io> + Clone
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let broker = Arc::new(Broker {
        filters: Groups::new(),
        clients: Registry::new(),
        retained: Mutex::new(LruCache::new(MAX_RETAINED)),
    });
    let make = service_fn(move |peer| {
        let client = Client {
            peer,
            broker: Arc::clone(&broker),
            connected: false,
            will: None,
            filters: HashSet::new(),
        };
        ready(Ok::<_, Infallible>(SessionService::new(client)))
    });
    Pipeline::new(|| Packets)
        .make_service(make)
        .limits(Limits::default().max_frame(MAX_PACKET))
}

/// The codec. `mqtt-proto` decodes each packet once it has arrived completely.
pub(crate) struct Packets;

impl Decoder for Packets {
    type Item = Packet;
    type Error = io::Error;

    fn decode(&mut self, src: &mut BytesMut) -> io::Result<Option<Packet>> {
        // The first byte is followed by up to four bytes with the length, seven bits in each.
        let mut len = 0;
        for (at, &byte) in src.iter().skip(1).take(4).enumerate() {
            len |= usize::from(byte & 0x7f) << (7 * at);
            if byte < 0x80 {
                let whole = at + 2 + len;
                if src.len() < whole {
                    return Ok(None);
                }
                let packet = match Packet::decode(&src.split_to(whole)) {
                    Err(Error::UnexpectedProtocol(_)) => Some(another_version()),
                    Err(Error::InvalidProtocol(name, _)) if &*name == "MQTT" => {
                        Some(another_version())
                    }
                    decoded => decoded.map_err(io::Error::other)?,
                };
                return packet.map(Some).ok_or(io::ErrorKind::InvalidData.into());
            }
        }
        if src.len() < 5 {
            Ok(None)
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }
}

/// Returns a CONNECT that stands for one of another version of MQTT, so that it can be answered.
fn another_version() -> Packet {
    Packet::Connect(Connect {
        protocol: Protocol::V500,
        ..Connect::new("".into(), 0)
    })
}

impl Encoder<Packet> for Packets {
    type Error = io::Error;

    fn encode(&mut self, packet: Packet, dst: &mut BytesMut) -> io::Result<()> {
        dst.extend_from_slice(packet.encode().map_err(io::Error::other)?.as_ref());
        Ok(())
    }
}

struct Broker {
    /// The subscribers of each filter.
    filters: Groups<Arc<str>, Packet>,
    /// The clients by their names. A name belongs to the newest client that has connected with it.
    clients: Registry<Arc<str>, Packet>,
    retained: Mutex<LruCache<TopicName, Publish>>,
}

impl Broker {
    fn retained(&self) -> MutexGuard<'_, LruCache<TopicName, Publish>> {
        self.retained.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn publish(&self, message: Publish) {
        let Publish {
            retain,
            topic_name: topic,
            payload,
            ..
        } = message;
        let mut message = Publish::new(QosPid::Level0, topic.clone(), payload);
        if retain && message.payload.is_empty() {
            self.retained().pop(&topic);
        } else if retain {
            let retained = Publish {
                retain,
                ..message.clone()
            };
            self.retained().put(topic.clone(), retained);
        }
        message.retain = false;
        let matching = self.filters.keys().filter(|filter| matches(filter, &topic));
        for filter in matching.collect::<Vec<_>>() {
            let frame = Packet::Publish(message.clone());
            self.filters.broadcast(&filter, frame, |_| true, SLOW).await;
        }
    }
}

/// Returns whether a filter matches a topic. A wildcard at the start of a filter does not match a
/// topic that begins with `$`, such as `$SYS`.
pub(crate) fn matches(filter: &str, topic: &str) -> bool {
    let hidden = topic.starts_with('$') && filter.starts_with(['#', '+']);
    let (mut filter, mut topic) = (filter.split('/'), topic.split('/'));
    loop {
        match (filter.next(), topic.next()) {
            (Some("#"), _) | (None, None) => return !hidden,
            (Some(level), Some(name)) if level == "+" || level == name => {}
            _ => return false,
        }
    }
}

struct Client {
    peer: Peer<Packet>,
    broker: Arc<Broker>,
    connected: bool,
    will: Option<Publish>,
    filters: HashSet<Arc<str>>,
}

impl Session<Packet> for Client {
    type Reply = Reply<Packet>;
    type Error = BoxError;

    async fn call(&mut self, packet: Packet) -> Result<Reply<Packet>, BoxError> {
        Ok(match packet {
            Packet::Connect(connect) if !self.connected => self.connect(connect),
            _ if !self.connected => return Err(broken("a packet before CONNECT")),
            Packet::Publish(message) if message.topic_name.is_empty() => {
                return Err(broken("an empty topic"));
            }
            Packet::Publish(message) => {
                let ack = match message.qos_pid {
                    QosPid::Level0 => None,
                    QosPid::Level1(pid) => Some(Packet::Puback(pid)),
                    QosPid::Level2(_) => return Err(broken("QoS 2 is not supported")),
                };
                self.broker.publish(message).await;
                ack.into()
            }
            Packet::Subscribe(subscribe) => self.subscribe(subscribe).await?,
            Packet::Unsubscribe(unsubscribe) => {
                for filter in &unsubscribe.topics {
                    self.broker.filters.leave(&**filter, &self.peer);
                    self.filters.remove(&**filter);
                }
                Packet::Unsuback(unsubscribe.pid).into()
            }
            Packet::Pingreq => Packet::Pingresp.into(),
            Packet::Disconnect => {
                self.will = None;
                Reply::none().close()
            }
            _ => return Err(broken("a packet that clients must not send")),
        })
    }
}

/// Returns an error that ends the connection because of its client. The error is not logged as a
/// fault of the service.
fn broken(rule: &'static str) -> BoxError {
    ConnectionEnded::new(EndReason::CodecError, rule).into()
}

impl Client {
    fn connect(&mut self, connect: Connect) -> Reply<Packet> {
        let nameless = connect.client_id.is_empty();
        let code = if connect.protocol == Protocol::V500 {
            ConnectReturnCode::UnacceptableProtocolVersion
        } else if nameless && !connect.clean_session || connect.client_id.len() > MAX_NAME {
            ConnectReturnCode::IdentifierRejected
        } else {
            ConnectReturnCode::Accepted
        };
        let reply = Reply::from(Packet::Connack(Connack::new(false, code)));
        if code != ConnectReturnCode::Accepted {
            return reply.close();
        }
        self.connected = true;
        self.will = connect.last_will.map(|will| Publish {
            retain: will.retain,
            ..Publish::new(QosPid::Level0, will.topic_name, will.message)
        });
        let keepalive = Duration::from_secs(connect.keep_alive.into()).mul_f32(1.5);
        self.peer
            .set_idle(if keepalive.is_zero() { IDLE } else { keepalive });
        if !nameless {
            let earlier = self.broker.clients.replace(connect.client_id, &self.peer);
            earlier.inspect(Peer::close);
        }
        reply
    }

    async fn subscribe(&mut self, subscribe: Subscribe) -> Result<Reply<Packet>, BoxError> {
        let (mut codes, mut joined) = (Vec::new(), Vec::new());
        for (filter, _) in subscribe.topics {
            let filter: Arc<str> = (*filter).into();
            let full = self.filters.len() == MAX_FILTERS && !self.filters.contains(&filter);
            // `mqtt-proto` has no correct return code for a refused filter.
            if full || joined.len() == MAX_FILTERS || filter.len() > MAX_NAME {
                return Err(broken("too many filters, or one that is too long"));
            }
            self.broker.filters.join(filter.clone(), &self.peer).await?;
            self.filters.insert(filter.clone());
            joined.push(filter);
            codes.push(SubscribeReturnCode::MaxLevel0);
        }
        let mut packets = vec![Packet::Suback(Suback {
            pid: subscribe.pid,
            topics: codes,
        })];
        for (topic, message) in self.broker.retained().iter() {
            if joined.iter().any(|filter| matches(filter, topic)) {
                packets.push(Packet::Publish(message.clone()));
            }
        }
        Ok(packets.into())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(will) = self.will.take() {
            let broker = Arc::clone(&self.broker);
            tokio::spawn(async move { broker.publish(will).await });
        }
    }
}
