//! The callbacks of one connection: for the moment when closing begins, and for the end.

use smallvec::SmallVec;

use super::origin::Origin;
use crate::end::End;

/// A callback. Its first argument is the connection's origin, so a closure need not capture it;
/// boxing a closure that captures nothing allocates no memory.
pub(crate) type Hook = Box<dyn FnOnce(&Origin, &End) + Send>;

/// The moment at which a callback runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// The connection begins to close. If it ends without closing, the callbacks for this moment
    /// run at the end, before the callbacks for [`End`](Self::End).
    Closing,
    /// The connection has ended: its reason is final, and its service is dropped. Its stream is
    /// dropped, too, unless the service has moved the stream to another task.
    End,
}

/// The number of a callback, used to remove it. A connection uses each number once.
///
/// Its lowest bit encodes the callback's [`Moment`], so that a slot needs no separate field for the
/// moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HookId(u64);

impl HookId {
    fn new(number: u64, at: Moment) -> Self {
        Self(number << 1 | u64::from(at == Moment::End))
    }

    fn at(self) -> Moment {
        if self.0 & 1 == 0 {
            Moment::Closing
        } else {
            Moment::End
        }
    }
}

type Slots = SmallVec<[Slot; 1]>;

struct Slot {
    id: HookId,
    hook: Option<Hook>,
}

/// The callbacks in registration order.
///
/// A removed callback leaves an empty slot until more than half of the slots are empty. A peer may
/// control the number of callbacks, so removing one must not take time in proportion to that
/// number.
#[derive(Default)]
pub(super) struct Hooks {
    slots: Slots,
    added: u64,
    empty: u32,
    /// `true` once the callbacks for [`Moment::Closing`] have been taken.
    closing: bool,
}

impl Hooks {
    /// Returns whether the callbacks for a moment have been taken. Always `false` for the end,
    /// because this value is dropped when those callbacks are taken.
    pub(super) fn is_past(&self, moment: Moment) -> bool {
        self.closing && moment == Moment::Closing
    }

    pub(super) fn add(&mut self, at: Moment, hook: Hook) -> HookId {
        self.added += 1;
        let id = HookId::new(self.added, at);
        let hook = Some(hook);
        self.slots.push(Slot { id, hook });
        id
    }

    pub(super) fn take(&mut self, id: HookId) -> Option<Hook> {
        let at = self.slots.binary_search_by_key(&id, |slot| slot.id).ok()?;
        let hook = self.slots[at].hook.take();
        self.empty += u32::from(hook.is_some());
        if 2 * self.empty as usize > self.slots.len() {
            self.slots.retain(|slot| slot.hook.is_some());
            self.empty = 0;
        }
        hook
    }

    /// Takes the callbacks for the moment when closing begins, in registration order.
    pub(super) fn take_closing(&mut self) -> Due {
        self.closing = true;
        // Few connections have a callback for this moment.
        let is_due = |slot: &Slot| slot.id.at() == Moment::Closing;
        if !self.slots.iter().any(is_due) {
            return Due::default();
        }
        let (due, rest) = std::mem::take(&mut self.slots)
            .into_iter()
            .filter(|slot| slot.hook.is_some())
            .partition(is_due);
        (self.slots, self.empty) = (rest, 0);
        Due(due)
    }

    /// Takes all callbacks: first those for the moment when closing begins, then those for the end,
    /// both in registration order.
    pub(super) fn take_all(&mut self) -> Due {
        self.closing = true;
        let mut due = std::mem::take(&mut self.slots);
        if due.len() > 1 {
            // The sort is stable.
            due.sort_by_key(|slot| slot.id.at() == Moment::End);
        }
        Due(due)
    }
}

/// Callbacks that are due, in the order in which they run.
#[derive(Default)]
pub(super) struct Due(Slots);

impl Due {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn run(self, mut run: impl FnMut(Hook)) {
        let hooks = self.0.into_iter().filter_map(|slot| slot.hook);
        hooks.for_each(&mut run);
    }
}
