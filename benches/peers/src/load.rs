//! Requests over some connections, each of which sends a batch when it has all answers to the one before.

use std::cell::RefCell;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::server::Running;
use crate::table::Figure;

/// How long requests are sent before they are counted.
const WARM_UP: Duration = Duration::from_millis(500);

/// What is asked, and how.
pub struct Load {
    pub connections: usize,
    /// How many requests are sent ahead of their answers.
    pub ahead: usize,
    pub request: Vec<u8>,
    /// How long a reply is, in bytes.
    pub reply: usize,
    /// How long what a server says first is, in bytes.
    pub greeting: usize,
}

/// What [`Load::measure`] finds.
pub const FIGURES: [Figure; 4] = [
    Figure::new("requests/s").compared(),
    Figure::new("CPU µs/request").digits(3).compared(),
    Figure::new("p50 µs"),
    Figure::new("p99 µs"),
];

impl Load {
    /// Lines of so many bytes with their end, from 32 connections.
    pub fn lines(bytes: usize, ahead: usize) -> Self {
        Self {
            connections: 32,
            ahead,
            request: line(bytes),
            reply: bytes,
            greeting: 0,
        }
    }

    /// Sends requests for this long: how many were answered in a second, what each cost the server, and how long a batch took.
    pub async fn measure(&self, server: &Running, period: Duration) -> Result<[f64; 4]> {
        let times = RefCell::new(Histogram::<u64>::new(3)?);
        let begin = Instant::now() + WARM_UP;
        let end = begin + period;
        let clients = (0..self.connections).map(|_| self.client(server, begin..end, &times));
        let (_, cpu) = tokio::try_join!(try_join_all(clients), server.cpu_in(begin..end))?;

        let times = times.into_inner();
        let requests = (times.len() * self.ahead as u64) as f64;
        ensure!(requests > 0.0, "nothing was answered in {period:?}");
        Ok([
            requests / period.as_secs_f64(),
            micros(cpu) / requests,
            times.value_at_quantile(0.5) as f64 / 1e3,
            times.value_at_quantile(0.99) as f64 / 1e3,
        ])
    }

    /// Sends batches until the end, and counts those from the beginning on.
    async fn client(
        &self,
        server: &Running,
        counted: Range<Instant>,
        times: &RefCell<Histogram<u64>>,
    ) -> Result<()> {
        let mut stream = TcpStream::connect(server.address()).await?;
        stream.set_nodelay(true)?;
        stream.read_exact(&mut vec![0; self.greeting]).await?;
        let batch = self.request.repeat(self.ahead);
        let mut replies = vec![0; self.reply * self.ahead];
        loop {
            let sent = Instant::now();
            if sent >= counted.end {
                return Ok(());
            }
            stream.write_all(&batch).await?;
            stream.read_exact(&mut replies).await?;
            if sent >= counted.start {
                times.borrow_mut().record(nanos(sent.elapsed()))?;
            }
        }
    }
}

/// A line of so many bytes, its end included.
pub fn line(bytes: usize) -> Vec<u8> {
    let mut line = vec![b'x'; bytes];
    line[bytes - 1] = b'\n';
    line
}

pub fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
