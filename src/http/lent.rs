//! The stream while hyper works on it: lent, not given.
//!
//! hyper lets go of a stream when it is done with it, whatever lies unread in it, and hands it to whoever asked for an upgrade. Neither may
//! end a connection here: it closes in good order, and it is counted, drained and cut off by its own task. So the stream comes back to
//! that task, and one that is to be upgraded is kept where the task can take it away.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::requests::Progress;
use crate::connection::Connection;

/// The claim to the stream. Dropping it takes the stream away from the borrower.
pub(super) struct Owner<Io>(Arc<Loan<Io>>);

/// The use of the stream. Dropping it gives the stream back.
pub(super) struct Lent<Io> {
    /// Until it is to be upgraded: up to then borrower and owner are one task.
    conn: Option<Connection<Io>>,
    progress: Arc<Progress>,
    loan: Arc<Loan<Io>>,
}

struct Loan<Io>(Mutex<Held<Io>>);

struct Held<Io> {
    conn: Option<Connection<Io>>,
    returned: bool,
    /// Two, because an upgraded stream may be split between two tasks.
    reader: Option<Waker>,
    writer: Option<Waker>,
    owner: Option<Waker>,
}

pub(super) fn lend<Io>(conn: Connection<Io>, progress: &Arc<Progress>) -> (Owner<Io>, Lent<Io>) {
    let loan = Arc::new(Loan(Mutex::new(Held {
        conn: None,
        returned: false,
        reader: None,
        writer: None,
        owner: None,
    })));
    let lent = Lent {
        conn: Some(conn),
        progress: Arc::clone(progress),
        loan: Arc::clone(&loan),
    };
    (Owner(loan), lent)
}

impl<Io> Loan<Io> {
    fn lock(&self) -> MutexGuard<'_, Held<Io>> {
        // A stream that panicked is not used again: the panic has ended its connection.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn remember(waker: &mut Option<Waker>, cx: &Context<'_>) {
    match waker {
        Some(waker) => waker.clone_from(cx.waker()),
        none => *none = Some(cx.waker().clone()),
    }
}

impl<Io> Owner<Io> {
    /// Waits until the stream comes back.
    pub(super) fn poll_returned(&self, cx: &mut Context<'_>) -> Poll<Option<Connection<Io>>> {
        let mut held = self.0.lock();
        if held.returned {
            return Poll::Ready(held.conn.take());
        }
        remember(&mut held.owner, cx);
        Poll::Pending
    }

    /// Takes the stream away from the borrower, who finds it gone. `None` if it never left, or is gone already.
    pub(super) fn take_away(&self) -> Option<Connection<Io>> {
        let (conn, wakers) = {
            let mut held = self.0.lock();
            (held.conn.take(), [held.reader.take(), held.writer.take()])
        };
        wakers.into_iter().flatten().for_each(Waker::wake);
        conn
    }
}

impl<Io> Drop for Owner<Io> {
    fn drop(&mut self) {
        drop(self.take_away());
    }
}

impl<Io> Drop for Lent<Io> {
    fn drop(&mut self) {
        let owner = {
            let mut held = self.loan.lock();
            if let Some(conn) = self.conn.take() {
                held.conn = Some(conn);
            }
            held.returned = true;
            held.owner.take()
        };
        if let Some(owner) = owner {
            owner.wake();
        }
    }
}

impl<Io: Unpin> Lent<Io> {
    /// Polls the stream; `waker` is who is to be told when it is taken away meanwhile.
    #[inline]
    fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        waker: fn(&mut Held<Io>) -> &mut Option<Waker>,
        poll: impl FnOnce(Pin<&mut Connection<Io>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut self.conn {
            Some(conn) if !self.progress.upgrades.load(Ordering::Acquire) => {
                poll(Pin::new(conn), cx)
            }
            _ => self.poll_upgraded(cx, waker, poll),
        }
    }

    #[inline(never)]
    fn poll_upgraded<T>(
        &mut self,
        cx: &mut Context<'_>,
        waker: fn(&mut Held<Io>) -> &mut Option<Waker>,
        poll: impl FnOnce(Pin<&mut Connection<Io>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let held = &mut *self.loan.lock();
        // The answer that agrees to the upgrade is written next, so it is here before anybody else has it.
        if let Some(conn) = self.conn.take() {
            held.conn = Some(conn);
        }
        let Some(conn) = &mut held.conn else {
            return Poll::Ready(Err(taken_away()));
        };
        let polled = poll(Pin::new(conn), cx);
        if polled.is_pending() {
            remember(waker(held), cx);
        }
        polled
    }

    fn poll_output<T>(
        &mut self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(Pin<&mut Connection<Io>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        self.poll(cx, |held| &mut held.writer, poll)
    }
}

fn taken_away() -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        "the server has ended the connection",
    )
}

impl<Io: AsyncRead + Unpin> AsyncRead for Lent<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll(
            cx,
            |held| &mut held.reader,
            |conn, cx| conn.poll_read(cx, buf),
        )
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Lent<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_output(cx, |conn, cx| conn.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_output(cx, |conn, cx| conn.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.conn {
            Some(conn) => conn.is_write_vectored(),
            None => {
                let held = self.loan.lock();
                held.conn
                    .as_ref()
                    .is_some_and(AsyncWrite::is_write_vectored)
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_output(cx, |conn, cx| conn.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_output(cx, |conn, cx| conn.poll_shutdown(cx))
    }
}
