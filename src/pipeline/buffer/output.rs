//! Bytes that are encoded but not yet written.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::AsyncWrite;

/// The initial size, in bytes, of the thread's block. It grows as needed.
const BLOCK: usize = 16 * 1024;

/// The maximum capacity, in bytes, of a block that the thread keeps for reuse.
const LARGEST_KEPT: usize = 128 * 1024;

/// The unused capacity, in bytes, that a buffer of pending output may keep. If a sixteenth of the
/// content is more, the buffer may keep that much. The content of a buffer with more unused
/// capacity (a block that is mostly empty, or a buffer that has grown by doubling) is copied to a
/// smaller buffer.
const SLACK: usize = 4 * 1024;

thread_local! {
    static THREAD_BLOCK: Cell<BytesMut> = Cell::new(BytesMut::new());
}

/// The unwritten output of one connection. It holds no memory while it is empty.
#[derive(Debug, Default)]
pub(in crate::pipeline) struct Output {
    buf: BytesMut,
    /// The number of bytes written to the stream. The stream may still hold bytes that are not
    /// flushed, as a TLS stream does.
    written: u64,
    flushed: u64,
}

impl Output {
    pub(in crate::pipeline) fn len(&self) -> usize {
        self.buf.len()
    }

    /// Returns whether there is nothing left to write or to flush.
    pub(in crate::pipeline) fn is_flushed(&self) -> bool {
        self.buf.is_empty() && self.flushed == self.written
    }

    /// Returns the position of the next frame, counted in bytes from the beginning of all output.
    pub(in crate::pipeline) fn position(&self) -> u64 {
        self.written + self.buf.len() as u64
    }

    /// Returns the position up to which output is written and flushed.
    pub(in crate::pipeline) fn flushed(&self) -> u64 {
        self.flushed
    }

    /// Encodes one frame, completely or not at all.
    #[inline]
    pub(in crate::pipeline) fn encode<E>(
        &mut self,
        encode: impl FnOnce(&mut BytesMut) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.buf.capacity() == 0 {
            self.buf = take_block();
        }
        let mut whole = Whole {
            len: self.buf.len(),
            buf: &mut self.buf,
        };
        encode(whole.buf)?;
        whole.len = whole.buf.len();
        Ok(())
    }

    /// Writes as much as the stream takes, and sets `progress` if it took any bytes. Completes when
    /// all output is written and flushed.
    ///
    /// If a flush is `awaited`, the bytes written earlier are flushed first, because a stream with
    /// constant output might otherwise never be flushed.
    pub(in crate::pipeline) fn poll_flush<Io: AsyncWrite + Unpin>(
        &mut self,
        io: &mut Io,
        awaited: bool,
        progress: &mut bool,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if awaited {
            ready!(self.poll_flush_stream(io, cx))?;
        }
        while !self.buf.is_empty() {
            let n = ready!(Pin::new(&mut *io).poll_write(cx, &self.buf))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.buf.advance(n);
            self.written += n as u64;
            *progress = true;
        }
        if self.buf.capacity() > 0 {
            give_block(std::mem::take(&mut self.buf));
        }
        self.poll_flush_stream(io, cx)
    }

    fn poll_flush_stream<Io: AsyncWrite + Unpin>(
        &mut self,
        io: &mut Io,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if self.flushed != self.written {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.flushed = self.written;
        }
        Poll::Ready(Ok(()))
    }

    /// Releases memory that the unwritten bytes do not need. Called before each wait.
    pub(in crate::pipeline) fn shrink(&mut self) {
        let len = self.buf.len();
        if self.buf.capacity() > len + SLACK.max(len / 16) {
            // The buffer gets room to grow. Otherwise each frame pushed while the peer takes
            // nothing would cost a copy of all the output before it.
            let mut smaller = BytesMut::with_capacity(len + len / 32);
            smaller.extend_from_slice(&self.buf);
            give_block(std::mem::replace(&mut self.buf, smaller));
        }
    }

    /// Drops the unwritten bytes.
    pub(in crate::pipeline) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// When dropped, truncates a buffer to its complete frames, even if the encoder fails or panics.
struct Whole<'a> {
    buf: &'a mut BytesMut,
    len: usize,
}

impl Drop for Whole<'_> {
    fn drop(&mut self) {
        self.buf.truncate(self.len);
    }
}

/// Takes the thread's block, or allocates a new one if the thread has none. The returned block is
/// empty and has room for at least [`BLOCK`] bytes.
fn take_block() -> BytesMut {
    let mut block = THREAD_BLOCK.try_with(Cell::take).unwrap_or_default();
    block.reserve(BLOCK);
    block
}

fn give_block(mut block: BytesMut) {
    block.clear();
    if block.try_reclaim(BLOCK) && block.capacity() <= LARGEST_KEPT {
        let _ended = THREAD_BLOCK.try_with(|place| place.set(block));
    }
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;

    use super::*;

    /// Returns output with one frame of `len` bytes, of which the peer has taken nothing.
    fn pending(len: usize) -> Output {
        let mut output = Output::default();
        push(&mut output, &vec![0; len]);
        output
    }

    /// Encodes a frame, then releases unneeded memory, as a connection does before each wait.
    fn push(output: &mut Output, frame: &[u8]) {
        let encoded = output.encode(|buf| {
            buf.put_slice(frame);
            Ok::<_, io::Error>(())
        });
        encoded.expect("it is encoded");
        output.shrink();
    }

    #[test]
    fn pushed_frames_seldom_copy_the_output_before_them() {
        let mut output = pending(1024 * 1024);
        let mut copies = 0;
        for _ in 0..100_000 {
            let before = output.buf.capacity();
            push(&mut output, &[0; 10]);
            copies += usize::from(output.buf.capacity() != before);
        }

        // The output has nearly doubled, by a thirty-second at a time.
        assert!(copies <= 24, "{copies} copies");
    }

    #[test]
    fn pending_output_holds_little_memory_that_it_does_not_need() {
        for len in [1, 100, 5_000, 20_000, 100_000, 1_000_000] {
            let mut output = pending(len);
            for _ in 0..1000 {
                push(&mut output, &vec![0; len.div_ceil(100)]);
                let (len, holds) = (output.buf.len(), output.buf.capacity());
                assert!(holds <= len + SLACK.max(len / 16), "{holds} for {len}");
            }
        }
    }
}
