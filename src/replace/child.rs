//! The new process, until it is ready.

use std::io;
use std::os::unix::net::UnixStream;
use std::process::Command;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines, Take};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process;
use tokio::task::spawn_blocking;

use super::error::ReplaceError;
use crate::bind::ListeningSocket;
use crate::bind::handover::{self, GO, Said};

/// The maximum number of bytes read from the new process.
const MOST: u64 = 64 * 1024;

/// A new process. It is killed on drop, unless it was released.
#[derive(Debug)]
pub(super) struct Child {
    process: Process,
    lines: Lines<BufReader<Take<OwnedReadHalf>>>,
    reply: OwnedWriteHalf,
    /// The endpoints that the new process does not serve yet.
    pub(super) waits_for: Option<String>,
}

impl Child {
    /// Starts a process with these sockets.
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
        // A fork copies the page tables of this process. The command, which owns copies of the
        // descriptors, ends with the closure.
        let started = spawn_blocking(move || {
            let started = process::Command::from(command).spawn();
            started.map(|child| Process(Some(child)))
        });
        Ok(Self {
            process: started.await.map_err(io::Error::other)??,
            lines: BufReader::new(lines.take(MOST)).lines(),
            reply,
            waits_for: None,
        })
    }

    /// Waits until the process is ready. Returns the places of the sockets that it serves.
    pub(super) async fn ready(&mut self) -> Result<Vec<usize>, ReplaceError> {
        loop {
            let line = tokio::select! {
                biased;
                line = self.lines.next_line() => line,
                ended = self.process.ended() => return Err(ended),
            };
            match line.map(|line| line.as_deref().map(Said::parse)) {
                Ok(Some(Some(Said::Ready(places)))) => return Ok(places),
                Ok(Some(Some(Said::WaitsFor(endpoints)))) => self.waits_for = Some(endpoints),
                Ok(Some(None)) => {}
                // It has ended, or has closed the stream and will never be ready.
                Ok(None) | Err(_) => return Err(self.process.ended().await),
            }
        }
    }

    /// Lets the process accept.
    pub(super) async fn go(&mut self) -> Result<(), ReplaceError> {
        match self.reply.write_all(GO).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.process.ended().await),
        }
    }

    pub(super) async fn kill(&mut self) {
        if let Some(child) = &mut self.process.0 {
            // It fails for a process that has ended.
            let _ended = child.kill().await;
        }
    }

    /// Lets the process run on. Returns its number.
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
            // It fails for a process that has ended.
            let _ended = child.start_kill();
        }
    }
}
