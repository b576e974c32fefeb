//! The faults of one connection, each at a byte of its input or output.

use std::fmt;
use std::time::Duration;

/// The longest delay of a seeded plan, in milliseconds. It is shorter than the deadlines of most
/// protocols.
const LONGEST_DELAY: u64 = 100;

/// A fault of a stream. It happens when all bytes before its place in a [`Plan`] have been read or
/// written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The read or write ends here. The remaining bytes pass when the task is polled again.
    Cut,
    /// The bytes after this place are delayed by this time.
    Delay(Duration),
    /// No more bytes pass in this direction, and there is no error. A read sees a silent peer. A
    /// write sees a peer that takes no more bytes.
    Stall,
    /// The peer closes this direction. In the input, reads return the end of the stream. In the
    /// output, writes fail with [`BrokenPipe`](std::io::ErrorKind::BrokenPipe).
    End,
    /// The peer resets the connection. After that, reads and writes fail with
    /// [`ConnectionReset`](std::io::ErrorKind::ConnectionReset).
    Reset,
    /// The stream panics, as a custom stream may.
    Panic,
}

impl Fault {
    /// Returns whether a server must behave as if this fault did not happen.
    pub(super) fn is_harmless(self) -> bool {
        matches!(self, Self::Cut | Self::Delay(_))
    }
}

/// The faults of one connection. With an empty plan, the connection has no faults.
///
/// The place of a fault is the number of bytes that the server reads or writes before it. So `read`
/// faults are in the bytes that the client sends. The `Display` output is the Rust code that
/// creates the plan.
///
/// ```
/// use tower_tcp::testkit::faults::{Fault, Plan};
///
/// let plan = Plan::new().read(12, Fault::Cut).write(3, Fault::Stall);
/// assert_eq!(
///     plan.to_string(),
///     "Plan::new().read(12, Fault::Cut).write(3, Fault::Stall)",
/// );
/// assert_eq!(Plan::seeded(7, 100, 100), Plan::seeded(7, 100, 100));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[doc(alias = "script")]
pub struct Plan {
    pub(super) reads: Vec<(u64, Fault)>,
    pub(super) writes: Vec<(u64, Fault)>,
    pub(super) pieces: Option<usize>,
}

impl Plan {
    /// Creates a plan without faults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a fault after the first `at` bytes that the server reads.
    #[must_use]
    pub fn read(mut self, at: u64, fault: Fault) -> Self {
        add(&mut self.reads, at, fault);
        self
    }

    /// Adds a fault after the first `at` bytes that the server writes.
    #[must_use]
    pub fn write(mut self, at: u64, fault: Fault) -> Self {
        add(&mut self.writes, at, fault);
        self
    }

    /// Cuts all input and output into pieces of at most `bytes` bytes. `0` counts as 1.
    #[must_use]
    pub fn pieces(mut self, bytes: usize) -> Self {
        self.pieces = Some(bytes.max(1));
        self
    }

    /// Creates a plan of one to six faults from a seed. Each fault comes after at most `input`
    /// bytes that the server reads, or after at most `output` bytes that it writes. The same
    /// arguments give the same plan.
    ///
    /// Most of the faults are harmless: cuts, and delays of at most 100 ms. About a quarter of the
    /// plans also cut all input and output into pieces of at most 8 bytes.
    #[must_use]
    pub fn seeded(seed: u64, input: usize, output: usize) -> Self {
        let mut random = Random(seed);
        let mut plan = Self::new();
        if random.below(4) == 0 {
            plan = plan.pieces(random.pick(7) + 1);
        }
        let faults = 1 + random.below(6);
        for n in 0..faults {
            let fault = match random.below(8) {
                0 if n == 0 => Fault::Stall,
                1 if n == 0 => Fault::End,
                2 if n == 0 => Fault::Reset,
                3..=4 => Fault::Delay(Duration::from_millis(1 + random.below(LONGEST_DELAY))),
                _ => Fault::Cut,
            };
            plan = if random.below(2) == 0 {
                plan.read(random.pick(input) as u64, fault)
            } else {
                plan.write(random.pick(output) as u64, fault)
            };
        }
        plan
    }

    /// Returns copies of this plan, each with one fault fewer, or without the limit of `pieces`.
    pub(super) fn shorter(&self) -> Vec<Self> {
        let mut plans = Vec::new();
        for n in 0..self.reads.len() {
            let mut plan = self.clone();
            plan.reads.remove(n);
            plans.push(plan);
        }
        for n in 0..self.writes.len() {
            let mut plan = self.clone();
            plan.writes.remove(n);
            plans.push(plan);
        }
        if self.pieces.is_some() {
            let mut plan = self.clone();
            plan.pieces = None;
            plans.push(plan);
        }
        plans
    }

    pub(super) fn is_harmless(&self) -> bool {
        let mut faults = self.reads.iter().chain(&self.writes);
        faults.all(|(_, fault)| fault.is_harmless())
    }

    pub(super) fn has(&self, sought: Fault) -> bool {
        let mut faults = self.reads.iter().chain(&self.writes);
        faults.any(|(_, fault)| *fault == sought)
    }
}

/// Inserts a fault, ordered by place. Faults at the same place keep the order in which they were
/// added.
fn add(faults: &mut Vec<(u64, Fault)>, at: u64, fault: Fault) {
    let place = faults.partition_point(|(other, _)| *other <= at);
    faults.insert(place, (at, fault));
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Plan::new()")?;
        if let Some(bytes) = self.pieces {
            write!(f, ".pieces({bytes})")?;
        }
        for (name, faults) in [("read", &self.reads), ("write", &self.writes)] {
            for (at, fault) in faults {
                write!(f, ".{name}({at}, Fault::")?;
                match fault {
                    Fault::Delay(time) => {
                        f.write_str("Delay(Duration::")?;
                        match u64::try_from(time.as_millis()) {
                            Ok(millis) if Duration::from_millis(millis) == *time => {
                                write!(f, "from_millis({millis})))")?;
                            }
                            _ => write!(f, "new({}, {})))", time.as_secs(), time.subsec_nanos())?,
                        }
                    }
                    other => write!(f, "{other:?})")?,
                }
            }
        }
        Ok(())
    }
}

/// The random number generator `SplitMix64`. The same seed gives the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// Picks a number from zero to `last`, inclusive.
    fn pick(&mut self, last: usize) -> usize {
        usize::try_from(self.below((last as u64).saturating_add(1))).unwrap_or(last)
    }
}
