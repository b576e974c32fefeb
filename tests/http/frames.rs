//! HTTP/2 written by hand: peers that behave as no client of the crate `h2` would.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};
use tower::service_fn;
use tower_tcp::deadline::Deadlines;
use tower_tcp::http::{Http, RequestBody};
use tower_tcp::testkit::{memory_with_buffer, serve, serve_with};
use tower_tcp::{EndReason, Initiator, Server};

use crate::support::{Ends, settled, until};
use crate::{connect, http};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const END_STREAM_AND_HEADERS: u8 = 5;

/// `GET http://a/never`: two entries of HPACK's static table, then a literal authority and path.
pub(crate) const GET_NEVER: &[u8] = b"\x82\x86\x41\x01a\x44\x06/never";
/// `GET http://a/`.
const GET: &[u8] = b"\x82\x86\x41\x01a\x84";
/// `POST http://a/`.
const POST: &[u8] = b"\x83\x86\x41\x01a\x84";

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short one");
    let mut frame = length.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Reads a frame: its type and its payload.
async fn read(io: &mut DuplexStream) -> Option<(u8, Vec<u8>)> {
    let mut head = [0; 9];
    io.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    io.read_exact(&mut payload).await.ok()?;
    Some((head[3], payload))
}

/// Reads up to the final GOAWAY. Returns its error code.
async fn goaway(io: &mut DuplexStream) -> u32 {
    let mut code = None;
    while let Some((kind, payload)) = read(io).await {
        if kind == GOAWAY {
            code = Some(u32::from_be_bytes(
                payload[4..8].try_into().expect("four bytes"),
            ));
        }
    }
    code.expect("there was a last word")
}

pub(crate) async fn begin(io: &mut (impl AsyncWrite + Unpin)) {
    io.write_all(PREFACE).await.expect("it is open");
    let settings = [frame(SETTINGS, 0, 0, &[]), frame(SETTINGS, ACK, 0, &[])];
    io.write_all(&settings.concat()).await.expect("it is open");
}

#[tokio::test(start_paused = true)]
async fn streams_reset_in_rapid_succession_end_the_connection() {
    let served = serve(http());
    let mut io = connect(&served).await;
    begin(&mut io).await;
    let (mut reader, mut writer) = tokio::io::split(io);

    let flood = tokio::spawn(async move {
        for stream in (1..20_000).step_by(2) {
            let begun = frame(HEADERS, END_STREAM_AND_HEADERS, stream, GET_NEVER);
            let reset = frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes());
            if writer.write_all(&[begun, reset].concat()).await.is_err() {
                return stream;
            }
        }
        20_000
    });
    let mut all = Vec::new();
    reader.read_to_end(&mut all).await.expect("it ends");

    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::CodecError);
    assert!(end.requests() < 1_000, "{} were begun", end.requests());
    assert!(flood.await.expect("it ran") < 20_000);
    // ENHANCE_YOUR_CALM
    let last = all.windows(4).any(|code| code == 11_u32.to_be_bytes());
    assert!(last, "it was not told why");
}

#[tokio::test(start_paused = true)]
async fn a_header_block_beyond_the_limit_is_refused() {
    let served = serve(http().configure(|hyper| {
        hyper.http2().max_header_list_size(4096);
    }));
    let mut io = connect(&served).await;
    begin(&mut io).await;

    // One literal field, 100 times, 99 bytes each.
    let mut block = GET_NEVER.to_vec();
    for _ in 0..100 {
        block.extend(b"\x00\x01x\x5f");
        block.extend([b'y'; 95]);
    }
    io.write_all(&frame(HEADERS, END_STREAM_AND_HEADERS, 1, &block))
        .await
        .expect("it is open");
    let answer = loop {
        match read(&mut io).await.expect("it goes on") {
            (HEADERS, block) => break block,
            _ => continue,
        }
    };
    drop(io);

    // `:status: 431`, a literal after the index of its name.
    assert!(
        answer.windows(3).any(|said| said == b"431") || answer.starts_with(b"\x48"),
        "{answer:?}"
    );
    assert_eq!(served.end().await.requests(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_header_block_without_end_ends_the_connection() {
    let served = serve(http());
    let mut io = connect(&served).await;
    begin(&mut io).await;
    let (mut reader, mut writer) = tokio::io::split(io);

    let flood = tokio::spawn(async move {
        let begun = frame(HEADERS, END_STREAM, 1, GET_NEVER);
        writer.write_all(&begun).await.expect("it is open");
        // One never-indexed field in each frame. No frame is the last one.
        let more = [b"\x10\x01x\x5f".as_slice(), &[b'y'; 95]].concat();
        for sent in 0..100_000 {
            let more = frame(CONTINUATION, 0, 1, &more);
            if writer.write_all(&more).await.is_err() {
                return sent;
            }
        }
        100_000
    });
    let mut all = Vec::new();
    reader.read_to_end(&mut all).await.expect("it ends");

    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::CodecError);
    assert_eq!(end.requests(), 0);
    // Frames still in the stream, and those read while the server lingers, count as sent.
    let sent = flood.await.expect("it ran");
    assert!(sent < 10_000, "{sent} were taken");
}

#[tokio::test(start_paused = true)]
async fn what_breaks_the_protocol_is_told_so() {
    let served = serve(http());
    let mut io = connect(&served).await;
    begin(&mut io).await;

    // Data for a stream that was never opened.
    io.write_all(&frame(0, 0, 1, b"x"))
        .await
        .expect("it is open");

    // PROTOCOL_ERROR
    assert_eq!(goaway(&mut io).await, 1);
    drop(io);
    assert_eq!(served.reason().await, EndReason::CodecError);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_leaves_within_a_frame_was_cut_off() {
    let get = frame(HEADERS, END_STREAM_AND_HEADERS, 1, GET_NEVER);
    for cut in 1..get.len() {
        let served = serve(http());
        let mut io = connect(&served).await;
        begin(&mut io).await;

        io.write_all(&get[..cut]).await.expect("it is open");
        io.shutdown().await.expect("it is open");

        let reason = served.reason().await;
        assert_eq!(reason, EndReason::Truncated, "behind {cut} bytes");
    }
}

/// Reads frames until `bytes` bytes of data have arrived.
async fn read_data(io: &mut DuplexStream, bytes: usize) {
    let mut left = bytes;
    while left > 0 {
        if let (DATA, payload) = read(io).await.expect("it goes on") {
            left -= payload.len();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_closes_has_left_if_a_response_is_unfinished() {
    // The window of a stream is 65,535 bytes.
    let service = service_fn(|request: Request<RequestBody>| async move {
        let len = match request.uri().path() {
            "/never" => pending().await,
            _ => 100_000,
        };
        Ok::<_, Infallible>(Response::new("x".repeat(len)))
    });
    let asked = frame(HEADERS, END_STREAM_AND_HEADERS, 1, GET_NEVER);
    let big = frame(HEADERS, END_STREAM_AND_HEADERS, 3, GET);
    let more = |stream: u32| frame(WINDOW_UPDATE, 0, stream, &100_000_u32.to_be_bytes());
    let cancel = frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes());
    let (left, closed) = (EndReason::PeerReset, EndReason::PeerClosed);
    for (what, sent, bytes, drains, reason) in [
        ("nothing was asked", vec![], 0, false, closed),
        ("no response", vec![&asked], 0, false, left),
        ("cancelled", vec![&asked, &cancel], 0, false, closed),
        ("half a response", vec![&big], 65_535, false, left),
        (
            "a response",
            vec![&big, &more(0), &more(3)],
            100_000,
            false,
            closed,
        ),
        (
            "one of two",
            vec![&asked, &big, &more(0), &more(3)],
            100_000,
            false,
            left,
        ),
        ("no response in a drain", vec![&asked], 0, true, left),
    ] {
        let served = serve(Http::new(service));
        let mut io = connect(&served).await;
        begin(&mut io).await;
        for frame in sent {
            io.write_all(frame).await.expect("it is open");
        }
        read_data(&mut io, bytes).await;
        settled().await;
        if drains {
            served.handle().connections().for_each(|live| live.close());
            settled().await;
        }

        io.shutdown().await.expect("it is open");

        assert_eq!(served.reason().await, reason, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_arrives_with_the_end_of_input_is_not_served() {
    let served = serve(http());
    let mut io = connect(&served).await;
    begin(&mut io).await;
    settled().await;
    let asked = frame(HEADERS, END_STREAM_AND_HEADERS, 1, GET);

    io.write_all(&asked).await.expect("it is open");
    io.shutdown().await.expect("it is open");

    let end = served.end().await;
    assert_eq!((end.reason(), end.requests()), (EndReason::PeerClosed, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tcp_too_a_peer_that_closes_before_its_response_has_left() {
    let server = Server::bind("127.0.0.1:0").await.expect("it is bound");
    let served = serve_with(server, (), http());
    let address = served.handle().local_addrs()[0].tcp().expect("it is TCP");
    for run in 0..50 {
        let mut io = TcpStream::connect(address).await.expect("it listens");
        begin(&mut io).await;
        for stream in (1..20).step_by(2) {
            let asked = frame(HEADERS, END_STREAM_AND_HEADERS, stream, GET_NEVER);
            io.write_all(&asked).await.expect("it is open");
        }
        let handle = served.handle();
        until(|| handle.connections().any(|live| live.requests() == 10)).await;

        io.shutdown().await.expect("it is open");

        assert_eq!(served.reason().await, EndReason::PeerReset, "{run}");
        until(|| handle.live() == 0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_preface_has_half_a_minute() {
    let served = serve(http());
    let mut io = connect(&served).await;
    let begun = Instant::now();

    io.write_all(&PREFACE[..10]).await.expect("it is open");
    let mut all = Vec::new();
    io.read_to_end(&mut all).await.expect("it ends");

    assert_eq!(begun.elapsed().as_secs(), 30);
    drop(io);
    assert_eq!(served.reason().await, EndReason::FrameTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_answers_no_ping_is_let_go() {
    let http = http().configure(|hyper| {
        let http2 = hyper.http2();
        http2.keep_alive_interval(Duration::from_secs(10));
        http2.keep_alive_timeout(Duration::from_secs(5));
    });
    let served = serve(http);
    let mut io = connect(&served).await;

    begin(&mut io).await;

    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::PeerReset);
    assert!(
        end.duration() < Duration::from_secs(20),
        "{:?}",
        end.duration()
    );
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_take_leave_is_let_go() {
    let served = serve(http());
    let mut io = connect(&served).await;

    // The peer answers no ping, by which hyper would learn that its GOAWAY has arrived.
    begin(&mut io).await;

    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::IdleTimeout);
    // 75 s idle, 3 s to acknowledge the GOAWAY.
    assert_eq!(end.duration().as_secs(), 78);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_take_leave_but_pings_is_let_go() {
    let served = serve(http());
    let mut io = connect(&served).await;
    begin(&mut io).await;
    let (mut reader, mut writer) = tokio::io::split(io);

    let pings = tokio::spawn(async move {
        for _ in 0..1_000 {
            if writer.write_all(&frame(PING, 0, 0, &[0; 8])).await.is_err() {
                break;
            }
            sleep(Duration::from_secs(1)).await;
        }
    });
    let mut all = Vec::new();
    reader.read_to_end(&mut all).await.expect("it ends");

    let end = served.end().await;
    assert_eq!(end.reason(), EndReason::IdleTimeout);
    // 75 s idle, 3 s to acknowledge the GOAWAY.
    assert_eq!(end.duration().as_secs(), 78);
    pings.await.expect("it ran");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_take_leave_at_a_drain_is_let_go() {
    let served = serve(http());
    let mut io = connect(&served).await;
    begin(&mut io).await;
    settled().await;
    let begun = Instant::now();

    served.handle().shutdown();

    assert_eq!(goaway(&mut io).await, 0);
    assert_eq!(begun.elapsed().as_secs(), 3);
    drop(io);
    assert_eq!(served.reason().await, EndReason::Drained);
    assert_eq!(served.handle().closed().await.drained, 1);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_its_answer_slowly_has_all_of_it_at_a_drain() {
    const WINDOW: u32 = 10;
    let served = serve(http());
    let mut io = connect(&served).await;
    begin(&mut io).await;
    let window = [&[0, 4][..], &WINDOW.to_be_bytes()].concat();
    let path = format!("/{}", "x".repeat(99));
    let get = [b"\x82\x86\x41\x01a\x44\x64", path.as_bytes()].concat();
    let get = frame(HEADERS, END_STREAM_AND_HEADERS, 1, &get);
    let request = [frame(SETTINGS, 0, 0, &window), get].concat();
    io.write_all(&request).await.expect("it is open");
    settled().await;

    served.handle().shutdown();
    let mut body = Vec::new();
    while let Some((kind, payload)) = read(&mut io).await {
        if kind == DATA {
            body.extend(payload);
            sleep(Duration::from_secs(2)).await;
            let more = frame(WINDOW_UPDATE, 0, 1, &WINDOW.to_be_bytes());
            io.write_all(&more).await.expect("it is open");
        }
    }

    assert_eq!(String::from_utf8(body).expect("it is text"), path);
    drop(io);
    assert_eq!(served.reason().await, EndReason::Drained);
}

#[tokio::test(start_paused = true)]
async fn a_draining_connection_without_streams_has_three_seconds_whatever_it_pings() {
    for aged in [false, true] {
        let deadlines = Deadlines::default().max_age(aged.then_some(Duration::from_secs(10)));
        let served = serve(http().deadlines(deadlines));
        let begun = Instant::now();
        let mut io = connect(&served).await;
        begin(&mut io).await;
        let (mut reader, mut writer) = tokio::io::split(io);
        tokio::spawn(async move {
            while writer.write_all(&frame(PING, 0, 0, &[1; 8])).await.is_ok() {
                sleep(Duration::from_millis(300)).await;
            }
        });
        tokio::spawn(async move { reader.read_to_end(&mut Vec::new()).await });
        settled().await;
        if !aged {
            served.handle().shutdown();
        }

        let reason = served.reason().await;

        let expected = if aged {
            (13, EndReason::MaxAge)
        } else {
            (3, EndReason::Drained)
        };
        assert_eq!((begun.elapsed().as_secs(), reason), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn pings_do_not_prolong_the_wait_for_a_body_that_another_task_does_not_read() {
    let holds = service_fn(|request: Request<RequestBody>| async move {
        tokio::spawn(async move {
            sleep(Duration::from_secs(1_000)).await;
            drop(request);
        });
        Ok::<_, Infallible>(Response::new(String::new()))
    });
    let served = serve(Http::new(holds));
    let mut io = connect(&served).await;
    begin(&mut io).await;
    let post = frame(HEADERS, END_HEADERS, 1, POST);
    io.write_all(&post).await.expect("it is open");
    let (mut reader, mut writer) = tokio::io::split(io);
    tokio::spawn(async move {
        while writer.write_all(&frame(PING, 0, 0, &[1; 8])).await.is_ok() {
            sleep(Duration::from_secs(1)).await;
        }
    });
    tokio::spawn(async move { reader.read_to_end(&mut Vec::new()).await });

    let end = served.end().await;

    assert_eq!(end.reason(), EndReason::IdleTimeout);
    // 75 s idle, and 3 s for the body behind the GOAWAY.
    assert_eq!(end.duration().as_secs(), 78);
}

/// The size in bytes of a buffer that holds only a few hundred small messages.
const LITTLE: usize = 4096;

/// Sends `count` frames of one byte, through a buffer of `buffer` bytes, to a service that reads
/// them a second later. Returns the number of bytes that the service read, or the reason why the
/// connection ended first.
async fn small_messages(count: u32, buffer: usize) -> Result<usize, EndReason> {
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    let late = service_fn(move |request: Request<RequestBody>| {
        let tell = tell.clone();
        async move {
            sleep(Duration::from_secs(1)).await;
            let read = request.into_body().collect().await;
            if let Ok(read) = read {
                tell.send(read.to_bytes().len()).await.expect("it waits");
            }
            Ok::<_, Infallible>(Response::new(String::new()))
        }
    });
    let (listener, connector) = memory_with_buffer(buffer);
    let served = serve_with(
        Server::builder().build(listener),
        connector,
        Http::new(late),
    );
    let mut io = connect(&served).await;
    begin(&mut io).await;
    let (mut reader, mut writer) = tokio::io::split(io);
    tokio::spawn(async move { reader.read_to_end(&mut Vec::new()).await });
    tokio::spawn(async move {
        let mut all = frame(HEADERS, 4, 1, POST);
        all.extend((1..count).flat_map(|_| frame(DATA, 0, 1, b"x")));
        all.extend(frame(DATA, END_STREAM, 1, b"x"));
        // The connection may end before all is written.
        _ = writer.write_all(&all).await;
        sleep(Duration::from_secs(60)).await;
    });
    tokio::select! {
        read = told.recv() => Ok(read.expect("it reads")),
        reason = served.reason() => Err(reason),
    }
}

#[tokio::test(start_paused = true)]
async fn thousands_of_small_messages_wait_for_a_service_that_reads_late() {
    assert_eq!(small_messages(30_000, LITTLE).await, Ok(30_000));
}

#[tokio::test(start_paused = true)]
async fn more_small_messages_than_may_wait_are_not_the_fault_of_the_peer() {
    // With the large buffer, h2 reads all of them before it hands the request to the service.
    for buffer in [LITTLE, 1024 * 1024] {
        let reason = small_messages(40_000, buffer).await;
        let reason = reason.expect_err("they are too many");
        assert_eq!(reason, EndReason::UnreadData);
        assert_eq!(reason.initiator(), Initiator::Server);
    }
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_resets_is_the_fault_of_the_peer_while_a_service_holds_a_body() {
    let served = serve(http());
    let mut io = connect(&served).await;
    begin(&mut io).await;
    let (mut reader, mut writer) = tokio::io::split(io);
    tokio::spawn(async move { reader.read_to_end(&mut Vec::new()).await });
    let held = b"\x83\x86\x41\x01a\x44\x06/never";
    let begun = writer.write_all(&frame(HEADERS, 4, 1, held)).await;
    begun.expect("it was open");
    settled().await;
    let mut all = Vec::new();
    for stream in (3..2_000_u32).step_by(2) {
        all.extend(frame(HEADERS, 4, stream, POST));
        all.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
    }
    // The connection may end before all is written.
    tokio::spawn(async move { writer.write_all(&all).await });

    let reason = served.reason().await;

    assert_eq!(reason, EndReason::CodecError);
    assert_eq!(reason.initiator(), Initiator::Peer);
}
