//! Faults in a raw service of connections.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::time::{sleep, timeout};
use tower::util::BoxCloneService;
use tower::{Layer, service_fn};
use tower_tcp::deadline::{DeadlineLayer, Deadlines};
use tower_tcp::testkit::faults::{Faulty, Promise};
use tower_tcp::{BoxError, Connection, ConnectionEnded, ConnectionService, EndReason};

use super::{Table, check_echo};

type Conn = Connection<Faulty>;

/// Puts the default deadlines around a service.
fn in_time<S: ConnectionService<Faulty>>(service: S) -> impl ConnectionService<Faulty>
where
    S::Response: Send,
{
    DeadlineLayer::new(Deadlines::default()).layer(service)
}

async fn copy(mut conn: Conn) -> io::Result<()> {
    let mut buf = [0; 64];
    loop {
        let read = conn.read(&mut buf).await?;
        if read == 0 {
            return conn.shutdown().await;
        }
        conn.write_all(&buf[..read]).await?;
    }
}

pub(crate) fn right() -> impl ConnectionService<Faulty> {
    in_time(service_fn(copy))
}

fn has_no_deadlines() -> impl ConnectionService<Faulty> {
    service_fn(copy)
}

/// Answers what one read returns as if it were whole lines.
pub(crate) fn one_read_is_a_line() -> impl ConnectionService<Faulty> {
    in_time(service_fn(|mut conn: Conn| async move {
        let mut buf = [0; 64];
        loop {
            let read = conn.read(&mut buf).await?;
            if read == 0 {
                return io::Result::Ok(());
            }
            conn.write_all(&buf[..read]).await?;
            if buf[read - 1] != b'\n' {
                conn.write_all(b"\n").await?;
            }
        }
    }))
}

fn writes_once() -> impl ConnectionService<Faulty> {
    in_time(service_fn(|mut conn: Conn| async move {
        let mut input = Vec::new();
        conn.read_to_end(&mut input).await?;
        conn.write(&input).await.map(drop)
    }))
}

fn never_answers_after_a_half_close() -> impl ConnectionService<Faulty> {
    service_fn(|mut conn: Conn| async move {
        let mut input = Vec::new();
        conn.read_to_end(&mut input).await?;
        std::future::pending::<io::Result<()>>().await
    })
}

fn takes_a_pause_for_the_end() -> impl ConnectionService<Faulty> {
    in_time(service_fn(|mut conn: Conn| async move {
        let mut buf = [0; 64];
        let pause = Duration::from_millis(50);
        while let Ok(read) = timeout(pause, conn.read(&mut buf)).await {
            let read = read?;
            if read == 0 {
                break;
            }
            conn.write_all(&buf[..read]).await?;
        }
        io::Result::Ok(())
    }))
}

/// Tries again for ever after an error.
fn tries_again() -> impl ConnectionService<Faulty> {
    service_fn(|mut conn: Conn| async move {
        let mut buf = [0; 64];
        loop {
            match timeout(Duration::from_secs(60), conn.read(&mut buf)).await {
                Ok(Ok(0)) => return io::Result::Ok(()),
                Ok(Ok(read)) => {
                    let written = timeout(Duration::from_secs(60), conn.write_all(&buf[..read]));
                    written.await??;
                }
                Ok(Err(_)) => sleep(Duration::from_secs(1)).await,
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
    })
}

/// Holds replies back until a pause, and forgets them if the client finishes sending within a line.
pub(crate) fn forgets_replies_at_half_a_line() -> impl ConnectionService<Faulty> {
    in_time(service_fn(|conn: Conn| async move {
        let mut conn = BufReader::new(conn);
        let (mut replies, mut line) = (Vec::new(), Vec::new());
        loop {
            let more = conn.read_until(b'\n', &mut line);
            match timeout(Duration::from_secs(1), more).await {
                Ok(Ok(_)) if line.last() == Some(&b'\n') => replies.append(&mut line),
                Ok(Ok(_)) if !line.is_empty() => return io::Result::Ok(()),
                Ok(Ok(_)) => {
                    conn.write_all(&replies).await?;
                    return conn.shutdown().await;
                }
                Ok(Err(err)) => return Err(err),
                Err(_pause) => conn.write_all(&std::mem::take(&mut replies)).await?,
            }
        }
    }))
}

/// A panic poisons a lock that all connections share.
fn shares_a_lock() -> impl ConnectionService<Faulty> {
    let lock = Arc::new(Mutex::new(()));
    in_time(service_fn(move |mut conn: Conn| {
        let lock = Arc::clone(&lock);
        async move {
            let mut buf = [0; 64];
            loop {
                let read = std::future::poll_fn(|cx| {
                    let _locked = lock.lock().expect("a holder may have panicked");
                    let mut buf = tokio::io::ReadBuf::new(&mut buf);
                    let read = std::pin::Pin::new(&mut conn);
                    tokio::io::AsyncRead::poll_read(read, cx, &mut buf)
                        .map_ok(|()| buf.filled().len())
                });
                let read = read.await?;
                if read == 0 {
                    return io::Result::Ok(());
                }
                conn.write_all(&buf[..read]).await?;
            }
        }
    }))
}

/// Reports a reset as a deadline.
fn calls_a_reset_idle() -> impl ConnectionService<Faulty> {
    in_time(service_fn(|conn: Conn| async move {
        let idle = |err| ConnectionEnded::new(EndReason::IdleTimeout, err);
        copy(conn).await.map_err(idle)
    }))
}

/// Makes servers, of which only every other one reports errors.
pub(crate) fn reports_every_other_error() -> impl FnMut() -> BoxCloneService<Conn, (), BoxError> {
    let mut reports = false;
    move || {
        reports = !reports;
        let reports = reports;
        BoxCloneService::new(service_fn(move |conn: Conn| async move {
            let copied = timeout(Duration::from_secs(60), copy(conn)).await;
            match copied.map_err(|_late| ConnectionEnded::new(EndReason::IdleTimeout, "late"))? {
                Err(err) if reports => Err(err.into()),
                Ok(()) | Err(_) => Ok(()),
            }
        }))
    }
}

/// Sends lines back, or nothing at all if it `closes`.
pub(crate) fn right_unless(closes: bool) -> impl ConnectionService<Faulty> {
    in_time(service_fn(move |conn: Conn| async move {
        if closes { Ok(()) } else { copy(conn).await }
    }))
}

pub(crate) async fn find_all(table: &mut Table) {
    let found = check_echo(has_no_deadlines).await;
    table.found("raw: no deadlines", Promise::Ends, found);
    let found = check_echo(one_read_is_a_line).await;
    table.found("raw: takes a read for a line", Promise::Same, found);
    let found = check_echo(writes_once).await;
    table.found("raw: writes once", Promise::Same, found);
    let found = check_echo(never_answers_after_a_half_close).await;
    table.found("raw: hangs at a half-close", Promise::Ends, found);
    let found = check_echo(takes_a_pause_for_the_end).await;
    table.found("raw: takes a pause for the end", Promise::Same, found);
    let found = check_echo(tries_again).await;
    table.found("raw: tries again for ever", Promise::Ends, found);
    let found = check_echo(forgets_replies_at_half_a_line).await;
    table.found("raw: forgets replies", Promise::HalfClose, found);
    let found = check_echo(shares_a_lock).await;
    table.found("raw: a panic poisons a lock", Promise::Others, found);
    let found = check_echo(calls_a_reset_idle).await;
    table.found("raw: calls a reset idle", Promise::Reason, found);
    let found = check_echo(reports_every_other_error()).await;
    table.found("raw: reports every other error", Promise::Repeats, found);
}
