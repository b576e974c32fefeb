//! The peer of a connection: one task sends requests, another reads.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::STEP;
use super::random::Random;
use super::record::{Conn, Way};
use super::wire::{LINES, RAW, Request, put_frame};

/// Sends requests, then leaves in one of the possible ways.
pub(crate) async fn ask(conn: Arc<Conn>, write: WriteHalf<DuplexStream>, mut random: Random) {
    let reset_at = random.one_in(6).then(|| random.steps(100));
    let begun = Instant::now();
    let asking = ask_to_the_end(&conn, write, &mut random);
    match reset_at {
        None => asking.await,
        Some(at) => {
            drop(timeout(at, asking).await);
            sleep_until(begun + at).await;
            conn.did("reset");
            conn.log().was_reset = true;
            conn.reset.notify_one();
        }
    }
}

pub(crate) async fn ask_to_the_end(
    conn: &Conn,
    mut write: WriteHalf<DuplexStream>,
    random: &mut Random,
) {
    let one_at_a_time = conn.case.way == Way::OneAtATime;
    let mut leg = LINES;
    let mut bytes = Vec::new();
    for n in 0..10 + random.size(40) {
        if leg == RAW {
            let some = (0..random.size(50)).map(|_| random.next().to_le_bytes()[0]);
            let some: Vec<_> = some.collect();
            conn.did(format!("{} raw bytes", some.len()));
            conn.log().sent_raw.extend(&some);
            bytes.extend(some);
        } else {
            let delay = random.below(4).saturating_sub(1);
            let (what, times) = match random.below(64) {
                0..24 => ("one", 0),
                24..30 => ("none", 0),
                30..36 => ("several", random.size(5)),
                36..42 => ("stream", random.size(5)),
                42..46 => ("push", random.size(5)),
                46..50 => ("pause", random.size(5)),
                50..53 if one_at_a_time => ("mode", 1 + random.size(100)),
                53 if one_at_a_time => ("later", 1 + random.size(100)),
                54..56 if one_at_a_time => ("upgrade", 0),
                56 => ("close", random.size(3)),
                57 => ("fail", 0),
                58 => ("break", random.size(3)),
                59 if random.one_in(4) => ("pend", 0),
                _ => ("one", 0),
            };
            let rest = "y".repeat(random.size(30));
            let command = format!("{what} {delay} {times} {n} {rest}");
            conn.did(format!("{leg} {what} {delay} {times} {n}"));
            put_frame(leg, &command, &mut bytes);
            conn.log().sent[leg].push(Request::Command(command));
            if what == "mode" {
                let block: Vec<_> = (0..times)
                    .map(|_| *b"one 0 0 0 \n\0".get(random.size(12)).unwrap())
                    .collect();
                bytes.extend(&block);
                conn.log().sent[leg].push(Request::Block(block));
            }
            if what == "later" {
                // The decoder reads this in its old mode at first, where it is no whole frame.
                let block = vec![0xff; times];
                bytes.extend(&block);
                conn.log().sent[leg].push(Request::Block(block));
                if write.write_all(&std::mem::take(&mut bytes)).await.is_err() {
                    return;
                }
                while !conn.log().all_is_delivered(leg) {
                    sleep(STEP).await;
                }
            }
            if what == "upgrade" {
                leg = if conn.case.two_legs { leg + 1 } else { RAW };
            }
        }
        if random.one_in(3) {
            // In two pieces, so that frames are cut anywhere.
            let piece = random.size(bytes.len() as u64 + 1);
            for piece in [bytes.drain(..piece).collect(), std::mem::take(&mut bytes)] {
                let piece: Vec<u8> = piece;
                if write.write_all(&piece).await.is_err() {
                    return;
                }
                sleep(random.steps(3)).await;
            }
        }
    }
    if random.one_in(8) && leg != RAW {
        conn.did("part of a frame");
        conn.log().cut_short = true;
        bytes.extend(b"\0\x20or");
    }
    if write.write_all(&bytes).await.is_err() {
        return;
    }
    if !random.one_in(4) {
        conn.did("half-close");
        conn.log().half_closed = true;
        // The server may have closed already.
        drop(write.shutdown().await);
    }
}

/// Reads: at once, slowly, with pauses, or up to some point.
pub(crate) async fn read(conn: Arc<Conn>, mut read: ReadHalf<DuplexStream>, mut random: Random) {
    let slow = random.one_in(3);
    let stalls_at = random.one_in(12).then(|| random.size(1000));
    let mut buf = [0; 256];
    loop {
        if slow {
            sleep(random.steps(2)).await;
        }
        if random.one_in(50) {
            conn.did("reads no more for a while");
            sleep(random.steps(40)).await;
        }
        if stalls_at.is_some_and(|at| conn.log().read.len() >= at) {
            conn.did("reads no more");
            conn.log().stalled = true;
            tokio::select! {
                () = conn.reset.notified() => {}
                () = conn.over.notified() => {}
            }
            return;
        }
        let most = 1 + random.size(if slow { 64 } else { 256 });
        let n = tokio::select! {
            biased;
            () = conn.reset.notified() => return,
            n = read.read(&mut buf[..most]) => n.unwrap(),
        };
        if n == 0 {
            return;
        }
        conn.log().read.extend_from_slice(&buf[..n]);
    }
}
