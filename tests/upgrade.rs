//! Upgrade: another service takes the stream over between two frames, with its buffered bytes,
//! permit, signals and single end. A codec can change its mode between two frames.

mod support;

use std::convert::Infallible;
use std::io;
use std::num::NonZero;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use support::{Client, Clients, Ends, settled};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio_util::codec::{Decoder, Encoder};
use tower::ServiceBuilder;
use tower::service_fn;
use tower::util::BoxCloneSyncService;
use tower_tcp::deadline::Deadlines;
use tower_tcp::frame::{Block, Lines};
use tower_tcp::pipeline::{Closed, Upgrade};
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, serve, serve_with};
use tower_tcp::{
    Address, BoxError, Connection, EndReason, Handle, Peer, Pipeline, Reply, Rewind, Server,
};

/// Echoes lines, and upgrades at "over".
async fn echo_or_over(line: Bytes) -> Result<Upgrade<Bytes>, BoxError> {
    Ok(match &*line {
        b"over" => Reply::from(Bytes::from("go")).upgrade(),
        b"two" => Reply::from(vec![Bytes::from("1"), Bytes::from("2")]).upgrade(),
        b"none" => Reply::none().upgrade(),
        b"bye" => Reply::from(Bytes::from("221 bye")).close().into(),
        _ => line.into(),
    })
}

/// Returns the whole input in reverse once it has ended.
async fn reverse<Io>(mut conn: Connection<Rewind<Io>>) -> Result<(), BoxError>
where
    Rewind<Io>: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut all = Vec::new();
    conn.read_to_end(&mut all).await?;
    all.reverse();
    conn.write_all(&all).await?;
    Ok(())
}

macro_rules! taken_over_by {
    ($next:expr) => {
        Pipeline::new(Lines::default)
            .service(service_fn(echo_or_over))
            .on_upgrade($next)
    };
}

/// Sends the requests and the end. Returns all that comes back.
async fn exchange<Io>(io: Io, requests: &str) -> String
where
    Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut client = Client::new(io);
    client.send(requests).await;
    client.finish().await;
    let mut replies = String::new();
    let read = client.0.read_to_string(&mut replies);
    let read = tokio::time::timeout(Duration::from_secs(3600), read).await;
    read.expect("it closes").expect("in good order");
    replies
}

async fn io(served: &Served) -> DuplexStream {
    served.client().await.0.into_inner()
}

#[tokio::test(start_paused = true)]
async fn what_stands_behind_an_upgrade_is_for_the_next_service() {
    let served = serve(taken_over_by!(service_fn(reverse)));

    let replies = exchange(io(&served).await, "a\nover\nb\nc").await;

    assert_eq!(replies, "a\ngo\nc\nb");
    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::PeerClosed);
    // Bytes that were read ahead and read again count once.
    assert_eq!((end.bytes_read(), end.bytes_written()), (10, 8));
    assert_eq!(end.requests(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_comes_later_is_for_the_next_service_too() {
    let served = serve(taken_over_by!(service_fn(reverse)));
    let mut client = served.client().await;

    assert_eq!(client.ask("over").await, "go");
    client.send("cba").await;
    client.finish().await;

    assert_eq!(client.rest().await, ["abc"]);
}

#[tokio::test]
async fn it_is_the_same_over_tcp_and_unix_sockets() {
    let folder = tempfile::tempdir().expect("there is a place for it");
    let path = folder.path().join("socket");
    let server = Server::builder()
        .listen("127.0.0.1:0")
        .listen(format!("unix:{}", path.display()));
    let server = server.bind().await.expect("it binds");
    let tcp = server.handle().local_addrs().iter().find_map(Address::tcp);
    let _served = serve_with(server, (), taken_over_by!(service_fn(reverse)));

    let tcp = TcpStream::connect(tcp.expect("one is TCP")).await;
    let over_tcp = exchange(tcp.expect("it listens"), "a\nover\nb\nc").await;
    let unix = UnixStream::connect(&path).await;
    let over_unix = exchange(unix.expect("it listens"), "a\nover\nb\nc").await;

    assert_eq!((&*over_tcp, &*over_unix), ("a\ngo\nc\nb", "a\ngo\nc\nb"));
}

#[tokio::test(start_paused = true)]
async fn every_form_of_reply_is_written_before_it() {
    for (request, reply) in [("over", "go\n"), ("two", "1\n2\n"), ("none", "")] {
        let served = serve(taken_over_by!(service_fn(reverse)));

        let replies = exchange(io(&served).await, &format!("{request}\nba")).await;

        assert_eq!(replies, format!("{reply}ab"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_may_hand_over_may_also_close() {
    let served = serve(taken_over_by!(service_fn(reverse)));

    let replies = exchange(io(&served).await, "a\nbye\nover\nb").await;

    assert_eq!(replies, "a\n221 bye\n");
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn a_pipeline_takes_over_from_a_pipeline_which_took_over_from_one() {
    let blocks = || Block::new(NonZero::new(2).expect("two is not zero"));
    let echo = service_fn(|block: Bytes| async move { Ok::<_, Infallible>(block) });
    let last = Pipeline::new(blocks).service(echo);
    let served = serve(taken_over_by!(taken_over_by!(last)));

    let replies = exchange(io(&served).await, "a\nover\nb\nover\nccdd").await;

    assert_eq!(replies, "a\ngo\nb\ngo\nccdd");
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_comes_first_sees_what_is_buffered_and_may_refuse_it() {
    let refuse = service_fn(|conn: Connection<Rewind<DuplexStream>>| async move {
        match conn.get_ref().buffered() {
            b"" => Ok(conn),
            early => Err(format!("{} bytes were sent too early", early.len())),
        }
    });
    let next = ServiceBuilder::new()
        .layer(PreConnectLayer::new(refuse))
        .service(service_fn(reverse));
    let served = serve(taken_over_by!(next));

    let mut patient = served.client().await;
    assert_eq!(patient.ask("over").await, "go");
    patient.send("no").await;
    patient.finish().await;
    let patient = patient.rest().await;
    let patient_end = served.reason().await;
    let hasty = exchange(io(&served).await, "over\nno").await;

    assert_eq!(patient, ["on"]);
    assert_eq!(patient_end, EndReason::PeerClosed);
    assert_eq!(hasty, "go\n");
    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::Rejected);
    let error = end.error().expect("there is one").to_string();
    assert_eq!(error, "2 bytes were sent too early");
}

#[tokio::test(start_paused = true)]
async fn the_permit_goes_along() {
    let (tell, mut told) = mpsc::channel(1);
    let next = service_fn(move |mut conn: Connection<Rewind<DuplexStream>>| {
        let tell = tell.clone();
        async move {
            tell.send(()).await?;
            conn.read_u8().await?;
            Ok::<_, BoxError>(())
        }
    });
    let served = serve(taken_over_by!(next));
    let in_use = |handle: &Handle| (handle.live(), handle.limit().in_use());
    let mut client = served.client().await;

    client.ask("over").await;
    told.recv().await.expect("it was handed over");

    assert_eq!(in_use(served.handle()), (1, 1));
    client.send("x").await;
    served.reason().await;
    // The end has released the permit, and the table then forgets the connection.
    settled().await;
    assert_eq!(in_use(served.handle()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_drain_reaches_the_next_service_also_when_it_began_before() {
    for before in [true, false] {
        let (tell, mut told) = mpsc::channel(1);
        let next = service_fn(move |conn: Connection<Rewind<DuplexStream>>| {
            let tell = tell.clone();
            async move {
                tell.send(()).await?;
                conn.draining().await;
                Ok::<_, BoxError>(())
            }
        });
        let slow = service_fn(|_line: Bytes| async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok::<_, BoxError>(Reply::from(Bytes::from("go")).upgrade())
        });
        let pipeline = Pipeline::new(Lines::default).service(slow);
        let served = serve(pipeline.on_upgrade(next));
        let mut client = served.client().await;
        client.send("over\n").await;
        settled().await;

        if before {
            served.handle().shutdown();
        }
        assert_eq!(client.line().await, "go");
        told.recv().await.expect("it was handed over");
        served.handle().shutdown_within(Duration::from_secs(60));

        assert_eq!(
            served.reason().await,
            EndReason::Drained,
            "before: {before}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn the_old_peer_cannot_send_but_can_end_it_and_learns_of_the_end() {
    let (tell, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("there is room");
        let echo = BoxCloneSyncService::new(service_fn(echo_or_over));
        std::future::ready(Ok::<_, Infallible>(echo))
    });
    let next = service_fn(|conn: Connection<Rewind<DuplexStream>>| async move {
        std::future::pending::<()>().await;
        drop(conn);
        Ok::<_, BoxError>(())
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let served = serve(pipeline.on_upgrade(next));
    let mut client = served.client().await;
    let peer: Peer<Bytes> = peers.recv().await.expect("it is served");
    peer.send("before".into()).await.expect("it is open");
    client.send("over\n").await;
    let before = [client.line().await, client.line().await];
    settled().await;

    let sent = peer.send("behind".into()).await;
    peer.abort();

    assert_eq!(before, ["before", "go"]);
    assert_eq!(sent, Err(Closed));
    assert_eq!(peer.closed().await.reason(), EndReason::Aborted);
    assert_eq!(served.reason().await, EndReason::Aborted);
}

#[tokio::test(start_paused = true)]
async fn a_close_that_came_before_it_stands() {
    let (tell, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("there is room");
        let slow = BoxCloneSyncService::new(service_fn(|_line: Bytes| async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok::<_, BoxError>(Reply::from(Bytes::from("go")).upgrade())
        }));
        std::future::ready(Ok::<_, Infallible>(slow))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let served = serve(pipeline.on_upgrade(service_fn(reverse)));
    let mut client = served.client().await;
    let peer: Peer<Bytes> = peers.recv().await.expect("it is served");
    client.send("over\nabc").await;
    settled().await;

    peer.close();

    assert_eq!(client.rest().await, ["go"]);
    drop(client);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn a_close_by_the_old_peer_is_a_drain_to_a_raw_service() {
    let (tell, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("there is room");
        let echo = BoxCloneSyncService::new(service_fn(echo_or_over));
        std::future::ready(Ok::<_, Infallible>(echo))
    });
    let next = service_fn(|mut conn: Connection<Rewind<DuplexStream>>| async move {
        conn.draining().await;
        conn.write_all(b"bye").await?;
        Ok::<_, BoxError>(())
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let served = serve(pipeline.on_upgrade(next));
    let mut client = served.client().await;
    let peer: Peer<Bytes> = peers.recv().await.expect("it is served");
    assert_eq!(client.ask("over").await, "go");
    assert!(client.hears_nothing().await);

    peer.close();

    assert_eq!(client.rest().await, ["bye"]);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn a_next_service_that_is_never_ready_has_ten_seconds() {
    let next = ServiceBuilder::new()
        .concurrency_limit(0)
        .service(service_fn(reverse));
    let served = serve(taken_over_by!(next));
    let mut client = served.client().await;
    assert_eq!(client.ask("over").await, "go");
    let begun = tokio::time::Instant::now();

    assert_eq!(served.reason().await, EndReason::MakeServiceError);
    assert_eq!(begun.elapsed().as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_close_from_within_the_call_that_asks_for_it_stands() {
    let make = service_fn(|peer: Peer<Bytes>| {
        let close = BoxCloneSyncService::new(service_fn(move |_line: Bytes| {
            peer.close();
            let over = Reply::from(Bytes::from("go")).upgrade();
            std::future::ready(Ok::<_, BoxError>(over))
        }));
        std::future::ready(Ok::<_, Infallible>(close))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let served = serve(pipeline.on_upgrade(service_fn(reverse)));

    let replies = exchange(io(&served).await, "over\nabc").await;

    assert_eq!(replies, "go\n");
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn what_goes_wrong_in_the_next_service_is_the_reason_of_the_end() {
    let next = service_fn(|mut conn: Connection<Rewind<DuplexStream>>| async move {
        match conn.read_u8().await? {
            b'f' => Err(BoxError::from("failed as told")),
            b'p' => panic!("panicked as told"),
            _ => Ok(()),
        }
    });
    let served = serve(taken_over_by!(next));

    for (request, reason) in [
        ("over\nf", EndReason::ServiceError),
        ("over\np", EndReason::Panic),
        ("over\n", EndReason::Truncated),
        ("over\nx", EndReason::ServiceClosed),
    ] {
        let mut client = served.client().await;
        client.send(request).await;
        client.finish().await;
        assert_eq!(served.reason().await, reason, "{request:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_read_the_reply_before_it_does_not_hold_it_for_ever() {
    let big = service_fn(|_line: Bytes| async move {
        let reply = Bytes::from(vec![b'x'; 1 << 20]);
        Ok::<_, BoxError>(Reply::from(reply).upgrade())
    });
    let pipeline = Pipeline::new(Lines::default).service(big);
    let served = serve(pipeline.on_upgrade(service_fn(reverse)));
    let mut client = served.client().await;

    client.send("over\n").await;

    assert_eq!(served.reason().await, EndReason::WriteTimeout);
}

/// Lines; after "data" is *sent*, blocks of four bytes; after "lines" is sent, lines again.
#[derive(Debug, Default)]
struct Modes {
    lines: Lines,
    in_blocks: bool,
}

impl Decoder for Modes {
    type Item = Bytes;
    type Error = BoxError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Bytes>, BoxError> {
        if !self.in_blocks {
            return Ok(self.lines.decode(src)?);
        }
        Ok((src.len() >= 4).then(|| src.split_to(4).freeze()))
    }
}

impl Encoder<Bytes> for Modes {
    type Error = io::Error;

    fn encode(&mut self, frame: Bytes, dst: &mut BytesMut) -> io::Result<()> {
        match &*frame {
            b"data" => self.in_blocks = true,
            b"lines" => self.in_blocks = false,
            _ => {}
        }
        dst.extend_from_slice(&frame);
        dst.extend_from_slice(b"\n");
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn x83_a_codec_changes_its_mode_between_two_frames_in_one_packet() {
    let answer = service_fn(|frame: Bytes| async move {
        // The same holds if the answer takes time and more of the packet is buffered.
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok::<_, Infallible>(match &*frame {
            b"DATA" => Bytes::from("data"),
            b"end." => Bytes::from("lines"),
            _ => [b"<", &*frame, b">"].concat().into(),
        })
    });
    let served = serve(Pipeline::new(Modes::default).service(answer));

    let replies = exchange(io(&served).await, "a\nDATA\n1234a\nb\nend.b\nDATA\nend.c\n").await;

    assert_eq!(
        replies,
        "<a>\ndata\n<1234>\n<a\nb\n>\nlines\n<b>\ndata\nlines\n<c>\n"
    );
}

#[tokio::test(start_paused = true)]
async fn a_push_changes_the_mode_for_what_is_buffered_already() {
    let (tell, mut peers) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("there is room");
        let echo = service_fn(|frame: Bytes| async move { Ok::<_, Infallible>(frame) });
        std::future::ready(Ok::<_, Infallible>(BoxCloneSyncService::new(echo)))
    });
    let served = serve(Pipeline::new(Modes::default).make_service(make));
    let mut client = served.client().await;
    let peer: Peer<Bytes> = peers.recv().await.expect("it is served");
    // Not a complete line yet.
    client.send("abcdef").await;
    assert!(client.hears_nothing().await);

    peer.send("data".into()).await.expect("it is open");

    assert_eq!(client.line().await, "data");
    assert_eq!(client.line().await, "abcd");
    client.send("gh").await;
    assert_eq!(client.line().await, "efgh");
}

#[tokio::test(start_paused = true)]
async fn a_frame_deadline_does_not_count_what_another_mode_left() {
    let answer = service_fn(|frame: Bytes| async move {
        tokio::time::sleep(Duration::from_secs(20)).await;
        Ok::<_, Infallible>(if frame == "DATA" {
            "data".into()
        } else {
            frame
        })
    });
    let deadlines = Deadlines::default().frame(Duration::from_secs(30));
    let pipeline = Pipeline::new(Modes::default).service(answer);
    let served = serve(pipeline.deadlines(deadlines));
    let mut client = served.client().await;

    client.send("DATA\nab").await;
    assert_eq!(client.line().await, "data");
    tokio::time::sleep(Duration::from_secs(20)).await;
    client.send("cd").await;

    assert_eq!(client.line().await, "abcd");
}
