//! The checks at the end of a connection.

use std::collections::BTreeMap;

use bytes::BytesMut;
use tower_tcp::EndReason;

use super::record::{Case, Leg, Log, Then, Way};
use super::wire::{Kind, LINES, RAW, Request, Tag, take_frame};

/// The bytes that a peer has read, in order of arrival.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) legs: [SeenLeg; 2],
    pub(crate) raw: Vec<u8>,
    pub(crate) farewell: bool,
}

#[derive(Default)]
pub(crate) struct SeenLeg {
    pub(crate) replies: Vec<Tag>,
    pub(crate) pushes: BTreeMap<usize, usize>,
}

/// Returns an error unless the condition holds.
macro_rules! check {
    ($condition:expr, $($arg:tt)+) => {
        if !$condition {
            return Err(format!($($arg)+));
        }
    };
}
pub(crate) use check;

impl Seen {
    pub(crate) fn parse(case: &Case, mut bytes: BytesMut, whole: bool) -> Result<Self, String> {
        let mut seen = Self::default();
        let mut leg = LINES;
        while leg != RAW {
            let Some(frame) = take_frame(leg, &mut bytes) else {
                break;
            };
            let text = String::from_utf8_lossy(&frame);
            let Some(tag) = Tag::parse(&text) else {
                return Err(format!("not a frame: {text:?}"));
            };
            if tag.kind == Kind::Farewell {
                check!(bytes.is_empty(), "behind the farewell: {bytes:?}");
                check!(tag.of == leg, "of leg {leg}: {tag:?}");
                seen.farewell = true;
                break;
            }
            if tag.kind == Kind::Push {
                let next = seen.legs[leg].pushes.entry(tag.of).or_default();
                check!(tag.n == *next, "push {next} of {} is {tag:?}", tag.of);
                *next += 1;
                continue;
            }
            seen.legs[leg].replies.push(tag);
            if tag.kind == Kind::LastReply {
                leg = if case.two_legs { leg + 1 } else { RAW };
            }
        }
        if leg == RAW {
            seen.raw = bytes.to_vec();
        } else {
            check!(!whole || bytes.is_empty(), "half a frame: {bytes:?}");
        }
        Ok(seen)
    }
}

impl Leg {
    /// Returns the frames that a peer must see if it keeps reading, and whether every call that
    /// matters has finished.
    pub(crate) fn replies(&self, case: &Case) -> (Vec<Tag>, bool) {
        let ends = |then| match then {
            Then::GoOn => false,
            Then::Close | Then::Upgrade => true,
            Then::Fail => case.shutdown_on_error,
        };
        let mut tags = Vec::new();
        if case.way == Way::Multiplexed {
            let mut ended = false;
            for call in &self.finished {
                let call = &self.calls[*call];
                tags.extend(&call.tags);
                ended |= call.then.is_some_and(ends);
            }
            return (tags, ended || self.finished.len() == self.calls.len());
        }
        for call in &self.calls {
            let Some(then) = call.then else {
                return (tags, false);
            };
            tags.extend(&call.tags);
            if ends(then) {
                break;
            }
        }
        (tags, true)
    }

    pub(crate) fn never_finishes(&self) -> bool {
        let pends = |command: &str| command.starts_with("pend");
        self.delivered.iter().any(|request| match request {
            Request::Command(command) => pends(command),
            Request::Block(_) => false,
        })
    }

    pub(crate) fn has_finished(&self, sought: Then) -> bool {
        self.calls.iter().any(|call| call.then == Some(sought))
    }
}

impl Log {
    pub(crate) fn check(&self, case: &Case) -> Result<(), String> {
        let [end] = &self.ends[..] else {
            return Err(format!("it ended {} times", self.ends.len()));
        };
        let reason = end.reason();
        check!(
            self.can_end_with(case, reason),
            "there was no reason for {reason}: {end:?}"
        );
        let lossy = self.aborted
            || self.was_reset
            || self.stalled
            || matches!(
                reason,
                EndReason::WriteTimeout | EndReason::DrainDeadline | EndReason::PeerReset
            );
        let all_came = reason == EndReason::PeerClosed && self.half_closed && !self.was_reset;
        let seen = Seen::parse(case, self.read.clone(), !lossy)
            .map_err(|err| format!("{reason}: {err}"))?;
        for (n, leg) in self.legs.iter().enumerate() {
            leg.check(case, &self.sent[n], &seen.legs[n], lossy, all_came)
                .map_err(|err| format!("{reason}, leg {n}: {err}"))?;
        }
        if all_came {
            let came: usize = self.legs.iter().map(|leg| leg.delivered.len()).sum();
            let sent: usize = self.sent.iter().map(Vec::len).sum();
            check!(came == sent, "{came} of {sent} requests were delivered");
            check!(self.read_raw.len() == self.sent_raw.len(), "raw bytes lost");
        }
        check!(
            self.sent_raw.starts_with(&self.read_raw),
            "raw: {:?} came as {:?}",
            self.sent_raw,
            self.read_raw
        );
        check!(
            self.read_raw.starts_with(&seen.raw) && (lossy || seen.raw == self.read_raw),
            "raw: {:?} came back as {:?}",
            self.read_raw,
            seen.raw
        );
        let by_server = matches!(reason, EndReason::Drained | EndReason::FrameTimeout);
        check!(
            by_server || lossy || !seen.farewell,
            "{reason} has a farewell"
        );
        // No farewell is sent after the peer has finished sending, or a service has closed or
        // upgraded.
        let by_peer = self.half_closed || self.cut_short;
        let by_service = self.closed
            || [Then::Close, Then::Upgrade]
                .iter()
                .any(|then| self.legs.iter().any(|leg| leg.has_finished(*then)));
        check!(
            !by_server || lossy || by_peer || by_service || seen.farewell,
            "{reason} has no farewell"
        );
        let requests: usize = self.legs.iter().map(|leg| leg.delivered.len()).sum();
        check!(end.requests() == requests as u64, "{requests}: {end:?}");
        let undelivered: u64 = self.legs.iter().map(|leg| leg.undelivered).sum();
        check!(
            end.messages_dropped() == undelivered,
            "{undelivered} messages were dropped: {end:?}"
        );
        Ok(())
    }

    pub(crate) fn can_end_with(&self, case: &Case, reason: EndReason) -> bool {
        let finished = |then| self.legs.iter().any(|leg| leg.has_finished(then));
        match reason {
            EndReason::PeerClosed => self.half_closed || self.was_reset,
            // After the peer has finished sending, a call may not run forever.
            EndReason::PeerReset => {
                self.was_reset || (self.half_closed && self.legs.iter().any(Leg::never_finishes))
            }
            EndReason::Truncated => self.cut_short || self.was_reset,
            EndReason::ServiceClosed => self.closed || finished(Then::Close),
            EndReason::ServiceError => case.shutdown_on_error && finished(Then::Fail),
            EndReason::Aborted => self.aborted,
            EndReason::WriteTimeout => self.stalled,
            EndReason::Drained => self.drained,
            // A drain does not wait forever for the rest of a frame.
            EndReason::FrameTimeout => self.drained && self.cut_short,
            EndReason::DrainDeadline => {
                self.drained
                    && (self.stalled || self.cut_short || self.legs.iter().any(Leg::never_finishes))
            }
            _ => false,
        }
    }
}

impl Leg {
    pub(crate) fn check(
        &self,
        case: &Case,
        sent: &[Request],
        seen: &SeenLeg,
        lossy: bool,
        all_came: bool,
    ) -> Result<(), String> {
        check!(
            sent.starts_with(&self.delivered),
            "{sent:?} came as {:?}",
            self.delivered
        );
        let (replies, all_finished) = self.replies(case);
        check!(
            lossy || all_finished || self.never_finishes(),
            "a call was dropped"
        );
        check!(
            replies.starts_with(&seen.replies),
            "replies {replies:?} came as {:?}",
            seen.replies
        );
        check!(
            lossy || replies == seen.replies,
            "of {} replies {} came, all_came: {all_came}",
            replies.len(),
            seen.replies.len()
        );
        for (of, pushed) in &self.pushed {
            let came = seen.pushes.get(of).copied().unwrap_or_default();
            let taken = pushed.taken;
            check!(
                came == taken || (lossy && came < taken),
                "of {taken} pushes of {of} {came} came"
            );
        }
        check!(self.running == 0, "{} calls still run", self.running);
        check!(self.alive == 0, "{} messages are kept", self.alive);
        check!(
            self.told <= self.crossed + 2 * self.marks_set,
            "{} crossings were told of {}",
            self.told,
            self.crossed
        );
        check!(
            lossy || self.told.is_multiple_of(2),
            "it ended above its mark"
        );
        Ok(())
    }
}
