/// The amount of pending output of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffered {
    pub(super) bytes: usize,
    pub(super) frames: usize,
}

impl Buffered {
    /// Returns the number of bytes that are encoded but not written. Bytes held by the operating
    /// system or by a TLS stream are not included.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the number of frames that were sent through a [`Peer`](super::Peer) or by a
    /// broadcast but are not encoded yet.
    pub fn frames(&self) -> usize {
        self.frames
    }
}
