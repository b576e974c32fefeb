//! The keys and their values, in memory.
//!
//! One lock guards all keys, so MSET is atomic. The lock is held only for a small part of a
//! request, so a request takes no more CPU time with two threads than with one. Stored bytes are
//! copied, because even a few bytes of the input would keep a whole input block in memory.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::time::Instant;

/// All keys. As in Redis' default configuration, their number has no limit.
#[derive(Default)]
pub(crate) struct Store(Mutex<Keys>);

/// The bytes of a value and its reference count, in one allocation.
pub(crate) type Text = Arc<[u8]>;

#[derive(Default)]
struct Keys {
    entries: HashMap<Box<[u8]>, Entry>,
    /// The expiry times, with their keys.
    expiries: BTreeSet<(Instant, Box<[u8]>)>,
}

/// A value with its expiry time. Together with its key, it fits into a cache line.
struct Entry {
    value: Value,
    expires: Option<Instant>,
}

enum Value {
    String(Text),
    /// A counter. Reading it returns its decimal digits.
    Number(i64),
    #[expect(clippy::box_collection, reason = "so that an entry is small")]
    List(Box<VecDeque<Text>>),
}

/// The condition for setting a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Always,
    IfAbsent,
    IfPresent,
}

/// The reason why an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum StoreError {
    #[error("WRONGTYPE Operation against a key holding the wrong kind of value")]
    WrongType,
    #[error("ERR value is not an integer or out of range")]
    NotInteger,
    #[error("ERR increment or decrement would overflow")]
    Overflow,
}

impl Store {
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Text>, StoreError> {
        self.lock().get(key)
    }

    /// Returns several values at once. A value that is not a string counts as absent.
    pub(crate) fn get_all<'a>(&self, keys: impl Iterator<Item = &'a [u8]>) -> Vec<Option<Text>> {
        let all = self.lock();
        keys.map(|key| all.get(key).unwrap_or(None)).collect()
    }

    /// Sets a key, with or without an expiry time. Returns whether it was set.
    pub(crate) fn set(
        &self,
        key: &[u8],
        value: &[u8],
        condition: Condition,
        expires: Option<Duration>,
    ) -> bool {
        let mut keys = self.lock();
        let met = match condition {
            Condition::Always => true,
            Condition::IfAbsent => !keys.entries.contains_key(key),
            Condition::IfPresent => keys.entries.contains_key(key),
        };
        if met {
            // If the time is beyond the clock's range, the key does not expire.
            let expires = expires.and_then(|after| Instant::now().checked_add(after));
            keys.set(key, Value::string(value), expires);
        }
        met
    }

    /// Sets several keys at once.
    pub(crate) fn set_all<'a>(&self, pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>) {
        let mut keys = self.lock();
        for (key, value) in pairs {
            keys.set(key, Value::string(value), None);
        }
    }

    /// Removes keys. Returns how many of them existed.
    pub(crate) fn remove<'a>(&self, removed: impl Iterator<Item = &'a [u8]>) -> usize {
        let mut keys = self.lock();
        removed.filter(|key| keys.remove(key)).count()
    }

    /// Returns how many of these keys exist.
    pub(crate) fn count<'a>(&self, counted: impl Iterator<Item = &'a [u8]>) -> usize {
        let keys = self.lock();
        counted
            .filter(|key| keys.entries.contains_key(*key))
            .count()
    }

    /// Adds one to a number; a missing key counts as zero.
    pub(crate) fn increment(&self, key: &[u8]) -> Result<i64, StoreError> {
        let mut keys = self.lock();
        let Some(entry) = keys.entries.get_mut(key) else {
            keys.set(key, Value::Number(1), None);
            return Ok(1);
        };
        let n: i64 = match &entry.value {
            Value::Number(n) => *n,
            Value::String(text) => number(text)?,
            Value::List(_) => return Err(StoreError::WrongType),
        };
        let n = n.checked_add(1).ok_or(StoreError::Overflow)?;
        entry.value = Value::Number(n);
        Ok(n)
    }

    /// Pushes values to the front of a list, one after the other. Returns its length.
    pub(crate) fn push_front<'a>(
        &self,
        key: &[u8],
        values: impl Iterator<Item = &'a [u8]>,
    ) -> Result<usize, StoreError> {
        let mut keys = self.lock();
        if !keys.entries.contains_key(key) {
            keys.set(key, Value::List(Box::default()), None);
        }
        let Some(Value::List(list)) = keys.entries.get_mut(key).map(|entry| &mut entry.value)
        else {
            return Err(StoreError::WrongType);
        };
        for value in values {
            list.push_front(value.into());
        }
        Ok(list.len())
    }

    /// Pops the first value of a list. The key is removed with the last value.
    pub(crate) fn pop_front(&self, key: &[u8]) -> Result<Option<Text>, StoreError> {
        let mut keys = self.lock();
        let Some(entry) = keys.entries.get_mut(key) else {
            return Ok(None);
        };
        let Value::List(list) = &mut entry.value else {
            return Err(StoreError::WrongType);
        };
        let first = list.pop_front();
        if list.is_empty() {
            keys.remove(key);
        }
        Ok(first)
    }

    /// Returns a range of a list, both ends included. Negative positions count from the end.
    pub(crate) fn range(&self, key: &[u8], start: i64, stop: i64) -> Result<Vec<Text>, StoreError> {
        let keys = self.lock();
        let list = match keys.entries.get(key).map(|entry| &entry.value) {
            None => return Ok(Vec::new()),
            Some(Value::List(list)) => list,
            Some(_) => return Err(StoreError::WrongType),
        };
        let len = i64::try_from(list.len()).unwrap_or(i64::MAX);
        let from_front = |index: i64| if index < 0 { index + len } else { index };
        let start = usize::try_from(from_front(start)).unwrap_or(0);
        // A stop before the first element selects nothing.
        let end = usize::try_from(from_front(stop).saturating_add(1)).unwrap_or(0);
        let taken = end.saturating_sub(start);
        Ok(list.iter().skip(start).take(taken).cloned().collect())
    }

    /// Returns the number of keys, and how many of them expire.
    pub(crate) fn len(&self) -> (usize, usize) {
        let keys = self.lock();
        (keys.entries.len(), keys.expiries.len())
    }

    /// Locks the keys, and removes those that have expired.
    fn lock(&self) -> MutexGuard<'_, Keys> {
        let mut keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !keys.expiries.is_empty() {
            keys.expire(Instant::now());
        }
        keys
    }
}

/// Parses an integer. As in Redis, it has no plus sign and does not begin with a zero, so that a
/// number is never changed by being stored as one.
pub(crate) fn number(word: &[u8]) -> Result<i64, StoreError> {
    let digits = word.strip_prefix(b"-").unwrap_or(word);
    let plain = word == b"0" || matches!(digits, [b'1'..=b'9', ..]);
    let text = std::str::from_utf8(word).ok().filter(|_| plain);
    let number = text.and_then(|text| text.parse().ok());
    number.ok_or(StoreError::NotInteger)
}

impl Value {
    fn string(value: &[u8]) -> Self {
        Self::String(value.into())
    }
}

impl Keys {
    fn get(&self, key: &[u8]) -> Result<Option<Text>, StoreError> {
        match self.entries.get(key).map(|entry| &entry.value) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(Value::Number(n)) => Ok(Some(n.to_string().into_bytes().into())),
            Some(Value::List(_)) => Err(StoreError::WrongType),
        }
    }

    fn set(&mut self, key: &[u8], value: Value, expires: Option<Instant>) {
        let entry = Entry { value, expires };
        let before = match self.entries.get_mut(key) {
            Some(there) => std::mem::replace(there, entry).expires,
            None => {
                self.entries.insert(key.into(), entry);
                None
            }
        };
        self.forget_expiry(key, before);
        if let Some(at) = expires {
            self.expiries.insert((at, key.into()));
        }
    }

    fn remove(&mut self, key: &[u8]) -> bool {
        let removed = self.entries.remove(key);
        if let Some(entry) = &removed {
            self.forget_expiry(key, entry.expires);
        }
        removed.is_some()
    }

    fn forget_expiry(&mut self, key: &[u8], at: Option<Instant>) {
        if let Some(at) = at {
            self.expiries.remove(&(at, key.into()));
        }
    }

    fn expire(&mut self, now: Instant) {
        while self.expiries.first().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, key)) = self.expiries.pop_first() {
                self.entries.remove(&key);
            }
        }
    }
}
