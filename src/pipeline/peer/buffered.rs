/// The amount of pending output of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffered {
    pub(super) bytes: usize,
    pub(super) frames: usize,
}

impl Buffered {
    /// Returns the number of encoded bytes that were still unwritten after the connection's last
    /// attempt to write. Bytes held by the operating system or by a TLS stream are not included.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the number of frames that were sent through a [`Peer`](super::Peer) or by a
    /// broadcast but are not encoded yet.
    pub fn frames(&self) -> usize {
        self.frames
    }
}
