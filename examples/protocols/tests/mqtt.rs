//! The `mqtt` example brokers messages between clients, and applies its limits.

use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use mqtt_proto::v3::{Connect, LastWill, Packet, Publish, Subscribe, SubscribeReturnCode};
use mqtt_proto::{Pid, QoS, QosPid, TopicFilter, TopicName};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream};
use tokio::process::Command;
use tokio::time::Instant;
use tokio_util::codec::Framed;
use tower_tcp::testkit::{Served, faults, serve};
use tower_tcp::{EndReason, Initiator};

use mqtt::{Packets, matches, stack};
use process::{Example, installed, python, python_has, soon};
use support::{Clients, Ends};

#[path = "../mqtt.rs"]
#[expect(dead_code, reason = "its `main` runs in a process of its own")]
mod mqtt;
#[path = "../../../tests/support/process.rs"]
mod process;
#[path = "../../../tests/support/mod.rs"]
mod support;

type Client = Framed<DuplexStream, Packets>;

fn message(qos: QosPid, topic: &str, payload: &str, retain: bool) -> Packet {
    let topic = TopicName::try_from(topic).expect("it is valid");
    let payload = Bytes::copy_from_slice(payload.as_bytes());
    Packet::Publish(Publish {
        retain,
        ..Publish::new(qos, topic, payload)
    })
}

fn subscribe(filters: &[&str]) -> Packet {
    let filters = filters.iter().map(|filter| {
        let filter = TopicFilter::try_from(*filter).expect("it is valid");
        (filter, QoS::Level1)
    });
    Packet::Subscribe(Subscribe::new(pid(), filters.collect()))
}

fn pid() -> Pid {
    Pid::try_from(7).expect("it is valid")
}

async fn connect(served: &Served, connect: Connect) -> Client {
    let mut client = Framed::new(served.stream().await, Packets);
    let answer = ask(&mut client, Packet::Connect(connect)).await;
    assert!(matches!(answer, Packet::Connack(_)), "{answer:?}");
    client
}

async fn ask(client: &mut Client, packet: Packet) -> Packet {
    client.send(packet).await.expect("it is valid");
    next(client).await
}

async fn next(client: &mut Client) -> Packet {
    client
        .next()
        .await
        .expect("it is open")
        .expect("it is valid")
}

#[test]
fn filters_match_as_the_standard_says() {
    for (filter, topic, expected) in [
        ("a/b", "a/b", true),
        ("a/b", "a/b/c", false),
        ("a/+", "a/b", true),
        ("a/+", "a/", true),
        ("a/+", "a", false),
        ("+/+", "/a", true),
        ("+", "/a", false),
        ("a/#", "a", true),
        ("a/#", "a/b/c", true),
        ("#", "a/b", true),
        ("#", "$SYS/a", false),
        ("+/a", "$SYS/a", false),
        ("$SYS/#", "$SYS/a", true),
    ] {
        assert_eq!(matches(filter, topic), expected, "{filter} and {topic}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_reaches_the_subscribers_of_its_filters_and_is_acknowledged() {
    let served = serve(stack());
    let mut reader = connect(&served, Connect::new("".into(), 0)).await;
    let mut writer = connect(&served, Connect::new("".into(), 0)).await;
    let suback = ask(&mut reader, subscribe(&["a/+", "b"])).await;
    let Packet::Suback(suback) = suback else {
        panic!("{suback:?}")
    };
    assert_eq!(suback.topics, [SubscribeReturnCode::MaxLevel0; 2]);

    let sent = message(QosPid::Level1(pid()), "a/x", "1", false);
    assert_eq!(ask(&mut writer, sent).await, Packet::Puback(pid()));
    let sent = message(QosPid::Level0, "c", "2", false);
    writer.send(sent).await.unwrap();
    let sent = message(QosPid::Level0, "b", "3", false);
    writer.send(sent.clone()).await.unwrap();

    let first = message(QosPid::Level0, "a/x", "1", false);
    assert_eq!(next(&mut reader).await, first);
    assert_eq!(next(&mut reader).await, sent);
}

#[tokio::test(start_paused = true)]
async fn a_retained_message_is_sent_to_later_subscribers_until_it_is_cleared() {
    let served = serve(stack());
    let mut writer = connect(&served, Connect::new("".into(), 0)).await;
    let kept = message(QosPid::Level0, "a", "kept", true);
    writer.send(kept.clone()).await.unwrap();
    assert_eq!(ask(&mut writer, Packet::Pingreq).await, Packet::Pingresp);

    let mut reader = connect(&served, Connect::new("".into(), 0)).await;
    // Once, although both filters match.
    ask(&mut reader, subscribe(&["a", "#"])).await;
    assert_eq!(next(&mut reader).await, kept);
    assert_eq!(ask(&mut reader, Packet::Pingreq).await, Packet::Pingresp);

    let cleared = message(QosPid::Level0, "a", "", true);
    writer.send(cleared).await.unwrap();
    assert_eq!(ask(&mut writer, Packet::Pingreq).await, Packet::Pingresp);
    let mut later = connect(&served, Connect::new("".into(), 0)).await;
    ask(&mut later, subscribe(&["a"])).await;
    assert_eq!(ask(&mut later, Packet::Pingreq).await, Packet::Pingresp);
}

#[tokio::test(start_paused = true)]
async fn a_will_is_published_unless_its_client_says_goodbye() {
    let served = serve(stack());
    let mut reader = connect(&served, Connect::new("".into(), 0)).await;
    ask(&mut reader, subscribe(&["will"])).await;
    let with_will = |payload: &'static str| Connect {
        last_will: Some(LastWill {
            qos: QoS::Level0,
            retain: false,
            topic_name: TopicName::try_from("will").unwrap(),
            message: payload.into(),
        }),
        ..Connect::new("name".into(), 10)
    };

    let mut polite = connect(&served, with_will("polite")).await;
    polite.send(Packet::Disconnect).await.unwrap();
    assert!(polite.next().await.is_none());
    drop(connect(&served, with_will("lost")).await);
    let will = |payload| message(QosPid::Level0, "will", payload, false);
    assert_eq!(next(&mut reader).await, will("lost"));

    // A client of the same name replaces the earlier one, and then is silent for longer than its
    // keepalive.
    let mut earlier = connect(&served, with_will("replaced")).await;
    let _silent = connect(&served, with_will("silent")).await;
    let since = Instant::now();
    assert!(earlier.next().await.is_none());
    assert_eq!(next(&mut reader).await, will("replaced"));
    assert_eq!(next(&mut reader).await, will("silent"));
    let waited = since.elapsed();
    assert!(waited >= Duration::from_secs(15) && waited < Duration::from_secs(16));
}

#[tokio::test(start_paused = true)]
async fn a_client_of_another_version_is_told_so() {
    for level in [5, 6, 0x84] {
        let served = serve(stack());
        let mut client = served.stream().await;
        // A CONNECT of version 5 has a length of properties, here zero, in front of the name.
        let connect = [
            b"\x10\x0d\x00\x04MQTT",
            &[level][..],
            b"\x02\x00\x3c\x00\x00\x00",
        ];
        client.write_all(&connect.concat()).await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();

        assert_eq!(answer, b"\x20\x02\x00\x01", "{level}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_client_may_not_send_ends_its_connection() {
    for (packets, reason) in [
        // A PINGREQ before CONNECT.
        (&b"\xc0\x00"[..], EndReason::CodecError),
        (b"\x10\xff\xff\xff\xff", EndReason::CodecError),
        (b"\x10\x80\x80\x08", EndReason::FrameTooLarge),
        // A PUBLISH whose topic is longer than the packet.
        (b"\x30\x03\x00\x09a", EndReason::CodecError),
    ] {
        let served = serve(stack());
        let mut input = packets.to_vec();
        if reason == EndReason::FrameTooLarge {
            input.resize(128 * 1024, b'x');
        }
        let mut client = served.stream().await;
        client.write_all(&input).await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert!(answer.is_empty(), "{answer:?}");
        assert_eq!(served.reason().await, reason, "{packets:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn filters_over_the_limits_end_their_connection() {
    let served = serve(stack());
    let names: Vec<_> = (0..65).map(|number| number.to_string()).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let long = "x".repeat(257);

    let mut client = connect(&served, Connect::new("".into(), 0)).await;
    let answer = ask(&mut client, subscribe(&names[..64])).await;
    assert!(matches!(answer, Packet::Suback(_)), "{answer:?}");
    for filters in [&names[64..], &[&long]] {
        client.send(subscribe(filters)).await.unwrap();
        assert!(client.next().await.is_none());
        assert_eq!(served.reason().await, EndReason::CodecError);
        client = connect(&served, Connect::new("".into(), 0)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_supported_ends_the_connection_as_the_clients_fault() {
    for packet in [
        message(QosPid::Level2(pid()), "a", "1", false),
        message(QosPid::Level0, "", "1", false),
        Packet::Pingresp,
        Packet::Connect(Connect::new("".into(), 0)),
    ] {
        let served = serve(stack());
        let mut client = connect(&served, Connect::new("".into(), 0)).await;
        client.send(packet.clone()).await.unwrap();

        assert!(client.next().await.is_none(), "{packet:?}");
        let end = served.end().await;
        assert_eq!(end.reason().initiator(), Initiator::Peer, "{packet:?}");
        assert!(end.error().is_some(), "{packet:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_fault_of_a_connection_gives_a_wrong_answer() {
    let publish = message(QosPid::Level1(pid()), "a", "1", true);
    let connect = Packet::Connect(Connect::new("".into(), 60));
    let input = [connect, publish, Packet::Pingreq].map(|packet| packet.encode().unwrap());
    let input: Vec<_> = input
        .iter()
        .flat_map(|bytes| bytes.as_ref().to_vec())
        .collect();
    let output = b"\x20\x02\x00\x00\x40\x02\x00\x07\xd0\x00";

    let passed = faults::check(stack, input, output).await;
    passed.unwrap_or_else(|broken| panic!("{broken}"));
}

#[tokio::test]
async fn mosquittos_clients_publish_and_subscribe() {
    if !installed("mosquitto_sub") {
        return;
    }
    let server = Example::start("mqtt", &[]).await;
    let port = server.addr().port().to_string();
    let program = |name: &str, args: &[&str]| {
        let mut program = Command::new(name);
        program.args(["-h", "127.0.0.1", "-p", &port]).args(args);
        program.kill_on_drop(true);
        program
    };
    let publish = async |args: &[&str]| {
        let done = soon("mosquitto_pub", program("mosquitto_pub", args).status()).await;
        assert!(done.unwrap().success());
    };
    // The retained message shows when the reader has subscribed.
    publish(&["-t", "house/ready", "-m", "yes", "-r", "-q", "1"]).await;
    let mut reader = program("mosquitto_sub", &["-t", "house/#", "-v", "-q", "1"]);
    let mut reader = reader.stdout(Stdio::piped()).spawn().unwrap();
    let mut heard = BufReader::new(reader.stdout.take().unwrap()).lines();
    let mut line = async || soon("a message", heard.next_line()).await.unwrap().unwrap();
    assert_eq!(line().await, "house/ready yes");

    publish(&["-t", "house/kitchen/heat", "-m", "21", "-q", "1"]).await;
    assert_eq!(line().await, "house/kitchen/heat 21");
    publish(&["-t", "garden", "-m", "rain"]).await;
    publish(&["-t", "house/end", "-m", "", "-q", "1"]).await;
    assert_eq!(line().await, "house/end (null)");

    // A client that is killed sends no DISCONNECT, so its will is published.
    let will = ["-t", "house/ready", "--will-topic", "house/will"];
    let mut doomed = program("mosquitto_sub", &will);
    doomed
        .args(["--will-payload", "gone"])
        .stdout(Stdio::piped());
    let mut doomed = doomed.spawn().unwrap();
    let mut connected = BufReader::new(doomed.stdout.take().unwrap()).lines();
    let connected = soon("its first message", connected.next_line()).await;
    assert_eq!(connected.unwrap().unwrap(), "yes");
    doomed.kill().await.unwrap();
    assert_eq!(line().await, "house/will gone");
    reader.kill().await.unwrap();
}

#[tokio::test]
async fn pahos_clients_publish_and_subscribe() {
    if !python_has("paho.mqtt") {
        return;
    }
    let server = Example::start("mqtt", &[]).await;

    python(PAHO, &[&server.addr().port().to_string()]).await;
    assert!(server.stop().await.status.success());
}

const PAHO: &str = r#"
import queue, sys
from paho.mqtt.client import Client as Paho, MQTT_ERR_SUCCESS

class Client(Paho):
    def __init__(self, name="", will=None):
        super().__init__(client_id=name)
        self.heard = queue.Queue()
        self.on_message = lambda client, data, message: self.heard.put(
            (message.topic, message.payload, message.qos, message.retain))
        self.on_connect = lambda client, data, flags, code: self.heard.put(
            ("connected", flags["session present"], code))
        self.on_subscribe = lambda client, data, number, granted: self.heard.put(granted)
        self.on_unsubscribe = lambda client, data, number: self.heard.put("unsubscribed")
        self.on_disconnect = lambda client, data, code: self.heard.put(("closed", code))
        if will is not None:
            self.will_set(*will)
        self.connect("127.0.0.1", int(sys.argv[1]))
        self.loop_start()
        self.hears(("connected", 0, 0))

    def hears(self, expected):
        heard = self.heard.get(timeout=10)
        assert heard == expected, f"{heard} is not {expected}"

    def says(self, topic, payload, **options):
        sent = self.publish(topic, payload, **options)
        sent.wait_for_publish(timeout=10)
        assert sent.is_published()

    def closes(self):
        assert self.disconnect() == MQTT_ERR_SUCCESS
        self.hears(("closed", 0))
        self.loop_stop()

reader, writer = Client("reader"), Client()
# Whatever was asked for, messages are delivered at most once.
reader.subscribe([("house/+/heat", 0), ("garden/#", 1), ("both", 2)])
reader.hears((0, 0, 0))

writer.says("house/kitchen/heat", "21")
reader.hears(("house/kitchen/heat", b"21", 0, False))
writer.says("house/heat", "no filter matches it")
writer.says("garden", "rain", qos=1)
reader.hears(("garden", b"rain", 0, False))
long = bytes(60_000)
writer.says("both", long, qos=1)
reader.hears(("both", long, 0, False))

# After it has unsubscribed from a filter, the reader still gets the messages of the others.
reader.unsubscribe("both")
reader.hears("unsubscribed")
writer.says("both", "not heard", qos=1)
writer.says("garden/pond", "frogs", qos=1, retain=True)
reader.hears(("garden/pond", b"frogs", 0, False))

later = Client()
later.subscribe("garden/+")
later.hears((0,))
later.hears(("garden/pond", b"frogs", 0, True))
writer.says("garden/pond", "", qos=1, retain=True)
later.hears(("garden/pond", b"", 0, False))
reader.hears(("garden/pond", b"", 0, False))

# A client that is cut off leaves its will, and one that disconnects does not.
polite = Client(will=("garden/will", "polite"))
polite.closes()
lost = Client(will=("garden/will", "lost"))
lost.loop_stop()
lost.socket().close()
reader.hears(("garden/will", b"lost", 0, False))
later.hears(("garden/will", b"lost", 0, False))

for client in [reader, writer, later]:
    client.closes()
    assert client.heard.empty()
"#;
