//! The budget: the maximum number of connections that may be in their hooks at the same time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use futures_util::task::AtomicWaker;

/// The connections in their hooks, oldest first, up to a maximum.
#[derive(Clone, Debug)]
pub(super) struct Pending(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    max: usize,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    inside: BTreeMap<u64, Arc<Claim>>,
}

#[derive(Debug, Default)]
struct Claim {
    evicted: AtomicBool,
    waker: AtomicWaker,
}

impl Pending {
    pub(super) fn new(max: usize) -> Self {
        Self(Arc::new(Budget {
            max,
            queue: Mutex::default(),
        }))
    }

    /// Admits a connection. If the budget is used up, evicts the oldest connection.
    pub(super) fn enter(&self) -> Ticket {
        let claim = Arc::new(Claim::default());
        let mut queue = self.0.lock();
        let oldest = if queue.inside.len() >= self.0.max {
            queue.inside.pop_first()
        } else {
            None
        };
        let number = queue.next;
        queue.next += 1;
        queue.inside.insert(number, Arc::clone(&claim));
        drop(queue);
        if let Some((_, oldest)) = oldest {
            oldest.evicted.store(true, Ordering::Release);
            oldest.waker.wake();
        }
        Ticket {
            number,
            claim,
            pending: self.clone(),
        }
    }
}

impl Budget {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The slot of one connection in the budget. Dropping the ticket frees the slot.
#[derive(Debug)]
pub(super) struct Ticket {
    number: u64,
    claim: Arc<Claim>,
    pending: Pending,
}

impl Ticket {
    /// Waits until a newer connection has evicted this one.
    pub(super) fn evicted(&mut self) -> impl Future<Output = ()> + Unpin + '_ {
        std::future::poll_fn(|cx| {
            self.claim.waker.register(cx.waker());
            if self.claim.evicted.load(Ordering::Acquire) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.pending.0.lock().inside.remove(&self.number);
    }
}
