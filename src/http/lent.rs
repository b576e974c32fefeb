//! Lends the stream to hyper, instead of giving it away.
//!
//! When hyper is done with a stream, hyper drops it, even if it contains unread bytes. hyper passes
//! an upgraded stream to another task. Neither the drop nor the upgrade may end a connection of
//! this crate, because the connection's own task counts, drains, aborts and gracefully closes it.
//! So a stream that hyper drops is returned to the connection's task, and an upgraded stream is
//! kept where the connection's task can take it away.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::ahead::{Ahead, First};
use super::progress::Progress;
use crate::connection::Connection;

/// The owner's side of the loan. The owner is the connection's task. Dropping this side takes an
/// upgraded stream away from the borrower.
pub(super) struct Owner<Io>(Arc<Loan<Io>>);

/// The borrower's side of the loan. The borrower is hyper at first. After an upgrade it is the task
/// that uses the stream. Dropping this side returns the stream.
pub(super) struct Lent<Io> {
    /// The stream, until it is upgraded. Until then the borrower and the owner are in the same
    /// task, so no lock is needed.
    conn: Option<Box<Connection<Io>>>,
    ahead: Ahead,
    progress: Arc<Progress>,
    loan: Arc<Loan<Io>>,
}

struct Loan<Io>(Mutex<Held<Io>>);

struct Held<Io> {
    conn: Option<Box<Connection<Io>>>,
    returned: bool,
    /// The reader and the writer have separate wakers, because an upgraded stream may be split
    /// between two tasks.
    reader: Option<Waker>,
    writer: Option<Waker>,
    owner: Option<Waker>,
}

pub(super) fn lend<Io>(
    conn: Box<Connection<Io>>,
    progress: &Arc<Progress>,
) -> (Owner<Io>, Lent<Io>) {
    let loan = Arc::new(Loan(Mutex::new(Held {
        conn: None,
        returned: false,
        reader: None,
        writer: None,
        owner: None,
    })));
    let lent = Lent {
        conn: Some(conn),
        ahead: Ahead::default(),
        progress: Arc::clone(progress),
        loan: Arc::clone(&loan),
    };
    (Owner(loan), lent)
}

impl<Io> Loan<Io> {
    fn lock(&self) -> MutexGuard<'_, Held<Io>> {
        // If a stream panics while this lock is held, the panic ends its connection, so the stream
        // is not used again.
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
    /// Waits until the stream is returned.
    pub(super) fn poll_returned(&self, cx: &mut Context<'_>) -> Poll<Option<Box<Connection<Io>>>> {
        let mut held = self.0.lock();
        if held.returned {
            return Poll::Ready(held.conn.take());
        }
        remember(&mut held.owner, cx);
        Poll::Pending
    }

    /// Takes the stream back. After an upgrade, this makes the borrower's reads and writes fail.
    ///
    /// Returns `None` if the stream was already taken. Before the stream is upgraded or returned,
    /// the borrower keeps it, and this method also returns `None`.
    pub(super) fn take_away(&self) -> Option<Box<Connection<Io>>> {
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
    /// Polls the stream. `waker` selects the reader's or the writer's waker, which is woken if the
    /// stream is taken away while the task waits.
    #[inline]
    fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        waker: fn(&mut Held<Io>) -> &mut Option<Waker>,
        poll: impl FnOnce(Pin<&mut Connection<Io>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut self.conn {
            Some(conn) if !self.progress.upgrades.load(Ordering::Acquire) => {
                poll(Pin::new(&mut **conn), cx)
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
        // hyper's next write is the response that agrees to the upgrade. So the stream moves into
        // the lock before another task can use it.
        if let Some(conn) = self.conn.take() {
            self.ahead.unwatch();
            held.conn = Some(conn);
        }
        let Some(conn) = &mut held.conn else {
            return Poll::Ready(Err(taken_away()));
        };
        let polled = poll(Pin::new(&mut **conn), cx);
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

impl<Io: AsyncRead + Unpin> Lent<Io> {
    /// Returns whether input, or its end, has been read ahead and waits for hyper.
    pub(super) fn has_input(&self) -> bool {
        self.ahead.has_input()
    }

    /// Puts back bytes that hyper has read and not used.
    pub(super) fn put_back(&mut self, bytes: &[u8]) {
        self.ahead.unwatch();
        self.ahead.put_back(bytes);
    }

    /// Waits for the first bytes of a request or for the end of input, while hyper is not set up.
    pub(super) fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<First> {
        match &mut self.conn {
            Some(conn) => self.ahead.poll_first(conn, cx),
            None => Poll::Ready(First::Http1),
        }
    }

    /// Completes once the peer of an HTTP/1 request in progress can no longer be reached.
    #[inline]
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match &mut self.conn {
            Some(conn) if self.progress.is_answering_http1() => {
                // hyper notices the end of input itself while it reads a body. Once the body is
                // read or dropped, hyper waits for the service and may leave later input unread.
                let is_reading = self.progress.is_reading.load(Ordering::Relaxed);
                if is_reading && self.progress.has_unread_bodies() {
                    return Poll::Pending;
                }
                self.ahead.poll_gone(conn, &self.progress, cx)
            }
            _ => {
                self.ahead.unwatch();
                Poll::Pending
            }
        }
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
        let read = match self.ahead.read(buf) {
            Some(read) => Poll::Ready(read),
            None => self.poll(
                cx,
                |held| &mut held.reader,
                |conn, cx| conn.poll_read(cx, buf),
            ),
        };
        let is_reading = &self.progress.is_reading;
        is_reading.store(read.is_pending(), Ordering::Relaxed);
        // While the rest of a body is due, there is usually no response that could carry the
        // acknowledgement of the bytes that have arrived, so it is sent at once. HTTP/2 is left
        // out, because most of its clients set `TCP_NODELAY`.
        let progress = &self.progress;
        if read.is_pending() && progress.has_unread_bodies() && !progress.is_multiplexed() {
            progress.life().probe.acknowledge();
        }
        read
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Lent<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.progress.note_write(buf);
        self.poll_output(cx, |conn, cx| conn.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(last) = bufs.last() {
            self.progress.note_write(last);
        }
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
        let flushed = self.poll_output(cx, |conn, cx| conn.poll_flush(cx));
        // hyper flushes at the end of each of its polls, so the peer is checked here.
        if let Poll::Ready(gone) = self.poll_gone(cx) {
            return Poll::Ready(Err(gone));
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_output(cx, |conn, cx| conn.poll_shutdown(cx))
    }
}
