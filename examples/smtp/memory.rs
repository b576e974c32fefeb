//! Mails in memory: the newest ones, as many as there is room for.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The mails in memory. Clones share them.
#[derive(Clone)]
pub(crate) struct Memory(Arc<Shared>);

struct Shared {
    /// One permit for each octet. Incoming mails count, too, so the bound holds for many clients at
    /// once. (A growing buffer may take up to twice as much.)
    room: Arc<Semaphore>,
    mails: Mutex<VecDeque<Mail>>,
}

struct Mail {
    text: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

impl Memory {
    /// Creates a store with room for `room` octets.
    pub(crate) fn new(room: usize) -> Self {
        Self(Arc::new(Shared {
            room: Arc::new(Semaphore::new(room.min(Semaphore::MAX_PERMITS))),
            mails: Mutex::default(),
        }))
    }

    pub(crate) fn begin(&self) -> Draft {
        Draft {
            memory: self.clone(),
            text: Vec::new(),
            room: None,
        }
    }

    /// Returns the mails, oldest first.
    pub(crate) fn mails(&self) -> Vec<Bytes> {
        self.lock().iter().map(|mail| mail.text.clone()).collect()
    }

    /// Reserves room for `octets` octets. Evicts the oldest mails if there is not enough.
    fn room(&self, octets: usize) -> io::Result<OwnedSemaphorePermit> {
        let octets = u32::try_from(octets).map_err(|_too_many| io::ErrorKind::StorageFull)?;
        loop {
            if let Ok(room) = Arc::clone(&self.0.room).try_acquire_many_owned(octets) {
                return Ok(room);
            }
            if self.lock().pop_front().is_none() {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Mail>> {
        self.0.mails.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct Draft {
    memory: Memory,
    text: Vec<u8>,
    room: Option<OwnedSemaphorePermit>,
}

impl Draft {
    pub(crate) fn write(&mut self, text: &[u8]) -> io::Result<()> {
        let more = self.memory.room(text.len())?;
        match &mut self.room {
            Some(room) => room.merge(more),
            None => self.room = Some(more),
        }
        self.text.extend_from_slice(text);
        Ok(())
    }

    pub(crate) fn keep(mut self) {
        self.text.shrink_to_fit();
        let mail = Mail {
            text: self.text.into(),
            _room: self.room,
        };
        self.memory.lock().push_back(mail);
    }
}
