//! The rest of the program: tasks that hold a connection's `Peer` and use it.

use std::sync::Arc;

use tokio::time::{Instant, sleep, timeout};
use tower_tcp::pipeline::{Closed, TrySendError, Watermarks};

use super::random::Random;
use super::record::{Conn, Message};
use super::service::{next_push, resume, try_push};
use super::{NET, Peer, STEP};

/// Runs random operations on a connection's `Peer`, until the connection has ended.
pub(crate) async fn program(
    peer: Peer,
    conn: Arc<Conn>,
    leg: usize,
    of: usize,
    mut random: Random,
) {
    let mut timers = Vec::new();
    for n in 0..random.size(30) {
        sleep(random.steps(4)).await;
        if conn.is_odd() {
            // The `look` of another task ended a wait of this task.
            sleep(STEP / 2).await;
        }
        if !conn.log().ends.is_empty() && random.one_in(4) {
            break;
        }
        match random.below(40) {
            0..8 => {
                let out = next_push(&conn, leg, of);
                let patience = if random.one_in(4) { STEP } else { NET };
                let sent = timeout(patience, peer.send(out)).await;
                if sent == Ok(Ok(())) {
                    conn.log().legs[leg].pushed.entry(of).or_default().taken += 1;
                }
                conn.did(format!("{leg}.{of} send: {sent:?}"));
            }
            8..14 => {
                let taken = try_push(&peer, &conn, leg, of);
                conn.did(format!("{leg}.{of} try_send: {taken}"));
            }
            14..17 => {
                conn.log().legs[leg].flushing += 1;
                let flushed = peer.flushed().await;
                conn.log().legs[leg].flushing -= 1;
                conn.did(format!("{leg}.{of} flushed: {flushed:?}"));
                if flushed.is_ok() {
                    let leg = &mut conn.log().legs[leg];
                    let written = leg.written;
                    let pushed = leg.pushed.entry(of).or_default();
                    assert_eq!(pushed.encoded, pushed.taken, "flushed before it is encoded");
                    assert!(pushed.end <= written, "flushed before it is written");
                }
            }
            17..20 => {
                let message = Message::new(&conn, leg, of, n, None);
                let sent = timeout(random.steps(5) + STEP, peer.post(message)).await;
                if sent != Ok(Ok(())) {
                    // Its drop was counted, but it was never sent.
                    conn.log().legs[leg].undelivered -= 1;
                }
                conn.did(format!("{leg}.{of} message {n}: {sent:?}"));
            }
            20..23 => {
                let message = Message::new(&conn, leg, of, n, None);
                let sent = peer.try_post(message);
                conn.did(format!("{leg}.{of} try_post {n}: {sent:?}"));
                if let Err(refused) = sent {
                    refused.into_inner().settle();
                }
            }
            23..26 => {
                let time = random.steps(10);
                let due = Instant::now() + time;
                let message = Message::new(&conn, leg, of, n, Some(due));
                let set = peer.post_after(time, message);
                let is_set = set.is_ok();
                conn.did(format!("{leg}.{of} post_after {n}, {time:?}: {is_set}"));
                match set {
                    Ok(timer) => timers.push(timer),
                    Err(refused) => refused.into_inner().settle(),
                }
            }
            26..28 => {
                let cancelled = timers.pop().and_then(|timer| timer.cancel());
                conn.did(format!("{leg}.{of} cancel: {}", cancelled.is_some()));
                if let Some(message) = cancelled {
                    message.settle();
                }
            }
            28..30 => {
                conn.did(format!("{leg}.{of} pause_input"));
                peer.pause_input();
                conn.log().legs[leg].paused = true;
                sleep(random.steps(6)).await;
                conn.did(format!("{leg}.{of} resume_input"));
                resume(&peer, &conn, leg);
            }
            30..32 => {
                let marks = marks(&mut random);
                conn.did(format!("{leg}.{of} set_watermarks {marks:?}"));
                peer.set_watermarks(marks);
                let leg = &mut conn.log().legs[leg];
                leg.marks = marks;
                leg.marks_set += 1;
                leg.look_at_marks();
            }
            32 if random.one_in(6) => {
                conn.did(format!("{leg}.{of} close"));
                conn.log().closed = true;
                peer.close();
                let refused = peer.flushed().await;
                assert_eq!(refused, Err(Closed), "it was closed");
            }
            33 if random.one_in(12) => {
                conn.did(format!("{leg}.{of} abort"));
                conn.log().aborted = true;
                peer.abort();
            }
            _ => {
                sleep(STEP / 2).await;
                look(&peer, &conn, leg, of);
                sleep(STEP / 2).await;
            }
        }
    }
    let end = peer.closed().await;
    assert_eq!(conn.log().ends.len(), 1, "it ended, once");
    assert_eq!(conn.log().ends[0].reason(), end.reason());
    assert!(matches!(
        peer.try_send(next_push(&conn, leg, of)),
        Err(TrySendError::Closed(_))
    ));
}

/// Checks the output at a moment when nothing happens.
pub(crate) fn look(peer: &Peer, conn: &Arc<Conn>, leg: usize, of: usize) {
    let (unwritten, marks, flushing) = {
        let log = conn.log();
        let it = &log.legs[leg];
        if log.legs.len() > leg + 1 || log.sent_raw.len() + log.read_raw.len() > 0 {
            // After an upgrade another service writes.
            return;
        }
        (it.unwritten(), it.marks, it.flushing)
    };
    // Another task may call `look` at the same moment.
    let has_room = peer.buffered().frames() + flushing == 0;
    let sent = peer.try_send(next_push(conn, leg, of));
    conn.did(format!("{leg}.{of} look at {unwritten}: {sent:?}"));
    match sent {
        Ok(()) => {
            assert!(unwritten < marks.high(), "it is above the high mark");
            conn.log().legs[leg].pushed.entry(of).or_default().taken += 1;
        }
        Err(TrySendError::Full(_)) => {
            assert!(
                unwritten > marks.low() || !has_room,
                "it is below the low mark"
            );
        }
        Err(TrySendError::Closed(_)) => return,
    }
    assert_eq!(peer.buffered().bytes(), unwritten);
    assert_eq!(peer.watermarks(), marks);
}

pub(crate) fn marks(random: &mut Random) -> Watermarks {
    let low = random.size(300);
    Watermarks::new(low, low + 100 + random.size(1000)).unwrap()
}
