//! Scenarios 1 to 7 and 15: how connections start and end, one at a time and at the limit.

use std::convert::Infallible;
use std::future::{pending, ready};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tower::{ServiceBuilder, service_fn};
use tower_tcp::frame::Lines;
use tower_tcp::pipeline::{Closed, Event};
use tower_tcp::preconnect::PreConnectLayer;
use tower_tcp::testkit::{Served, serve};
use tower_tcp::{BoxError, Connection, EndReason, Peer, Pipeline, Reply};

use super::support::{Clients, Ends, serve_stream, settled};
use super::{Journal, echo, text};

/// The size of the reply in the slow reader scenarios, the line end included.
const BIG: usize = 8_000_002;

fn big() -> Bytes {
    vec![b'x'; BIG - 2].into()
}

/// Records all that arrives. Answers `big`, `quit`, and `bigquit`, which is both.
fn noting(journal: &Journal) -> Served {
    let journal = journal.clone();
    let service = service_fn(move |line: Bytes| {
        journal.note(text(&line));
        ready(Ok::<_, Infallible>(match &*line {
            b"big" => big().into(),
            b"bigquit" => Reply::from(big()).close(),
            b"quit" => Reply::from(Bytes::from("bye")).close(),
            _ => Reply::none(),
        }))
    });
    serve(Pipeline::new(Lines::crlf).service(service))
}

#[tokio::test(start_paused = true)]
async fn s1_x01_what_happens_to_a_connection_happens_in_order() {
    let journal = Journal::default();
    let noted = journal.clone();
    let hook = service_fn(move |conn: Connection<DuplexStream>| {
        noted.note("pre-connect");
        ready(Ok::<_, BoxError>(conn))
    });
    let noted = journal.clone();
    let make = service_fn(move |peer: Peer<Bytes, &'static str>| {
        let noted = noted.clone();
        noted.note("connected");
        let at_end = noted.clone();
        peer.on_end(move |_| at_end.note("disconnected"));
        peer.try_post("yielded").expect("there is room for one");
        ready(Ok::<_, Infallible>(service_fn(move |event| {
            let (noted, peer) = (noted.clone(), peer.clone());
            async move {
                let line: Bytes = match event {
                    Event::Message(message) => {
                        noted.note(message);
                        return Ok(Reply::none());
                    }
                    Event::Request(line) => line,
                };
                noted.note(text(&line));
                let quits = &*line == b"quit";
                peer.send(line).await?;
                peer.flushed().await?;
                noted.note("flushed");
                let reply = Reply::<Bytes>::none();
                Ok::<_, BoxError>(if quits { reply.close() } else { reply })
            }
        })))
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(hook))
        .service(Pipeline::new(Lines::default).make_event_service(make));
    let served = serve(stack);

    let mut client = served.client().await;
    settled().await;
    client.send("hello\nquit\n").await;
    assert_eq!(client.rest().await, ["hello", "quit"]);
    drop(client);
    served.end().await;
    settled().await;

    assert_eq!(
        journal.all(),
        [
            "pre-connect",
            "connected",
            "yielded",
            "hello",
            "flushed",
            "quit",
            "flushed",
            "disconnected"
        ]
    );
    assert_eq!(served.handle().live(), 0);
    assert_eq!(served.handle().limit().in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn s1_x06_a_connection_may_be_greeted_and_closed_before_its_first_line() {
    let journal = Journal::default();
    let noted = journal.clone();
    let make = service_fn(move |peer: Peer<Bytes>| {
        let noted = noted.clone();
        async move {
            peer.send("go away".into()).await?;
            peer.close();
            Ok::<_, BoxError>(service_fn(move |line: Bytes| {
                noted.note(text(&line));
                echo(line)
            }))
        }
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));

    let mut client = served.client().await;
    client.send("let me in\n").await;
    let heard = client.rest().await;
    drop(client);

    assert_eq!(heard, ["go away"]);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
    assert!(journal.all().is_empty());
}

#[tokio::test(start_paused = true)]
async fn s1_x11_a_slow_reader_gets_all_and_what_it_sends_meanwhile_is_dropped() {
    let journal = Journal::default();
    let served = noting(&journal);

    let mut client = served.client().await;
    client.send("bigquit\n").await;
    sleep(Duration::from_secs(1)).await;
    client.send("late\nlater\n").await;
    let mut heard = Vec::new();
    client.0.read_to_end(&mut heard).await.expect("it ends");
    drop(client);

    assert_eq!(heard.len(), BIG);
    assert_eq!(journal.all(), ["bigquit"]);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn s1_x30_a_client_over_the_limit_is_served_what_it_sent_early_when_a_place_is_free() {
    let served = serve(Pipeline::new(Lines::default).service(service_fn(echo)));
    served.handle().limit().set(1);
    let mut first = served.client().await;
    assert_eq!(first.ask("first").await, "first");

    let mut second = served.client().await;
    second.send("early\n").await;
    let unserved = second.hears_nothing().await;
    drop(first);

    assert!(unserved);
    assert_eq!(second.line().await, "early");
}

#[tokio::test(start_paused = true)]
async fn s1_x39_who_is_in_is_served_to_the_end_and_nobody_else_comes_in() {
    let raw = service_fn(|mut conn: Connection<DuplexStream>| async move {
        let mut word = [0; 5];
        while conn.read_exact(&mut word).await.is_ok() {
            conn.write_all(&word).await?;
        }
        Ok::<_, BoxError>(())
    });
    let served = serve(raw);
    let mut client = served.client().await;
    assert_eq!(client.ask("once").await, "once");

    served.handle().shutdown();
    settled().await;
    let still = client.ask("more").await;
    let refused = served.connect().await.is_err();
    drop(client);

    assert_eq!(still, "more");
    assert!(refused);
    served.end().await;
    assert_eq!(served.handle().closed().await.drained, 1);
}

#[tokio::test(start_paused = true)]
async fn s1_x90b_lines_before_a_reset_are_delivered() {
    let journal = Journal::default();
    let noted = journal.clone();
    let service = service_fn(move |line: Bytes| {
        noted.note(text(&line));
        ready(Ok::<_, Infallible>(None::<Bytes>))
    });
    let io = tokio_test::io::Builder::new()
        .read(b"one\ntwo\nthree\n")
        .read_error(io::ErrorKind::ConnectionReset.into())
        .build();

    let served = serve_stream(io, Pipeline::new(Lines::default).service(service));

    assert_eq!(served.reason().await, EndReason::PeerReset);
    assert_eq!(journal.all(), ["one", "two", "three"]);
}

#[tokio::test(start_paused = true)]
async fn s2_x13_a_half_close_while_the_rest_is_written_loses_nothing_of_it() {
    let served = noting(&Journal::default());

    let mut client = served.client().await;
    client.send("bigquit\n").await;
    let mut heard = vec![0; BIG / 2];
    client.0.read_exact(&mut heard).await.expect("it is coming");
    client.finish().await;
    client.0.read_to_end(&mut heard).await.expect("it ends");
    drop(client);

    assert_eq!(heard.len(), BIG);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn s4_x04_what_comes_behind_a_closing_reply_in_the_same_packet_is_not_delivered() {
    let journal = Journal::default();
    let served = noting(&journal);

    let mut client = served.client().await;
    client.send("one\nquit\nafter\nthat\n").await;
    let heard = client.rest().await;
    drop(client);

    assert_eq!(heard, ["bye"]);
    assert_eq!(journal.all(), ["one", "quit"]);
    assert_eq!(served.reason().await, EndReason::ServiceClosed);
}

#[tokio::test(start_paused = true)]
async fn s4_x05_what_comes_behind_a_close_from_within_is_not_delivered() {
    let journal = Journal::default();
    let noted = journal.clone();
    let make = service_fn(move |peer: Peer<Bytes>| {
        let noted = noted.clone();
        ready(Ok::<_, Infallible>(service_fn(move |line: Bytes| {
            noted.note(text(&line));
            if &*line == b"quit" {
                peer.close();
            }
            echo(line)
        })))
    });
    let served = serve(Pipeline::new(Lines::default).make_service(make));

    let mut client = served.client().await;
    client.send("one\nquit\nafter\n").await;
    let heard = client.rest().await;

    assert_eq!(heard, ["one", "quit"]);
    assert_eq!(journal.all(), ["one", "quit"]);
}

/// Asserts that one connection has ended, with this reason, and that its permit is free.
async fn assert_ended_once(served: &mut Served, reason: EndReason) {
    assert_eq!(served.reason().await, reason);
    settled().await;
    assert!(served.ends().is_empty(), "it ended twice");
    assert_eq!(served.handle().live(), 0);
    assert_eq!(served.handle().limit().in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn s7_x17_a_reset_with_output_pending_ends_once_also_where_errors_do_not_end_it() {
    let service = service_fn(|_: Bytes| ready(Ok::<_, Infallible>(big())));
    let pipeline = Pipeline::new(Lines::crlf).service(service);
    let mut served = serve(pipeline.shutdown_on_error(false));

    let mut client = served.client().await;
    client.send("big\n").await;
    client.0.read_u8().await.expect("it is coming");
    drop(client);

    assert_ended_once(&mut served, EndReason::PeerReset).await;
}

#[tokio::test(start_paused = true)]
async fn s7_x24_a_connection_that_the_program_drops_ends_once() {
    let dropping = service_fn(|conn: Connection<DuplexStream>| {
        drop(conn);
        ready(Ok::<_, BoxError>(()))
    });
    let mut served = serve(dropping);

    let heard = served.client().await.rest().await;

    assert!(heard.is_empty());
    assert_ended_once(&mut served, EndReason::ServiceClosed).await;
}

#[tokio::test(start_paused = true)]
async fn s7_x25_x26_a_rejection_is_told_and_frees_its_place_at_once_whatever_timers_run() {
    let connected = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connected);
    let hook = service_fn(|conn: Connection<DuplexStream>| {
        tokio::spawn(sleep(Duration::from_secs(1)));
        drop(conn);
        ready(Err::<Connection<DuplexStream>, _>(BoxError::from("no")))
    });
    let make = service_fn(move |_: Peer<Bytes>| {
        counted.fetch_add(1, Ordering::Relaxed);
        ready(Ok::<_, Infallible>(service_fn(echo)))
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(hook))
        .service(Pipeline::new(Lines::default).make_service(make));
    let mut served = serve(stack);
    let begun = Instant::now();

    let heard = served.client().await.rest().await;

    assert!(heard.is_empty());
    assert_ended_once(&mut served, EndReason::Rejected).await;
    assert!(begun.elapsed() < Duration::from_millis(10));
    assert_eq!(connected.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn s7_x27_a_hook_that_panics_ends_its_connection_once_and_no_other() {
    let hook = service_fn(|conn: Connection<DuplexStream>| async move {
        assert_ne!(
            conn.info().peer_addr().to_string(),
            "memory:2",
            "as planned"
        );
        Ok::<_, BoxError>(conn)
    });
    let stack = ServiceBuilder::new()
        .layer(PreConnectLayer::new(hook))
        .service(Pipeline::new(Lines::default).service(service_fn(echo)));
    let served = serve(stack);
    let mut bystander = served.client().await;

    let heard = served.client().await.rest().await;

    assert!(heard.is_empty());
    assert_eq!(served.reason().await, EndReason::Panic);
    assert_eq!(bystander.ask("still here").await, "still here");
    assert!(served.ends().is_empty(), "it ended twice");
}

#[tokio::test(start_paused = true)]
async fn s7_x38_what_the_end_leaves_behind_holds_no_place() {
    let make = service_fn(|peer: Peer<Bytes, ()>| {
        let late = peer.clone();
        peer.on_end(move |_| {
            tokio::spawn(async move {
                sleep(Duration::from_secs(1)).await;
                assert_eq!(late.send("too late".into()).await, Err(Closed));
            });
        });
        peer.post_after(Duration::from_secs(1), ())
            .expect("there is room for one");
        ready(Ok::<_, Infallible>(service_fn(
            |event: Event<Bytes, ()>| async move {
                match event {
                    Event::Request(line) => Ok::<_, BoxError>(line),
                    Event::Message(()) => Err("the timer outlived its connection".into()),
                }
            },
        )))
    });
    let served = serve(Pipeline::new(Lines::default).make_event_service(make));
    served.handle().limit().set(1);
    let mut first = served.client().await;
    assert_eq!(first.ask("first").await, "first");
    let mut second = served.client().await;
    let begun = Instant::now();

    drop(first);
    let answer = second.ask("second").await;

    assert_eq!(answer, "second");
    assert!(begun.elapsed() < Duration::from_millis(10));
}

#[derive(Clone, Copy)]
enum Message {
    Shutdown,
}

#[tokio::test(start_paused = true)]
async fn s7_x78_a_message_of_any_name_takes_the_place_of_nothing() {
    let journal = Journal::default();
    let noted = journal.clone();
    let make = service_fn(move |peer: Peer<Bytes, Message>| {
        let noted = noted.clone();
        peer.try_post(Message::Shutdown)
            .expect("there is room for one");
        ready(Ok::<_, Infallible>(service_fn(move |event| {
            match event {
                Event::Message(Message::Shutdown) => noted.note("shutdown"),
                Event::Request(_) => peer.close(),
            }
            ready(Ok::<_, Infallible>(None::<Bytes>))
        })))
    });
    let mut served = serve(Pipeline::new(Lines::default).make_event_service(make));

    let mut client = served.client().await;
    let open = client.hears_nothing().await;
    client.send("quit\n").await;
    let heard = client.rest().await;
    drop(client);

    assert!(open);
    assert!(heard.is_empty());
    assert_eq!(journal.all(), ["shutdown"]);
    assert_ended_once(&mut served, EndReason::ServiceClosed).await;
}

#[tokio::test(start_paused = true)]
async fn s7_x20_x21_what_is_sent_too_late_is_refused_and_not_lost_in_silence() {
    let (tell, mut told) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        let (tell, last) = (tell.clone(), peer.clone());
        peer.on_end(move |_| {
            let sent = last.try_send("at the end".into());
            tell.try_send(sent.is_err()).expect("it ends once");
        });
        ready(Ok::<_, Infallible>(service_fn(move |line: Bytes| {
            let peer = peer.clone();
            async move {
                peer.send(line).await?;
                peer.close();
                assert_eq!(peer.send("behind the close".into()).await, Err(Closed));
                Ok::<_, BoxError>(None::<Bytes>)
            }
        })))
    });
    let mut served = serve(Pipeline::new(Lines::default).make_service(make));

    let mut client = served.client().await;
    client.send("quit\n").await;
    let heard = client.rest().await;
    drop(client);

    assert_eq!(heard, ["quit"]);
    assert_eq!(told.recv().await, Some(true));
    assert_ended_once(&mut served, EndReason::ServiceClosed).await;
}

#[tokio::test(start_paused = true)]
async fn s7_x23_a_close_from_the_end_itself_is_harmless() {
    let make = service_fn(|peer: Peer<Bytes>| {
        let again = peer.clone();
        peer.on_end(move |_| {
            again.close();
            again.abort();
        });
        ready(Ok::<_, Infallible>(service_fn(echo)))
    });
    let mut served = serve(Pipeline::new(Lines::default).make_service(make));

    drop(served.client().await);

    assert_ended_once(&mut served, EndReason::PeerClosed).await;
}

#[tokio::test(start_paused = true)]
async fn s15_x18_a_dead_write_side_refuses_what_is_sent_and_lets_the_close_complete() {
    let (tell, mut told) = mpsc::channel(1);
    let make = service_fn(move |peer: Peer<Bytes>| {
        tell.try_send(peer).expect("one comes");
        ready(Ok::<_, Infallible>(service_fn(echo)))
    });
    let pipeline = Pipeline::new(Lines::default).make_service(make);
    let io = DeadWriteSide;

    let served = serve_stream(io, pipeline.shutdown_on_error(false));
    let peer = told.recv().await.expect("it is connected");
    peer.send("one".into()).await.expect("it is not known yet");
    let flushed = peer.flushed().await;
    peer.close();

    assert_eq!(flushed, Err(Closed));
    assert_eq!(peer.send("two".into()).await, Err(Closed));
    assert_eq!(served.reason().await, EndReason::PeerReset);
    settled().await;
    assert_eq!(served.handle().live(), 0);
}

/// A stream whose reads wait and whose writes fail.
struct DeadWriteSide;

impl AsyncRead for DeadWriteSide {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

impl AsyncWrite for DeadWriteSide {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn s15_x75_a_close_with_output_that_nobody_takes_completes_in_time() {
    let mut served = noting(&Journal::default());
    let begun = Instant::now();

    let mut client = served.client().await;
    client.send("bigquit\n").await;

    assert_ended_once(&mut served, EndReason::WriteTimeout).await;
    assert!(begun.elapsed() < Duration::from_secs(31));
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn s15_x75b_a_peer_that_leaves_while_nothing_is_read_is_noticed() {
    let make = service_fn(|peer: Peer<Bytes>| {
        peer.pause_input();
        ready(Ok::<_, Infallible>(service_fn(|_: Bytes| {
            pending::<Result<Bytes, Infallible>>()
        })))
    });
    let mut served = serve(Pipeline::new(Lines::default).make_service(make));
    let client = served.client().await;
    settled().await;
    assert_eq!(served.handle().live(), 1);

    drop(client);

    assert_ended_once(&mut served, EndReason::PeerClosed).await;
}
