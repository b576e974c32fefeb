//! The load of echoed lines. Each connection sends its next batch once the whole previous batch has
//! come back.

use std::cell::RefCell;
use std::io;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use hdrhistogram::Histogram;
use memchr::memmem;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout};

use crate::server::Running;
use crate::table::Figure;

/// The time for which requests are sent before counting begins.
pub(crate) const WARM_UP: Duration = Duration::from_millis(500);

/// The number of connections.
pub(crate) const CONNECTIONS: usize = 32;

/// Far more time than any answer takes.
const DEADLINE: Duration = Duration::from_secs(5);

/// The number of other files that a process has open.
const OTHER_FILES: u32 = 100;

/// The input of each connection.
pub(crate) struct Load {
    line: Vec<u8>,
    /// The number of lines that are sent ahead of their answers.
    ahead: usize,
}

/// The figures that [`Load::measure`] returns.
pub(crate) const FIGURES: [Figure; 4] = [
    Figure::new("requests/s").compared(),
    Figure::new("CPU µs/request").digits(3).compared(),
    Figure::new("p50 µs"),
    Figure::new("p99 µs"),
];

impl Load {
    /// Sends lines of `bytes` bytes each, the line end included.
    pub(crate) fn lines(bytes: usize, ahead: usize) -> Self {
        Self {
            line: line(bytes),
            ahead,
        }
    }

    /// Sends requests for `period`. Returns the [`FIGURES`]: the answers per second, the CPU time
    /// of the server per request, and two percentiles of the time of a batch.
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

    /// Sends batches until the end; counts those sent after the warm-up.
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
            // Write and read at the same time. Otherwise each side could wait for the other to
            // read.
            tokio::try_join!(writer.write_all(&batch), reader.read_exact(&mut replies))?;
            if sent >= counted.start {
                times.borrow_mut().record(nanos(sent.elapsed()))?;
            }
        }
    }
}

/// Raises the limit of open files, so that this process and each server can have `number`
/// connections.
pub(crate) fn allow_connections(number: u32) -> Result<()> {
    let files = u64::from(number + OTHER_FILES);
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    ensure!(
        files <= most,
        "{number} connections need {files} open files, and the hard limit is {most}: raise it, as \
         with `ulimit -Hn {files}`"
    );
    // Child processes inherit this limit.
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(())
}

/// Connects for the `number`th time. Each connection uses the next source address, because the port
/// of a closed connection stays taken for a minute (`TIME_WAIT`) and one address would run out of
/// ports.
pub(crate) async fn connect(server: &Running, number: u32) -> io::Result<TcpStream> {
    let first = Ipv4Addr::new(127, 1, 0, 1).to_bits();
    let last = Ipv4Addr::new(127, 254, 0, 0).to_bits();
    let socket = TcpSocket::new_v4()?;
    let from = Ipv4Addr::from_bits(first + number % (last - first));
    socket.bind((from, 0).into())?;
    socket.connect(server.address()).await
}

/// Sends a request and waits for `answer`, which is the whole answer or its last bytes.
pub(crate) async fn ask<Io>(stream: &mut Io, request: &[u8], answer: &[u8]) -> Result<()>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(request).await?;
    stream.flush().await?;
    let mut received = Vec::new();
    while memmem::find(&received, answer).is_none() {
        let read = timeout(DEADLINE, stream.read_buf(&mut received)).await;
        let so_far = || format!("incomplete answer: {}", received.escape_ascii());
        ensure!(
            read.with_context(so_far)?? > 0,
            "{}, then the end",
            so_far()
        );
    }
    Ok(())
}

/// Returns a line of `bytes` bytes, the line end included.
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
