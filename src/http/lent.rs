//! The stream while hyper works on it: lent, not given.
//!
//! hyper lets go of a stream when it is done with it, whatever lies unread in it, and hands it to whoever asked for an upgrade. Neither
//! may end a connection here: it closes in good order, and it is counted, drained and cut off by its own task. So the task keeps the
//! stream, and hyper gets the use of it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::connection::Connection;

/// The stream, in its owner's hands. Dropping this takes it away from the borrower.
pub(super) struct Owner<Io>(Arc<Loan<Io>>);

/// The use of the stream. Dropping this gives it back.
pub(super) struct Lent<Io>(Arc<Loan<Io>>);

struct Loan<Io> {
    held: Mutex<Held<Io>>,
    /// What is written is not taken.
    blocked: AtomicBool,
}

struct Held<Io> {
    conn: Option<Connection<Io>>,
    returned: bool,
    /// Two, because an upgraded stream may be split between two tasks.
    reader: Option<Waker>,
    writer: Option<Waker>,
    owner: Option<Waker>,
}

pub(super) fn lend<Io>(conn: Connection<Io>) -> (Owner<Io>, Lent<Io>) {
    let held = Held {
        conn: Some(conn),
        returned: false,
        reader: None,
        writer: None,
        owner: None,
    };
    let loan = Arc::new(Loan {
        held: Mutex::new(held),
        blocked: AtomicBool::new(false),
    });
    (Owner(Arc::clone(&loan)), Lent(loan))
}

impl<Io> Loan<Io> {
    fn lock(&self) -> MutexGuard<'_, Held<Io>> {
        // A stream that panicked is not used again: the panic has ended its connection.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        self.0.blocked.load(Ordering::Relaxed)
    }

    /// Waits until the stream comes back.
    pub(super) async fn returned(self) -> Option<Connection<Io>> {
        std::future::poll_fn(|cx| {
            let mut held = self.0.lock();
            if held.returned {
                return Poll::Ready(held.conn.take());
            }
            remember(&mut held.owner, cx);
            Poll::Pending
        })
        .await
    }
}

impl<Io> Drop for Owner<Io> {
    fn drop(&mut self) {
        let (conn, wakers) = {
            let mut held = self.0.lock();
            (held.conn.take(), [held.reader.take(), held.writer.take()])
        };
        drop(conn);
        // Whoever still has the use of it finds it gone.
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

impl<Io> Drop for Lent<Io> {
    fn drop(&mut self) {
        let owner = {
            let mut held = self.0.lock();
            held.returned = true;
            held.owner.take()
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
        let held = &mut *self.0.lock();
        let Some(conn) = &mut held.conn else {
            return Poll::Ready(Err(gone()));
        };
        let polled = read(Pin::new(conn), cx);
        if polled.is_pending() {
            remember(&mut held.reader, cx);
        }
        polled
    }

    fn write<T>(
        &self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut Connection<Io>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let held = &mut *self.0.lock();
        let Some(conn) = &mut held.conn else {
            return Poll::Ready(Err(gone()));
        };
        let polled = write(Pin::new(conn), cx);
        let blocked = polled.is_pending();
        self.0.blocked.store(blocked, Ordering::Relaxed);
        if blocked {
            remember(&mut held.writer, cx);
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
        let held = self.0.lock();
        held.conn
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
