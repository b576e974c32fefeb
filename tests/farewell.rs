//! A connection that the server ends gets one last frame, behind its replies, and with nothing
//! behind it.

mod support;

use std::convert::Infallible;
use std::io::{Error, ErrorKind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::codec::{Decoder, Encoder};
use tower::make::Shared;
use tower::{Service, ServiceBuilder, service_fn};
use tower_tcp::deadline::{Deadlines, DrainDeadlines};
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::{OnConnectLayer, Session, SessionService, TrySendError, Upgrade};
use tower_tcp::testkit::{Served, memory_with_buffer, serve, serve_with};
use tower_tcp::{
    BoxError, Connection, ConnectionInfo, EndReason, Peer, Pipeline, Reply, Rewind, Server,
};

use support::{Clients, Ends, each_way, settled};

const SECOND: Duration = Duration::from_secs(1);

async fn echo(line: Bytes) -> Result<Bytes, BoxError> {
    Ok(line)
}

/// The farewell of these tests.
fn bye(_: &ConnectionInfo, reason: EndReason) -> Bytes {
    format!("bye: {reason}").into()
}

/// Answers lines with `wait` in them once the gate has a permit, others at once.
fn gated(
    gate: &Arc<Semaphore>,
) -> impl Service<Bytes, Response = Bytes, Error = BoxError, Future: Send> + Clone + Send + 'static
{
    let gate = Arc::clone(gate);
    service_fn(move |line: Bytes| {
        let gate = Arc::clone(&gate);
        async move {
            if line.starts_with(b"wait") {
                gate.acquire().await?.forget();
            }
            Ok(line)
        }
    })
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_gets_it_at_once_at_a_drain() {
    let pipeline = Pipeline::new(Lines::default).service(service_fn(echo));
    for mut served in each_way(pipeline.farewell(bye)) {
        let mut client = served.client().await;
        assert_eq!(client.ask("hi").await, "hi", "{}", served.way());
        let begun = Instant::now();

        served.handle().shutdown();

        assert_eq!(client.rest().await, ["bye: drained"], "{}", served.way());
        assert_eq!(begun.elapsed(), Duration::ZERO, "{}", served.way());
        drop(client);
        assert_eq!(served.reason().await, EndReason::Drained);
        assert_eq!(served.report().await.drained, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn at_a_drain_it_follows_the_replies_to_all_requests_that_had_arrived() {
    let gate = Arc::new(Semaphore::new(0));
    let pipeline = Pipeline::new(Lines::default).service(gated(&gate));
    for served in each_way(pipeline.farewell(bye)) {
        let mut client = served.client().await;
        client.send("wait 1\nwait 2\nwait 3\n").await;
        settled().await;

        served.handle().shutdown();
        settled().await;
        assert!(client.hears_nothing().await, "{}", served.way());
        gate.add_permits(3);

        let mut rest = client.rest().await;
        assert_eq!(
            rest.pop().as_deref(),
            Some("bye: drained"),
            "{}",
            served.way()
        );
        rest.sort(); // they finish in any order
        assert_eq!(rest, ["wait 1", "wait 2", "wait 3"], "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn it_follows_replies_that_wait_for_an_earlier_one() {
    let gate = Arc::new(Semaphore::new(0));
    let pipeline = Pipeline::new(Lines::default)
        .service(gated(&gate))
        .in_flight(8);
    let served = serve(pipeline.farewell(bye));
    let mut client = served.client().await;
    client.send("wait\nfast\nfaster\n").await;
    settled().await;

    served.handle().shutdown();
    settled().await;
    gate.add_permits(1);

    let rest = client.rest().await;
    assert_eq!(rest, ["wait", "fast", "faster", "bye: drained"]);
}

#[tokio::test(start_paused = true)]
async fn it_follows_the_whole_stream_of_a_reply() {
    let streamed = service_fn(|_: Bytes| async {
        let ticks = stream::iter(0..5).then(|n| async move {
            tokio::time::sleep(SECOND).await;
            Ok(Bytes::from(n.to_string()))
        });
        Ok::<_, Infallible>(Reply::stream(ticks))
    });
    let pipeline = Pipeline::new(Lines::default).service(streamed);
    for served in each_way(pipeline.farewell(bye)) {
        let mut client = served.client().await;
        client.send("begin\n").await;
        assert_eq!(client.line().await, "0", "{}", served.way());

        served.handle().shutdown();

        let rest = client.rest().await;
        assert_eq!(
            rest,
            ["1", "2", "3", "4", "bye: drained"],
            "{}",
            served.way()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn it_follows_the_frames_that_a_drain_waits_for() {
    let drain = DrainDeadlines::default().next_frame(SECOND);
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(echo))
        .deadlines(Deadlines::default().drain(drain));
    for served in each_way(pipeline.farewell(bye)) {
        let (mut asks, mut silent) = (served.client().await, served.client().await);
        assert_eq!(asks.ask("hi").await, "hi", "{}", served.way());
        assert_eq!(silent.ask("hi").await, "hi", "{}", served.way());
        let begun = Instant::now();

        served.handle().shutdown();
        settled().await;
        asks.send("one\nmore\n").await;

        let rest = asks.rest().await;
        assert_eq!(rest, ["one", "more", "bye: drained"], "{}", served.way());
        assert_eq!(silent.rest().await, ["bye: drained"], "{}", served.way());
        assert_eq!(begun.elapsed().as_secs(), 1, "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn connections_in_the_backlog_of_a_drain_get_it() {
    let greet =
        OnConnectLayer::new(|peer: Peer<Bytes>| async move { peer.send("220 ready".into()).await });
    let make = ServiceBuilder::new()
        .layer(greet)
        .service(Shared::new(service_fn(echo)));
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    for served in each_way(pipeline.farewell(bye)) {
        served.handle().pause();
        let mut silent = served.client().await;
        let mut asked = served.client().await;
        asked.send("hi\n").await;

        served.handle().shutdown();

        let rest = silent.rest().await;
        assert_eq!(rest, ["220 ready", "bye: drained"], "{}", served.way());
        let rest = asked.rest().await;
        assert_eq!(
            rest,
            ["220 ready", "hi", "bye: drained"],
            "{}",
            served.way()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_is_silent_for_too_long_gets_it() {
    let deadlines = Deadlines::default()
        .first_byte(SECOND)
        .idle(2 * SECOND)
        .frame(3 * SECOND);
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(echo))
        .deadlines(deadlines);
    for served in each_way(pipeline.farewell(bye)) {
        for (sent, expected) in [
            ("", vec!["bye: first_byte_timeout"]),
            ("hi\n", vec!["hi", "bye: idle_timeout"]),
            ("hi\nhal", vec!["hi", "bye: frame_timeout"]),
        ] {
            let mut client = served.client().await;
            client.send(sent).await;

            assert_eq!(client.rest().await, expected, "{}", served.way());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_too_old_or_that_the_operator_closes_gets_it_behind_its_replies() {
    let gate = Arc::new(Semaphore::new(0));
    let pipeline = Pipeline::new(Lines::default)
        .service(gated(&gate))
        .deadlines(Deadlines::default().max_age(60 * SECOND))
        .farewell(bye);
    for served in each_way(pipeline) {
        let mut closed = served.client().await;
        closed.send("wait\n").await;
        settled().await;
        for connection in served.handle().connections() {
            connection.close();
        }
        settled().await;
        gate.add_permits(1);
        let rest = closed.rest().await;
        assert_eq!(rest, ["wait", "bye: service_closed"], "{}", served.way());

        let mut old = served.client().await;
        old.send("wait\n").await;
        tokio::time::sleep(61 * SECOND).await;
        gate.add_permits(1);
        assert_eq!(
            old.rest().await,
            ["wait", "bye: max_age"],
            "{}",
            served.way()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn frames_pushed_before_come_first_and_none_comes_behind() {
    let peers: Arc<Mutex<Vec<Peer<Bytes>>>> = Arc::default();
    let refused = Arc::new(AtomicUsize::new(0));
    let all = Arc::clone(&peers);
    let register = OnConnectLayer::new(move |peer: Peer<Bytes>| {
        all.lock().expect("no panic").push(peer);
        async { Ok::<_, Infallible>(()) }
    });
    let make = ServiceBuilder::new()
        .layer(register)
        .service(Shared::new(service_fn(echo)));
    let (all, count) = (Arc::clone(&peers), Arc::clone(&refused));
    let pipeline =
        Pipeline::new(Lines::default)
            .make_service(make)
            .farewell(move |info, reason| {
                let peers = all.lock().expect("no panic");
                let own = peers.iter().find(|peer| peer.info().id() == info.id());
                let sent = own.expect("it is registered").try_send("behind".into());
                let gone = matches!(sent, Err(TrySendError::Closed(_)));
                count.fetch_add(gone.into(), Ordering::Relaxed);
                bye(info, reason)
            });
    for served in each_way(pipeline) {
        let mut client = served.client().await;
        assert_eq!(client.ask("hi").await, "hi", "{}", served.way());
        let peer = peers.lock().expect("no panic").pop().expect("it came");
        peers.lock().expect("no panic").push(peer.clone());

        peer.try_send("before".into()).expect("there is room");
        served.handle().shutdown();

        let rest = client.rest().await;
        assert_eq!(rest, ["before", "bye: drained"], "{}", served.way());
        peer.try_send("after".into()).expect_err("it is closed");
    }
    assert_eq!(refused.load(Ordering::Relaxed), 3);
}

#[tokio::test(start_paused = true)]
async fn whoever_closes_the_connection_has_the_last_word() {
    let service = service_fn(|line: Bytes| async move {
        match &*line {
            b"quit" => Ok(Reply::from(line).close()),
            b"fail" => Err(BoxError::from("a failure")),
            b"panic" => panic!("a panic"),
            _ => Ok(line.into()),
        }
    });
    let pipeline = Pipeline::new(|| Lines::default().max_line(16)).service(service);
    for served in each_way(pipeline.farewell(bye)) {
        for (sent, expected, reason) in [
            (
                "hi\nquit\nno\n",
                vec!["hi", "quit"],
                EndReason::ServiceClosed,
            ),
            ("hi\nfail\n", vec!["hi"], EndReason::ServiceError),
            ("hi\npanic\n", vec!["hi"], EndReason::Panic),
            (
                "hi\nfar beyond the limit\n",
                vec!["hi"],
                EndReason::FrameTooLarge,
            ),
        ] {
            let mut client = served.client().await;
            client.send(sent).await;

            let rest = client.rest().await;
            assert_eq!(rest, expected, "{}: {reason}", served.way());
            drop(client);
            assert_eq!(served.reason().await, reason, "{}", served.way());
        }
        let mut client = served.client().await;
        client.send("hi\n").await;
        client.finish().await;
        assert_eq!(client.rest().await, ["hi"], "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_closes_during_a_drain_has_the_last_word() {
    let gate = Arc::new(Semaphore::new(0));
    let quits = ServiceBuilder::new()
        .map_response(|line: Bytes| Reply::from(line).close())
        .service(gated(&gate));
    let pipeline = Pipeline::new(Lines::default).service(quits);
    for served in each_way(pipeline.farewell(bye)) {
        let mut client = served.client().await;
        client.send("wait\n").await;
        settled().await;

        served.handle().shutdown();
        settled().await;
        gate.add_permits(1);

        assert_eq!(client.rest().await, ["wait"], "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_has_finished_sending_gets_its_replies_only() {
    let gate = Arc::new(Semaphore::new(0));
    let pipeline = Pipeline::new(Lines::default).service(gated(&gate));
    for served in each_way(pipeline.farewell(bye)) {
        let mut client = served.client().await;
        client.send("wait\n").await;
        client.finish().await;
        settled().await;

        served.handle().shutdown();
        settled().await;
        gate.add_permits(1);

        assert_eq!(client.rest().await, ["wait"], "{}", served.way());
    }
}

#[tokio::test(start_paused = true)]
async fn after_an_upgrade_only_the_service_that_took_over_says_goodbye() {
    let upgrades = service_fn(|line: Bytes| async move {
        Ok::<Upgrade<Bytes>, BoxError>(Reply::from(line).upgrade())
    });
    let inner = Pipeline::new(Lines::default)
        .service(service_fn(echo))
        .farewell(|_, _| Bytes::from("inner"));
    let next = service_fn(move |conn: Connection<Rewind<_>>| inner.clone().call(conn));
    let pipeline = Pipeline::new(Lines::default)
        .service(upgrades)
        .on_upgrade(next)
        .farewell(|_, _| Bytes::from("outer"));
    let served = serve(pipeline);
    let (mut within, mut without) = (served.client().await, served.client().await);
    assert_eq!(within.ask("go").await, "go");
    assert_eq!(within.ask("hi").await, "hi");

    served.handle().shutdown();

    assert_eq!(within.rest().await, ["inner"]);
    assert_eq!(without.rest().await, ["outer"]);
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_upgrades_during_a_drain_is_the_last_frame_of_its_protocol() {
    let gate = Arc::new(Semaphore::new(0));
    let upgrades = ServiceBuilder::new()
        .map_response(|line: Bytes| match &*line {
            b"wait" => Reply::from(line).upgrade(),
            _ => line.into(),
        })
        .service(gated(&gate));
    let raw = service_fn(|conn: Connection<Rewind<_>>| async move {
        drop(conn);
        Ok::<_, BoxError>(())
    });
    let drain = DrainDeadlines::default().next_frame(SECOND);
    let pipeline = Pipeline::new(Lines::default)
        .service(upgrades)
        .deadlines(Deadlines::default().drain(drain))
        .on_upgrade(raw)
        .farewell(bye);
    let served = serve(pipeline);
    let mut client = served.client().await;
    assert_eq!(client.ask("hi").await, "hi");

    served.handle().shutdown();
    settled().await;
    client.send("wait\n").await;
    settled().await;
    gate.add_permits(1);

    assert_eq!(client.rest().await, ["wait"]);
}

#[tokio::test(start_paused = true)]
async fn it_may_depend_on_the_peer_and_there_may_be_none() {
    let told = |info: &ConnectionInfo, _| info.get::<u8>().map(|n| Bytes::from(n.to_string()));
    let mut before = 0_u8;
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(echo))
        .farewell(told);
    let stack = ServiceBuilder::new()
        .map_request(move |mut conn: Connection<_>| {
            before += 1;
            if before == 1 {
                conn.insert(7_u8);
            }
            conn
        })
        .service(pipeline);
    let served = serve(stack);
    let (mut known, mut unknown) = (served.client().await, served.client().await);
    assert_eq!(known.ask("hi").await, "hi");
    assert_eq!(unknown.ask("hi").await, "hi");

    served.handle().shutdown();

    assert_eq!(known.rest().await, ["7"]);
    assert!(unknown.rest().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_peer_whose_service_is_not_made_in_time_gets_it() {
    let make = service_fn(|peer: Peer<Bytes>| async move {
        peer.send("220 one moment".into()).await?;
        std::future::pending::<()>().await;
        Ok::<_, BoxError>(service_fn(echo))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    for served in each_way(pipeline.farewell(bye)) {
        let mut client = served.client().await;

        let rest = client.rest().await;
        let expected = ["220 one moment", "bye: make_service_error"];
        assert_eq!(rest, expected, "{}", served.way());
    }
}

/// Lines, except that encoding `bad` fails and encoding `worse` panics.
#[derive(Default)]
struct Picky(Lines);

impl Decoder for Picky {
    type Item = Bytes;
    type Error = BoxError;

    fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Bytes>, BoxError> {
        Ok(self.0.decode(input)?)
    }
}

impl Encoder<Bytes> for Picky {
    type Error = BoxError;

    fn encode(&mut self, line: Bytes, output: &mut BytesMut) -> Result<(), BoxError> {
        output.extend_from_slice(b"torn");
        match &*line {
            b"bad" => return Err(Error::from(ErrorKind::InvalidInput).into()),
            b"worse" => panic!("it cannot be encoded"),
            _ => output.truncate(output.len() - 4),
        }
        Ok(self.0.encode(line, output)?)
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_fails_or_panics_costs_its_connection_only() {
    let made = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&made);
    let pipeline = Pipeline::new(Picky::default)
        .service(service_fn(echo))
        .deadlines(Deadlines::default().idle(SECOND))
        .farewell(
            move |_, _| match count.fetch_add(1, Ordering::Relaxed) % 4 {
                0 => Bytes::from("bad"),
                1 => Bytes::from("worse"),
                2 => panic!("there is none"),
                _ => Bytes::from("good"),
            },
        );
    for served in each_way(pipeline) {
        for (expected, reason) in [
            (vec!["hi"], EndReason::EncodeError),
            (vec!["hi"], EndReason::Panic),
            (vec!["hi"], EndReason::Panic),
            (vec!["hi", "good"], EndReason::IdleTimeout),
        ] {
            let mut client = served.client().await;
            client.send("hi\n").await;

            assert_eq!(client.rest().await, expected, "{}", served.way());
            drop(client);
            assert_eq!(served.reason().await, reason, "{}", served.way());
        }
    }
    assert_eq!(made.load(Ordering::Relaxed), 12, "each is made once");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_take_it_is_cut_off_at_the_write_deadline() {
    let (listener, connector) = memory_with_buffer(16);
    let pipeline = Pipeline::new(Lines::default)
        .service(service_fn(echo))
        .deadlines(Deadlines::default().write(3 * SECOND))
        .farewell(|_, _| Bytes::from("longer than the buffer is"));
    let mut served: Served = serve_with(Server::builder().build(listener), connector, pipeline);
    let mut client = served.client().await;
    assert_eq!(client.ask("hi").await, "hi");
    let begun = Instant::now();

    served.handle().shutdown();

    assert_eq!(served.reason().await, EndReason::WriteTimeout);
    assert_eq!(begun.elapsed(), 3 * SECOND);
    assert_eq!(served.report().await.aborted, 0);
}

/// A session that sends to its own peer when it is dropped.
struct Late(Peer<Bytes>);

impl Session<Bytes> for Late {
    type Reply = Bytes;
    type Error = Infallible;

    async fn call(&mut self, line: Bytes) -> Result<Bytes, Infallible> {
        Ok(line)
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        let _sent_or_not = self.0.try_send("from the session".into());
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_session_sends_at_its_end_comes_before_it() {
    let make = service_fn(|peer: Peer<Bytes>| async move {
        Ok::<_, Infallible>(SessionService::new(Late(peer)))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    for served in each_way(pipeline.farewell(bye)) {
        let mut client = served.client().await;
        assert_eq!(client.ask("hi").await, "hi", "{}", served.way());

        served.handle().shutdown();

        let rest = client.rest().await;
        assert_eq!(
            rest,
            ["from the session", "bye: drained"],
            "{}",
            served.way()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_program_that_closes_by_the_peer_sends_its_own() {
    let make = service_fn(|peer: Peer<Bytes>| async move {
        let closes = service_fn(move |line: Bytes| {
            peer.try_send("kicked".into()).expect("there is room");
            peer.close();
            async move { Ok::<_, Infallible>(line) }
        });
        Ok::<_, Infallible>(closes)
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    for served in each_way(pipeline.farewell(bye)) {
        let mut client = served.client().await;
        client.send("hi\n").await;

        assert_eq!(client.rest().await, ["kicked", "hi"], "{}", served.way());
    }
}
