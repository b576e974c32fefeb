//! Lines that are echoed, over some connections, each of which sends a batch when it has all of the one before.

use std::cell::RefCell;
use std::io;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::Instant;

use crate::server::Running;
use crate::table::Figure;

/// How long requests are sent before they are counted.
pub(crate) const WARM_UP: Duration = Duration::from_millis(500);

/// How many connections there are.
pub(crate) const CONNECTIONS: usize = 32;

/// What each of them sends.
pub(crate) struct Load {
    line: Vec<u8>,
    /// How many lines are sent ahead of their answers.
    ahead: usize,
}

/// What [`Load::measure`] finds.
pub(crate) const FIGURES: [Figure; 4] = [
    Figure::new("requests/s").compared(),
    Figure::new("CPU µs/request").digits(3).compared(),
    Figure::new("p50 µs"),
    Figure::new("p99 µs"),
];

impl Load {
    /// Lines of so many bytes, their ends included.
    pub(crate) fn lines(bytes: usize, ahead: usize) -> Self {
        Self {
            line: line(bytes),
            ahead,
        }
    }

    /// Sends requests for this long: how many were answered in a second, what each cost the server, and how long a batch took.
    pub(crate) async fn measure(&self, server: &Running, period: Duration) -> Result<[f64; 4]> {
        let times = RefCell::new(Histogram::<u64>::new(3)?);
        let begin = Instant::now() + WARM_UP;
        let end = begin + period;
        let clients = (0..CONNECTIONS).map(|_| self.client(server, begin..end, &times));
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
        let (mut reader, mut writer) = stream.split();
        let batch = self.line.repeat(self.ahead);
        let mut replies = batch.clone();
        loop {
            let sent = Instant::now();
            if sent >= counted.end {
                return Ok(());
            }
            // At the same time, or both sides might wait for the other to read.
            tokio::try_join!(writer.write_all(&batch), reader.read_exact(&mut replies))?;
            if sent >= counted.start {
                times.borrow_mut().record(nanos(sent.elapsed()))?;
            }
        }
    }
}

/// Connects the `number`th time. Each comes from an address of its own, so that ports do not run short: for each address, connections that were closed
/// hold theirs for a minute (`TIME_WAIT`).
pub(crate) async fn connect(server: &Running, number: u32) -> io::Result<TcpStream> {
    let first = Ipv4Addr::new(127, 1, 0, 1).to_bits();
    let last = Ipv4Addr::new(127, 254, 0, 0).to_bits();
    let socket = TcpSocket::new_v4()?;
    let from = Ipv4Addr::from_bits(first + number % (last - first));
    socket.bind((from, 0).into())?;
    socket.connect(server.address()).await
}

/// A line of so many bytes, its end included.
pub(crate) fn line(bytes: usize) -> Vec<u8> {
    let mut line = vec![b'x'; bytes];
    line[bytes - 1] = b'\n';
    line
}

pub(crate) fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

pub(crate) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
