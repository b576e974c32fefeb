//! Decrypts and encrypts the TLS records of one connection, without I/O.

use std::mem;

use bytes::{Buf, BytesMut};
use tokio::io::ReadBuf;
use tokio_rustls::rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use tokio_rustls::rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus,
};
use tokio_rustls::rustls::{CommonState, Error};

/// The size of a record's header, in bytes. The last two bytes of the header are the length of the
/// rest of the record.
const HEADER: usize = 5;

/// The size of the largest record that rustls accepts. After the handshake, at most this much
/// incomplete input is kept.
const LARGEST_RECORD: usize = HEADER + 16 * 1024 + 2048;

/// The size of the largest handshake message that rustls accepts (65,535 bytes), rounded up. During
/// the handshake, at most this much incomplete input is kept, because a message may span several
/// records.
const LARGEST_HANDSHAKE: usize = 64 * 1024;

/// The minimum number of bytes by which the memory for an incomplete record grows, unless the
/// record needs fewer.
const STEP: usize = 4 * 1024;

/// A TLS session. It holds no buffers while the connection is idle.
pub(super) struct Records {
    session: UnbufferedServerConnection,
    /// Incomplete input: a part of a record, or records with a part of a handshake message.
    partial: Vec<u8>,
    /// Decrypted bytes that did not fit into the reader's buffer.
    plain: BytesMut,
    /// Records that are not written yet.
    output: BytesMut,
    /// The error that ended the session. After an error, nothing is decrypted or encrypted.
    failed: Option<Error>,
    /// Set once the peer has sent `close_notify`.
    is_ended: bool,
    /// Set if nothing more may be encrypted: [`close`](Self::close) was called, or a write of
    /// encrypted data failed, panicked or is in progress.
    is_closed: bool,
}

impl Records {
    pub(super) fn new(session: UnbufferedServerConnection) -> Self {
        Self {
            session,
            partial: Vec::new(),
            plain: BytesMut::new(),
            output: BytesMut::new(),
            failed: None,
            is_ended: false,
            is_closed: false,
        }
    }

    pub(super) fn session(&self) -> &CommonState {
        &self.session
    }

    /// Returns the error that ended the session, if any.
    pub(super) fn failed(&self) -> Option<Error> {
        self.failed.clone()
    }

    /// Returns whether the peer has sent `close_notify`.
    pub(super) fn is_ended(&self) -> bool {
        self.is_ended
    }

    /// Returns the capacity of the buffers for input, in bytes.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.partial.capacity() + self.plain.capacity()
    }

    /// Returns the records to write.
    pub(super) fn output(&mut self) -> &mut BytesMut {
        &mut self.output
    }

    /// Removes `n` written bytes from the output, and releases its memory if it is then empty.
    pub(super) fn wrote(&mut self, n: usize) {
        advance(&mut self.output, n);
    }

    /// Moves decrypted bytes to the reader's buffer.
    pub(super) fn take_plain(&mut self, to: &mut ReadBuf<'_>) {
        let n = self.plain.len().min(to.remaining());
        if n > 0 {
            to.put_slice(&self.plain[..n]);
            advance(&mut self.plain, n);
        }
    }

    /// Decrypts input in place, and copies the decrypted bytes to the reader's buffer `to`. Keeps
    /// decrypted bytes that do not fit, and the incomplete rest of the input. If the session fails,
    /// keeps the error, and appends the alert to the output.
    pub(super) fn receive(&mut self, mut input: &mut [u8], to: &mut ReadBuf<'_>) {
        while !self.partial.is_empty() && !input.is_empty() {
            let missing = self.missing();
            let (next, rest) = input.split_at_mut(missing.min(input.len()));
            // Memory is reserved in small steps, because the peer may send the rest late or never.
            // For an incomplete record, no more is reserved than the record needs.
            if self.partial.capacity() - self.partial.len() < next.len() {
                let more = next.len().max(missing.min(STEP));
                self.partial.reserve_exact(more);
            }
            self.partial.extend_from_slice(next);
            input = rest;
            let mut partial = mem::take(&mut self.partial);
            let used = self.process(&mut partial, to);
            if used < partial.len() {
                partial.drain(..used);
                self.partial = partial;
            }
        }
        if !input.is_empty() {
            let used = self.process(input, to);
            self.partial = input[used..].to_vec();
        }
        let most = if self.session.is_handshaking() {
            LARGEST_HANDSHAKE
        } else {
            LARGEST_RECORD
        };
        if self.partial.len() > most {
            self.fail(Error::General("message buffer full".to_owned()));
        }
    }

    /// Returns the number of bytes that are missing from the first record of the incomplete input,
    /// or from the record's header if the header is incomplete. If the record is complete, the
    /// input is incomplete because a handshake message continues in later records. All further
    /// bytes may belong to that message, so the result is `usize::MAX`.
    fn missing(&self) -> usize {
        let [_, _, _, high, low, body @ ..] = &self.partial[..] else {
            return HEADER - self.partial.len();
        };
        match usize::from(u16::from_be_bytes([*high, *low])).saturating_sub(body.len()) {
            0 => usize::MAX,
            missing => missing,
        }
    }

    /// Processes the complete records of `input`, and returns the number of bytes that are no
    /// longer needed.
    fn process(&mut self, input: &mut [u8], to: &mut ReadBuf<'_>) -> usize {
        let mut used = 0;
        while self.failed.is_none() && !self.is_ended {
            match self.step(input, &mut used, to) {
                Ok(true) => {}
                Ok(false) => return used,
                Err(err) => self.fail(err),
            }
        }
        // Bytes after `close_notify`, or after an error, are ignored.
        input.len()
    }

    /// Lets the session decrypt records or encode one record. Returns `false` if the session needs
    /// more input.
    fn step(
        &mut self,
        input: &mut [u8],
        used: &mut usize,
        to: &mut ReadBuf<'_>,
    ) -> Result<bool, Error> {
        let UnbufferedStatus { discard, state } =
            self.session.process_tls_records(&mut input[*used..]);
        *used += discard;
        match state? {
            ConnectionState::ReadTraffic(mut records) => {
                while let Some(record) = records.next_record() {
                    let record = record?;
                    *used += record.discard;
                    let fits = record.payload.len().min(to.remaining());
                    let (fits, rest) = record.payload.split_at(fits);
                    to.put_slice(fits);
                    self.plain.extend_from_slice(rest);
                }
            }
            // Early data could be a replay, so it is dropped.
            ConnectionState::ReadEarlyData(mut records) => {
                while let Some(record) = records.next_record() {
                    *used += record?.discard;
                }
            }
            ConnectionState::EncodeTlsData(data) => encode(data, &mut self.output)?,
            ConnectionState::TransmitTlsData(data) => data.done(),
            ConnectionState::PeerClosed => self.is_ended = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn fail(&mut self, err: Error) {
        self.failed = Some(err);
        self.partial = Vec::new();
        self.queue();
    }

    /// Moves records that the session wants to send, such as an alert, to the output.
    fn queue(&mut self) {
        while self.session.wants_write() {
            // The session returns such records before it processes any input.
            let UnbufferedStatus { state, .. } = self.session.process_tls_records(&mut []);
            let Ok(ConnectionState::EncodeTlsData(data)) = state else {
                return;
            };
            if encode(data, &mut self.output).is_err() {
                return;
            }
        }
    }

    /// Encrypts bytes into `records`, which grows as needed. Returns the number of bytes written to
    /// `records`. The caller must send these bytes after the pending output.
    pub(super) fn encrypt(&mut self, bytes: &[u8], records: &mut Vec<u8>) -> Result<usize, Error> {
        loop {
            if let Some(err) = self.failed() {
                return Err(err);
            }
            // rustls needs the incomplete input here, because the session may have parsed a part of
            // a handshake message in it.
            let UnbufferedStatus { state, .. } =
                self.session.process_tls_records(&mut self.partial);
            match state {
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    match traffic.encrypt(bytes, records) {
                        Ok(n) => return Ok(n),
                        Err(EncryptError::InsufficientSize(size)) => {
                            records.resize(size.required_size, 0);
                        }
                        Err(err) => self.fail(Error::General(err.to_string())),
                    }
                }
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, &mut self.output)?,
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(_) => return Err(Error::HandshakeNotComplete),
                Err(err) => self.fail(err),
            }
        }
    }

    /// Forbids (`true`) or allows (`false`) sending. While sending is forbidden, the stream
    /// encrypts nothing more, and [`close`](Self::close) appends no `close_notify`.
    pub(super) fn set_closed(&mut self, closed: bool) {
        self.is_closed = closed;
    }

    /// Returns whether nothing more may be encrypted: [`close`](Self::close) was called, or a write
    /// of encrypted data failed or panicked.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Ends sending. Appends `close_notify` to the output, unless sending had already ended or the
    /// session has failed. An alert for a failure was already appended when the session failed.
    pub(super) fn close(&mut self) {
        if mem::replace(&mut self.is_closed, true) || self.failed.is_some() {
            return;
        }
        // `receive` has encoded everything that the session had to send, so the session can now
        // send data.
        let UnbufferedStatus { state, .. } = self.session.process_tls_records(&mut self.partial);
        if let Ok(ConnectionState::WriteTraffic(mut traffic)) = state {
            // The buffer that is passed here is empty, so the session keeps the alert, and `queue`
            // moves it to the output.
            _ = traffic.queue_close_notify(&mut []);
        }
        self.queue();
    }
}

/// Removes the first bytes of a buffer, and releases its memory if it is then empty.
fn advance(buffer: &mut BytesMut, n: usize) {
    buffer.advance(n);
    if buffer.is_empty() {
        *buffer = BytesMut::new();
    }
}

fn encode(
    mut data: EncodeTlsData<'_, ServerConnectionData>,
    output: &mut BytesMut,
) -> Result<(), Error> {
    let start = output.len();
    // The error for a buffer that is too small contains the required size, so the first call passes
    // an empty buffer.
    if let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) {
        output.resize(start + size.required_size, 0);
    }
    match data.encode(&mut output[start..]) {
        Ok(_) => Ok(()),
        Err(err) => Err(Error::General(err.to_string())),
    }
}
