//! Memory: what a peer can make the server hold is bounded, and a request one at a time allocates nothing.
#![expect(
    clippy::unwrap_used,
    reason = "a failure in a helper is a failure of the test"
)]

mod support;

use std::alloc::System;
use std::future::ready;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Mutex as Turn, MutexGuard};
use tokio::time::sleep;
use tokio_util::codec::LengthDelimitedCodec;
use tower::service_fn;
use tower_tcp::frame::{Block, Lines};
use tower_tcp::pipeline::Limits;
use tower_tcp::{BoxError, Pipeline};

use support::{Served, each_way, serve};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const MS: Duration = Duration::from_millis(1);

/// The counts are the process's: one test at a time.
async fn my_turn() -> MutexGuard<'static, ()> {
    static TURN: Turn<()> = Turn::const_new(());
    TURN.lock().await
}

/// The bytes that are allocated at the moment.
fn held() -> isize {
    let stats = ALLOCATOR.stats();
    let bytes = |n: usize| isize::try_from(n).unwrap();
    bytes(stats.bytes_allocated) - bytes(stats.bytes_deallocated) + stats.bytes_reallocated
}

async fn echo(line: Bytes) -> Result<Bytes, BoxError> {
    Ok(line)
}

/// Has 10,000 requests answered, a hundred at once, and returns how many allocations each took.
async fn allocations_a_request(served: Served) -> f64 {
    let mut client = served.connect().await.0.into_inner();
    let requests = b"fifteen letters\n".repeat(100);
    let mut replies = vec![0; requests.len()];
    let mut exchange = async || {
        for _ in 0..100 {
            client.write_all(&requests).await.unwrap();
            client.read_exact(&mut replies).await.unwrap();
        }
    };
    // The stream in memory and the thread's blocks take what they need.
    exchange().await;
    let before = ALLOCATOR.stats();

    exchange().await;

    let after = ALLOCATOR.stats();
    let allocations = after.allocations + after.reallocations;
    (allocations - before.allocations - before.reallocations) as f64 / 10_000.0
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_answered_at_once_allocates_nothing() {
    let _turn = my_turn().await;
    for served in each_way(Pipeline::new(Lines::default).service(service_fn(echo))) {
        let way = served.way;

        let allocations = allocations_a_request(served).await;

        assert!(allocations < 0.02, "{allocations} a request, {way}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_allocates_nothing_alone_and_once_among_others() {
    let _turn = my_turn().await;
    let service = service_fn(async |line: Bytes| {
        tokio::task::yield_now().await;
        echo(line).await
    });
    for served in each_way(Pipeline::new(Lines::default).service(service)) {
        let way = served.way;

        let allocations = allocations_a_request(served).await;

        let most = if way == "one at a time" { 0.05 } else { 1.05 };
        assert!(allocations < most, "{allocations} a request, {way}");
    }
}

/// Sends 400,000 lines and reads nothing; returns how many bytes the server took, and what it holds for it.
async fn never_read(served: &Served) -> (usize, isize) {
    let mut client = served.connect().await.0.into_inner();
    sleep(MS).await;
    let before = held();
    let lines = "fifteen letters\n".repeat(1000);
    let mut sent = 0;
    for _ in 0..400 {
        match tokio::time::timeout(MS, client.write(lines.as_bytes())).await {
            Ok(written) => sent += written.unwrap(),
            Err(_full) => break,
        }
    }
    let held = held() - before;
    drop(client);
    (sent, held)
}

#[tokio::test(start_paused = true)]
async fn j1_a_peer_that_never_reads_is_read_no_more() {
    let _turn = my_turn().await;

    for served in each_way(Pipeline::new(Lines::default).service(service_fn(echo))) {
        never_read(&served).await;
        let (sent, held) = never_read(&served).await;

        // Two buffers of 64 KiB in memory, the high mark, what is read ahead, and a block in use; and what grows does so
        // by doubling.
        assert!(sent < 500_000, "{}: took {sent}", served.way);
        assert!(held < 1_000_000, "{}: holds {held}", served.way);
    }
}

#[tokio::test(start_paused = true)]
async fn c3_announced_lengths_cost_nothing_before_the_bytes_come() {
    let _turn = my_turn().await;
    let codec = || {
        LengthDelimitedCodec::builder()
            .max_frame_length(8 << 20)
            .new_codec()
    };
    let service = service_fn(|frame: BytesMut| ready(Ok::<_, BoxError>(frame.freeze())));
    let pipeline = Pipeline::new(codec)
        .service(service)
        .limits(Limits::default().max_frame(8 << 20));

    for served in each_way(pipeline) {
        let mut clients = Vec::new();
        for _ in 0..1000 {
            let client = served.connect().await.0.into_inner();
            clients.push(client);
        }
        // Each has answered once, so that what a connection needs anyway is there.
        for client in &mut clients {
            client.write_all(&[0, 0, 0, 1, b'x']).await.unwrap();
            client.read_exact(&mut [0; 5]).await.unwrap();
        }
        let before = held();

        for client in &mut clients {
            client
                .write_all(&(8_u32 << 20).to_be_bytes())
                .await
                .unwrap();
        }
        sleep(MS).await;

        let each = (held() - before) / 1000;
        assert!(each <= 16 * 1024, "{}: {each} bytes each", served.way);
    }
}

#[tokio::test(start_paused = true)]
async fn kept_frames_of_many_connections_share_their_blocks() {
    let _turn = my_turn().await;
    let kept = Arc::new(Mutex::new(Vec::with_capacity(1000)));
    let keeps = Arc::clone(&kept);
    let service = service_fn(move |frame: Bytes| {
        keeps.lock().unwrap().push(frame);
        ready(Ok::<_, BoxError>(Bytes::from_static(&[b'k'; 16])))
    });
    let block = || Block::new(std::num::NonZeroUsize::new(16).unwrap());
    let served = serve(Pipeline::new(block).service(service));
    let mut clients = Vec::new();
    for _ in 0..1000 {
        let mut client = served.connect().await.0.into_inner();
        client.write_all(&[b'x'; 16]).await.unwrap();
        client.read_exact(&mut [0; 16]).await.unwrap();
        clients.push(client);
    }
    sleep(MS).await;
    assert_eq!(kept.lock().unwrap().len(), 1000);
    let before = held();

    // What is given back is what they alone have held.
    kept.lock().unwrap().clear();

    let blocks = (before - held()) / (64 * 1024);
    assert!(blocks <= 4, "1,000 frames of 16 bytes held {blocks} blocks");
}
