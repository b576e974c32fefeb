//! The stream while hyper works on it: lent, not given.
//!
//! hyper lets go of a stream when it is done with it, whatever lies unread in it, and hands it to whoever asked for an upgrade. Neither
//! may end a connection here: it closes in good order, and it is counted, drained and cut off by its own task. So the task keeps the
//! stream, and hyper gets the use of it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::connection::Connection;

/// The stream, in its owner's hands. Dropping this takes it away from the borrower.
pub(super) struct Owner<Io>(Arc<Mutex<Loan<Io>>>);

/// The use of the stream. Dropping this gives it back.
pub(super) struct Lent<Io>(Arc<Mutex<Loan<Io>>>);

struct Loan<Io> {
    conn: Option<Connection<Io>>,
    returned: bool,
    /// What is written is not taken.
    blocked: bool,
    /// Two, because an upgraded stream may be split between two tasks.
    reader: Option<Waker>,
    writer: Option<Waker>,
    owner: Option<Waker>,
}

pub(super) fn lend<Io>(conn: Connection<Io>) -> (Owner<Io>, Lent<Io>) {
    let loan = Arc::new(Mutex::new(Loan {
        conn: Some(conn),
        returned: false,
        blocked: false,
        reader: None,
        writer: None,
        owner: None,
    }));
    (Owner(Arc::clone(&loan)), Lent(loan))
}

fn lock<Io>(loan: &Mutex<Loan<Io>>) -> MutexGuard<'_, Loan<Io>> {
    // A stream that panicked is not read again: what it panicked under has ended the connection.
    loan.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remember(waker: &mut Option<Waker>, cx: &Context<'_>) {
    match waker {
        Some(waker) => waker.clone_from(cx.waker()),
        none => *none = Some(cx.waker().clone()),
    }
}

impl<Io> Owner<Io> {
    /// Returns whether the peer does not take what is written to it.
    pub(super) fn is_blocked(&self) -> bool {
        lock(&self.0).blocked
    }

    /// Waits until the stream comes back.
    pub(super) async fn returned(self) -> Option<Connection<Io>> {
        std::future::poll_fn(|cx| {
            let mut loan = lock(&self.0);
            if loan.returned {
                return Poll::Ready(loan.conn.take());
            }
            remember(&mut loan.owner, cx);
            Poll::Pending
        })
        .await
    }
}

impl<Io> Drop for Owner<Io> {
    fn drop(&mut self) {
        let (conn, wakers) = {
            let mut loan = lock(&self.0);
            (loan.conn.take(), [loan.reader.take(), loan.writer.take()])
        };
        drop(conn);
        // Whoever still has the use of it finds it gone.
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

impl<Io> Drop for Lent<Io> {
    fn drop(&mut self) {
        let owner = {
            let mut loan = lock(&self.0);
            loan.returned = true;
            loan.owner.take()
        };
        if let Some(owner) = owner {
            owner.wake();
        }
    }
}

impl<Io: Unpin> Lent<Io> {
    fn read<T>(
        &self,
        cx: &mut Context<'_>,
        read: impl FnOnce(Pin<&mut Connection<Io>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let loan = &mut *lock(&self.0);
        let Some(conn) = &mut loan.conn else {
            return Poll::Ready(Err(gone()));
        };
        let polled = read(Pin::new(conn), cx);
        if polled.is_pending() {
            remember(&mut loan.reader, cx);
        }
        polled
    }

    fn write<T>(
        &self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut Connection<Io>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let loan = &mut *lock(&self.0);
        let Some(conn) = &mut loan.conn else {
            return Poll::Ready(Err(gone()));
        };
        let polled = write(Pin::new(conn), cx);
        loan.blocked = polled.is_pending();
        if loan.blocked {
            remember(&mut loan.writer, cx);
        }
        polled
    }
}

fn gone() -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        "the server has ended the connection",
    )
}

impl<Io: AsyncRead + Unpin> AsyncRead for Lent<Io> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.read(cx, |conn, cx| conn.poll_read(cx, buf))
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Lent<Io> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, |conn, cx| conn.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, |conn, cx| conn.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        let loan = lock(&self.0);
        loan.conn
            .as_ref()
            .is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write(cx, |conn, cx| conn.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write(cx, |conn, cx| conn.poll_shutdown(cx))
    }
}
