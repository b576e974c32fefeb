//! A million frames that are pushed between replies.

use std::convert::Infallible;

use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tower::service_fn;
use tower_tcp::Pipeline;
use tower_tcp::frame::Lines;

use super::NET;
use super::random::Random;
use super::support::{Clients, Ends, each_way};

/// The number of pushing tasks, of each task's pushes, and of the peer's requests between them: a
/// million frames over the three ways of dispatch.
pub(crate) const PUSHERS: usize = 4;
pub(crate) const PUSHES: usize = 72_000;
pub(crate) const REQUESTS: usize = 46_000;

/// A frame that cannot be mistaken for another, nor for a part of one.
pub(crate) fn frame(who: usize, n: usize) -> Bytes {
    let rest = (who * 17 + n * 31) % 60;
    format!("{who} {n} {}|", "x".repeat(rest)).into()
}

#[tokio::test(start_paused = true)]
pub(crate) async fn a_million_frames_that_are_pushed_between_replies_are_whole_and_in_order() {
    let make = service_fn(|peer: tower_tcp::Peer<Bytes>| async move {
        for who in 1..=PUSHERS {
            let peer = peer.clone();
            tokio::spawn(async move {
                let mut random = Random(who as u64);
                for n in 0..PUSHES {
                    peer.send(frame(who, n)).await.unwrap();
                    if random.one_in(8) {
                        tokio::task::yield_now().await;
                    }
                }
            });
        }
        Ok::<_, Infallible>(service_fn(|request: Bytes| async move {
            if request.ends_with(b"7") {
                tokio::task::yield_now().await;
            }
            Ok::<_, Infallible>(request)
        }))
    });

    for served in each_way(Pipeline::new(Lines::default).make_service(make)) {
        let (read, mut write) = tokio::io::split(served.client().await.0.into_inner());
        let asking = tokio::spawn(async move {
            for n in 0..REQUESTS {
                let request = format!("0 {n}\n");
                write.write_all(request.as_bytes()).await.unwrap();
            }
            write
        });
        let mut read = tokio::io::BufReader::new(read);
        let mut next = [0; 1 + PUSHERS];
        let mut late = std::collections::BTreeSet::new();
        let mut line = Vec::new();
        for _ in 0..REQUESTS + PUSHERS * PUSHES {
            line.clear();
            let reading = timeout(NET, read.read_until(b'\n', &mut line));
            reading.await.expect("it goes on").unwrap();
            let text = std::str::from_utf8(line.strip_suffix(b"\n").unwrap()).unwrap();
            let mut words = text.split(' ');
            let who: usize = words.next().unwrap().parse().unwrap();
            let n: usize = words.next().unwrap().parse().unwrap();

            let in_order = who > 0 || served.way() != "multiplexed";
            if in_order {
                assert_eq!(n, next[who], "{}: {text:?}", served.way());
                next[who] += 1;
            } else {
                assert!(late.insert(n), "{}: {text:?} came twice", served.way());
            }
            let whole = if who == 0 {
                text.ends_with(&n.to_string())
            } else {
                text.as_bytes() == frame(who, n)
            };
            assert!(whole, "{}: {text:?}", served.way());
        }
        assert_eq!(next[0] + late.len(), REQUESTS, "{}", served.way());
        asking.await.unwrap();
    }
}
