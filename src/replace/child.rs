//! Starts the new process, and watches it until the sockets are handed over to it.

use std::io;
use std::os::unix::net::UnixStream;
use std::process::Command;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines, Take};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process;
use tokio::task::spawn_blocking;

use super::error::ReplaceError;
use crate::bind::ListeningSocket;
use crate::bind::handover::{self, FromChild, GO};

/// The maximum number of bytes that are read from the new process.
const MAX_INPUT: u64 = 64 * 1024;

/// A new process. It is killed on drop, unless [`release`](Self::release) was called.
#[derive(Debug)]
pub(super) struct Child {
    process: Process,
    lines: Lines<BufReader<Take<OwnedReadHalf>>>,
    reply: OwnedWriteHalf,
    /// The indexes of the sockets that the new process has reported as served or closed.
    has: Vec<usize>,
}

impl Child {
    /// Starts a process that inherits these sockets.
    pub(super) async fn start(
        command: Command,
        sockets: &[ListeningSocket],
    ) -> Result<Self, ReplaceError> {
        Self::try_start(command, sockets)
            .await
            .map_err(ReplaceError::Start)
    }

    async fn try_start(mut command: Command, sockets: &[ListeningSocket]) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let (lines, reply) = tokio::net::UnixStream::from_std(ours)?.into_split();
        handover::hand_on(&mut command, sockets, theirs)?;
        // A fork copies the page tables of this process, so it may block. The command owns copies
        // of the descriptors. They are closed when the closure, which owns the command, ends.
        let started = spawn_blocking(move || {
            let started = process::Command::from(command).spawn();
            started.map(|child| Process(Some(child)))
        });
        Ok(Self {
            process: started.await.map_err(io::Error::other)??,
            lines: BufReader::new(lines.take(MAX_INPUT)).lines(),
            reply,
            has: Vec::new(),
        })
    }

    /// Waits until the new process is ready. Returns the indexes of the sockets that it serves.
    pub(super) async fn ready(&mut self) -> Result<Vec<usize>, ReplaceError> {
        loop {
            let line = tokio::select! {
                biased;
                line = self.lines.next_line() => line,
                ended = self.process.ended() => return Err(ended),
            };
            match line.map(|line| line.as_deref().map(FromChild::parse)) {
                // The stream must be writable, because `go` does not wait.
                Ok(Some(Some(FromChild::Ready(indexes))))
                    if self.reply.writable().await.is_ok() =>
                {
                    return Ok(indexes);
                }
                Ok(Some(Some(FromChild::Has(indexes)))) => self.has.extend(indexes),
                Ok(Some(_)) => {}
                // The process has ended, or it has closed the stream and so will never be ready.
                Ok(None) | Err(_) => return Err(self.process.ended().await),
            }
        }
    }

    /// Returns the endpoints of those `sockets` that the new process has neither begun to serve nor
    /// closed. Returns `None` if there are no such sockets, or if the new process has reported no
    /// socket so far.
    pub(super) fn waits_for(&self, sockets: &[ListeningSocket]) -> Option<String> {
        let sockets = sockets.iter().enumerate();
        let mut endpoints: Vec<_> = sockets
            .filter(|(at, _)| !self.has.contains(at))
            .map(|(_, socket)| socket.endpoint())
            .collect();
        endpoints.dedup();
        (!self.has.is_empty() && !endpoints.is_empty()).then(|| endpoints.join(", "))
    }

    /// Sends the reply that lets the new process accept. Returns `false` if the new process has
    /// closed the stream.
    pub(super) fn go(&self) -> bool {
        matches!(self.reply.try_write(GO), Ok(written) if written == GO.len())
    }

    /// Kills the process, unless it has ended. Returns how it ended.
    pub(super) async fn killed(&mut self) -> ReplaceError {
        self.kill().await;
        self.process.ended().await
    }

    pub(super) async fn kill(&mut self) {
        if let Some(child) = &mut self.process.0 {
            // This fails only if the process has ended.
            let _ended = child.kill().await;
        }
    }

    /// Drops this value without killing the process. Returns the process ID.
    pub(super) fn release(mut self) -> u32 {
        let child = self.process.0.take();
        child.and_then(|child| child.id()).unwrap_or_default()
    }
}

#[derive(Debug)]
struct Process(Option<process::Child>);

impl Process {
    async fn ended(&mut self) -> ReplaceError {
        match &mut self.0 {
            Some(child) => child
                .wait()
                .await
                .map_or_else(ReplaceError::Start, ReplaceError::Ended),
            None => std::future::pending().await,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // This fails only if the process has ended.
            let _ended = child.start_kill();
        }
    }
}
