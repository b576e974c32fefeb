//! One publisher and many subscribers: the `redis` example beside brokers.

mod broker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use tokio::io::{AsyncWriteExt, sink};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::bench::Bench;
use crate::load::{WARM_UP, allow_connections, nanos};
use crate::server::Running;
use crate::table::{self, Figure, Table};

use broker::{Broker, MARK, MOST_UNREAD, Protocol};

/// The number of subscribers, the bytes of a message, the number of messages that are published
/// ahead of their deliveries, and the number of subscribers that never read.
///
/// The messages are long where subscribers never read, so that the kernel's buffers are soon full.
const FORMS: [Form; 6] = [
    Form::new(500, 64, 1),
    Form::new(500, 64, 16),
    Form::new(500, 64, 64),
    Form::new(15_000, 64, 16),
    Form::new(500, 4096, 16),
    Form::new(500, 4096, 16).stalled(5),
];

/// The minimum number of bytes to publish if some subscribers never read. The kernel buffers up to
/// 4 MiB for each of these subscribers before the server has to.
const MORE_THAN_KERNEL: usize = 6 * 1024 * 1024;

/// A message that takes longer is lost.
const DEADLINE: Duration = Duration::from_secs(60);

/// A connection that is silent for this long counts as open.
const SILENCE: Duration = Duration::from_millis(100);

const FIGURES: [Figure; 4] = [
    Figure::new("CPU µs/delivery").digits(3).compared(),
    Figure::new("p99 ms").digits(2).compared(),
    Figure::new("KiB at most"),
    Figure::new("closed"),
];

#[derive(Clone, Copy)]
struct Form {
    subscribers: u32,
    stalled: u32,
    bytes: usize,
    ahead: usize,
}

impl Form {
    const fn new(subscribers: u32, bytes: usize, ahead: usize) -> Self {
        Self {
            subscribers,
            stalled: 0,
            bytes,
            ahead,
        }
    }

    const fn stalled(self, stalled: u32) -> Self {
        Self { stalled, ..self }
    }

    fn name(self) -> String {
        let Self {
            subscribers,
            stalled,
            bytes,
            ahead,
        } = self;
        match stalled {
            0 => format!("{subscribers}, {bytes} bytes, {ahead} ahead"),
            _ => format!("{subscribers} ({stalled} do not read), {bytes} bytes, {ahead} ahead"),
        }
    }
}

pub(crate) async fn print(bench: &Bench) -> Result<()> {
    let most = FORMS.iter().map(|form| form.subscribers).max();
    allow_connections(most.unwrap_or_default())?;
    let dir = tempfile::tempdir()?;
    let (brokers, missing) = broker::installed(dir.path())?;
    table::head(
        bench,
        "Fan-out",
        &format!(
            "One publisher sends some messages at once, and the next ones when every subscriber \
             that reads has them. The delay is that of the last subscriber, and the memory the \
             growth at its peak above that of the idle subscribers. A subscriber with more than \
             {MOST_UNREAD} unread bytes (mosquitto: 256 messages) is closed, or loses messages. \
             Each server has one thread.{missing}"
        ),
    )?;
    let servers: Vec<_> = brokers.iter().map(|it| it.server.clone()).collect();
    let mut table = Table::new("subscribers", FIGURES);
    for form in FORMS {
        let samples = bench
            .rounds(&servers, async |server| {
                let protocol = protocol(&brokers, server)?;
                measure(server, protocol, form, bench.period()).await
            })
            .await
            .with_context(|| form.name())?;
        table.rows(&form.name(), &servers, &samples);
    }
    table.print();
    Ok(())
}

fn protocol(brokers: &[Broker], server: &Running) -> Result<Protocol> {
    let mut named = brokers
        .iter()
        .filter(|it| it.server.name() == server.name());
    Ok(named.next().context("an unknown server")?.protocol)
}

async fn measure(
    server: &Running,
    protocol: Protocol,
    form: Form,
    period: Duration,
) -> Result<[f64; 4]> {
    let arrivals = Arc::new(Arrivals::default());
    let (mut readers, mut stalled) = (JoinSet::new(), Vec::new());
    for n in 0..form.subscribers {
        let stream = protocol
            .subscribe(server, n)
            .await
            .with_context(|| format!("subscriber {n}"))?;
        if n < form.stalled {
            stalled.push(stream);
        } else {
            readers.spawn(read(stream, Arc::clone(&arrivals)));
        }
    }
    let mut publisher = protocol.connect(server, form.subscribers).await?;
    let (mut answers, mut publisher) = publisher.split();
    let before = server.resident()?;

    let message = protocol.publish(form.bytes);
    let batch = message.repeat(form.ahead);
    let deliveries = form.ahead * readers.len();
    let published = async {
        let mut times = Histogram::<u64>::new(3)?;
        let begin = Instant::now() + WARM_UP;
        let mut cpu = None;
        let mut unsent = match form.stalled {
            0 => 0,
            _ => MORE_THAN_KERNEL,
        };
        while begin.elapsed() < period || times.is_empty() || unsent > 0 {
            let sent = Instant::now();
            if sent >= begin && cpu.is_none() {
                cpu = Some(server.cpu()?);
            }
            unsent = unsent.saturating_sub(batch.len());
            arrivals.expect(deliveries);
            publisher.write_all(&batch).await?;
            timeout(DEADLINE, arrivals.all())
                .await
                .context("a message was not delivered")?;
            if cpu.is_some() {
                times.record(nanos(sent.elapsed()))?;
            }
        }
        let cpu = server.cpu()? - cpu.context("nothing was measured")?;
        anyhow::Ok((times, cpu))
    };
    let mut unheeded = sink();
    let (times, cpu) = tokio::select! {
        published = published => published?,
        ended = readers.join_next() => bail!("a subscriber that reads was closed: {ended:?}"),
        ended = tokio::io::copy(&mut answers, &mut unheeded) => {
            bail!("the publisher was closed: {ended:?}")
        }
    };
    let grown = server.peak()?.saturating_sub(before);
    let mut closed = 0;
    for stream in stalled {
        closed += u32::from(is_closed(&stream).await);
    }
    Ok([
        cpu.as_secs_f64() * 1e6 / (times.len() as f64 * deliveries as f64),
        times.value_at_quantile(0.99) as f64 / 1e6,
        grown as f64 / 1024.0,
        f64::from(closed),
    ])
}

/// The deliveries that are still awaited.
#[derive(Default)]
struct Arrivals {
    awaited: AtomicUsize,
    none: Notify,
}

impl Arrivals {
    fn expect(&self, deliveries: usize) {
        self.awaited.store(deliveries, Ordering::Relaxed);
    }

    fn count(&self, deliveries: usize) {
        let awaited = self.awaited.fetch_sub(deliveries, Ordering::Relaxed);
        if awaited == deliveries && deliveries > 0 {
            self.none.notify_one();
        }
    }

    async fn all(&self) {
        self.none.notified().await;
    }
}

/// Reads and counts messages until the server closes the connection.
async fn read(stream: TcpStream, arrivals: Arc<Arrivals>) -> io::Result<()> {
    loop {
        stream.readable().await?;
        match take(&stream) {
            Ok(None) => return Ok(()),
            Ok(Some(messages)) => arrivals.count(messages),
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            Err(err) => return Err(err),
        }
    }
}

/// Reads once, onto the stack, so that a subscriber needs no buffer while it waits. Returns the
/// number of messages that began in these bytes, or `None` at the end.
fn take(stream: &TcpStream) -> io::Result<Option<usize>> {
    let mut input = [0; 16 * 1024];
    let read = stream.try_read(&mut input)?;
    Ok((read > 0).then(|| memchr::memchr_iter(MARK, &input[..read]).count()))
}

/// Reads what is left until the end or until silence.
async fn is_closed(stream: &TcpStream) -> bool {
    loop {
        match timeout(SILENCE, stream.readable()).await {
            Err(_silent) => return false,
            Ok(Err(_)) => return true,
            Ok(Ok(())) => match take(stream) {
                Ok(Some(_)) => {}
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Ok(None) | Err(_) => return true,
            },
        }
    }
}
