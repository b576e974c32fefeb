//! Checks a whole server: repeats one conversation under each fault.

use std::collections::BTreeMap;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};

use super::contract::{Breach, Contract};
use super::listener::accept_errors;
use super::plan::{Fault, Plan};
use super::promise::{Broken, Expected, Promise};
use super::run::{Client, Seen, Stream, Wrapped, run};
use super::stream::Faulty;
use crate::connection::ConnectionService;

/// The default of [`Check::places`].
const PLACES: usize = 512;

/// The default of [`Check::within`]. It is longer than the deadlines of most protocols.
const WITHIN: Duration = Duration::from_secs(15 * 60);

/// The duration of [`Fault::Delay`] in the runs with a single fault. It is shorter than the
/// deadlines of most protocols.
const DELAY: Duration = Duration::from_millis(100);

/// Creates a check of a server under faults. Await the returned value to run the check.
///
/// `stack` is called for each run, and returns the connection stack of a new server. A client sends
/// `input`, half-closes, and reads to the end. Without faults it must get exactly `output`. See the
/// [module docs](super) for an example, and [`Promise`] for everything that is checked.
///
/// In each run there are two connections to the server: one with faults, and a plain one. Both have
/// the same conversation, so the server must give the same replies each time it gets the input.
///
/// The runs are, in this order:
///
/// - one without faults;
/// - one in which accept(2) fails with each of [`accept_errors`] in turn;
/// - one for each [`Fault`] at each byte of the input and of the output, at up to [512
///   places](Check::places) in each direction;
/// - one in which all input and output pass byte by byte;
/// - two for each of [64 seeded plans](Check::seeds).
#[doc(alias = "chaos")]
#[doc(alias = "turmoil")]
pub fn check<F, S>(stack: F, input: impl AsRef<[u8]>, output: impl AsRef<[u8]>) -> Check<F>
where
    F: FnMut() -> S,
    S: ConnectionService<Faulty>, // wrap a service of requests in `Pipeline` or `Http`
{
    Check {
        stack,
        input: input.as_ref().to_vec(),
        wrap: Box::new(|io| Box::pin(async { Ok(Box::new(io) as Box<dyn Stream>) })),
        expected: Expected {
            output: output.as_ref().to_vec(),
            farewells: Vec::new(),
            except: Vec::new(),
            reason: None,
        },
        within: WITHIN,
        places: PLACES,
        seeds: 0..64,
        only: None,
        contract: None,
        answered: BTreeMap::new(),
        lengths: [0; 2],
        runs: 0,
    }
}

/// A check of a server under faults. Created by [`check`]. Awaiting this value runs the check.
///
/// The check fails with the first promise that is [`Broken`].
///
/// # Panics
///
/// The future panics if tokio's clock is not paused, because waiting for the deadlines in real time
/// would take hours.
#[must_use = "a check runs when it is awaited"]
pub struct Check<F> {
    stack: F,
    input: Vec<u8>,
    wrap: Box<dyn Fn(DuplexStream) -> Wrapped>,
    expected: Expected,
    within: Duration,
    places: usize,
    seeds: Range<u64>,
    only: Option<Plan>,
    contract: Option<Contract>,
    /// The replies to a client that stops sending but does not half-close. The key is the number of
    /// bytes that the client has sent.
    answered: BTreeMap<u64, Vec<u8>>,
    /// The numbers of bytes that the server reads and that it writes in a run without faults.
    lengths: [usize; 2],
    runs: usize,
}

impl<F> Check<F> {
    /// Sets the time within which a connection must end, on the paused clock. Once the connections
    /// of a run have ended, the server has the same time to return their permits and to shut down.
    ///
    /// Default: 15 min. Why: it is longer than the deadlines of most protocols. When reached:
    /// [`Promise::Ends`] is broken by the connection with faults, [`Promise::Others`] by the plain
    /// one, or [`Promise::Released`] by the server. In the run with failing accepts,
    /// [`Promise::Accepts`] is broken instead.
    pub fn within(mut self, time: Duration) -> Self {
        self.within = time;
        self
    }

    /// Wraps the client's side of each connection, for example in TLS. The faults are then at each
    /// byte of the wrapped conversation, which begins with the handshake.
    ///
    /// ```no_run
    /// # use std::convert::Infallible;
    /// # use std::sync::Arc;
    /// # use bytes::Bytes;
    /// # use tokio_rustls::TlsConnector;
    /// # use tokio_rustls::rustls::ClientConfig;
    /// # use tower::ServiceBuilder;
    /// # use tower_tcp::frame::Lines;
    /// # use tower_tcp::preconnect::PreConnectLayer;
    /// # use tower_tcp::testkit::faults::{self, Broken};
    /// # use tower_tcp::{Pipeline, tls::Tls};
    /// # async fn secured(tls: Tls, client: Arc<ClientConfig>) -> Result<(), Broken> {
    /// let stack = move || {
    ///     let echo = tower::service_fn(|line: Bytes| async move { Ok::<_, Infallible>(line) });
    ///     ServiceBuilder::new()
    ///         .layer(PreConnectLayer::new(tls.clone()))
    ///         .service(Pipeline::new(Lines::default).service(echo))
    /// };
    /// faults::check(stack, "one\ntwo\n", "one\ntwo\n")
    ///     .client(move |io| {
    ///         let name = "localhost".try_into().expect("a host name");
    ///         TlsConnector::from(Arc::clone(&client)).connect(name, io)
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn client<W, C, Io>(mut self, wrap: W) -> Self
    where
        W: Fn(DuplexStream) -> C + 'static,
        C: Future<Output = io::Result<Io>> + 'static,
        Io: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        self.wrap = Box::new(move |io| {
            let wrapped = wrap(io);
            Box::pin(async { Ok(Box::new(wrapped.await?) as Box<dyn Stream>) })
        });
        self
    }

    /// Allows the server to send these bytes after the replies if a fault ends the connection.
    /// Examples are a pipeline's farewell, and the reply to half a request. Each further call
    /// allows an alternative.
    pub fn farewell(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.expected.farewells.push(bytes.as_ref().to_vec());
        self
    }

    /// Excludes a promise from the check, for a protocol that does not keep it.
    ///
    /// A server without an idle deadline keeps the connection of a silent client forever. Exclude
    /// both [`Promise::Ends`] and [`Promise::Released`] for such a server, because a connection
    /// that does not end also keeps its permit.
    pub fn except(mut self, promise: Promise) -> Self {
        self.expected.except.push(promise);
        self
    }

    /// Sets the maximum number of places at which faults are tried in each direction. A fault can
    /// be placed before any byte of the conversation, or at the end of the client's input.
    ///
    /// Default: 512. Why: in most conversations, each direction has fewer than 512 bytes, so faults
    /// are tried before each byte. When reached: the places are spread evenly over the bytes.
    pub fn places(mut self, places: usize) -> Self {
        self.places = places;
        self
    }

    /// Sets the seeds of the random plans ([`Plan::seeded`]).
    ///
    /// Default: `0..64`. Why: few plans are enough, because the runs with single faults, which come
    /// first, find most bugs.
    pub fn seeds(mut self, seeds: Range<u64>) -> Self {
        self.seeds = seeds;
        self
    }

    /// Limits the check to the conversation without faults and to this plan, to examine one
    /// failure. All promises that apply to the plan are checked.
    ///
    /// The plan runs twice, for [`Promise::Repeats`]. An empty plan runs once more, with failed
    /// accepts, for [`Promise::Accepts`]. If the plan's only fault is [`Fault::End`] in the input,
    /// there is one more run, with [`Fault::Stall`] instead, for [`Promise::HalfClose`]. A breach
    /// of a contract in that run is reported with `plan`.
    pub fn only(mut self, plan: Plan) -> Self {
        self.only = Some(plan);
        self
    }

    /// Checks after each run that `contract`, a layer in the stack, has found no breach.
    pub fn contract(mut self, contract: &Contract) -> Self {
        self.contract = Some(contract.clone());
        self
    }
}

impl<F, S> Check<F>
where
    F: FnMut() -> S,
    S: ConnectionService<Faulty>, // wrap a service of requests in `Pipeline` or `Http`
{
    async fn all(mut self) -> Result<Passed, Broken> {
        must_be_paused().await;
        let plain = Plan::new();
        let seen = self.try_plan(&plain).await?;
        self.expected.reason = seen.faulty.reason;
        if let Some(plan) = self.only.take() {
            return self.try_only(&plan).await;
        }
        self.try_accepts().await?;

        let faults = [
            Fault::Cut,
            Fault::Delay(DELAY),
            Fault::Stall,
            Fault::End,
            Fault::Reset,
            Fault::Panic,
        ];
        for fault in faults {
            for at in places(self.lengths[0] + 1, self.places) {
                let seen = self.try_plan(&plain.clone().read(at, fault)).await?;
                if fault == Fault::Stall {
                    self.note_answered(at, &seen);
                }
            }
            for at in places(self.lengths[1], self.places) {
                self.try_plan(&plain.clone().write(at, fault)).await?;
            }
        }
        self.try_plan(&plain.pieces(1)).await?;

        for seed in self.seeds.clone() {
            let plan = Plan::seeded(seed, self.lengths[0], self.lengths[1]);
            if let Err(broken) = self.try_twice(&plan).await {
                return Err(self.shorten(broken, seed).await);
            }
        }
        Ok(Passed { runs: self.runs })
    }

    async fn try_only(mut self, plan: &Plan) -> Result<Passed, Broken> {
        if *plan == Plan::new() {
            self.try_accepts().await?;
        }
        if let Some(at) = only_end(plan) {
            // The result of this run is not checked, because it has another plan.
            let seen = self
                .run(&Plan::new().read(at, Fault::Stall), Vec::new())
                .await;
            self.note_answered(at, &seen);
        }
        self.try_twice(plan).await?;
        Ok(Passed { runs: self.runs })
    }

    /// Records the replies to a client that stopped sending after `at` bytes.
    fn note_answered(&mut self, at: u64, seen: &Seen) {
        let replies = self.expected.replies(&seen.faulty.got).to_vec();
        self.answered.insert(at, replies);
    }

    async fn run(&mut self, plan: &Plan, errors: Vec<io::Error>) -> Seen {
        self.runs += 1;
        let client = Client {
            wrap: &self.wrap,
            input: &self.input,
            within: self.within,
        };
        let (seen, lengths) = run((self.stack)(), plan, errors, client).await;
        if *plan == Plan::new() {
            self.lengths = lengths.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        }
        seen
    }

    async fn try_plan(&mut self, plan: &Plan) -> Result<Seen, Broken> {
        let seen = self.run(plan, Vec::new()).await;
        let silent = only_end(plan).and_then(|at| self.answered.get(&at));
        let silent = silent.map(Vec::as_slice);
        match self.expected.broken(plan, &seen, silent, &self.breaches()) {
            Some((promise, detail)) => Err(broken(promise, plan, detail)),
            None => Ok(seen),
        }
    }

    async fn try_accepts(&mut self) -> Result<(), Broken> {
        if self.expected.except.contains(&Promise::Accepts) {
            return Ok(());
        }
        let plain = Plan::new();
        let seen = self.run(&plain, accept_errors()).await;
        match self.expected.broken(&plain, &seen, None, &self.breaches()) {
            Some((Promise::Contract, detail)) => Err(broken(Promise::Contract, &plain, detail)),
            Some((_, detail)) => Err(broken(Promise::Accepts, &plain, detail)),
            None => Ok(()),
        }
    }

    fn breaches(&self) -> Vec<Breach> {
        let contract = self.contract.as_ref();
        contract.map(Contract::breaches).unwrap_or_default()
    }

    async fn try_twice(&mut self, plan: &Plan) -> Result<(), Broken> {
        let first = self.try_plan(plan).await?;
        let second = self.try_plan(plan).await?;
        if first == second || self.expected.except.contains(&Promise::Repeats) {
            return Ok(());
        }
        let detail = format!("first {:?}, then {:?}", first.faulty, second.faulty);
        Err(broken(Promise::Repeats, plan, detail))
    }

    /// Removes parts of the plan as long as the rest still breaks the same promise.
    async fn shorten(&mut self, mut broken: Broken, seed: u64) -> Broken {
        'shorter: loop {
            for plan in broken.plan.shorter() {
                match self.try_twice(&plan).await {
                    Err(same) if same.promise == broken.promise => {
                        broken = same;
                        continue 'shorter;
                    }
                    _ => {}
                }
            }
            broken.seed = Some(seed);
            return broken;
        }
    }
}

impl<F, S> IntoFuture for Check<F>
where
    F: FnMut() -> S + 'static,
    S: ConnectionService<Faulty>, // wrap a service of requests in `Pipeline` or `Http`
{
    type Output = Result<Passed, Broken>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output>>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.all())
    }
}

impl<F> fmt::Debug for Check<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Check")
            .field("within", &self.within)
            .field("places", &self.places)
            .field("seeds", &self.seeds)
            .field("only", &self.only)
            .finish_non_exhaustive()
    }
}

/// The result of a check in which no promise was broken.
#[derive(Clone, Copy, Debug)]
pub struct Passed {
    runs: usize,
}

impl Passed {
    /// Returns the number of runs.
    pub fn runs(self) -> usize {
        self.runs
    }
}

fn broken(promise: Promise, plan: &Plan, detail: String) -> Broken {
    Broken {
        promise,
        plan: Box::new(plan.clone()),
        seed: None,
        detail,
    }
}

/// Returns the place of the fault if the plan's only fault is that the peer closes the input.
fn only_end(plan: &Plan) -> Option<u64> {
    match (&plan.reads[..], &plan.writes[..]) {
        ([(at, Fault::End)], []) => Some(*at),
        _ => None,
    }
}

/// Returns at most `most` places for faults, spread evenly over `count` bytes.
fn places(count: usize, most: usize) -> impl Iterator<Item = u64> {
    let chosen = count.min(most);
    (0..chosen).map(move |n| (n * count / chosen) as u64)
}

/// Checks that tokio's clock is paused.
///
/// # Panics
///
/// Panics if the clock is not paused.
#[expect(
    clippy::disallowed_types,
    reason = "only another clock tells whether tokio's is paused"
)]
async fn must_be_paused() {
    let real = std::time::Instant::now();
    let virtual_time = Duration::from_secs(2);
    tokio::time::sleep(virtual_time).await;
    assert!(
        real.elapsed() < virtual_time,
        "faults::check needs a paused clock: `#[tokio::test(start_paused = true)]`"
    );
}
