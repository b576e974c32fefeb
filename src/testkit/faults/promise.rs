//! The promises of a server under faults, and the report of a broken one.

use std::error::Error;
use std::fmt;

use super::contract::Breach;
use super::plan::{Fault, Plan};
use super::run::{Seen, Talk};
use crate::end::EndReason;

/// A promise that a server of any protocol should keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Promise {
    /// Without faults, a client that half-closes after its input gets the expected bytes, and the
    /// connection ends in good order ([`EndReason::is_orderly`]).
    Plain,
    /// [Cuts](super::Fault::Cut) and [delays](super::Fault::Delay) change nothing: the client gets
    /// the same bytes as without faults, and the connection ends for the same reason.
    Same,
    /// Under any fault, the client gets a prefix of the expected bytes, followed at most by a
    /// [farewell](super::Check::farewell).
    Prefix,
    /// A client that half-closes gets at least the replies that it would get if it kept its sending
    /// side open.
    HalfClose,
    /// The connection ends within the time that [`Check::within`](super::Check::within) sets.
    Ends,
    /// The connection ends for a reason that the fault can cause, or for the same reason as without
    /// faults.
    Reason,
    /// The connection's permit is returned to the server's limit, and the server can be shut down.
    Released,
    /// The faults of one connection do not affect another connection of the same server.
    Others,
    /// Errors of accept(2) change nothing.
    Accepts,
    /// The same plan gives the same result.
    Repeats,
    /// Services are called as Tower's [contract](super::Contract) requires.
    Contract,
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "without faults, the expected bytes arrive",
            Self::Same => "cuts and delays change nothing",
            Self::Prefix => "replies are a prefix of the expected bytes",
            Self::HalfClose => "a half-closed client gets the replies that a silent one gets",
            Self::Ends => "the connection ends in time",
            Self::Reason => "the connection ends for a reason of the fault",
            Self::Released => "the connection's permit is returned, and the server shuts down",
            Self::Others => "other connections are served as before",
            Self::Accepts => "errors of accept change nothing",
            Self::Repeats => "the same plan gives the same result",
            Self::Contract => "services are called as Tower's contract says",
        })
    }
}

/// A broken promise, with a plan that breaks it. Returned by [`Check`](super::Check). A random plan
/// is reduced to the faults that are needed to break the promise.
///
/// Its `Debug` output equals its `Display` output, so that the panic message of an `unwrap` in a
/// test is readable.
#[derive(Clone)]
pub struct Broken {
    pub(super) promise: Promise,
    pub(super) plan: Box<Plan>,
    pub(super) seed: Option<u64>,
    pub(super) detail: String,
}

impl Broken {
    /// Returns the promise that was broken.
    pub fn promise(&self) -> Promise {
        self.promise
    }

    /// Returns the plan that breaks the promise, for [`Check::only`](super::Check::only).
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Returns the seed if the check created the plan from a seed. In this case,
    /// [`plan`](Self::plan) returns a reduced plan, which may have fewer faults than the plan from
    /// the seed.
    pub fn seed(&self) -> Option<u64> {
        self.seed
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken promise: {}; {}", self.promise, self.detail)?;
        write!(f, "; plan: {}", self.plan)?;
        if let Some(seed) = self.seed {
            write!(f, "; shortened from seed {seed}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error for Broken {}

/// The expected conversation.
pub(super) struct Expected {
    pub(super) output: Vec<u8>,
    pub(super) farewells: Vec<Vec<u8>>,
    pub(super) except: Vec<Promise>,
    /// The end reason of the conversation without faults, once it is known.
    pub(super) reason: Option<EndReason>,
}

impl Expected {
    /// Returns the received bytes without the farewell at their end, if there is one.
    pub(super) fn replies<'a>(&self, got: &'a [u8]) -> &'a [u8] {
        if self.output.starts_with(got) {
            return got;
        }
        let mut ends = self.farewells.iter();
        ends.find_map(|farewell| {
            let replies = got.strip_suffix(&farewell[..])?;
            self.output.starts_with(replies).then_some(replies)
        })
        .unwrap_or(got)
    }

    /// Returns the first promise that a run breaks, with a description. For a plan that only
    /// half-closes, `silent` contains the replies to a client that stops sending at the same byte
    /// without half-closing.
    pub(super) fn broken(
        &self,
        plan: &Plan,
        seen: &Seen,
        silent: Option<&[u8]>,
        breaches: &[Breach],
    ) -> Option<(Promise, String)> {
        let Talk { got, reason } = &seen.faulty;
        let plain = *plan == Plan::new();
        let whole = if plain { Promise::Plain } else { Promise::Same };
        let harmless = plan.is_harmless();
        let replies = self.replies(got);
        let text = |bytes: &[u8]| format!("`{}`", bytes.escape_ascii());
        let differ = || format!("expected {}, got {}", text(&self.output), text(got));
        let ended = reason.map_or("no end".to_owned(), |reason| reason.to_string());

        let checks = [
            (Promise::Ends, reason.is_some(), "it has not ended".into()),
            (whole, !harmless || *got == self.output, differ()),
            (whole, !harmless || self.same_reason(*reason), {
                format!("it ended with {ended}")
            }),
            (
                Promise::Plain,
                { !plain || reason.is_none_or(EndReason::is_orderly) },
                format!("it ended with {ended}"),
            ),
            (Promise::Prefix, self.output.starts_with(replies), differ()),
            (
                Promise::HalfClose,
                { silent.is_none_or(|silent| replies.starts_with(silent)) },
                {
                    let silent = text(silent.unwrap_or_default());
                    format!("a silent client gets {silent}, this one {}", text(replies))
                },
            ),
            (
                Promise::Reason,
                { reason.is_none_or(|reason| self.can_end(plan, reason)) },
                format!("it ended with {ended}"),
            ),
            (
                Promise::Others,
                seen.next.got == self.output && self.same_reason(seen.next.reason),
                format!("the other one got {}", text(&seen.next.got)),
            ),
            (Promise::Released, seen.released, "it is still taken".into()),
            (Promise::Contract, breaches.is_empty(), {
                let breaches: Vec<_> = breaches.iter().map(ToString::to_string).collect();
                breaches.join(", ")
            }),
        ];
        let broken = checks
            .into_iter()
            .find(|(promise, kept, _)| !kept && !self.except.contains(promise));
        broken.map(|(promise, _, detail)| (promise, detail))
    }

    /// Returns whether `reason` is the same as without faults. Also returns `true` if the reason
    /// without faults is not known yet.
    fn same_reason(&self, reason: Option<EndReason>) -> bool {
        self.reason.is_none() || reason == self.reason
    }

    fn can_end(&self, plan: &Plan, reason: EndReason) -> bool {
        if Some(reason) == self.reason {
            return true;
        }
        if plan.has(Fault::Panic) {
            return reason == EndReason::Panic;
        }
        if plan.has(Fault::Stall) {
            // After the client's half-close, the server may also stop waiting for a client that
            // does not read the reply.
            return reason.is_timeout()
                || matches!(reason, EndReason::ServiceClosed | EndReason::PeerReset);
        }
        !reason.is_timeout() && !matches!(reason, EndReason::Panic | EndReason::Killed)
    }
}
